//! Philox4x32-10 on `LANES / 2` counters a register, as many registers interleaved as fit without spilling: two of 16,
//! four of 32. A round of a register is 2 multiplications, 2 shifts and 4 exclusive ors.

use crate::arch::simd::Simd;
use crate::rng::{MULTIPLIERS, ROUNDS, Seed, WEYL};

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

const IOTA: [u32; 16] = [0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0];

/// Writes the random bits of the rectangle, row after row, `8 * groups` a row.
///
/// # Safety
/// `out` is valid for writing `8 * rows * groups + RANDOM_PADDING` elements.
#[inline(always)]
pub(crate) unsafe fn fill_random<S: Simd>(s: S, seed: Seed, counters: Counters, out: *mut u16) {
    let lanes = S::LANES / 2;
    let Counters { row, row_step, rows, group, groups } = counters;
    let total = rows * groups;
    let batch = if S::LANES == 16 { 4 } else { 2 };
    // SAFETY: the arrays hold a register each; a batch of at most 4 * lanes ≤ 32 counters that starts before `total` ends
    // less than 32 counters behind it, which the padding covers.
    unsafe {
        let iota = s.load(IOTA.as_ptr().cast());
        let (m0, m1) = (s.splat(MULTIPLIERS[0] as i32), s.splat(MULTIPLIERS[1] as i32));
        let mut keys = [[s.splat(0); 2]; ROUNDS];
        let (mut k0, mut k1) = (seed.seed as u32, (seed.seed >> 32) as u32);
        for key in &mut keys {
            *key = [s.splat(k0 as i32), s.splat(k1 as i32)];
            (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
        }
        let stream = [s.splat(seed.stream as u32 as i32), s.splat((seed.stream >> 32) as u32 as i32)];
        let (mut r, mut g) = (row, 0);
        let mut done = 0;
        while done < total {
            let mut c = [[s.splat(0); 4]; 4];
            for c in c.iter_mut().take(batch) {
                if groups % lanes == 0 {
                    // A register never crosses a row.
                    c[0] = s.add(s.splat(group.wrapping_add(g as u32) as i32), iota);
                    c[1] = s.splat(r as i32);
                    g += lanes;
                    if g == groups {
                        (r, g) = (r.wrapping_add(row_step), 0);
                    }
                } else {
                    let (mut c0, mut c1) = ([0u32; 16], [0u32; 16]);
                    for l in 0..lanes {
                        c0[2 * l] = group.wrapping_add(g as u32);
                        c1[2 * l] = r;
                        g += 1;
                        if g == groups {
                            (r, g) = (r.wrapping_add(row_step), 0);
                        }
                    }
                    c[0] = s.load(c0.as_ptr().cast());
                    c[1] = s.load(c1.as_ptr().cast());
                }
                (c[2], c[3]) = (stream[0], stream[1]);
            }
            for key in &keys {
                for c in c.iter_mut().take(batch) {
                    let (p0, p1) = (s.mul_low_u32(c[0], m0), s.mul_low_u32(c[2], m1));
                    // Only the low half of each 64-bit lane counts; products leave their high halves behind.
                    let (k0, k1) = (s.xor(c[1], key[0]), s.xor(c[3], key[1]));
                    *c = [s.xor(s.high_u32(p1), k0), p1, s.xor(s.high_u32(p0), k1), p0];
                }
            }
            for (j, c) in c.into_iter().enumerate().take(batch) {
                s.store_counters(out.add(8 * (done + j * lanes)), c);
            }
            done += batch * lanes;
        }
    }
}
