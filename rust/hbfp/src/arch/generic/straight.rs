//! Small matrices straight from f32 into the layout of a matrix unit, and their products: what a batch of them costs is
//! mostly what lies between the steps, so there are but these two.
//!
//! # Layout
//! That of [`super::aligned`], block by block: 32 lines of a block take [`block_bytes`], whose steps are filled up to whole
//! pieces of 16. Blocks of the same lines follow one another.
//!
//! # Ceiling
//! 64 elements take 8 vector operations for the largest magnitude, 8 to scale and round, 6 to pack: 11 cycles on two ports.
//! Lines that are to lie across the registers they were read in take 8 shuffles more.

use super::aligned::{GROUP, PIECE, PIECE_BYTES, ROW_OF, SIDE, line_bytes};
use super::encode::{Limits, PanelCoding, STOCHASTIC, Scales, inverses, load_up_to, round, scales};
use super::matrix_unit::{HALF, MatrixUnit};
use super::product::{PANEL_ROWS, columns};
use crate::arch::simd::Simd;
use std::mem::MaybeUninit;

/// Elements of a piece of a line.
const PIECE_ELEMENTS: usize = 4 * PIECE;
/// Registers of lines side by side whose largest magnitudes are taken at once.
const SWEEP: usize = 4;
/// Elements by which reading is ahead, where matrices follow one another: the hardware follows a run of memory no further
/// than its page.
const AHEAD: usize = 1024;
/// Bits of 1.
const ONE: i32 = 0x3F80_0000;

/// Bytes of a block of 32 lines of `steps` steps.
pub(crate) const fn block_bytes(steps: usize) -> usize {
    line_bytes(1, steps)
}

/// A block of lines in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lines {
    /// The first element.
    pub(crate) x: *const f32,
    /// Elements from a line to the next where lines are contiguous, from a row to the next where they lie side by side.
    pub(crate) stride: isize,
    pub(crate) lines: usize,
    /// Elements of a line, not 0, and pieces that the layout has for them.
    pub(crate) n: usize,
    pub(crate) pieces: usize,
    /// Random bits of the first element, and elements from one line's, or row's, to the next.
    pub(crate) random: *const u16,
    pub(crate) random_stride: usize,
    /// Bytes from 32 lines to the next 32 where they go.
    pub(crate) group_bytes: usize,
}

impl Lines {
    /// Bytes between the places of the first line and of this one's group.
    #[inline(always)]
    fn group(&self, line: usize) -> usize {
        line / SIDE * self.group_bytes
    }
}

/// Encodes a block of lines, as the `LEFT` operand or the right one. They are contiguous, or lie side by side (`ACROSS`).
/// Returns whether a line needs the general product; the block is unspecified then.
///
/// # Safety
/// - every element of `of` is valid for reading, and (if `R` is stochastic) so are its random bits, and of each line or row
///   LANES − 1 further ones;
/// - `to` is valid for writing [`block_bytes`] for every 32 lines.
#[inline(always)]
pub(crate) unsafe fn encode<S: MatrixUnit, const R: u8, const LEFT: bool, const ACROSS: bool>(
    s: S,
    of: &Lines,
    coding: &PanelCoding,
    to: *mut u8,
) -> bool {
    const { assert!(S::LANES == HALF) };
    // SAFETY: the caller's word.
    unsafe {
        match (ACROSS, of.n == PIECE_ELEMENTS * of.pieces, of.lines.is_multiple_of(HALF)) {
            (false, true, _) => rows::<S, R, LEFT, true>(s, of, coding, to),
            (false, false, _) => rows::<S, R, LEFT, false>(s, of, coding, to),
            (true, true, true) => strip::<S, R, LEFT, true>(s, of, coding, to),
            (true, _, _) => strip::<S, R, LEFT, false>(s, of, coding, to),
        }
    }
}

/// Up to LANES elements, of which `left` exist; all of them do where it is known that they are `FULL`.
///
/// # Safety
/// As many are valid for reading.
#[inline(always)]
unsafe fn load<S: Simd, const FULL: bool>(s: S, x: *const f32, left: usize) -> S::V {
    // SAFETY: the caller's word.
    unsafe { if FULL { s.load(x.cast()) } else { load_up_to(s, x, left) } }
}

