//! Convolutions on channels-last images.
#![allow(clippy::too_many_arguments, reason = "Python signatures")]

use crate::attention::{Codings, codings};
use crate::encode::mode;
use crate::error::{FormatError, ShapeError};
use crate::format::Format;
use crate::run::run_with_workspace;
use crate::view::{BytesView, FloatView};
use hbfp::gemm::Coding;
use hbfp::gemm::convolution::{Convolution, Input};
use pyo3::prelude::*;

/// Groups; then for three spatial dimensions the sizes of X, of Y and of the kernel, stride, padding before, dilation.
type Sizes = (usize, [[usize; 3]; 6]);

fn convolution(
    (groups, [input, output, kernel, stride, padding, dilation]): Sizes,
    batch: usize,
    channels: [usize; 2],
) -> Convolution {
    Convolution { batch, channels, groups, input, output, kernel, stride, padding, dilation }
}

/// A C-contiguous image [batch, p0, p1, p2, channels]: its batch and channels.
fn image(view: &FloatView<'_>, pixels: [usize; 3], what: &str) -> PyResult<[usize; 2]> {
    view.expect_contiguous(what)?;
    match *view.shape() {
        [batch, p0, p1, p2, channels] if [p0, p1, p2] == pixels => Ok([batch, channels]),
        ref found => {
            let text = format!("{what}: expected shape [batch, {pixels:?}, channels]; found {found:?}");
            Err(ShapeError::new_err(text))
        }
    }
}

fn bias_of<'a>(bias: &'a Option<FloatView<'_>>, out: &FloatView<'_>) -> PyResult<Option<&'a [f32]>> {
    let Some(bias) = bias else { return Ok(None) };
    bias.expect_contiguous("bias")?;
    out.expect_apart(bias.extent(), "out")?;
    Ok(Some(bias.as_slice()))
}

/// Y of X and the kernel; and, if asked for, what `convolution_weight_gradient` takes in place of X.
#[pyfunction]
pub(crate) fn convolution_forward<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    w: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    sizes: Sizes,
    operands: Codings<'py>,
    flatten: bool,
    bias: Option<&Bound<'py, PyAny>>,
    seed: u64,
    threads: usize,
    keep: Option<(PyRef<'py, Format>, u8, u64)>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let (x, w, mut out) = (FloatView::read(x, "x")?, FloatView::read(w, "w")?, FloatView::write(out, "out")?);
    let bias = bias.map(|bias| FloatView::read(bias, "bias")).transpose()?;
    let [batch, channels] = image(&x, sizes.1[0], "x")?;
    let [_, out_channels] = image(&out, sizes.1[1], "out")?;
    [&x, &w].into_iter().try_for_each(|input| out.expect_apart(input.extent(), "out"))?;
    let convolution = convolution(sizes, batch, [channels, out_channels]);
    let codings = codings(&operands, seed)?;
    let bias = bias_of(&bias, &out)?;
    let mut kept = None;
    if let Some((format, rounding, stream)) = keep {
        let coding = Coding { format: format.inner, mode: mode(rounding, seed, stream)? };
        // Few channels in many groups pad so much that the floats are smaller.
        if let Some(len) = convolution.kept_bytes(coding.format).filter(|&len| len < 4 * x.count()) {
            kept = Some((BytesView::new(py, len)?, coding));
        }
    }
    let (image, tensor, target) = (x.as_slice(), w.tensor(), out.as_mut_slice());
    let keep = kept.as_mut().map(|(bytes, coding)| (bytes.as_mut_slice(), *coding));
    run_with_workspace(py, threads, |ctx, workspace| {
        convolution.forward(ctx, image, &tensor, codings, flatten, bias, target, workspace)?;
        keep.map_or(Ok(()), |(bytes, coding)| convolution.keep(ctx, image, coding, bytes, workspace))
    })?;
    Ok(kept.map(|(bytes, _)| bytes.into_tensor()))
}

/// dX of dY and the kernel.
#[pyfunction]
pub(crate) fn convolution_input_gradient(
    py: Python<'_>,
    dy: &Bound<'_, PyAny>,
    w: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    sizes: Sizes,
    operands: Codings<'_>,
    bias: Option<&Bound<'_, PyAny>>,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    let (dy, w, mut out) = (FloatView::read(dy, "dy")?, FloatView::read(w, "w")?, FloatView::write(out, "out")?);
    let bias = bias.map(|bias| FloatView::read(bias, "bias")).transpose()?;
    let [batch, out_channels] = image(&dy, sizes.1[1], "dy")?;
    let [_, channels] = image(&out, sizes.1[0], "out")?;
    [&dy, &w].into_iter().try_for_each(|input| out.expect_apart(input.extent(), "out"))?;
    let convolution = convolution(sizes, batch, [channels, out_channels]);
    let codings = codings(&operands, seed)?;
    let bias = bias_of(&bias, &out)?;
    let (image, tensor, target) = (dy.as_slice(), w.tensor(), out.as_mut_slice());
    run_with_workspace(py, threads, |ctx, workspace| {
        convolution.input_gradient(ctx, image, &tensor, codings, bias, target, workspace)
    })
}

/// dW, [groups, taps, in / groups, out / groups], of dY and X, or what was kept of X.
#[pyfunction]
pub(crate) fn convolution_weight_gradient(
    py: Python<'_>,
    dy: &Bound<'_, PyAny>,
    x: &Bound<'_, PyAny>,
    kept: bool,
    channels: usize,
    out: &Bound<'_, PyAny>,
    sizes: Sizes,
    operands: Codings<'_>,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    let (dy, mut out) = (FloatView::read(dy, "dy")?, FloatView::write(out, "out")?);
    let [batch, out_channels] = image(&dy, sizes.1[1], "dy")?;
    out.expect_apart(dy.extent(), "out")?;
    let bytes = if kept { Some(BytesView::read(x, "x")?) } else { None };
    let floats = if kept { None } else { Some(FloatView::read(x, "x")?) };
    if let Some(floats) = &floats {
        if image(floats, sizes.1[0], "x")? != [batch, channels] {
            return Err(ShapeError::new_err(format!(
                "x: expected {batch} samples of {channels} channels; found others"
            )));
        }
        out.expect_apart(floats.extent(), "out")?;
    }
    let convolution = convolution(sizes, batch, [channels, out_channels]);
    let codings = codings(&operands, seed)?;
    if bytes.is_some() && convolution.kept_bytes(codings[1].format).is_none() {
        return Err(FormatError::new_err(
            "x: expected a format in blocks of up to 8 bits; found one that is never kept",
        ));
    }
    let input = match (&bytes, &floats) {
        (Some(bytes), _) => Input::Kept(bytes.as_slice()),
        (None, Some(floats)) => Input::Floats(floats.as_slice()),
        (None, None) => unreachable!("one of the two was made above"),
    };
    let (image, target) = (dy.as_slice(), out.as_mut_slice());
    run_with_workspace(py, threads, |ctx, workspace| {
        convolution.weight_gradient(ctx, image, input, codings, target, workspace)
    })
}
