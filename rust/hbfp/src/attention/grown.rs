//! Attention over a text that grows: keys and values of past tokens are kept as codes, and a call computes the rows of
//! the tokens that are new.
//!
//! Keys are blocked along the head's columns, so a token is whole blocks and is encoded when it comes. Values are blocked
//! along the text: a block is encoded when its last token has come, and until then its tokens are kept as floats, of
//! which every call encodes the open block anew. So each row has the bits of an attention over the whole text so far.
#![allow(unsafe_code, reason = "tasks that work on disjoint matrices, and rows of vectors as lines")]

use super::fused::{Buffers, STRIP_ROWS, Workspace};
use super::softmax::softmax_row;
use crate::encode::{Context, check_size};
use crate::error::{Error, Result};
use crate::format::BlockShape;
use crate::gemm::Coding;
use crate::gemm::strips::{GrownOperand, Pair};
use crate::mem::SharedMut;
use crate::parallel::for_each_task;
use crate::shape::{FloatLines, FloatTensor};
use std::sync::PoisonError;

/// Keys and values of the tokens so far of a batch of texts and heads.
#[derive(Clone, Debug)]
pub struct Grown {
    scores: [Coding; 2],
    context: [Coding; 2],
    /// Tokens of a block of values.
    block: usize,
    /// Lines of a panel.
    columns: usize,
    length: usize,
    /// Of the batch, E, Ev; known from the first call on.
    sizes: Option<(Vec<usize>, usize, usize)>,
    matrices: Vec<Matrix>,
}

#[derive(Clone, Debug, Default)]
struct Matrix {
    /// One line a token: panel after panel of them.
    keys: GrownOperand,
    /// One line a column: block after block of tokens.
    values: GrownOperand,
    /// Values of the open block, row-major.
    open: Vec<f32>,
}

impl Grown {
    /// No tokens yet. `scores` are the encodings of Q and K, along E, `context` those of P and V, along the text.
    ///
    /// # Errors
    /// [`Error::Format`] for formats that are not lines of at most 8 bits, and for stochastic rounding: tokens that come
    /// one by one would get other codes than all at once.
    pub fn new(ctx: &Context<'_>, scores: [Coding; 2], context: [Coding; 2]) -> Result<Self> {
        if scores.iter().chain(&context).any(|coding| coding.mode.is_stochastic()) {
            return Err(Error::format("operands that are not rounded stochastically", "stochastic rounding"));
        }
        let BlockShape::Line(block) = context[1].format.shape() else {
            return Err(Error::format("blocks in lines", context[1].format.to_string()));
        };
        for pair in [scores, context] {
            Pair::new(ctx.kernels, pair, block)?;
        }
        let columns = ctx.kernels.columns;
        Ok(Self { scores, context, block, columns, length: 0, sizes: None, matrices: Vec::new() })
    }

    /// Tokens so far.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens that share an exponent of the values.
    #[must_use]
    pub fn block(&self) -> usize {
        self.block
    }

    /// Bytes of all codes, and of the floats of the open block.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.matrices.iter().map(|m| m.keys.bytes() + m.values.bytes() + 4 * m.open.len()).sum()
    }

    /// Forgets all tokens from number `length` on.
    ///
    /// # Errors
    /// [`Error::Shape`] where `length` lies inside a block of values whose floats are gone, or behind the last token.
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        let (closed, kept) = (self.length / self.block, length / self.block);
        if length > self.length || (kept < closed && !length.is_multiple_of(self.block)) {
            let expected = format!(
                "a length of 0 to {}, a multiple of {} unless it is in the open block",
                self.length, self.block
            );
            return Err(Error::shape(expected, length.to_string()));
        }
        for matrix in &mut self.matrices {
            matrix.keys.truncate(length.div_ceil(self.columns), self.length.div_ceil(self.columns));
            matrix.values.truncate(kept, closed);
            let columns = matrix.open.len() / (self.length % self.block).max(1);
            matrix.open.truncate(columns * (length - kept * self.block));
        }
        self.length = length;
        Ok(())
    }

    /// `out` ← the rows of attention for the next tokens, [.., tokens, Ev] row-major: each sees itself and all before.
    ///
    /// # Shapes
    /// q and k [.., tokens, E], v [.., tokens, Ev], the leading dimensions those of the first call.
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes are zero, or do not fit each other or those of the first call; nothing is changed then.
    ///
    /// # Panics
    /// If `ctx` has kernels of another width than the one that this was made for.
    pub fn attend(
        &mut self,
        ctx: &Context<'_>,
        [q, k, v]: [&FloatTensor<'_>; 3],
        scale: f32,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        assert_eq!(ctx.kernels.columns, self.columns, "tokens of another level");
        let (rows, width) = self.resize(q.shape(), k.shape(), v.shape())?;
        check_size("elements of out", out.len(), self.matrices.len() * rows * width)?;
        let (last, begin, end) = (q.shape().len() - 1, self.length, self.length + rows);
        let scores = Pair::new(ctx.kernels, self.scores, q.shape()[last])?;
        let context = Pair::new(ctx.kernels, self.context, end)?;
        let (q, k, v) = (q.lines(last)?, k.lines(last)?, v.lines(last - 1)?);
        let step = Step { scores, context, block: self.block, begin, end, scale };
        let count = self.matrices.len();
        let (matrices, out) = (SharedMut::new(&mut self.matrices), SharedMut::new(out));
        let buffers = workspace.reserve(ctx);
        for_each_task(ctx.team, ctx.workers(count * rows * end), count, &|worker, m| {
            let mut buffers = buffers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: a matrix, and its rows of the output, belong to one task.
            let (matrix, out) = unsafe { (&mut matrices.part(m, 1)[0], out.part(m * rows * width, rows * width)) };
            let [q, k, v] = [&q, &k, &v].map(|x| x.rows(m, 0..rows));
            step.take(matrix, k, &v, width, &mut buffers);
            step.rows(matrix, &q, width, out, &mut buffers);
        });
        self.length = end;
        Ok(())
    }

    /// Rows and Ev of a call, once its shapes are found to fit; matrices on the first one.
    fn resize(&mut self, q: &[usize], k: &[usize], v: &[usize]) -> Result<(usize, usize)> {
        let expected = |batch: &str| format!("query and key [{batch}, tokens, E] and value [{batch}, tokens, Ev]");
        let found = || format!("{q:?}, {k:?} and {v:?}");
        let (&[ref batch @ .., rows, depth], &[.., width]) = (q, v) else {
            return Err(Error::shape(expected(".."), found()));
        };
        if k != q || v[..v.len() - 1] != q[..q.len() - 1] || [rows, depth, width].contains(&0) {
            return Err(Error::shape(expected(".."), found()));
        }
        let sizes = (batch.to_vec(), depth, width);
        if self.length == 0 {
            self.matrices = vec![Matrix::default(); batch.iter().product()];
        } else if let Some(first) = self.sizes.as_ref().filter(|&first| *first != sizes) {
            let expected = format!("{} with {first:?} for .., E and Ev, as before", expected(".."));
            return Err(Error::shape(expected, found()));
        }
        self.sizes = Some(sizes);
        Ok((rows, width))
    }
}

