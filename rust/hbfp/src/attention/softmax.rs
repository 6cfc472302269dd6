//! Softmax of rows and its derivative, with the library's own exponential.
//!
//! `crate::arch::generic::softmax` fixes the order of operations, so that all levels and threads give the same bits.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint rows")]

use crate::arch::generic::softmax::PARTIALS;
use crate::arch::kernels::Kernels;
use crate::encode::{Context, check_size, per_worker};
use crate::error::Result;
use crate::format::CANONICAL_NAN;
use crate::mem::SharedMut;
use crate::parallel::for_each_task;

/// Rows that a task takes.
const ROWS: usize = 16;

/// Softmax of matrices of scores, row by row, in place.
#[derive(Clone, Copy, Debug)]
pub struct Softmax<'a> {
    /// Rows of a matrix.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Factor of the scores, applied before the mask.
    pub scale: f32,
    /// Whether column j of row i counts only if j ≤ i.
    pub causal: bool,
    /// Added to the scaled scores, as many elements as there are scores.
    pub mask: Option<&'a [f32]>,
}

impl Softmax<'_> {
    /// Replaces `scores` [matrices, rows, columns] by their softmax. Rows that are masked throughout become zeros.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] when sizes do not fit.
    pub fn apply(&self, ctx: &Context<'_>, scores: &mut [f32]) -> Result<()> {
        let Self { rows, columns, scale, causal, mask } = *self;
        if rows * columns == 0 {
            return check_size("scores", scores.len(), 0);
        }
        let count = scores.len() / columns;
        check_size("scores", scores.len(), count.div_ceil(rows) * rows * columns)?;
        if let Some(mask) = mask {
            check_size("elements of the mask", mask.len(), scores.len())?;
        }
        let padded = columns.next_multiple_of(PARTIALS);
        let len = scores.len();
        let shared = SharedMut::new(scores);
        let buffers = per_worker(ctx, || vec![0.0f32; padded]);
        for_each_task(ctx.team, ctx.workers(len), count.div_ceil(ROWS), &|worker, task| {
            let mut buffer = buffers[worker].lock().expect("one task a worker");
            for row in task * ROWS..((task + 1) * ROWS).min(count) {
                // SAFETY: every row belongs to one task.
                let scores = unsafe { shared.part(row * columns, columns) };
                let visible = if causal { (row % rows + 1).min(columns) } else { columns };
                let mask = mask.map_or(std::ptr::null(), |mask| mask[row * columns..][..visible].as_ptr());
                // SAFETY: the buffer holds whole groups; scores and mask have `visible` elements.
                unsafe { softmax_row(ctx.kernels, scores.as_ptr(), &mut buffer, visible, scale, mask) };
                scores[..visible].copy_from_slice(&buffer[..visible]);
                scores[visible..].fill(0.0);
            }
        });
        Ok(())
    }
}

/// The first `visible` elements of `out` ← softmax of as many scores, scaled and masked. Behind them, up to a whole
/// group of partial sums, `out` is overwritten.
///
/// # Safety
/// `scores` and `mask`, unless null, are valid for reading `visible` elements; `scores` is `out` or apart from it.
///
/// # Panics
/// If `out` is shorter than the groups.
pub(super) unsafe fn softmax_row(
    kernels: &Kernels,
    scores: *const f32,
    out: &mut [f32],
    visible: usize,
    scale: f32,
    mask: *const f32,
) {
    let used = visible.next_multiple_of(PARTIALS);
    assert!(used <= out.len());
    // SAFETY: the caller vouches for the inputs; `used` elements, a multiple of PARTIALS, lie inside `out`.
    unsafe {
        (kernels.scale_row)(scores, out.as_mut_ptr(), visible, scale, mask);
        out[visible..used].fill(f32::NEG_INFINITY);
        (kernels.softmax_row)(out.as_mut_ptr(), used);
    }
}

/// `grad` ← scale · p · (grad − Σ p · grad) for every row of `columns` elements.
///
/// # Errors
/// [`crate::Error::Shape`] when sizes do not fit.
pub fn softmax_backward(ctx: &Context<'_>, p: &[f32], grad: &mut [f32], columns: usize, scale: f32) -> Result<()> {
    check_size("elements of grad", grad.len(), p.len())?;
    if p.is_empty() {
        return Ok(());
    }
    let count = p.len() / columns;
    check_size("elements of p", p.len(), count * columns)?;
    let padded = columns.next_multiple_of(PARTIALS);
    let shared = SharedMut::new(grad);
    let buffers = per_worker(ctx, || vec![0.0f32; 2 * padded]);
    for_each_task(ctx.team, ctx.workers(p.len()), count.div_ceil(ROWS), &|worker, task| {
        let mut buffer = buffers[worker].lock().expect("one task a worker");
        let (probabilities, gradient) = buffer.split_at_mut(padded);
        for row in task * ROWS..((task + 1) * ROWS).min(count) {
            // SAFETY: every row belongs to one task.
            let grad = unsafe { shared.part(row * columns, columns) };
            probabilities[..columns].copy_from_slice(&p[row * columns..][..columns]);
            gradient[..columns].copy_from_slice(grad);
            // SAFETY: both buffers hold `padded` elements, zeros past `columns`.
            unsafe { (ctx.kernels.softmax_backward_row)(probabilities.as_ptr(), gradient.as_mut_ptr(), padded, scale) };
            for (out, &g) in grad.iter_mut().zip(&*gradient) {
                *out = if g.is_nan() { CANONICAL_NAN } else { g };
            }
            // A NaN row leaves NaNs in the padding.
            gradient[columns..].fill(0.0);
        }
    });
    Ok(())
}
