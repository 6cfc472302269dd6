//! Operands and products.
#![allow(clippy::too_many_arguments, reason = "Python signatures")]

use crate::encode::{PlanePair, mode, planes};
use crate::error::{DTypeError, ShapeError};
use crate::format::{Format, layout, resolve_axis};
use crate::run::{here, run, run_here, run_with_workspace, with_workspace};
use crate::view::{BytesView, FloatView, contiguous};
use hbfp::encode::RoundingMode;
use hbfp::gemm::{self, Beside, Epilogue, Keep, Kept, Operand, Right, Workspace};
use hbfp::shape::PlaneLayout;
use hbfp::{BlockFormat, Context};
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// An operand still in f32.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct Floats {
    x: Py<PyAny>,
    axis: isize,
    format: Format,
    mode: RoundingMode,
}

#[pymethods]
impl Floats {
    #[new]
    #[pyo3(signature = (x, axis, format, rounding=0, seed=0, stream=0))]
    fn new(x: Py<PyAny>, axis: isize, format: &Format, rounding: u8, seed: u64, stream: u64) -> PyResult<Self> {
        Ok(Self { x, axis, format: *format, mode: mode(rounding, seed, stream)? })
    }
}

/// An encoded operand.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct Planes {
    exponents: Py<PyArrayDyn<u8>>,
    mantissas: Py<PyArrayDyn<u8>>,
    layout: PlaneLayout,
    axis: usize,
}

#[pymethods]
impl Planes {
    #[new]
    fn new(
        exponents: Bound<'_, PyArrayDyn<u8>>,
        mantissas: Bound<'_, PyArrayDyn<u8>>,
        format: &Format,
        shape: Vec<usize>,
        axis: isize,
    ) -> PyResult<Self> {
        let layout = layout(format, &shape, axis)?;
        for (plane, expected, what) in
            [(&exponents, layout.exponents(), "exponents"), (&mantissas, layout.mantissas(), "mantissas")]
        {
            contiguous(&borrow(plane)?, Some(expected), what)?;
        }
        let axis = resolve_axis(axis, shape.len())?;
        Ok(Self { exponents: exponents.unbind(), mantissas: mantissas.unbind(), layout, axis })
    }
}

/// A right operand in the kernel's layout.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct Packed {
    inner: gemm::Packed,
}

#[pymethods]
impl Packed {
    #[getter]
    fn shape(&self) -> (usize, usize) {
        self.inner.shape()
    }
    #[getter]
    fn format(&self) -> Format {
        Format { inner: self.inner.format() }
    }
    #[getter]
    fn nbytes(&self) -> usize {
        self.inner.bytes()
    }
    #[getter]
    fn level(&self) -> &'static str {
        self.inner.level().name()
    }
}

fn borrow<'py>(plane: &Bound<'py, PyArrayDyn<u8>>) -> PyResult<PyReadonlyArrayDyn<'py, u8>> {
    plane.try_readonly().map_err(|e| ShapeError::new_err(format!("a plane that can be read was expected: {e}")))
}

/// An operand while its memory is borrowed.
enum Borrowed<'py> {
    Floats(FloatView<'py>, usize, Format, RoundingMode),
    Planes(PyReadonlyArrayDyn<'py, u8>, PyReadonlyArrayDyn<'py, u8>, PlaneLayout, usize),
}

impl<'py> Borrowed<'py> {
    fn new(operand: &Bound<'py, PyAny>, what: &str) -> PyResult<Self> {
        let py = operand.py();
        if let Ok(floats) = operand.cast::<Floats>() {
            let floats = floats.get();
            let view = FloatView::read(floats.x.bind(py), what)?;
            let axis = resolve_axis(floats.axis, view.shape().len())?;
            return Ok(Self::Floats(view, axis, floats.format, floats.mode));
        }
        if let Ok(planes) = operand.cast::<Planes>() {
            let planes = planes.get();
            let (exponents, mantissas) = (borrow(planes.exponents.bind(py))?, borrow(planes.mantissas.bind(py))?);
            return Ok(Self::Planes(exponents, mantissas, planes.layout.clone(), planes.axis));
        }
        let text = format!("{what}: expected Floats or Planes; found a {}", operand.get_type().name()?);
        Err(DTypeError::new_err(text))
    }

