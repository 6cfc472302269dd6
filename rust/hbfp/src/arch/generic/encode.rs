//! Encoding: largest magnitude, scaling, rounding, for lines that are contiguous (`row`) and for 32 neighbouring lines
//! whose elements lie side by side (`strip`).
//!
//! ```text
//! y = clamp(x · 2^−s, −Q, Q)              2^−s is one f32 for every s in −127…127; the product is exact, or so small
//!                                         that every rounding gives what the exact product gives
//! nearest even   q = RNE(y)               nearest away   q = t + trunc(2 (y − t)), t = trunc(y)
//! toward zero    q = trunc(y)             stochastic     q = (RNE(65536 y) + r) >> 16
//! ```

use crate::arch::simd::Simd;
use crate::format::Rounding;

/// Lines of a strip.
pub(crate) const STRIP: usize = 32;
/// Elements that the row kernels may read past a line of random bits and write past a line of codes.
pub(crate) const ROW_PADDING: usize = 64;

pub(crate) const NEAREST_EVEN: u8 = Rounding::NearestEven as u8;
pub(crate) const NEAREST_AWAY: u8 = Rounding::NearestAway as u8;
pub(crate) const TOWARD_ZERO: u8 = Rounding::TowardZero as u8;
pub(crate) const STOCHASTIC: u8 = Rounding::Stochastic as u8;

const MAGNITUDE: i32 = 0x7FFF_FFFF;

/// Scaling of one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scaling {
    /// 2^−s.
    pub(crate) inverse: f32,
    /// Q.
    pub(crate) limit: f32,
}

#[inline(always)]
fn round<S: Simd, const R: u8>(s: S, x: S::V, inverse: S::V, limit: S::V, minus_limit: S::V, random: S::V) -> S::V {
    let y = s.max_f32(s.min_f32(s.mul_f32(x, inverse), limit), minus_limit);
    match R {
        NEAREST_EVEN => s.round_to_i32(y),
        NEAREST_AWAY => {
            let t = s.truncate_to_i32(y);
            let rest = s.sub_f32(y, s.to_f32(t));
            s.add(t, s.truncate_to_i32(s.add_f32(rest, rest)))
        }
        TOWARD_ZERO => s.truncate_to_i32(y),
        _ => s.sar::<16>(s.add(s.round_to_i32(s.mul_f32(y, s.splat_f32(65536.0))), random)),
    }
}

/// Largest |x| of `n` contiguous elements, as bits.
///
/// # Safety
/// `x` is valid for reading `n` elements.
#[inline(always)]
pub(crate) unsafe fn amax_row<S: Simd>(s: S, x: *const f32, n: usize) -> u32 {
    // SAFETY: every access below is inside the n elements.
    unsafe {
        let magnitude = s.splat(MAGNITUDE);
        let mut m = [s.splat(0); 2];
        let mut i = 0;
        while i + 2 * S::LANES <= n {
            m[0] = s.max_i32(m[0], s.and(s.load(x.add(i).cast()), magnitude));
            m[1] = s.max_i32(m[1], s.and(s.load(x.add(i + S::LANES).cast()), magnitude));
            i += 2 * S::LANES;
        }
        if i + S::LANES <= n {
            m[0] = s.max_i32(m[0], s.and(s.load(x.add(i).cast()), magnitude));
            i += S::LANES;
        }
        let mut amax = s.reduce_max_i32(s.max_i32(m[0], m[1])) as u32;
        while i < n {
            amax = amax.max((*x.add(i)).to_bits() & MAGNITUDE as u32);
            i += 1;
        }
        amax
    }
}

/// Loads `take` ≤ 64 elements of a line's end, zeros after them.
///
/// # Safety
/// `x` is valid for reading `take` elements.
#[inline(always)]
unsafe fn padded_tail(x: *const f32, take: usize) -> [f32; ROW_PADDING] {
    let mut tail = [0.0; ROW_PADDING];
    // SAFETY: the caller vouches for the source; take ≤ 64.
    unsafe { std::ptr::copy_nonoverlapping(x, tail.as_mut_ptr(), take) };
    tail
}

