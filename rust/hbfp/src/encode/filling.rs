//! Fills panels: encodes them straight from f32, or lays them out from planes or codes.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint panels")]

use super::blocks::{
    PIXELS, Part, RUN, RoundingMode, Scratch, load_lines, pixel_strip, plane_strip, random_columns, random_pixels,
    random_rows, random_strip,
};
use super::codes::{Codes, unpack_block};
use super::panels::{Form, PanelLayout, PanelsMut, Side};
use super::relayout::{ordinary_blocks, strip_of_planes};
use super::{Context, forms, per_worker};
use crate::arch::generic::encode::{BlockPlace, FAST_SCALES, PanelCoding, ROW_PADDING, STRIP, STRIPS_STAGED};
use crate::arch::generic::product::{Correction, PANEL_ROWS, RIDER};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, EXPONENT_OFFSET, NAN_EXPONENT};
use crate::mem::{SharedMut, ask_for};
use crate::pack::packed_bytes;
use crate::parallel::for_each_task;
use crate::shape::{FloatLines, ImageRows};
use crate::sums::{BLOCK, sum_block};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Lines of planes blocked along the reduction: rows of all matrices, one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlaneLines<'a> {
    pub(crate) exponents: &'a [u8],
    pub(crate) mantissas: &'a [u8],
    pub(crate) matrices: usize,
    pub(crate) lines: usize,
    pub(crate) k: usize,
    /// Bytes of a row.
    pub(crate) row: usize,
}

/// What panels are made from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Floats(&'a FloatLines<'a>, RoundingMode),
    Planes(PlaneLines<'a>),
    Codes(&'a Codes),
}

impl Source<'_> {
    pub(crate) fn matrices(&self) -> usize {
        match self {
            Self::Floats(x, _) => x.matrices(),
            Self::Planes(p) => p.matrices,
            Self::Codes(c) => c.matrices,
        }
    }
    pub(crate) fn lines(&self) -> usize {
        match self {
            Self::Floats(x, _) => x.lines,
            Self::Planes(p) => p.lines,
            Self::Codes(c) => c.lines,
        }
    }
    pub(crate) fn k(&self) -> usize {
        match self {
            Self::Floats(x, _) => x.k,
            Self::Planes(p) => p.k,
            Self::Codes(c) => c.k,
        }
    }
    /// Matrices, lines, elements of a line.
    pub(crate) fn shape(&self) -> [usize; 3] {
        [self.matrices(), self.lines(), self.k()]
    }
    /// Whether sums of its blocks can be taken as it is encoded: they are those that bias gradients are made of.
    pub(crate) fn sums_blocks(&self, block: usize) -> bool {
        matches!(self, Self::Floats(x, _) if x.matrices() == 1 && takes_strips(x)) && block == BLOCK
    }
}

/// Panels that are to be filled.
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Source<'a>,
    pub(crate) format: BlockFormat,
    pub(crate) layout: PanelLayout,
    pub(crate) panels: PanelsMut<'a>,
    /// Where the sums of blocks go, [blocks, lines], if [`Source::sums_blocks`].
    pub(crate) sums: Option<SharedMut<'a, f32>>,
}

impl<'a> Job<'a> {
    /// The image that random bits are made for as its strips are encoded.
    fn image(&self) -> Option<ImageRows> {
        match self.source {
            Source::Floats(x, mode) if mode.is_stochastic() => x.image,
            _ => None,
        }
    }

    pub(crate) fn new(source: &'a Source<'a>, format: BlockFormat, layout: PanelLayout, panels: PanelsMut<'a>) -> Self {
        Self { source, format, layout, panels, sums: None }
    }

    /// Lines that lie side by side are taken a few blocks at a time: tasks follow each other down the rows of the tensor.
    fn blocks_together(&self) -> usize {
        match self.source {
            Source::Floats(x, _) if takes_strips(x) => (BLOCK_ROWS / self.layout.block).max(1),
            _ => self.layout.blocks.max(1),
        }
    }
}

