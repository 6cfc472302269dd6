//! Algorithms told once, over the operations of [`crate::arch::simd::Simd`].

pub(crate) mod aligned;
pub(crate) mod encode;
pub(crate) mod matrix_unit;
pub(crate) mod narrow_groups;
pub(crate) mod philox;
pub(crate) mod product;
pub(crate) mod relayout;
pub(crate) mod softmax;
pub(crate) mod straight;
pub(crate) mod unit_rows;
