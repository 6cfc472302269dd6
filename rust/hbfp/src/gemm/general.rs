//! Products outside the kernels' range, by their definition: wide codes, blocks of any length, exponents at the far
//! ends, NaN blocks. The same bits as the fast path.
#![allow(unsafe_code, reason = "tasks that write disjoint rows")]

use super::Epilogue;
use crate::arch::generic::product::{PANEL_ROWS, RIDER, b_block_bytes};
use crate::encode::Context;
use crate::encode::codes::Codes;
use crate::encode::panels::PanelLayout;
use crate::format::{CANONICAL_NAN, EXPONENT_OFFSET, NAN_EXPONENT};
use crate::mem::SharedMut;
use crate::parallel::for_each_task;

const NAN_SCALE: i32 = NAN_EXPONENT as i32 - EXPONENT_OFFSET;

/// d · 2^e rounded once to f32, |e| ≤ 300.
pub(crate) fn scaled(d: i64, e: i32) -> f32 {
    let magnitude = d.unsigned_abs();
    let excess = (64 - magnitude.leading_zeros() as i32 - 53).max(0);
    // Beyond 53 bits the lowest one collects what is cut off (rounding to odd), so that only the last step rounds.
    let lost = magnitude & ((1 << excess) - 1) != 0;
    let kept = (magnitude >> excess) | u64::from(lost);
    let power = f64::from_bits(((e + excess + 1023) as u64) << 52);
    let value = (kept as f64 * power) as f32;
    if d < 0 { -value } else { value }
}

/// A block's term; a NaN block makes it NaN.
fn term(d: i64, left: i32, right: i32) -> f32 {
    if left == NAN_SCALE || right == NAN_SCALE { CANONICAL_NAN } else { scaled(d, left + right) }
}

/// The last steps of every element: bias, and the one NaN that leaves.
#[inline]
pub(crate) fn finish(sum: f32, bias: Option<f32>) -> f32 {
    let value = bias.map_or(sum, |b| sum + b);
    if value.is_nan() { CANONICAL_NAN } else { value }
}

#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) matrices: usize,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) block: usize,
}

/// By codes, exact in 64-bit integers.
pub(crate) fn product(ctx: &Context<'_>, a: &Codes, b: &Codes, shape: Shape, out: &mut [f32], epilogue: Epilogue<'_>) {
    let Shape { matrices, m, n, k, block } = shape;
    let blocks = k.div_ceil(block);
    let out = SharedMut::new(out);
    for_each_task(ctx.team, ctx.workers(matrices * m * n * k), matrices * m, &|_, row| {
        // SAFETY: every row belongs to one task.
        let line = unsafe { out.part(row * n, n) };
        let matrix = row / m;
        for (j, out) in line.iter_mut().enumerate() {
            let column = matrix * n + j;
            let mut sum = if epilogue.accumulate { *out } else { 0.0 };
            for i in 0..blocks {
                let at = i * block..(i * block + block).min(k);
                let x = &a.codes[row * k..][at.clone()];
                let w = &b.codes[column * k..][at];
                let d: i64 = x.iter().zip(w).map(|(&x, &w)| i64::from(i32::from(x) * i32::from(w))).sum();
                let scale = |c: u8| i32::from(c) - EXPONENT_OFFSET;
                sum += term(d, scale(a.exponents[row * blocks + i]), scale(b.exponents[column * blocks + i]));
            }
            *out = finish(sum, epilogue.bias.map(|bias| bias[j]));
        }
    });
}

/// `out` ← one row of a product whose reduction is in pieces: piece p of the row is a line of `left` (or zeros), that of
/// column j line j of matrix p of `right`.
pub(crate) fn row_of_pieces(
    left: &Codes,
    pieces: &[Option<usize>],
    right: &Codes,
    out: &mut [f32],
    bias: Option<&[f32]>,
) {
    let (k, block, blocks) = (left.k, left.block, left.blocks());
    let scale = |c: u8| i32::from(c) - EXPONENT_OFFSET;
    let zeros = vec![0i16; k];
    for (j, out) in out.iter_mut().enumerate() {
        let mut sum = 0.0;
        for (p, &line) in pieces.iter().enumerate() {
            let column = p * right.lines + j;
            for b in 0..blocks {
                let at = b * block..(b * block + block).min(k);
                let (x, c) = match line {
                    Some(line) => (&left.codes[line * k..][at.clone()], left.exponents[line * blocks + b]),
                    None => (&zeros[at.clone()], 0),
                };
                let w = &right.codes[column * k..][at];
                let d: i64 = x.iter().zip(w).map(|(&x, &w)| i64::from(i32::from(x) * i32::from(w))).sum();
                sum += term(d, scale(c), scale(right.exponents[column * blocks + b]));
            }
        }
        *out = finish(sum, bias.map(|bias| bias[j]));
    }
}

/// C tile += A panel · B panel (of bytes), for any exponents.
pub(crate) fn tile(al: &PanelLayout, bl: &PanelLayout, a: &[u8], b: &[u8], c: &mut [f32]) {
    let word = |bytes: &[u8], at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let (steps, columns, offset) = (al.steps, bl.width, bl.offset());
    // Bytes of a line's step; a wide panel has 16-bit codes of k 0, 2, 1, 3.
    let a_step = (al.block_bytes - 32) / (PANEL_ROWS * steps);
    let code = |bytes: &[u8], j: usize| match a_step {
        4 => i64::from(bytes[j] as i8),
        _ => {
            let at = 2 * [0, 2, 1, 3][j];
            i64::from(i16::from_le_bytes([bytes[at], bytes[at + 1]]))
        }
    };
    let blocks = a.chunks_exact(al.block_bytes).zip(b.chunks_exact(b_block_bytes(steps, columns)));
    for (a, b) in blocks {
        for i in 0..PANEL_ROWS {
            let left = word(a, al.block_bytes - 16 + 4 * i) >> 23;
            for j in 0..columns {
                let right = word(b, 4 * columns * steps + 4 * j).wrapping_sub(RIDER) >> 23;
                let mut d = 0i64;
                for t in 0..steps {
                    let x = &a[a_step * (PANEL_ROWS * t + i)..][..a_step];
                    let w = &b[4 * (columns * t + j)..][..4];
                    d += (0..4).map(|j| code(x, j) * (i64::from(w[j]) - i64::from(offset))).sum::<i64>();
                }
                c[i * columns + j] += term(d, left, right);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::scaled;

    #[test]
    fn one_rounding_even_beyond_53_bits() {
        // 2^60 + 2^36 lies halfway between two f32; one more unit decides, and a double rounding would lose it.
        let half = (1i64 << 60) + (1 << 36);
        assert_eq!(scaled(half, -60), 1.0);
        assert_eq!(scaled(half + 1, -60), 1.0 + f32::EPSILON);
        assert_eq!(scaled(-half - 1, -60), -1.0 - f32::EPSILON);
        assert_eq!(scaled(3, -150), f32::from_bits(2), "a tie between subnormals goes to even");
        assert_eq!(scaled(1, -150), 0.0);
        assert_eq!(scaled(1, 128), f32::INFINITY);
        assert_eq!(scaled(i64::MIN, 0), -(2f32.powi(63)));
    }
}