/// A job cut into tasks: runs of blocks, and in each groups of strips, matrix after matrix.
pub(crate) struct Filling<'a> {
    job: Job<'a>,
    strips_together: usize,
    blocks_together: usize,
    tasks: usize,
}

impl<'a> Filling<'a> {
    pub(crate) fn new(ctx: &Context<'_>, job: Job<'a>) -> Self {
        let layout = &job.layout;
        let blocks_together = job.blocks_together();
        let runs = layout.blocks.div_ceil(blocks_together);
        let wanted = TASKS_PER_WORKER * ctx.threads.max(1);
        let mut strips_together = (layout.matrices * layout.strips() * runs / wanted).clamp(1, STRIPS_TOGETHER);
        if let Some(image) = job.image() {
            strips_together = strips_together.next_multiple_of(PIXELS * image.channels / STRIP);
        }
        let tasks = layout.matrices * runs * layout.strips().div_ceil(strips_together);
        Self { job, strips_together, blocks_together, tasks }
    }

    /// Does all tasks, one after the other.
    pub(crate) fn run_all(&self, ctx: &Context<'_>, scratch: &mut Scratch) -> Result<()> {
        // SAFETY: each once.
        (0..self.tasks).try_for_each(|task| unsafe { self.run(ctx, task, scratch) })
    }

