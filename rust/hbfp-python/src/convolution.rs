//! Convolutions on channels-last images.
#![allow(clippy::too_many_arguments, reason = "Python signatures")]

use crate::attention::{Codings, codings};
use crate::encode::{PlanePair, mode, planes};
use crate::error::{FormatError, ShapeError};
use crate::format::{Format, layout};
use crate::run::{here, run, run_with_workspace};
use crate::view::{BytesView, FloatView, contiguous};
use hbfp::gemm::Coding;
use hbfp::gemm::convolution::{self, Convolution, Input, Kernel, Place};
use hbfp::shape::PlaneLayout;
use hbfp::{BlockShape, encode};
use numpy::PyReadonlyArrayDyn;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

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
            let bytes = BytesView::read(x, what)?;
            out.expect_apart(bytes.extent(), "out")?;
            return Ok(Self::Kept(bytes));
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

/// What of a convolution does not depend on the images; sizes of fewer than three dimensions are preceded by ones.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct Geometry {
    rank: usize,
    groups: usize,
    flatten: bool,
    kernel: [usize; 3],
    stride: [usize; 3],
    padding: [[usize; 3]; 2],
    dilation: [usize; 3],
}

/// Sizes of three dimensions from those of one to three.
fn threes(sizes: &[usize], fill: usize) -> Option<[usize; 3]> {
    let mut all = [fill; 3];
    all[3usize.checked_sub(sizes.len())?..].copy_from_slice(sizes);
    Some(all)
}

#[pymethods]
impl Geometry {
    #[new]
    fn new(
        groups: usize,
        flatten: bool,
        kernel: Vec<usize>,
        stride: Vec<usize>,
        padding: Vec<[usize; 2]>,
        dilation: Vec<usize>,
    ) -> PyResult<Self> {
        let rank = kernel.len();
        if !(1..=3).contains(&rank) || [stride.len(), padding.len(), dilation.len()] != [rank; 3] {
            let text =
                format!("expected sizes of one to three dimensions; found a kernel {kernel:?}, strides {stride:?}");
            return Err(ShapeError::new_err(text));
        }
        let padding = [0, 1].map(|end| padding.iter().map(|ends| ends[end]).collect::<Vec<_>>());
        let sizes = |sizes: &[usize], fill| threes(sizes, fill).expect("three at most");
        Ok(Self {
            rank,
            groups,
            flatten,
            kernel: sizes(&kernel, 1),
            stride: sizes(&stride, 1),
            padding: padding.map(|padding| sizes(&padding, 0)),
            dilation: sizes(&dilation, 1),
        })
    }
}

impl Geometry {
    /// Pixels of Y for those of X. None: the kernel does not fit.
    fn outputs(&self, input: [usize; 3]) -> Option<[usize; 3]> {
        let mut output = [0; 3];
        for (d, output) in output.iter_mut().enumerate() {
            let span = self.dilation[d].checked_mul(self.kernel[d].checked_sub(1)?)?.checked_add(1)?;
            let padded = input[d].checked_add(self.padding[0][d])?.checked_add(self.padding[1][d])?;
            *output = padded.checked_sub(span)?.checked_div(self.stride[d])? + 1;
        }
        Some(output)
    }
}

/// Layout of the planes of a kernel [out, in / groups, taps].
fn kernel_layout(format: &Format, shape: [usize; 3], axis: usize) -> PyResult<PlaneLayout> {
    layout(format, &shape, axis as isize)
}

/// Bytes of a kernel [out, in / groups, taps] as [`keep_kernel`] lays it out; None: it can't be kept.
#[pyfunction]
pub(crate) fn kept_kernel_bytes(
    format: &Format,
    shape: [usize; 3],
    axis: usize,
    groups: usize,
) -> PyResult<Option<usize>> {
    Ok(convolution::kept_kernel_bytes(&here()?, &kernel_layout(format, shape, axis)?, groups))
}

/// The planes of a kernel [out, in / groups, taps], blocked along axis 0 or 1, laid out for its products in a uint8 tensor;
/// None: it can't be kept.
#[pyfunction]
pub(crate) fn keep_kernel<'py>(
    py: Python<'py>,
    exponents: PyReadonlyArrayDyn<'py, u8>,
    mantissas: PyReadonlyArrayDyn<'py, u8>,
    format: &Format,
    shape: [usize; 3],
    axis: usize,
    groups: usize,
    threads: usize,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let layout = kernel_layout(format, shape, axis)?;
    let Some(len) = convolution::kept_kernel_bytes(&here()?, &layout, groups) else { return Ok(None) };
    let halves = [
        contiguous(&exponents, Some(layout.exponents()), "exponents")?,
        contiguous(&mantissas, Some(layout.mantissas()), "mantissas")?,
    ];
    let mut bytes = BytesView::new(py, len)?;
    let slice = bytes.as_mut_slice();
    run(py, threads, |ctx| convolution::keep_kernel(ctx, &layout, groups, halves, slice))?;
    Ok(Some(bytes.into_tensor()))
}

/// What [`keep_kernel`] gave for a kernel [out, in / groups, taps], for many products.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct KeptKernel {
    codes: Py<PyAny>,
    layout: PlaneLayout,
    groups: usize,
}

#[pymethods]
impl KeptKernel {
    #[new]
    fn new(codes: Py<PyAny>, format: &Format, shape: [usize; 3], axis: usize, groups: usize) -> PyResult<Self> {
        Ok(Self { codes, layout: kernel_layout(format, shape, axis)?, groups })
    }

    /// The exponent and the mantissa plane.
    fn planes<'py>(&self, py: Python<'py>) -> PyResult<PlanePair<'py>> {
        let bytes = BytesView::read(self.codes.bind(py), "codes")?;
        let kept = self.kept(&bytes);
        let (exponents, mantissas) = run(py, 1, |ctx| kept.planes(ctx))?;
        planes(py, encode::Planes { exponents, mantissas }, [self.layout.exponents(), self.layout.mantissas()])
    }
}

