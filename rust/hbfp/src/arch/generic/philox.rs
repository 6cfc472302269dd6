//! Philox4x32-10 on `LANES / 2` counters a register and four registers at a time, of four rows, or of fewer rows and several
//! groups. A round of a register is 2 multiplications, 2 shifts and 4 exclusive ors, one after the other: the four hide each
//! other's latencies.

use crate::arch::simd::Simd;
use crate::rng::{MULTIPLIERS, ROUNDS, Seed, WEYL};
use std::hint::black_box;

/// Counters are produced in batches; this many u16 may be written past the last one asked for.
pub(crate) const RANDOM_PADDING: usize = 8 * 32;

/// A rectangle of counters: `groups` counters (of eight columns each) from `group` on, in each of `rows` rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counters {
    pub(crate) row: u32,
    pub(crate) row_step: u32,
    pub(crate) rows: usize,
    pub(crate) group: u32,
    pub(crate) groups: usize,
}

/// Round keys, each in a register's width.
#[repr(align(64))]
struct Keys([[[i32; 16]; 2]; ROUNDS]);

/// Registers at a time.
const REGISTERS: usize = 4;

/// Writes the random bits of the rectangle, row after row, `8 * groups` a row. Where a register holds the counters of two,
/// four or eight rows, it does.
///
/// Two and a half of the ten rounds are done once for many counters: with the stream the same for all, one half of the
/// first two rounds sees only the row, the other half, and half of the third, only the group.
///
/// # Safety
/// `out` is valid for writing `8 * rows * groups + RANDOM_PADDING` elements.
#[inline(always)]
pub(crate) unsafe fn fill_random<S: Simd>(s: S, seed: Seed, counters: Counters, out: *mut u16) {
    // SAFETY: the caller's word.
    unsafe {
        match S::LANES / 2 / counters.groups.max(1) {
            8 => fill::<S, 8, 1>(s, seed, counters, out, None),
            4 if counters.groups * 4 == S::LANES / 2 => fill::<S, 4, 1>(s, seed, counters, out, None),
            2 if counters.groups * 2 == S::LANES / 2 => fill::<S, 2, 1>(s, seed, counters, out, None),
            _ => fill::<S, 1, 1>(s, seed, counters, out, None),
        }
    }
}

/// The same bits by columns, `rows` for each of the first `columns` of those in the groups.
///
/// # Safety
/// `out` is valid for writing `columns * rows` elements.
#[inline(always)]
pub(crate) unsafe fn fill_random_columns<S: Simd>(s: S, seed: Seed, counters: Counters, columns: usize, out: *mut u16) {
    let registers = counters.rows.div_ceil(S::LANES / 2);
    // SAFETY: the caller's word. A register holds the counters of as many rows.
    unsafe {
        match (S::LANES, registers) {
            (16, ..=1) => fill::<S, 8, 4>(s, seed, counters, out, Some(columns)),
            (16, 2) => fill::<S, 8, 2>(s, seed, counters, out, Some(columns)),
            (16, _) => fill::<S, 8, 1>(s, seed, counters, out, Some(columns)),
            (_, ..=2) => fill::<S, 4, 2>(s, seed, counters, out, Some(columns)),
            (_, _) => fill::<S, 4, 1>(s, seed, counters, out, Some(columns)),
        }
    }
}

/// Halves of a register's counters, each of another row, to their columns: `row` is the first one's.
///
/// # Safety
/// As for [`fill_random_columns`].
#[inline(always)]
unsafe fn store_columns<S: Simd>(
    s: S,
    words: [S::V; 4],
    first: usize,
    row: usize,
    [rows, columns]: [usize; 2],
    out: *mut u16,
) {
    for (i, word) in words.into_iter().enumerate() {
        for (column, halves) in [(first + 2 * i, word), (first + 2 * i + 1, s.sar::<16>(word))] {
            if column >= columns {
                return;
            }
            // SAFETY: the caller's word; of the last rows no more than there are.
            unsafe {
                let to = out.add(column * rows + row);
                if row + S::LANES / 2 <= rows {
                    s.store_low_halves(to, halves);
                } else {
                    let mut all = [0u16; 8];
                    s.store_low_halves(all.as_mut_ptr(), halves);
                    std::ptr::copy_nonoverlapping(all.as_ptr(), to, rows - row);
                }
            }
        }
    }
}

