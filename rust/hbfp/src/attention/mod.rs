//! Attention: integer products around an FP32 softmax, as a whole without the matrices between them, and the softmax
//! alone.

mod fused;
mod softmax;

pub use fused::{Attention, Gradients, Workspace};
pub use softmax::{Softmax, softmax_backward};
