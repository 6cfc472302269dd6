//! Convolutions on channels-last images.
#![allow(clippy::too_many_arguments, reason = "Python signatures")]

use crate::attention::{Codings, codings};
use crate::encode::mode;
use crate::error::{FormatError, ShapeError};
use crate::format::Format;
use crate::run::{here, run_with_workspace};
use crate::view::{BytesView, FloatView};
use hbfp::gemm::Coding;
use hbfp::gemm::convolution::{Convolution, Input, Kernel, Place};
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

/// Format, rounding and stream of what is to be kept of an image.
type Keep<'py> = Option<(PyRef<'py, Format>, u8, u64)>;

/// Memory for the codes of an image of `count` elements, and how they are made. None where none are asked for, or the
/// floats are smaller: few channels in many groups pad much.
fn kept<'py>(
    py: Python<'py>,
    convolution: &Convolution,
    place: Place,
    count: usize,
    keep: &Keep<'py>,
    seed: u64,
) -> PyResult<Option<(BytesView<'py>, Coding)>> {
    let Some((format, rounding, stream)) = keep else { return Ok(None) };
    let coding = Coding { format: format.inner, mode: mode(*rounding, seed, *stream)? };
    let len = convolution.kept_bytes(&here()?, place, coding.format).filter(|&len| len < 4 * count);
    len.map(|len| Ok((BytesView::new(py, len)?, coding))).transpose()
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
    keep: Keep<'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let (x, w, mut out) = (FloatView::read(x, "x")?, FloatView::read(w, "w")?, FloatView::write(out, "out")?);
    let bias = bias.map(|bias| FloatView::read(bias, "bias")).transpose()?;
    let [batch, channels] = image(&x, sizes.1[0], "x")?;
    let [_, out_channels] = image(&out, sizes.1[1], "out")?;
    [&x, &w].into_iter().try_for_each(|input| out.expect_apart(input.extent(), "out"))?;
    let convolution = convolution(sizes, batch, [channels, out_channels]);
    let codings = codings(&operands, seed)?;
    let bias = bias_of(&bias, &out)?;
    let mut kept = kept(py, &convolution, Place::Input, x.count(), &keep, seed)?;
    let (image, tensor, target) = (x.as_slice(), w.tensor(), out.as_mut_slice());
    let keep = kept.as_mut().map(|(bytes, coding)| (bytes.as_mut_slice(), *coding));
    run_with_workspace(py, threads, |ctx, workspace| {
        convolution.forward(ctx, image, Kernel::Floats(&tensor), codings, flatten, bias, target, workspace)?;
        keep.map_or(Ok(()), |(bytes, coding)| convolution.keep(ctx, Place::Input, image, coding, bytes, workspace))
    })?;
    Ok(kept.map(|(bytes, _)| bytes.into_tensor()))
}

/// dX of dY and the kernel; and, if asked for, what `convolution_weight_gradient` takes in place of dY.
#[pyfunction]
pub(crate) fn convolution_input_gradient<'py>(
    py: Python<'py>,
    dy: &Bound<'py, PyAny>,
    w: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    sizes: Sizes,
    operands: Codings<'py>,
    bias: Option<&Bound<'py, PyAny>>,
    seed: u64,
    threads: usize,
    keep: Keep<'py>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let (dy, w, mut out) = (FloatView::read(dy, "dy")?, FloatView::read(w, "w")?, FloatView::write(out, "out")?);
    let bias = bias.map(|bias| FloatView::read(bias, "bias")).transpose()?;
    let [batch, out_channels] = image(&dy, sizes.1[1], "dy")?;
    let [_, channels] = image(&out, sizes.1[0], "out")?;
    [&dy, &w].into_iter().try_for_each(|input| out.expect_apart(input.extent(), "out"))?;
    let convolution = convolution(sizes, batch, [channels, out_channels]);
    let codings = codings(&operands, seed)?;
    let bias = bias_of(&bias, &out)?;
    let mut kept = kept(py, &convolution, Place::Output, dy.count(), &keep, seed)?;
    let (image, tensor, target) = (dy.as_slice(), w.tensor(), out.as_mut_slice());
    let keep = kept.as_mut().map(|(bytes, coding)| (bytes.as_mut_slice(), *coding));
    run_with_workspace(py, threads, |ctx, workspace| {
        convolution.input_gradient(ctx, image, Kernel::Floats(&tensor), codings, bias, target, workspace)?;
        keep.map_or(Ok(()), |(bytes, coding)| convolution.keep(ctx, Place::Output, image, coding, bytes, workspace))
    })?;
    Ok(kept.map(|(bytes, _)| bytes.into_tensor()))
}

/// An image as floats, or what was kept of it.
enum Borrowed<'py> {
    Floats(FloatView<'py>),
    Kept(BytesView<'py>),
}

impl<'py> Borrowed<'py> {
    fn new(
        x: &Bound<'py, PyAny>,
        kept: bool,
        pixels: [usize; 3],
        sizes: [usize; 2],
        out: &FloatView<'_>,
        what: &str,
    ) -> PyResult<Self> {
        if kept {
            return Ok(Self::Kept(BytesView::read(x, what)?));
        }
        let view = FloatView::read(x, what)?;
        if image(&view, pixels, what)? != sizes {
            let [batch, channels] = sizes;
            let text = format!("{what}: expected {batch} samples of {channels} channels; found others");
            return Err(ShapeError::new_err(text));
        }
        out.expect_apart(view.extent(), "out")?;
        Ok(Self::Floats(view))
    }

    fn input(&self) -> Input<'_> {
        match self {
            Self::Floats(view) => Input::Floats(view.as_slice()),
            Self::Kept(bytes) => Input::Kept(bytes.as_slice()),
        }
    }
}

/// dW, [groups, taps, in / groups, out / groups], of dY and X, or what was kept of them, and the numbers of samples and of
/// either's channels.
#[pyfunction]
pub(crate) fn convolution_weight_gradient(
    py: Python<'_>,
    dy: &Bound<'_, PyAny>,
    x: &Bound<'_, PyAny>,
    kept: [bool; 2],
    batch: usize,
    channels: [usize; 2],
    out: &Bound<'_, PyAny>,
    sizes: Sizes,
    operands: Codings<'_>,
    seed: u64,
    threads: usize,
) -> PyResult<()> {
    let mut out = FloatView::write(out, "out")?;
    let [dy_channels, x_channels] = channels;
    let dy = Borrowed::new(dy, kept[0], sizes.1[1], [batch, dy_channels], &out, "dy")?;
    let x = Borrowed::new(x, kept[1], sizes.1[0], [batch, x_channels], &out, "x")?;
    let convolution = convolution(sizes, batch, [x_channels, dy_channels]);
    let codings = codings(&operands, seed)?;
    for (kept, place, coding, what) in
        [(kept[0], Place::Output, codings[0], "dy"), (kept[1], Place::Input, codings[1], "x")]
    {
        if kept && convolution.kept_bytes(&here()?, place, coding.format).is_none() {
            let text = format!("{what}: expected a format in blocks of up to 8 bits; found one that is never kept");
            return Err(FormatError::new_err(text));
        }
    }
    let (dy, x, target) = (dy.input(), x.input(), out.as_mut_slice());
    run_with_workspace(py, threads, |ctx, workspace| {
        convolution.weight_gradient(ctx, dy, x, codings, target, workspace)
    })
}
