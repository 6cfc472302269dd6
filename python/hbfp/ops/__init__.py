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
    coded_product,
    decode,
    encode,
    packed_product,
    panel_sizes,
    panels_of_floats,
    panels_of_planes,
    planes_of_panels,
    quick_packed_product,
    sum_of_products,
)
from hbfp.ops.products import (
    Measured,
    column_sums,
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
    attention,
    attention_backward,
    softmax,
    softmax_backward,
)

__all__ = [
    "Geometry",
    "Measured",
    "Operand",
    "Product",
    "Recorder",
    "attention",
    "attention_backward",
    "bytes_in",
    "bytes_of",
    "channels_together",
    "coded_product",
    "column_sums",
    "convolution",
    "convolution_input_gradient",
    "convolution_keeping",
    "convolution_weight_gradient",
    "decode",
    "encode",
    "forward_operands",
    "input_gradient_operands",
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
    "sum_of_products",
    "tell",
    "wanted",
    "weight_gradient_operands",
]
