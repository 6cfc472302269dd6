//! Ceilings of this machine, for benches.

use crate::run::run;
use crate::view::FloatView;
use pyo3::prelude::*;

/// Rounds of multiply-adds in registers; the operations done.
#[pyfunction]
pub(crate) fn multiply_adds(py: Python<'_>, rounds: usize, threads: usize) -> PyResult<u64> {
    run(py, threads, |ctx| Ok(hbfp::ceilings::multiply_adds(ctx, rounds)))
}

/// Reads memory from end to end; the bytes read.
#[pyfunction]
pub(crate) fn read_memory(py: Python<'_>, x: &Bound<'_, PyAny>, passes: usize, threads: usize) -> PyResult<u64> {
    let view = FloatView::read(x, "x")?;
    view.expect_contiguous("x")?;
    let memory = view.as_slice();
    run(py, threads, |ctx| Ok(hbfp::ceilings::read(ctx, memory, passes)))
}
