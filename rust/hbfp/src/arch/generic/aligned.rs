//! Products whose blocks have been brought to one exponent a line, so that a whole reduction is one integer sum.
//!
//! The contract adds a block's product to C in f32, block after block, and rounds each time. Where all blocks of a line of
//! A and of a line of B are multiples of one power of two, and the sums that could arise stay below 2^24 times the product
//! of the two, every one of those additions is exact. So is then the sum in any other order: the codes are shifted up
//! once, by what their block's exponent lies above the least of their line, and one scale at the end does for all blocks.
//! Shifted codes must fit a byte: 4-bit codes have room for 4 places, 6-bit codes for 2, 8-bit codes for none.
//!
//! # Layout
//! Steps of all blocks follow one another in pieces of 16. The left operand's last piece is filled up with zero codes,
//! the right one's with anything. 32 lines of either operand take
//! [`line_bytes`]:
//! ```text
//! left   [pieces][2 halves][16 rows][64 k] i8 codes, then i32 ea[32] << 23, the least of each line
//! right  [16 · pieces][32 columns][4 k] i8 codes, then f32 2^eb[32], of the least
//! ```

use super::matrix_unit::{HALF, MatrixUnit, PANELS, PIECE, SIDE};
use super::product::{
    Left, PANEL_ROWS, RIDER, Tile, b_block_bytes, columns, nibble_block_bytes, nibble_riders, nibbles,
};
use crate::arch::simd::Simd;
use std::mem::MaybeUninit;

/// Sums below it are exact in f32.
pub(crate) const EXACT: u64 = 1 << 24;

/// Steps that fill a register of a left panel.
pub(super) const GROUP: usize = 4;
/// Bytes of a piece of 32 lines.
pub(super) const PIECE_BYTES: usize = 4 * SIDE * PIECE;

/// Pieces of a reduction.
pub(crate) const fn pieces(blocks: usize, steps: usize) -> usize {
    (blocks * steps).div_ceil(PIECE)
}

/// Bytes of 32 lines.
pub(crate) const fn line_bytes(blocks: usize, steps: usize) -> usize {
    PIECE_BYTES * pieces(blocks, steps) + 4 * SIDE
}

/// Whether blocks of so many steps can be aligned.
pub(crate) const fn fits(steps: usize) -> bool {
    steps.is_multiple_of(GROUP)
}

/// Where a step lies in its piece, in both operands: so a transposition of words lays the left one out.
pub(super) const fn row_of(step: usize) -> usize {
    GROUP * (step % GROUP) + step / GROUP
}

/// −1 in lanes that are not zero.
#[inline(always)]
fn not_zero<S: Simd>(s: S, x: S::V) -> S::V {
    s.sar::<31>(s.or(x, s.sub(s.splat(0), x)))
}

/// `mask ? a : b`, of masks that are −1 or 0.
#[inline(always)]
fn select<S: Simd>(s: S, mask: S::V, a: S::V, b: S::V) -> S::V {
    s.xor(b, s.and(mask, s.xor(a, b)))
}

/// Least and largest exponent of lines, one a lane, times 2^23. Blocks of zeros count for nothing.
#[derive(Clone, Copy)]
struct Exponents<V> {
    least: V,
    most: V,
}

impl<V: Copy> Exponents<V> {
    #[inline(always)]
    fn none<S: Simd<V = V>>(s: S) -> Self {
        Self { least: s.splat(i32::MAX), most: s.splat(i32::MIN) }
    }

    /// Takes in a block's exponents, of the lanes where `some` is −1.
    #[inline(always)]
    fn take<S: Simd<V = V>>(&mut self, s: S, e: V, some: V) {
        self.least = s.min_i32(self.least, select(s, some, e, s.splat(i32::MAX)));
        self.most = s.max_i32(self.most, select(s, some, e, s.splat(i32::MIN)));
    }

    /// Lines of zeros have the exponent 0; the largest distance of the two of a line.
    #[inline(always)]
    fn finish<S: Simd<V = V>>(&mut self, s: S) -> i32 {
        let some = not_zero(s, s.xor(self.least, s.splat(i32::MAX)));
        (self.least, self.most) = (s.and(some, self.least), s.and(some, self.most));
        s.reduce_max_i32(s.sub(self.most, self.least)) >> 23
    }
}

/// How a block's codes are shifted: counts of places, and what is left of bytes then, lane by lane.
#[derive(Clone, Copy)]
struct Shift<V> {
    places: V,
    keep: V,
}

