//! Attention: integer products around an FP32 softmax, as a whole without the matrices between them, over a text that
//! grows, and the softmax alone.

mod fused;
mod grown;
mod softmax;

pub use fused::{Attention, Gradients, Workspace};
pub use grown::Grown;
pub use softmax::{Softmax, softmax_backward};
