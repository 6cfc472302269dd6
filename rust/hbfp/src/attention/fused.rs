//! Attention without its L × S matrices: the bits of the products and the softmax one after the other, strip by strip.
//!
//! ```text
//! forward, per matrix    K, V → panels
//!   per 32 rows          S = Q Kᵀ;  P = softmax(scale · S + mask);  O = P V
//! backward, per matrix   K (twice), V → panels;  dK = dV = 0
//!   per block of rows    S, P again;  dV += Pᵀ dO;  dP = dO Vᵀ;  dS = P (dP − σ) scale;  dQ = dS K;  dK += dSᵀ Q
//! ```
//! Sums over the queries run strip by strip in the order of their blocks, so a strip of backward is whole blocks.
//! Random bits are those of the logical tensors, [matrices, L, S] for P and dS.
//!
//! # What a causal mask saves
//! To the right of a strip's last row P is +0.0 and dS ±0.0. Blocks of zeros may be left out of sums that start at
//! +0.0, unless they meet a NaN block, and dS is zero there only if dP and σ are finite. So keys are left out where
//! the panels that would meet the zeros are all in the fast range of exponents, where sums of dP can't overflow in
//! it, and where no row of P is NaN; else the strip reads all keys.
#![allow(unsafe_code, reason = "rows of padded buffers, and tasks that write disjoint rows")]

use super::dropout::Dropout;
use super::softmax::softmax_row;
use crate::arch::generic::softmax::PARTIALS;
use crate::encode::blocks::Scratch;
use crate::encode::{Context, check_size, per_worker};
use crate::error::{Error, Result};
use crate::gemm::Coding;
use crate::gemm::strips::{PaddedRows, Pair, StripOperand};
use crate::mem::{AlignedBytes, SharedMut};
use crate::parallel::for_each_task;
use crate::shape::{FloatLines, FloatTensor};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Rows of a strip forward: what encoders take at a time.
pub(super) const STRIP_ROWS: usize = 32;
/// Fewest rows of a strip backward, if there are as many.
pub(super) const BLOCK_ROWS: usize = 64;
/// Tasks for each thread, so that all end together.
pub(super) const TASKS_PER_WORKER: usize = 4;

/// softmax(scale · Q Kᵀ + mask) V.
///
/// # Shapes
/// q [.., L, E], k [.., S, E], v [.., S, Ev] and the mask [.., L, S], all with the same leading dimensions, the batch.
/// Where something is shared along one of them its stride is 0.
#[derive(Clone, Debug)]
pub struct Attention<'a> {
    /// Queries.
    pub q: FloatTensor<'a>,
    /// Keys.
    pub k: FloatTensor<'a>,
    /// Values.
    pub v: FloatTensor<'a>,
    /// Added to the scaled scores.
    pub mask: Option<FloatTensor<'a>>,
    /// Whether row i sees columns 0 … i only.
    pub causal: bool,
    /// Factor of the scores, applied before the mask.
    pub scale: f32,
    /// Of the softmax, before it is encoded.
    pub dropout: Option<Dropout>,
    /// Encoding of Q and K, along E.
    pub scores: [Coding; 2],
}

/// The four products of the backward pass: gradient of O, and how operands are encoded.
#[derive(Clone, Debug)]
pub struct Gradients<'a> {
    /// Gradient of the output, [.., L, Ev].
    pub output: FloatTensor<'a>,
    /// P and dO for dV = Pᵀ dO, along L.
    pub values: [Coding; 2],
    /// dO and V for dP = dO Vᵀ, along Ev.
    pub weights: [Coding; 2],
    /// dS and K for dQ = dS K, along S.
    pub queries: [Coding; 2],
    /// dS and Q for dK = dSᵀ Q, along L.
    pub keys: [Coding; 2],
}

/// Buffers of attention, reused from call to call: per thread one strip of each L × S matrix, the panels of one
/// matrix of K and V, and backward their gradients.
#[derive(Debug, Default)]
pub struct Workspace {
    workers: Vec<Mutex<Buffers>>,
}

impl Workspace {
    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.workers.iter().map(|buffers| buffers.lock().map_or(0, |buffers| buffers.bytes())).sum()
    }

    pub(super) fn reserve(&mut self, ctx: &Context<'_>) -> &[Mutex<Buffers>] {
        if self.workers.len() < ctx.threads.max(1) {
            self.workers = per_worker(ctx, Buffers::default);
        }
        &self.workers
    }
}