/// The next tokens.
struct Step {
    scores: Pair,
    context: Pair,
    block: usize,
    begin: usize,
    end: usize,
    scale: f32,
}

impl Step {
    /// Keys and values of the new tokens join those of a matrix. `v` has its lines along the tokens.
    fn take(&self, matrix: &mut Matrix, k: FloatLines<'_>, v: &FloatLines<'_>, width: usize, buffers: &mut Buffers) {
        let Buffers { scratch, keys, values, .. } = buffers;
        self.scores.grow_lines(k, &mut matrix.keys, self.begin, keys, scratch);
        for token in 0..v.k {
            if v.line_stride == 1 {
                // SAFETY: as many elements side by side, inside the view.
                matrix.open.extend_from_slice(unsafe { std::slice::from_raw_parts(v.at(0, 0, token), width) });
            } else {
                // SAFETY: inside the view.
                matrix.open.extend((0..width).map(|column| unsafe { *v.at(0, column, token) }));
            }
        }
        let closing = matrix.open.len() / width / self.block * self.block;
        if closing > 0 {
            let x = rows_of(&matrix.open, closing, width);
            self.context.grow_blocks(x, &mut matrix.values, values, scratch);
            matrix.open.drain(..closing * width);
        }
    }

    /// `out` ← the rows of the new tokens.
    fn rows(&self, matrix: &Matrix, q: &FloatLines<'_>, width: usize, out: &mut [f32], buffers: &mut Buffers) {
        let Self { scores, context, begin, end, .. } = *self;
        let Buffers { scratch, values, queries, weights, scores: p, out: o, unpacked, .. } = buffers;
        let (rows, closed) = (end - begin, end / self.block);
        let open = matrix.open.len() / width;
        if open > 0 {
            context.lay_out_right(rows_of(&matrix.open, open, width), values, scratch);
        }
        let key_blocks = q.k.div_ceil(scores.block);
        let value_panels = width.div_ceil(context.kernels.columns);
        p.reserve(STRIP_ROWS.min(rows), end);
        o.reserve(STRIP_ROWS.min(rows), width);
        for (from, out) in (0..rows).step_by(STRIP_ROWS).zip(out.chunks_mut(STRIP_ROWS * width)) {
            let strip = from..(from + STRIP_ROWS).min(rows);
            scores.lay_out_left(q.rows(0, strip.clone()), queries, scratch);
            let number = |panel: usize, block: usize| panel * key_blocks + block;
            scores.multiply_grown((queries, 0, key_blocks), (&matrix.keys, number), end, (p, true), unpacked);
            for (i, row) in strip.clone().enumerate() {
                let (visible, p) = (begin + row + 1, p.row(i));
                // SAFETY: the row holds its own scores.
                unsafe { softmax_row(scores.kernels, p.as_ptr(), p, visible, self.scale, std::ptr::null()) };
                p[visible..].fill(0.0);
            }
            context.lay_out_left(p.lines([strip.len(), end], true, 0), weights, scratch);
            let number = |panel: usize, block: usize| block * value_panels + panel;
            context.multiply_grown((weights, 0, closed), (&matrix.values, number), width, (o, true), unpacked);
            if open > 0 {
                context.multiply_from(closed, weights, values, width, o, closed == 0);
            }
            o.finish(width, out);
        }
    }
}

/// The first rows of a row-major matrix, reduced along them.
fn rows_of(x: &[f32], rows: usize, columns: usize) -> FloatLines<'_> {
    assert!(rows * columns <= x.len());
    // SAFETY: inside the slice, which stays borrowed.
    unsafe { FloatLines::of_rows(x.as_ptr(), [rows, columns], columns, false, 0) }
}