    fn operand(&self) -> PyResult<Operand<'_>> {
        Ok(match self {
            Self::Floats(view, axis, format, mode) => {
                Operand::Floats { x: view.tensor(), axis: *axis, format: format.inner, mode: *mode }
            }
            Self::Planes(exponents, mantissas, layout, axis) => Operand::Planes {
                layout,
                exponents: contiguous(exponents, Some(layout.exponents()), "exponents")?,
                mantissas: contiguous(mantissas, Some(layout.mantissas()), "mantissas")?,
                axis: *axis,
            },
        })
    }

    fn expect_apart(&self, out: &FloatView<'_>) -> PyResult<()> {
        match self {
            Self::Floats(view, ..) => out.expect_apart(view.extent(), "out"),
            // Numpy knows which of its own arrays are borrowed, but not whose memory a tensor is.
            Self::Planes(exponents, mantissas, ..) => [exponents, mantissas].into_iter().try_for_each(|plane| {
                let addresses = plane
                    .as_slice()
                    .map_or(0..0, |bytes| bytes.as_ptr_range().start.addr()..bytes.as_ptr_range().end.addr());
                out.expect_apart(addresses, "out")
            }),
        }
    }
}

/// Kernel layout of a 2-D right operand.
#[pyfunction]
pub(crate) fn prepack(py: Python<'_>, operand: &Bound<'_, PyAny>, threads: usize) -> PyResult<Packed> {
    let borrowed = Borrowed::new(operand, "operand")?;
    let operand = borrowed.operand()?;
    let inner = run(py, threads, |ctx| gemm::prepack(ctx, &operand))?;
    Ok(Packed { inner })
}

/// Encodes an operand into a workspace as a product would, and leaves it there: for benches.
#[pyfunction]
pub(crate) fn lay_out(py: Python<'_>, operand: &Bound<'_, PyAny>, left: bool, threads: usize) -> PyResult<()> {
    let borrowed = Borrowed::new(operand, "operand")?;
    let operand = borrowed.operand()?;
    run_with_workspace(py, threads, |ctx, workspace| gemm::lay_out(ctx, &operand, left, workspace))
}

/// out = Σ over the reductions of a times b.
#[pyfunction]
pub(crate) fn product(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    bias: Option<&Bound<'_, PyAny>>,
    accumulate: bool,
    threads: usize,
) -> PyResult<()> {
    let left = Borrowed::new(a, "a")?;
    let packed = b.cast::<Packed>().ok();
    let right = if packed.is_some() { None } else { Some(Borrowed::new(b, "b")?) };
    let mut out = FloatView::write(out, "out")?;
    let bias = bias.map(|bias| FloatView::read(bias, "bias")).transpose()?;
    left.expect_apart(&out)?;
    right.as_ref().map_or(Ok(()), |right| right.expect_apart(&out))?;
    if let Some(bias) = &bias {
        bias.expect_contiguous("bias")?;
        out.expect_apart(bias.extent(), "out")?;
    }
    let a = left.operand()?;
    let b = match (&packed, &right) {
        (Some(packed), _) => Right::Packed(&packed.get().inner),
        (None, Some(right)) => Right::Operand(right.operand()?),
        (None, None) => unreachable!("one of the two was made above"),
    };
    let epilogue = Epilogue { accumulate, bias: bias.as_ref().map(FloatView::as_slice) };
    let out = out.as_mut_slice();
    run_with_workspace(py, threads, |ctx, workspace| gemm::product(ctx, &a, &b, out, epilogue, workspace))
}

/// Products smaller than this are over before another thread, or a release of the GIL, would have paid.
const SMALL_MACS: usize = 1 << 16;
const SMALL_ELEMENTS: usize = 1 << 14;

/// What [`tensor_product`] is to keep of `a`: along its rows, in this format, with this rounding and stream.
type KeepArguments<'py> = (PyRef<'py, Format>, u8, u64);

/// The product of two float tensors in a new one; None for all that is not as usual, errors included: the caller then
/// takes the way that knows about it.
#[pyfunction]
#[pyo3(signature = (a, a_axis, a_format, a_rounding, a_stream, b, b_axis, b_format, b_rounding, b_stream, seed, bias,
                    threads, keep=None))]