    /// Does task number `task`.
    ///
    /// # Safety
    /// No other call for the same task is under way.
    unsafe fn run(&self, ctx: &Context<'_>, task: usize, scratch: &mut Scratch) -> Result<()> {
        let Job { source, format, ref layout, ref panels, sums } = self.job;
        let (groups, runs) =
            (layout.strips().div_ceil(self.strips_together), layout.blocks.div_ceil(self.blocks_together));
        let (matrix, rest) = (task / (groups * runs), task % (groups * runs));
        let from = rest % groups * self.strips_together;
        let strips = from..(from + self.strips_together).min(layout.strips());
        let b = rest / groups * self.blocks_together;
        let blocks = b..(b + self.blocks_together).min(layout.blocks);
        let per_strip = STRIP / layout.width;
        if panels.fresh && blocks.len() == layout.blocks {
            let len = strips.len() * per_strip * layout.panel_bytes();
            ask_for(panels.bytes.pointer(layout.panel_at(matrix, strips.start * per_strip), len), len);
        }
        if let (Source::Planes(planes), Form::Nibbles, 4) = (source, layout.form, format.bits()) {
            return strips.into_iter().try_for_each(|strip| {
                ordinary_blocks(ctx.kernels, planes, 4, layout, panels, [matrix, strip], &mut scratch.left);
                set_runs(&scratch.left).try_for_each(|run| strip_of_planes(planes, layout, panels, matrix, strip, run))
            });
        }
        scratch.reserve(layout.block);
        // Other forms are made of the kernels' own, which goes to scratch.
        let plain = layout.plain_block_bytes();
        let (own, stride) = match layout.form {
            Form::Bytes => (None, layout.panel_bytes()),
            _ => {
                let stride = blocks.len() * plain;
                (Some(scratch.strips.reserve(strips.len() * per_strip * stride)), stride)
            }
        };
        let writer = |strip: usize| {
            let mut first = [std::ptr::null_mut(); MOST_PANELS];
            for (i, first) in first.iter_mut().enumerate().take(per_strip) {
                *first = match own {
                    None => {
                        let from = layout.panel_at(matrix, strip * per_strip + i);
                        panels.bytes.pointer(from, layout.blocks * plain)
                    }
                    Some(own) => own
                        .as_ptr()
                        .wrapping_add(((strip - strips.start) * per_strip + i) * stride)
                        .wrapping_sub(blocks.start * plain),
                };
            }
            let line = strip * STRIP;
            let lines = STRIP.min(layout.lines - line);
            let (blocks, panel) = (blocks.clone(), strip * per_strip);
            StripWriter { ctx, layout, format, matrix, line, lines, blocks, first, stride, plain, panels, panel }
        };
        match source {
            // Block after block, so that neighbouring strips are read one after the other.
            Source::Floats(x, mode) if takes_strips(x) => {
                for b in blocks.clone() {
                    let (mut strip, mut pixels) = (strips.start, None);
                    while strip < strips.end {
                        if let Some(image) = self.job.image() {
                            let pixel = strip * STRIP / image.channels / PIXELS * PIXELS;
                            if pixels.replace(pixel) != Some(pixel) {
                                let samples = b * layout.block..((b + 1) * layout.block).min(layout.k);
                                random_pixels(ctx.kernels, &image, pixel, samples, mode.seed, &mut scratch.pixels);
                            }
                        }
                        let together = STRIPS_STAGED.min(strips.end - strip);
                        let amax = writer(strip).stage(x, b, together, scratch);
                        for (i, sums) in (0..together).filter_map(|i| Some((i, sums?))) {
                            writer(strip + i).sum_staged(b, i, scratch, sums);
                        }
                        for (i, amax) in amax[..together].iter().enumerate() {
                            writer(strip + i).strip_of_floats(x, *mode, b, i, amax, scratch);
                        }
                        strip += together;
                    }
                }
            }
            Source::Floats(x, mode) => strips.clone().for_each(|strip| writer(strip).rows_of_floats(x, *mode, scratch)),
            Source::Planes(p) => {
                for strip in strips.clone() {
                    let mut left = std::mem::take(&mut scratch.left);
                    ordinary_blocks(ctx.kernels, p, format.bits(), layout, panels, [matrix, strip], &mut left);
                    for blocks in set_runs(&left) {
                        StripWriter { blocks, ..writer(strip) }.rows_of_codes(
                            scratch,
                            |part, b, stride, scratch, ends| {
                                rows_of_planes(p, format, part, b, layout, stride, scratch, ends)
                            },
                        )?;
                    }
                    scratch.left = left;
                }
            }
            Source::Codes(c) => {
                for strip in strips.clone() {
                    writer(strip).rows_of_codes(scratch, |part, b, stride, scratch, ends| {
                        rows_of_codes(c, part, b, stride, scratch, ends);
                        Ok(())
                    })?;
                }
            }
        }
        if let Some(own) = own {
            for (i, panel) in (strips.start * per_strip..strips.end * per_strip).enumerate() {
                let to = layout.panel_at(matrix, panel);
                // Past the last line there may be what an earlier call left: what is kept is the same for all callers.
                let present = panel < layout.panels;
                for (j, b) in blocks.clone().enumerate() {
                    // SAFETY: the writers filled this panel's block, or nobody reads what is made of it.
                    let from = unsafe { std::slice::from_raw_parts(own.as_ptr().add(i * stride + j * plain), plain) };
                    // SAFETY: nobody else writes to the same block.
                    let block = |at: usize, len: usize| unsafe { panels.bytes.part(to + at, len) };
                    match layout.form {
                        Form::Lines => {
                            let line = plain / PANEL_ROWS;
                            let lines = std::array::from_fn(|lane| {
                                panels.bytes.pointer(to + (lane * layout.blocks + b) * line, line)
                            });
                            // SAFETY: as above, line by line.
                            unsafe { forms::to_lines(from, layout.step(), lines) };
                        }
                        Form::Compact { .. } | Form::Nibbles if !present => {
                            block(b * layout.block_bytes, layout.block_bytes).fill(0);
                        }
                        Form::Compact { nibbles } => {
                            forms::to_compact(
                                from,
                                layout.step(),
                                nibbles,
                                block(b * layout.block_bytes, layout.block_bytes),
                            );
                        }
                        _ => forms::to_nibbles(from, layout, block(b * layout.block_bytes, layout.block_bytes)),
                    }
                }
            }
        }
        Ok(())
    }
}

