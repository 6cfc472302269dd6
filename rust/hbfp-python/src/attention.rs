//! Attention; softmax and bias gradients, the FP32 parts whose bits are fixed too.

use crate::encode::mode;
use crate::error::to_python;
use crate::format::Format;
use crate::run::{here, run, run_attention, run_here, with_attention_workspace};
use crate::view::FloatView;
use hbfp::Context;
use hbfp::attention::{Attention, Dropout, Gradients, Grown, Workspace};
use hbfp::gemm::Coding;
use hbfp::shape::FloatTensor;
use pyo3::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Format, rounding and stream of the left and the right operand of a product.
pub(crate) type Codings<'py> = [(PyRef<'py, Format>, u8, u64); 2];

pub(crate) fn codings([left, right]: &Codings<'_>, seed: u64) -> PyResult<[Coding; 2]> {
    let coding = |(format, rounding, stream): &(PyRef<'_, Format>, u8, u64)| {
        PyResult::Ok(Coding { format: format.inner, mode: mode(*rounding, seed, *stream)? })
    };
    Ok([coding(left)?, coding(right)?])
}

/// What the passes of one call share, a tuple: q, k, v, the mask, whether it is causal, the scale, the dropout, the codings
/// of q and k, and the seed of all random bits.
#[derive(FromPyObject)]
pub(crate) struct Call<'py>(
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Option<Bound<'py, PyAny>>,
    bool,
    f32,
    Option<(u32, u64)>,
    Codings<'py>,
    u64,
);

/// Views of its tensors.
struct Inputs<'py> {
    q: FloatView<'py>,
    k: FloatView<'py>,
    v: FloatView<'py>,
    mask: Option<FloatView<'py>>,
}

impl<'py> Inputs<'py> {
    fn new(Call(q, k, v, mask, ..): &Call<'py>) -> PyResult<Self> {
        let (q, k, v) = (FloatView::read(q, "q")?, FloatView::read(k, "k")?, FloatView::read(v, "v")?);
        Ok(Self { q, k, v, mask: mask.as_ref().map(|mask| FloatView::read(mask, "mask")).transpose()? })
    }

    fn attention(&self, Call(.., causal, scale, dropout, scores, seed): &Call<'_>) -> PyResult<Attention<'_>> {
        let (q, k, v) = (self.q.tensor(), self.k.tensor(), self.v.tensor());
        let (mask, scores) = (self.mask.as_ref().map(FloatView::tensor), codings(scores, *seed)?);
        let dropout = dropout.map(dropout_of).transpose()?;
        Ok(Attention { q, k, v, mask, causal: *causal, scale: *scale, dropout, scores })
    }

    fn expect_apart(&self, out: &FloatView<'_>, what: &str) -> PyResult<()> {
        let Self { q, k, v, mask } = self;
        [q, k, v].into_iter().chain(mask).try_for_each(|input| out.expect_apart(input.extent(), what))
    }
}

/// Elements of 2^16 that are dropped, and the seed that says which.
fn dropout_of((dropped, seed): (u32, u64)) -> PyResult<Dropout> {
    Dropout::new(dropped, seed).map_err(|e| to_python(&e))
}

/// A view of `shape` to write to, apart from the inputs.
fn result<'py>(
    inputs: &Inputs<'_>,
    out: &Bound<'py, PyAny>,
    shape: &[usize],
    last: usize,
    what: &str,
) -> PyResult<FloatView<'py>> {
    let view = FloatView::write(out, what)?;
    let leading = shape.len().saturating_sub(1);
    view.expect_shape(&[&shape[..leading], &[last]].concat(), what)?;
    inputs.expect_apart(&view, what)?;
    Ok(view)
}

