//! Softmax of a row, its derivative and its dropout, in f32 with a fixed order of operations, so that every level gives the same bits.
//!
//! ```text
//! exp(x), x ≤ 0:  n = RNE(x · log2 e); r = (x − n · ln2_hi) − n · ln2_lo; Horner in r; times 2^n;   0 below −87
//! sums:           16 partial sums, column j in sum j mod 16, columns ascending; then sums i and i + 8, 4, 2, 1
//! ```
//! Multiplications and additions are separate roundings. The polynomial's coefficients are the Taylor series up to
//! r^7 / 7!, |r| ≤ ln 2 / 2, which is within 1 unit in the last place of the exponential.

use crate::arch::simd::Simd;

/// Partial sums of a row.
pub(crate) const PARTIALS: usize = 16;
const EXP_MIN: f32 = -87.0;
const LN2_HI: f32 = 355.0 / 512.0; // so that n · LN2_HI is exact
const LN2_LO: f32 = -2.121_944_4e-4;
const COEFFICIENTS: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

#[inline(always)]
fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let floor = s.splat_f32(EXP_MIN);
    let clamped = s.max_f32(x, floor);
    let n = s.round_to_i32(s.mul_f32(clamped, s.splat_f32(std::f32::consts::LOG2_E)));
    let nf = s.to_f32(n);
    let r = s.sub_f32(clamped, s.mul_f32(nf, s.splat_f32(LN2_HI)));
    let r = s.sub_f32(r, s.mul_f32(nf, s.splat_f32(LN2_LO)));
    let mut p = s.splat_f32(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = s.add_f32(s.mul_f32(p, r), s.splat_f32(*c));
    }
    // n ≥ −126: the power is a normal number.
    let power = s.shl::<23>(s.add(n, s.splat(127)));
    s.keep_if_ge_f32(x, floor, s.mul_f32(p, power))
}

#[inline(always)]
fn tree_sum(mut partial: [f32; PARTIALS]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            partial[i] += partial[i + half];
        }
    }
    partial[0]
}

/// `out[..n]` ← `x[..n]` · `scale`, plus `mask[..n]` unless that is null. `out` may be `x`.
///
/// # Safety
/// `x` and `mask`, unless null, are valid for reading and `out` for writing `n` elements; `out` is `x` or apart from it.
#[inline(always)]
pub(crate) unsafe fn scale_row<S: Simd>(s: S, x: *const f32, out: *mut f32, n: usize, scale: f32, mask: *const f32) {
    // SAFETY: all accesses are below n.
    unsafe {
        let factor = s.splat_f32(scale);
        let whole = n - n % S::LANES;
        for j in (0..whole).step_by(S::LANES) {
            let mut y = s.mul_f32(s.load(x.add(j).cast()), factor);
            if !mask.is_null() {
                y = s.add_f32(y, s.load(mask.add(j).cast()));
            }
            s.store(out.add(j).cast(), y);
        }
        for j in whole..n {
            let y = x.add(j).read() * scale;
            out.add(j).write(if mask.is_null() { y } else { y + mask.add(j).read() });
        }
    }
}

