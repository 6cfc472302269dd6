//! Brings blocks of a strip of lines into reach of the row kernels: every line contiguous, its random bits beside it.
#![allow(unsafe_code, reason = "strided reads of the caller's memory, and calls of kernels")]

use crate::arch::generic::encode::{ROW_PADDING, STRIP, STRIPS_STAGED, Scaling};
use crate::arch::generic::philox::{Counters, RANDOM_PADDING};
use crate::arch::kernels::Kernels;
use crate::encode::panels::Panels;
use crate::format::{BlockFormat, EXPONENT_OFFSET, NAN_EXPONENT, Rounding, power_of_two};
use crate::mem::AlignedBytes;
use crate::rng::Seed;
use crate::shape::{FloatLines, ImageRows};
use std::ops::Range;

/// Rounding of one operand: which, and (if stochastic) from which bits.
#[derive(Clone, Copy, Debug)]
pub struct RoundingMode {
    /// Rounding.
    pub rounding: Rounding,
    /// Source of the random bits; unused by the others.
    pub seed: Seed,
}

impl RoundingMode {
    /// To nearest, ties to even.
    pub const NEAREST_EVEN: Self = Self { rounding: Rounding::NearestEven, seed: Seed { seed: 0, stream: 0 } };

    pub(crate) fn is_stochastic(self) -> bool {
        self.rounding == Rounding::Stochastic
    }
}

impl Scaling {
    /// Scaling under exponent byte `c`, which is not the NaN block's.
    pub(crate) fn new(format: &BlockFormat, c: u8) -> Self {
        debug_assert_ne!(c, NAN_EXPONENT);
        Self { inverse: power_of_two(EXPONENT_OFFSET - i32::from(c)), limit: format.max_code() as f32 }
    }
}

/// Elements of four lines that are encoded in one go.
pub(crate) const RUN: usize = 1024;

/// Part of a strip: `width` ≤ 32 lines from `line` on, `n` elements of each from `k` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) matrix: usize,
    pub(crate) line: usize,
    pub(crate) width: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
}

/// Up to eight A panels, which follow one another.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) panels: Range<usize>,
    /// Aligned: the largest sum of a line's codes, each taken positive.
    pub(crate) sum: Option<u32>,
    /// Whether they are laid out for a matrix unit, block by block; None: they can't be.
    pub(crate) laid_out: Option<bool>,
}

/// Panels in the forms that tiles are multiplied from.
#[derive(Debug, Default)]
pub(crate) struct TileBuffers {
    /// A B panel taken out of nibbles.
    pub(crate) panel: AlignedBytes,
    /// What is laid out in the two left ones of the next four: groups of A panels, of the task with this number.
    pub(crate) groups: Vec<Group>,
    pub(crate) groups_of: Option<usize>,
    /// A task's A panels, and a B panel, for a matrix unit: block by block, and aligned.
    pub(crate) unit_left: AlignedBytes,
    pub(crate) unit_right: AlignedBytes,
    pub(crate) aligned_left: AlignedBytes,
    pub(crate) aligned_right: AlignedBytes,
}

impl TileBuffers {
    fn bytes(&self) -> usize {
        let unit = [&self.unit_left, &self.unit_right, &self.aligned_left, &self.aligned_right];
        self.panel.capacity() + unit.iter().map(|buffer| buffer.capacity()).sum::<usize>()
    }
}

/// Buffers of one worker, reused from block to block.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub(crate) staging: Vec<f32>,
    pub(crate) random: Vec<u16>,
    transposed: Vec<u16>,
    /// Of a row of an image's pixels.
    pub(crate) bits: Vec<u16>,
    pub(crate) codes: Vec<i8>,
    pub(crate) wide: Vec<i16>,
    pub(crate) tiles: TileBuffers,
    /// Strips whose panels take another form in the end.
    pub(crate) strips: AlignedBytes,
    /// Which of a convolution's left panels need the general product.
    pub(crate) general: Vec<bool>,
    /// Patches of an image, and their panels.
    pub(crate) patches: Vec<f32>,
    /// Random bits of some pixels.
    pub(crate) pixels: Vec<u16>,
    /// A row of pixels, channel by channel.
    pub(crate) row: Vec<f32>,
    pub(crate) patch_panels: Panels,
    /// A small matrix of either operand.
    pub(crate) small: [Panels; 2],
    /// Which blocks of a strip of planes are laid out code by code.
    pub(crate) left: Vec<bool>,
    /// At least as many zeros as a block has elements.
    pub(crate) zeros: Vec<f32>,
}

