//! Tiles of 32 × 32 on a matrix unit, which multiplies 16 rows by 16 columns of bytes in one instruction (Intel SDM,
//! volume 1, chapter 18: AMX).
//!
//! The unit adds up a block's products in 32 bits; vector instructions then scale the sums and add them to C, as
//! everywhere. So that both work at once, a tile's sums leave the unit four products after they began, and are scaled
//! three products later.
//!
//! # Layout
//! Panels, as the other kernels read them, are laid out anew for a task that uses them many times. A block of 32 lines
//! of either operand takes [`block_bytes`]; its steps come in pieces of at most 16:
//! ```text
//! left   [pieces][2 halves][16 rows][4 · steps of a piece] i8 codes, then i32 ea[32] << 23
//! right  [steps][32 columns][4 k] i8 codes, then f32 2^eb[32]
//! ```
//! Both are signed, so that nothing has to be corrected.

use super::aligned::{PANELS, PIECE, PIECE_BYTES, SIDE, SixteenLanes, right_riders, store_row};
use super::product::{PANEL_ROWS, RIDER, Tile, a_block_bytes, b_block_bytes, columns, nibble_block_bytes, nibbles};
use crate::arch::simd::Simd;
use std::mem::MaybeUninit;

/// Rows and columns of a product of the unit; it takes at most a piece of steps.
pub(super) const HALF: usize = SIDE / 2;

/// Bytes of a block of 32 lines.
pub(crate) const fn block_bytes(steps: usize) -> usize {
    4 * SIDE * (steps + 1)
}

/// Whether the unit takes blocks of so many steps: whole pieces, long enough to pay for what follows each block.
pub(crate) const fn fits(steps: usize) -> bool {
    steps.is_multiple_of(PIECE) || steps == PIECE / 2
}

/// Steps of a piece.
const fn piece_steps(steps: usize) -> usize {
    if steps < PIECE { steps } else { PIECE }
}

/// Eight tile registers: 0 to 3 hold sums, 4 and 5 left, 6 and 7 right codes.
///
/// # Safety
/// Methods but `configure` need a configuration of the calling thread; pointers are valid for what is read or written.
pub(crate) trait MatrixUnit: SixteenLanes {
    /// What was configured before.
    type Before;
    /// Makes the registers ready for pieces of `steps` steps.
    unsafe fn configure(self, steps: usize) -> Self::Before;
    /// Undoes that.
    unsafe fn restore(self, before: Self::Before);
    /// 16 × 16 sums to memory.
    unsafe fn store_sums<const T: usize>(self, to: *mut i32);
    unsafe fn clear<const T: usize>(self);
    /// Rows of a register, `stride` bytes apart.
    unsafe fn fill<const T: usize>(self, from: *const u8, stride: usize);
    /// The same of rows that pass by once: they push nothing out of the first-level cache.
    unsafe fn fill_passing<const T: usize>(self, from: *const u8, stride: usize);
    /// Sums += left codes · right codes.
    unsafe fn multiply<const SUMS: usize, const LEFT: usize, const RIGHT: usize>(self);
    /// Four rows from 16 steps of a panel, or 8.
    unsafe fn panel_rows<const STEPS: usize>(self, panel: *const u8, to: *mut u8);
}

/// Configures the unit for blocks of `steps` steps.
///
/// # Safety
/// The CPU and the process may use the unit.
#[inline(always)]
pub(crate) unsafe fn configure<S: MatrixUnit>(s: S, steps: usize) -> S::Before {
    // SAFETY: the caller's word.
    unsafe { s.configure(piece_steps(steps)) }
}

/// Lays out eight left panels.
///
/// # Safety
/// `panels` are valid for reading `blocks` blocks of `steps` steps of a panel with 8-bit codes, `out` for writing as many
/// blocks.
#[inline(always)]
pub(crate) unsafe fn lay_out_left<S: MatrixUnit>(
    s: S,
    blocks: usize,
    steps: usize,
    panels: &[*const u8; PANELS],
    out: *mut u8,
) {
    let piece = piece_steps(steps);
    for block in 0..blocks {
        for (p, panel) in panels.iter().enumerate() {
            // SAFETY: all offsets are inside the blocks that the caller vouches for.
            unsafe {
                let from = panel.add(block * a_block_bytes(steps, false));
                let out = out.add(block * block_bytes(steps));
                for first in (0..steps).step_by(piece) {
                    let from = from.add(4 * PANEL_ROWS * first);
                    let to = out.add(4 * SIDE * first + PANEL_ROWS * p * 4 * piece);
                    if piece == PIECE {
                        s.panel_rows::<PIECE>(from, to);
                    } else {
                        s.panel_rows::<{ PIECE / 2 }>(from, to);
                    }
                }
                let riders = from.add(4 * PANEL_ROWS * (steps + 1));
                let to = out.add(4 * SIDE * steps + 4 * PANEL_ROWS * p);
                to.copy_from_nonoverlapping(riders, 4 * PANEL_ROWS);
            }
        }
    }
}

