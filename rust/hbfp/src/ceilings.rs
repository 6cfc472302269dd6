//! What the machine gives at most: the multiply-add rate of a level and the rate of reading memory. Benches set their
//! figures beside these; no product uses them.
#![allow(unsafe_code, reason = "calls of kernels")]

use crate::arch::generic::matrix_unit::PEAK_ROUND;
use crate::arch::level::Level;
use crate::arch::simd::Simd;
use crate::encode::Context;
use crate::parallel::for_each_task;
use std::hint::black_box;

/// Independent chains of a multiply loop: latency times rate is at most 10 or 12 on CPUs known so far, and with the two
/// constants they fit sixteen registers.
const CHAINS: usize = 12;

/// Runs `rounds` rounds of multiply-adds in registers on each of the context's threads; returns the operations done,
/// a multiplication and an addition counted as two.
///
/// The instructions are those that the level's products stand on: vpmaddubsw for AVX2, vpdpbusd for AVX-512 VNNI, tdpbssd
/// for AMX, plain arithmetic for scalar. The vpaddw that follows each vpmaddubsw is left out: it has pipes of its own, and a loop with
/// both reaches 80 to 89 % on Zen 3 as their order happens to be, which a kernel may pass and so is no ceiling.
#[must_use]
pub fn multiply_adds(ctx: &Context<'_>, rounds: usize) -> u64 {
    let threads = ctx.threads.max(1);
    let kernels = ctx.kernels;
    if let Some(unit) = &kernels.matrix_unit {
        // SAFETY: `Kernels::of` vouches that the CPU runs the level.
        for_each_task(ctx.team, threads, threads, &|_, _| unsafe { (unit.peak)(black_box(rounds)) });
        return PEAK_ROUND * rounds as u64 * threads as u64;
    }
    let multiply = if kernels.level == Level::Avx2 { kernels.peak_pairs } else { kernels.peak_dot4 };
    for_each_task(ctx.team, threads, threads, &|_, _| {
        // SAFETY: `Kernels::of` vouches that the CPU runs the level.
        black_box(unsafe { multiply(black_box(rounds), black_box(0x0305_0709)) });
    });
    let products = 4 * (kernels.columns / 2) as u64;
    2 * products * CHAINS as u64 * rounds as u64 * threads as u64
}

/// Reads `memory` from end to end, `passes` times, each of the context's threads a part; returns the bytes read.
#[must_use]
pub fn read(ctx: &Context<'_>, memory: &[f32], passes: usize) -> u64 {
    let threads = ctx.threads.max(1);
    let part = memory.len().div_ceil(threads).max(1);
    for_each_task(ctx.team, threads, threads, &|_, task| {
        let Some(own) = memory.chunks(part).nth(task) else { return };
        for _ in 0..passes {
            let own = black_box(own);
            // SAFETY: the part is valid for reading its length in words; the CPU runs the level.
            black_box(unsafe { (ctx.kernels.read_words)(own.as_ptr().cast(), own.len()) });
        }
    });
    size_of_val(memory) as u64 * passes as u64
}

/// Each product feeds the next of its chain: a compiler can neither fold the loop nor move a product out of it.
///
/// # Safety
/// None beyond the token's; unsafe to share a signature with the table's other kernels.
#[inline(always)]
pub(crate) unsafe fn peak_pairs<S: Simd>(s: S, rounds: usize, seed: i32) -> i32 {
    let b = s.splat(seed & 0x7F7F_7F7F);
    let mut chains = [s.splat(seed); CHAINS];
    for (i, chain) in chains.iter_mut().enumerate() {
        *chain = s.add(*chain, s.splat(i as i32));
    }
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = s.mul_pairs(b, *chain);
        }
    }
    total(s, chains)
}

/// The same of four-byte dot products.
///
/// # Safety
/// None beyond the token's.
#[inline(always)]
pub(crate) unsafe fn peak_dot4<S: Simd>(s: S, rounds: usize, seed: i32) -> i32 {
    let b = s.splat(seed);
    let mut chains = [s.splat(seed); CHAINS];
    for (i, chain) in chains.iter_mut().enumerate() {
        *chain = s.add(*chain, s.splat(i as i32));
    }
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = s.dot4(*chain, b, *chain);
        }
    }
    total(s, chains)
}

