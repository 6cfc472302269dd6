//! Softmax and bias gradients: the FP32 parts whose bits are fixed too.

use crate::run::run;
use crate::view::FloatView;
use pyo3::prelude::*;

/// Copies `from` to `out` unless they are the same object; `out` alone is worked on then.
fn in_place<'py>(from: &Bound<'py, PyAny>, out: &Bound<'py, PyAny>, what: &str) -> PyResult<FloatView<'py>> {
    let mut view = FloatView::write(out, "out")?;
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
    let mut view = in_place(scores, out, "scores")?;
    let mask = mask.map(|mask| FloatView::read(mask, "mask")).transpose()?;
    if let Some(mask) = &mask {
        mask.expect_contiguous("mask")?;
        mask.expect_shape(view.shape(), "mask")?;
        view.expect_apart(mask.extent(), "out")?;
    }
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
    let mut view = in_place(dp, out, "dp")?;
    let p = FloatView::read(p, "p")?;
    p.expect_contiguous("p")?;
    p.expect_shape(view.shape(), "p")?;
    view.expect_apart(p.extent(), "out")?;
    let columns = view.shape().last().copied().unwrap_or(1);
    let grad = view.as_mut_slice();
    run(py, threads, |ctx| hbfp::attention::softmax_backward(ctx, p.as_slice(), grad, columns, scale))
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
