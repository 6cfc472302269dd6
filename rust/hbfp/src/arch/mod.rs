//! Kernels: one algorithm told once in [`generic`] over the vector operations of [`simd`], compiled per CPU level.
//!
//! The only home of intrinsics. What a level adds is one file: its [`simd::Simd`] operations and its entry in
//! [`kernels`]. Everything above sees [`kernels::Kernels`], a table of functions.
#![allow(unsafe_code, reason = "intrinsics and raw loads; every function lists its conditions")]

pub(crate) mod generic;
pub(crate) mod kernels;
pub(crate) mod level;
pub(crate) mod scalar;
#[cfg(any(test, feature = "testing"))]
mod scalar_matrix_unit;
pub(crate) mod simd;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_64;
