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
//! left   [pieces][32 rows][64 k] i8 codes, then i32 ea[32] << 23, the least of each line, then i32 correction[32]
//! right  [16 · pieces][32 columns][4 k] codes, then f32 2^eb[32], of the least
//! ```
//! A matrix unit takes right codes as they are. Those for [`tile`] are raised by 128, which makes them unsigned for
//! vpdpbusd; their share of a sum, 128 · Σa, is taken off by `correction`.
//!
//! # Ceilings
//! A tile of 8 × 32 takes two loads and eight broadcasts for 16 products of registers, and block ends are gone: on Intel,
//! where all 512-bit work shares two ports, it reaches 90 % of vpdpbusd's rate from the first-level cache (tiles of 12 × 32,
//! 8 × 48 and 6 × 64 reach 90 to 93 %, and a broadcast within each product 80 %).

use super::product::{
    Left, PANEL_ROWS, RIDER, Tile, b_block_bytes, columns, nibble_block_bytes, nibble_riders, nibbles,
};
use crate::arch::simd::Simd;

/// Rows and columns of a tile of C.
pub(crate) const SIDE: usize = 32;
/// Left panels of a tile.
pub(crate) const PANELS: usize = SIDE / PANEL_ROWS;
/// Steps of a piece.
pub(crate) const PIECE: usize = 16;

/// Sixteen lanes, and what laying lines out and tiles of 32 × 32 need beside arithmetic.
pub(crate) trait SixteenLanes: Simd {
    /// Word t of line r, of 16 bytes of four lines, as word r of chunk t.
    /// # Safety
    /// `lines` are valid for reading 16 bytes; no alignment is needed.
    unsafe fn steps_of_lines(self, lines: [*const u8; PANEL_ROWS]) -> Self::V;
}

/// Sums below it are exact in f32.
pub(crate) const EXACT: u64 = 1 << 24;

/// One in every byte of a word.
const BYTES: i32 = 0x0101_0101;
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
    PIECE_BYTES * pieces(blocks, steps) + 8 * SIDE
}

/// Whether blocks of so many steps can be aligned.
pub(crate) const fn fits(steps: usize) -> bool {
    steps.is_multiple_of(GROUP)
}

/// Where a step lies in its piece, in both operands: so a transposition of words lays the left one out.
pub(super) static ROW_OF: [usize; PIECE] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];

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

/// Places that a block's codes are shifted by, lane by lane, from its exponents and the least of the lines.
#[inline(always)]
fn places<S: Simd>(s: S, e: S::V, least: S::V, room: i32) -> S::V {
    // Blocks of zeros may lie anywhere.
    s.min_i32(s.max_i32(s.sar::<23>(s.sub(e, least)), s.splat(0)), s.splat(room))
}

/// The low byte of a lane in all its bytes.
#[inline(always)]
fn spread<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.or(x, s.shl::<8>(x));
    s.or(x, s.shl::<16>(x))
}

/// Shifts signed codes.
#[derive(Clone, Copy)]
struct Shift<V> {
    places: V,
    /// What is left of bytes then.
    keep: V,
}

impl<V: Copy> Shift<V> {
    #[inline(always)]
    fn new<S: Simd<V = V>>(s: S, places: V) -> Self {
        let low = s.sub(s.shl_lanes(s.splat(1), places), s.splat(1));
        Self { places, keep: s.xor(spread(s, low), s.splat(-1)) }
    }

    #[inline(always)]
    fn apply<S: Simd<V = V>>(self, s: S, codes: V) -> V {
        s.and(s.shl_lanes(codes, self.places), self.keep)
    }
}

/// Shifts codes u = q + offset: (q << places) + 128 = (u << places) + 128 - (offset << places), of which no term leaves its
/// byte, as q << places is one.
#[derive(Clone, Copy)]
struct RaisedShift<V> {
    places: V,
    term: V,
}

impl<V: Copy> RaisedShift<V> {
    #[inline(always)]
    fn new<S: Simd<V = V>>(s: S, places: V, offset: i32) -> Self {
        Self { places, term: spread(s, s.sub(s.splat(128), s.shl_lanes(s.splat(offset), places))) }
    }