/// Codes of `n` contiguous elements as i8; returns Σ of the codes with k mod 4 in {0, 1} and in {2, 3}.
///
/// # Safety
/// - `x` is valid for reading `n` elements;
/// - `random` is valid for reading `n + ROW_PADDING` elements if `R` is stochastic, else unused;
/// - `out` is valid for writing `n + ROW_PADDING` bytes; those past `n` become 0 up to a multiple of 4.
#[inline(always)]
pub(crate) unsafe fn round_row_i8<S: Simd, const R: u8>(
    s: S,
    x: *const f32,
    n: usize,
    scaling: Scaling,
    random: *const u16,
    out: *mut i8,
) -> [i32; 2] {
    // SAFETY: full chunks are inside n; the last one reads a padded copy, and writes within ROW_PADDING = 4 * 16.
    unsafe {
        let chunk = 4 * S::LANES;
        let (inverse, limit) = (s.splat_f32(scaling.inverse), s.splat_f32(scaling.limit));
        let minus = s.splat_f32(-scaling.limit);
        let mut sum = s.splat(0);
        let mut i = 0;
        while i < n {
            let tail;
            let mut p = x.add(i);
            if i + chunk > n {
                tail = padded_tail(p, n - i);
                p = tail.as_ptr();
            }
            let mut q = [s.splat(0); 4];
            for (j, q) in q.iter_mut().enumerate() {
                let r = if R == STOCHASTIC { s.load_u16(random.add(i + j * S::LANES)) } else { s.splat(0) };
                *q = round::<S, R>(s, s.load(p.add(j * S::LANES).cast()), inverse, limit, minus, r);
            }
            s.store_i8x4(out.add(i), q);
            sum = s.add(sum, s.add(s.add(q[0], q[1]), s.add(q[2], q[3])));
            i += chunk;
        }
        let mut lanes = [0i32; 16];
        s.store(lanes.as_mut_ptr(), sum);
        let mut sums = [0, 0];
        for (l, x) in lanes.iter().enumerate().take(S::LANES) {
            sums[l / 2 % 2] += x;
        }
        sums
    }
}

/// Codes of `n` contiguous elements as i16.
///
/// # Safety
/// As for [`round_row_i8`], with `out` valid for `n + ROW_PADDING` i16.
#[inline(always)]
pub(crate) unsafe fn round_row_i16<S: Simd, const R: u8>(
    s: S,
    x: *const f32,
    n: usize,
    scaling: Scaling,
    random: *const u16,
    out: *mut i16,
) {
    // SAFETY: as in round_row_i8, in chunks of two registers.
    unsafe {
        let chunk = 2 * S::LANES;
        let (inverse, limit) = (s.splat_f32(scaling.inverse), s.splat_f32(scaling.limit));
        let minus = s.splat_f32(-scaling.limit);
        let mut i = 0;
        while i < n {
            let tail;
            let mut p = x.add(i);
            if i + chunk > n {
                tail = padded_tail(p, n - i);
                p = tail.as_ptr();
            }
            let mut q = [s.splat(0); 2];
            for (j, q) in q.iter_mut().enumerate() {
                let r = if R == STOCHASTIC { s.load_u16(random.add(i + j * S::LANES)) } else { s.splat(0) };
                *q = round::<S, R>(s, s.load(p.add(j * S::LANES).cast()), inverse, limit, minus, r);
            }
            s.store_i16x2(out.add(i), q);
            i += chunk;
        }
    }
}

/// Values q · `scale` of `n` contiguous elements, scale = 2^s. `out` may be `x`.
///
/// # Safety
/// - `x` is valid for reading and `out` for writing `n` elements; they are equal or do not overlap;
/// - `random` is valid for reading `n + ROW_PADDING` elements if `R` is stochastic, else unused.
#[inline(always)]
pub(crate) unsafe fn quantize_row<S: Simd, const R: u8>(
    s: S,
    x: *const f32,
    n: usize,
    scaling: Scaling,
    scale: f32,
    random: *const u16,
    out: *mut f32,
) {
    // SAFETY: full registers are inside n; the last one goes through padded copies.
    unsafe {
        let (inverse, limit) = (s.splat_f32(scaling.inverse), s.splat_f32(scaling.limit));
        let minus = s.splat_f32(-scaling.limit);
        let scale = s.splat_f32(scale);
        let mut i = 0;
        while i + S::LANES <= n {
            let r = if R == STOCHASTIC { s.load_u16(random.add(i)) } else { s.splat(0) };
            let q = round::<S, R>(s, s.load(x.add(i).cast()), inverse, limit, minus, r);
            s.store(out.add(i).cast(), s.mul_f32(s.to_f32(q), scale));
            i += S::LANES;
        }
        if i < n {
            let mut tail = padded_tail(x.add(i), n - i);
            let r = if R == STOCHASTIC { s.load_u16(random.add(i)) } else { s.splat(0) };
            let q = round::<S, R>(s, s.load(tail.as_ptr().cast()), inverse, limit, minus, r);
            s.store(tail.as_mut_ptr().cast(), s.mul_f32(s.to_f32(q), scale));
            std::ptr::copy_nonoverlapping(tail.as_ptr(), out.add(i), n - i);
        }
    }
}

