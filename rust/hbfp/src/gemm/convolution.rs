//! Convolutions as implicit products: a tensor is encoded once, along its channels at each pixel or along the batch, and
//! the panels of the product are put together from these codes, a few rows at a time.
//!
//! Images are channels-last, [batch, pixels, channels]; a kernel is [out, in / groups, taps] with any strides. Clauses
//! 6.14 to 6.18 of the specification say what is computed.
#![allow(unsafe_code, reason = "tasks that write disjoint panels, rows and tiles")]
#![allow(clippy::too_many_arguments, reason = "a product: two operands, their codings, the output")]

mod prepared;
mod reach;

use self::prepared::{Image, KernelCopy, Plane};
use self::reach::{Lines, NOWHERE, Reach, Rows};
use super::cache::Caches;
use super::tiles::{Kernel, Left, LeftBlocks, PanelBlocks, Task, Tiles};
use super::{Coding, Epilogue, ROOM, Workspace, driver, fitting, general, offset, tiles};
use crate::arch::generic::encode::STRIP;
use crate::arch::generic::product::{Correction, PANEL_ROWS};
use crate::arch::kernels::Kernels;
use crate::encode::blocks::Scratch;
use crate::encode::codes::Codes;
use crate::encode::filling::{Filling, Fillings, Job, Source, reserve_scratch};
use crate::encode::panels::{Form, PanelLayout, Panels, PanelsMut, PanelsRef, Side};
use crate::encode::{Context, check_size, forms};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, BlockShape, MAX_BLOCK};
use crate::mem::{AlignedBytes, SharedMut};
use crate::parallel::{DefaultFloatMode, Serial, Stage, for_each_stage, for_each_task};
use crate::shape::{FloatLines, FloatTensor, element_count};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Shape of a convolution; sizes of fewer than three spatial dimensions are preceded by ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// Samples.
    pub batch: usize,
    /// Channels of X and of Y.
    pub channels: [usize; 2],
    /// Groups.
    pub groups: usize,
    /// Pixels of X.
    pub input: [usize; 3],
    /// Pixels of Y.
    pub output: [usize; 3],
    /// Taps.
    pub kernel: [usize; 3],
    /// Pixels of X from a pixel of Y to the next.
    pub stride: [usize; 3],
    /// Pixels before the first of X.
    pub padding: [usize; 3],
    /// Pixels of X from a tap to the next.
    pub dilation: [usize; 3],
}

/// X or dY of a weight gradient.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// The image.
    Floats(&'a [f32]),
    /// What [`Convolution::keep`] wrote of it.
    Kept(&'a [u8]),
}

/// Which image of a weight gradient, by its place in the convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// X.
    Input,
    /// dY, in whose place a transposed convolution has its input.
    Output,
}

/// Rows of random bits are counted in 32 bits.
fn check_rows(rows: usize, of: &str) -> Result<()> {
    if rows as u64 > 1 << 32 {
        let expected = format!("at most 2^32 rows of the {of} (the product of all dimensions but the last)");
        return Err(Error::shape(expected, rows.to_string()));
    }
    Ok(())
}

fn product_of(sizes: [usize; 3]) -> usize {
    sizes.iter().product()
}

impl Convolution {
    fn taps(&self) -> usize {
        product_of(self.kernel)
    }
    fn input_image(&self) -> Image {
        Image { batch: self.batch, pixels: self.input, channels: self.channels[0] }
    }
    fn output_image(&self) -> Image {
        Image { batch: self.batch, pixels: self.output, channels: self.channels[1] }
    }
    fn group_channels(&self) -> [usize; 2] {
        self.channels.map(|channels| channels / self.groups)
    }

    /// # Errors
    /// [`Error::Shape`] for sizes that describe no convolution.
    pub fn check(&self) -> Result<()> {
        let Self { batch, channels, groups, input, output, kernel, stride, padding, dilation } = *self;
        let below = |n: usize| n < 1 << 31;
        let positive = groups > 0 && [stride, dilation, kernel].iter().flatten().all(|&n| n > 0);
        // Each by itself, too: a size of zero makes any product small.
        let small = [input, output, kernel, stride, padding, dilation].iter().flatten().all(|&n| below(n))
            && [input, output, kernel].iter().all(|sizes| element_count(sizes).is_ok_and(below));
        if !(positive && small && below(batch) && channels.iter().all(|c| c % groups == 0)) {
            let expected = "positive strides, dilations and taps, channels in whole groups, fewer than 2^31 samples, \
                            pixels and taps, and strides, dilations and padding below 2^31";
            return Err(Error::shape(expected, format!("{self:?}")));
        }
        for (pixels, channels) in [(input, channels[0]), (output, channels[1])] {
            element_count(&[batch, product_of(pixels), channels, ROOM])?;
        }
        element_count(&[channels[1], channels[0] / groups, product_of(kernel), ROOM])?;
        Ok(())
    }

    fn check_kernel(&self, w: &FloatTensor<'_>) -> Result<()> {
        let [k0, k1, k2] = self.kernel;
        let expected = [self.channels[1], self.group_channels()[0], k0, k1, k2];
        if w.shape() != expected {
            return Err(Error::shape(format!("a kernel of shape {expected:?}"), format!("{:?}", w.shape())));
        }
        element_count(&expected[..4]).and_then(|rows| check_rows(rows, "kernel"))
    }

    /// From pixels of Y to those of X.
    fn reach(&self) -> Reach {
        Reach::new(self.output, self.kernel, self.input, |d, o, k| {
            let p = (o * self.stride[d] + k * self.dilation[d]).checked_sub(self.padding[d])?;
            (p < self.input[d]).then_some(p)
        })
    }

