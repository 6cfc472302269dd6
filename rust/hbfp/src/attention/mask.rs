//! Gradient of a mask that is added to the scores, P (dP − σ), summed where the mask was broadcast: the sums of
//! [`crate::sums`] over all that were added, in their order, without any of them in memory.
//!
//! ```text
//! per matrix of the mask, and segment of its rows     for each matrix of the batch that it was added to, in order:
//!   K, V → panels;  per strip of rows                   S, P again;  dP = dO Vᵀ;  sum += P (dP − σ)
//! ```
#![allow(unsafe_code, reason = "tasks that write disjoint rows")]

use super::fused::{Attention, BLOCK_ROWS, Sizes, TASKS_PER_WORKER, Workspace};
use crate::encode::{Context, check_size};
use crate::error::{Error, Result};
use crate::gemm::Coding;
use crate::gemm::strips::Pair;
use crate::mem::SharedMut;
use crate::parallel::for_each_task;
use crate::shape::FloatTensor;
use crate::sums::RunningSums;
use std::sync::PoisonError;

/// Most rows of a segment, for which K and V are laid out once more.
const SEGMENT_ROWS: usize = 4 * BLOCK_ROWS;

impl Attention<'_> {
    /// `out` ← gradient of the mask, row-major. `output` is the gradient of the output, [.., L, Ev]; `weights` are the
    /// encodings of dO and V for dP = dO Vᵀ, along Ev.
    ///
    /// # Shapes
    /// `shape`, that of the mask, has the dimensions of [.., L, S], or 1 in their place where it was broadcast; the last
    /// one is S. `summed` says whether it was broadcast at all: then sums start at +0.0, even of one element.
    ///
    /// # Errors
    /// As for [`Self::forward`].
    #[allow(clippy::too_many_arguments, reason = "what a backward pass knows")]
    pub fn mask_gradient(
        &self,
        ctx: &Context<'_>,
        output: &FloatTensor<'_>,
        weights: [Coding; 2],
        shape: &[usize],
        summed: bool,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.sizes()?;
        let Sizes { matrices, rows, columns, depth, width } = sizes;
        self.check_output(output, width)?;
        let last = self.q.shape().len() - 1;
        let whole = [&self.q.shape()[..last], &[columns]].concat();
        let fits = shape.len() == whole.len() && shape.iter().zip(&whole).all(|(&m, &n)| m == n || m == 1);
        if !fits || shape[last] != columns || (!summed && shape != whole) {
            let expected = format!("a mask of shape {whole:?}, or 1 in place of dimensions but the last");
            return Err(Error::shape(expected, format!("{shape:?}, summed: {summed}")));
        }
        check_size("elements of the mask's gradient", out.len(), shape.iter().product())?;
        let scores = Pair::new(ctx.kernels, self.scores, depth)?;
        let weights = Pair::new(ctx.kernels, weights, width)?;
        let (q, k, v, output) = (self.q.lines(last)?, self.k.lines(last)?, self.v.lines(last)?, output.lines(last)?);
        let mask = self.mask.as_ref().map(|mask| mask.lines(last)).transpose()?;
        // Which matrix of the mask was added to a matrix of the batch.
        let group_of = |matrix: usize| {
            let (mut rest, mut group, mut stride) = (matrix, 0, 1);
            for (&n, &m) in whole[..last - 1].iter().zip(&shape[..last - 1]).rev() {
                group += rest % n * stride * usize::from(m == n);
                rest /= n;
                stride *= m;
            }
            group
        };
        let groups: usize = shape[..last - 1].iter().product();
        // Rows of a mask that has but one are summed, too.
        let one_row = shape[last - 1] != rows;
        let count = matrices / groups.max(1) * if one_row { rows } else { 1 };
        let workers = ctx.workers(matrices * rows * columns);
        let segment = if one_row {
            rows
        } else {
            let wanted = if workers > 1 { (TASKS_PER_WORKER * workers).div_ceil(groups.max(1)) } else { 1 };
            rows.div_ceil(wanted).next_multiple_of(BLOCK_ROWS).min(SEGMENT_ROWS)
        };
        let segments = rows.div_ceil(segment);
        let out = SharedMut::new(out);
        let buffers = workspace.reserve(ctx);
        for_each_task(ctx.team, workers, groups * segments, &|worker, task| {
            let (group, first) = (task / segments, task % segments * segment);
            let part = first..rows.min(first + segment);
            let (start, len) = if one_row { (group, 1) } else { (group * rows + first, part.len()) };
            // SAFETY: every row of the mask belongs to one task.
            let sums = unsafe { out.part(start * columns, len * columns) };
            let mut buffers = buffers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let buffers = &mut *buffers;
            // What is not a sum keeps the sign of its zeros.
            let start = if summed { 0.0 } else { -0.0 };
            let mut sums = RunningSums::new(sums, count, start, std::mem::take(&mut buffers.partial));
            for (number, matrix) in (0..matrices).filter(|&matrix| group_of(matrix) == group).enumerate() {
                scores.lay_out_right(k.rows(matrix, 0..columns), &mut buffers.keys, &mut buffers.scratch);
                weights.lay_out_right(v.rows(matrix, 0..columns), &mut buffers.values, &mut buffers.scratch);
                for from in part.clone().step_by(BLOCK_ROWS) {
                    let strip = from..part.end.min(from + BLOCK_ROWS);
                    scores.lay_out_left(q.rows(matrix, strip.clone()), &mut buffers.queries, &mut buffers.scratch);
                    let outputs = &mut buffers.backward.outputs[0];
                    weights.lay_out_left(output.rows(matrix, strip.clone()), outputs, &mut buffers.scratch);
                    buffers.scores.reserve(strip.len(), columns);
                    buffers.backward.scores.reserve(strip.len(), columns);
                    self.weights(&scores, mask.as_ref(), (matrix, &strip), columns, buffers);
                    let size = [strip.len(), columns];
                    self.scores_gradient(&weights, size, matrix * rows + from, 1.0, buffers);
                    for (i, row) in strip.enumerate() {
                        let (row, number) = if one_row { (0, number * rows + row) } else { (row - first, number) };
                        sums.add(row, number, &buffers.backward.scores.row(i)[..columns]);
                    }
                }
            }
            buffers.partial = sums.finish();
        });
        Ok(())
    }
}