impl KeptKernel {
    fn kept<'a>(&'a self, bytes: &'a BytesView<'_>) -> convolution::KeptKernel<'a> {
        convolution::KeptKernel { layout: &self.layout, groups: self.groups, bytes: bytes.as_slice() }
    }
}

/// A kernel while its memory is borrowed.
enum KernelView<'py> {
    Floats(FloatView<'py>),
    Kept(&'py KeptKernel, BytesView<'py>),
}

/// Y [N, C_out, ..] of X [N, C, ..], or with `spatial` the X of those pixels of a Y, in a new tensor that has the channels
/// of a pixel together, as the image has; w a tensor or a [`KeptKernel`]. None for all that is not as usual, errors
/// included: the caller then takes the way that knows about it.
#[pyfunction]
pub(crate) fn tensor_convolution<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    w: &Bound<'py, PyAny>,
    operands: Codings<'py>,
    geometry: &Geometry,
    spatial: Option<Vec<usize>>,
    bias: Option<&Bound<'py, PyAny>>,
    seed: u64,
    threads: usize,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Geometry { rank, groups, flatten, kernel, stride, padding: [padding, _], dilation } = *geometry;
    let Some(image) = FloatView::plain(x)?.and_then(|view| view.channels_last(rank)) else { return Ok(None) };
    let bias = match bias {
        None => None,
        Some(bias) => match FloatView::plain(bias)?.filter(FloatView::is_contiguous) {
            None => return Ok(None),
            bias => bias,
        },
    };
    let kept = w.cast::<KeptKernel>().ok().map(|kept| kept.get());
    let view = match kept {
        Some(kept) => KernelView::Kept(kept, BytesView::read(kept.codes.bind(py), "codes")?),
        None => match FloatView::plain(w)?.and_then(|view| view.three_pixel_dimensions(rank)) {
            None => return Ok(None),
            Some(view) => KernelView::Floats(view),
        },
    };
    let [outs, channels, taps] = match &view {
        KernelView::Kept(kept, _) => [0, 1, 2].map(|d| kept.layout.shape()[d]),
        KernelView::Floats(view) if view.shape()[2..] == kernel => {
            [view.shape()[0], view.shape()[1], kernel.iter().product()]
        }
        KernelView::Floats(_) => return Ok(None),
    };
    let &[batch, p0, p1, p2, given] = image.shape() else { return Ok(None) };
    let (pixels, channels) = ([p0, p1, p2], [channels.saturating_mul(groups), outs]);
    let (input, output) = match &spatial {
        None => (Some(pixels), geometry.outputs(pixels)),
        Some(spatial) if spatial.len() == rank => (threes(spatial, 1), Some(pixels)),
        Some(_) => return Ok(None),
    };
    let (Some(input), Some(output)) = (input, output) else { return Ok(None) };
    let ([from, to], product) = if spatial.is_none() { ([0, 1], output) } else { ([1, 0], input) };
    let convolution = Convolution { batch, channels, groups, input, output, kernel, stride, padding, dilation };
    let codings = codings(&operands, seed)?;
    let lines = codings.iter().all(|coding| matches!(coding.format.shape(), BlockShape::Line(_)));
    let whole = groups > 0 && outs % groups == 0 && taps == kernel.iter().product::<usize>();
    let full = [image.count(), outs, channels[0], taps].into_iter().chain(product).all(|n| n > 0);
    let biased = bias.as_ref().is_none_or(|bias| bias.shape() == [channels[to]]);
    if !(lines && whole && full && biased && given == channels[from]) || convolution.check().is_err() {
        return Ok(None);
    }
    if let KernelView::Kept(kept, _) = &view
        && (kept.groups != groups
            || kept.layout.format() != codings[1].format
            || kept.layout.axis() != usize::from(spatial.is_none()))
    {
        return Ok(None);
    }
    let (shape, strides) = channels_last(batch, channels[to], &product[3 - rank..]);
    let arguments = (PyTuple::new(py, shape)?, PyTuple::new(py, strides)?);
    let out = x.call_method1(intern!(py, "new_empty_strided"), arguments)?;
    let target = FloatView::described(&out).and_then(|view| view.channels_last(rank));
    let expected = [batch, product[0], product[1], product[2], channels[to]];
    let Some(mut target) = target.filter(|view| view.shape() == expected) else { return Ok(None) };
    let tensor;
    let w = match &view {
        KernelView::Kept(kept, bytes) => Kernel::Kept(kept.kept(bytes)),
        KernelView::Floats(view) => {
            tensor = view.tensor();
            Kernel::Floats(&tensor)
        }
    };
    let (image, bias, target) = (image.as_slice(), bias.as_ref().map(FloatView::as_slice), target.as_mut_slice());
    run_with_workspace(py, threads, |ctx, workspace| {
        if spatial.is_none() {
            convolution.forward(ctx, image, w, codings, flatten, bias, target, workspace)
        } else {
            convolution.input_gradient(ctx, image, w, codings, bias, target, workspace)
        }
    })?;
    Ok(Some(out))
}

/// Shape [batch, channels, pixels..] and strides of a tensor that has the channels of a pixel together.
fn channels_last(batch: usize, channels: usize, pixels: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let shape: Vec<usize> = [batch, channels].iter().chain(pixels).copied().collect();
    let mut strides = vec![1; shape.len()];
    let mut step = channels;
    for (d, &size) in pixels.iter().enumerate().rev() {
        strides[d + 2] = step;
        step *= size;
    }
    strides[0] = step;
    (shape, strides)
}