/// Where consecutive flags are set.
fn set_runs(flags: &[bool]) -> impl Iterator<Item = Range<usize>> {
    let mut end = 0;
    flags.chunk_by(|a, b| a == b).filter_map(move |run| {
        end += run.len();
        run[0].then_some(end - run.len()..end)
    })
}

/// Jobs cut into tasks.
pub(crate) struct Fillings<'a> {
    jobs: Vec<Filling<'a>>,
    /// How many of the first jobs take turns, each in proportion to its tasks: they read the same tensor, and what one
    /// brings into the caches serves the others.
    together: usize,
}

impl<'a> Fillings<'a> {
    pub(crate) fn new(ctx: &Context<'_>, jobs: impl IntoIterator<Item = Job<'a>>, together: usize) -> Self {
        Self { jobs: jobs.into_iter().map(|job| Filling::new(ctx, job)).collect(), together }
    }

    pub(crate) fn tasks(&self) -> usize {
        self.jobs.iter().map(|job| job.tasks).sum()
    }

    /// Does task number `task` of all.
    ///
    /// # Safety
    /// No other call for the same task is under way.
    pub(crate) unsafe fn run(&self, ctx: &Context<'_>, task: usize, scratch: &mut Scratch) -> Result<()> {
        let (turns, rest) = self.jobs.split_at(self.together);
        let all: usize = turns.iter().map(|job| job.tasks).sum();
        let mut left = task;
        if task < all {
            // The last job fills the gaps that the others leave.
            for (i, job) in turns.iter().enumerate() {
                let remaining: usize = turns[i..].iter().map(|job| job.tasks).sum();
                let done = |position: usize| position * job.tasks / remaining;
                if done(left + 1) > done(left) {
                    // SAFETY: the caller's word; positions map to tasks one to one.
                    return unsafe { job.run(ctx, done(left), scratch) };
                }
                left -= done(left);
            }
            unreachable!("the last job takes every position");
        }
        left -= all;
        for job in rest {
            if left < job.tasks {
                // SAFETY: the caller's word.
                return unsafe { job.run(ctx, left, scratch) };
            }
            left -= job.tasks;
        }
        unreachable!("a task below the count")
    }
}

/// Panels of a strip at most.
const MOST_PANELS: usize = STRIP / PANEL_ROWS;
/// Strips that a task takes at most: side by side they make runs of 1 KiB of memory.
const STRIPS_TOGETHER: usize = 8;
/// Rows of lines side by side that a task takes, in whole blocks.
const BLOCK_ROWS: usize = 128;
/// Tasks for each thread, so that all end together.
const TASKS_PER_WORKER: usize = 4;

