//! Operands in the kernels' layout: panels of 4 rows (left) or two registers of columns (right), encoded straight from
//! f32, or laid out from planes or codes. `crate::arch::generic::product` draws the bytes.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint panels")]

use super::blocks::{Part, RoundingMode, Scratch, load_lines, random_strip};
use super::codes::{Codes, unpack_block};
use super::{Context, per_worker};
use crate::arch::generic::encode::{ROW_PADDING, STRIP, Scaling};
use crate::arch::generic::product::{Correction, PANEL_ROWS, RIDER, a_block_bytes, b_block_bytes};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, EXPONENT_OFFSET, NAN_EXPONENT};
use crate::mem::{AlignedBytes, SharedMut};
use crate::pack::packed_bytes;
use crate::parallel::for_each_task;
use crate::shape::FloatLines;
use std::sync::{Mutex, PoisonError};

/// Scale exponents whose every pairwise sum lies in −149…104, where the exponent can ride in an accumulator.
const FAST_SCALES: std::ops::RangeInclusive<i32> = -74..=52;

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
}

/// Which operand, and what the other one makes it carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Rows of C. `offset` is what the right operand's codes were raised by.
    Left { correction: Correction, offset: i32 },
    /// Columns of C, raised by `offset`.
    Right { offset: i32 },
}

/// Sizes of the panels of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PanelLayout {
    pub(crate) matrices: usize,
    pub(crate) lines: usize,
    pub(crate) k: usize,
    pub(crate) block: usize,
    /// Lines of a panel.
    pub(crate) width: usize,
    /// Four-element steps of a block.
    pub(crate) steps: usize,
    pub(crate) blocks: usize,
    /// Panels of a matrix.
    pub(crate) panels: usize,
    pub(crate) block_bytes: usize,
    /// What codes were raised by (right operands).
    pub(crate) offset: i32,
    /// One matrix stands for all.
    pub(crate) shared: bool,
}

impl PanelLayout {
    /// Panels of 4 lines (left), or of `width` lines raised by `offset` (right).
    pub(crate) fn new(source: &Source<'_>, block: usize, width: usize, offset: Option<i32>) -> Self {
        let left = offset.is_none();
        let (lines, k) = (source.lines(), source.k());
        let steps = block.div_ceil(4);
        let block_bytes = if left { a_block_bytes(steps) } else { b_block_bytes(steps, width) };
        let (blocks, panels) = (k.div_ceil(block), lines.div_ceil(width));
        let matrices = source.matrices();
        let offset = offset.unwrap_or(0);
        Self { matrices, lines, k, block, width, steps, blocks, panels, block_bytes, offset, shared: false }
    }
    pub(crate) fn panel_bytes(&self) -> usize {
        self.blocks * self.block_bytes
    }
    pub(crate) fn bytes(&self) -> usize {
        self.matrices * self.panels * self.panel_bytes()
    }
    fn strips(&self) -> usize {
        self.lines.div_ceil(STRIP)
    }
}

/// An operand in panels.
#[derive(Debug, Default)]
pub(crate) struct Panels {
    pub(crate) bytes: AlignedBytes,
    /// Per panel: 1 if a block is a NaN block or its exponent lies outside the fast range.
    pub(crate) general: Vec<u8>,
}