/// [`encode`] of contiguous lines. `FULL`: they are whole pieces.
///
/// # Safety
/// As for [`encode`].
#[inline(always)]
unsafe fn rows<S: MatrixUnit, const R: u8, const LEFT: bool, const FULL: bool>(
    s: S,
    of: &Lines,
    coding: &PanelCoding,
    to: *mut u8,
) -> bool {
    let Lines { n, pieces, .. } = *of;
    let (magnitude, limits) = (s.splat(i32::MAX), Limits::new(s, coding));
    for first in (0..of.lines).step_by(PANEL_ROWS) {
        // The last line stands for those that are missing: what is made of it is not read.
        let line = |i: usize| (first + i).min(of.lines - 1);
        let x = [0, 1, 2, 3].map(|i| of.x.wrapping_offset(line(i) as isize * of.stride));
        let random = [0, 1, 2, 3].map(|i| of.random.wrapping_add(line(i) * of.random_stride));
        // SAFETY: the caller's word: reads stay inside n, or the random bits' padding.
        unsafe {
            let (to, first) = (to.add(of.group(first)), first % SIDE);
            let mut top = [s.splat(0); PANEL_ROWS];
            for at in (0..n).step_by(S::LANES) {
                for (top, x) in top.iter_mut().zip(x) {
                    s.prefetch(x.wrapping_add(at + AHEAD));
                    *top = s.max_i32(*top, s.and(load::<S, FULL>(s, x.add(at), n - at), magnitude));
                }
            }
            let Scales { scale, general, .. } = scales(s, s.max_of_4(top), coding);
            if general {
                return true;
            }
            let inverse = inverses(s, scale);
            let inverse = [
                s.splat_in_chunks::<0>(inverse),
                s.splat_in_chunks::<1>(inverse),
                s.splat_in_chunks::<2>(inverse),
                s.splat_in_chunks::<3>(inverse),
            ];
            for piece in 0..pieces {
                let to = to.add(PIECE_BYTES * piece);
                let at = PIECE_ELEMENTS * piece;
                if !FULL && at >= n {
                    // What the right operand holds here meets zeros.
                    for l in 0..if LEFT { PANEL_ROWS } else { 0 } {
                        s.store(to.add(PIECE_ELEMENTS * (first + l)).cast(), s.splat(0));
                    }
                    continue;
                }
                // Word w of a line is the step of row w.
                let lines = if FULL || n - at > S::LANES {
                    let mut lines = [s.splat(0); PANEL_ROWS];
                    for (l, line) in lines.iter_mut().enumerate() {
                        let mut q = [s.splat(0); 4];
                        for (j, q) in q.iter_mut().enumerate() {
                            let at = at + S::LANES * j;
                            if FULL || at < n {
                                *q = codes::<S, R, FULL>(
                                    s,
                                    x[l].add(at),
                                    random[l].wrapping_add(at),
                                    n - at,
                                    inverse[l],
                                );
                            }
                        }
                        *line = limits.apply(s, s.pack_words(q));
                    }
                    lines
                } else {
                    // A register of each line: all four are packed at once, and steps 0, 4, 8 and 12 of the unit are theirs.
                    let mut q = [s.splat(0); PANEL_ROWS];
                    for (l, q) in q.iter_mut().enumerate() {
                        *q = codes::<S, R, FULL>(s, x[l].add(at), random[l].wrapping_add(at), n - at, inverse[l]);
                    }
                    let words = limits.apply(s, s.pack_words(q));
                    if !LEFT {
                        // What the other steps hold meets zeros.
                        s.store_chunks(to.add(4 * first), 4 * SIDE * GROUP, words);
                        continue;
                    }
                    let none = s.splat(0);
                    s.transpose_words([words, none, none, none])
                };
                if LEFT {
                    for (l, line) in lines.into_iter().enumerate() {
                        s.store(to.add(PIECE_ELEMENTS * (first + l)).cast(), line);
                    }
                } else {
                    for (j, words) in s.transpose_words(lines).into_iter().enumerate() {
                        s.store_chunks(to.add(4 * SIDE * j + 4 * first), 4 * SIDE * GROUP, words);
                    }
                }
            }
            let rider = s.shl::<23>(scale);
            let end = if LEFT { rider } else { s.add(rider, s.splat(ONE)) };
            s.store_chunk(to.add(PIECE_BYTES * pieces + 4 * first), end);
        }
    }
    false
}