    /// From pixels of X to those of Y.
    fn reverse(&self) -> Reach {
        Reach::new(self.input, self.kernel, self.output, |d, p, k| {
            let distance = (p + self.padding[d]).checked_sub(k * self.dilation[d])?;
            let o = distance / self.stride[d];
            (distance % self.stride[d] == 0 && o < self.output[d]).then_some(o)
        })
    }

    /// Y [batch, output pixels, out channels] ← X [batch, input pixels, in channels] with kernel w, plus bias.
    /// `flatten`: blocks run over the flattened patch.
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not fit; [`Error::Format`] for tiles and whole tensors.
    pub fn forward(
        &self,
        ctx: &Context<'_>,
        x: &[f32],
        w: &FloatTensor<'_>,
        codings: [Coding; 2],
        flatten: bool,
        bias: Option<&[f32]>,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.by_pixels(ctx, x, w, Taps::Forward, codings, flatten, bias, out, workspace)
    }

    /// dX [batch, input pixels, in channels] ← dY [batch, output pixels, out channels] with kernel w: also the forward
    /// product of a transposed convolution, which may have a bias.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn input_gradient(
        &self,
        ctx: &Context<'_>,
        dy: &[f32],
        w: &FloatTensor<'_>,
        codings: [Coding; 2],
        bias: Option<&[f32]>,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.by_pixels(ctx, dy, w, Taps::Backward, codings, false, bias, out, workspace)
    }

    fn check_formats(codings: [Coding; 2], k: usize) -> Result<usize> {
        for Coding { format, .. } in codings {
            if !matches!(format.shape(), BlockShape::Line(_)) {
                return Err(Error::format("blocks in lines for a convolution", format.to_string()));
            }
        }
        let [left, right] = codings.map(|coding| coding.format);
        let block = left.block_along(k);
        if block != right.block_along(k) {
            return Err(Error::shape(format!("equal blocks: {left} has {block}"), right.to_string()));
        }
        Ok(block)
    }

    /// Products whose rows are pixels and whose pieces are taps.
    fn by_pixels(
        &self,
        ctx: &Context<'_>,
        x: &[f32],
        w: &FloatTensor<'_>,
        direction: Taps,
        codings: [Coding; 2],
        flatten: bool,
        bias: Option<&[f32]>,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check()?;
        let [group_in, group_out] = self.group_channels();
        let ([from, to], [channels, columns]) = match direction {
            Taps::Forward => ([0, 1], [group_in, group_out]),
            Taps::Backward => ([1, 0], [group_out, group_in]),
        };
        let images = [self.input_image(), self.output_image()];
        let (image, taps, out_channels) = (images[from], self.taps(), self.channels[to]);
        let [pixels, row_pixels] = [from, to].map(|side| product_of(images[side].pixels));
        check_size("elements of the image", x.len(), self.batch * pixels * image.channels)?;
        check_size("elements of out", out.len(), self.batch * row_pixels * out_channels)?;
        self.check_kernel(w)?;
        if let Some(bias) = bias {
            check_size("elements of bias", bias.len(), out_channels)?;
        }
        let line = if flatten { taps * channels } else { channels };
        let block = Self::check_formats(codings, line)?;
        if flatten {
            element_count(&[self.batch, self.groups, row_pixels]).and_then(|rows| check_rows(rows, "patches"))?;
        } else {
            image.check_rows()?;
        }
        if out.is_empty() {
            return Ok(());
        }
        if line == 0 {
            let _mode = DefaultFloatMode::enter();
            for (i, out) in out.iter_mut().enumerate() {
                *out = general::finish(0.0, bias.map(|bias| bias[i % out_channels]));
            }
            return Ok(());
        }
        // Only now: a table of the size of what the sizes promise.
        let reach = match direction {
            Taps::Forward => self.reach(),
            Taps::Backward => self.reverse(),
        };
        let rows = &Rows { reach, pixels, channels, out_channels, columns };
        let [left, right] = codings;
        let epilogue = Epilogue { accumulate: false, bias };
        let Workspace { left: left_panels, groups, taps: tap_memory, planes: [w_plane, x_plane], scratch, .. } =
            workspace;
        reserve_scratch(ctx, scratch);
        let scratch = &*scratch;

        // The kernel as [out, taps, in / groups], its random bits and the image's beside them.
        let kernel = KernelCopy::new(w, right, tap_memory, w_plane);
        let plane = Plane::new(image, left, !flatten, x_plane);
        let prepare = [
            Stage { tasks: kernel.tasks(), task: &|_, task| kernel.fill(task) },
            Stage {
                tasks: plane.tasks(),
                task: &|worker, task| {
                    let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
                    plane.fill(ctx, task, &mut scratch);
                },
            },
        ];
        let macs = out.len().saturating_mul(taps * rows.channels);
        let workers = if macs < driver::SERIAL_MACS { 1 } else { ctx.threads.max(1) };
        for_each_stage(ctx.team, workers, &prepare);

        let patch = taps * group_in;
        let right_lines = |g: usize| {
            let first = (g * group_out * patch) as isize;
            // SAFETY: the copy has `out` rows of `patch` elements, its plane as many and the padding.
            unsafe {
                match direction {
                    Taps::Forward if flatten => FloatLines::with_plane(
                        kernel.floats(),
                        kernel.bits(),
                        vec![first],
                        [group_out, patch],
                        [patch as isize, 1],
                    ),
                    Taps::Forward => FloatLines::with_plane(
                        kernel.floats(),
                        kernel.bits(),
                        (0..taps).map(|tap| first + (tap * group_in) as isize).collect(),
                        [group_out, group_in],
                        [patch as isize, 1],
                    ),
                    Taps::Backward => FloatLines::with_plane(
                        kernel.floats(),
                        kernel.bits(),
                        (0..taps).map(|tap| first + (tap * group_in) as isize).collect(),
                        [group_in, group_out],
                        [1, patch as isize],
                    ),
                }
            }
        };
        let image_lines = || {
            // SAFETY: the image's size was checked; the plane has as many elements and the padding.
            unsafe {
                FloatLines::with_plane(
                    x.as_ptr(),
                    plane.bits(),
                    vec![0],
                    [self.batch * pixels * self.groups, rows.channels],
                    [rows.channels as isize, 1],
                )
            }
        };
        let by_panels = codings.iter().all(|coding| coding.format.encodes_to_panels()) && block <= MAX_BLOCK;
        if !by_panels {
            let image = (!flatten).then(|| Codes::from_floats(ctx, &image_lines(), left.format, left.mode));
            for g in 0..self.groups {
                let right = Codes::from_floats(ctx, &right_lines(g), right.format, right.mode);
                self.by_codes(ctx, x, image.as_ref(), rows, g, &right, left, epilogue, out);
            }
            return Ok(());
        }

        let tile = fitting(ctx.kernels.tiles, block, left.format, right.format);
        let correction = tile.map_or(Correction::Total, |tile| tile.correction);
        let offset = offset(right.format.bits());
        let left_side = Side::Left { correction, offset };
        let image_lines = image_lines();
        let image_source = Source::Floats(&image_lines, left.mode);
        let image_layout = PanelLayout::new(image_source.shape(), block, PANEL_ROWS, left_side).in_lines();
        let right_lines: Vec<FloatLines<'_>> = (0..self.groups).map(right_lines).collect();
        let right_sources: Vec<Source<'_>> = right_lines.iter().map(|x| Source::Floats(x, right.mode)).collect();
        let right_layout =
            PanelLayout::new(right_sources[0].shape(), block, ctx.kernels.columns_for(columns), Side::Right { offset })
                .in_pieces();
        groups.resize_with(groups.len().max(self.groups), Panels::default);
        let mut jobs = Vec::with_capacity(1 + self.groups);
        let mut rights = Vec::with_capacity(self.groups);
        let none = AtomicBool::new(false);
        let mut any_general = &none;
        let image_panels = if flatten {
            None
        } else {
            let panels = left_panels.reserve(&image_layout);
            jobs.push(Job { source: &image_source, format: left.format, layout: image_layout, panels });
            any_general = panels.any_general.unwrap_or(&none);
            Some(panels.as_ref())
        };
        for (source, group) in right_sources.iter().zip(groups.iter_mut()) {
            let panels = group.reserve(&right_layout);
            rights.push(panels.as_ref());
            jobs.push(Job { source, format: right.format, layout: right_layout, panels });
        }
        let fillings = Fillings::new(ctx, jobs, 0);

        let pieces = right_layout.matrices;
        let joined = right_layout.joined();
        let al = PanelLayout::new([1, row_pixels, line], block, PANEL_ROWS, left_side);
        let al = if flatten { al } else { al.in_lines() };
        let out = SharedMut::new(out);
        let max_codes = [left.format.max_code(), right.format.max_code()];
        let kernel_of_tiles = Kernel { tile, from_nibbles: false, max_codes };
        let tiles = Tiles::new(ctx, kernel_of_tiles, al, joined, out, epilogue);
        // Rows of a task belong to one sample where they are patches: these have random bits of their own.
        let (samples, rows_each) = if flatten { (self.batch, row_pixels) } else { (1, self.batch * row_pixels) };
        let plan = Plan::new(
            &al,
            &joined,
            rows_each.div_ceil(PANEL_ROWS),
            pieces,
            samples * self.groups,
            workers,
            tiles.on_unit(),
        );
        let row_tasks = rows_each.div_ceil(PANEL_ROWS).div_ceil(plan.row_panels);
        let column_tasks = joined.panels.div_ceil(plan.column_panels);
        let line_bytes = image_layout.panel_bytes() / PANEL_ROWS;
        let multiply = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = &mut *scratch;
            let (row_task, rest) = (task % row_tasks, task / row_tasks);
            let (column_task, rest) = (rest % column_tasks, rest / column_tasks);
            let (g, sample) = (rest % self.groups, rest / self.groups);
            let first = row_task * plan.row_panels * PANEL_ROWS;
            let task_rows = first..(first + plan.row_panels * PANEL_ROWS).min(rows_each);
            let panels = task_rows.len().div_ceil(PANEL_ROWS);
            let j = column_task * plan.column_panels;
            scratch.reserve(block);
            scratch.general.clear();
            scratch.general.resize(2 * panels, false);
            let mut starts = Vec::new();
            for from in (0..pieces).step_by(plan.pieces) {
                let slice = from..(from + plan.pieces).min(pieces);
                match image_panels {
                    Some(panels) => {
                        let zeros = scratch.zero_bytes(line_bytes);
                        let any_general = any_general.load(Ordering::Relaxed);
                        let lines =
                            Lines { panels, bytes: line_bytes, groups: self.groups, g, pixels, any_general, zeros };
                        lines.find(rows, task_rows.clone(), slice.clone(), &mut starts, &mut scratch.general);
                    }
                    None => {
                        self.patches(ctx, x, rows, sample, g, task_rows.clone(), left, &al, scratch);
                        let first = scratch.patch_panels.bytes.as_ptr();
                        starts.clear();
                        starts.extend((0..panels).map(|i| first.wrapping_add(i * al.panel_bytes())));
                    }
                }
                let each = starts.len() / panels;
                for panel in 0..panels {
                    scratch.general[panels + panel] |= scratch.general[panel];
                }
                let task = Task {
                    blocks: slice.len() * al.blocks,
                    rows: 0..panels,
                    columns: j..(j + plan.column_panels).min(joined.panels),
                    left: |i| LeftBlocks {
                        rows: Left::Pieces(&starts[i * each..][..each]),
                        general: scratch.general[i],
                    },
                    right: |j| PanelBlocks {
                        bytes: rights[g].bytes.wrapping_add(
                            j * joined.panel_bytes() + slice.start * right_layout.blocks * joined.block_bytes,
                        ),
                        // SAFETY: a panel of the layout, written by the stage before.
                        general: unsafe { rights[g].is_general(j) },
                    },
                    place: |i, j, general| {
                        let row = task_rows.start + i * PANEL_ROWS;
                        let column = g * rows.columns + j * joined.width;
                        let last = slice.end == pieces;
                        tiles::Place {
                            at: (sample * row_pixels + row) * rows.out_channels + column,
                            stride: rows.out_channels,
                            height: PANEL_ROWS.min(task_rows.end - row),
                            width: joined.width.min(rows.columns - j * joined.width),
                            column,
                            first: slice.start == 0,
                            last,
                            finish: last && tiles.finishes(general || scratch.general[panels + i]),
                        }
                    },
                };
                // SAFETY: the panels hold the slice's blocks; a tile belongs to one task.
                unsafe { task.run(&tiles, &mut scratch.tiles) };
            }
        };
        run_stages(ctx, workers, &fillings, scratch, samples * self.groups * row_tasks * column_tasks, &multiply)
    }

    /// Panels of the patches of some pixels of one sample, whose elements are put together here.
    fn patches(
        &self,
        ctx: &Context<'_>,
        x: &[f32],
        rows: &Rows,
        sample: usize,
        g: usize,
        pixels: std::ops::Range<usize>,
        coding: Coding,
        al: &PanelLayout,
        scratch: &mut Scratch,
    ) {
        let (mut patches, mut panels) =
            (std::mem::take(&mut scratch.patches), std::mem::take(&mut scratch.patch_panels));
        let k = self.patch_rows(x, rows, sample, g, pixels.clone(), &mut patches);
        let row_pixels = rows.reach.rows;
        let first_row = (sample * self.groups + g) * row_pixels + pixels.start;
        // SAFETY: `patches` holds as many rows of `k` elements.
        let lines = unsafe { FloatLines::of_rows(patches.as_ptr(), [pixels.len(), k], k, true, first_row) };
        let source = Source::Floats(&lines, coding.mode);
        let layout = PanelLayout::new(source.shape(), al.block, PANEL_ROWS, al.side);
        let ctx = Context { kernels: ctx.kernels, team: &Serial, threads: 1 };
        let job = Job { source: &source, format: coding.format, layout, panels: panels.reserve(&layout) };
        Filling::new(&ctx, job).run_all(&ctx, scratch).expect("floats can always be encoded");
        for (panel, flag) in panels.general.iter().enumerate().take(layout.panels) {
            scratch.general[panel] = flag.load(Ordering::Relaxed) != 0;
        }
        (scratch.patches, scratch.patch_panels) = (patches, panels);
    }

    /// Patches [pixels, taps · channels of the group] of one sample; the elements of one of them.
    fn patch_rows(
        &self,
        x: &[f32],
        rows: &Rows,
        sample: usize,
        g: usize,
        pixels: std::ops::Range<usize>,
        patches: &mut Vec<f32>,
    ) -> usize {
        let (taps, channels) = (self.taps(), rows.channels);
        let k = taps * channels;
        let all = channels * self.groups;
        let image = &x[sample * rows.pixels * all..];
        patches.clear();
        patches.resize(pixels.len() * k, 0.0);
        for (patch, pixel) in patches.chunks_exact_mut(k).zip(pixels) {
            for (to, &from) in patch.chunks_exact_mut(channels).zip(rows.reach.of(pixel)) {
                if from != NOWHERE {
                    // Few channels: a call of memcpy would take longer than they do.
                    let from = &image[from as usize * all + g * channels..][..channels];
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = *from;
                    }
                }
            }
        }
        k
    }

    /// The definition, for formats that do not go by panels.
    fn by_codes(
        &self,
        ctx: &Context<'_>,
        x: &[f32],
        image: Option<&Codes>,
        rows: &Rows,
        g: usize,
        right: &Codes,
        coding: Coding,
        epilogue: Epilogue<'_>,
        out: &mut [f32],
    ) {
        let row_pixels = rows.reach.rows;
        let pixels = rows.pixels;
        let (taps, columns) = (self.taps(), rows.columns);
        let bias = epilogue.bias.map(|bias| &bias[g * columns..][..columns]);
        let serial = Context { kernels: ctx.kernels, team: &Serial, threads: 1 };
        let workers = ctx.workers(out.len().saturating_mul(taps * rows.channels));
        let out = SharedMut::new(out);
        for_each_task(ctx.team, workers, self.batch * row_pixels, &|_, row| {
            let (sample, pixel) = (row / row_pixels, row % row_pixels);
            let flat;
            let mut pieces = Vec::with_capacity(taps);
            let left = match image {
                Some(image) => {
                    let line = |&source: &i32| {
                        (source != NOWHERE).then(|| (sample * pixels + source as usize) * self.groups + g)
                    };
                    pieces.extend(rows.reach.of(pixel).iter().map(line));
                    image
                }
                None => {
                    let mut patches = Vec::new();
                    let k = self.patch_rows(x, rows, sample, g, pixel..pixel + 1, &mut patches);
                    let first_row = (sample * self.groups + g) * row_pixels + pixel;
                    // SAFETY: one row of `k` elements.
                    let lines = unsafe { FloatLines::of_rows(patches.as_ptr(), [1, k], k, true, first_row) };
                    flat = Codes::from_floats(&serial, &lines, coding.format, coding.mode);
                    pieces.push(Some(0));
                    &flat
                }
            };
            // SAFETY: every row belongs to one task.
            let out = unsafe { out.part(row * rows.out_channels + g * columns, columns) };
            general::row_of_pieces(left, &pieces, right, out, bias);
        });
    }

    // --- the weight gradient -----------------------------------------------------------------------------------------

    fn weight_left_layout(&self, block: usize, side: Side) -> PanelLayout {
        // Pixels follow each other without gaps where no panel of four channels reaches into the next pixel or group.
        let [channels, _] = self.group_channels();
        let pixels = product_of(self.input);
        let shape = if channels.is_multiple_of(PANEL_ROWS) {
            [1, pixels * self.channels[0], self.batch]
        } else {
            [pixels * self.groups, channels, self.batch]
        };
        PanelLayout::new(shape, block, PANEL_ROWS, side)
    }

    fn weight_left_lines<'a>(&self, x: &'a [f32], plane: &Plane) -> FloatLines<'a> {
        let layout = self.weight_left_layout(1, Side::Left { correction: Correction::Total, offset: 0 });
        let image = (product_of(self.input) * self.channels[0]) as isize;
        let [matrices, lines, k] = [layout.matrices, layout.lines, layout.k];
        let offsets = (0..matrices).map(|m| (m * lines) as isize).collect();
        // SAFETY: the callers checked the image's size; the plane has as many elements and the padding.
        unsafe { FloatLines::with_plane(x.as_ptr(), plane.bits(), offsets, [lines, k], [1, image]) }
    }

    /// Number of a panel of four channels, the `q`th of group `g` at a pixel.
    fn weight_left_panel(&self, layout: &PanelLayout, pixel: usize, g: usize, q: usize) -> usize {
        let [channels, _] = self.group_channels();
        if layout.matrices == 1 && channels.is_multiple_of(PANEL_ROWS) {
            (pixel * self.channels[0] + g * channels) / PANEL_ROWS + q
        } else {
            layout.panel(pixel * self.groups + g, q)
        }
    }

    /// dY as the right operand of one group.
    fn weight_right_layout(&self, kernels: &Kernels, format: BlockFormat) -> PanelLayout {
        let ([_, lines], pixels) = (self.group_channels(), product_of(self.output));
        let columns = kernels.columns_for(lines);
        let layout = |shape| {
            let side = Side::Right { offset: offset(format.bits()) };
            PanelLayout::new(shape, format.block_along(self.batch), columns, side)
        };
        // Pixels whose channels fill whole panels follow each other in one line-up, which makes longer runs of memory.
        if self.groups == 1 && lines.is_multiple_of(columns) && (pixels * lines).is_multiple_of(STRIP) {
            layout([1, pixels * lines, self.batch]).lined_up(lines)
        } else {
            layout([pixels, lines, self.batch]).in_pieces()
        }
    }

    fn weight_right_lines<'a>(&self, dy: &'a [f32], plane: &Plane, g: usize, layout: &PanelLayout) -> FloatLines<'a> {
        let ([_, columns], pixels) = (self.group_channels(), product_of(self.output));
        let offsets = (0..layout.matrices).map(|p| (p * self.channels[1] + g * columns) as isize).collect();
        let image = (pixels * self.channels[1]) as isize;
        // SAFETY: the callers checked the image's size; the plane has as many elements and the padding.
        unsafe { FloatLines::with_plane(dy.as_ptr(), plane.bits(), offsets, [layout.lines, self.batch], [1, image]) }
    }

    fn image(&self, place: Place) -> Image {
        match place {
            Place::Input => self.input_image(),
            Place::Output => self.output_image(),
        }
    }

    /// Layout of the codes that are kept of an image, one after the other for so many groups.
    fn kept_layout(&self, ctx: &Context<'_>, place: Place, format: BlockFormat) -> (PanelLayout, usize) {
        match place {
            Place::Input => (self.compact_layout(format), 1),
            Place::Output => {
                let layout = self.weight_right_layout(ctx.kernels, format);
                // Narrow panels take no more than their nibbles in wide ones, which alone are taken out of nibbles.
                let nibbles = format.bits() <= 4 && layout.width == ctx.kernels.columns;
                (if nibbles { layout.in_nibbles() } else { layout }, self.groups)
            }
        }
    }

    /// Bytes of an image's codes along the batch, as [`Self::keep`] writes them at the level of `ctx`. None: the format
    /// cannot be kept.
    #[must_use]
    pub fn kept_bytes(&self, ctx: &Context<'_>, place: Place, format: BlockFormat) -> Option<usize> {
        let line = matches!(format.shape(), BlockShape::Line(n) if n <= MAX_BLOCK);
        if !line || !format.encodes_to_panels() || self.check().is_err() {
            return None;
        }
        let image = self.image(place);
        if self.batch * product_of(image.pixels) == 0 {
            return None;
        }
        let (layout, groups) = self.kept_layout(ctx, place, format);
        Some(groups * (layout.bytes() + layout.panel_count()))
    }

    fn expect_kept_bytes(&self, ctx: &Context<'_>, place: Place, format: BlockFormat) -> Result<usize> {
        self.kept_bytes(ctx, place, format).ok_or_else(|| {
            let found =
                format!("{format}, and {} pixels of {} samples", product_of(self.image(place).pixels), self.batch);
            Error::format("a format in blocks of up to 8 bits, and an image to keep that is not empty", found)
        })
    }

    fn compact_layout(&self, format: BlockFormat) -> PanelLayout {
        let side = Side::Left { correction: Correction::Total, offset: 0 };
        self.weight_left_layout(format.block_along(self.batch), side).compact(format.bits())
    }

    /// Writes the codes of X, or of an image in the place of dY, along the batch to `bytes`.
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not fit.
    pub fn keep(
        &self,
        ctx: &Context<'_>,
        place: Place,
        x: &[f32],
        coding: Coding,
        bytes: &mut [u8],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check()?;
        let image = self.image(place);
        check_size("elements of the image", x.len(), self.batch * product_of(image.pixels) * image.channels)?;
        image.check_rows()?;
        check_size("bytes to keep the image in", bytes.len(), self.expect_kept_bytes(ctx, place, coding.format)?)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let Workspace { planes, scratch, .. } = workspace;
        reserve_scratch(ctx, scratch);
        let scratch = &*scratch;
        let plane = self.filled_plane(ctx, image, coding, &mut planes[1], scratch);
        let (layout, groups) = self.kept_layout(ctx, place, coding.format);
        let lines: Vec<FloatLines<'_>> = (0..groups)
            .map(|g| match place {
                Place::Input => self.weight_left_lines(x, &plane),
                Place::Output => self.weight_right_lines(x, &plane, g, &layout),
            })
            .collect();
        let sources: Vec<Source<'_>> = lines.iter().map(|lines| Source::Floats(lines, coding.mode)).collect();
        let parts = bytes.chunks_exact_mut(layout.bytes() + layout.panel_count());
        let jobs = sources.iter().zip(parts).map(|(source, bytes)| {
            let (bytes, general) = bytes.split_at_mut(layout.bytes());
            Job { source, format: coding.format, layout, panels: PanelsMut::new(bytes, general) }
        });
        let fillings = Fillings::new(ctx, jobs, 0);
        run_stages(ctx, ctx.workers(x.len()), &fillings, scratch, 0, &|_, _| {})
    }

    /// What was kept of dY, group by group.
    fn kept_groups<'a>(&self, layout: &PanelLayout, kept: &'a [u8]) -> impl Iterator<Item = PanelsRef> + 'a {
        let bytes = layout.bytes();
        kept.chunks_exact(bytes + layout.panel_count()).map(move |part| PanelsRef::new(part.split_at(bytes)))
    }

    fn filled_plane(
        &self,
        ctx: &Context<'_>,
        image: Image,
        coding: Coding,
        memory: &mut AlignedBytes,
        scratch: &[Mutex<Scratch>],
    ) -> Plane {
        let plane = Plane::new(image, coding, true, memory);
        let fill = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            plane.fill(ctx, task, &mut scratch);
        };
        for_each_stage(ctx.team, ctx.threads.max(1), &[Stage { tasks: plane.tasks(), task: &fill }]);
        plane
    }

    /// dW, as [groups, taps, in / groups, out / groups], from dY [batch, output pixels, out channels] and X, or what was
    /// kept of either. The codings are those of dY and of X.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn weight_gradient(
        &self,
        ctx: &Context<'_>,
        dy: Input<'_>,
        x: Input<'_>,
        [dy_coding, x_coding]: [Coding; 2],
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check()?;
        let [channels, columns] = self.group_channels();
        let (taps, out_pixels) = (self.taps(), product_of(self.output));
        check_size("elements of out", out.len(), self.groups * taps * channels * columns)?;
        let block = Self::check_formats([x_coding, dy_coding], self.batch)?;
        for (place, values, coding) in [(Place::Output, dy, dy_coding), (Place::Input, x, x_coding)] {
            let image = self.image(place);
            match values {
                Input::Floats(x) => {
                    check_size(
                        "elements of the image",
                        x.len(),
                        self.batch * product_of(image.pixels) * image.channels,
                    )?;
                }
                Input::Kept(bytes) => {
                    let expected = self.expect_kept_bytes(ctx, place, coding.format)?;
                    check_size("bytes of a kept image", bytes.len(), expected)?;
                }
            }
        }
        self.input_image().check_rows()?;
        self.output_image().check_rows()?;
        if out.is_empty() {
            return Ok(());
        }
        if self.batch * out_pixels == 0 {
            out.fill(0.0);
            return Ok(());
        }
        let Workspace { left: left_panels, groups, planes: [dy_plane, x_plane], scratch, .. } = workspace;
        reserve_scratch(ctx, scratch);
        let scratch = &*scratch;
        let plane = |values: Input<'_>, place: Place, coding: Coding, memory: &mut AlignedBytes| match values {
            Input::Floats(_) => self.filled_plane(ctx, self.image(place), coding, memory, scratch),
            Input::Kept(_) => Plane::none(),
        };
        let dy_plane = plane(dy, Place::Output, dy_coding, dy_plane);
        let x_plane = plane(x, Place::Input, x_coding, x_plane);
        let right_layout = match dy {
            Input::Floats(_) => self.weight_right_layout(ctx.kernels, dy_coding.format),
            Input::Kept(_) => self.kept_layout(ctx, Place::Output, dy_coding.format).0,
        };
        let reach = self.reach();
        let by_panels =
            [x_coding, dy_coding].iter().all(|coding| coding.format.encodes_to_panels()) && block <= MAX_BLOCK;
        if !by_panels {
            let image = match x {
                Input::Floats(x) => {
                    Codes::from_floats(ctx, &self.weight_left_lines(x, &x_plane), x_coding.format, x_coding.mode)
                }
                Input::Kept(bytes) => self.codes_of_kept(bytes, x_coding.format),
            };
            let groups: Vec<Codes> = match dy {
                Input::Floats(dy) => (0..self.groups)
                    .map(|g| {
                        let lines = self.weight_right_lines(dy, &dy_plane, g, &right_layout);
                        Codes::from_floats(ctx, &lines, dy_coding.format, dy_coding.mode)
                    })
                    .collect(),
                Input::Kept(bytes) => self
                    .kept_groups(&right_layout, bytes)
                    .map(|panels| driver::codes_of_panels(&right_layout, panels, dy_coding.format))
                    .collect(),
            };
            for (g, right) in groups.into_iter().enumerate() {
                // Pixel by pixel, in a line-up too.
                let right = Codes { matrices: out_pixels, lines: columns, ..right };
                let out = SharedMut::new(&mut out[g * taps * channels * columns..][..taps * channels * columns]);
                let workers = ctx.workers((taps * channels * columns).saturating_mul(out_pixels * self.batch));
                for_each_task(ctx.team, workers, taps * channels, &|_, row| {
                    let (tap, c) = (row / channels, row % channels);
                    let pieces: Vec<Option<usize>> = (0..out_pixels)
                        .map(|o| {
                            let p = reach.of(o)[tap];
                            (p != NOWHERE).then(|| p as usize * self.channels[0] + g * channels + c)
                        })
                        .collect();
                    // SAFETY: every row belongs to one task.
                    let out = unsafe { out.part(row * columns, columns) };
                    general::row_of_pieces(&image, &pieces, &right, out, None);
                });
            }
            return Ok(());
        }

        let tile = fitting(ctx.kernels.tiles, block, x_coding.format, dy_coding.format);
        let correction = tile.map_or(Correction::Total, |tile| tile.correction);
        let offset = offset(dy_coding.format.bits());
        let left_layout = self.weight_left_layout(block, Side::Left { correction, offset });
        let left = left_panels.reserve(&left_layout);
        let x_lines = match x {
            Input::Floats(x) => Some(self.weight_left_lines(x, &x_plane)),
            Input::Kept(_) => None,
        };
        let x_source = x_lines.as_ref().map(|lines| Source::Floats(lines, x_coding.mode));
        let dy_lines: Vec<FloatLines<'_>> = match dy {
            Input::Floats(dy) => {
                (0..self.groups).map(|g| self.weight_right_lines(dy, &dy_plane, g, &right_layout)).collect()
            }
            Input::Kept(_) => Vec::new(),
        };
        let dy_sources: Vec<Source<'_>> = dy_lines.iter().map(|x| Source::Floats(x, dy_coding.mode)).collect();
        groups.resize_with(groups.len().max(self.groups), Panels::default);
        let mut rights = Vec::with_capacity(self.groups);
        let mut jobs = Vec::with_capacity(1 + self.groups);
        if let Some(source) = &x_source {
            jobs.push(Job { source, format: x_coding.format, layout: left_layout, panels: left });
        }
        for (source, group) in dy_sources.iter().zip(groups.iter_mut()) {
            let panels = group.reserve(&right_layout);
            rights.push(panels.as_ref());
            jobs.push(Job { source, format: dy_coding.format, layout: right_layout, panels });
        }
        if let Input::Kept(bytes) = dy {
            rights.extend(self.kept_groups(&right_layout, bytes));
        }
        let fillings = Fillings::new(ctx, jobs, 0);
        if let Input::Kept(bytes) = x {
            self.expand(ctx, bytes, x_coding.format, &left_layout, left);
        }

        let joined = right_layout.joined();
        let al = PanelLayout::new([1, channels, self.batch], block, PANEL_ROWS, left_layout.side);
        let quads = channels.div_ceil(PANEL_ROWS);
        let out = SharedMut::new(out);
        let max_codes = [x_coding.format.max_code(), dy_coding.format.max_code()];
        let tiles =
            Tiles::new(ctx, Kernel { tile, from_nibbles: false, max_codes }, al, joined, out, Epilogue::default());
        let workers = ctx.threads.max(1);
        let plan = Plan::new(&al, &joined, taps * quads, out_pixels, self.groups, workers, tiles.on_unit());
        let row_tasks = (taps * quads).div_ceil(plan.row_panels);
        let column_tasks = joined.panels.div_ceil(plan.column_panels);
        let piece_bytes = al.blocks * al.block_bytes;
        let none = AtomicBool::new(false);
        let left_general = left.any_general.unwrap_or(&none);
        let left = left.as_ref();
        let multiply = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = &mut *scratch;
            let (row_task, rest) = (task % row_tasks, task / row_tasks);
            let (column_task, g) = (rest % column_tasks, rest / column_tasks);
            let first = row_task * plan.row_panels;
            let task_panels = first..(first + plan.row_panels).min(taps * quads);
            let panels = task_panels.len();
            let j = column_task * plan.column_panels;
            let any_general = left_general.load(Ordering::Relaxed);
            // In place of a panel of a pixel that does not exist: correction and rider are zeros, too.
            let zeros = scratch.zero_bytes(piece_bytes);
            scratch.general.clear();
            scratch.general.resize(2 * panels, false);
            let mut starts = Vec::with_capacity(panels * plan.pieces);
            for from in (0..out_pixels).step_by(plan.pieces) {
                let slice = from..(from + plan.pieces).min(out_pixels);
                starts.clear();
                scratch.general[..panels].fill(false);
                for (i, panel) in task_panels.clone().enumerate() {
                    let (tap, q) = (panel / quads, panel % quads);
                    starts.extend(slice.clone().map(|o| {
                        let source = reach.of(o)[tap];
                        if source == NOWHERE {
                            return zeros;
                        }
                        let source = self.weight_left_panel(&left_layout, source as usize, g, q);
                        // SAFETY: a panel of the layout, written by the stage before.
                        scratch.general[i] |= any_general && unsafe { left.is_general(source) };
                        left.bytes.wrapping_add(source * piece_bytes)
                    }));
                }
                for panel in 0..panels {
                    scratch.general[panels + panel] |= scratch.general[panel];
                }
                let task = Task {
                    blocks: slice.len() * al.blocks,
                    rows: 0..panels,
                    columns: j..(j + plan.column_panels).min(joined.panels),
                    left: |i| LeftBlocks {
                        rows: Left::Pieces(&starts[i * slice.len()..][..slice.len()]),
                        general: scratch.general[i],
                    },
                    right: |j| PanelBlocks {
                        bytes: rights[g].bytes.wrapping_add(
                            j * joined.panel_bytes() + slice.start * right_layout.blocks * joined.block_bytes,
                        ),
                        // SAFETY: a panel of the layout, written by the stage before.
                        general: unsafe { rights[g].is_general(j) },
                    },
                    place: |i, j, general| {
                        let (tap, q) = ((first + i) / quads, (first + i) % quads);
                        let column = j * joined.width;
                        let last = slice.end == out_pixels;
                        tiles::Place {
                            at: ((g * taps + tap) * channels + q * PANEL_ROWS) * columns + column,
                            stride: columns,
                            height: PANEL_ROWS.min(channels - q * PANEL_ROWS),
                            width: joined.width.min(columns - column),
                            column,
                            first: slice.start == 0,
                            last,
                            finish: last && tiles.finishes(general || scratch.general[panels + i]),
                        }
                    },
                };
                // SAFETY: the panels hold the slice's blocks; a tile belongs to one task.
                unsafe { task.run(&tiles, &mut scratch.tiles) };
            }
        };
        run_stages(ctx, workers, &fillings, scratch, self.groups * row_tasks * column_tasks, &multiply)
    }

    /// Codes from what was kept, for a product with a format that has no panels. Blocks of zeros come back with another
    /// exponent, which no product can tell.
    fn codes_of_kept(&self, kept: &[u8], format: BlockFormat) -> Codes {
        let compact = self.compact_layout(format);
        let Form::Compact { nibbles } = compact.form else { unreachable!("made compact") };
        let layout = self.weight_left_layout(compact.block, compact.side);
        let PanelLayout { matrices, lines, k, block, blocks, .. } = layout;
        let mut codes = vec![0; matrices * lines * k];
        let mut exponents = vec![0; matrices * lines * blocks];
        let mut panel = vec![0; layout.block_bytes];
        for (matrix, q) in (0..matrices).flat_map(|matrix| (0..layout.panels).map(move |q| (matrix, q))) {
            let from = &kept[layout.panel(matrix, q) * compact.panel_bytes()..][..compact.panel_bytes()];
            for (b, from) in from.chunks_exact(compact.block_bytes).enumerate() {
                forms::from_compact(from, &layout, nibbles, &mut panel);
                for lane in 0..PANEL_ROWS.min(lines - q * PANEL_ROWS) {
                    let row = matrix * lines + q * PANEL_ROWS + lane;
                    exponents[row * blocks + b] = from[compact.block_bytes - PANEL_ROWS + lane];
                    let to = &mut codes[row * k..][b * block..(b * block + block).min(k)];
                    for (j, to) in to.iter_mut().enumerate() {
                        *to = i16::from(panel[4 * (j / 4 * PANEL_ROWS + lane) + j % 4] as i8);
                    }
                }
            }
        }
        Codes { format, matrices, lines, k, block, codes, exponents }
    }

    /// Left panels from what was kept.
    fn expand(&self, ctx: &Context<'_>, kept: &[u8], format: BlockFormat, layout: &PanelLayout, to: PanelsMut<'_>) {
        const TOGETHER: usize = 64;
        let compact = self.compact_layout(format);
        let Form::Compact { nibbles } = compact.form else { unreachable!("made compact") };
        let (kept, general) = kept.split_at(compact.bytes());
        let panels = layout.panel_count();
        let task = |_: usize, task: usize| {
            for panel in task * TOGETHER..((task + 1) * TOGETHER).min(panels) {
                if general[panel] != 0 {
                    to.set_general(panel);
                }
                let from =
                    kept[panel * compact.panel_bytes()..][..compact.panel_bytes()].chunks_exact(compact.block_bytes);
                // SAFETY: every panel belongs to one task.
                let into = unsafe { to.bytes.part(panel * layout.panel_bytes(), layout.panel_bytes()) };
                for (from, into) in from.zip(into.chunks_exact_mut(layout.block_bytes)) {
                    forms::from_compact(from, layout, nibbles, into);
                }
            }
        };
        let stage = Stage { tasks: panels.div_ceil(TOGETHER), task: &task };
        for_each_stage(ctx.team, ctx.workers(4 * panels * layout.k), &[stage]);
    }
}

