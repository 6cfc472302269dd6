//! Operands and products.

use crate::encode::mode;
use crate::error::{DTypeError, ShapeError};
use crate::format::{Format, layout, resolve_axis};
use crate::run::{run, run_with_workspace};
use crate::view::{FloatView, contiguous};
use hbfp::encode::RoundingMode;
use hbfp::gemm::{self, Epilogue, Operand, Right};
use hbfp::shape::PlaneLayout;
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::prelude::*;

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
        if let Self::Floats(view, ..) = self { out.expect_apart(view.extent(), "out") } else { Ok(()) }
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
