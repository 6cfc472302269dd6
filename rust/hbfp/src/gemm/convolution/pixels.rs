//! Products whose rows are the pixels of an image, and whose pieces are taps that find pixels of the other image.
#![allow(unsafe_code, reason = "tasks that write disjoint panels, rows and tiles")]

use super::field::{self, Encoding, Four, Fours};
use super::lattice::Lattices;
use super::patches::Patches;
use super::prepared::{Image, KernelCopy, Plane};
use super::reach::NOWHERE;
use super::{Convolution, KeptKernel, Kernel, NOTHING, Plan, Taps, kept, product_of, run_stages};
use crate::arch::generic::product::{Correction, PANEL_ROWS};
use crate::arch::generic::{aligned, unit_rows};
use crate::arch::kernels::MatrixUnitKernels;
use crate::encode::blocks::Scratch;
use crate::encode::codes::Codes;
use crate::encode::filling::{Fillings, Job, Source, reserve_scratch};
use crate::encode::panels::{PanelLayout, Panels, PanelsRef, Side};
use crate::encode::{Context, check_size, decode};
use crate::error::Result;
use crate::format::MAX_BLOCK;
use crate::gemm::cache::Caches;
use crate::gemm::tiles::{Left, LeftBlocks, PanelBlocks, Task, Tiles};
use crate::gemm::{Coding, Epilogue, Workspace, driver, fitting, general, offset, tiles};
use crate::mem::SharedMut;
use crate::parallel::{DefaultFloatMode, Stage, for_each_task};
use crate::shape::{FloatLines, FloatTensor, element_count};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

/// What all ways to compute such a product begin with.
#[derive(Clone, Copy)]
pub(super) struct PixelProduct<'a> {
    pub(super) convolution: &'a Convolution,
    pub(super) taps: Taps,
    /// The image that the taps find pixels of, and that of the product.
    pub(super) x: &'a [f32],
    pub(super) image: Image,
    pub(super) product: Image,
    pub(super) groups: usize,
    /// Channels of a group of either.
    pub(super) channels: usize,
    pub(super) columns: usize,
    pub(super) block: usize,
    pub(super) left: Coding,
    pub(super) right: Coding,
    pub(super) bias: Option<&'a [f32]>,
}

impl Convolution {
    /// Products whose rows are pixels and whose pieces are taps.
    pub(super) fn by_pixels(
        &self,
        ctx: &Context<'_>,
        x: &[f32],
        kernel: Kernel<'_>,
        taps: Taps,
        codings: [Coding; 2],
        flatten: bool,
        bias: Option<&[f32]>,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check()?;
        let [group_in, group_out] = self.group_channels();
        let ([from, to], [channels, columns]) = match taps {
            Taps::Forward => ([0, 1], [group_in, group_out]),
            Taps::Backward => ([1, 0], [group_out, group_in]),
        };
        let images = [self.input_image(), self.output_image()];
        let [image, product] = [images[from], images[to]];
        check_size("elements of the image", x.len(), self.batch * product_of(image.pixels) * image.channels)?;
        let row_pixels = product_of(product.pixels);
        check_size("elements of out", out.len(), self.batch * row_pixels * product.channels)?;
        self.check_kernel(&kernel, taps, codings[1])?;
        if let Some(bias) = bias {
            check_size("elements of bias", bias.len(), product.channels)?;
        }
        let line = if flatten { self.taps() * channels } else { channels };
        let block = Self::check_formats(codings, line)?;
        if flatten {
            element_count(&[self.batch, self.groups, row_pixels])
                .and_then(|rows| super::check_rows(rows, "patches"))?;
        } else {
            image.check_rows()?;
        }
        if out.is_empty() {
            return Ok(());
        }
        if line == 0 {
            let _mode = DefaultFloatMode::enter();
            for (i, out) in out.iter_mut().enumerate() {
                *out = general::finish(0.0, bias.map(|bias| bias[i % product.channels]));
            }
            return Ok(());
        }
        let [left, right] = codings;
        let groups = self.groups;
        let all = PixelProduct {
            convolution: self,
            taps,
            x,
            image,
            product,
            groups,
            channels,
            columns,
            block,
            left,
            right,
            bias,
        };
        reserve_scratch(ctx, &mut workspace.scratch);
        let w = match kernel {
            Kernel::Floats(w) => w,
            Kernel::Kept(kept) => {
                if all.by_kept(ctx, &kept, flatten, out, workspace)? {
                    return Ok(());
                }
                // The definition takes it by its values.
                let (exponents, mantissas) = kept.planes(ctx)?;
                let values = decode(ctx, kept.layout, &exponents, &mantissas)?;
                let [k0, k1, k2] = self.kernel;
                let w = FloatTensor::new(&values, &[self.channels[1], self.group_channels()[0], k0, k1, k2])?;
                return self.by_pixels(ctx, x, Kernel::Floats(&w), taps, codings, flatten, bias, out, workspace);
            }
        };
        let (mut tap_memory, mut w_plane) =
            (std::mem::take(&mut workspace.taps), std::mem::take(&mut workspace.planes[0]));
        let kernel = KernelCopy::new(w, right, &mut tap_memory, &mut w_plane);
        for_each_task(ctx.team, ctx.workers(element_count(w.shape())?), kernel.tasks(), &|_, task| kernel.fill(task));
        let by_panels = codings.iter().all(|coding| coding.format.encodes_to_panels()) && block <= MAX_BLOCK;
        let done = if by_panels && all.by_lanes(ctx, &kernel, flatten, out, workspace) {
            Ok(())
        } else if by_panels && flatten {
            all.by_patches(ctx, &kernel, out, workspace)
        } else if let Some(lattices) = all.lattices(kernel.has_nan_blocks()).filter(|_| by_panels) {
            all.by_lines(ctx, &kernel, &lattices, out, workspace)
        } else {
            all.by_codes(ctx, &kernel, flatten, out, workspace);
            Ok(())
        };
        (workspace.taps, workspace.planes[0]) = (tap_memory, w_plane);
        done
    }
}

