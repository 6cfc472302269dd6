//! Encoding, decoding, quantising and measuring.
#![allow(unsafe_code, reason = "quantize writes through a pointer")]
#![allow(clippy::too_many_arguments, reason = "Python signatures")]

use crate::error::{CodeError, DTypeError, to_python};
use crate::format::{Format, layout, resolve_axis};
use crate::run::run;
use crate::view::{FloatView, contiguous};
use hbfp::encode::RoundingMode;
use hbfp::rng::Seed;
use hbfp::{Error, Rounding};
use numpy::{IntoPyArray, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

pub(crate) type PlanePair<'py> = (Bound<'py, PyArray2<u8>>, Bound<'py, PyArray2<u8>>);

pub(crate) fn mode(rounding: u8, seed: u64, stream: u64) -> PyResult<RoundingMode> {
    let rounding = Rounding::from_code(rounding).map_err(|e| to_python(&e))?;
    Ok(RoundingMode { rounding, seed: Seed { seed, stream } })
}

pub(crate) fn planes<'py>(
    py: Python<'py>,
    planes: hbfp::encode::Planes,
    shapes: [[usize; 2]; 2],
) -> PyResult<PlanePair<'py>> {
    let plane = |bytes: Vec<u8>, shape: [usize; 2]| bytes.into_pyarray(py).reshape(shape);
    Ok((plane(planes.exponents, shapes[0])?, plane(planes.mantissas, shapes[1])?))
}

fn checked(view: &FloatView<'_>, check: bool) -> Result<(), Error> {
    match check.then(|| hbfp::encode::first_non_finite(&view.tensor())).flatten() {
        Some((index, bits)) => Err(Error::NonFinite { index, bits }),
        None => Ok(()),
    }
}

/// f32 tensor -> (exponent plane, mantissa plane).
#[pyfunction]
pub(crate) fn encode<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    format: &Format,
    axis: isize,
    rounding: u8,
    seed: u64,
    stream: u64,
    check: bool,
    threads: usize,
) -> PyResult<PlanePair<'py>> {
    let view = FloatView::read(x, "x")?;
    let mode = mode(rounding, seed, stream)?;
    let layout = layout(format, view.shape(), axis)?;
    let axis = resolve_axis(axis, view.shape().len())?;
    let out = run(py, threads, |ctx| {
        checked(&view, check)?;
        hbfp::encode::encode(ctx, &view.tensor(), format.inner, axis, mode)
    })?;
    planes(py, out, [layout.exponents(), layout.mantissas()])
}

/// decode(encode(x)) into `out`, which may be `x`.
#[pyfunction]
pub(crate) fn quantize(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    format: &Format,
    axis: isize,
    rounding: u8,
    seed: u64,
    stream: u64,
    check: bool,
    threads: usize,
) -> PyResult<()> {
    let mode = mode(rounding, seed, stream)?;
    let out_view = FloatView::write(out, "out")?;
    let separate = if x.is(out) { None } else { Some(FloatView::read(x, "x")?) };
    let view = separate.as_ref().unwrap_or(&out_view);
    out_view.expect_shape(view.shape(), "out")?;
    let same = view.as_mut_ptr() == out_view.as_mut_ptr() && view.is_contiguous();
    if !same {
        out_view.expect_apart(view.extent(), "out")?;
    }
    let axis = resolve_axis(axis, view.shape().len())?;
    run(py, threads, |ctx| {
        checked(view, check)?;
        // SAFETY: the output has x's shape and is contiguous; it is x itself, contiguous too, or lies apart from it.
        unsafe { hbfp::encode::quantize(ctx, &view.tensor(), out_view.as_mut_ptr(), format.inner, axis, mode) }
    })
}

/// What encoding costs: non-zero elements, signal, noise, saturated, zeroed, and blocks by exponent byte.
#[pyfunction]
pub(crate) fn measure(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    format: &Format,
    axis: isize,
    rounding: u8,
    seed: u64,
    stream: u64,
    threads: usize,
) -> PyResult<(u64, f64, f64, u64, u64, Vec<u64>)> {
    let view = FloatView::read(x, "x")?;
    let mode = mode(rounding, seed, stream)?;
    let axis = resolve_axis(axis, view.shape().len())?;
    let m = run(py, threads, |ctx| hbfp::encode::measure(ctx, &view.tensor(), format.inner, axis, mode))?;
    Ok((m.nonzero, m.signal, m.noise, m.saturated, m.zeroed, m.exponents.to_vec()))
}