#[derive(Debug, Default)]
pub(super) struct Buffers {
    pub(super) scratch: Scratch,
    mask: Vec<f32>,
    /// Of some rows, where dropout draws.
    random: Vec<u16>,
    /// Of a matrix.
    pub(super) keys: StripOperand,
    pub(super) values: StripOperand,
    /// Of a strip.
    pub(super) queries: StripOperand,
    /// P or dS.
    pub(super) weights: StripOperand,
    pub(super) scores: PaddedRows,
    pub(super) out: PaddedRows,
    /// A block of a panel, where keys and values are kept as nibbles.
    pub(super) unpacked: AlignedBytes,
    pub(super) backward: BackwardBuffers,
    /// Of sums of a mask's gradient.
    pub(super) partial: Vec<f32>,
}

#[derive(Debug, Default)]
pub(super) struct BackwardBuffers {
    /// K along S.
    keys: StripOperand,
    /// Q along L.
    queries: StripOperand,
    /// dO along Ev, and along L.
    pub(super) outputs: [StripOperand; 2],
    /// dP, then dS.
    pub(super) scores: PaddedRows,
    dk: PaddedRows,
    dv: PaddedRows,
}

impl Buffers {
    fn bytes(&self) -> usize {
        let Self { keys, values, queries, weights, scores, out, backward: b, .. } = self;
        let operands = [keys, values, queries, weights, &b.keys, &b.queries, &b.outputs[0], &b.outputs[1]];
        let rows = [scores, out, &b.scores, &b.dk, &b.dv];
        operands.iter().map(|operand| operand.bytes()).sum::<usize>()
            + rows.iter().map(|rows| rows.bytes()).sum::<usize>()
            + self.scratch.bytes()
            + self.unpacked.capacity()
            + 4 * (self.mask.capacity() + self.partial.capacity())
            + 2 * self.random.capacity()
    }
}

/// Lengths, checked.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) matrices: usize,
    /// L.
    pub(super) rows: usize,
    /// S.
    pub(super) columns: usize,
    /// E.
    pub(super) depth: usize,
    /// Ev.
    pub(super) width: usize,
}