/// Lays out 32 lines that lie anywhere: of each block codes, correction, rider.
///
/// # Safety
/// `lines` are valid for reading `blocks` blocks of `steps` steps of a line with 8-bit codes, `out` for writing as many
/// blocks of 32 lines.
#[inline(always)]
pub(crate) unsafe fn lay_out_lines<S: MatrixUnit>(
    s: S,
    blocks: usize,
    steps: usize,
    lines: &[*const u8; SIDE],
    out: *mut u8,
) {
    const { assert!(S::LANES == PIECE) };
    let piece = piece_steps(steps);
    let line_block = a_block_bytes(steps, false) / PANEL_ROWS;
    for block in 0..blocks {
        for (i, line) in lines.iter().enumerate() {
            // SAFETY: all offsets are inside the blocks that the caller vouches for.
            unsafe {
                let from = line.add(block * line_block);
                let out = out.add(block * block_bytes(steps));
                for first in (0..steps).step_by(piece) {
                    let (from, to) = (from.add(4 * first), out.add(4 * (SIDE * first + piece * i)));
                    if piece == PIECE {
                        s.store(to.cast(), s.load(from.cast()));
                    } else {
                        to.cast::<[u8; 2 * PIECE]>().write_unaligned(from.cast::<[u8; 2 * PIECE]>().read_unaligned());
                    }
                }
                let rider = from.add(4 * (steps + 1)).cast::<i32>().read_unaligned();
                out.add(4 * (SIDE * steps + i)).cast::<i32>().write_unaligned(rider);
            }
        }
    }
}

/// Lays out a right panel of codes raised by `offset`, bytes or nibbles.
///
/// # Safety
/// `panel` is valid for reading `blocks` blocks of `steps` steps of 32 columns, `out` for writing as many blocks.
#[inline(always)]
pub(crate) unsafe fn lay_out_right<S: MatrixUnit, const NIBBLES: bool>(
    s: S,
    blocks: usize,
    steps: usize,
    offset: i32,
    panel: *const u8,
    out: *mut u8,
) {
    const BYTES: i32 = 0x0101_0101;
    const { assert!(2 * S::LANES == SIDE) };
    // u − offset: no byte of the sum passes 255, and 128 off it is a change of the highest bit.
    let (raise, sign) = (s.splat(BYTES * (128 - offset)), s.splat(BYTES << 7));
    let one = s.splat(0x3F80_0000 - RIDER);
    let bytes = if NIBBLES { nibble_block_bytes(steps, SIDE) } else { b_block_bytes(steps, SIDE) };
    for block in 0..blocks {
        // SAFETY: all offsets are inside the blocks that the caller vouches for.
        unsafe {
            let from = panel.add(block * bytes);
            let out = out.add(block * block_bytes(steps));
            for t in 0..steps {
                let [x, y]: [S::V; 2] = if NIBBLES {
                    nibbles(s, columns(s, from.add(4 * SIDE * (t / 2))))[t % 2]
                } else {
                    columns(s, from.add(4 * SIDE * t))
                };
                let to = out.add(4 * SIDE * t);
                s.store(to.cast(), s.xor(s.add(x, raise), sign));
                s.store(to.add(2 * SIDE).cast(), s.xor(s.add(y, raise), sign));
            }
            let [x, y] = right_riders::<S, NIBBLES>(s, steps, from);
            let to = out.add(4 * SIDE * steps);
            s.store(to.cast(), s.add(x, one));
            s.store(to.add(2 * SIDE).cast(), s.add(y, one));
        }
    }
}