/// Lays an operand out, on all threads.
pub(crate) fn fill(ctx: &Context<'_>, job: Job<'_>, scratch: &mut Vec<Mutex<Scratch>>) -> Result<()> {
    reserve_scratch(ctx, scratch);
    let elements = job.layout.matrices * job.layout.lines * job.layout.k;
    let fillings = Fillings::new(ctx, [job], 1);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    for_each_task(ctx.team, ctx.workers(elements), fillings.tasks(), &|worker, task| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: tasks are handed out once.
        if let Err(error) = unsafe { fillings.run(ctx, task, &mut scratch) } {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// One scratch a worker.
pub(crate) fn reserve_scratch(ctx: &Context<'_>, scratch: &mut Vec<Mutex<Scratch>>) {
    if scratch.len() < ctx.threads.max(1) {
        *scratch = per_worker(ctx, Scratch::default);
    }
}

/// Exponent bytes and code sums of the lines of a strip's block.
struct BlockEnds {
    c: [u8; STRIP],
    /// Whether all codes of a line are zero.
    zero: [bool; STRIP],
    sums: [[i32; STRIP]; 2],
}

/// Writes blocks of the panels of a strip of `lines` lines from `line` on.
struct StripWriter<'a> {
    ctx: &'a Context<'a>,
    layout: &'a PanelLayout,
    format: BlockFormat,
    matrix: usize,
    line: usize,
    lines: usize,
    blocks: Range<usize>,
    /// Block 0 of each panel, whether or not it is written.
    first: [*mut u8; MOST_PANELS],
    /// Bytes from a panel of a left operand to the next, and of a block.
    stride: usize,
    plain: usize,
    panels: &'a PanelsMut<'a>,
    /// Number of the first panel of the matrix.
    panel: usize,
}

impl StripWriter<'_> {
    /// Where four lines from `line` on, or more of them in chunks, go.
    fn place(&self, line: usize, b: usize) -> BlockPlace {
        let PanelLayout { width, steps, .. } = *self.layout;
        let first = self.first[line / width].wrapping_add(b * self.plain);
        let (step, chunk) = match self.layout.side {
            Side::Left { .. } => ((self.plain - 32) / steps, self.stride),
            Side::Right { .. } => (4 * width, 16),
        };
        let codes = first.wrapping_add(4 * (line % width));
        BlockPlace { codes, ends: codes.wrapping_add(step * steps), step, chunk, steps }
    }

    fn set_general(&self, line: usize) {
        self.panels.set_general(self.layout.panel(self.matrix, self.panel + line / self.layout.width));
    }

    fn part(&self, line: usize, width: usize, b: usize) -> Part {
        let PanelLayout { k, block, .. } = *self.layout;
        Part { matrix: self.matrix, line: self.line + line, width, k: b * block, n: block.min(k - b * block) }
    }

    /// Block `b` of lines that lie side by side, of this strip and of those beside it, `strips` in all, to scratch. Returns
    /// the largest |x| of every line, as bits.
    fn stage(
        &self,
        x: &FloatLines<'_>,
        b: usize,
        strips: usize,
        scratch: &mut Scratch,
    ) -> [[i32; STRIP]; STRIPS_STAGED] {
        let steps = self.layout.steps;
        let part = self.part(0, self.lines, b);
        let between = 4 * steps * STRIP;
        assert!(scratch.staging.len() >= STRIPS_STAGED * between);
        let mut amax = [[0i32; STRIP]; STRIPS_STAGED];
        let lines = (strips * STRIP).min(x.lines - part.line);
        // SAFETY: n rows of so many lines inside the view; staging has room for 4 * steps rows of each strip.
        unsafe {
            let from = x.at(part.matrix, part.line, part.k);
            let (to, amax) = (scratch.staging.as_mut_ptr(), amax.as_mut_ptr().cast());
            (self.ctx.kernels.stage_strips)(from, x.k_stride, part.n, lines, to, between, amax);
        }
        for staged in scratch.staging.chunks_exact_mut(between).take(strips) {
            staged[part.n * STRIP..].fill(0.0);
        }
        amax
    }

    /// Sums of block `b` of this strip, staged as number `staged` of several, to `sums` [blocks, lines].
    fn sum_staged(&self, b: usize, staged: usize, scratch: &Scratch, sums: SharedMut<'_, f32>) {
        let n = self.part(0, self.lines, b).n;
        let rows = scratch.staging[staged * 4 * self.layout.steps * STRIP..].as_chunks::<STRIP>().0;
        // SAFETY: a strip's block belongs to one task.
        sum_block(rows.iter().take(n), unsafe { sums.part(b * self.layout.lines + self.line, self.lines) });
    }

    /// Block `b` of lines that lie side by side, staged as number `staged` of several strips.
    fn strip_of_floats(
        &mut self,
        x: &FloatLines<'_>,
        mode: RoundingMode,
        b: usize,
        staged: usize,
        amax: &[i32; STRIP],
        scratch: &mut Scratch,
    ) {
        let PanelLayout { steps, width, .. } = *self.layout;
        let coding = PanelCoding::new(self.format, self.layout.offset(), self.layout.correction());
        let kernels = self.ctx.kernels;
        let encode = kernels.encode_strip[mode.rounding as usize];
        let lanes = kernels.columns / 2;
        let staging = &scratch.staging[staged * 4 * steps * STRIP..][..4 * steps * STRIP];
        let mut skipped = 0;
        if mode.is_stochastic() {
            let part = self.part(0, self.lines, b);
            if x.has_plane() {
                plane_strip(x, part, &mut scratch.random);
            } else if let Some(image) = &x.image {
                pixel_strip(image, part, &scratch.pixels, &mut scratch.random);
            } else if x.by_line {
                skipped = random_columns(kernels, x, part, mode.seed, &mut scratch.random);
            } else {
                random_strip(kernels, x, part, mode.seed, &mut scratch.random);
            }
        }
        let random = &scratch.random[skipped * STRIP..];
        assert!(random.len() >= staging.len());
        let places: [BlockPlace; STRIP / 8] = std::array::from_fn(|v| self.place((v * lanes).min(STRIP - lanes), b));
        // Panels beyond the last line are written where they are kept.
        let written = if self.panels.any_general.is_some() { self.lines.next_multiple_of(width) } else { STRIP };
        let places = &places[..written.div_ceil(lanes)];
        // SAFETY: the assertion covers all that is read; the places lie inside the strip's panels.
        let general = unsafe { encode(staging.as_ptr(), random.as_ptr(), amax.as_ptr(), &coding, places) };
        if general != 0 {
            for v in (0..STRIP / lanes).filter(|v| general >> v & 1 == 1) {
                for line in (v * lanes..(v + 1) * lanes).step_by(width.min(lanes)) {
                    self.set_general(line);
                }
            }
        }
    }

    /// Lines that are contiguous, or made so.
    fn rows_of_floats(&mut self, x: &FloatLines<'_>, mode: RoundingMode, scratch: &mut Scratch) {
        let PanelLayout { block, width, .. } = *self.layout;
        let blocks = self.blocks.end;
        let coding = PanelCoding::new(self.format, self.layout.offset(), self.layout.correction());
        // Read where they lie; the rest goes through scratch.
        if x.k_stride == 1 && (x.by_line || x.has_plane() || !mode.is_stochastic()) {
            // Four lines at a time, for as long as what is written of a panel stays in the first-level cache: more lines at
            // a distance of a power of two would push each other out.
            let run = (RUN / block).max(1);
            for panel in (0..self.lines).step_by(width) {
                for from in (self.blocks.start..blocks).step_by(run) {
                    // A right panel is written whole: its last columns meet every row.
                    let to = (from + run).min(blocks);
                    for line in (panel..panel + width).step_by(4) {
                        let present = self.lines.saturating_sub(line).min(4);
                        let mut random = [scratch.random.as_ptr(); 4];
                        let k = from * block;
                        if let Some(plane) =
                            x.plane_at(self.matrix, self.line + line, k).filter(|_| mode.is_stochastic())
                        {
                            for (i, random) in random.iter_mut().enumerate().take(present) {
                                *random = plane.wrapping_offset(i as isize * x.line_stride);
                            }
                        } else if mode.is_stochastic() && present > 0 {
                            let part = Part { n: (to * block).min(x.k) - k, ..self.part(line, present, from) };
                            let groups = random_rows(self.ctx.kernels, x, part, mode.seed, &mut scratch.random);
                            for (i, random) in random.iter_mut().enumerate().take(present) {
                                *random = scratch.random[i * 8 * groups + k % 8..].as_ptr();
                            }
                        }
                        for b in from..to {
                            let part = self.part(line, present, b);
                            let mut lines = [scratch.zeros.as_ptr(); 4];
                            for (i, at) in lines.iter_mut().enumerate().take(present) {
                                *at = x.at(part.matrix, part.line + i, part.k);
                            }
                            let random = random.map(|random| random.wrapping_add(part.k - k));
                            self.encode_rows(&coding, mode, &lines, &random, line, b);
                        }
                    }
                }
            }
            return;
        }
        // Random bits across the lines come for a whole strip.
        let set = if mode.is_stochastic() && !x.by_line && !x.has_plane() { STRIP } else { width };
        for from in (0..self.lines).step_by(set) {
            for b in self.blocks.clone() {
                let part = self.part(from, set.min(self.lines - from), b);
                let loaded = load_lines(self.ctx.kernels, x, part, mode, scratch);
                for l in (0..part.width.next_multiple_of(width)).step_by(4) {
                    let present = part.width.saturating_sub(l).min(4);
                    let mut lines = [scratch.zeros.as_ptr(); 4];
                    let mut random = [scratch.random.as_ptr(); 4];
                    lines[..present].copy_from_slice(&loaded.x[l..l + present]);
                    random[..present].copy_from_slice(&loaded.random[l..l + present]);
                    self.encode_rows(&coding, mode, &lines, &random, from + l, b);
                }
            }
        }
    }

    /// Block `b` of four lines from `line` of the strip on, whose elements and random bits are readable.
    #[inline]
    fn encode_rows(
        &mut self,
        coding: &PanelCoding,
        mode: RoundingMode,
        lines: &[*const f32; 4],
        random: &[*const u16; 4],
        line: usize,
        b: usize,
    ) {
        let n = self.part(0, 0, b).n;
        let place = self.place(line, b);
        let encode = self.ctx.kernels.encode_rows[mode.rounding as usize];
        // SAFETY: the callers made n elements and their random bits readable; the place lies inside the strip's panels.
        let general = unsafe { encode(lines, n, random, coding, &place) };
        if general {
            self.set_general(line);
        }
    }

    /// Lines of codes that `read` puts into scratch.
    fn rows_of_codes(
        &mut self,
        scratch: &mut Scratch,
        mut read: impl FnMut(Part, usize, usize, &mut Scratch, &mut BlockEnds) -> Result<()>,
    ) -> Result<()> {
        let steps = self.layout.steps;
        // Beyond the last code of a short block or a narrow strip there are zero codes.
        let stride = steps * 4 + ROW_PADDING;
        for b in self.blocks.clone() {
            let part = self.part(0, self.lines, b);
            let mut ends = BlockEnds { c: [0; STRIP], zero: [true; STRIP], sums: [[0; STRIP]; 2] };
            read(part, b, stride, scratch, &mut ends)?;
            if part.width < STRIP || part.n < steps * 4 {
                for (l, row) in scratch.codes.chunks_exact_mut(stride).take(STRIP).enumerate() {
                    row[if l < part.width { part.n } else { 0 }..steps * 4].fill(0);
                }
            }
            self.write(b, &ends, &scratch.codes, stride);
        }
        Ok(())
    }

    /// Distributes a block's codes and the lines' ends to the panels of the strip.
    fn write(&mut self, b: usize, ends: &BlockEnds, codes: &[i8], stride: usize) {
        let PanelLayout { width, steps, .. } = *self.layout;
        let block_bytes = self.plain;
        let offset = self.layout.offset();
        for p in 0..STRIP / width {
            let first = self.first[p].wrapping_add(b * block_bytes);
            // SAFETY: a block of a panel of this strip, which belongs to one task.
            let out = unsafe { std::slice::from_raw_parts_mut(first, block_bytes) };
            for i in 0..width {
                let l = p * width + i;
                let line = &codes[l * stride..][..4 * steps];
                // A block of zeros adds nothing under any exponent.
                let zero = ends.zero[l] && ends.c[l] != NAN_EXPONENT;
                let scale = if zero { 0 } else { i32::from(ends.c[l]) - EXPONENT_OFFSET };
                if !FAST_SCALES.contains(&scale) {
                    self.set_general(l);
                }
                let rider = scale << 23;
                match self.layout.side {
                    Side::Left { correction, .. } => {
                        let tail = block_bytes - 32 + 4 * i;
                        for (t, q) in line.chunks_exact(4).enumerate() {
                            if correction == Correction::Wide {
                                let at = 32 * t + 8 * i;
                                for (out, j) in out[at..at + 8].chunks_exact_mut(2).zip([0, 2, 1, 3]) {
                                    out.copy_from_slice(&i16::from(q[j]).to_le_bytes());
                                }
                            } else {
                                let at = 4 * (PANEL_ROWS * t + i);
                                out[at..at + 4].iter_mut().zip(q).for_each(|(out, &q)| *out = q as u8);
                            }
                        }
                        let [low, high] = [ends.sums[0][l], ends.sums[1][l]].map(|s| (-offset).wrapping_mul(s));
                        let word = match correction {
                            Correction::Total | Correction::Wide => rider.wrapping_add(low).wrapping_add(high),
                            Correction::Halves => (low & 0xFFFF) | (high << 16),
                        };
                        out[tail..tail + 4].copy_from_slice(&word.to_le_bytes());
                        out[tail + 16..tail + 20].copy_from_slice(&rider.to_le_bytes());
                    }
                    Side::Right { .. } => {
                        for (t, q) in line.chunks_exact(4).enumerate() {
                            let at = 4 * (width * t + i);
                            out[at..at + 4]
                                .iter_mut()
                                .zip(q)
                                .for_each(|(out, &q)| *out = (i32::from(q) + offset) as u8);
                        }
                        let at = 4 * (width * steps + i);
                        out[at..at + 4].copy_from_slice(&RIDER.wrapping_add(rider).to_le_bytes());
                    }
                }
            }
        }
    }
}

/// Whether a strip of f32 is encoded side by side: its lines are neighbours in memory.
fn takes_strips(x: &FloatLines<'_>) -> bool {
    x.line_stride == 1 && x.k_stride != 1
}

#[allow(clippy::too_many_arguments, reason = "a block, and where it goes")]
fn rows_of_planes(
    planes: &PlaneLines<'_>,
    format: BlockFormat,
    part: Part,
    b: usize,
    layout: &PanelLayout,
    stride: usize,
    scratch: &mut Scratch,
    ends: &mut BlockEnds,
) -> Result<()> {
    let (bits, blocks, block) = (format.bits(), layout.blocks, layout.block);
    for l in 0..part.width {
        let row = part.matrix * planes.lines + part.line + l;
        let from = row * planes.row + b * packed_bytes(block, bits);
        let bytes = &planes.mantissas[from..from + packed_bytes(part.n, bits)];
        let codes = &mut scratch.codes[l * stride..l * stride + part.n];
        ends.c[l] = planes.exponents[row * blocks + b];
        unpack_block(bytes, bits, ends.c[l], codes)
            .map_err(|(expected, found)| Error::code(expected, format!("{found} in block {b} of row {row}")))?;
        end_of_codes(codes, l, ends);
    }
    Ok(())
}

fn rows_of_codes(codes: &Codes, part: Part, b: usize, stride: usize, scratch: &mut Scratch, ends: &mut BlockEnds) {
    for l in 0..part.width {
        let row = part.matrix * codes.lines + part.line + l;
        let from = &codes.codes[row * codes.k + part.k..][..part.n];
        let out = &mut scratch.codes[l * stride..l * stride + part.n];
        out.iter_mut().zip(from).for_each(|(out, &q)| *out = q as i8);
        ends.c[l] = codes.exponents[row * codes.blocks() + b];
        end_of_codes(out, l, ends);
    }
}

fn end_of_codes(codes: &[i8], l: usize, ends: &mut BlockEnds) {
    ends.zero[l] = codes.iter().all(|&q| q == 0);
    for (j, &q) in codes.iter().enumerate() {
        ends.sums[j / 2 % 2][l] += i32::from(q);
    }
}
