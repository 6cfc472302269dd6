"""Networks of linear layers in ONNX, opset 21, which compute the bits of the layers.

A network encodes its activations by a local function of standard operators, computed in float64, where nothing of it
rounds but what the format rounds. The scale is a power of two times the largest magnitude's unit in the first place,
which S. M. Rump finds without a logarithm ("Ultimately fast accurate summation", SIAM J. Sci. Comput. 31, 2009).

The product's blocks are summed in the specification's order by a `Scan`: of one block all products are whole multiples
of one power of two and their sums at most 2^24 of it, so that float32 adds them exactly in any order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hbfp.array import BlockArray
from hbfp.exports import onnx
from hbfp.exports.lossless import place, refuse
from hbfp.format import HBFP, ExponentRule, Rounding

__all__ = ["save"]

EXACT_SUM = 2**24  # float32 has all integers up to here


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, BlockArray | ArrayLike],
    layers: Sequence[str],
    *,
    activations: HBFP | str | None = None,
    rounding: str | Rounding = Rounding.NEAREST_EVEN,
    exact: bool = True,
) -> None:
    """Writes a runnable model of converted linear layers with a ReLU between one and the next.

    Its input "x" is float32 [batch, in], its output "y" float32 [batch, out]. It computes what the layers compute in
    torch, and `hbfp.linear` in numpy, bit for bit, apart from the sign of NaN, wherever float32 holds the products: the
    scale exponents of two blocks that meet sum to -149 or more, operands decode to finite values, and the magnitudes of
    a block's products sum to less than 2^128.

    Args:
        path: of the file, which appears complete or not at all; one that exists is replaced.
        tensors: holds "<layer>.weight" [out, in], encoded in lines along `in`, and perhaps "<layer>.bias" for each
            layer: `hbfp.load` of a file of `save_model`.
        layers: their names, in the order in which they run.
        activations: format of every layer's input, None for that of the layer's weight, as the recipes have it.
        rounding: of the activations; not stochastic.
        exact: sum the blocks in the specification's order. False: one MatMul for each layer, which is faster and may
            round sums otherwise: by up to 2^-23 of the sum of the magnitudes of the blocks' terms, for each block.

    Raises:
        ExportError: a layer is missing or does not follow on the one before; a weight is not encoded so, or in blocks
            other than the activations'; a block's sum would not be exact in float32; stochastic rounding; the file
            would be larger than 2 GiB. Nothing is written.
        ModuleNotFoundError: the package onnx is not installed.
        OSError: the file cannot be written.
    """
    how = Rounding.parse(rounding)
    if how is Rounding.STOCHASTIC:
        refuse("activations", "rounding", "a deterministic one", "'stochastic', which needs random bits")
    if not layers:
        refuse("network", "layers", "the names of its linear layers, in their order", "none")
    graph = onnx.Graph()
    product = graph.function(_product(exact))
    current, width = "x", None
    for number, layer in enumerate(layers):
        name = f"{layer}.weight"
        weight = _weight(tensors, name, width)
        format = weight.format if activations is None else HBFP.parse(activations)
        _check_product(place(weight, name), weight.format, format, weight.shape[1], exact)
        lines, encoder = graph.function(_lines(weight.format)), graph.function(_encoder(format, how))
        if width is None:
            graph.input("x", ("batch", weight.shape[1]))
        width = weight.shape[0]
        graph.dequantize(name, onnx.pack(weight, name))
        graph.node(lines, [name], f"{name}.blocks")
        graph.node(encoder, [current], f"{layer}.input.blocks")
        current = graph.node(product, [f"{layer}.input.blocks", f"{name}.blocks"], f"{layer}.product")
        bias = tensors.get(f"{layer}.bias")
        if bias is not None:
            graph.initializer(f"{layer}.bias", _bias(bias, f"{layer}.bias", width))
            current = graph.node("Add", [current, f"{layer}.bias"], f"{layer}.sum")
        if number < len(layers) - 1:
            current = graph.node("Relu", [current], f"{layer}.relu")
    graph.node("Identity", [current], "y")
    graph.output("y", ("batch", width))
    graph.write(path)


def _weight(tensors: Mapping[str, BlockArray | ArrayLike], name: str, width: int | None) -> BlockArray:
    where = f"tensor {name!r}"
    weight = tensors.get(name)
    if not isinstance(weight, BlockArray):
        refuse(where, "layer", "an encoded weight", "no such tensor" if weight is None else "a plain one")
    where = place(weight, name)
    if weight.ndim != 2 or weight.axis != 1 or weight.format.block is None:
        expected = "[out, in] in lines along its inputs"
        refuse(where, "weight", expected, f"{list(weight.shape)} in {weight.format} along axis {weight.axis}")
    if width is not None and weight.shape[1] != width:
        refuse(where, "inputs", f"{width}, the outputs of the layer before", weight.shape[1])
    return weight


def _bias(bias: BlockArray | ArrayLike, name: str, width: int) -> NDArray[np.float32]:
    array = np.asarray(bias)
    if array.dtype != np.float32 or array.shape != (width,):
        refuse(f"tensor {name!r}", "bias", f"float32 [{width}]", f"{array.dtype} {list(array.shape)}")
    return array


def _check_product(where: str, weight: HBFP, activations: HBFP, length: int, exact: bool) -> None:
    if activations.block != weight.block:
        refuse(where, "blocks", f"those of the activations, {activations}", weight)
    assert weight.block is not None
    largest = min(weight.block, length) * weight.max_code * activations.max_code
    if exact and largest > EXACT_SUM:
        found = f"up to {largest} in {activations} · {weight}: exact=False does without"
        refuse(where, "sum of a block", "at most 2^24, which float32 adds exactly, for the order of sums", found)


def _lines(format: HBFP) -> str:
    """[rows, n] -> [rows, blocks, elements of a block], zeros filling the last one."""
    return f'''
        <opset_import: ["": {onnx.OPSET}], domain: "{onnx.DOMAIN}">
        lines_of_{format.block} (x) => (blocks)
        {{
            block = Constant <value_ints = [{format.block}]> ()
            zero = Constant <value_ints = [0]> ()
            length = Shape <start = 1> (x)
            short = Mod (length, block)
            missing = Sub (block, short)
            fill = Mod (missing, block)
            pads = Concat <axis = 0> (zero, fill)
            axis = Constant <value_ints = [1]> ()
            filled = Pad (x, pads, , axis)
            shape = Constant <value_ints = [0, -1, {format.block}]> ()
            blocks = Reshape (filled, shape)
        }}'''


_ROUNDINGS = {
    Rounding.NEAREST_EVEN: "rounded = Round (y)",
    Rounding.NEAREST_AWAY: """
            half = Constant <value = double {0.5}> ()
            sign = Sign (y)
            size = Abs (y)
            more = Add (size, half)
            whole = Floor (more)
            rounded = Mul (sign, whole)""",
    Rounding.TOWARD_ZERO: """
            sign = Sign (y)
            size = Abs (y)
            whole = Floor (size)
            rounded = Mul (sign, whole)""",
}

# From the scale that floor(log2 amax) gives, clauses 2.2 to 2.4.
_RULES = {
    ExponentRule.MAX_EXPONENT: "chosen = Identity (natural)",
    ExponentRule.CEIL: """
            lower = Constant <value = double {0.5}> ()
            halved = Mul (natural, lower)
            is_power = Equal (amax, first)
            chosen = Where (is_power, halved, natural)""",
    ExponentRule.NO_CLIP: """
            limit = Mul (natural, above)
            saturates = GreaterOrEqual (amax, limit)
            doubled = Add (natural, natural)
            chosen = Where (saturates, doubled, natural)""",
}


def _encoder(format: HBFP, rounding: Rounding) -> str:
    """[rows, n] -> the values of its encoding [rows, blocks, elements of a block] (docs/spec.md sections 1 to 3).

    `large` is 2^52 times amax and a little more: its last place is worth amax's first, and `less` is the float64 below.
    No product by a constant is one that an optimiser takes for 1, as onnxruntime does 1 - 2^-53. A block with a NaN or
    an infinity is all NaN, as is 0 / 0. Codes pass through integers because rounding keeps the sign of -0.5, and no
    code is -0.0.
    """
    assert format.exponent_bias is not None
    low = max(-format.exponent_bias, -127)
    high = min(2**format.exponent_bits - 2 - format.exponent_bias, 127)
    name = f"encode_{format}_{rounding}".replace("-", "_")
    return f'''
        <opset_import: ["": {onnx.OPSET}, "{onnx.DOMAIN}": 1], domain: "{onnx.DOMAIN}">
        {name} (x) => (values)
        {{
            blocks = {onnx.DOMAIN}.lines_of_{format.block} (x)
            wide = Cast <to = 11> (blocks)
            nan = IsNaN (wide)
            infinite = IsInf (wide)
            bad = Or (nan, infinite)
            zero = Constant <value = double {{0.0}}> ()
            finite = Where (bad, zero, wide)
            magnitudes = Abs (finite)
            axis = Constant <value_ints = [2]> ()
            amax = ReduceMax (magnitudes, axis)
            spread = Constant <value = double {{{2.0**52 + 1!r}}}> ()
            large = Mul (spread, amax)
            unit = Constant <value = double {{{2.0**-53!r}}}> ()
            part = Mul (unit, large)
            less = Sub (large, part)
            first = Sub (large, less)
            step = Constant <value = double {{{2.0 ** (2 - format.bits)!r}}}> ()
            natural = Mul (first, step)
            above = Constant <value = double {{{format.max_code + 0.5!r}}}> ()
            {_RULES[ExponentRule(format.exponent_rule)]}
            lowest = Constant <value = double {{{2.0**low!r}}}> ()
            highest = Constant <value = double {{{2.0**high!r}}}> ()
            scale = Clip (chosen, lowest, highest)
            y = Div (finite, scale)
            {_ROUNDINGS[rounding]}
            largest = Constant <value = double {{{float(format.max_code)!r}}}> ()
            smallest = Constant <value = double {{{-float(format.max_code)!r}}}> ()
            saturated = Clip (rounded, smallest, largest)
            codes = Cast <to = 6> (saturated)
            unsigned_zero = Cast <to = 11> (codes)
            decoded = Mul (unsigned_zero, scale)
            marks = Cast <to = 6> (bad)
            mark = ReduceMax (marks, axis)
            spoilt = Cast <to = 9> (mark)
            nothing = Div (zero, zero)
            all = Where (spoilt, nothing, decoded)
            values = Cast <to = 1> (all)
        }}'''


def _product(exact: bool) -> str:
    """Two operands [rows, blocks, elements] -> [rows of the first, rows of the second]."""
    if not exact:
        return f'''
        <opset_import: ["": {onnx.OPSET}], domain: "{onnx.DOMAIN}">
        product (a, w) => (y)
        {{
            shape = Constant <value_ints = [0, -1]> ()
            left = Reshape (a, shape)
            right = Reshape (w, shape)
            columns = Transpose <perm = [1, 0]> (right)
            y = MatMul (left, columns)
        }}'''
    return f'''
        <opset_import: ["": {onnx.OPSET}], domain: "{onnx.DOMAIN}">
        product (a, w) => (y)
        {{
            left = Transpose <perm = [1, 0, 2]> (a)
            right = Transpose <perm = [1, 2, 0]> (w)
            rows = Shape <start = 0, end = 1> (a)
            columns = Shape <start = 0, end = 1> (w)
            shape = Concat <axis = 0> (rows, columns)
            zeros = ConstantOfShape (shape)
            y = Scan <num_scan_inputs = 2, body = one_block
                (float[m, n] sum, float[m, k] a_block, float[k, n] w_block) => (float[m, n] more)
            {{
                term = MatMul (a_block, w_block)
                more = Add (sum, term)
            }}> (zeros, left, right)
        }}'''