/// Copies `n` rows of a full strip side by side into `staging` and takes the largest |x| of every line, as bits.
///
/// # Safety
/// - row k of the strip, `x + k * stride`, is valid for reading `STRIP` elements, k < `n`;
/// - `staging` is valid for writing `n * STRIP` elements, `amax` for `STRIP`.
#[inline(always)]
pub(crate) unsafe fn stage_strip<S: Simd>(
    s: S,
    x: *const f32,
    stride: isize,
    n: usize,
    staging: *mut f32,
    amax: *mut i32,
) {
    // SAFETY: STRIP is a multiple of LANES; all accesses are inside the rows the caller vouches for.
    unsafe {
        let magnitude = s.splat(MAGNITUDE);
        let mut m = [s.splat(0); STRIP / 8];
        for k in 0..n {
            let row = x.offset(k as isize * stride);
            for (v, m) in m.iter_mut().enumerate().take(STRIP / S::LANES) {
                let x = s.load(row.add(v * S::LANES).cast());
                s.store(staging.add(k * STRIP + v * S::LANES).cast(), x);
                *m = s.max_i32(*m, s.and(x, magnitude));
            }
        }
        for (v, m) in m.iter().enumerate().take(STRIP / S::LANES) {
            s.store(amax.add(v * S::LANES), *m);
        }
    }
}

/// Codes of a staged strip as words of four consecutive k: `words[t][line]`, k = 4 t at the low byte; and per line Σ
/// of the codes with k mod 4 in {0, 1} and in {2, 3}.
///
/// # Safety
/// - `staging` and (if `R` is stochastic) `random` are valid for reading `4 * steps * STRIP` elements;
/// - `inverse` is valid for reading `STRIP` elements;
/// - `words` is valid for writing `steps * STRIP` words, `sums` for `2 * STRIP`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "what a strip is made of, and where it goes")]
pub(crate) unsafe fn round_strip<S: Simd, const R: u8>(
    s: S,
    staging: *const f32,
    steps: usize,
    inverse: *const f32,
    limit: f32,
    random: *const u16,
    words: *mut i32,
    sums: *mut i32,
) {
    // SAFETY: v * LANES < STRIP and 4 t + 3 < 4 steps keep every access inside what the caller vouches for.
    unsafe {
        let (limit, minus) = (s.splat_f32(limit), s.splat_f32(-limit));
        let byte = s.splat(0xFF);
        for v in (0..STRIP).step_by(S::LANES) {
            let inverse = s.load(inverse.add(v).cast());
            let mut sum = [s.splat(0); 2];
            for t in 0..steps {
                let mut q = [s.splat(0); 4];
                for (j, q) in q.iter_mut().enumerate() {
                    let at = (4 * t + j) * STRIP + v;
                    let r = if R == STOCHASTIC { s.load_u16(random.add(at)) } else { s.splat(0) };
                    *q = round::<S, R>(s, s.load(staging.add(at).cast()), inverse, limit, minus, r);
                }
                sum[0] = s.add(sum[0], s.add(q[0], q[1]));
                sum[1] = s.add(sum[1], s.add(q[2], q[3]));
                let low = s.or(s.and(q[0], byte), s.shl::<8>(s.and(q[1], byte)));
                let high = s.or(s.shl::<16>(s.and(q[2], byte)), s.shl::<24>(q[3]));
                s.store(words.add(t * STRIP + v), s.or(low, high));
            }
            s.store(sums.add(v), sum[0]);
            s.store(sums.add(STRIP + v), sum[1]);
        }
    }
}