impl Attention<'_> {
    pub(super) fn sizes(&self) -> Result<Sizes> {
        let (q, k, v) = (self.q.shape(), self.k.shape(), self.v.shape());
        let (&[ref batch @ .., rows, depth], &[.., columns, width]) = (q, v) else {
            return Err(Error::shape("q, k and v of two or more dimensions", format!("{q:?}, {k:?} and {v:?}")));
        };
        let tensor = |rows: usize, columns: usize| [batch, &[rows, columns]].concat();
        let mask = self.mask.as_ref().map(FloatTensor::shape);
        if k != tensor(columns, depth)
            || v != tensor(columns, width)
            || mask.is_some_and(|m| m != tensor(rows, columns))
        {
            let expected = "q [.., L, E], k [.., S, E], v [.., S, Ev] and mask [.., L, S] of one batch";
            return Err(Error::shape(expected, format!("{q:?}, {k:?}, {v:?} and {mask:?}")));
        }
        if [rows, columns, depth, width].contains(&0) {
            let expected = "an element or more along each of the last two dimensions";
            return Err(Error::shape(expected, format!("{q:?}, {k:?} and {v:?}")));
        }
        Ok(Sizes { matrices: batch.iter().product(), rows, columns, depth, width })
    }

    /// That a gradient of the output is one.
    pub(super) fn check_output(&self, output: &FloatTensor<'_>, width: usize) -> Result<()> {
        let q = self.q.shape();
        if output.shape() != [&q[..q.len() - 1], &[width]].concat() {
            return Err(Error::shape("a gradient [.., L, Ev] of the same batch", format!("{:?}", output.shape())));
        }
        Ok(())
    }

    /// Columns that a strip reads: all, or, where it may skip some, those that its last row sees. In whole blocks of
    /// the reduction along S, which are faster to encode than parts.
    fn columns(&self, sizes: &Sizes, rows: &Range<usize>, block: usize, skips: bool) -> usize {
        if self.causal && skips { rows.end.next_multiple_of(block).min(sizes.columns) } else { sizes.columns }
    }

    /// `buffers.scores` ← P of some rows of a matrix, up to `columns`; +0.0 where a row sees nothing.
    pub(super) fn weights(
        &self,
        pair: &Pair,
        mask: Option<&FloatLines<'_>>,
        (matrix, rows): (usize, &Range<usize>),
        columns: usize,
        buffers: &mut Buffers,
    ) {
        let Buffers { keys, queries, scores, mask: mask_row, .. } = buffers;
        pair.multiply(queries, keys, columns, scores, true);
        for row in rows.clone() {
            let visible = if self.causal { columns.min(row + 1) } else { columns };
            let mask = match mask {
                None => std::ptr::null(),
                Some(mask) if mask.k_stride == 1 => mask.at(matrix, row, 0),
                Some(mask) => {
                    mask_row.clear();
                    // SAFETY: inside the view.
                    mask_row.extend((0..visible).map(|j| unsafe { *mask.at(matrix, row, j) }));
                    mask_row.as_ptr()
                }
            };
            let out = scores.row(row - rows.start);
            // SAFETY: the row holds its own scores; the mask has a row of `visible` elements.
            unsafe { softmax_row(pair.kernels, out.as_ptr(), out, visible, self.scale, mask) };
            out[visible..].fill(0.0);
        }
    }

    /// `buffers.backward.scores` ← scale · P (dP − σ) of some rows and columns, of which P is in `buffers.scores`, dO
    /// and V in panels; `pair` is that of dP = dO Vᵀ, `first` the first row's number among those of all matrices.
    pub(super) fn scores_gradient(
        &self,
        pair: &Pair,
        size: [usize; 2],
        first: usize,
        scale: f32,
        buffers: &mut Buffers,
    ) {
        let Buffers { values, scores: p, backward, random, .. } = buffers;
        let BackwardBuffers { outputs, scores: ds, .. } = backward;
        let [rows, columns] = size;
        pair.multiply(&outputs[0], values, columns, ds, true);
        if let Some(dropout) = &self.dropout {
            dropout.rows(pair.kernels, None, ds, size, first, random);
        }
        let padded = columns.next_multiple_of(PARTIALS);
        for i in 0..rows {
            // Behind the columns seen P is +0.0; dP is there that of other keys or of none, and NaN only where all of
            // the row is.
            let (p, ds) = (&p.row(i)[..padded], &mut ds.row(i)[..padded]);
            // SAFETY: both have `padded` elements, a multiple of PARTIALS.
            unsafe { (pair.kernels.softmax_backward_row)(p.as_ptr(), ds.as_mut_ptr(), padded, scale) };
        }
    }

    /// `out` ← the output, [.., L, Ev] row-major. `context` are the encodings of P and V, along S.
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not fit or are zero, [`Error::Format`] for formats that are not lines of at
    /// most 8 bits.
    pub fn forward(
        &self,
        ctx: &Context<'_>,
        context: [Coding; 2],
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.sizes()?;
        let Sizes { matrices, rows, columns, depth, width } = sizes;
        check_size("elements of out", out.len(), matrices * rows * width)?;
        let scores = Pair::new(ctx.kernels, self.scores, depth)?;
        let context = Pair::new(ctx.kernels, context, columns)?;
        let last = self.q.shape().len() - 1;
        let (q, k, v) = (self.q.lines(last)?, self.k.lines(last)?, self.v.lines(last - 1)?);
        let mask = self.mask.as_ref().map(|mask| mask.lines(last)).transpose()?;
        let workers = ctx.workers(matrices * rows * columns);
        // Few matrices are cut into segments of strips, each of which lays out K and V for itself.
        let strips = rows.div_ceil(STRIP_ROWS);
        let segments = if workers > 1 { (TASKS_PER_WORKER * workers).div_ceil(matrices.max(1)).min(strips) } else { 1 };
        let strips = strips.div_ceil(segments);
        let out = SharedMut::new(out);
        let buffers = workspace.reserve(ctx);
        for_each_task(ctx.team, workers, matrices * segments, &|worker, task| {
            let (matrix, segment) = (task / segments, task % segments);
            let mut buffers = buffers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let buffers = &mut *buffers;
            scores.lay_out_right(k.rows(matrix, 0..columns), &mut buffers.keys, &mut buffers.scratch);
            context.lay_out_right(v.rows(matrix, 0..columns), &mut buffers.values, &mut buffers.scratch);
            let skips = !buffers.values.is_general();
            buffers.scores.reserve(STRIP_ROWS.min(rows), columns);
            buffers.out.reserve(STRIP_ROWS.min(rows), width);
            for strip in segment * strips..(segment + 1) * strips {
                let part = (strip * STRIP_ROWS).min(rows)..((strip + 1) * STRIP_ROWS).min(rows);
                if part.is_empty() {
                    break;
                }
                let seen = self.columns(&sizes, &part, context.block, skips);
                scores.lay_out_left(q.rows(matrix, part.clone()), &mut buffers.queries, &mut buffers.scratch);
                self.weights(&scores, mask.as_ref(), (matrix, &part), seen, buffers);
                let first = matrix * rows + part.start;
                if let Some(dropout) = &self.dropout {
                    let Buffers { scores, random, .. } = buffers;
                    dropout.rows(ctx.kernels, None, scores, [part.len(), seen], first, random);
                }
                let p = buffers.scores.lines([part.len(), seen], true, first);
                context.lay_out_left(p, &mut buffers.weights, &mut buffers.scratch);
                context.multiply(&buffers.weights, &buffers.values, width, &mut buffers.out, true);
                // SAFETY: every row belongs to one task.
                buffers.out.finish(width, unsafe { out.part(first * width, part.len() * width) });
            }
        });
        Ok(())
    }

    /// Gradients of q, k and v, as far as they are asked for: row-major, [.., L, E], [.., S, E] and [.., S, Ev], one
    /// for each matrix of the batch, whatever is shared.
    ///
    /// # Errors
    /// As for [`Self::forward`].
    pub fn backward(
        &self,
        ctx: &Context<'_>,
        gradients: &Gradients<'_>,
        dq: Option<&mut [f32]>,
        dk: Option<&mut [f32]>,
        dv: Option<&mut [f32]>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let sizes = self.sizes()?;
        let Sizes { matrices, rows, columns, depth, width } = sizes;
        let last = self.q.shape().len() - 1;
        let output = &gradients.output;
        self.check_output(output, width)?;
        for (what, found, expected) in [
            ("elements of dq", dq.as_deref().map(<[f32]>::len), matrices * rows * depth),
            ("elements of dk", dk.as_deref().map(<[f32]>::len), matrices * columns * depth),
            ("elements of dv", dv.as_deref().map(<[f32]>::len), matrices * columns * width),
        ] {
            check_size(what, found.unwrap_or(expected), expected)?;
        }
        let pairs = Pairs {
            scores: Pair::new(ctx.kernels, self.scores, depth)?,
            values: Pair::new(ctx.kernels, gradients.values, rows)?,
            weights: Pair::new(ctx.kernels, gradients.weights, width)?,
            queries: Pair::new(ctx.kernels, gradients.queries, columns)?,
            keys: Pair::new(ctx.kernels, gradients.keys, rows)?,
        };
        if pairs.values.block != pairs.keys.block {
            let expected =
                format!("equal block boundaries along L for dV and dK; dV has blocks of {}", pairs.values.block);
            return Err(Error::shape(expected, format!("blocks of {}", pairs.keys.block)));
        }
        let pass = Backward {
            attention: self,
            sizes,
            pairs,
            q: [self.q.lines(last)?, self.q.lines(last - 1)?],
            k: [self.k.lines(last)?, self.k.lines(last - 1)?],
            v: self.v.lines(last)?,
            output: [output.lines(last)?, output.lines(last - 1)?],
            mask: self.mask.as_ref().map(|mask| mask.lines(last)).transpose()?,
            dq: dq.map(SharedMut::new),
            dk: dk.map(SharedMut::new),
            dv: dv.map(SharedMut::new),
        };
        let buffers = workspace.reserve(ctx);
        for_each_task(ctx.team, ctx.workers(matrices * rows * columns), matrices, &|worker, matrix| {
            let mut buffers = buffers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            pass.matrix(matrix, &mut buffers);
        });
        Ok(())
    }
}