/// Codes of up to LANES elements of a line, of which `left` exist, as words; past the end they are zero: RNE(0) + r < 2^16.
///
/// # Safety
/// As for [`encode`].
#[inline(always)]
unsafe fn codes<S: Simd, const R: u8, const FULL: bool>(
    s: S,
    x: *const f32,
    random: *const u16,
    left: usize,
    inverse: S::V,
) -> S::V {
    // SAFETY: the caller's word.
    unsafe {
        let r = if R == STOCHASTIC { s.load_u16(random) } else { s.splat(0) };
        round::<S, R>(s, s.mul_f32(load::<S, FULL>(s, x, left), inverse), r)
    }
}

/// [`encode`] of lines that lie side by side. `FULL`: they are whole pieces, and fill registers.
///
/// # Safety
/// As for [`encode`].
#[inline(always)]
unsafe fn strip<S: MatrixUnit, const R: u8, const LEFT: bool, const FULL: bool>(
    s: S,
    of: &Lines,
    coding: &PanelCoding,
    to: *mut u8,
) -> bool {
    let Lines { n, pieces, .. } = *of;
    let limits = Limits::new(s, coding);
    for wide in (0..of.lines).step_by(SWEEP * HALF) {
        // The largest magnitudes of many lines, for long runs of memory.
        let registers = (of.lines - wide).div_ceil(HALF).min(SWEEP);
        let mut top = [s.splat(0); SWEEP];
        // SAFETY: the caller's word.
        unsafe {
            match registers {
                SWEEP => top = magnitudes::<S, FULL, SWEEP>(s, of, wide),
                2 => top[..2].copy_from_slice(&magnitudes::<S, FULL, 2>(s, of, wide)),
                _ => {
                    for (v, top) in top.iter_mut().enumerate().take(registers) {
                        [*top] = magnitudes::<S, FULL, 1>(s, of, wide + HALF * v);
                    }
                }
            }
        }
        for (v, top) in top.into_iter().enumerate().take(registers) {
            let first = wide + HALF * v;
            let left = of.lines - first;
            let of = Lines { x: of.x.wrapping_add(first), random: of.random.wrapping_add(first), ..*of };
            // SAFETY: the caller's word: reads stay inside the rows, or the random bits' padding.
            unsafe {
                let (to, first) = (to.add(of.group(first)), first % SIDE);
                let Scales { scale, general, .. } = scales(s, top, coding);
                if general {
                    return true;
                }
                let inverse = inverses(s, scale);
                for piece in 0..pieces {
                    let to = to.add(PIECE_BYTES * piece);
                    for group in 0..GROUP {
                        // The steps of rows 4 · group … of the piece.
                        let mut words = [s.splat(0); GROUP];
                        for (i, word) in words.iter_mut().enumerate() {
                            let step = PIECE * piece + GROUP * i + group;
                            if FULL || 4 * step < n {
                                *word = limits.apply(s, step_across::<S, R, FULL>(s, &of, step, left, inverse));
                                if !LEFT {
                                    s.store(to.add(4 * (SIDE * ROW_OF[GROUP * i + group] + first)).cast(), *word);
                                }
                            }
                        }
                        if LEFT {
                            for (i, words) in s.transpose_words(words).into_iter().enumerate() {
                                let line = first + i;
                                s.store_chunks(to.add(PIECE_ELEMENTS * line + 16 * group), 4 * PIECE_ELEMENTS, words);
                            }
                        }
                    }
                }
                let rider = s.shl::<23>(scale);
                let end = if LEFT { rider } else { s.add(rider, s.splat(ONE)) };
                s.store(to.add(PIECE_BYTES * pieces + 4 * first).cast(), end);
            }
        }
    }
    false
}

