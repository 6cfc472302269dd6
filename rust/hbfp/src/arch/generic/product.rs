//! The innermost tiles of a product: 4 rows × 2 registers of columns, over all blocks of the reduction.
//!
//! # The exponent rides in the accumulator
//! An accumulator starts as the bits of the float 1.5·2^23·2^(ea+eb). Integer sums then count in units of that float's
//! last place: after the block its bits, read as f32, are (1.5·2^23 + D)·2^(ea+eb) exactly, as long as |D| < 2^22 and
//! the exponent stays normal (−149 ≤ ea + eb ≤ 104). Subtracting 1.5·2^23·2^(ea+eb) is exact; adding to C is the one
//! rounding of the contract.
//!
//! # Panels
//! A block of `n` elements takes `steps` = ⌈n / 4⌉ steps; missing elements are zero codes.
//! ```text
//! A block   [steps][4 rows][4 k] i8 codes, then i32 correction[4], i32 ea[4] << 23
//! B block   [steps][columns][4 k] u8 codes + OFF, then i32 0x4B400000 + (eb[columns] << 23)
//! ```
//! OFF = 2^(m_b − 1) makes B unsigned for the multipliers. Its share of a sum, OFF · Σa, is taken off by `correction`:
//! with [`Correction::Total`] that is (ea << 23) − OFF · Σa; with [`Correction::Halves`] two i16, −OFF times Σa over
//! k mod 4 in {0, 1} and in {2, 3}, modulo 2^16.

use crate::arch::simd::Simd;

/// Rows of an A panel.
pub(crate) const PANEL_ROWS: usize = 4;
/// Bits of 1.5·2^23.
pub(crate) const RIDER: i32 = 0x4B40_0000;

/// Form of the offset correction that a tile kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Correction {
    Total,
    Halves,
}

/// Bytes of a block of an A panel.
#[inline(always)]
pub(crate) const fn a_block_bytes(steps: usize) -> usize {
    16 * steps + 32
}
/// Bytes of a block of a B panel with `columns` columns.
#[inline(always)]
pub(crate) const fn b_block_bytes(steps: usize, columns: usize) -> usize {
    4 * columns * (steps + 1)
}

/// A word of a panel in all lanes. (Not a closure: those do not inherit the caller's instructions.)
///
/// # Safety
/// `p` is valid for reading four bytes.
#[inline(always)]
unsafe fn word<S: Simd>(s: S, p: *const u8) -> S::V {
    // SAFETY: the caller vouches for the bytes.
    s.splat(unsafe { p.cast::<i32>().read_unaligned() })
}

/// C tile += A panel · B panel by four-byte dot products.
///
/// Budget: on AVX-512 VNNI 8 vpdpbusd a step, two a cycle; elsewhere two 16-bit multiply-adds take the place of each.
///
/// # Safety
/// - `a` is valid for reading `blocks * a_block_bytes(steps)` bytes, `b` for `blocks * b_block_bytes(steps, 2 LANES)`;
/// - `c` is valid for reading and writing 4 × 2 LANES elements.
#[inline(always)]
pub(crate) unsafe fn tile_dot4<S: Simd, const STEPS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: *mut f32,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let columns = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut sum = [[s.splat(0); 2]; PANEL_ROWS];
        for (i, row) in sum.iter_mut().enumerate() {
            for (v, x) in row.iter_mut().enumerate() {
                *x = s.load(c.add(i * columns + v * S::LANES).cast());
            }
        }
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps));
            let b = b.add(block * b_block_bytes(steps, columns));
            let a_end = a.add(16 * steps);
            let b_end = b.add(4 * columns * steps);
            let mut acc = [[s.splat(0); 2]; PANEL_ROWS];
            for v in 0..2 {
                let eb = s.load(b_end.add(4 * S::LANES * v).cast());
                for (i, acc) in acc.iter_mut().enumerate() {
                    acc[v] = s.add(eb, word(s, a_end.add(4 * i)));
                }
            }
            for t in 0..steps {
                let x0 = s.load(b.add(4 * t * columns).cast());
                let x1 = s.load(b.add(4 * (t * columns + S::LANES)).cast());
                for (i, acc) in acc.iter_mut().enumerate() {
                    let w = word(s, a.add(16 * t + 4 * i));
                    acc[0] = s.dot4(acc[0], x0, w);
                    acc[1] = s.dot4(acc[1], x1, w);
                }
            }
            for v in 0..2 {
                let eb = s.load(b_end.add(4 * S::LANES * v).cast());
                for i in 0..PANEL_ROWS {
                    let zero = s.add(eb, word(s, a_end.add(16 + 4 * i)));
                    sum[i][v] = s.add_f32(sum[i][v], s.sub_f32(acc[i][v], zero));
                }
            }
        }
        for (i, row) in sum.iter().enumerate() {
            for (v, x) in row.iter().enumerate() {
                s.store(c.add(i * columns + v * S::LANES).cast(), *x);
            }
        }
    }
}

/// C tile += A panel · B panel with sums in 16-bit halves, one vpmaddubsw and one vpaddw for eight products a lane.
///
/// Exact while a half's signed sum fits an i16 (2 · steps · Qa · Qb < 2^15; the offset's share cancels modulo 2^16)
/// and no pair of products saturates (2 · (2^m_b − 1) · Qa < 2^15).
///
/// Budget on Zen 3: 8 vpmaddubsw a step on two ports, 4 cycles for 512 products a step: the C tile stays in memory.
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
pub(crate) unsafe fn tile_halves<S: Simd, const STEPS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: *mut f32,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let columns = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps));
            let b = b.add(block * b_block_bytes(steps, columns));
            let a_end = a.add(16 * steps);
            let b_end = b.add(4 * columns * steps);
            let mut acc = [[s.splat(0); 2]; PANEL_ROWS];
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = [word(s, a_end.add(4 * i)); 2];
            }
            for t in 0..steps {
                let x0 = s.load(b.add(4 * t * columns).cast());
                let x1 = s.load(b.add(4 * (t * columns + S::LANES)).cast());
                for (i, acc) in acc.iter_mut().enumerate() {
                    let w = word(s, a.add(16 * t + 4 * i));
                    acc[0] = s.add_i16(acc[0], s.mul_pairs(x0, w));
                    acc[1] = s.add_i16(acc[1], s.mul_pairs(x1, w));
                }
            }
            for v in 0..2 {
                let eb = s.load(b_end.add(4 * S::LANES * v).cast());
                for (i, acc) in acc.iter().enumerate() {
                    let zero = s.add(eb, word(s, a_end.add(16 + 4 * i)));
                    let total = s.add(s.sum_halves(acc[v]), zero);
                    let at = c.add(i * columns + v * S::LANES).cast::<i32>();
                    s.store(at, s.add_f32(s.load(at), s.sub_f32(total, zero)));
                }
            }
        }
    }
}
