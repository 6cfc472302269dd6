//! What encoding a tensor costs it: the sums behind a signal-to-noise ratio, and what saturates or falls to zero.
#![allow(unsafe_code, reason = "reads rows that load_lines made readable, and tasks that write disjoint sums")]

use super::blocks::{Part, RoundingMode, Scratch, load_lines};
use super::codes::Codes;
use super::{Context, lines_axis, per_worker};
use crate::arch::generic::encode::STRIP;
use crate::error::Result;
use crate::format::{BlockFormat, BlockShape, EXPONENT_OFFSET, MAX_BLOCK, NAN_EXPONENT};
use crate::mem::SharedMut;
use crate::parallel::for_each_task;
use crate::shape::{FloatTensor, PlaneLayout};

/// Sums over the elements of the blocks that are not NaN blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Elements that are not zero.
    pub nonzero: u64,
    /// Σ x².
    pub signal: f64,
    /// Σ (x − q · 2^s)², for the codes as the encoding has them; what a code stands for may lie beyond f32.
    pub noise: f64,
    /// Elements with |x| > (Q + ½) · 2^s: their codes are ±Q in every rounding, more than half a step short.
    pub saturated: u64,
    /// Elements that are not zero and have the code 0.
    pub zeroed: u64,
    /// Blocks by exponent byte; NaN blocks stand at 255, blocks of zeros at 0.
    pub exponents: [u64; 256],
}

/// One task's share. Four lanes, element j of a line's block in lane j mod 4, so that sums need not wait for each other.
#[derive(Clone, Copy, Default)]
struct Sums {
    signal: [f64; LANES],
    noise: [f64; LANES],
    nonzero: u64,
    saturated: u64,
    zeroed: u64,
}

const LANES: usize = 4;

impl Sums {
    /// Elements of a line's block with their codes. Neither 2^2s nor any square leaves the range of f64.
    fn add(&mut self, x: &[f32], codes: &[i16], c: u8, max_code: i32) {
        let step = f64::from_bits(((1023 - i64::from(EXPONENT_OFFSET) + i64::from(c)) as u64) << 52);
        let limit = (f64::from(max_code) + 0.5) * step;
        // No more than MAX_BLOCK elements at a time: lanes of 32 bits count them.
        let (mut nonzero, mut saturated, mut zeroed) = ([0u32; LANES], [0u32; LANES], [0u32; LANES]);
        let mut add = |x: [f32; LANES], q: [i16; LANES]| {
            for i in 0..LANES {
                let wide = f64::from(x[i]);
                let error = wide - f64::from(q[i]) * step;
                self.signal[i] += wide * wide;
                self.noise[i] += error * error;
                nonzero[i] += u32::from(x[i] != 0.0);
                saturated[i] += u32::from(wide.abs() > limit);
                zeroed[i] += u32::from((x[i] != 0.0) & (q[i] == 0));
            }
        };
        let (x_lanes, x_rest) = x.as_chunks::<LANES>();
        let (q_lanes, q_rest) = codes.as_chunks::<LANES>();
        x_lanes.iter().zip(q_lanes).for_each(|(&x, &q)| add(x, q));
        if !x_rest.is_empty() {
            // Zeros add nothing to any sum.
            let (mut x, mut q) = ([0.0; LANES], [0; LANES]);
            x[..x_rest.len()].copy_from_slice(x_rest);
            q[..q_rest.len()].copy_from_slice(q_rest);
            add(x, q);
        }
        self.nonzero += u64::from(nonzero.iter().sum::<u32>());
        self.saturated += u64::from(saturated.iter().sum::<u32>());
        self.zeroed += u64::from(zeroed.iter().sum::<u32>());
    }
}

/// Measures the encoding of `x` in blocks along `axis` with exactly the codes that [`super::encode`] gives. The sums
/// have one order, whatever the number of threads.
///
/// # Errors
/// As [`super::encode`].
pub fn measure(
    ctx: &Context<'_>,
    x: &FloatTensor<'_>,
    format: BlockFormat,
    axis: usize,
    mode: RoundingMode,
) -> Result<Measured> {
    PlaneLayout::new(format, x.shape(), axis)?;
    let mut lines = x.lines(lines_axis(format, x.shape(), axis))?;
    if !matches!(format.shape(), BlockShape::Tile(_)) {
        lines.merge(); // tiles start afresh in each matrix
    }
    let codes = Codes::from_floats(ctx, &lines, format, mode);
    let (k, block, blocks) = (codes.k, codes.block, codes.blocks());
    let piece = block.min(MAX_BLOCK);
    let strips = lines.lines.div_ceil(STRIP);
    let mut sums = vec![Sums::default(); lines.matrices() * strips];
    let shared = SharedMut::new(&mut sums);
    let scratch = per_worker(ctx, Scratch::default);
    for_each_task(ctx.team, ctx.workers(codes.codes.len()), lines.matrices() * strips, &|worker, task| {
        let mut scratch = scratch[worker].lock().expect("one task a worker");
        scratch.reserve(piece);
        let (matrix, line) = (task / strips, task % strips * STRIP);
        let width = STRIP.min(lines.lines - line);
        // SAFETY: every sum belongs to one task.
        let sums = unsafe { &mut shared.part(task, 1)[0] };
        for at in (0..k).step_by(piece) {
            let part = Part { matrix, line, width, k: at, n: piece.min(k - at) };
            // The codes are known, so no random bits are asked for.
            let from = load_lines(ctx.kernels, &lines, part, RoundingMode::NEAREST_EVEN, &mut scratch);
            for l in 0..width {
                let row = matrix * lines.lines + line + l;
                let c = codes.exponents[row * blocks + at / block];
                if c != NAN_EXPONENT {
                    // SAFETY: load_lines made n elements readable.
                    let x = unsafe { std::slice::from_raw_parts(from.x[l], part.n) };
                    sums.add(x, &codes.codes[row * k + at..][..part.n], c, format.max_code());
                }
            }
        }
    });
    let mut out =
        Measured { nonzero: 0, signal: 0.0, noise: 0.0, saturated: 0, zeroed: 0, exponents: exponents_of(&codes) };
    for task in &sums {
        out.signal += task.signal.iter().sum::<f64>();
        out.noise += task.noise.iter().sum::<f64>();
        out.nonzero += task.nonzero;
        out.saturated += task.saturated;
        out.zeroed += task.zeroed;
    }
    Ok(out)
}

/// Blocks by exponent byte: codes repeat a tile's for each of its lines, and a tensor's for all.
fn exponents_of(codes: &Codes) -> [u64; 256] {
    let mut counts = [0; 256];
    let rows = codes.exponents.chunks_exact(codes.blocks().max(1));
    match codes.format.shape() {
        BlockShape::Line(_) => codes.exponents.iter().for_each(|&c| counts[usize::from(c)] += 1),
        BlockShape::Tile(t) => rows
            .enumerate()
            .filter(|(row, _)| (row % codes.lines.max(1)).is_multiple_of(t))
            .for_each(|(_, row)| row.iter().for_each(|&c| counts[usize::from(c)] += 1)),
        BlockShape::Tensor => codes.exponents.first().into_iter().for_each(|&c| counts[usize::from(c)] += 1),
    }
    counts
}