/// The right operand in panels, and what multiplies by them.
struct Right<'a> {
    layout: PanelLayout,
    joined: PanelLayout,
    panels: Vec<PanelsRef>,
    tiles: Tiles<'a>,
}

impl Right<'_> {
    /// Some pieces of panel `j` of group `g`.
    fn blocks(&self, g: usize, j: usize, first_piece: usize) -> PanelBlocks {
        let at = j * self.joined.panel_bytes() + first_piece * self.layout.blocks * self.joined.block_bytes;
        // SAFETY: a panel of the layout, written by the stage before.
        let general = unsafe { self.panels[g].is_general(j) };
        PanelBlocks { bytes: self.panels[g].bytes.wrapping_add(at), general }
    }
}

impl<'a> PixelProduct<'a> {
    pub(super) fn line(&self, flatten: bool) -> usize {
        if flatten { self.convolution.taps() * self.channels } else { self.channels }
    }

    fn macs(&self) -> usize {
        let rows = self.image.batch * product_of(self.product.pixels);
        rows.saturating_mul(self.product.channels).saturating_mul(self.convolution.taps() * self.channels)
    }

    /// `encoded`: elements to encode that are put together one by one, as those of patches.
    pub(super) fn workers(&self, ctx: &Context<'_>, encoded: usize) -> usize {
        const SERIAL_ENCODED: usize = 1 << 16;
        let small = self.macs() < driver::SERIAL_MACS && encoded < SERIAL_ENCODED;
        if small { 1 } else { ctx.threads.max(1) }
    }

    /// The kernel of group `g` as lines of the right operand, whose pieces are `taps`.
    fn right_lines<'k>(&self, kernel: &'k KernelCopy<'_>, g: usize, taps: Option<&[usize]>) -> FloatLines<'k> {
        let [group_in, group_out] = self.convolution.group_channels();
        let patch = self.convolution.taps() * group_in;
        let first = (g * group_out * patch) as isize;
        let offsets = |taps: &[usize]| taps.iter().map(|tap| first + (tap * group_in) as isize).collect();
        let (offsets, shape, strides) = match (taps, self.taps) {
            (None, _) => (vec![first], [group_out, patch], [patch as isize, 1]),
            (Some(taps), Taps::Forward) => (offsets(taps), [group_out, group_in], [patch as isize, 1]),
            (Some(taps), Taps::Backward) => (offsets(taps), [group_in, group_out], [1, patch as isize]),
        };
        // SAFETY: the copy has `out` rows of `patch` elements, its plane as many and the padding.
        unsafe { FloatLines::with_plane(kernel.floats(), kernel.bits(), offsets, shape, strides) }
    }

