//! Exceptions, and which of them a core error becomes.

use hbfp::Error;
use pyo3::exceptions::PyValueError;
use pyo3::{PyErr, create_exception};

create_exception!(hbfp._core, HBFPError, PyValueError, "Base of all errors of hbfp.");
create_exception!(hbfp._core, FormatError, HBFPError, "A block format or rounding outside the contract.");
create_exception!(hbfp._core, ShapeError, HBFPError, "Sizes, axes or block boundaries that do not fit together.");
create_exception!(hbfp._core, DTypeError, HBFPError, "An array of a type, device or layout that is not taken.");
create_exception!(hbfp._core, NonFiniteError, HBFPError, "A NaN or an infinity where a check was asked for.");
create_exception!(hbfp._core, CodeError, HBFPError, "Codes or planes that no encoder produces.");
create_exception!(hbfp._core, LevelError, HBFPError, "A CPU level or threading choice that can't be had.");

pub(crate) fn to_python(error: &Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Format { .. } => FormatError::new_err(text),
        Error::Shape { .. } => ShapeError::new_err(text),
        Error::NonFinite { .. } => NonFiniteError::new_err(text),
        Error::Code { .. } => CodeError::new_err(text),
        Error::Level { .. } => LevelError::new_err(text),
        _ => HBFPError::new_err(text),
    }
}
