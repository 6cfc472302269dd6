//! Attention: integer products around an FP32 softmax, as a whole without the matrices between them, over a text that
//! grows, and the softmax and its dropout alone.

mod dropout;
mod fused;
mod grown;
mod mask;
mod softmax;

pub use dropout::Dropout;
pub use fused::{Attention, Gradients, Workspace};
pub use grown::Grown;
pub use softmax::{Softmax, softmax_backward};