    fn right_layout(&self, ctx: &Context<'_>, lines: &FloatLines<'_>) -> PanelLayout {
        let side = Side::Right { offset: offset(self.right.format.bits()) };
        let shape = [lines.matrices(), lines.lines, lines.k];
        PanelLayout::new(shape, self.block, ctx.kernels.columns_for(self.columns), side).in_pieces()
    }

    fn correction(&self, ctx: &Context<'_>) -> Correction {
        fitting(ctx.kernels.tiles, self.block, self.left.format, self.right.format)
            .map_or(Correction::Total, |tile| tile.correction)
    }

    /// Rows of the left operand.
    fn left_layout(&self, ctx: &Context<'_>, rows: usize, flatten: bool) -> PanelLayout {
        let side = Side::Left { correction: self.correction(ctx), offset: offset(self.right.format.bits()) };
        PanelLayout::new([1, rows, self.line(flatten)], self.block, PANEL_ROWS, side)
    }

    fn tiles<'b>(
        &'b self,
        ctx: &'b Context<'b>,
        al: PanelLayout,
        joined: PanelLayout,
        out: SharedMut<'b, f32>,
    ) -> Tiles<'b> {
        let kernel = tiles::Kernel {
            tile: fitting(ctx.kernels.tiles, self.block, self.left.format, self.right.format),
            from_nibbles: false,
            max_codes: [self.left.format.max_code(), self.right.format.max_code()],
        };
        let epilogue = Epilogue { accumulate: false, bias: self.bias };
        Tiles::new(ctx, kernel, al, joined, out, epilogue)
    }

    /// The lattices of the product's pixels. None: the image's margin would be out of all proportion, or a tap is left out
    /// for zeros that would have met a NaN.
    fn lattices(&self, nan_blocks: bool) -> Option<Lattices> {
        let lattices = Lattices::new(self.convolution, self.taps);
        let fits = field::is_fit(lattices.margin(self.image.pixels), self.image, self.product);
        let taps = lattices.all.iter().any(|lattice| !lattice.taps.is_empty());
        (fits && taps && !(lattices.leave_out && nan_blocks)).then_some(lattices)
    }

    /// By a kept kernel's panels. False: neither lines nor patches would do.
    fn by_kept(
        &self,
        ctx: &Context<'_>,
        kept: &KeptKernel<'_>,
        flatten: bool,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<bool> {
        if !self.left.format.encodes_to_panels() {
            return Ok(false);
        }
        let (layout, panels) = kept.panels(ctx)?;
        let Workspace { left, groups, scratch, .. } = workspace;
        let nothing = Fillings::new(ctx, [], 0);
        if flatten {
            // Patches of one tap are blocked as its lines are.
            let one_tap = self.convolution.taps() == 1;
            if one_tap {
                self.patches_by(ctx, layout, panels, &nothing, scratch, out)?;
            }
            return Ok(one_tap);
        }
        let Some(lattices) = self.lattices(kept.has_general(ctx)?) else { return Ok(false) };
        let order = lattices.order();
        let whole = order.iter().copied().eq(0..self.convolution.taps());
        let (layout, panels) =
            if whole { (layout, panels) } else { kept::with_taps(ctx, (layout, &panels), &order, groups) };
        self.lines_by(ctx, layout, panels, &nothing, &lattices, left, scratch, out)?;
        Ok(true)
    }

    /// By lines of the image, each encoded once.
    fn by_lines(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        lattices: &Lattices,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Workspace { left, groups, scratch, .. } = workspace;
        let order = lattices.order();
        let right_lines: Vec<_> = (0..self.groups).map(|g| self.right_lines(kernel, g, Some(&order))).collect();
        let layout = self.right_layout(ctx, &right_lines[0]);
        let sources: Vec<_> = right_lines.iter().map(|lines| Source::Floats(lines, self.right.mode)).collect();
        let (panels, fillings) = fillings(ctx, &sources, self.right, layout, groups);
        self.lines_by(ctx, layout, panels, &fillings, lattices, left, scratch, out)
    }

    /// By lines of the image and the panels of each group, once these are filled: their pieces follow lattice after lattice.
    fn lines_by(
        &self,
        ctx: &Context<'_>,
        layout: PanelLayout,
        panels: Vec<PanelsRef>,
        fillings: &Fillings<'_>,
        lattices: &Lattices,
        left_panels: &mut Panels,
        scratch: &[Mutex<Scratch>],
        out: &mut [f32],
    ) -> Result<()> {
        let rows = self.image.batch * product_of(self.product.pixels);
        let al = self.left_layout(ctx, rows, false).in_lines();
        let shape = field::Shape::new(self.image, self.groups, lattices.margin(self.image.pixels), &al);
        let lines = left_panels.reserve_bytes(shape.bytes(), shape.rows());
        let correction = self.correction(ctx);
        let encoding = Encoding { shape, x: self.x, coding: self.left, layout: al, correction, lines };
        let encode = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            scratch.reserve(self.block);
            encoding.fill(ctx, task, &mut scratch);
        };

        let joined = layout.joined();
        let out = SharedMut::new(out);
        let right = Right { layout, joined, panels, tiles: self.tiles(ctx, al, joined, out) };
        let workers = self.workers(ctx, 0);
        let mut first_piece = 0;
        let mut shares = Vec::with_capacity(lattices.all.len());
        for lattice in &lattices.all {
            let fours = Fours::new(lattice, shape, self.product.pixels);
            let pieces = lattice.taps.len();
            let mut plan =
                Plan::new(&al, &joined, fours.count(), pieces, self.groups, workers, right.tiles.wide(usize::MAX));
            let unit = UnitRows::new(ctx, &right, &fours, pieces, self.columns);
            if let Some((_, each)) = unit.as_ref().and(fours.in_rows()) {
                plan.row_panels = plan.row_panels.next_multiple_of(each);
            }
            let row_tasks = fours.count().div_ceil(plan.row_panels);
            let tasks = self.groups * row_tasks * joined.panels.div_ceil(plan.column_panels);
            shares.push(Share { fours, unit, plan, pieces: first_piece..first_piece + pieces, row_tasks, tasks });
            first_piece += pieces;
        }
        let any_general = lines.any_general.expect("memory of the workspace");
        let lines = lines.as_ref();
        let multiply = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = &mut *scratch;
            let mut task = task;
            let share = shares.iter().find(|share| {
                let found = task < share.tasks;
                task -= if found { 0 } else { share.tasks };
                found
            });
            let Share { fours: find, unit, plan, pieces, row_tasks, .. } = share.expect("a task of a lattice");
            let (row_task, rest) = (task % row_tasks, task / row_tasks);
            let (g, column_task) = (rest % self.groups, rest / self.groups);
            let first = row_task * plan.row_panels;
            let range = first..(first + plan.row_panels).min(find.count());
            let panels = range.len();
            let j = column_task * plan.column_panels;
            scratch.general.clear();
            scratch.general.resize(2 * panels, false);
            let any_general = any_general.load(Ordering::Relaxed);
            let panel = right.blocks(g, j, pieces.start);
            if let Some(unit) = unit.as_ref().filter(|_| !any_general && !panel.general) {
                let mut buffer = std::mem::take(&mut scratch.tiles.panel);
                let panel = right.tiles.right_panel(panel, pieces.len() * al.blocks, &mut buffer);
                // SAFETY: the lines and the panel hold the blocks; rows belong to one task.
                unsafe { unit.run(self, find, range, g, lines, panel.bytes, out, scratch) };
                scratch.tiles.panel = buffer;
                return;
            }
            let (mut starts, mut fours) = (Vec::new(), Vec::new());
            let mut from = 0;
            loop {
                let slice: Range<usize> = from..(from + plan.pieces).min(pieces.len());
                let flags = &mut scratch.general[..panels];
                find.find(range.clone(), slice.clone(), g, lines, any_general, &mut starts, &mut fours, flags);
                for panel in 0..panels {
                    scratch.general[panels + panel] |= scratch.general[panel];
                }
                let each = PANEL_ROWS * slice.len();
                let last = slice.end == pieces.len();
                let task = Task {
                    number: None,
                    blocks: slice.len() * al.blocks,
                    rows: 0..panels,
                    columns: j..(j + plan.column_panels).min(joined.panels),
                    left: |i| LeftBlocks {
                        rows: Left::Pieces(&starts[i * each..][..each]),
                        general: scratch.general[i],
                    },
                    right: |j| right.blocks(g, j, pieces.start + slice.start),
                    place: |i, j, general| {
                        let Four { pixel, height } = fours[i];
                        let column = g * self.columns + j * joined.width;
                        tiles::Place {
                            at: pixel * self.product.channels + column,
                            stride: find.stride() * self.product.channels,
                            height,
                            width: joined.width.min(self.columns - j * joined.width),
                            column,
                            first: slice.start == 0,
                            last,
                            finish: last && right.tiles.finishes(general || scratch.general[panels + i]),
                        }
                    },
                };
                // SAFETY: the lines hold the slice's blocks; a tile belongs to one task.
                unsafe { task.run(&right.tiles, &mut scratch.tiles) };
                from = slice.end;
                if last {
                    break;
                }
            }
        };
        let tasks = shares.iter().map(|share| share.tasks).sum();
        run_stages(ctx, workers, Stage { tasks: shape.tasks(), task: &encode }, fillings, scratch, tasks, &multiply)
    }

    /// By patches, put together and encoded task by task.
    fn by_patches(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let Workspace { groups, scratch, .. } = workspace;
        let right_lines: Vec<_> = (0..self.groups).map(|g| self.right_lines(kernel, g, None)).collect();
        let layout = self.right_layout(ctx, &right_lines[0]);
        let sources: Vec<_> = right_lines.iter().map(|lines| Source::Floats(lines, self.right.mode)).collect();
        let (panels, fillings) = fillings(ctx, &sources, self.right, layout, groups);
        self.patches_by(ctx, layout, panels, &fillings, scratch, out)
    }

    /// By patches and the panels of each group, once these are filled.
    fn patches_by(
        &self,
        ctx: &Context<'_>,
        layout: PanelLayout,
        panels: Vec<PanelsRef>,
        fillings: &Fillings<'_>,
        scratch: &[Mutex<Scratch>],
        out: &mut [f32],
    ) -> Result<()> {
        let patches = Patches::new(self);
        let joined = layout.joined();
        let row_pixels = product_of(self.product.pixels);
        let al = self.left_layout(ctx, row_pixels, true);
        let right = Right { layout, joined, panels, tiles: self.tiles(ctx, al, joined, SharedMut::new(out)) };
        let workers = self.workers(ctx, self.image.batch * self.groups * row_pixels * al.k);
        // Rows of a task belong to one sample, as they have random bits of their own.
        let samples = self.image.batch;
        let row_panels = row_pixels.div_ceil(PANEL_ROWS);
        let products = samples * self.groups;
        let plan = Plan::new(&al, &joined, row_panels, 1, products, workers, right.tiles.wide(usize::MAX));
        let row_tasks = row_panels.div_ceil(plan.row_panels);
        let column_tasks = joined.panels.div_ceil(plan.column_panels);
        let multiply = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = &mut *scratch;
            let (row_task, rest) = (task % row_tasks, task / row_tasks);
            let (column_task, rest) = (rest % column_tasks, rest / column_tasks);
            let (g, sample) = (rest % self.groups, rest / self.groups);
            let first = row_task * plan.row_panels * PANEL_ROWS;
            let task_rows = first..(first + plan.row_panels * PANEL_ROWS).min(row_pixels);
            let panels = task_rows.len().div_ceil(PANEL_ROWS);
            let j = column_task * plan.column_panels;
            scratch.reserve(self.block);
            scratch.general.clear();
            scratch.general.resize(panels, false);
            patches.encode(ctx, sample, g, task_rows.clone(), &al, scratch);
            let first = scratch.patch_panels.bytes.as_ptr();
            let starts: Vec<_> = (0..panels).map(|i| first.wrapping_add(i * al.panel_bytes())).collect();
            let task = Task {
                number: None,
                blocks: al.blocks,
                rows: 0..panels,
                columns: j..(j + plan.column_panels).min(joined.panels),
                left: |i| LeftBlocks { rows: Left::Pieces(&starts[i..=i]), general: scratch.general[i] },
                right: |j| right.blocks(g, j, 0),
                place: |i, j, general| {
                    let row = task_rows.start + i * PANEL_ROWS;
                    let column = g * self.columns + j * joined.width;
                    tiles::Place {
                        at: (sample * row_pixels + row) * self.product.channels + column,
                        stride: self.product.channels,
                        height: PANEL_ROWS.min(task_rows.end - row),
                        width: joined.width.min(self.columns - j * joined.width),
                        column,
                        first: true,
                        last: true,
                        finish: right.tiles.finishes(general),
                    }
                },
            };
            // SAFETY: the panels hold the blocks; a tile belongs to one task.
            unsafe { task.run(&right.tiles, &mut scratch.tiles) };
        };
        run_stages(ctx, workers, NOTHING, fillings, scratch, products * row_tasks * column_tasks, &multiply)
    }

    /// By the definition: for formats that do not go by panels, and where lines would not do.
    fn by_codes(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        flatten: bool,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let Workspace { planes: [_, plane], .. } = workspace;
        let (pixels, row_pixels) = (product_of(self.image.pixels), product_of(self.product.pixels));
        let reach = match self.taps {
            Taps::Forward => self.convolution.reach(),
            Taps::Backward => self.convolution.reverse(),
        };
        let taps: Vec<usize> = (0..self.convolution.taps()).collect();
        let image = (!flatten).then(|| {
            let plane = Plane::filled(ctx, self.image, self.left, plane);
            let shape = [self.image.batch * pixels * self.groups, self.channels];
            // SAFETY: the image's size was checked; the plane has as many elements and the padding.
            let lines = unsafe {
                FloatLines::with_plane(self.x.as_ptr(), plane.bits(), vec![0], shape, [self.channels as isize, 1])
            };
            Codes::from_floats(ctx, &lines, self.left.format, self.left.mode)
        });
        let patches = Patches::new(self);
        let workers = ctx.workers(self.macs());
        let shared = SharedMut::new(out);
        for g in 0..self.groups {
            let lines = self.right_lines(kernel, g, (!flatten).then_some(&taps));
            let right = Codes::from_floats(ctx, &lines, self.right.format, self.right.mode);
            let bias = self.bias.map(|bias| &bias[g * self.columns..][..self.columns]);
            for_each_task(ctx.team, workers, self.image.batch * row_pixels, &|_, row| {
                let (sample, pixel) = (row / row_pixels, row % row_pixels);
                let flat;
                let mut pieces = Vec::with_capacity(self.convolution.taps());
                let left = match &image {
                    Some(image) => {
                        let line = |&source: &i32| {
                            (source != NOWHERE).then(|| (sample * pixels + source as usize) * self.groups + g)
                        };
                        pieces.extend(reach.of(pixel).iter().map(line));
                        image
                    }
                    None => {
                        flat = patches.codes(ctx, sample, g, pixel);
                        pieces.push(Some(0));
                        &flat
                    }
                };
                // SAFETY: every row belongs to one task.
                let out = unsafe { shared.part(row * self.product.channels + g * self.columns, self.columns) };
                general::row_of_pieces(left, &pieces, &right, out, bias);
            });
        }
    }
}