impl<V: Copy> Shift<V> {
    /// From a block's exponents and the least of the lines.
    #[inline(always)]
    fn new<S: Simd<V = V>>(s: S, e: V, least: V) -> Self {
        // Blocks of zeros may lie anywhere.
        let places = s.min_i32(s.max_i32(s.sar::<23>(s.sub(e, least)), s.splat(0)), s.splat(7));
        let low = s.sub(s.shl_lanes(s.splat(1), places), s.splat(1));
        let low = s.or(low, s.shl::<8>(low));
        let keep = s.xor(s.or(low, s.shl::<16>(low)), s.splat(-1));
        Self { places, keep }
    }

    #[inline(always)]
    fn apply<S: Simd<V = V>>(self, s: S, codes: V) -> V {
        s.and(s.shl_lanes(codes, self.places), self.keep)
    }
}

/// Places that codes up to `max_code` can be shifted and still be bytes.
pub(crate) fn room(max_code: i32) -> i32 {
    (i32::from(i8::MAX) / max_code).ilog2() as i32
}

/// Four steps of four rows: chunk t, word r of step t and row r.
///
/// # Safety
/// As for [`lay_out_left`].
#[inline(always)]
unsafe fn left_steps<S: MatrixUnit, L: Left>(s: S, block: L, t: usize) -> S::V {
    // SAFETY: the caller's word.
    unsafe {
        if L::POINTERS == 1 {
            s.load(block.at(0, 4 * t, 4).cast())
        } else {
            s.steps_of_lines([0, 1, 2, 3].map(|row| block.at(row, 4 * t, 4 * GROUP)))
        }
    }
}

/// Exponents of four rows in every chunk.
///
/// # Safety
/// As for [`lay_out_left`].
#[inline(always)]
unsafe fn left_riders<S: Simd, L: Left>(s: S, block: L, steps: usize) -> S::V {
    // SAFETY: the caller's word.
    unsafe {
        let riders = [0, 1, 2, 3].map(|row| block.at(row, 4 * (steps + 1), 4).cast::<i32>());
        if L::POINTERS == 1 {
            s.load_chunk(riders[0])
        } else {
            s.load_chunk(riders.map(|rider| rider.read_unaligned()).as_ptr())
        }
    }
}

/// Exponents of four rows in every chunk, of all their blocks.
///
/// # Safety
/// As for [`lay_out_left`].
#[inline(always)]
unsafe fn left_exponents<S: MatrixUnit, L: Left>(
    s: S,
    pieces: usize,
    blocks: usize,
    steps: usize,
    starts: &[*const u8],
) -> Exponents<S::V> {
    let mut all = Exponents::none(s);
    for piece in 0..pieces {
        // SAFETY: the caller's word.
        let mut block = unsafe { L::new(starts.as_ptr().add(piece * L::POINTERS)) };
        for _ in 0..blocks {
            // SAFETY: the caller's word.
            unsafe {
                let e = left_riders(s, block, steps);
                let mut some = not_zero(s, e);
                // Blocks of zeros have exponent 0, but not they alone.
                if s.any_negative(s.xor(some, s.splat(-1))) {
                    let mut codes = s.splat(0);
                    for t in (0..steps).step_by(GROUP) {
                        codes = s.or(codes, left_steps(s, block, t));
                    }
                    some = not_zero(s, s.sum_chunks(not_zero(s, codes)));
                }
                all.take(s, e, some);
            }
            block = block.advance(4 * steps + 8);
        }
    }
    all
}

