//! The weight gradient of a convolution, from images or from what was kept of them.
#![allow(unsafe_code, reason = "tasks that write disjoint panels, rows and tiles")]

use super::prepared::{Image, Plane};
use super::reach::NOWHERE;
use super::{Convolution, Input, NOTHING, Place, Plan, product_of, run_stages};
use crate::arch::generic::encode::{STRIP, STRIPS_STAGED};
use crate::arch::generic::product::{Correction, PANEL_ROWS};
use crate::arch::generic::{aligned, unit_rows};
use crate::arch::kernels::{Kernels, MatrixUnitKernels};
use crate::encode::blocks::{PIXELS, Scratch};
use crate::encode::codes::Codes;
use crate::encode::filling::{Fillings, Job, Source, reserve_scratch};
use crate::encode::panels::{Form, PanelLayout, Panels, PanelsMut, PanelsRef, Side};
use crate::encode::{Context, check_size, forms};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, BlockShape, MAX_BLOCK};
use crate::gemm::tiles::{Kernel, Left, LeftBlocks, PanelBlocks, Task, Tiles};
use crate::gemm::{Coding, Epilogue, Workspace, driver, fitting, general, offset, tiles};
use crate::mem::{AlignedBytes, SharedMut};
use crate::parallel::{Stage, for_each_stage, for_each_task};
use crate::shape::{FloatLines, ImageRows};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

impl Convolution {
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