/// Operations of a round of [`peak`]: a multiplication and an addition count as two.
pub(crate) const PEAK_ROUND: u64 = 4 * 2 * (HALF * HALF * 4 * PIECE) as u64;

/// Products of registers that nothing loads or stores: the unit's rate.
///
/// # Safety
/// The unit is [configured](configure) for pieces of 16 steps.
#[inline(always)]
pub(crate) unsafe fn peak<S: MatrixUnit>(s: S, rounds: usize) {
    for _ in 0..rounds {
        // SAFETY: the caller's word.
        unsafe {
            s.multiply::<0, 4, 6>();
            s.multiply::<1, 4, 7>();
            s.multiply::<2, 5, 6>();
            s.multiply::<3, 5, 7>();
        }
    }
}

/// A block whose sums are in memory or on their way there.
#[derive(Clone, Copy)]
struct Ends {
    left: *const u8,
    right: *const u8,
}

#[repr(align(64))]
struct Aligned<T>(T);

/// A quarter of C += its sums · 2^(ea+eb), each product exact, each sum rounded once.
///
/// # Safety
/// `sums` is valid for reading four quarters, `c` for reading and writing a tile; the ends for reading 32 words.
#[inline(always)]
unsafe fn add_scaled<S: Simd>(s: S, quarter: usize, sums: *const i32, of: Ends, c: *mut f32) {
    let (half, side) = (quarter / 2, quarter % 2);
    // SAFETY: the caller's word.
    unsafe {
        let (sums, c) = (sums.add(HALF * HALF * quarter), c.add(SIDE * HALF * half + HALF * side));
        let left = of.left.add(4 * HALF * half);
        let eb = s.load(of.right.add(4 * HALF * side).cast());
        for row in 0..HALF {
            let scale = s.add(eb, s.splat(left.cast::<i32>().add(row).read_unaligned()));
            let at = c.add(SIDE * row);
            let sum = s.mul_add_f32(s.to_f32(s.load(sums.add(HALF * row))), scale, s.load(at.cast()));
            s.store(at.cast(), sum);
        }
    }
}

/// Starts a block's products of tile `T`, after the sums of the block before have left it.
///
/// # Safety
/// As for [`tile`]; the unit is configured.
#[inline(always)]
unsafe fn advance<S: MatrixUnit, const T: usize, const LEFT: usize, const RIGHT: usize>(
    s: S,
    steps: usize,
    a: *const u8,
    b: *const u8,
    sums: *mut i32,
) {
    let piece = piece_steps(steps);
    let (row_bytes, piece_bytes) = (4 * piece, 4 * SIDE * piece);
    let (a, b) = (a.wrapping_add((LEFT - 4) * HALF * row_bytes), b.wrapping_add((RIGHT - 6) * 4 * HALF));
    // SAFETY: pieces of the block that the caller vouches for.
    unsafe {
        s.store_sums::<T>(sums.add(HALF * HALF * T));
        s.clear::<T>();
        for p in 0..steps / piece {
            // One piece: the registers that an earlier tile of the block has filled still hold it.
            if T == 0 || T == 2 || steps > piece {
                s.fill::<LEFT>(a.add(p * piece_bytes), row_bytes);
            }
            if T == 0 || T == 1 || steps > piece {
                s.fill::<RIGHT>(b.add(p * piece_bytes), 4 * SIDE);
            }
            s.multiply::<T, LEFT, RIGHT>();
        }
    }
}