/// Lays out up to 32 rows, given by where each four of them lie piece by piece of the reduction, `blocks` blocks each. The
/// largest sum of a row's shifted codes, each taken positive; None: the exponents of a row lie more than `room` places
/// apart, and nothing was laid out.
///
/// # Safety
/// Each of `rows` holds the pointers of `pieces` pieces, which are valid for reading so many blocks of `steps` steps, which
/// [`fits`], with 8-bit codes; `out` is valid for writing [`line_bytes`].
#[inline(always)]
pub(crate) unsafe fn lay_out_left<S: MatrixUnit, L: Left>(
    s: S,
    pieces: usize,
    blocks: usize,
    steps: usize,
    room: i32,
    rows: &[&[*const u8]],
    out: *mut u8,
) -> Option<u32> {
    const { assert!(S::LANES == 4 * GROUP) };
    let mut least = [s.splat(0); PANELS];
    let mut largest = s.splat(0);
    // SAFETY: the caller's word; all offsets are inside the blocks and the lines.
    unsafe {
        for (least, starts) in least.iter_mut().zip(rows) {
            let mut exponents = left_exponents::<S, L>(s, pieces, blocks, steps, starts);
            if exponents.finish(s) > room {
                return None;
            }
            *least = exponents.least;
        }
        let ends = out.add(PIECE_BYTES * self::pieces(pieces * blocks, steps));
        for ((p, starts), least) in rows.iter().enumerate().zip(least) {
            s.store_chunk(ends.add(4 * PANEL_ROWS * p), least);
            let to = out.add(4 * PIECE * PANEL_ROWS * p);
            let mut sums = s.splat(0);
            let mut words = [s.splat(0); GROUP];
            let mut at = 0;
            for piece in 0..pieces {
                let mut block = L::new(starts.as_ptr().add(piece * L::POINTERS));
                for _ in 0..blocks {
                    let shift = Shift::new(s, left_riders(s, block, steps), least);
                    for t in (0..steps).step_by(GROUP) {
                        let word = shift.apply(s, left_steps(s, block, t));
                        sums = s.dot4(sums, s.abs_i8(word), s.splat(0x0101_0101));
                        words[at % PIECE / GROUP] = word;
                        at += GROUP;
                        if at.is_multiple_of(PIECE) {
                            store_piece(s, words, to.add(PIECE_BYTES * (at / PIECE - 1)));
                        }
                    }
                    block = block.advance(4 * steps + 8);
                }
            }
            if !at.is_multiple_of(PIECE) {
                words[at % PIECE / GROUP..].fill(s.splat(0));
                store_piece(s, words, to.add(PIECE_BYTES * (at / PIECE)));
            }
            largest = s.max_i32(largest, s.sum_chunks(sums));
        }
    }
    Some(s.reduce_max_i32(largest) as u32)
}

/// A piece of four rows.
///
/// # Safety
/// `to` is valid for writing four registers.
#[inline(always)]
unsafe fn store_piece<S: Simd>(s: S, words: [S::V; GROUP], to: *mut u8) {
    for (row, words) in s.transpose_words(words).into_iter().enumerate() {
        // SAFETY: the caller's word.
        unsafe { s.store(to.add(4 * PIECE * row).cast(), words) };
    }
}

/// Riders of a block of a right panel: two registers of columns.
///
/// # Safety
/// As for [`lay_out_right`].
#[inline(always)]
unsafe fn right_riders<S: Simd, const NIBBLES: bool>(s: S, steps: usize, block: *const u8) -> [S::V; 2] {
    // SAFETY: the caller's word.
    unsafe {
        if NIBBLES {
            nibble_riders(s, block.add(4 * SIDE * steps.div_ceil(2)))
        } else {
            columns(s, block.add(4 * SIDE * steps))
        }
    }
}

/// Lays out a right panel of codes raised by `offset`, bytes or nibbles. How many places the largest shift takes; None:
/// the exponents of a line lie more than `room` places apart, and nothing was laid out.
///
/// # Safety
/// `panel` is valid for reading `blocks` blocks of `steps` steps, which [`fits`], of 32 columns, `out` for writing
/// [`line_bytes`].
#[inline(always)]
pub(crate) unsafe fn lay_out_right<S: MatrixUnit, const NIBBLES: bool>(
    s: S,
    blocks: usize,
    steps: usize,
    offset: i32,
    room: i32,
    panel: *const u8,
    out: *mut u8,
) -> Option<u32> {
    const BYTES: i32 = 0x0101_0101;
    const { assert!(2 * S::LANES == SIDE) };
    let bytes = if NIBBLES { nibble_block_bytes(steps, SIDE) } else { b_block_bytes(steps, SIDE) };
    let stored_rows = if NIBBLES { steps.div_ceil(2) } else { steps };
    let zero = s.splat(BYTES.wrapping_mul(if NIBBLES { offset * 0x11 } else { offset }));
    let base = s.splat(RIDER);
    // u − offset: no byte of the sum passes 255, and 128 off it is a change of the highest bit.
    let (raise, sign) = (s.splat(BYTES * (128 - offset)), s.splat(BYTES << 7));
    let mut all = [Exponents::none(s); 2];
    // SAFETY: the caller's word; all offsets are inside the panel and the lines.
    unsafe {
        for block in 0..blocks {
            let from = panel.add(block * bytes);
            let riders = right_riders::<S, NIBBLES>(s, steps, from);
            let e = [s.sub(riders[0], base), s.sub(riders[1], base)];
            let mut some = [not_zero(s, e[0]), not_zero(s, e[1])];
            // Blocks of zeros have exponent 0, but not they alone.
            if s.any_negative(s.xor(s.and(some[0], some[1]), s.splat(-1))) {
                let mut codes = [s.splat(0); 2];
                for row in 0..stored_rows {
                    let [x, y] = columns(s, from.add(4 * SIDE * row));
                    codes = [s.or(codes[0], s.xor(x, zero)), s.or(codes[1], s.xor(y, zero))];
                }
                some = [not_zero(s, codes[0]), not_zero(s, codes[1])];
            }
            all[0].take(s, e[0], some[0]);
            all[1].take(s, e[1], some[1]);
        }
        let spread = all[0].finish(s).max(all[1].finish(s));
        if spread > room {
            return None;
        }
        let mut at = 0;
        let place = |at: usize| out.add(PIECE_BYTES * (at / PIECE) + 4 * SIDE * row_of(at % PIECE));
        for block in 0..blocks {
            let from = panel.add(block * bytes);
            let riders = right_riders::<S, NIBBLES>(s, steps, from);
            let shift = [
                Shift::new(s, s.sub(riders[0], base), all[0].least),
                Shift::new(s, s.sub(riders[1], base), all[1].least),
            ];
            for row in 0..stored_rows {
                let stored = columns(s, from.add(4 * SIDE * row));
                let each = if NIBBLES { nibbles(s, stored) } else { [stored; 2] };
                for [x, y] in each.into_iter().take(1 + usize::from(NIBBLES)) {
                    let to = place(at);
                    s.store(to.cast(), shift[0].apply(s, s.xor(s.add(x, raise), sign)));
                    s.store(to.add(2 * SIDE).cast(), shift[1].apply(s, s.xor(s.add(y, raise), sign)));
                    at += 1;
                }
            }
        }
        let one = s.splat(0x3F80_0000);
        let ends = out.add(PIECE_BYTES * pieces(blocks, steps));
        s.store(ends.cast(), s.add(all[0].least, one));
        s.store(ends.add(2 * SIDE).cast(), s.add(all[1].least, one));
        Some(spread as u32)
    }
}