pub(crate) fn tensor_product<'py>(
    py: Python<'py>,
    a: &Bound<'py, PyAny>,
    a_axis: isize,
    a_format: &Format,
    a_rounding: u8,
    a_stream: u64,
    b: &Bound<'py, PyAny>,
    b_axis: isize,
    b_format: &Format,
    b_rounding: u8,
    b_stream: u64,
    seed: u64,
    bias: Option<&Bound<'py, PyAny>>,
    threads: usize,
    keep: Option<KeepArguments<'py>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let (Some(mut left), Some(right)) = (FloatView::plain(a)?, FloatView::plain(b)?) else { return Ok(None) };
    let Some(bias) = plain_or_none(bias)? else { return Ok(None) };
    // [.., lines, K] of either, whatever its axis.
    let matrix = |view: &FloatView<'_>, axis: isize| match (view.shape(), axis) {
        (&[.., lines, k], -1) | (&[.., k, lines], -2) if view.count() > 0 => Some((lines, k)),
        _ => None,
    };
    let (Some((m, k)), Some((n, bk))) = (matrix(&left, a_axis), matrix(&right, b_axis)) else { return Ok(None) };
    let batch = |view: &FloatView<'_>| view.shape()[..view.shape().len() - 2].to_vec();
    let mut shape = batch(&left);
    let rows = left.count() / k;
    if right.shape().len() > 2 {
        if shape != batch(&right) || keep.is_some() {
            return Ok(None);
        }
    } else if !shape.is_empty() {
        // Batches are rows of one matrix, in blocks and tiles too.
        match left.flattened() {
            Some(flat) if a_axis == -1 => left = flat,
            _ => return Ok(None),
        }
    }
    if k != bk || (keep.is_some() && a_axis != -1) {
        return Ok(None);
    }
    let a_axis = resolve_axis(a_axis, left.shape().len())?;
    let b_axis = resolve_axis(b_axis, right.shape().len())?;
    let (a_mode, b_mode) = (mode(a_rounding, seed, a_stream)?, mode(b_rounding, seed, b_stream)?);
    shape.extend([m, n]);
    let out = a.call_method1(intern!(py, "new_empty"), PyTuple::new(py, &shape)?)?;
    let Some(mut target) = FloatView::fresh(&out, &shape) else { return Ok(None) };
    let work = rows.saturating_mul(n).saturating_mul(k);
    let small = work <= SMALL_MACS && left.count() + right.count() <= SMALL_ELEMENTS;
    let asked = keep;
    let mut kept = match &asked {
        None => None,
        Some((format, rounding, stream)) => {
            let Some(len) = gemm::kept_bytes(&here()?, k, rows, format.inner) else { return Ok(None) };
            // A few columns pad so much that the floats are smaller.
            if len < 4 * left.count() {
                Some((BytesView::new(py, len)?, format.inner, mode(*rounding, seed, *stream)?))
            } else {
                None
            }
        }
    };
    let a = Operand::Floats { x: left.tensor(), axis: a_axis, format: a_format.inner, mode: a_mode };
    let b = Right::Operand(Operand::Floats { x: right.tensor(), axis: b_axis, format: b_format.inner, mode: b_mode });
    let epilogue = Epilogue { accumulate: false, bias: bias.as_ref().map(FloatView::as_slice) };
    let slice = target.as_mut_slice();
    let keep = kept.as_mut().map(|(bytes, format, mode)| Keep {
        axis: 0,
        format: *format,
        mode: *mode,
        bytes: bytes.as_mut_slice(),
    });
    let multiply = |ctx: &Context<'_>, workspace: &mut Workspace| {
        gemm::product_beside(ctx, &a, Beside { keep, sums: None }, &b, slice, epilogue, workspace)
    };
    if small {
        run_here(|ctx| with_workspace(ctx, multiply))?;
    } else {
        run_with_workspace(py, threads, multiply)?;
    }
    match (kept, &asked) {
        (_, None) => Ok(Some(out)),
        (None, Some(_)) => Ok(Some(PyTuple::new(py, [out, py.None().into_bound(py)])?.into_any())),
        (Some((bytes, ..)), _) => Ok(Some(PyTuple::new(py, [out, bytes.into_tensor()])?.into_any())),
    }
}