    #[inline(always)]
    fn apply<S: Simd<V = V>>(self, s: S, codes: V) -> V {
        s.add(s.shl_lanes(codes, self.places), self.term)
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
unsafe fn left_steps<S: SixteenLanes, L: Left>(s: S, block: L, t: usize) -> S::V {
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
unsafe fn left_exponents<S: SixteenLanes, L: Left>(
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
pub(crate) unsafe fn lay_out_left<S: SixteenLanes, L: Left>(
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
            let (mut sums, mut sizes) = (s.splat(0), s.splat(0));
            let mut words = [s.splat(0); GROUP];
            let mut at = 0;
            for piece in 0..pieces {
                let mut block = L::new(starts.as_ptr().add(piece * L::POINTERS));
                for _ in 0..blocks {
                    let shift = Shift::new(s, places(s, left_riders(s, block, steps), least, room));
                    for t in (0..steps).step_by(GROUP) {
                        let word = shift.apply(s, left_steps(s, block, t));
                        sums = s.dot4(sums, s.splat(BYTES), word);
                        sizes = s.dot4(sizes, s.abs_i8(word), s.splat(BYTES));
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
            let correction = s.sub(s.splat(0), s.shl::<7>(s.sum_chunks(sums)));
            s.store_chunk(ends.add(4 * (SIDE + PANEL_ROWS * p)), correction);
            largest = s.max_i32(largest, s.sum_chunks(sizes));
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
pub(super) unsafe fn right_riders<S: Simd, const NIBBLES: bool>(s: S, steps: usize, block: *const u8) -> [S::V; 2] {
    // SAFETY: the caller's word.
    unsafe {
        if NIBBLES {
            nibble_riders(s, block.add(4 * SIDE * steps.div_ceil(2)))
        } else {
            columns(s, block.add(4 * SIDE * steps))
        }
    }
}

/// Lays out a right panel of codes raised by `offset`, bytes or nibbles, as signed codes or RAISED by 128. How many places
/// the largest shift takes; None: the exponents of a line lie more than `room` places apart, and nothing was laid out.
///
/// # Safety
/// `panel` is valid for reading `blocks` blocks of `steps` steps, which [`fits`], of 32 columns, `out` for writing
/// [`line_bytes`].
#[inline(always)]
pub(crate) unsafe fn lay_out_right<S: SixteenLanes, const NIBBLES: bool, const RAISED: bool>(
    s: S,
    blocks: usize,
    steps: usize,
    offset: i32,
    room: i32,
    panel: *const u8,
    out: *mut u8,
) -> Option<u32> {
    const { assert!(2 * S::LANES == SIDE) };
    let bytes = if NIBBLES { nibble_block_bytes(steps, SIDE) } else { b_block_bytes(steps, SIDE) };
    let stored_rows = if NIBBLES { steps.div_ceil(2) } else { steps };
    let zero = s.splat(BYTES.wrapping_mul(if NIBBLES { offset * 0x11 } else { offset }));
    let base = s.splat(RIDER);
    // Signed codes from raised ones.
    let sign = s.splat(BYTES << 7);
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
        for block in 0..blocks {
            let from = panel.add(block * bytes);
            let riders = right_riders::<S, NIBBLES>(s, steps, from);
            let mut shift = [RaisedShift { places: base, term: base }; 2];
            for (v, shift) in shift.iter_mut().enumerate() {
                *shift = RaisedShift::new(s, places(s, s.sub(riders[v], base), all[v].least, room), offset);
            }
            for row in 0..stored_rows {
                let stored = columns(s, from.add(4 * SIDE * row));
                let each = if NIBBLES { nibbles(s, stored) } else { [stored; 2] };
                for [x, y] in each.into_iter().take(1 + usize::from(NIBBLES)) {
                    let to = out.add(PIECE_BYTES * (at / PIECE) + 4 * SIDE * ROW_OF[at % PIECE]);
                    let (x, y) = (shift[0].apply(s, x), shift[1].apply(s, y));
                    s.store(to.cast(), if RAISED { x } else { s.xor(x, sign) });
                    s.store(to.add(2 * SIDE).cast(), if RAISED { y } else { s.xor(y, sign) });
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

/// Most rows of C whose sums are in registers at once.
const TILE_ROWS: usize = 12;

/// C tile of 32 columns, of the first `rows` rows and what fours of rows are begun = left · right + bias: the product is
/// exact, so this is rounded once, as the contract has it.
///
/// # Safety
/// - `a` and `b` are valid for reading the layouts above of `pieces` pieces, right codes raised;
/// - `c` is valid for writing 32 rows of 32 elements, on cache lines if it goes around them; `rows` is at most 32.
#[inline(always)]
pub(crate) unsafe fn tile<S: SixteenLanes>(
    s: S,
    pieces: usize,
    a: *const u8,
    b: *const u8,
    bias: &[f32; SIDE],
    (c, rows): (Tile, usize),
) {
    let mut first = 0;
    while first < rows {
        // SAFETY: the caller's word.
        unsafe {
            match rows - first {
                1..=4 => rows_of_tile::<S, 4>(s, pieces, a, b, bias, (c, first)),
                5..=8 => rows_of_tile::<S, 8>(s, pieces, a, b, bias, (c, first)),
                _ => rows_of_tile::<S, TILE_ROWS>(s, pieces, a, b, bias, (c, first)),
            }
        }
        first += TILE_ROWS;
    }
}

/// ROWS rows of it from row `first` on.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn rows_of_tile<S: SixteenLanes, const ROWS: usize>(
    s: S,
    pieces: usize,
    a: *const u8,
    b: *const u8,
    bias: &[f32; SIDE],
    (c, first): (Tile, usize),
) {
    // SAFETY: all offsets are inside the lines and the tile that the caller vouches for.
    unsafe {
        let (ends, eb) = (a.add(PIECE_BYTES * pieces).cast::<i32>(), b.add(PIECE_BYTES * pieces));
        let mut acc = [[s.splat(0); 2]; ROWS];
        for (row, acc) in acc.iter_mut().enumerate() {
            *acc = [s.splat(ends.add(SIDE + first + row).read_unaligned()); 2];
        }
        for piece in 0..pieces {
            let (a, b) = (a.add(PIECE_BYTES * piece + 4 * PIECE * first), b.add(PIECE_BYTES * piece));
            for step in 0..PIECE {
                let x: [S::V; 2] = columns(s, b.add(4 * SIDE * step));
                for (row, acc) in acc.iter_mut().enumerate() {
                    let w = s.splat(a.add(4 * (PIECE * row + step)).cast::<i32>().read_unaligned());
                    *acc = [s.dot4(acc[0], x[0], w), s.dot4(acc[1], x[1], w)];
                }
            }
        }
        let (eb, bias): ([S::V; 2], [S::V; 2]) = (columns(s, eb), columns(s, bias.as_ptr().cast()));
        for (row, acc) in acc.iter().enumerate() {
            let ea = s.splat(ends.add(first + row).read_unaligned());
            let (x, y) = (s.to_f32(acc[0]), s.to_f32(acc[1]));
            let scaled = [(x, s.add(eb[0], ea), bias[0]), (y, s.add(eb[1], ea), bias[1])];
            store_row(s, scaled, c.c.add((first + row) * c.stride), c.around);
        }
    }
}

/// A row of a tile: sums · scale + bias, in two registers.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
pub(super) unsafe fn store_row<S: SixteenLanes>(s: S, of: [(S::V, S::V, S::V); 2], to: *mut f32, around: bool) {
    for (v, (sums, scale, bias)) in of.into_iter().enumerate() {
        let row = s.mul_add_f32(sums, scale, bias);
        // SAFETY: the caller's word.
        unsafe {
            let to = to.add(S::LANES * v).cast();
            if around { s.store_around(to, row) } else { s.store(to, row) }
        }
    }
}