/// How the operands of each product meet.
struct Pairs {
    scores: Pair,
    values: Pair,
    weights: Pair,
    queries: Pair,
    keys: Pair,
}

/// A backward pass. Of two views the first has its lines along the last dimension, the second across.
struct Backward<'a> {
    attention: &'a Attention<'a>,
    sizes: Sizes,
    pairs: Pairs,
    q: [FloatLines<'a>; 2],
    k: [FloatLines<'a>; 2],
    v: FloatLines<'a>,
    output: [FloatLines<'a>; 2],
    mask: Option<FloatLines<'a>>,
    dq: Option<SharedMut<'a, f32>>,
    dk: Option<SharedMut<'a, f32>>,
    dv: Option<SharedMut<'a, f32>>,
}

impl Backward<'_> {
    fn matrix(&self, matrix: usize, buffers: &mut Buffers) {
        let Self { sizes: Sizes { rows, columns, depth, width, .. }, pairs, .. } = self;
        let (rows, columns, depth, width) = (*rows, *columns, *depth, *width);
        let back = &mut buffers.backward;
        let scratch = &mut buffers.scratch;
        let all = 0..columns;
        pairs.scores.lay_out_right(self.k[0].rows(matrix, all.clone()), &mut buffers.keys, scratch);
        if self.dq.is_some() {
            pairs.queries.lay_out_right(self.k[1].rows(matrix, all.clone()), &mut back.keys, scratch);
        }
        if self.dq.is_some() || self.dk.is_some() {
            pairs.weights.lay_out_right(self.v.rows(matrix, all), &mut buffers.values, scratch);
        }
        let block = pairs.keys.block;
        let step = (block * (BLOCK_ROWS / block).max(1)).min(rows);
        buffers.scores.reserve(step, columns);
        back.scores.reserve(step, columns);
        buffers.out.reserve(step, depth);
        for (gradient, out, width) in [(&self.dk, &mut back.dk, depth), (&self.dv, &mut back.dv, width)] {
            if gradient.is_some() {
                out.reserve(columns, width);
                out.fill(0.0);
            }
        }
        for from in (0..rows).step_by(step) {
            self.strip(matrix, from..(from + step).min(rows), buffers);
        }
        for (gradient, out, width) in
            [(&self.dk, &mut buffers.backward.dk, depth), (&self.dv, &mut buffers.backward.dv, width)]
        {
            if let Some(gradient) = gradient {
                // SAFETY: every matrix belongs to one task.
                out.finish(width, unsafe { gradient.part(matrix * columns * width, columns * width) });
            }
        }
    }

    fn strip(&self, matrix: usize, rows: Range<usize>, buffers: &mut Buffers) {
        let Self { attention, sizes, pairs, .. } = self;
        let Sizes { depth, width, .. } = *sizes;
        let needs_scores = self.dq.is_some() || self.dk.is_some();
        let first = matrix * sizes.rows + rows.start;
        let scratch = &mut buffers.scratch;
        pairs.scores.lay_out_left(self.q[0].rows(matrix, rows.clone()), &mut buffers.queries, scratch);
        let BackwardBuffers { keys, queries, outputs, .. } = &mut buffers.backward;
        let mut skips = true;
        if needs_scores {
            pairs.weights.lay_out_left(self.output[0].rows(matrix, rows.clone()), &mut outputs[0], scratch);
            // |dP| ≤ largest sum · 2^104 · factor then, and neither it nor its distance from σ overflows.
            let factor = attention.dropout.map_or(1.0, |dropout| dropout.factor());
            skips = !outputs[0].is_general()
                && !buffers.values.is_general()
                && pairs.weights.largest_sum(width) as f32 * factor < (1 << 22) as f32
                && attention.scale.is_finite();
        }
        if self.dv.is_some() {
            pairs.values.lay_out_right(self.output[1].rows(matrix, rows.clone()), &mut outputs[1], scratch);
            skips &= !outputs[1].is_general();
        }
        if self.dq.is_some() {
            skips &= !keys.is_general();
        }
        if self.dk.is_some() {
            // A NaN of Q is one of P too.
            pairs.keys.lay_out_right(self.q[1].rows(matrix, rows.clone()), queries, scratch);
        }
        let mut seen = attention.columns(sizes, &rows, pairs.queries.block, skips);
        attention.weights(&pairs.scores, self.mask.as_ref(), (matrix, &rows), seen, buffers);
        // A row that is NaN where it sees something makes dS NaN everywhere.
        if seen < sizes.columns && (0..rows.len()).any(|i| buffers.scores.row(i)[0].is_nan()) {
            seen = sizes.columns;
            attention.weights(&pairs.scores, self.mask.as_ref(), (matrix, &rows), seen, buffers);
        }
        let size = [rows.len(), seen];
        if self.dv.is_some() {
            let Buffers { scratch, weights, scores: p, backward, random, .. } = &mut *buffers;
            let BackwardBuffers { outputs, scores: ds, dv, .. } = backward;
            let p = match &attention.dropout {
                None => &*p,
                Some(dropout) => {
                    dropout.rows(pairs.values.kernels, Some(p), ds, size, first, random);
                    &*ds
                }
            };
            pairs.values.lay_out_left(p.lines(size, false, first), weights, scratch);
            pairs.values.multiply(weights, &outputs[1], width, dv, false);
        }
        if !needs_scores {
            return;
        }
        attention.scores_gradient(&pairs.weights, size, first, attention.scale, buffers);
        let Buffers { scratch, weights, out, backward, .. } = buffers;
        let BackwardBuffers { keys, queries, scores: ds, dk, .. } = backward;
        if let Some(dq) = &self.dq {
            pairs.queries.lay_out_left(ds.lines(size, true, first), weights, scratch);
            pairs.queries.multiply(weights, keys, depth, out, true);
            // SAFETY: every row belongs to one task.
            out.finish(depth, unsafe { dq.part(first * depth, rows.len() * depth) });
        }
        if self.dk.is_some() {
            pairs.keys.lay_out_left(ds.lines(size, false, first), weights, scratch);
            pairs.keys.multiply(weights, queries, depth, dk, false);
        }
    }
}