/// Fills, then multiplies, in one region.
fn run_stages(
    ctx: &Context<'_>,
    workers: usize,
    fillings: &Fillings<'_>,
    scratch: &[Mutex<Scratch>],
    tasks: usize,
    multiply: &(dyn Fn(usize, usize) + Sync),
) -> Result<()> {
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let lay_out = |worker: usize, task: usize| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: tasks are handed out once.
        if let Err(error) = unsafe { fillings.run(ctx, task, &mut scratch) } {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    };
    let stages = [Stage { tasks: fillings.tasks(), task: &lay_out }, Stage { tasks, task: multiply }];
    for_each_stage(ctx.team, workers, &stages);
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[derive(Clone, Copy)]
enum Taps {
    Forward,
    Backward,
}

/// Sizes of tasks.
#[derive(Clone, Copy)]
struct Plan {
    row_panels: usize,
    column_panels: usize,
    /// Pieces of the reduction per pass.
    pieces: usize,
}

impl Plan {
    const TASKS_PER_WORKER: usize = 8;

    fn new(
        al: &PanelLayout,
        bl: &PanelLayout,
        row_panels: usize,
        pieces: usize,
        products: usize,
        workers: usize,
        on_unit: bool,
    ) -> Self {
        let caches = Caches::get();
        // Half of the first level for B, half of the second for A.
        let depth = (caches.l1 / 2 / bl.block_bytes).max(1024 / al.block);
        let depth = if on_unit { driver::UNIT_DEPTH / al.block } else { depth };
        let pieces = (depth / al.blocks).clamp(1, pieces.max(1));
        let most = (caches.l2 / 2 / (pieces * al.blocks * al.block_bytes)).clamp(4, 128);
        let column_panels = 16.min(bl.panels.max(1));
        let wanted = if workers > 1 { Self::TASKS_PER_WORKER * workers } else { 1 };
        let each = wanted.div_ceil(products * bl.panels.div_ceil(column_panels)).max(1);
        let most = most.min(row_panels.div_ceil(each)).max(1);
        Self { row_panels: row_panels.div_ceil(row_panels.div_ceil(most).max(1)).max(1), column_panels, pieces }
    }
}