/// A right operand laid out in a uint8 tensor, as [`tensor_product`] keeps one; None for a format that can't be kept, and for
/// `below` bytes or more.
#[pyfunction]
#[pyo3(signature = (operand, threads, below=None))]
pub(crate) fn keep<'py>(
    py: Python<'py>,
    operand: &Bound<'py, PyAny>,
    threads: usize,
    below: Option<usize>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let borrowed = Borrowed::new(operand, "operand")?;
    let operand = borrowed.operand()?;
    let (shape, axis) = match &operand {
        Operand::Floats { x, axis, .. } => (x.shape(), *axis),
        Operand::Planes { layout, axis, .. } => (layout.shape(), *axis),
    };
    let &[rows, columns] = shape else {
        return Err(ShapeError::new_err(format!("operand: expected a matrix; found shape {shape:?}")));
    };
    let (lines, k) = if axis == 1 { (rows, columns) } else { (columns, rows) };
    let len = gemm::kept_bytes(&here()?, lines, k, operand.format());
    let Some(len) = len.filter(|&len| below.is_none_or(|below| len < below)) else { return Ok(None) };
    let mut bytes = BytesView::new(py, len)?;
    let slice = bytes.as_mut_slice();
    run(py, threads, |ctx| gemm::keep(ctx, &operand, slice))?;
    Ok(Some(bytes.into_tensor()))
}

/// Panels, bytes of a panel and lines of a panel of what [`keep`] gives for [lines, k]; None: it gives nothing.
#[pyfunction]
pub(crate) fn kept_panels(format: &Format, lines: usize, k: usize) -> PyResult<Option<[usize; 3]>> {
    run_here(|ctx| Ok(gemm::kept_panels(ctx, lines, k, format.inner)))
}

/// The planes of what [`keep`] gave for [lines, k].
#[pyfunction]
pub(crate) fn kept_planes<'py>(
    py: Python<'py>,
    kept: &Bound<'py, PyAny>,
    format: &Format,
    lines: usize,
    k: usize,
) -> PyResult<PlanePair<'py>> {
    let bytes = BytesView::read(kept, "kept")?;
    let layout = layout(format, &[lines, k], 1)?;
    let kept = Kept { lines, k, format: format.inner, bytes: bytes.as_slice() };
    let (exponents, mantissas) = run(py, 1, |ctx| kept.planes(ctx, &layout))?;
    planes(py, hbfp::encode::Planes { exponents, mantissas }, [layout.exponents(), layout.mantissas()])
}

/// What [`keep`] gave for a matrix [lines, k], to be multiplied by many times.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct KeptMatrix {
    codes: Py<PyAny>,
    format: BlockFormat,
    lines: usize,
    k: usize,
}

#[pymethods]
impl KeptMatrix {
    #[new]
    fn new(codes: Py<PyAny>, format: &Format, lines: usize, k: usize) -> Self {
        Self { codes, format: format.inner, lines, k }
    }

    /// A new tensor [.., lines]: x [.., k], a float32 tensor, times the matrix, plus bias. None for all that is not as
    /// usual, errors included.
    fn linear<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        x_format: &Format,
        rounding: u8,
        seed: u64,
        stream: u64,
        bias: Option<&Bound<'py, PyAny>>,
        threads: usize,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (Some(view), Some(bias)) = (FloatView::plain(x)?, plain_or_none(bias)?) else { return Ok(None) };
        let (format, mode) = (x_format.inner, mode(rounding, seed, stream)?);
        self.multiply(py, x, view, format, mode, bias, threads, None)
    }
}