    fn weight_left_lines<'a>(&self, x: &'a [f32], plane: &Plane, layout: &PanelLayout) -> FloatLines<'a> {
        let image = (product_of(self.input) * self.channels[0]) as isize;
        let [matrices, lines, k] = [layout.matrices, layout.lines, layout.k];
        let offsets = (0..matrices).map(|m| (m * lines) as isize).collect();
        // SAFETY: the callers checked the image's size; the plane has as many elements and the padding.
        unsafe { FloatLines::with_plane(x.as_ptr(), plane.bits(), offsets, [lines, k], [1, image]) }
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
        let mut lines = unsafe {
            FloatLines::with_plane(dy.as_ptr(), plane.bits(), offsets, [layout.lines, self.batch], [1, image])
        };
        lines.image = self.rows_of_strips(layout).filter(|_| plane.bits().is_null());
        lines
    }

    /// Of dY: where its random bits are, if these need no plane but can be made as its strips are encoded, without making
    /// many of them twice.
    fn rows_of_strips(&self, layout: &PanelLayout) -> Option<ImageRows> {
        const MOST: usize = 128;
        let ([p0, p1, width], channels) = (self.output, self.channels[1]);
        // Strips that are staged together lie within the pixels whose bits come together.
        let strips = (STRIP.is_multiple_of(channels) || channels.is_multiple_of(STRIP))
            && PIXELS * channels >= STRIPS_STAGED * STRIP;
        let fits = layout.lined_up > 0 && strips && channels <= MOST && layout.block <= 64;
        (fits && width.is_multiple_of(PIXELS)).then_some(ImageRows { channels, rows: p0 * p1, width })
    }

    pub(super) fn image(&self, place: Place) -> Image {
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
        if self.is_narrow() {
            return Some(self.kept_column_bytes(ctx, place, format));
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
        let plane = Plane::filled(ctx, image, coding, &mut planes[1]);
        if self.is_narrow() {
            self.keep_columns(ctx, place, x, coding, &plane, bytes);
            return Ok(());
        }
        let (layout, groups) = self.kept_layout(ctx, place, coding.format);
        let lines: Vec<FloatLines<'_>> = (0..groups)
            .map(|g| match place {
                Place::Input => self.weight_left_lines(x, &plane, &layout),
                Place::Output => self.weight_right_lines(x, &plane, g, &layout),
            })
            .collect();
        let sources: Vec<Source<'_>> = lines.iter().map(|lines| Source::Floats(lines, coding.mode)).collect();
        let parts = bytes.chunks_exact_mut(layout.bytes() + layout.panel_count());
        let jobs = sources.iter().zip(parts).map(|(source, bytes)| {
            let (bytes, general) = bytes.split_at_mut(layout.bytes());
            Job::new(source, coding.format, layout, PanelsMut::new(bytes, general))
        });
        let fillings = Fillings::new(ctx, jobs, 0);
        run_stages(ctx, ctx.workers(x.len()), NOTHING, &fillings, scratch, 0, &|_, _| {})
    }

    /// What was kept of dY, group by group.
    fn kept_groups<'a>(&self, layout: &PanelLayout, kept: &'a [u8]) -> impl Iterator<Item = PanelsRef> + 'a {
        let bytes = layout.bytes();
        kept.chunks_exact(bytes + layout.panel_count()).map(move |part| PanelsRef::new(part.split_at(bytes)))
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
        let Workspace { left: left_panels, right: right_panels, groups, planes: [dy_plane, x_plane], scratch, .. } =
            workspace;
        reserve_scratch(ctx, scratch);
        let scratch = &*scratch;
        let plane = |values: Input<'_>, place: Place, coding: Coding, memory: &mut AlignedBytes| match values {
            Input::Floats(_) => Plane::filled(ctx, self.image(place), coding, memory),
            Input::Kept(_) => Plane::none(),
        };
        let reach = self.reach();
        let by_panels =
            [x_coding, dy_coding].iter().all(|coding| coding.format.encodes_to_panels()) && block <= MAX_BLOCK;
        let right_layout = match dy {
            Input::Floats(_) => self.weight_right_layout(ctx.kernels, dy_coding.format),
            Input::Kept(_) => self.kept_layout(ctx, Place::Output, dy_coding.format).0,
        };
        let dy_plane = if by_panels && self.rows_of_strips(&right_layout).is_some() {
            Plane::none()
        } else {
            plane(dy, Place::Output, dy_coding, dy_plane)
        };
        let x_plane = plane(x, Place::Input, x_coding, x_plane);
        let operands = [(x, x_coding, &x_plane), (dy, dy_coding, &dy_plane)];
        if by_panels
            && self.weight_by_lanes(ctx, operands, &reach, out, [&mut *left_panels, &mut *right_panels], scratch)
        {
            return Ok(());
        }
        // What was kept of narrow groups has no form but the one that was just refused.
        let kept = [x, dy].iter().any(|values| matches!(values, Input::Kept(_)));
        let by_panels = by_panels && !(self.is_narrow() && kept);
        if !by_panels {
            let image = match x {
                Input::Floats(x) => {
                    let layout = self.compact_layout(x_coding.format);
                    let lines = self.weight_left_lines(x, &x_plane, &layout);
                    Codes::from_floats(ctx, &lines, x_coding.format, x_coding.mode)
                }
                Input::Kept(bytes) if self.is_narrow() => {
                    self.codes_of_columns(ctx, Place::Input, bytes, x_coding.format, 0..self.channels[0])
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
                Input::Kept(bytes) if self.is_narrow() => (0..self.groups)
                    .map(|g| {
                        let channels = g * columns..(g + 1) * columns;
                        self.codes_of_columns(ctx, Place::Output, bytes, dy_coding.format, channels)
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
        let joined = right_layout.joined();
        let lines = product_of(self.input) * self.channels[0];
        let side = Side::Left { correction, offset };
        let left_layout = PanelLayout::new([1, lines, self.batch], block, PANEL_ROWS, side);
        let unit = ctx.kernels.matrix_unit.as_ref().filter(|_| {
            let fits = channels.is_multiple_of(unit_rows::ROWS) && left_layout.steps <= aligned::PIECE;
            fits && tile.is_some() && joined.panels == 1 && columns == joined.width && joined.form == Form::Bytes
        });
        // Line by line where a row of dW may be any of them; else four by four.
        let by_lines = unit.is_some() || !channels.is_multiple_of(PANEL_ROWS);
        let left_layout = if by_lines { left_layout.in_lines() } else { left_layout };
        let line_bytes = left_layout.panel_bytes() / PANEL_ROWS;
        // Behind them what stands for lines of pixels that do not exist: correction and rider are zeros, too.
        let (zeros, zero_bytes) = (left_layout.bytes(), unit_rows::ROWS * line_bytes);
        let left = left_panels.reserve_bytes(zeros + zero_bytes, left_layout.panel_count());
        // SAFETY: nobody else uses the memory yet.
        unsafe { left.bytes.part(zeros, zero_bytes) }.fill(0);
        let x_lines = match x {
            Input::Floats(x) => Some(self.weight_left_lines(x, &x_plane, &left_layout)),
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
            jobs.push(Job::new(source, x_coding.format, left_layout, left));
        }
        for (source, group) in dy_sources.iter().zip(groups.iter_mut()) {
            let panels = group.reserve(&right_layout);
            rights.push(panels.as_ref());
            jobs.push(Job::new(source, dy_coding.format, right_layout, panels));
        }
        if let Input::Kept(bytes) = dy {
            rights.extend(self.kept_groups(&right_layout, bytes));
        }
        let fillings = Fillings::new(ctx, jobs, 0);
        if let Input::Kept(bytes) = x {
            self.expand(ctx, bytes, x_coding.format, &left_layout, left, scratch);
        }

        let rows = taps * channels;
        let al = PanelLayout { lines: rows, panels: rows.div_ceil(PANEL_ROWS), ..left_layout };
        let out = SharedMut::new(out);
        let max_codes = [x_coding.format.max_code(), dy_coding.format.max_code()];
        let tiles =
            Tiles::new(ctx, Kernel { tile, from_nibbles: false, max_codes }, al, joined, out, Epilogue::default());
        let workers = ctx.threads.max(1);
        let mut plan = Plan::new(
            &al,
            &joined,
            rows.div_ceil(PANEL_ROWS),
            out_pixels,
            self.groups,
            workers,
            tiles.wide(usize::MAX),
        );
        if unit.is_some() {
            plan.row_panels = plan.row_panels.next_multiple_of(unit_rows::ROWS / PANEL_ROWS);
        }
        let row_tasks = rows.div_ceil(PANEL_ROWS * plan.row_panels);
        let column_tasks = joined.panels.div_ceil(plan.column_panels);
        let none = AtomicBool::new(false);
        let left_general = left.any_general.unwrap_or(&none);
        let left = left.as_ref();
        let multiply = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let scratch = &mut *scratch;
            let (row_task, rest) = (task % row_tasks, task / row_tasks);
            let (column_task, g) = (rest % column_tasks, rest / column_tasks);
            let first = row_task * plan.row_panels * PANEL_ROWS;
            let task_rows = first..(first + plan.row_panels * PANEL_ROWS).min(rows);
            let panels = task_rows.len().div_ceil(PANEL_ROWS);
            let j = column_task * plan.column_panels;
            let any_general = left_general.load(Ordering::Relaxed);
            // Lines of all groups' channels at a pixel, of the group's own from the first on.
            let line = |source: usize, c: usize| source * self.channels[0] + g * channels + c;
            let right = |j: usize, first_pixel: usize| PanelBlocks {
                bytes: rights[g]
                    .bytes
                    .wrapping_add(j * joined.panel_bytes() + first_pixel * right_layout.blocks * joined.block_bytes),
                // SAFETY: a panel of the layout, written by the stage before.
                general: unsafe { rights[g].is_general(j) },
            };
            if let Some(kernels) = unit.filter(|_| !any_general && !right(0, 0).general) {
                let find = |tap: usize, c: usize, o: usize| match reach.of(o)[tap] {
                    NOWHERE => zeros,
                    source => line(source as usize, c) * line_bytes,
                };
                let rows = UnitRows { kernels, al: &al, joined: &joined, channels, line_bytes };
                let at = g * taps * channels * columns;
                // SAFETY: the lines and the panel hold the blocks; a task's rows are its own.
                unsafe { rows.run(task_rows, out_pixels, at, left.bytes, find, right(0, 0).bytes, out, scratch) };
                return;
            }
            scratch.general.clear();
            scratch.general.resize(2 * panels, false);
            let mut starts = Vec::with_capacity(PANEL_ROWS * panels * plan.pieces);
            for from in (0..out_pixels).step_by(plan.pieces) {
                let slice = from..(from + plan.pieces).min(out_pixels);
                starts.clear();
                scratch.general[..panels].fill(false);
                for i in 0..panels {
                    // In place of rows past the last one, that one again; of four in a panel, the panel.
                    let row = |lane: usize| (task_rows.start + PANEL_ROWS * i + lane).min(rows - 1);
                    let at = [0, 1, 2, 3].map(|lane| (row(lane) / channels, row(lane) % channels));
                    let mut find = |sources: &[i32], (tap, c): (usize, usize)| {
                        let source = sources[tap];
                        if source == NOWHERE {
                            return left.bytes.wrapping_add(zeros);
                        }
                        let line = line(source as usize, c);
                        // SAFETY: a line of the layout, written by the stage before.
                        scratch.general[i] |= any_general && unsafe { left.is_general(line / PANEL_ROWS) };
                        left.bytes.wrapping_add(line * line_bytes)
                    };
                    if by_lines {
                        slice.clone().for_each(|o| starts.extend(at.map(|at| find(reach.of(o), at))));
                    } else {
                        starts.extend(slice.clone().map(|o| find(reach.of(o), at[0])));
                    }
                }
                for panel in 0..panels {
                    scratch.general[panels + panel] |= scratch.general[panel];
                }
                let each = starts.len() / panels;
                let task = Task {
                    number: None,
                    blocks: slice.len() * al.blocks,
                    rows: 0..panels,
                    columns: j..(j + plan.column_panels).min(joined.panels),
                    left: |i| LeftBlocks {
                        rows: Left::Pieces(&starts[i * each..][..each]),
                        general: scratch.general[i],
                    },
                    right: |j| right(j, slice.start),
                    place: |i, j, general| {
                        let row = task_rows.start + PANEL_ROWS * i;
                        let column = j * joined.width;
                        let last = slice.end == out_pixels;
                        tiles::Place {
                            at: (g * rows + row) * columns + column,
                            stride: columns,
                            height: PANEL_ROWS.min(rows - row),
                            width: joined.width.min(columns - column),
                            column,
                            first: slice.start == 0,
                            last,
                            finish: last && tiles.finishes(general || scratch.general[panels + i]),
                        }
                    },
                };
                // SAFETY: the lines hold the slice's blocks; a tile belongs to one task.
                unsafe { task.run(&tiles, &mut scratch.tiles) };
            }
        };
        run_stages(ctx, workers, NOTHING, &fillings, scratch, self.groups * row_tasks * column_tasks, &multiply)
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

    /// Lines, or panels, from what was kept.
    fn expand(
        &self,
        ctx: &Context<'_>,
        kept: &[u8],
        format: BlockFormat,
        layout: &PanelLayout,
        to: PanelsMut<'_>,
        scratch: &[Mutex<Scratch>],
    ) {
        const TOGETHER: usize = 64;
        let compact = self.compact_layout(format);
        let Form::Compact { nibbles } = compact.form else { unreachable!("made compact") };
        let (kept, general) = kept.split_at(compact.bytes());
        let per_matrix = compact.panel_count() / compact.matrices;
        let panels = compact.panel_count();
        let (line_block, line_bytes) = (layout.block_bytes / PANEL_ROWS, layout.panel_bytes() / PANEL_ROWS);
        let panel_of = PanelLayout { form: Form::Bytes, ..*layout };
        let task = |worker: usize, task: usize| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let own = scratch.strips.reserve(layout.block_bytes + line_block).as_ptr();
            for panel in task * TOGETHER..((task + 1) * TOGETHER).min(panels) {
                let (matrix, q) = (panel / per_matrix, panel % per_matrix);
                if q >= compact.panels {
                    continue;
                }
                let present = PANEL_ROWS.min(compact.lines - q * PANEL_ROWS);
                let first = matrix * compact.lines + q * PANEL_ROWS;
                if general[panel] != 0 {
                    (first..first + present).for_each(|line| to.set_general(line / PANEL_ROWS));
                }
                let from =
                    kept[panel * compact.panel_bytes()..][..compact.panel_bytes()].chunks_exact(compact.block_bytes);
                // SAFETY: room for a panel's block, and a line's behind it.
                let plain = unsafe { std::slice::from_raw_parts_mut(own, layout.block_bytes) };
                for (b, from) in from.enumerate() {
                    if layout.form == Form::Bytes {
                        // SAFETY: every panel belongs to one task.
                        let into = unsafe {
                            to.bytes.part(layout.panel_at(0, panel) + b * layout.block_bytes, layout.block_bytes)
                        };
                        forms::from_compact(from, layout, nibbles, into);
                        continue;
                    }
                    forms::from_compact(from, &panel_of, nibbles, plain);
                    let lines = std::array::from_fn(|lane| {
                        let at = (first + lane) * line_bytes + b * line_block;
                        // Lines that nobody has go where nobody reads.
                        if lane < present {
                            to.bytes.pointer(at, line_block)
                        } else {
                            own.wrapping_add(layout.block_bytes)
                        }
                    });
                    // SAFETY: every line belongs to one task.
                    unsafe { forms::to_lines(plain, layout.step(), lines) };
                }
            }
        };
        let stage = Stage { tasks: panels.div_ceil(TOGETHER), task: &task };
        for_each_stage(ctx.team, ctx.workers(4 * panels * layout.k), &[stage]);
    }
}

/// Rows of dW of few columns on a matrix unit, sixteen channels by sixteen columns.
struct UnitRows<'a> {
    kernels: &'a MatrixUnitKernels,
    al: &'a PanelLayout,
    joined: &'a PanelLayout,
    channels: usize,
    line_bytes: usize,
}

impl UnitRows<'_> {
    /// Products that the right operand is laid out for at a time: it stays in the second-level cache.
    const TOGETHER: usize = 128;

    /// The rows `rows` of a group, whose dW begins at element `at`. `find`: where among
    /// the lines the first of sixteen begins, given tap, channel and output pixel.
    ///
    /// # Safety
    /// The lines and the panel hold their blocks, none of which needs the general product; the rows are the caller's alone.
    unsafe fn run(
        &self,
        rows: Range<usize>,
        pixels: usize,
        at: usize,
        lines: *const u8,
        find: impl Fn(usize, usize, usize) -> usize,
        panel: *const u8,
        out: SharedMut<'_, f32>,
        scratch: &mut Scratch,
    ) {
        const ROWS: usize = unit_rows::ROWS;
        let Self { kernels, al, joined, channels, line_bytes } = *self;
        let (blocks, steps, width) = (al.blocks, al.steps, joined.width);
        let line_block = line_bytes / blocks;
        let together = (Self::TOGETHER / blocks).max(1);
        let bytes = together * blocks * unit_rows::right_bytes(steps);
        let right = scratch.tiles.unit_right.reserve(bytes).as_ptr();
        let starts: Vec<usize> = rows.step_by(ROWS).collect();
        let mut offsets = Vec::new();
        for first in (0..pixels).step_by(together) {
            let slice = first..(first + together).min(pixels);
            let each = slice.len() * blocks;
            offsets.clear();
            for row in &starts {
                offsets.extend(slice.clone().flat_map(|o| {
                    let line = find(row / channels, row % channels, o);
                    (0..blocks).map(move |b| line + b * line_block)
                }));
            }
            for column in (0..width).step_by(ROWS) {
                let group = |(&row, offsets)| unit_rows::Group {
                    line: lines,
                    offsets,
                    c: out.pointer(at + row * width + column, (ROWS - 1) * width + ROWS),
                };
                let groups: Vec<_> = starts.iter().zip(offsets.chunks_exact(each)).map(group).collect();
                let products = unit_rows::Products {
                    steps,
                    right,
                    stride: line_bytes,
                    c_stride: width,
                    fresh: slice.start == 0,
                    around: false,
                };
                let panel = panel.wrapping_add(slice.start * blocks * joined.block_bytes);
                // SAFETY: the caller's word; the buffer has room for the products' columns.
                unsafe {
                    (kernels.rows.lay_out_columns)(each, steps, width, joined.offset(), panel, column, right);
                    (kernels.with)(steps, &mut || (kernels.rows.rows)(&groups, &products));
                }
            }
        }
    }
}