impl Scratch {
    /// Makes room for blocks of `block` elements.
    pub(crate) fn reserve(&mut self, block: usize) {
        let padded = block.next_multiple_of(4) + ROW_PADDING;
        let grow = |v: &mut Vec<f32>, n: usize| v.resize(v.len().max(n), 0.0);
        grow(&mut self.staging, padded * STRIP * STRIPS_STAGED);
        // Blocks need not start at a multiple of eight columns: up to two more groups.
        let random = ((padded + 16) * STRIP).max((RUN + 16) * 4) + RANDOM_PADDING;
        self.random.resize(self.random.len().max(random), 0);
        self.transposed.resize(self.transposed.len().max(padded * STRIP + ROW_PADDING), 0);
        self.codes.resize(self.codes.len().max(padded * STRIP), 0);
        self.wide.resize(self.wide.len().max(padded), 0);
        grow(&mut self.zeros, padded);
    }

    pub(crate) fn bytes(&self) -> usize {
        4 * (self.staging.len() + self.zeros.len())
            + 2 * (self.random.len() + self.transposed.len() + self.wide.len() + self.bits.len() + self.pixels.len())
            + self.codes.len()
            + self.tiles.bytes()
            + self.strips.capacity()
            + 4 * (self.patches.len() + self.row.len())
            + self.patch_panels.bytes.capacity()
            + self.small.iter().map(|panels| panels.bytes.capacity()).sum::<usize>()
    }
}

/// The lines of a part, each contiguous, with ROW_PADDING readable random elements behind each line's own.
pub(crate) struct LineBlocks {
    pub(crate) x: [*const f32; STRIP],
    pub(crate) random: [*const u16; STRIP],
}

/// Reads a part of `lines` through `scratch`.
pub(crate) fn load_lines(
    kernels: &Kernels,
    lines: &FloatLines<'_>,
    part: Part,
    mode: RoundingMode,
    scratch: &mut Scratch,
) -> LineBlocks {
    let Part { matrix, line, width, k, n } = part;
    debug_assert!(width <= STRIP && line + width <= lines.lines && k + n <= lines.k);
    let stride = n.next_multiple_of(4) + ROW_PADDING;
    let mut blocks = LineBlocks { x: [std::ptr::null(); STRIP], random: [std::ptr::null(); STRIP] };
    if lines.k_stride == 1 {
        (0..width).for_each(|l| blocks.x[l] = lines.at(matrix, line + l, k));
    } else {
        for j in 0..n {
            for l in 0..width {
                // SAFETY: inside the view.
                scratch.staging[l * stride + j] = unsafe { *lines.at(matrix, line + l, k + j) };
            }
        }
        (0..width).for_each(|l| blocks.x[l] = scratch.staging[l * stride..].as_ptr());
    }
    if mode.is_stochastic() {
        if lines.has_plane() {
            for j in 0..n {
                for l in 0..width {
                    if let Some(bits) = lines.plane_at(matrix, line + l, k + j) {
                        // SAFETY: inside the plane, which has an element for each of the view's.
                        scratch.transposed[l * stride + j] = unsafe { *bits };
                    }
                }
            }
            (0..width).for_each(|l| blocks.random[l] = scratch.transposed[l * stride..].as_ptr());
        } else if lines.by_line {
            let groups = random_rows(kernels, lines, part, mode.seed, &mut scratch.random);
            (0..width).for_each(|l| blocks.random[l] = scratch.random[l * 8 * groups + k % 8..].as_ptr());
        } else {
            random_strip(kernels, lines, part, mode.seed, &mut scratch.random);
            for j in 0..n {
                for l in 0..width {
                    scratch.transposed[l * stride + j] = scratch.random[j * STRIP + l];
                }
            }
            (0..width).for_each(|l| blocks.random[l] = scratch.transposed[l * stride..].as_ptr());
        }
    }
    blocks
}

/// Random bits of a part whose lines are rows: returns how many groups of eight columns each row takes up in `out`.
pub(crate) fn random_rows(kernels: &Kernels, lines: &FloatLines<'_>, part: Part, seed: Seed, out: &mut [u16]) -> usize {
    debug_assert!(lines.by_line);
    let group = part.k / 8;
    let groups = (part.k + part.n).div_ceil(8) - group;
    let row = lines.random_row(part.matrix, part.line, part.k);
    let counters = Counters { row, row_step: 1, rows: part.width, group: group as u32, groups };
    assert!(8 * part.width * groups + RANDOM_PADDING <= out.len());
    // SAFETY: room for the rectangle and its padding.
    unsafe { (kernels.fill_random)(seed, counters, out.as_mut_ptr()) };
    groups
}

/// Pixels whose random bits come together.
pub(crate) const PIXELS: usize = 8;

