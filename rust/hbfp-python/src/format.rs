//! Block formats as Python objects.

use crate::error::{FormatError, to_python};
use hbfp::shape::PlaneLayout;
use hbfp::{BlockFormat, BlockShape, ExponentRule};
use pyo3::prelude::*;

/// A block format, validated.
#[pyclass(frozen, eq, hash, str = "{inner}", module = "hbfp._core")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Format {
    pub(crate) inner: BlockFormat,
}

#[pymethods]
impl Format {
    #[new]
    #[pyo3(signature = (bits, block=Some(64), tile=None, exponent_rule="max_exponent", exponent_bits=8, exponent_bias=None))]
    fn new(
        bits: i64,
        block: Option<i64>,
        tile: Option<i64>,
        exponent_rule: &str,
        exponent_bits: i64,
        exponent_bias: Option<i64>,
    ) -> PyResult<Self> {
        let refuse = |what: &str, n: i64| FormatError::new_err(format!("expected {what}; found {n}"));
        let size = |n: i64, what| usize::try_from(n).map_err(|_| refuse(what, n));
        let byte = |n: i64, what| u8::try_from(n).map_err(|_| refuse(what, n));
        let shape = match (tile, block) {
            (Some(t), _) => BlockShape::Tile(size(t, "a tile side of 1…32")?),
            (None, Some(n)) => BlockShape::Line(size(n, "a block of 1…1024 elements, or None for the whole tensor")?),
            (None, None) => BlockShape::Tensor,
        };
        let rule = match exponent_rule {
            "max_exponent" => ExponentRule::MaxExponent,
            "ceil" => ExponentRule::Ceil,
            "no_clip" => ExponentRule::NoClip,
            other => {
                let text = format!("expected an exponent rule max_exponent, ceil or no_clip; found {other:?}");
                return Err(FormatError::new_err(text));
            }
        };
        let bias = exponent_bias.map(|b| i32::try_from(b).unwrap_or(i32::MAX));
        let bits = byte(bits, "a mantissa width of 2…16 bits, sign included")?;
        let exponent_bits = byte(exponent_bits, "an exponent width of 2…8 bits")?;
        BlockFormat::new(bits, shape)
            .and_then(|f| f.with_rule(rule).with_exponent(exponent_bits, bias))
            .map(|inner| Self { inner })
            .map_err(|e| to_python(&e))
    }

    #[staticmethod]
    fn parse(text: &str) -> PyResult<Self> {
        text.parse().map(|inner| Self { inner }).map_err(|e| to_python(&e))
    }

    /// Whether the kernels take it straight from floats.
    #[getter]
    fn encodes_to_panels(&self) -> bool {
        self.inner.encodes_to_panels()
    }
    #[getter]
    fn bits(&self) -> u8 {
        self.inner.bits()
    }
    #[getter]
    fn block(&self) -> Option<usize> {
        if let BlockShape::Line(n) = self.inner.shape() { Some(n) } else { None }
    }
    #[getter]
    fn tile(&self) -> Option<usize> {
        if let BlockShape::Tile(t) = self.inner.shape() { Some(t) } else { None }
    }
    #[getter]
    fn exponent_rule(&self) -> &'static str {
        match self.inner.rule() {
            ExponentRule::MaxExponent => "max_exponent",
            ExponentRule::Ceil => "ceil",
            ExponentRule::NoClip => "no_clip",
        }
    }
    #[getter]
    fn exponent_bits(&self) -> u8 {
        self.inner.exponent_bits()
    }
    #[getter]
    fn exponent_bias(&self) -> i32 {
        self.inner.exponent_bias()
    }

    /// Shapes of the exponent and the mantissa plane of a tensor.
    fn plane_shapes(&self, shape: Vec<usize>, axis: isize) -> PyResult<((usize, usize), (usize, usize))> {
        let layout = layout(self, &shape, axis)?;
        let pair = |[rows, columns]: [usize; 2]| (rows, columns);
        Ok((pair(layout.exponents()), pair(layout.mantissas())))
    }

    fn __repr__(&self) -> String {
        format!("Format({})", self.inner)
    }
}

/// An axis counted from the front.
pub(crate) fn resolve_axis(axis: isize, rank: usize) -> PyResult<usize> {
    let rank = rank.max(1) as isize;
    if (-rank..rank).contains(&axis) {
        return Ok(axis.rem_euclid(rank) as usize);
    }
    let text = format!("expected an axis in {}…{}; found {axis}", -rank, rank - 1);
    Err(crate::error::ShapeError::new_err(text))
}

pub(crate) fn layout(format: &Format, shape: &[usize], axis: isize) -> PyResult<PlaneLayout> {
    let axis = resolve_axis(axis, shape.len())?;
    PlaneLayout::new(format.inner, shape, axis).map_err(|e| to_python(&e))
}
