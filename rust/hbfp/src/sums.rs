//! Bias gradients: column sums whose order does not depend on threads.
#![allow(unsafe_code, reason = "tasks that write disjoint columns")]

use crate::encode::{Context, check_size};
use crate::error::Result;
use crate::format::CANONICAL_NAN;
use crate::mem::SharedMut;
use crate::parallel::for_each_task;

/// Rows that are summed before their sum joins the total.
const BLOCK: usize = 64;
/// Columns that a task takes.
const COLUMNS: usize = 256;

/// `out[j]` ← Σ over the rows of `x` [rows, columns]: rows in blocks of 64, each from +0.0 in row order, then the blocks
/// in order from +0.0.
///
/// # Errors
/// [`crate::Error::Shape`] when sizes do not fit.
pub fn column_sums(ctx: &Context<'_>, x: &[f32], out: &mut [f32]) -> Result<()> {
    let columns = out.len();
    if columns == 0 {
        return check_size("elements of x", x.len(), 0);
    }
    check_size("elements of x", x.len(), x.len() / columns * columns)?;
    let shared = SharedMut::new(out);
    for_each_task(ctx.team, ctx.workers(x.len()), columns.div_ceil(COLUMNS), &|_, task| {
        let from = task * COLUMNS;
        let width = COLUMNS.min(columns - from);
        // SAFETY: every column belongs to one task.
        let total = unsafe { shared.part(from, width) };
        total.fill(0.0);
        let mut partial = [0.0f32; COLUMNS];
        for block in x.chunks(BLOCK * columns) {
            let partial = &mut partial[..width];
            partial.fill(0.0);
            for row in block.chunks_exact(columns) {
                partial.iter_mut().zip(&row[from..from + width]).for_each(|(sum, &x)| *sum += x);
            }
            total.iter_mut().zip(&*partial).for_each(|(sum, &x)| *sum += x);
        }
        total.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = CANONICAL_NAN);
    });
    Ok(())
}