/// Lays out both operands of a product, or one, in one pass over all strips.
pub(crate) fn fill(
    ctx: &Context<'_>,
    jobs: &mut [(&Source<'_>, BlockFormat, PanelLayout, Side, &mut Panels)],
    scratch: &mut Vec<Mutex<Scratch>>,
) -> Result<()> {
    if scratch.len() < ctx.threads.max(1) {
        *scratch = per_worker(ctx, Scratch::default);
    }
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let mut tasks = Vec::with_capacity(jobs.len());
    let (mut first, mut elements) = (0, 0);
    for (source, format, layout, side, panels) in jobs.iter_mut() {
        let bytes = panels.bytes.reserve(layout.bytes());
        panels.general.clear();
        panels.general.resize(layout.matrices * layout.panels, 0);
        // SAFETY: reserved just now, and borrowed mutably until the end of this function.
        let bytes = unsafe { SharedMut::from_raw(bytes.as_ptr(), layout.bytes()) };
        tasks.push((first, *source, *format, *layout, *side, bytes, SharedMut::new(&mut panels.general)));
        first += layout.matrices * layout.strips();
        elements += layout.matrices * layout.lines * layout.k;
    }
    for_each_task(ctx.team, ctx.workers(elements), first, &|worker, task| {
        let (first, source, format, layout, side, bytes, general) =
            tasks.iter().rfind(|t| t.0 <= task).expect("task 0 belongs to the first job");
        let strip = task - first;
        let (matrix, strip) = (strip / layout.strips(), strip % layout.strips());
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        scratch.reserve(layout.block);
        let panels = STRIP / layout.width;
        let at = matrix * layout.panels + strip * panels;
        let panels = panels.min(layout.panels - strip * panels);
        // SAFETY: every strip's panels belong to one task.
        let (bytes, general) =
            unsafe { (bytes.part(at * layout.panel_bytes(), panels * layout.panel_bytes()), general.part(at, panels)) };
        let mut writer = StripWriter { layout, side: *side, bytes, general };
        if let Err(error) = writer.fill(ctx, source, *format, matrix, strip, &mut scratch) {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    failure.map_or(Ok(()), Err)
}

/// Exponent bytes and code sums of the lines of a strip's block.
struct BlockEnds {
    c: [u8; STRIP],
    /// Whether all codes of a line are zero, if that is known.
    zero: [bool; STRIP],
    sums: [[i32; STRIP]; 2],
}

struct StripWriter<'a> {
    layout: &'a PanelLayout,
    side: Side,
    bytes: &'a mut [u8],
    general: &'a mut [u8],
}

impl StripWriter<'_> {
    fn fill(
        &mut self,
        ctx: &Context<'_>,
        source: &Source<'_>,
        format: BlockFormat,
        matrix: usize,
        strip: usize,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let PanelLayout { lines, k, block, steps, blocks, .. } = *self.layout;
        let line = strip * STRIP;
        let width = STRIP.min(lines - line);
        // Beyond the last code of a short block or a narrow strip there are zero codes.
        let stride = steps * 4 + ROW_PADDING;
        for b in 0..blocks {
            let n = block.min(k - b * block);
            let part = Part { matrix, line, width, k: b * block, n };
            let mut ends = BlockEnds { c: [0; STRIP], zero: [true; STRIP], sums: [[0; STRIP]; 2] };
            match source {
                Source::Floats(x, mode) if takes_strips(x, *mode, width) => {
                    strip_of_floats(ctx, x, format, *mode, part, steps, scratch, &mut ends);
                    self.write(b, &ends, |t, l| scratch.words[t * STRIP + l]);
                    continue;
                }
                Source::Floats(x, mode) => rows_of_floats(ctx, x, format, *mode, part, stride, scratch, &mut ends),
                Source::Planes(p) => rows_of_planes(p, format, part, b, blocks, block, stride, scratch, &mut ends)?,
                Source::Codes(codes) => rows_of_codes(codes, part, b, stride, scratch, &mut ends),
            }
            if width < STRIP || n < steps * 4 {
                for (l, row) in scratch.codes.chunks_exact_mut(stride).take(STRIP).enumerate() {
                    row[if l < width { n } else { 0 }..steps * 4].fill(0);
                }
            }
            let codes = &scratch.codes;
            self.write(b, &ends, |t, l| {
                let at = l * stride + 4 * t;
                let bytes: &[i8; 4] = codes[at..at + 4].try_into().expect("four bytes");
                i32::from_le_bytes(bytes.map(|x| x as u8))
            });
        }
        Ok(())
    }

    /// Distributes a block's words `word(step, line)` and the lines' ends to the panels of the strip.
    #[inline(always)]
    fn write(&mut self, b: usize, ends: &BlockEnds, word: impl Fn(usize, usize) -> i32) {
        let PanelLayout { width, steps, block_bytes, .. } = *self.layout;
        let panel_bytes = self.layout.panel_bytes();
        for (p, general) in self.general.iter_mut().enumerate() {
            let out = &mut self.bytes[p * panel_bytes + b * block_bytes..][..block_bytes];
            let lines = p * width..(p + 1) * width;
            let (words, _) = out.as_chunks_mut::<4>();
            let (codes, tail) = words.split_at_mut(steps * width);
            match self.side {
                Side::Left { .. } => {
                    for (t, step) in codes.chunks_exact_mut(PANEL_ROWS).enumerate() {
                        for (out, l) in step.iter_mut().zip(lines.clone()) {
                            *out = word(t, l).to_le_bytes();
                        }
                    }
                }
                Side::Right { offset } => {
                    // Raising each byte by the offset, in unsigned bytes: x + 128, then − (128 − offset), which never borrows.
                    let lower = (128 - offset) * 0x0101_0101;
                    for (t, step) in codes.chunks_exact_mut(width).enumerate() {
                        for (out, l) in step.iter_mut().zip(lines.clone()) {
                            *out = (word(t, l) ^ 0x8080_8080_u32 as i32).wrapping_sub(lower).to_le_bytes();
                        }
                    }
                }
            }
            for (i, l) in lines.enumerate() {
                // A block of zeros adds nothing under any exponent.
                let scale =
                    if ends.zero[l] && ends.c[l] != NAN_EXPONENT { 0 } else { i32::from(ends.c[l]) - EXPONENT_OFFSET };
                if !FAST_SCALES.contains(&scale) {
                    *general = 1;
                }
                let rider = scale << 23;
                match self.side {
                    Side::Left { correction, offset } => {
                        let [low, high] = [ends.sums[0][l], ends.sums[1][l]].map(|s| (-offset).wrapping_mul(s));
                        let word = match correction {
                            Correction::Total => rider.wrapping_add(low).wrapping_add(high),
                            Correction::Halves => (low & 0xFFFF) | (high << 16),
                        };
                        tail[i] = word.to_le_bytes();
                        tail[PANEL_ROWS + i] = rider.to_le_bytes();
                    }
                    Side::Right { .. } => tail[i] = RIDER.wrapping_add(rider).to_le_bytes(),
                }
            }
        }
    }
}

/// Whether a strip of f32 is encoded side by side: its lines are neighbours in memory and so are their random bits.
fn takes_strips(x: &FloatLines<'_>, mode: RoundingMode, width: usize) -> bool {
    x.line_stride == 1 && x.k_stride != 1 && width == STRIP && !(mode.is_stochastic() && x.by_line)
}

#[allow(clippy::too_many_arguments, reason = "a block, and where it goes")]
fn strip_of_floats(
    ctx: &Context<'_>,
    x: &FloatLines<'_>,
    format: BlockFormat,
    mode: RoundingMode,
    part: Part,
    steps: usize,
    scratch: &mut Scratch,
    ends: &mut BlockEnds,
) {
    let mut amax = [0i32; STRIP];
    let n = part.n;
    assert!(scratch.staging.len() >= 4 * steps * STRIP && scratch.words.len() >= steps * STRIP);
    assert!(scratch.random.len() >= 4 * steps * STRIP);
    // SAFETY: n rows of a full strip inside the view; staging has room for 4 * steps rows.
    unsafe {
        let from = x.at(part.matrix, part.line, part.k);
        (ctx.kernels.stage_strip)(from, x.k_stride, n, scratch.staging.as_mut_ptr(), amax.as_mut_ptr());
    }
    scratch.staging[n * STRIP..4 * steps * STRIP].fill(0.0);
    if mode.is_stochastic() {
        random_strip(ctx.kernels, x, part, mode.seed, &mut scratch.random);
    }
    let mut inverse = [0.0f32; STRIP];
    for l in 0..STRIP {
        ends.c[l] = format.exponent_code(amax[l] as u32);
        ends.zero[l] = amax[l] == 0;
        if ends.c[l] != NAN_EXPONENT {
            inverse[l] = Scaling::new(&format, ends.c[l]).inverse;
        }
    }
    let mut sums = [0i32; 2 * STRIP];
    let limit = format.max_code() as f32;
    let round = ctx.kernels.round_strip[mode.rounding as usize];
    // SAFETY: the asserts above cover all buffers.
    unsafe {
        let (staging, random) = (scratch.staging.as_ptr(), scratch.random.as_ptr());
        round(staging, steps, inverse.as_ptr(), limit, random, scratch.words.as_mut_ptr(), sums.as_mut_ptr());
    }
    for l in 0..STRIP {
        if ends.c[l] == NAN_EXPONENT {
            (0..steps).for_each(|t| scratch.words[t * STRIP + l] = 0);
        } else {
            (ends.sums[0][l], ends.sums[1][l]) = (sums[l], sums[STRIP + l]);
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "a block, and where it goes")]
fn rows_of_floats(
    ctx: &Context<'_>,
    x: &FloatLines<'_>,
    format: BlockFormat,
    mode: RoundingMode,
    part: Part,
    stride: usize,
    scratch: &mut Scratch,
    ends: &mut BlockEnds,
) {
    let from = load_lines(ctx.kernels, x, part, mode, scratch);
    let round = ctx.kernels.round_row_i8[mode.rounding as usize];
    for l in 0..part.width {
        // SAFETY: load_lines made n elements readable.
        let amax = unsafe { (ctx.kernels.amax_row)(from.x[l], part.n) };
        ends.c[l] = format.exponent_code(amax);
        ends.zero[l] = amax == 0;
        let out = &mut scratch.codes[l * stride..];
        if ends.c[l] == NAN_EXPONENT {
            out[..part.n].fill(0);
            continue;
        }
        assert!(out.len() >= part.n + ROW_PADDING);
        // SAFETY: n elements are readable with their random bits; the line of codes has room for n and the padding,
        // whose end only the next line's codes overwrite.
        let sums =
            unsafe { round(from.x[l], part.n, Scaling::new(&format, ends.c[l]), from.random[l], out.as_mut_ptr()) };
        (ends.sums[0][l], ends.sums[1][l]) = (sums[0], sums[1]);
    }
}

#[allow(clippy::too_many_arguments, reason = "a block, and where it goes")]
fn rows_of_planes(
    planes: &PlaneLines<'_>,
    format: BlockFormat,
    part: Part,
    b: usize,
    blocks: usize,
    block: usize,
    stride: usize,
    scratch: &mut Scratch,
    ends: &mut BlockEnds,
) -> Result<()> {
    let bits = format.bits();
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
