//! Bias gradients, and those of what was broadcast: column sums whose order does not depend on threads.
#![allow(unsafe_code, reason = "tasks that write disjoint columns")]

use crate::arch::generic::encode::STRIP;
use crate::encode::{Context, check_size};
use crate::error::Result;
use crate::format::CANONICAL_NAN;
use crate::mem::{AlignedBytes, SharedMut};
use crate::parallel::{DefaultFloatMode, for_each_task};
use crate::shape::FloatLines;

/// Rows that are summed before their sum joins the total.
pub(crate) const BLOCK: usize = 64;
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
    // SAFETY: as many rows of the slice.
    let lines = unsafe { FloatLines::of_rows(x.as_ptr(), [x.len() / columns, columns], columns, false, 0) };
    line_sums(ctx, &lines, out);
    Ok(())
}

/// Sums over the lines of one matrix, as [`column_sums`] sums columns; of blocks that are summed on the way, if there are.
pub(crate) struct LineSums<'a> {
    lines: FloatLines<'a>,
    out: &'a mut [f32],
    /// [blocks, lines].
    blocks: Option<SharedMut<'a, f32>>,
}

impl<'a> LineSums<'a> {
    /// # Errors
    /// [`crate::Error::Shape`] for another number of sums.
    pub(crate) fn new(lines: FloatLines<'a>, out: &'a mut [f32]) -> Result<Self> {
        debug_assert_eq!(lines.matrices(), 1);
        check_size("sums of lines", out.len(), lines.lines)?;
        Ok(Self { lines, out, blocks: None })
    }

    /// Where somebody else writes the sums of all blocks, by [`sum_block`].
    pub(crate) fn by_blocks(&mut self, memory: &'a mut AlignedBytes) -> SharedMut<'a, f32> {
        let len = self.lines.k.div_ceil(BLOCK) * self.out.len();
        // SAFETY: so many were just reserved, and are borrowed.
        let sums = unsafe { SharedMut::from_raw(memory.reserve(size_of::<f32>() * len).as_ptr().cast(), len) };
        *self.blocks.insert(sums)
    }

    /// Once the blocks are summed, if they are.
    pub(crate) fn finish(self, ctx: &Context<'_>) {
        let Some(blocks) = self.blocks else { return line_sums(ctx, &self.lines, self.out) };
        let _mode = DefaultFloatMode::enter();
        // SAFETY: nobody writes to them any more.
        let blocks = unsafe { blocks.part(0, blocks.len()) };
        let mut all = RunningSums::new(self.out, BLOCK, 0.0, Vec::new());
        blocks.chunks_exact(self.lines.lines.max(1)).enumerate().for_each(|(i, block)| all.add(0, i, block));
        all.finish();
    }
}

/// Adds the rows of a block to its sums, from +0.0 on; both are parts of as many lines.
pub(crate) fn sum_block<'a>(rows: impl Iterator<Item = &'a [f32; STRIP]>, sums: &mut [f32]) {
    let mut partial = [0.0f32; STRIP];
    rows.for_each(|row| add(&mut partial, row));
    sums.copy_from_slice(&partial[..sums.len()]);
}

/// `out[l]` ← the sum over line l of one matrix, as [`column_sums`] sums columns.
fn line_sums(ctx: &Context<'_>, x: &FloatLines<'_>, out: &mut [f32]) {
    let shared = SharedMut::new(out);
    for_each_task(ctx.team, ctx.workers(x.lines * x.k), x.lines.div_ceil(COLUMNS), &|_, task| {
        let from = task * COLUMNS;
        let width = COLUMNS.min(x.lines - from);
        // SAFETY: every line belongs to one task.
        let total = unsafe { shared.part(from, width) };
        total.fill(0.0);
        let mut partial = [0.0f32; COLUMNS];
        let partial = &mut partial[..width];
        for block in (0..x.k).step_by(BLOCK) {
            partial.fill(0.0);
            for k in block..(block + BLOCK).min(x.k) {
                let first = x.at(0, from, k);
                if x.line_stride == 1 {
                    // SAFETY: neighbours, inside the matrix.
                    add(partial, unsafe { std::slice::from_raw_parts(first, width) });
                } else {
                    for (l, sum) in partial.iter_mut().enumerate() {
                        // SAFETY: inside the matrix.
                        *sum += unsafe { *first.wrapping_offset(l as isize * x.line_stride) };
                    }
                }
            }
            add(total, partial);
        }
        total.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = CANONICAL_NAN);
    });
}
