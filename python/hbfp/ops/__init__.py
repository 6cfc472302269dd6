"""The one door from torch tensors to the compiled core.

Every function here comes in two forms that give the same bits:

- called eagerly on plain CPU tensors it goes straight to `_core`, which costs a few microseconds;
- under `torch.compile`, under a dispatch mode and for tensor subclasses it goes through `torch.ops.hbfp.*`, which other
  parts of torch can see, trace and replace.

Rules of the door: float16, bfloat16 and float64 are cast to float32 on the way in (float64 rounds to nearest-even),
other dtypes and devices raise; results are fresh float32 tensors, never views; nothing is remembered between calls, so
seed and streams are arguments. There are no derivatives at this level: `hbfp.autograd` builds them from these.
"""

from hbfp.ops.convolutions import (
    Geometry,
    channels_together,
    convolution,
    convolution_input_gradient,
    convolution_input_gradient_keeping,
    convolution_keeping,
    convolution_weight_gradient,
    forward_operands,
    input_gradient_operands,
    kept_convolution_weight_gradient,
    patches,
    reference_convolution,
    reference_convolution_input_gradient,
    reference_convolution_weight_gradient,
    weight_gradient_operands,
)
from hbfp.ops.entrance import (
    Operand,
    Product,
    Recorder,
    observed,
    recorders,
    require_real,
    tell,
    wanted,
)
from hbfp.ops.packed import (
    bytes_in,
    bytes_of,
    decode,
    packed_product,
    panel_sizes,
    panels_of_floats,
    panels_of_planes,
    planes_of_panels,
    quick_packed_product,
)
from hbfp.ops.products import (
    Measured,
    column_sums,
    keep,
    kept_product,
    measure,
    next_step,
    product,
    product_keeping,
    product_operands,
    product_shape,
    quantize,
    quick_product,
    reference_product,
)
from hbfp.ops.softmax_attention import (
    attend,
    attention,
    attention_backward,
    grown_attention,
    softmax,
    softmax_backward,
)

__all__ = [
    "Geometry",
    "Measured",
    "Operand",
    "Product",
    "Recorder",
    "attend",
    "attention",
    "attention_backward",
    "bytes_in",
    "bytes_of",
    "channels_together",
    "column_sums",
    "convolution",
    "convolution_input_gradient",
    "convolution_input_gradient_keeping",
    "convolution_keeping",
    "convolution_weight_gradient",
    "decode",
    "forward_operands",
    "grown_attention",
    "input_gradient_operands",
    "keep",
    "kept_convolution_weight_gradient",
    "kept_product",
    "measure",
    "next_step",
    "observed",
    "packed_product",
    "panel_sizes",
    "panels_of_floats",
    "panels_of_planes",
    "patches",
    "planes_of_panels",
    "product",
    "product_keeping",
    "product_operands",
    "product_shape",
    "quantize",
    "quick_packed_product",
    "quick_product",
    "recorders",
    "reference_convolution",
    "reference_convolution_input_gradient",
    "reference_convolution_weight_gradient",
    "reference_product",
    "require_real",
    "softmax",
    "softmax_backward",
    "tell",
    "wanted",
    "weight_gradient_operands",
]
