"""ONNX, opset 21: blocked `DequantizeLinear` for arrays.

An array is INT4, INT8 or INT16 codes and a float32 scale 2^s for each block: `DequantizeLinear` with `block_size`
multiplies the two, which is exact (docs/spec.md 1.8). Every scale exponent of HBFP is a float32, the last block of a
line may be short in ONNX too, and so all arrays fit but those with a NaN block. `onnx_network` writes whole networks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hbfp.array import BlockArray
from hbfp.errors import FileError
from hbfp.exports.lossless import check, exponent_bytes, place, refuse, required, scaled
from hbfp.files.replacing import replaced
from hbfp.format import HBFP

__all__ = ["Graph", "Quantized", "load", "pack", "save", "unpack"]

OPSET = 21
IR_VERSION = 10  # the one of opset 21
DOMAIN = "hbfp"
LARGEST_TENSORS = 2**31 - 2**20  # protobuf ends at 2 GiB; more would need files beside the file
CODES, SCALES = ".codes", ".scales"


class Quantized(NamedTuple):
    """The inputs and attributes of a DequantizeLinear."""

    codes: NDArray[Any]
    """Integers of the logical shape."""
    bits: int
    """4, 8 or 16: INT4, INT8 or INT16."""
    scales: NDArray[np.float32]
    """Of the logical shape with the blocked axis counted in blocks; without dimensions if there is one for all."""
    axis: int
    block: int | None
    """The `block_size`; None where one scale serves all."""


def pack(array: BlockArray, name: str = "array") -> Quantized:
    """An array as DequantizeLinear takes it.

    Args:
        array: any, in lines along any axis, in tiles (their scales are repeated for every row) or as a whole tensor.
        name: of the tensor, for messages.

    Raises:
        ExportError: a NaN block.
        CodeError: the array was read from a file that holds forbidden codes.
    """
    check(array, place(array, name), 16, "ONNX")
    format, shape, exponents = array.format, array.shape, array.exponents
    block = format.tile or format.block
    # One dimension and one block: onnxruntime takes a single scale for that of the whole tensor, and block_size amiss.
    if block is None or not shape or exponents.shape == (1,):
        block, exponents = None, exponents.reshape(-1)[:1].reshape(())
    elif format.tile is not None and len(shape) > 1:
        exponents = exponents.repeat(format.tile, axis=-2)[..., : shape[-2], :]
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    bits = next(width for width in (4, 8, 16) if format.bits <= width)
    return Quantized(array.mantissas, bits, np.asarray(scales, np.float32), array.axis, block)


def unpack(parts: Quantized, name: str = "array", format: HBFP | str | None = None) -> BlockArray:
    """The array of such parts.

    Args:
        parts: codes less their zero point, scales, axis and block.
        name: of the tensor, for messages.
        format: of the result; None: of the codes' width. Another one must have the same blocks and all codes.

    Raises:
        ExportError: a scale that is no power of two; a code that the format does not have; other blocks; parts that do
            not fit together.
    """
    return _array(parts, f"tensor {name!r}", format)


def _array(parts: Quantized, where: str, format: HBFP | str | None) -> BlockArray:
    codes, bits, scales, axis, block = parts
    _check_scales(codes.shape, scales.shape, axis, block, where)
    wanted = HBFP.parse(format) if format is not None else HBFP(bits, block)
    if wanted.block != block or wanted.tile is not None:
        refuse(where, "format", f"blocks of {block if block is not None else 'the whole tensor'}", wanted)
    axis = wanted.blocked_axis(axis, codes.shape)
    codes = scaled(codes, _for_each_element(scales, codes.shape, axis, block))
    outside = np.argwhere(np.abs(codes) > wanted.max_code)
    if len(outside):
        first = [int(part) for part in outside[0]]
        number = tuple(part // block if place == axis and block else part for place, part in enumerate(first))
        limit = f"codes -{wanted.max_code} ... {wanted.max_code} of {wanted}"
        refuse(where, "code", limit, int(codes[tuple(first)]), number if block is not None else None)
    bytes_ = exponent_bytes(scales, where)
    if block is None:
        bytes_ = bytes_.reshape((1,) * codes.ndim)
    return BlockArray.from_parts(codes, bytes_, wanted, codes.shape, axis)


def _check_scales(shape: tuple[int, ...], scales: tuple[int, ...], axis: int, block: int | None, where: str) -> None:
    expected = list(shape) if block is not None else []
    if block is not None:
        if not 1 <= block <= 1024:
            refuse(where, "block_size", "1 to 1024", block)
        if not -len(shape) <= axis < len(shape):
            refuse(where, "axis", f"one of shape {list(shape)}", axis)
        expected[axis] = -(-expected[axis] // block)
    if list(scales) != expected:
        refuse(where, "scales", f"shape {expected}", list(scales))


def _for_each_element(values: NDArray[Any], shape: tuple[int, ...], axis: int, block: int | None) -> NDArray[Any]:
    """The value of its block for each element, or the only one."""
    if block is None:
        return values
    return values.repeat(min(block, max(shape[axis], 1)), axis).take(np.arange(shape[axis]), axis)


# --- files of arrays -------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], tensors: Mapping[str, BlockArray | ArrayLike]) -> None:
    """Writes a model without inputs whose outputs are the tensors: encoded arrays decoded, plain arrays as they are.

    Args:
        path: of the file, which appears complete or not at all; one that exists is replaced.
        tensors: by name.

    Raises:
        ExportError: an array has a NaN block; a plain array is of a type that ONNX does not have; two tensors would
            have one name; the file would be larger than 2 GiB. Nothing is written.
        ModuleNotFoundError: the package onnx is not installed.
        OSError: the file cannot be written.
    """
    graph = Graph()
    for name, value in tensors.items():
        if isinstance(value, BlockArray):
            graph.dequantize(name, pack(value, name))
            graph.output(name, value.shape)
        else:
            array = np.asarray(value)
            graph.initializer(name, array)
            graph.output(name, array.shape, array.dtype)
    graph.write(path)


def load(
    path: str | os.PathLike[str], formats: Mapping[str, HBFP | str] | None = None
) -> dict[str, BlockArray | NDArray[Any]]:
    """Reads a file: what a DequantizeLinear makes of constants as `BlockArray`, all other constants as arrays, by name.

    Args:
        path: of the file; any ONNX model, of which only the main graph's initializers and DequantizeLinear are read.
        formats: by name, where another one than the codes' width is wanted (`unpack`).

    Raises:
        ExportError: a tensor does not fit (`unpack`), or has one scale for each channel.
        FileError: the file is damaged or not ONNX.
        ModuleNotFoundError: the package onnx is not installed.
        OSError: the file cannot be read.
    """
    where = os.fspath(path)
    onnx = required("onnx")
    decode_error = required("google.protobuf.message").DecodeError
    try:
        graph = onnx.load(where).graph
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    # What protobuf, numpy and onnx raise where bytes, lengths and types don't fit together.
    except (decode_error, onnx.checker.ValidationError, ValueError, TypeError, KeyError, IndexError) as error:
        raise FileError(f"{where}: expected an ONNX file; found one that cannot be read: {error}") from error
    result: dict[str, BlockArray | NDArray[Any]] = {}
    parts: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.domain not in ("", "ai.onnx"):
            continue
        inputs = [name for name in node.input if name]
        if len(inputs) not in (2, 3) or len(node.output) != 1:
            raise FileError(f"{where}: node {node.name!r}: expected 2 or 3 inputs and an output of DequantizeLinear")
        if all(name in constants for name in inputs):
            name = node.output[0]
            tensor = f"{where}: tensor {name!r}"
            given = _quantized([constants[name] for name in inputs], node.attribute, tensor)
            result[name] = _array(given, tensor, (formats or {}).get(name))
            parts.update(inputs)
    return result | {name: array for name, array in constants.items() if name not in parts}


_WIDTHS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16}
_SCALES = ("float16", "bfloat16", "float32")


def _quantized(inputs: Sequence[NDArray[Any]], attributes: Any, where: str) -> Quantized:
    values = {attribute.name: attribute.i for attribute in attributes}
    axis, block = values.get("axis", 1), values.get("block_size", 0) or None
    codes, scales, *zero = inputs
    if codes.dtype.name not in _WIDTHS:
        refuse(where, "type", f"one of {', '.join(_WIDTHS)}", codes.dtype.name)
    if scales.dtype.name not in _SCALES:
        refuse(where, "type of the scales", f"one of {', '.join(_SCALES)}", scales.dtype.name)
    if block is None:
        axis = -1
    _check_scales(codes.shape, scales.shape, axis, block, where)
    if zero and (zero[0].dtype != codes.dtype or zero[0].shape != scales.shape):
        expected, found = f"{codes.dtype} {list(scales.shape)}", f"{zero[0].dtype} {list(zero[0].shape)}"
        refuse(where, "zero point", expected, found)
    bits = _WIDTHS[codes.dtype.name]
    for zeros in zero:
        codes = codes.astype(np.int32) - _for_each_element(zeros.astype(np.int32), codes.shape, axis, block)
    return Quantized(codes, bits, scales.astype(np.float32), axis, block)


# --- writing ---------------------------------------------------------------------------------------------------------


class Graph:
    """A model in the making."""

    def __init__(self) -> None:
        self._onnx = required("onnx")
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._functions: dict[str, Any] = {}
        self._names: set[str] = set()

    def function(self, text: str) -> str:
        """Adds a local function, once; its name."""
        function = self._onnx.parser.parse_function(text)
        self._functions.setdefault(function.name, function)
        return str(function.name)

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Adds a node of a standard operator or a local function; its output."""
        domain = DOMAIN if operator in self._functions else ""
        self._nodes.append(
            self._onnx.helper.make_node(operator, inputs, [self._new(output)], domain=domain, **attributes)
        )
        return output

    def initializer(self, name: str, array: NDArray[Any]) -> None:
        self._new(name)
        try:
            self._constants.append(self._onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        except (KeyError, TypeError, ValueError):
            refuse(f"tensor {name!r}", "dtype", "one that ONNX has", array.dtype)

    def dequantize(self, name: str, parts: Quantized) -> None:
        integers = required("ml_dtypes").int4 if parts.bits == 4 else np.dtype(f"int{parts.bits}")
        self.initializer(name + CODES, parts.codes.astype(integers))
        self.initializer(name + SCALES, parts.scales)
        blocked = {} if parts.block is None else {"axis": parts.axis, "block_size": parts.block}
        self.node("DequantizeLinear", [name + CODES, name + SCALES], name, **blocked)

    def input(self, name: str, shape: Sequence[int | str]) -> None:
        self._inputs.append(self._value(self._new(name), shape, np.float32))

    def output(self, name: str, shape: Sequence[int | str | None], dtype: Any = np.float32) -> None:
        self._outputs.append(self._value(name, shape, dtype))

    def _value(self, name: str, shape: Sequence[int | str | None], dtype: Any) -> Any:
        helper = self._onnx.helper
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    def _new(self, name: str) -> str:
        if name in self._names:
            refuse(f"tensor {name!r}", "name", "one tensor of it", "another that the file needs: rename it")
        self._names.add(name)
        return name

    def write(self, path: str | os.PathLike[str]) -> None:
        helper = self._onnx.helper
        size = sum(tensor.ByteSize() for tensor in self._constants)
        if size > LARGEST_TENSORS:
            refuse(os.fspath(path), "size", f"at most {LARGEST_TENSORS} bytes of tensors in a file of ONNX", size)
        graph = helper.make_graph(self._nodes, DOMAIN, self._inputs, self._outputs, self._constants)
        model = helper.make_model(
            graph,
            producer_name=DOMAIN,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
            functions=list(self._functions.values()),
        )
        with replaced(path) as draft:
            draft.write_bytes(model.SerializeToString())