/// [`fill_random`] with `TOGETHER` rows in a register: one, or as many as fill it; or [`fill_random_columns`] with as many as
/// a register has counters. Of the registers at a time, `GROUPS` hold the same rows' next groups.
///
/// # Safety
/// As for those.
#[inline(always)]
unsafe fn fill<S: Simd, const TOGETHER: usize, const GROUPS: usize>(
    s: S,
    seed: Seed,
    counters: Counters,
    out: *mut u16,
    columns: Option<usize>,
) {
    let lanes = (S::LANES / 2 / TOGETHER).max(1);
    let Counters { row, row_step, rows, group, groups } = counters;
    if rows == 0 || groups == 0 {
        return;
    }
    // Groups and rows of a register's counters, less those of the first.
    let (mut iota, mut rows_on) = ([0i32; 16], [0i32; 16]);
    for counter in 0..S::LANES / 2 {
        iota[2 * counter] = (counter % lanes) as i32;
        rows_on[2 * counter] = row_step.wrapping_mul((counter / lanes) as u32) as i32;
    }
    // SAFETY: the arrays hold a register each; the last register of a row ends less than `lanes` counters behind the row,
    // which the padding covers after the last row. Registers go from the last to the first and rows from the first to the
    // last, so that what is written past a row's end is written again by its owner.
    unsafe {
        let (iota, rows_on) = (s.load(iota.as_ptr()), s.load(rows_on.as_ptr()));
        let [m0, m1] = MULTIPLIERS.map(|m| s.splat(m as i32));
        let mut keys = [[0u32; 2]; ROUNDS];
        let (mut k0, mut k1) = (seed.seed as u32, (seed.seed >> 32) as u32);
        for key in &mut keys {
            *key = [k0, k1];
            (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
        }
        let mut wide_keys = Keys([[[0; 16]; 2]; ROUNDS]);
        for (wide, key) in wide_keys.0.iter_mut().zip(&keys) {
            for (wide, &k) in wide.iter_mut().zip(key) {
                s.store(wide.as_mut_ptr(), s.splat(k as i32));
            }
        }
        // Out of the compiler's sight, or it would keep some in registers that the counters need.
        let wide_keys: *const Keys = black_box(&wide_keys);
        let key = |round: usize, word: usize| s.load((*wide_keys).0[round][word].as_ptr());
        let first = u64::from(MULTIPLIERS[1]) * u64::from(seed.stream as u32);
        let of_stream = s.splat(((first >> 32) as u32 ^ keys[0][0]) as i32);
        let together = lanes * GROUPS;
        for g in (0..groups.div_ceil(together)).rev().map(|register| register * together) {
            // Rounds 1 to 3, as far as they see the group alone. Only the low half of each 64-bit lane counts; products
            // leave their high halves behind.
            let mut of_groups = [[s.splat(0); 4]; GROUPS];
            for (i, of_group) in of_groups.iter_mut().enumerate() {
                let group = group.wrapping_add((g + i * lanes) as u32);
                let p = s.mul_low_u32(s.add(s.splat(group as i32), iota), m0);
                let c2 = s.xor(s.high_u32(p), s.splat(((seed.stream >> 32) as u32 ^ keys[0][1]) as i32));
                let q = s.mul_low_u32(c2, m1);
                let c0 = s.xor(s.high_u32(q), s.splat((first as u32 ^ keys[1][0]) as i32));
                let third = s.mul_low_u32(c0, m0);
                *of_group = [s.xor(p, key(1, 1)), s.xor(q, key(2, 0)), s.xor(s.high_u32(third), key(2, 1)), third];
            }
            let mut r = 0;
            while r < rows {
                let mut c = [[s.splat(0); 4]; REGISTERS];
                for (i, c) in c.iter_mut().enumerate() {
                    let of_group = of_groups[i % GROUPS];
                    let row = row.wrapping_add(row_step.wrapping_mul((r + TOGETHER * (i / GROUPS)) as u32));
                    let [high, low] = if TOGETHER == 1 {
                        let p = u64::from(MULTIPLIERS[0]) * u64::from((first >> 32) as u32 ^ row ^ keys[0][0]);
                        [s.splat((p >> 32) as i32), s.splat(p as i32)]
                    } else {
                        let x = s.xor(s.add(s.splat(row as i32), rows_on), of_stream);
                        let p = s.mul_low_u32(x, m0);
                        [s.high_u32(p), p]
                    };
                    let p1 = s.mul_low_u32(s.xor(high, of_group[0]), m1);
                    let c2 = s.xor(of_group[2], low);
                    *c = [s.xor(s.high_u32(p1), of_group[1]), p1, c2, of_group[3]];
                }
                // Written out: a loop would be left rolled, with copies of its state.
                macro_rules! rounds {
                    ($($round:literal)*) => {$(
                        for c in &mut c {
                            let (p0, p1) = (s.mul_low_u32(c[0], m0), s.mul_low_u32(c[2], m1));
                            let (k0, k1) = (s.xor(c[1], key($round, 0)), s.xor(c[3], key($round, 1)));
                            let (c0, c2) = (s.xor(s.high_u32(p1), k0), s.xor(s.high_u32(p0), k1));
                            // Row by row within a round: left to itself, the compiler takes a row's rounds in one go.
                            *c = [s.in_order(c0), p1, s.in_order(c2), p0];
                        }
                    )*};
                }
                rounds!(3 4 5 6 7 8 9);
                for (i, c) in c.into_iter().enumerate() {
                    let (r, g) = (r + TOGETHER * (i / GROUPS), g + lanes * (i % GROUPS));
                    if r < rows {
                        // All of a product is asked for: to know the low half alone, compilers take a slower one.
                        let c = [c[0], s.in_order(c[1]), c[2], s.in_order(c[3])];
                        match columns {
                            None => s.store_counters(out.add(8 * (r * groups + g)), c),
                            Some(columns) => store_columns(s, c, 8 * g, r, [rows, columns], out),
                        }
                    }
                }
                r += TOGETHER * (REGISTERS / GROUPS);
            }
        }
    }
}