/// The largest magnitudes of lines that lie side by side, from `first` on.
///
/// # Safety
/// As for [`encode`]; there are lines in each of N registers.
#[inline(always)]
unsafe fn magnitudes<S: Simd, const FULL: bool, const N: usize>(s: S, of: &Lines, first: usize) -> [S::V; N] {
    let mut top = [s.splat(0); N];
    for k in 0..of.n {
        let row = of.x.wrapping_add(first).wrapping_offset(k as isize * of.stride);
        for (v, top) in top.iter_mut().enumerate() {
            let (x, left) = (row.wrapping_add(HALF * v), of.lines - first - HALF * v);
            s.prefetch(x.wrapping_add(AHEAD));
            // SAFETY: the caller's word: reads stay inside the rows.
            *top = s.max_i32(*top, s.and(unsafe { load::<S, FULL>(s, x, left) }, s.splat(i32::MAX)));
        }
    }
    top
}

/// Codes of a step of lines that lie side by side, of which `left` exist, a word a line.
///
/// # Safety
/// As for [`encode`]; the step exists.
#[inline(always)]
unsafe fn step_across<S: Simd, const R: u8, const FULL: bool>(
    s: S,
    of: &Lines,
    step: usize,
    left: usize,
    inverse: S::V,
) -> S::V {
    let mut q = [s.splat(0); 4];
    for (j, q) in q.iter_mut().enumerate() {
        let k = 4 * step + j;
        if FULL || k < of.n {
            let random = of.random.wrapping_add(k * of.random_stride);
            // SAFETY: the caller's word.
            *q = unsafe { codes::<S, R, FULL>(s, of.x.offset(k as isize * of.stride), random, left, inverse) };
        }
    }
    s.interleave_bytes(q)
}

/// Sizes of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Rows and columns of C.
    pub(crate) lines: [usize; 2],
    /// Blocks of the reduction, not 0, and steps of one.
    pub(crate) blocks: usize,
    pub(crate) steps: usize,
}

#[repr(align(64))]
struct Aligned<T>(T);
type Sums = [[i32; HALF * HALF]; 4];

/// A block of a tile: where its operands lie, and its rows and columns of C.
#[derive(Clone, Copy)]
struct Place {
    tile: [usize; 2],
    block: usize,
    height: usize,
    width: usize,
}

impl Place {
    #[inline(always)]
    fn new(sizes: &Sizes, tile: [usize; 2], block: usize) -> Self {
        let [height, width] = [0, 1].map(|i| SIDE.min(sizes.lines[i] - SIDE * tile[i]));
        Self { tile, block, height, width }
    }
    /// The next block, or tile, or row of tiles.
    #[inline(always)]
    fn next(self, sizes: &Sizes) -> Self {
        let [i, j] = self.tile;
        if self.block + 1 < sizes.blocks {
            Self { block: self.block + 1, ..self }
        } else if SIDE * (j + 1) < sizes.lines[1] {
            Self::new(sizes, [i, j + 1], 0)
        } else {
            Self::new(sizes, [i + 1, 0], 0)
        }
    }
    #[inline(always)]
    fn at(&self, sizes: &Sizes, operand: usize) -> usize {
        (self.tile[operand] * sizes.blocks + self.block) * block_bytes(sizes.steps)
    }
}