/// The kernel's groups, to be laid out.
fn fillings<'a>(
    ctx: &Context<'_>,
    sources: &'a [Source<'a>],
    coding: Coding,
    layout: PanelLayout,
    groups: &'a mut Vec<Panels>,
) -> (Vec<PanelsRef>, Fillings<'a>) {
    groups.resize_with(groups.len().max(sources.len()), Panels::default);
    let mut refs = Vec::with_capacity(sources.len());
    let mut jobs = Vec::with_capacity(sources.len());
    for (source, group) in sources.iter().zip(groups) {
        let panels = group.reserve(&layout);
        refs.push(panels.as_ref());
        jobs.push(Job::new(source, coding.format, layout, panels));
    }
    (refs, Fillings::new(ctx, jobs, 0))
}

/// A lattice's tasks.
struct Share<'a> {
    fours: Fours<'a>,
    unit: Option<UnitRows>,
    plan: Plan,
    /// Its pieces among those of all lattices.
    pieces: Range<usize>,
    row_tasks: usize,
    tasks: usize,
}

/// Rows of few columns on a matrix unit, sixteen by sixteen, straight from the image's lines.
struct UnitRows {
    kernels: &'static MatrixUnitKernels,
    /// Bytes to the lines of each piece, block by block.
    offsets: Vec<usize>,
    steps: usize,
    /// Of the right operand's panel.
    width: usize,
    raised: i32,
    /// Rows of a row of pixels, and how many of these there are.
    row: usize,
}