/// `row[..n]` ← softmax, in place; `row` is padded to whole groups of [`PARTIALS`] with −∞. A row whose largest value
/// is −∞ becomes zeros; a row that holds +∞ or a NaN becomes canonical NaNs.
///
/// # Safety
/// `row` is valid for reading and writing `n` elements, `n` a multiple of [`PARTIALS`].
#[inline(always)]
pub(crate) unsafe fn softmax_row<S: Simd>(s: S, row: *mut f32, n: usize) {
    debug_assert!(n.is_multiple_of(PARTIALS));
    // SAFETY: j + LANES ≤ n, as LANES divides PARTIALS.
    unsafe {
        let mut top = s.splat_f32(f32::NEG_INFINITY);
        let mut bits = s.splat(0);
        for j in (0..n).step_by(S::LANES) {
            let x = s.load(row.add(j).cast());
            // As integers, so that NaNs are seen; they never reach the floating-point maximum's result unnoticed.
            bits = s.max_i32(bits, s.and(x, s.splat(0x7FFF_FFFF)));
            top = s.max_f32(x, top);
        }
        let mut lanes = [f32::NEG_INFINITY; 16];
        s.store(lanes.as_mut_ptr().cast(), top);
        let top = lanes.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        let fill = if s.reduce_max_i32(bits) > 0x7F80_0000 || top == f32::INFINITY {
            Some(crate::format::CANONICAL_NAN)
        } else if top == f32::NEG_INFINITY {
            Some(0.0)
        } else {
            None
        };
        if let Some(value) = fill {
            for j in 0..n {
                row.add(j).write(value);
            }
            return;
        }
        let top = s.splat_f32(top);
        let mut sums = [s.splat(0); PARTIALS / 8];
        for j in (0..n).step_by(PARTIALS) {
            for (v, sum) in sums.iter_mut().enumerate().take(PARTIALS / S::LANES) {
                let at = row.add(j + v * S::LANES).cast::<i32>();
                let e = exp(s, s.sub_f32(s.load(at), top));
                s.store(at, e);
                *sum = s.add_f32(*sum, e);
            }
        }
        let mut partial = [0.0f32; PARTIALS];
        for (v, sum) in sums.iter().enumerate().take(PARTIALS / S::LANES) {
            s.store(partial.as_mut_ptr().add(v * S::LANES).cast(), *sum);
        }
        let total = s.splat_f32(tree_sum(partial));
        for j in (0..n).step_by(S::LANES) {
            let at = row.add(j).cast::<i32>();
            s.store(at, s.div_f32(s.load(at), total));
        }
    }
}

/// `grad[..n]` ← `scale` · (p · (grad − Σ p · grad)), in place; both padded with zeros to whole groups of [`PARTIALS`].
///
/// # Safety
/// `p` is valid for reading and `grad` for reading and writing `n` elements, `n` a multiple of [`PARTIALS`].
#[inline(always)]
pub(crate) unsafe fn softmax_backward_row<S: Simd>(s: S, p: *const f32, grad: *mut f32, n: usize, scale: f32) {
    debug_assert!(n.is_multiple_of(PARTIALS));
    // SAFETY: j + LANES ≤ n, as LANES divides PARTIALS.
    unsafe {
        let mut sums = [s.splat(0); PARTIALS / 8];
        for j in (0..n).step_by(PARTIALS) {
            for (v, sum) in sums.iter_mut().enumerate().take(PARTIALS / S::LANES) {
                let at = j + v * S::LANES;
                *sum = s.add_f32(*sum, s.mul_f32(s.load(p.add(at).cast()), s.load(grad.add(at).cast())));
            }
        }
        let mut partial = [0.0f32; PARTIALS];
        for (v, sum) in sums.iter().enumerate().take(PARTIALS / S::LANES) {
            s.store(partial.as_mut_ptr().add(v * S::LANES).cast(), *sum);
        }
        let total = s.splat_f32(tree_sum(partial));
        let scale = s.splat_f32(scale);
        for j in (0..n).step_by(S::LANES) {
            let at = grad.add(j).cast::<i32>();
            let g = s.sub_f32(s.load(at), total);
            s.store(at, s.mul_f32(s.mul_f32(s.load(p.add(j).cast()), g), scale));
        }
    }
}

/// `out[..n]` ← `x[..n]` · `factor` where the random bits are `dropped` or more, +0.0 elsewhere. `out` may be `x`.
///
/// # Safety
/// `x` and `random` are valid for reading and `out` for writing `n` elements; `out` is `x` or apart from it.
#[inline(always)]
pub(crate) unsafe fn drop_row<S: Simd>(
    s: S,
    x: *const f32,
    out: *mut f32,
    random: *const u16,
    n: usize,
    dropped: i32,
    factor: f32,
) {
    // SAFETY: all accesses are below n.
    unsafe {
        let (wide_factor, largest) = (s.splat_f32(factor), s.splat(dropped - 1));
        let whole = n - n % S::LANES;
        for j in (0..whole).step_by(S::LANES) {
            let kept = s.sar::<31>(s.sub(largest, s.load_u16(random.add(j))));
            s.store(out.add(j).cast(), s.and(kept, s.mul_f32(s.load(x.add(j).cast()), wide_factor)));
        }
        for j in whole..n {
            let kept = i32::from(random.add(j).read()) >= dropped;
            out.add(j).write(if kept { x.add(j).read() * factor } else { 0.0 });
        }
    }
}