/// C = A · Bᵀ of a small matrix, row-major without gaps: each block's product is exact, so that adding it to C is the one
/// rounding of the contract. The unit is a block ahead of the vectors.
///
/// # Safety
/// - `a` and `b` are valid for reading the blocks of their lines, 32 by 32;
/// - `c` is valid for reading and writing the lines of A times those of B, neither of them 0;
/// - the calling thread's unit is configured for pieces of 16 steps.
#[inline(always)]
pub(crate) unsafe fn product<S: MatrixUnit>(s: S, sizes: &Sizes, a: *const u8, b: *const u8, c: *mut f32) {
    let mut sums = MaybeUninit::<Aligned<[Sums; 2]>>::uninit();
    let sums = sums.as_mut_ptr().cast::<i32>();
    let pieces = sizes.steps.div_ceil(PIECE);
    let [rows, columns] = sizes.lines.map(|lines| lines.div_ceil(SIDE));
    let mut ahead = Place::new(sizes, [0, 0], 0);
    let mut behind = ahead;
    let count = rows * columns * sizes.blocks;
    for done in 0..=count {
        // SAFETY: the caller's word; the unit has written sums before they are read.
        unsafe {
            let buffer = |number: usize| sums.add(size_of::<Sums>() / 4 * (number % 2));
            let now = ahead;
            if done < count {
                let (a, b) = (a.add(ahead.at(sizes, 0)), b.add(ahead.at(sizes, 1)));
                multiply(s, pieces, a, b, &ahead, buffer(done));
                if done + 1 < count {
                    ahead = ahead.next(sizes);
                }
            }
            if done > 0 {
                let ends = PIECE_BYTES * pieces;
                let (a, b) = (a.add(behind.at(sizes, 0) + ends), b.add(behind.at(sizes, 1) + ends));
                let at = SIDE * (behind.tile[0] * sizes.lines[1] + behind.tile[1]);
                add_scaled(s, &behind, buffer(done - 1), a, b, c.add(at), sizes.lines[1]);
            }
            behind = now;
        }
    }
}

/// A block's sums to memory, quarter by quarter, as far as C reaches.
///
/// # Safety
/// As for [`product`].
#[inline(always)]
unsafe fn multiply<S: MatrixUnit>(s: S, pieces: usize, a: *const u8, b: *const u8, place: &Place, sums: *mut i32) {
    let (tall, wide) = (place.height > HALF, place.width > HALF);
    // SAFETY: the caller's word.
    unsafe {
        s.clear::<0>();
        s.clear::<1>();
        s.clear::<2>();
        s.clear::<3>();
        for piece in 0..pieces {
            let (a, b) = (a.add(PIECE_BYTES * piece), b.add(PIECE_BYTES * piece));
            s.fill::<4>(a, PIECE_ELEMENTS);
            s.fill::<6>(b, 4 * SIDE);
            s.multiply::<0, 4, 6>();
            if wide {
                s.fill::<7>(b.add(4 * HALF), 4 * SIDE);
                s.multiply::<1, 4, 7>();
            }
            if tall {
                s.fill::<5>(a.add(PIECE_ELEMENTS * HALF), PIECE_ELEMENTS);
                s.multiply::<2, 5, 6>();
                if wide {
                    s.multiply::<3, 5, 7>();
                }
            }
        }
        s.store_sums::<0>(sums);
        if wide {
            s.store_sums::<1>(sums.add(HALF * HALF));
        }
        if tall {
            s.store_sums::<2>(sums.add(2 * HALF * HALF));
            if wide {
                s.store_sums::<3>(sums.add(3 * HALF * HALF));
            }
        }
    }
}

/// C += sums · 2^(ea+eb), from zero at the first block.
///
/// # Safety
/// As for [`product`]; `a` and `b` are the ends of a block.
#[inline(always)]
unsafe fn add_scaled<S: MatrixUnit>(
    s: S,
    place: &Place,
    sums: *const i32,
    a: *const u8,
    b: *const u8,
    c: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's word.
    unsafe {
        let eb = columns::<S, 2>(s, b);
        for row in 0..place.height {
            let ea = s.splat(a.cast::<i32>().add(row).read_unaligned());
            let from = sums.add(2 * HALF * HALF * (row / HALF) + HALF * (row % HALF));
            for (side, &eb) in eb.iter().enumerate() {
                if HALF * side < place.width {
                    let (c, left) = (c.add(stride * row + HALF * side).cast(), place.width - HALF * side);
                    let before = if place.block == 0 {
                        s.splat(0)
                    } else if left >= HALF {
                        s.load(c)
                    } else {
                        s.load_first(c, left)
                    };
                    let d = s.to_f32(s.load(from.add(HALF * HALF * side)));
                    let sum = s.mul_add_f32(d, s.add(eb, ea), before);
                    if left >= HALF {
                        s.store(c, sum);
                    } else {
                        s.store_first(c, left, sum);
                    }
                }
            }
        }
    }
}