impl UnitRows {
    /// None: the unit, or its kernel, does not take these rows.
    fn new(ctx: &Context<'_>, right: &Right<'_>, fours: &Fours<'_>, pieces: usize, columns: usize) -> Option<Self> {
        let Right { layout, joined, tiles, .. } = right;
        let kernels = ctx.kernels.matrix_unit.as_ref().filter(|_| tiles.has_kernel())?;
        let (steps, width) = (layout.steps, joined.width);
        let (_, fours_of_row) = fours.in_rows()?;
        let row = fours_of_row * PANEL_ROWS;
        let fits = joined.panels == 1 && columns == width && steps <= aligned::PIECE && row >= unit_rows::ROWS;
        (fits && pieces > 0).then(|| Self {
            kernels,
            offsets: fours.offsets(layout.blocks),
            steps,
            width,
            raised: layout.offset(),
            row,
        })
    }

    /// The rows of some fours, which are whole rows of pixels.
    ///
    /// # Safety
    /// The lines and the panel hold the lattice's blocks, none of which needs the general product; nobody else writes to these
    /// rows of C.
    unsafe fn run(
        &self,
        of: &PixelProduct<'_>,
        fours: &Fours<'_>,
        range: Range<usize>,
        g: usize,
        lines: PanelsRef,
        panel: *const u8,
        out: SharedMut<'_, f32>,
        scratch: &mut Scratch,
    ) {
        const ROWS: usize = unit_rows::ROWS;
        let Self { kernels, ref offsets, steps, width, raised, row } = *self;
        let each = row / PANEL_ROWS;
        // Written once and not touched again, and no line stays in the caches.
        let around = of.bias.is_none()
            && size_of::<f32>() * out.len() >= 2 * Caches::get().l2
            && (out.as_ptr() as usize).is_multiple_of(64)
            && of.product.channels.is_multiple_of(ROWS);
        let c_stride = fours.stride() * of.product.channels;
        let right = scratch.tiles.unit_right.reserve(offsets.len() * unit_rows::right_bytes(steps)).as_ptr();
        let mut groups = Vec::with_capacity(range.len() * PANEL_ROWS / ROWS + range.len() / each);
        for column in (0..width).step_by(ROWS) {
            groups.clear();
            for pixels in range.start / each..range.end / each {
                let (line, pixel) = fours.row(pixels, g);
                // The last sixteen may overlap those before: they come out the same.
                for first in (0..row).step_by(ROWS).map(|first| first.min(row - ROWS)) {
                    let at = (pixel + first * fours.stride()) * of.product.channels + g * of.columns + column;
                    groups.push(unit_rows::Group {
                        line: lines.bytes.wrapping_add(line + first * fours.between()),
                        offsets,
                        c: out.pointer(at, (ROWS - 1) * c_stride + ROWS),
                    });
                }
            }
            let products = unit_rows::Products { steps, right, stride: fours.between(), c_stride, fresh: true, around };
            // SAFETY: the caller's word; the buffer has room for the products' columns.
            unsafe {
                (kernels.rows.lay_out_columns)(offsets.len(), steps, width, raised, panel, column, right);
                (kernels.with)(steps, &mut || (kernels.rows.rows)(&groups, &products));
            }
        }
        let Some(bias) = of.bias.map(|bias| &bias[g * of.columns..][..width]) else { return };
        for pixels in range.start / each..range.end / each {
            let (_, pixel) = fours.row(pixels, g);
            for i in 0..row {
                let at = (pixel + i * fours.stride()) * of.product.channels + g * of.columns;
                // SAFETY: rows of this task.
                let row = unsafe { out.part(at, width) };
                row.iter_mut().zip(bias).for_each(|(x, &bias)| *x = general::finish(*x, Some(bias)));
            }
        }
    }
}