/// Planes -> f32 in the logical shape.
#[pyfunction]
pub(crate) fn decode<'py>(
    py: Python<'py>,
    exponents: PyReadonlyArrayDyn<'py, u8>,
    mantissas: PyReadonlyArrayDyn<'py, u8>,
    format: &Format,
    shape: Vec<usize>,
    axis: isize,
    threads: usize,
) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    let layout = layout(format, &shape, axis)?;
    let exponents = contiguous(&exponents, Some(layout.exponents()), "exponents")?;
    let mantissas = contiguous(&mantissas, Some(layout.mantissas()), "mantissas")?;
    let values = run(py, threads, |ctx| hbfp::encode::decode(ctx, &layout, exponents, mantissas))?;
    values.into_pyarray(py).reshape(shape)
}

/// Raises CodeError for planes that no encoder writes.
#[pyfunction]
pub(crate) fn check(
    py: Python<'_>,
    exponents: PyReadonlyArrayDyn<'_, u8>,
    mantissas: PyReadonlyArrayDyn<'_, u8>,
    format: &Format,
    shape: Vec<usize>,
    axis: isize,
    threads: usize,
) -> PyResult<()> {
    let layout = layout(format, &shape, axis)?;
    let exponents = contiguous(&exponents, Some(layout.exponents()), "exponents")?;
    let mantissas = contiguous(&mantissas, Some(layout.mantissas()), "mantissas")?;
    run(py, threads, |ctx| hbfp::encode::check(ctx, &layout, exponents, mantissas))
}

/// Planes -> codes in the logical shape, int8 or (above 8 bits) int16.
#[pyfunction]
pub(crate) fn unpack<'py>(
    py: Python<'py>,
    exponents: PyReadonlyArrayDyn<'py, u8>,
    mantissas: PyReadonlyArrayDyn<'py, u8>,
    format: &Format,
    shape: Vec<usize>,
    axis: isize,
) -> PyResult<Bound<'py, PyAny>> {
    let layout = layout(format, &shape, axis)?;
    let exponents = contiguous(&exponents, Some(layout.exponents()), "exponents")?;
    let mantissas = contiguous(&mantissas, Some(layout.mantissas()), "mantissas")?;
    let codes = run(py, 1, |_| hbfp::encode::unpack_codes(&layout, exponents, mantissas))?;
    if format.inner.bits() > 8 {
        return Ok(codes.into_pyarray(py).reshape(shape)?.into_any());
    }
    let narrow: Vec<i8> = codes.into_iter().map(|q| q as i8).collect();
    Ok(narrow.into_pyarray(py).reshape(shape)?.into_any())
}

/// Logical codes and the exponent plane -> both planes, validated.
#[pyfunction]
pub(crate) fn pack<'py>(
    py: Python<'py>,
    codes: &Bound<'py, PyAny>,
    exponents: PyReadonlyArrayDyn<'py, u8>,
    format: &Format,
    axis: isize,
) -> PyResult<PlanePair<'py>> {
    let (shape, wide) = if let Ok(codes) = codes.cast::<PyArrayDyn<i8>>() {
        let codes = codes.try_readonly().map_err(|e| CodeError::new_err(e.to_string()))?;
        let wide: Vec<i16> = contiguous(&codes, None, "codes")?.iter().map(|&q| i16::from(q)).collect();
        (codes.shape().to_vec(), wide)
    } else if let Ok(codes) = codes.cast::<PyArrayDyn<i16>>() {
        let codes = codes.try_readonly().map_err(|e| CodeError::new_err(e.to_string()))?;
        (codes.shape().to_vec(), contiguous(&codes, None, "codes")?.to_vec())
    } else {
        let text = format!("codes: expected an int8 or int16 array; found a {}", codes.get_type().name()?);
        return Err(DTypeError::new_err(text));
    };
    let layout = layout(format, &shape, axis)?;
    let exponents = contiguous(&exponents, Some(layout.exponents()), "exponents")?;
    let out = run(py, 1, |_| hbfp::encode::pack_codes(&layout, &wide, exponents))?;
    planes(py, out, [layout.exponents(), layout.mantissas()])
}

/// The four output words of Philox4x32-10.
#[pyfunction]
pub(crate) fn philox4x32(counter: (u32, u32, u32, u32), key: (u32, u32)) -> (u32, u32, u32, u32) {
    let [a, b, c, d] = hbfp::rng::philox4x32(counter.into(), key.into());
    (a, b, c, d)
}
