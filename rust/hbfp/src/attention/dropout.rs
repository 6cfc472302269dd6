//! Dropout of the softmax: which elements are kept follows from their place, so nothing of it is ever held.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint rows")]

use crate::arch::generic::philox::{Counters, RANDOM_PADDING};
use crate::arch::kernels::Kernels;
use crate::encode::{Context, check_size, per_worker};
use crate::error::{Error, Result};
use crate::gemm::strips::PaddedRows;
use crate::mem::SharedMut;
use crate::parallel::for_each_task;
use crate::rng::Seed;
use std::ops::Range;

/// Rows whose random bits are drawn in one go.
const ROWS: usize = 4;
/// Rows that a task takes.
const TASK_ROWS: usize = 16;
/// Of a share of 1.
const ALL: u32 = 1 << 16;

/// Sets elements of [.., L, S] to +0.0 and multiplies the others, so that the expectation stays what it was.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    dropped: u32,
    seed: Seed,
}

impl Dropout {
    /// Drops so many elements of 2^16, chosen by the random bits of `seed` and stream 0.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than 2^16.
    pub fn new(dropped: u32, seed: u64) -> Result<Self> {
        if dropped > ALL {
            return Err(Error::shape("at most 65536 of 65536 elements to drop", dropped.to_string()));
        }
        Ok(Self { dropped, seed: Seed { seed, stream: 0 } })
    }

    /// What elements that are kept are multiplied by.
    pub(super) fn factor(&self) -> f32 {
        if self.dropped == ALL { 0.0 } else { ALL as f32 / (ALL - self.dropped) as f32 }
    }

    /// Row i of `to` ← row i of `from`, or of `to` itself, dropped: so many rows and columns, whose random bits are those
    /// of the rows from `first` on.
    pub(super) fn rows(
        &self,
        kernels: &Kernels,
        mut from: Option<&mut PaddedRows>,
        to: &mut PaddedRows,
        [rows, columns]: [usize; 2],
        first: usize,
        random: &mut Vec<u16>,
    ) {
        for start in (0..rows).step_by(ROWS) {
            let bits = Bits::draw(self, kernels, first + start..first + rows.min(start + ROWS), columns, random);
            for (i, bits) in (start..rows).zip(bits.rows()) {
                let to = to.row(i)[..columns].as_mut_ptr();
                let from = from.as_mut().map_or(to.cast_const(), |from| from.row(i)[..columns].as_ptr());
                // SAFETY: as many elements in each; a row of `from` is another buffer's.
                unsafe { self.row(kernels, from, to, columns, bits) };
            }
        }
    }

    /// # Safety
    /// `from` and `to` are valid for reading and writing `columns` elements; they are one or lie apart.
    unsafe fn row(&self, kernels: &Kernels, from: *const f32, to: *mut f32, columns: usize, bits: &[u16]) {
        assert!(columns <= bits.len());
        // SAFETY: the caller vouches for `from` and `to`; the bits were measured.
        unsafe { (kernels.drop_row)(from, to, bits.as_ptr(), columns, self.dropped as i32, self.factor()) };
    }

    /// The same of a whole tensor [.., columns], row-major and in place.
    ///
    /// # Errors
    /// [`Error::Shape`] where `x` is not whole rows, or more than 2^32.
    pub fn apply(&self, ctx: &Context<'_>, x: &mut [f32], columns: usize) -> Result<()> {
        let count = x.len() / columns.max(1);
        check_size("elements of x", x.len(), count * columns)?;
        if count as u64 > 1 << 32 {
            return Err(Error::shape("at most 2^32 rows", count.to_string()));
        }
        let len = x.len();
        let shared = SharedMut::new(x);
        let buffers = per_worker(ctx, Vec::new);
        for_each_task(ctx.team, ctx.workers(len), count.div_ceil(TASK_ROWS), &|worker, task| {
            let mut random = buffers[worker].lock().expect("one task a worker");
            for start in (task * TASK_ROWS..count.min((task + 1) * TASK_ROWS)).step_by(ROWS) {
                let rows = start..count.min(start + ROWS);
                let bits = Bits::draw(self, ctx.kernels, rows.clone(), columns, &mut random);
                for (row, bits) in rows.zip(bits.rows()) {
                    // SAFETY: every row belongs to one task.
                    let x = unsafe { shared.part(row * columns, columns) }.as_mut_ptr();
                    // SAFETY: in place.
                    unsafe { self.row(ctx.kernels, x, x, columns, bits) };
                }
            }
        });
        Ok(())
    }
}

/// Random bits of a few rows, one behind the other.
struct Bits<'a> {
    bits: &'a [u16],
    stride: usize,
}

impl<'a> Bits<'a> {
    fn draw(
        dropout: &Dropout,
        kernels: &Kernels,
        rows: Range<usize>,
        columns: usize,
        random: &'a mut Vec<u16>,
    ) -> Self {
        let groups = columns.div_ceil(8);
        let (stride, count) = (8 * groups, rows.len());
        random.resize(random.len().max(ROWS * stride + RANDOM_PADDING), 0);
        assert!(count <= ROWS);
        // Fewer than 2^32 rows, and 2^35 columns: a row of those would not be in memory.
        let counters = Counters { row: rows.start as u32, row_step: 1, rows: count, group: 0, groups };
        // SAFETY: room for the rectangle and its padding.
        unsafe { (kernels.fill_random)(dropout.seed, counters, random.as_mut_ptr()) };
        Self { bits: &random[..count * stride], stride }
    }

    fn rows(&self) -> impl Iterator<Item = &'a [u16]> {
        self.bits.chunks_exact(self.stride.max(1))
    }
}