impl KeptMatrix {
    /// [`Self::linear`] of views of x and the bias; in `reused`, where that is a contiguous tensor of the result's shape.
    pub(crate) fn multiply<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        view: FloatView<'py>,
        x_format: BlockFormat,
        mode: RoundingMode,
        bias: Option<FloatView<'py>>,
        threads: usize,
        reused: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Self { lines, k, .. } = *self;
        let mut shape = view.shape().to_vec();
        let (count, Some(last)) = (view.count(), shape.last_mut()) else { return Ok(None) };
        if std::mem::replace(last, lines) != k || count == 0 || lines == 0 || shape.len() < 2 {
            return Ok(None);
        }
        let view = if shape.len() == 2 {
            view
        } else {
            let Some(flat) = view.flattened() else { return Ok(None) };
            flat
        };
        let bytes = BytesView::read(self.codes.bind(py), "kept")?;
        let Some((out, mut target)) = FloatView::output(x, &shape, reused)? else { return Ok(None) };
        let a = Operand::Floats { x: view.tensor(), axis: 1, format: x_format, mode };
        let b = Right::Kept(Kept { lines, k, format: self.format, bytes: bytes.as_slice() });
        let epilogue = Epilogue { accumulate: false, bias: bias.as_ref().map(FloatView::as_slice) };
        let slice = target.as_mut_slice();
        let work = (count / k).saturating_mul(lines).saturating_mul(k);
        let multiply =
            |ctx: &Context<'_>, workspace: &mut Workspace| gemm::product(ctx, &a, &b, slice, epilogue, workspace);
        if work <= SMALL_MACS && count <= SMALL_ELEMENTS {
            run_here(|ctx| with_workspace(ctx, multiply))?;
        } else {
            run_with_workspace(py, threads, multiply)?;
        }
        Ok(Some(out))
    }
}

/// A view of a contiguous bias, if there is one; None: it is not as usual.
fn plain_or_none<'py>(bias: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Option<FloatView<'py>>>> {
    let Some(bias) = bias else { return Ok(Some(None)) };
    Ok(FloatView::plain(bias)?.filter(FloatView::is_contiguous).map(Some))
}

/// out [M, N] = a [K, M] along its rows, or [M, K] along its columns, times what [`tensor_product`] or [`keep`] kept of an
/// X [K, N], plus bias; and sums [M], those of the lines of a.
#[pyfunction]
#[pyo3(signature = (a, kept, kept_format, out, threads, bias=None, sums=None))]
pub(crate) fn kept_product(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    kept: &Bound<'_, PyAny>,
    kept_format: &Format,
    out: &Bound<'_, PyAny>,
    threads: usize,
    bias: Option<&Bound<'_, PyAny>>,
    sums: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let left = Borrowed::new(a, "a")?;
    let bytes = BytesView::read(kept, "kept")?;
    let mut out = FloatView::write(out, "out")?;
    left.expect_apart(&out)?;
    out.expect_apart(bytes.extent(), "out")?;
    let bias = bias.map(|bias| FloatView::read(bias, "bias")).transpose()?;
    if let Some(bias) = &bias {
        bias.expect_contiguous("bias")?;
        out.expect_apart(bias.extent(), "out")?;
    }
    let mut sums = sums.map(|sums| FloatView::write(sums, "sums")).transpose()?;
    if let Some(sums) = &mut sums {
        left.expect_apart(sums)?;
        sums.expect_apart(bytes.extent(), "sums")?;
        sums.expect_apart(out.extent(), "sums")?;
        if let Some(bias) = &bias {
            sums.expect_apart(bias.extent(), "sums")?;
        }
    }
    let Borrowed::Floats(view, axis, ..) = &left else {
        return Err(DTypeError::new_err("a: expected Floats; found Planes"));
    };
    let (&[_, _], &[_, lines]) = (view.shape(), out.shape()) else {
        let found = format!("{:?} and {:?}", view.shape(), out.shape());
        return Err(ShapeError::new_err(format!("expected matrices a and out; found shapes {found}")));
    };
    let kept = Kept { lines, k: view.shape()[*axis], format: kept_format.inner, bytes: bytes.as_slice() };
    let a = left.operand()?;
    let epilogue = Epilogue { accumulate: false, bias: bias.as_ref().map(FloatView::as_slice) };
    let slice = out.as_mut_slice();
    let beside = Beside { keep: None, sums: sums.as_mut().map(FloatView::as_mut_slice) };
    run_with_workspace(py, threads, |ctx, workspace| {
        gemm::product_beside(ctx, &a, beside, &Right::Kept(kept), slice, epilogue, workspace)
    })
}
