"""The exact-arithmetic oracle: the specification (docs/spec.md) in integers and fractions, and nothing else.

It shares no code with the compiled core, so that agreement means something. It is written to be read beside the
specification, and quick enough for products of some hundred thousand multiply-accumulates: `arithmetic` holds formats,
encoding, products and linear layers, `convolution` the products of a convolution, all by the names below.

Functions carry the names and signatures of the numpy level. Formats are read through plain attributes: an `hbfp.HBFP`
serves, and so does `FormatDescription`, which needs no compiled code. Bad arguments raise `ValueError`.
"""

from __future__ import annotations

from hbfp.reference.arithmetic import (
    CANONICAL_NAN,
    ROUNDINGS,
    SCALE_OFFSET,
    BlockFormat,
    Encoded,
    FormatDescription,
    LinearStep,
    Lines,
    bias_gradient,
    block_exponent,
    encode,
    encode_with,
    float32_add,
    float32_value,
    linear,
    linear_step,
    matmul,
    max_code,
    pack_codes,
    philox4x32,
    product,
    product_of_lines,
    quantize,
    random_bits,
    round_to_code,
    round_to_float32,
    row_and_column,
    scale_exponent,
    scale_range,
    softmax,
    softmax_backward,
    stream_number,
    unpack_codes,
)
from hbfp.reference.convolution import (
    convolution,
    convolution_bias_gradient,
    convolution_input_gradient,
    convolution_weight_gradient,
)

__all__ = [
    "CANONICAL_NAN",
    "ROUNDINGS",
    "SCALE_OFFSET",
    "BlockFormat",
    "Encoded",
    "FormatDescription",
    "LinearStep",
    "Lines",
    "bias_gradient",
    "block_exponent",
    "convolution",
    "convolution_bias_gradient",
    "convolution_input_gradient",
    "convolution_weight_gradient",
    "encode",
    "encode_with",
    "float32_add",
    "float32_value",
    "linear",
    "linear_step",
    "matmul",
    "max_code",
    "pack_codes",
    "philox4x32",
    "product",
    "product_of_lines",
    "quantize",
    "random_bits",
    "round_to_code",
    "round_to_float32",
    "row_and_column",
    "scale_exponent",
    "scale_range",
    "softmax",
    "softmax_backward",
    "stream_number",
    "unpack_codes",
]