#[repr(align(64))]
struct Aligned<T>(T);

/// C tile of 32 × 32 = left · right + bias: the product is exact, so this is rounded once, as the contract has it.
///
/// # Safety
/// - `a` and `b` are valid for reading the layouts above of `pieces` pieces;
/// - `c` is valid for writing 32 rows of 32 elements, on cache lines if it goes around them;
/// - the calling thread's unit is configured for pieces of 16 steps.
#[inline(always)]
pub(crate) unsafe fn tile<S: MatrixUnit>(s: S, pieces: usize, a: *const u8, b: *const u8, bias: &[f32; SIDE], c: Tile) {
    let mut sums = MaybeUninit::<Aligned<[[i32; HALF * HALF]; 4]>>::uninit();
    let sums = sums.as_mut_ptr().cast::<i32>();
    // SAFETY: all offsets are inside the lines, the buffer and the tile that the caller vouches for; the unit writes the
    // sums before they are read.
    unsafe {
        s.clear::<0>();
        s.clear::<1>();
        s.clear::<2>();
        s.clear::<3>();
        for piece in 0..pieces {
            let (a, b) = (a.add(PIECE_BYTES * piece), b.add(PIECE_BYTES * piece));
            s.fill_passing::<4>(a, 4 * PIECE);
            s.fill::<6>(b, 4 * SIDE);
            s.multiply::<0, 4, 6>();
            s.fill::<7>(b.add(4 * HALF), 4 * SIDE);
            s.multiply::<1, 4, 7>();
            s.fill_passing::<5>(a.add(4 * PIECE * HALF), 4 * PIECE);
            s.multiply::<2, 5, 6>();
            s.multiply::<3, 5, 7>();
        }
        s.store_sums::<0>(sums);
        s.store_sums::<1>(sums.add(HALF * HALF));
        s.store_sums::<2>(sums.add(2 * HALF * HALF));
        s.store_sums::<3>(sums.add(3 * HALF * HALF));
        let (ea, eb) = (a.add(PIECE_BYTES * pieces).cast::<i32>(), columns::<S, 2>(s, b.add(PIECE_BYTES * pieces)));
        let bias = columns::<S, 2>(s, bias.as_ptr().cast());
        for row in 0..SIDE {
            let from = sums.add(2 * HALF * HALF * (row / HALF) + HALF * (row % HALF));
            let ea = s.splat(ea.add(row).read_unaligned());
            let x = s.mul_add_f32(s.to_f32(s.load(from)), s.add(eb[0], ea), bias[0]);
            let y = s.mul_add_f32(s.to_f32(s.load(from.add(HALF * HALF))), s.add(eb[1], ea), bias[1]);
            let to = c.c.add(row * c.stride);
            if c.around {
                s.store_around(to.cast(), x);
                s.store_around(to.add(HALF).cast(), y);
            } else {
                s.store(to.cast(), x);
                s.store(to.add(HALF).cast(), y);
            }
        }
    }
}
