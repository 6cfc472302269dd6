//! Bias gradients, and those of what was broadcast: column sums whose order does not depend on threads.
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

/// The sums of [`column_sums`] of rows that come one by one: several such sums side by side, each with rows of its own.
pub(crate) struct RunningSums<'a> {
    totals: &'a mut [f32],
    /// Of the open blocks. Empty where each sum has but one block, whose sum is the total.
    partial: Vec<f32>,
}

impl<'a> RunningSums<'a> {
    /// Sums of `rows` rows each, in `totals`, which start at `start`; `partial` is memory to work in.
    pub(crate) fn new(totals: &'a mut [f32], rows: usize, start: f32, mut partial: Vec<f32>) -> Self {
        totals.fill(start);
        partial.clear();
        partial.resize(if rows > BLOCK { totals.len() } else { 0 }, 0.0);
        Self { totals, partial }
    }

    /// Adds row `number` to sum `sum`; numbers of a sum ascend from 0.
    pub(crate) fn add(&mut self, sum: usize, number: usize, row: &[f32]) {
        let at = sum * row.len()..(sum + 1) * row.len();
        let total = &mut self.totals[at.clone()];
        if self.partial.is_empty() {
            return add(total, row);
        }
        let partial = &mut self.partial[at];
        if number.is_multiple_of(BLOCK) {
            add(total, partial);
            partial.fill(0.0);
        }
        add(partial, row);
    }

    /// Completes the totals; gives the memory back.
    pub(crate) fn finish(self) -> Vec<f32> {
        add(self.totals, &self.partial);
        self.totals.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = CANONICAL_NAN);
        self.partial
    }
}

fn add(sums: &mut [f32], row: &[f32]) {
    sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x);
}

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
                add(partial, &row[from..from + width]);
            }
            add(total, partial);
        }
        total.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = CANONICAL_NAN);
    });
    Ok(())
}
