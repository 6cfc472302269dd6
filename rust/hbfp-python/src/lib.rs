//! Python bindings of the `hbfp` core: they check arguments, rebuild views, release the GIL and map errors. Nothing here
//! computes a number.

mod attention;
mod ceilings;
mod convolution;
mod encode;
mod error;
mod format;
mod product;
mod residual;
mod run;
mod view;

use pyo3::pymodule;

/// The compiled core of the Python package.
#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "a Python dunder name")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use crate::attention::{
        GrownAttention, attention, attention_backward, attention_mask_gradient, column_sums, dropout, softmax,
        softmax_backward,
    };
    #[pymodule_export]
    use crate::ceilings::{multiply_adds, read_memory};
    #[pymodule_export]
    use crate::convolution::{
        Geometry, KeptKernel, convolution_forward, convolution_input_gradient, convolution_weight_gradient,
        keep_kernel, kept_kernel_bytes, tensor_convolution,
    };
    #[pymodule_export]
    use crate::encode::{check, decode, encode, measure, pack, philox4x32, quantize, unpack};
    #[pymodule_export]
    use crate::error::{CodeError, DTypeError, FormatError, HBFPError, LevelError, NonFiniteError, ShapeError};
    #[pymodule_export]
    use crate::format::Format;
    #[pymodule_export]
    use crate::product::{
        Floats, KeptMatrix, Packed, Planes, keep, kept_panels, kept_planes, kept_product, lay_out, prepack, product,
        tensor_product,
    };
    #[pymodule_export]
    use crate::residual::Residual;
    #[pymodule_export]
    use crate::run::info;
    #[pymodule_export]
    use crate::view::set_tensor_type;

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::run::remember_process();
        Ok(())
    }
}
