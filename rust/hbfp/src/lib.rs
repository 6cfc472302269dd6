//! Hybrid block floating point (HBFP): blocks of numbers share a power-of-two exponent and keep narrow integer
//! mantissas, so that matrix products are fixed-point arithmetic with an exact, machine-independent result.
//!
//! The layers, each using only those above it:
//! [`mod@format`] → [`rng`] → [`pack`] → [`shape`] → [`encode`] → [`gemm`] → [`attention`], on kernels chosen per CPU
//! [`Level`] and on the threads of a [`parallel::Team`]. [`mod@reference`] tells the same contract again, slowly and obviously.
//!
//! The crate keeps no state: kernels, threads, buffers and random streams are arguments.

pub(crate) mod arch;
pub mod attention;
pub mod ceilings;
pub mod encode;
pub mod error;
pub mod format;
pub mod gemm;
pub(crate) mod mem;
pub mod pack;
pub mod parallel;
pub mod reference;
pub mod rng;
pub mod shape;
pub mod sums;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use arch::kernels::Kernels;
pub use arch::level::Level;
pub use encode::Context;
pub use error::{Error, Result};
pub use format::{BlockFormat, BlockShape, ExponentRule, Rounding};