/// C tile of 32 × 32 += left · right.
///
/// # Safety
/// - `a` and `b` are valid for reading `blocks` blocks of the layouts above, which [`fits`];
/// - `c` is valid for reading and writing 32 rows of 32 elements, on cache lines if it goes around them; blocks > 0;
/// - the calling thread's unit is [configured](configure) for blocks of `steps` steps.
#[inline(always)]
pub(crate) unsafe fn tile<S: MatrixUnit, const STEPS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let (bytes, ends) = (block_bytes(steps), 4 * SIDE * steps);
    let mut sums = MaybeUninit::<Aligned<[[i32; HALF * HALF]; 4]>>::uninit();
    let mut own = MaybeUninit::<Aligned<[f32; SIDE * SIDE]>>::uninit();
    let sums = sums.as_mut_ptr().cast::<i32>();
    let own = own.as_mut_ptr().cast::<f32>();
    // SAFETY: all offsets are inside the blocks, the buffers and the tile that the caller vouches for. C is filled here,
    // sums by the unit before they are read.
    unsafe {
        for row in 0..SIDE {
            let [x, y] = if c.fresh { [s.splat(0); 2] } else { columns(s, c.c.add(row * c.stride).cast()) };
            s.store(own.add(SIDE * row).cast(), x);
            s.store(own.add(SIDE * row + HALF).cast(), y);
        }
        s.clear::<0>();
        s.clear::<1>();
        s.clear::<2>();
        s.clear::<3>();
        // The block before, and the one before that.
        let mut before = [Ends { left: a.add(ends), right: b.add(ends) }; 2];
        for block in 0..blocks {
            let (a, b) = (a.add(block * bytes), b.add(block * bytes));
            advance::<S, 0, 4, 6>(s, steps, a, b, sums);
            if block > 1 {
                add_scaled(s, 1, sums, before[1], own);
            }
            advance::<S, 1, 4, 7>(s, steps, a, b, sums);
            if block > 1 {
                add_scaled(s, 2, sums, before[1], own);
            }
            advance::<S, 2, 5, 6>(s, steps, a, b, sums);
            if block > 1 {
                add_scaled(s, 3, sums, before[1], own);
            }
            advance::<S, 3, 5, 7>(s, steps, a, b, sums);
            if block > 0 {
                add_scaled(s, 0, sums, before[0], own);
            }
            before = [Ends { left: a.add(ends), right: b.add(ends) }, before[0]];
        }
        if blocks > 1 {
            add_scaled(s, 1, sums, before[1], own);
            add_scaled(s, 2, sums, before[1], own);
            add_scaled(s, 3, sums, before[1], own);
        }
        s.store_sums::<0>(sums);
        s.store_sums::<1>(sums.add(HALF * HALF));
        s.store_sums::<2>(sums.add(2 * HALF * HALF));
        s.store_sums::<3>(sums.add(3 * HALF * HALF));
        for quarter in 0..4 {
            add_scaled(s, quarter, sums, before[0], own);
        }
        for row in 0..SIDE {
            let to = c.c.add(row * c.stride);
            let [x, y] = columns(s, own.add(SIDE * row).cast());
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

/// C tile of 32 × 32 = left · right + bias of lines brought to one exponent, laid out as in [`super::aligned`]; of up to 16
/// `rows` the lower half is left out.
///
/// # Safety
/// As for [`super::aligned::tile`], right codes not raised; the calling thread's unit is [configured](configure) for pieces
/// of 16 steps.
#[inline(always)]
pub(crate) unsafe fn aligned_tile<S: MatrixUnit>(
    s: S,
    pieces: usize,
    a: *const u8,
    b: *const u8,
    bias: &[f32; SIDE],
    (c, rows): (Tile, usize),
) {
    let mut sums = MaybeUninit::<Aligned<[[i32; HALF * HALF]; 4]>>::uninit();
    let sums = sums.as_mut_ptr().cast::<i32>();
    let both = rows > HALF;
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
            if both {
                s.fill_passing::<5>(a.add(4 * PIECE * HALF), 4 * PIECE);
                s.multiply::<2, 5, 6>();
                s.multiply::<3, 5, 7>();
            }
        }
        s.store_sums::<0>(sums);
        s.store_sums::<1>(sums.add(HALF * HALF));
        if both {
            s.store_sums::<2>(sums.add(2 * HALF * HALF));
            s.store_sums::<3>(sums.add(3 * HALF * HALF));
        }
        let (ea, eb) = (a.add(PIECE_BYTES * pieces).cast::<i32>(), columns::<S, 2>(s, b.add(PIECE_BYTES * pieces)));
        let bias = columns::<S, 2>(s, bias.as_ptr().cast());
        for row in 0..if both { SIDE } else { HALF } {
            let from = sums.add(2 * HALF * HALF * (row / HALF) + HALF * (row % HALF));
            let ea = s.splat(ea.add(row).read_unaligned());
            let (x, y) = (s.to_f32(s.load(from)), s.to_f32(s.load(from.add(HALF * HALF))));
            let scaled = [(x, s.add(eb[0], ea), bias[0]), (y, s.add(eb[1], ea), bias[1])];
            store_row(s, scaled, c.c.add(row * c.stride), c.around);
        }
    }
}