/// out = softmax(scale * q k^T + mask) v.
#[pyfunction]
pub(crate) fn attention(
    py: Python<'_>,
    call: Call<'_>,
    context: Codings<'_>,
    out: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<()> {
    let inputs = Inputs::new(&call)?;
    let context = codings(&context, call.8)?;
    let width = inputs.v.shape().last().copied().unwrap_or(0);
    let mut out = result(&inputs, out, inputs.q.shape(), width, "out")?;
    let (attention, out) = (inputs.attention(&call)?, out.as_mut_slice());
    run_attention(py, threads, |ctx, workspace| attention.forward(ctx, context, out, workspace))
}

/// Gradients of q, k and v; products are those whose operands are `weights`, `queries`, `keys` and `values` of
/// [`Gradients`].
#[pyfunction]
pub(crate) fn attention_backward(
    py: Python<'_>,
    call: Call<'_>,
    output: &Bound<'_, PyAny>,
    products: [Codings<'_>; 4],
    gradients: [Option<Bound<'_, PyAny>>; 3],
    threads: usize,
) -> PyResult<()> {
    let inputs = Inputs::new(&call)?;
    let output = FloatView::read(output, "output gradient")?;
    let mut results: Vec<Option<FloatView<'_>>> = Vec::with_capacity(3);
    let places = [(&inputs.q, "dq"), (&inputs.k, "dk"), (&inputs.v, "dv")];
    for (out, (input, what)) in gradients.iter().zip(places) {
        let last = input.shape().last().copied().unwrap_or(0);
        let view = out.as_ref().map(|out| result(&inputs, out, input.shape(), last, what)).transpose()?;
        if let Some(view) = &view {
            let others = results.iter().flatten().map(FloatView::extent);
            others.chain([output.extent()]).try_for_each(|other| view.expect_apart(other, what))?;
        }
        results.push(view);
    }
    let [weights, queries, keys, values] = &products;
    let gradients = Gradients {
        output: output.tensor(),
        values: codings(values, call.8)?,
        weights: codings(weights, call.8)?,
        queries: codings(queries, call.8)?,
        keys: codings(keys, call.8)?,
    };
    let [dq, dk, dv] = &mut results[..] else { unreachable!("three were pushed") };
    let [dq, dk, dv] = [dq, dk, dv].map(|view| view.as_mut().map(FloatView::as_mut_slice));
    let attention = inputs.attention(&call)?;
    run_attention(py, threads, |ctx, workspace| attention.backward(ctx, &gradients, dq, dk, dv, workspace))
}

/// Gradient of the mask, in the shape of `out`: that of the scores, or 1 where the mask was broadcast.
#[pyfunction]
pub(crate) fn attention_mask_gradient(
    py: Python<'_>,
    call: Call<'_>,
    output: &Bound<'_, PyAny>,
    weights: Codings<'_>,
    out: &Bound<'_, PyAny>,
    summed: bool,
    threads: usize,
) -> PyResult<()> {
    let inputs = Inputs::new(&call)?;
    let output = FloatView::read(output, "output gradient")?;
    let mut out = FloatView::write(out, "out")?;
    inputs.expect_apart(&out, "out")?;
    out.expect_apart(output.extent(), "out")?;
    let (attention, output, weights) = (inputs.attention(&call)?, output.tensor(), codings(&weights, call.8)?);
    let (shape, out) = (out.shape().to_vec(), out.as_mut_slice());
    run_attention(py, threads, |ctx, workspace| {
        attention.mask_gradient(ctx, &output, weights, &shape, summed, out, workspace)
    })
}

/// Attention over a text that grows.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct GrownAttention {
    inner: Mutex<Grown>,
}

/// Scores fewer than this are over before another thread, or a release of the GIL, would have paid.
const SMALL_SCORES: usize = 1 << 12;

impl GrownAttention {
    fn held(&self) -> MutexGuard<'_, Grown> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attention of the next tokens, in `out`.
    pub(crate) fn take(
        &self,
        py: Python<'_>,
        inputs: [&FloatTensor<'_>; 3],
        scale: f32,
        out: &mut [f32],
        threads: usize,
    ) -> PyResult<()> {
        let shape = inputs[0].shape();
        let rows = shape[..shape.len().saturating_sub(1)].iter().product::<usize>();
        // A lock that is waited for is waited for without the GIL.
        let small = self.inner.try_lock().is_ok_and(|held| rows.saturating_mul(held.length() + rows) < SMALL_SCORES);
        let attend =
            |ctx: &Context<'_>, workspace: &mut Workspace| self.held().attend(ctx, inputs, scale, out, workspace);
        if small { run_here(|ctx| with_attention_workspace(ctx, attend)) } else { run_attention(py, threads, attend) }
    }
}

#[pymethods]
impl GrownAttention {
    #[new]
    fn new(scores: Codings<'_>, context: Codings<'_>) -> PyResult<Self> {
        let (scores, context) = (codings(&scores, 0)?, codings(&context, 0)?);
        let inner = Grown::new(&here()?, scores, context).map_err(|e| to_python(&e))?;
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// A new tensor [.., tokens, Ev] for the next tokens, q and k [.., tokens, E] and v [.., tokens, Ev]. None for all that
    /// is not as usual.
    fn attend<'py>(
        &self,
        py: Python<'py>,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        scale: f32,
        threads: usize,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (Some(queries), Some(keys), Some(values)) =
            (FloatView::plain(q)?, FloatView::plain(k)?, FloatView::plain(v)?)
        else {
            return Ok(None);
        };
        let mut shape = queries.shape().to_vec();
        let (Some(last), Some(&width)) = (shape.last_mut(), values.shape().last()) else { return Ok(None) };
        *last = width;
        let Some((out, mut target)) = FloatView::output(q, &shape, None)? else { return Ok(None) };
        let inputs = [&queries.tensor(), &keys.tensor(), &values.tensor()];
        self.take(py, inputs, scale, target.as_mut_slice(), threads)?;
        Ok(Some(out))
    }

    #[getter]
    fn length(&self) -> usize {
        self.held().length()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.held().bytes()
    }

    fn truncate(&self, length: usize) -> PyResult<()> {
        self.held().truncate(length).map_err(|e| to_python(&e))
    }

    fn __copy__(&self) -> Self {
        Self { inner: Mutex::new(self.held().clone()) }
    }

    fn __deepcopy__(&self, _memo: &Bound<'_, PyAny>) -> Self {
        self.__copy__()
    }
}

/// Copies `from` to `out` unless they are the same object; `out` alone is worked on then. `other`, which is read beside it,
/// has its shape and lies apart.
fn in_place<'py>(
    from: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    what: &str,
    other: Option<(&FloatView<'_>, &str)>,
) -> PyResult<FloatView<'py>> {
    let mut view = FloatView::write(out, "out")?;
    if let Some((other, name)) = other {
        other.expect_contiguous(name)?;
        other.expect_shape(view.shape(), name)?;
        view.expect_apart(other.extent(), "out")?;
    }
    if !from.is(out) {
        let from = FloatView::read(from, what)?;
        from.expect_contiguous(what)?;
        view.expect_shape(from.shape(), "out")?;
        if from.as_mut_ptr() != view.as_mut_ptr() {
            view.expect_apart(from.extent(), "out")?;
            view.as_mut_slice().copy_from_slice(from.as_slice());
        }
    }
    Ok(view)
}

/// Row softmax of scale * scores (+ mask) over the last dimension.
#[pyfunction]
pub(crate) fn softmax(
    py: Python<'_>,
    scores: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    scale: f32,
    causal: bool,
    mask: Option<&Bound<'_, PyAny>>,
    threads: usize,
) -> PyResult<()> {
    let mask = mask.map(|mask| FloatView::read(mask, "mask")).transpose()?;
    let mut view = in_place(scores, out, "scores", mask.as_ref().map(|mask| (mask, "mask")))?;
    let mut last = view.shape().iter().rev().copied();
    let (columns, rows) = (last.next().unwrap_or(1), last.next().unwrap_or(1));
    let softmax =
        hbfp::attention::Softmax { rows, columns, scale, causal, mask: mask.as_ref().map(FloatView::as_slice) };
    let scores = view.as_mut_slice();
    run(py, threads, |ctx| softmax.apply(ctx, scores))
}

/// out = scale * p * (dp - rowsum(p * dp)).
#[pyfunction]
pub(crate) fn softmax_backward(
    py: Python<'_>,
    p: &Bound<'_, PyAny>,
    dp: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    scale: f32,
    threads: usize,
) -> PyResult<()> {
    let p = FloatView::read(p, "p")?;
    let mut view = in_place(dp, out, "dp", Some((&p, "p")))?;
    let columns = view.shape().last().copied().unwrap_or(1);
    let grad = view.as_mut_slice();
    run(py, threads, |ctx| hbfp::attention::softmax_backward(ctx, p.as_slice(), grad, columns, scale))
}

/// out = x [.., columns] with so many of 2^16 elements set to 0, the others multiplied.
#[pyfunction]
pub(crate) fn dropout(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    dropped: u32,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    let dropout = dropout_of((dropped, seed))?;
    let mut view = in_place(x, out, "x", None)?;
    let columns = view.shape().last().copied().unwrap_or(1);
    let x = view.as_mut_slice();
    run(py, threads, |ctx| dropout.apply(ctx, x, columns))
}

/// Sums over the rows of x [rows, n] in blocks of 64.
#[pyfunction]
pub(crate) fn column_sums(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    threads: usize,
) -> PyResult<()> {
    let x = FloatView::read(x, "x")?;
    x.expect_contiguous("x")?;
    let mut out = FloatView::write(out, "out")?;
    let (rows, columns) = (x.shape().first().copied().unwrap_or(1), out.count());
    x.expect_shape(&[rows, columns], "x")?;
    out.expect_apart(x.extent(), "out")?;
    let out = out.as_mut_slice();
    run(py, threads, |ctx| hbfp::sums::column_sums(ctx, x.as_slice(), out))
}