/// The words at `p`, combined; every cache line of them is read.
///
/// # Safety
/// `p` is valid for reading `n` words.
#[inline(always)]
pub(crate) unsafe fn read_words<S: Simd>(s: S, p: *const i32, n: usize) -> i32 {
    let mut sums = [s.splat(0); CHAINS];
    let step = CHAINS * S::LANES;
    let whole = n / step * step;
    let mut at = 0;
    while at < whole {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `at` plus a step is at most `n`.
            *sum = s.xor(*sum, unsafe { s.load(p.add(at + i * S::LANES)) });
        }
        at += step;
    }
    let mut rest = 0;
    for i in whole..n {
        // SAFETY: below `n`.
        rest ^= unsafe { p.add(i).read() };
    }
    rest ^ total(s, sums)
}

#[inline(always)]
fn total<S: Simd>(s: S, registers: [S::V; CHAINS]) -> i32 {
    let mut sum = registers[0];
    for &register in &registers[1..] {
        sum = s.xor(sum, register);
    }
    s.reduce_max_i32(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::kernels::Kernels;

    fn on_every_level(check: impl Fn(&Context<'_>)) {
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            check(&Context { kernels: Kernels::of(level), ..Context::serial() });
        }
    }

    /// Counts that miss the number of threads or the lanes of a level would make a wrong ceiling look plausible.
    #[test]
    fn operations_are_counted() {
        on_every_level(|ctx| {
            let lanes = ctx.kernels.columns as u64 / 2;
            // Twelve chains of a register; four products of 16 × 16 by 64 on a unit.
            let products = if ctx.kernels.matrix_unit.is_some() { 4 * 16 * 16 * 64 } else { 12 * 4 * lanes };
            assert_eq!(multiply_adds(ctx, 10), 2 * products * 10);
            assert_eq!(multiply_adds(&Context { threads: 3, ..*ctx }, 10), 3 * 2 * products * 10);
        });
    }

    /// A loop that a compiler folded would take no longer for more rounds; the value it ends with depends on them.
    #[test]
    fn loops_compute_what_plain_arithmetic_does() {
        let (seed, rounds) = (0x0305_0709, 7);
        let chain = |i: i32| {
            let mut x = (seed + i).to_le_bytes();
            for _ in 0..rounds {
                let b = i32::to_le_bytes(seed);
                let half = |k: usize| {
                    let pair: i32 = (k..k + 2).map(|j| i32::from(b[j]) * i32::from(x[j] as i8)).sum();
                    (pair as u16).to_le_bytes()
                };
                let ([p, q], [r, t]) = (half(0), half(2));
                x = [p, q, r, t];
            }
            i32::from_le_bytes(x)
        };
        let expected = (0..CHAINS as i32).map(chain).fold(0, |a, b| a ^ b);
        let dot = |i: i32| {
            (0..rounds).fold(seed + i, |x, _| {
                let pairs = i32::to_le_bytes(seed).into_iter().zip(x.to_le_bytes());
                pairs.fold(x, |sum, (b, a)| sum.wrapping_add(i32::from(b) * i32::from(a as i8)))
            })
        };
        let expected_dot = (0..CHAINS as i32).map(dot).fold(0, |a, b| a ^ b);
        on_every_level(|ctx| {
            // SAFETY: the level is available.
            let found = unsafe { ((ctx.kernels.peak_pairs)(rounds, seed), (ctx.kernels.peak_dot4)(rounds, seed)) };
            assert_eq!(found, (expected, expected_dot), "{}", ctx.kernels.level);
        });
    }

    /// A stream that skipped words would be too fast: each word of every length changes the result.
    #[test]
    fn every_word_is_read() {
        on_every_level(|ctx| {
            for n in [0, 1, 15, 16, 95, 96, 97, 200, 400] {
                for changed in 0..n {
                    let mut words = vec![0i32; n];
                    words[changed] = 5;
                    // SAFETY: the vector holds `n` words; the level is available.
                    let found = unsafe { (ctx.kernels.read_words)(words.as_ptr(), n) };
                    assert_eq!(found, 5, "{}: word {changed} of {n}", ctx.kernels.level);
                }
            }
            let memory = vec![1.0; 1000];
            assert_eq!(read(&Context { threads: 3, ..*ctx }, &memory, 2), 8000);
            assert_eq!(read(ctx, &[], 2), 0);
        });
    }
}
