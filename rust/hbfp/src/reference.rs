//! The contract, told slowly and obviously: what every kernel is tested against.
//!
//! Plain loops over single elements in f64, which holds every f32 scaled by any power of two of the contract exactly. It
//! shares the description of formats, the counter generator and nothing else with the kernels.

use crate::format::{BlockFormat, CANONICAL_NAN, ExponentRule, NAN_EXPONENT, Rounding};
use crate::rng::Seed;

/// 2^e.
fn power(e: i32) -> f64 {
    2f64.powi(e)
}

/// Exponent byte of a block, and whether it is a NaN block: by search, without looking at bits.
#[must_use]
pub fn exponent(format: &BlockFormat, block: &[f32]) -> u8 {
    if block.iter().any(|x| !x.is_finite()) {
        return NAN_EXPONENT;
    }
    let amax = block.iter().fold(0.0, |m: f64, &x| m.max(f64::from(x).abs()));
    if amax == 0.0 {
        return 0;
    }
    let width = i32::from(format.bits()) - 1;
    let max = f64::from(format.max_code());
    let fits = |e: i32| match format.rule() {
        ExponentRule::MaxExponent => amax < power(e),
        ExponentRule::Ceil => amax <= power(e),
        ExponentRule::NoClip => (amax * power(width - e)).round_ties_even() <= max,
    };
    let e = (-160..=160).find(|&e| fits(e)).unwrap_or(160);
    ((e - width).clamp(format.min_scale(), format.max_scale()) + 127) as u8
}

/// Code of one element under exponent byte `c`; `r` are its random bits.
#[must_use]
pub fn code(format: &BlockFormat, c: u8, x: f32, rounding: Rounding, r: u16) -> i16 {
    if c == NAN_EXPONENT {
        return 0;
    }
    let max = f64::from(format.max_code());
    let y = f64::from(x) * power(127 - i32::from(c));
    let q = match rounding {
        Rounding::NearestEven => y.round_ties_even().clamp(-max, max),
        Rounding::NearestAway => y.round().clamp(-max, max),
        Rounding::TowardZero => y.trunc().clamp(-max, max),
        Rounding::Stochastic => {
            let wide = (y * 65536.0).clamp(-max * 65536.0, max * 65536.0).round_ties_even();
            ((wide + f64::from(r)) / 65536.0).floor()
        }
    };
    q as i16
}

/// Codes and exponents of the lines of a matrix given by `element(line, k)`, blocks along k.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Lines.
    pub lines: usize,
    /// Elements of a line.
    pub k: usize,
    /// Length of blocks along a line.
    pub block: usize,
    /// Codes, line by line.
    pub codes: Vec<i16>,
    /// Exponent bytes, line by line.
    pub exponents: Vec<u8>,
}

/// Encodes lines in blocks along them; `random(line, k)` are the element's random bits.
pub fn encode(
    format: &BlockFormat,
    (lines, k, block): (usize, usize, usize),
    element: impl Fn(usize, usize) -> f32,
    rounding: Rounding,
    random: impl Fn(usize, usize) -> u16,
) -> Encoded {
    let mut out = Encoded { lines, k, block, codes: Vec::new(), exponents: Vec::new() };
    for line in 0..lines {
        for from in (0..k).step_by(block) {
            let values: Vec<f32> = (from..(from + block).min(k)).map(|j| element(line, j)).collect();
            let c = exponent(format, &values);
            out.exponents.push(c);
            for (j, &x) in values.iter().enumerate() {
                out.codes.push(code(format, c, x, rounding, random(line, from + j)));
            }
        }
    }
    out
}

/// Random bits of a row-major matrix whose lines are its rows (`by_line`) or its columns.
pub fn random(seed: Seed, by_line: bool) -> impl Fn(usize, usize) -> u16 {
    move |line, k| if by_line { seed.bits(line as u32, k) } else { seed.bits(k as u32, line) }
}

/// C[i, j] of two encoded operands: one rounding per block's term, one per sum.
#[must_use]
pub fn product(a: &Encoded, b: &Encoded, i: usize, j: usize, start: f32, bias: Option<f32>) -> f32 {
    assert_eq!((a.k, a.block), (b.k, b.block));
    let blocks = a.k.div_ceil(a.block);
    let mut sum = start;
    for t in 0..blocks {
        let (ca, cb) = (a.exponents[i * blocks + t], b.exponents[j * blocks + t]);
        let d: i128 = (t * a.block..((t + 1) * a.block).min(a.k))
            .map(|k| i128::from(a.codes[i * a.k + k]) * i128::from(b.codes[j * b.k + k]))
            .sum();
        assert!(d.unsigned_abs() < 1 << 53, "this oracle scales in f64");
        let term = if ca == NAN_EXPONENT || cb == NAN_EXPONENT {
            f32::NAN
        } else {
            (d as f64 * power(i32::from(ca) + i32::from(cb) - 254)) as f32
        };
        sum += term;
    }
    if let Some(bias) = bias {
        sum += bias;
    }
    if sum.is_nan() { CANONICAL_NAN } else { sum }
}