/// Random bits of [`PIXELS`] pixels of a row from `pixel` on, which is a multiple of that: `out` [pixels, samples, channels].
pub(crate) fn random_pixels(
    kernels: &Kernels,
    image: &ImageRows,
    pixel: usize,
    samples: Range<usize>,
    seed: Seed,
    out: &mut Vec<u16>,
) {
    let &ImageRows { channels, rows, width } = image;
    debug_assert!(width.is_multiple_of(PIXELS) && pixel.is_multiple_of(PIXELS));
    let counters = Counters {
        row: (samples.start * channels * rows + pixel / width) as u32,
        row_step: rows as u32,
        rows: samples.len() * channels,
        group: (pixel % width / PIXELS) as u32,
        groups: 1,
    };
    out.resize(out.len().max(PIXELS * counters.rows), 0);
    // SAFETY: room for the pixels' channels.
    unsafe { (kernels.fill_random_columns)(seed, counters, PIXELS, out.as_mut_ptr()) };
}

/// Random bits of a strip of an image's lines, of those that [`random_pixels`] gave: `out` as that of [`random_strip`].
pub(crate) fn pixel_strip(image: &ImageRows, part: Part, bits: &[u16], out: &mut [u16]) {
    let run = image.channels.min(STRIP);
    for at in (0..STRIP).step_by(run) {
        let (pixel, channel) = ((part.line + at) / image.channels % PIXELS, (part.line + at) % image.channels);
        let bits = bits[pixel * part.n * image.channels + channel..].chunks(image.channels);
        for (out, bits) in out.chunks_exact_mut(STRIP).zip(bits).take(part.n) {
            copy(&mut out[at..at + run], &bits[..run]);
        }
    }
}

/// Copies a multiple of eight elements: a call of memcpy would take longer than they do.
#[inline]
fn copy(to: &mut [u16], from: &[u16]) {
    to.as_chunks_mut::<8>().0.iter_mut().zip(from.as_chunks::<8>().0).for_each(|(to, from)| *to = *from);
}

/// Random bits of a part whose lines are rows that lie side by side: `out[j * STRIP + l]` for element k + j − `skipped` of
/// line `line` + l. Returns `skipped`.
pub(crate) fn random_columns(
    kernels: &Kernels,
    lines: &FloatLines<'_>,
    part: Part,
    seed: Seed,
    out: &mut [u16],
) -> usize {
    debug_assert!(lines.by_line);
    let (group, skipped) = (part.k / 8, part.k % 8);
    let (row, columns) = (lines.random_row(part.matrix, part.line, part.k), skipped + part.n);
    let counters = Counters { row, row_step: 1, rows: STRIP, group: group as u32, groups: columns.div_ceil(8) };
    assert!(columns * STRIP + RANDOM_PADDING <= out.len());
    // SAFETY: room for the columns.
    unsafe { (kernels.fill_random_columns)(seed, counters, columns, out.as_mut_ptr()) };
    skipped
}

/// Random bits of a part whose lines lie across the rows: `out[j * STRIP + l]` for element k + j of line `line` + l.
pub(crate) fn random_strip(kernels: &Kernels, lines: &FloatLines<'_>, part: Part, seed: Seed, out: &mut [u16]) {
    debug_assert!(!lines.by_line && part.line.is_multiple_of(STRIP));
    let counters = Counters {
        row: lines.random_row(part.matrix, part.line, part.k),
        row_step: lines.row_step as u32,
        rows: part.n,
        group: (part.line / 8) as u32,
        groups: STRIP / 8,
    };
    assert!(part.n * STRIP + RANDOM_PADDING <= out.len());
    // SAFETY: room for the rectangle and its padding.
    unsafe { (kernels.fill_random)(seed, counters, out.as_mut_ptr()) };
}

/// Random bits of a part whose lines lie side by side, from the plane: `out` as that of [`random_strip`].
pub(crate) fn plane_strip(lines: &FloatLines<'_>, part: Part, out: &mut [u16]) {
    debug_assert!(lines.line_stride == 1);
    for (j, out) in out.as_chunks_mut::<STRIP>().0.iter_mut().enumerate().take(part.n) {
        if let Some(bits) = lines.plane_at(part.matrix, part.line, part.k + j) {
            // The strip beside this one comes next.
            prefetch(bits.wrapping_add(STRIP));
            // SAFETY: `width` neighbours inside the plane, which has an element for each of the view's.
            unsafe {
                if part.width == STRIP {
                    *out = bits.cast::<[u16; STRIP]>().read_unaligned();
                } else if part.width == STRIP / 2 {
                    out[..STRIP / 2].copy_from_slice(&bits.cast::<[u16; STRIP / 2]>().read_unaligned());
                } else {
                    out[..part.width].copy_from_slice(std::slice::from_raw_parts(bits, part.width));
                }
            }
        }
    }
}

/// Asks for the cache line at `p`, which need not exist.
#[inline(always)]
fn prefetch(p: *const u16) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of the architecture; a prefetch of any address is harmless.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
