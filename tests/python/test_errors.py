"""Bad input of every kind: the error has a name, and its message says what was expected, what was found, what to do."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

import hbfp
from hbfp import (
    HBFP,
    HBFP4,
    HBFP6,
    BlockArray,
    CodeError,
    DTypeError,
    FormatError,
    HBFPError,
    NonFiniteError,
    Rounding,
    ShapeError,
)

X = np.ones((3, 70), np.float32)
W = np.ones((5, 70), np.float32)
T = hbfp.encode(X, HBFP4)
U = hbfp.encode(W, HBFP4)
TILED = hbfp.encode(np.ones((2, 3, 8), np.float32), "hbfp4t4")


def planes(format: HBFP = HBFP4, shape: tuple[int, ...] = (3, 70)) -> list[np.ndarray]:
    return [np.zeros(size, np.uint8) for size in format.plane_shapes(shape)]


# (what is done, the error, parts of its message)
CASES: dict[str, tuple[Callable[[], object], type[HBFPError], list[str]]] = {
    # formats
    "bits too few": (lambda: HBFP(1), FormatError, ["2", "16", "found 1"]),
    "bits too many": (lambda: HBFP(17), FormatError, ["2", "16", "found 17"]),
    "bits beyond any integer": (lambda: HBFP(10**30), FormatError, ["10000"]),
    "bits negative": (lambda: HBFP(-4), FormatError, ["-4"]),
    "bits as text": (lambda: HBFP("4"), FormatError, ["bits must be an integer", "found '4'"]),
    "bits as float": (lambda: HBFP(4.0), FormatError, ["bits must be an integer", "found 4.0"]),
    "bits as bool": (lambda: HBFP(True), FormatError, ["bits must be an integer", "found True"]),
    "no bits": (lambda: HBFP(None), FormatError, ["bits must be an integer", "found None"]),
    "block of none": (lambda: HBFP(4, 0), FormatError, ["1", "1024", "found 0"]),
    "block too large": (lambda: HBFP(4, 1025), FormatError, ["1024", "found 1025"]),
    "block as text": (lambda: HBFP(4, "tensor"), FormatError, ["block must be an integer", "'tensor'"]),
    "tile of none": (lambda: HBFP(4, tile=0), FormatError, ["1", "32", "found 0"]),
    "tile too large": (lambda: HBFP(4, tile=33), FormatError, ["32", "found 33"]),
    "unknown rule": (
        lambda: HBFP(4, exponent_rule="floor"),
        FormatError,
        ["unknown exponent rule 'floor'", "'max_exponent', 'ceil', 'no_clip'"],
    ),
    "exponent too narrow": (lambda: HBFP(4, exponent_bits=1), FormatError, ["2", "8", "found 1"]),
    "exponent too wide": (lambda: HBFP(4, exponent_bits=9), FormatError, ["8", "found 9"]),
    "bias out of range": (lambda: HBFP(4, exponent_bits=2, exponent_bias=500), FormatError, ["500"]),
    "format unknown": (lambda: hbfp.encode(X, "int4"), FormatError, ["hbfp4b64", "found", "int4"]),
    "format of another kind": (lambda: hbfp.encode(X, 4), FormatError, ["hbfp.HBFP4", "found 4"]),
    # encode
    "rounding unknown": (
        lambda: hbfp.encode(X, HBFP4, rounding="up"),
        FormatError,
        ["unknown rounding 'up'", "'nearest_even', 'nearest_away', 'toward_zero', 'stochastic'"],
    ),
    "rounding by number": (lambda: hbfp.encode(X, HBFP4, rounding=0), FormatError, ["unknown rounding 0"]),
    "rounding unknown to quantize": (lambda: hbfp.quantize(X, HBFP4, rounding=None), FormatError, ["None"]),
    "axis outside": (lambda: hbfp.encode(X, HBFP4, 2), ShapeError, ["-2 ... 1", "[3, 70]", "found 2"]),
    "axis below": (lambda: hbfp.encode(X, HBFP4, -3), ShapeError, ["-2 ... 1", "found -3"]),
    "axis of a 0-d array": (lambda: hbfp.encode(1.0, HBFP4, 1), ShapeError, ["-1 ... 0", "[]", "found 1"]),
    "axis outside with tiles": (lambda: hbfp.encode(X, "hbfp4t8", 2), ShapeError, ["-2 ... 1", "found 2"]),
    "axis outside with whole tensors": (lambda: hbfp.encode(X, "hbfp4tensor", 2), ShapeError, ["found 2"]),
    "axis as text": (lambda: hbfp.encode(X, HBFP4, "last"), ShapeError, ["integer", "'last'"]),
    "axis as float": (lambda: hbfp.quantize(X, HBFP4, 1.0), ShapeError, ["integer", "1.0"]),
    "seed negative": (lambda: hbfp.encode(X, HBFP4, seed=-1), HBFPError, ["seed", "18446744073709551615", "found -1"]),
    "seed too large": (lambda: hbfp.encode(X, HBFP4, seed=2**64), HBFPError, ["seed", "found 18446744073709551616"]),
    "seed as float": (lambda: hbfp.encode(X, HBFP4, seed=1.5), HBFPError, ["seed must be an integer", "1.5"]),
    "stream negative": (lambda: hbfp.quantize(X, HBFP4, stream=-1), HBFPError, ["stream", "found -1"]),
    "stream too large": (lambda: hbfp.linear(X, U, stream=2**64), HBFPError, ["stream", "found"]),
    # inputs
    "integers": (lambda: hbfp.encode([1, 2], HBFP4), DTypeError, ["int64", "astype(np.float32)", "from_parts"]),
    "unsigned": (lambda: hbfp.encode(np.zeros(3, np.uint8), HBFP4), DTypeError, ["uint8", "astype"]),
    "booleans": (lambda: hbfp.encode([True], HBFP4), DTypeError, ["bool", "astype(np.float32)"]),
    "complex": (lambda: hbfp.encode([1j], HBFP4), DTypeError, ["complex128", "x.real and x.imag"]),
    "objects": (lambda: hbfp.encode([None], HBFP4), DTypeError, ["object", "float"]),
    "text": (lambda: hbfp.encode("3.5", HBFP4), DTypeError, ["<U3", "float"]),
    "nothing": (lambda: hbfp.encode(None, HBFP4), DTypeError, ["object"]),
    "dates": (lambda: hbfp.encode(np.zeros(2, "M8[s]"), HBFP4), DTypeError, ["datetime64"]),
    "records": (lambda: hbfp.encode(np.zeros(2, [("a", "f4")]), HBFP4), DTypeError, ["'a'"]),
    "ragged": (lambda: hbfp.encode([[1.0], [2.0, 3.0]], HBFP4), DTypeError, ["x must be an array of floats", "list"]),
    "masked": (lambda: hbfp.encode(np.ma.masked_invalid([1.0, np.nan]), HBFP4), DTypeError, ["masked", "filled"]),
    "integers on the left": (lambda: hbfp.matmul([[1]], U), DTypeError, ["a must hold", "int64"]),
    "integers on the right": (lambda: hbfp.matmul(T, [[1]]), DTypeError, ["b must hold", "int64"]),
    "integers as bias": (lambda: hbfp.linear(X, U, np.arange(5)), DTypeError, ["bias must hold", "int64"]),
    # non-finite values
    "NaN": (
        lambda: hbfp.encode([[0.0, 1.0], [0.0, np.nan]], HBFP4, check=True),
        NonFiniteError,
        ["expected finite", "NaN", "3", "without check"],
    ),
    "infinity": (lambda: hbfp.quantize([1.0, -np.inf], HBFP4, check=True), NonFiniteError, ["-inf", "1"]),
    "NaN down a column": (
        lambda: hbfp.encode(np.where(np.eye(3) == 1, np.nan, 0)[:, ::-1], HBFP4, 0, check=True),
        NonFiniteError,
        ["2"],
    ),
    "NaN in a tile": (
        lambda: hbfp.encode(np.where(np.arange(35) == 19, np.nan, 0.0).reshape(5, 7), "hbfp4t2", check=True),
        NonFiniteError,
        ["19"],
    ),
    # out
    "out of another type": (
        lambda: hbfp.quantize(X, HBFP4, out=np.empty(X.shape)),
        DTypeError,
        ["out must be a float32 array", "float64"],
    ),
    "out as list": (lambda: hbfp.quantize(X, HBFP4, out=[0.0]), DTypeError, ["out must be", "list"]),
    "out big-endian": (
        lambda: hbfp.quantize(X, HBFP4, out=np.empty(X.shape, ">f4")),
        DTypeError,
        ["out must be", ">f4"],
    ),
    "out of another shape": (
        lambda: hbfp.matmul(T, U.T, out=np.empty((5, 3), np.float32)),
        ShapeError,
        ["out must have", "[3, 5]", "found [5, 3]"],
    ),
    "out not contiguous": (
        lambda: hbfp.matmul(T, U.T, out=np.empty((5, 3), np.float32).T),
        ShapeError,
        ["C-contiguous", "np.empty"],
    ),
    "out read-only": (
        lambda: hbfp.quantize(X, HBFP4, out=np.broadcast_to(np.float32(0), X.shape)),
        ShapeError,
        ["writable"],
    ),
    "accumulate into nothing": (lambda: hbfp.matmul(T, U.T, accumulate=True), HBFPError, ["accumulate", "give out="]),
    "accumulate into nothing, linear": (lambda: hbfp.linear(X, U, accumulate=True), HBFPError, ["give out="]),
    # products
    "no format": (lambda: hbfp.matmul(X, W.T), FormatError, ["a and b are both floats", "format="]),
    "no format, linear": (lambda: hbfp.linear(X, W), FormatError, ["x and w are both floats", "format="]),
    "vector": (lambda: hbfp.matmul(X[0], U.T), ShapeError, ["a [..., M, K]", "[70]", "reshape"]),
    "scalar": (lambda: hbfp.linear(1.0, U), ShapeError, ["x [..., K]", "[]"]),
    "inner sizes differ": (
        lambda: hbfp.matmul(T, U),
        ShapeError,
        ["last dimension of a", "last but one of b", "[3, 70]", "[5, 70]"],
    ),
    "inner sizes differ, linear": (lambda: hbfp.linear(X[:, :8], U), ShapeError, ["w [N, K]", "[3, 8]", "[5, 70]"]),
    "weight of three dimensions": (
        lambda: hbfp.linear(X, W[None], format=HBFP4),
        ShapeError,
        ["w [N, K]", "[1, 5, 70]"],
    ),
    "batches differ": (
        lambda: hbfp.matmul(np.ones((2, 3, 8)), np.ones((4, 8, 3)), format=HBFP4),
        ShapeError,
        ["leading dimensions", "[2, 3, 8]", "[4, 8, 3]", "broadcast_to"],
    ),
    "batch on the right only": (
        lambda: hbfp.matmul(np.ones((3, 8)), np.ones((4, 8, 3)), format=HBFP4),
        ShapeError,
        ["leading dimensions", "[3, 8]", "[4, 8, 3]"],
    ),
    "left blocked across": (
        lambda: hbfp.matmul(hbfp.encode(X, HBFP4, 0), U.T),
        ShapeError,
        ["a must be blocked along axis -1", "axis 0", "encode it with axis=-1", ".T"],
    ),
    "right blocked across": (
        lambda: hbfp.matmul(X, hbfp.encode(W.T, HBFP4, 1)),
        ShapeError,
        ["b must be blocked along axis -2", "[70, 5]", "axis 1", "encode it with axis=-2", ".T"],
    ),
    "blocked along the batch": (
        lambda: hbfp.matmul(hbfp.encode(np.ones((2, 3, 70)), HBFP4, 0), U.T),
        ShapeError,
        ["a must be blocked along axis -1", "axis 0", "encode it with axis=-1"],
    ),
    "weight blocked across": (
        lambda: hbfp.linear(X, hbfp.encode(W, HBFP4, 0)),
        ShapeError,
        ["w must be blocked along axis -1", "encode it with axis=-1"],
    ),
    "blocks of other sizes": (
        lambda: hbfp.matmul(T, hbfp.encode(W, "hbfp4b32").T),
        ShapeError,
        ["K = 70", "64 (hbfp4b64)", "32 (hbfp4b32)", "same block"],
    ),
    "blocks and tiles": (
        lambda: hbfp.linear(T, hbfp.encode(W, "hbfp4t8")),
        ShapeError,
        ["64 (hbfp4b64)", "8 (hbfp4t8)"],
    ),
    "blocks and a whole tensor": (
        lambda: hbfp.matmul(T, W.T, format="hbfp4tensor"),
        ShapeError,
        ["64 (hbfp4b64)", "70 (hbfp4tensor)"],
    ),
    "bias of another shape": (lambda: hbfp.linear(X, U, X[0]), ShapeError, ["bias must have shape [5]", "found [70]"]),
    "tiles that end within a batch": (
        lambda: hbfp.linear(TILED, np.ones((4, 8)), format="hbfp4t4"),
        ShapeError,
        ["4 x 4", "[2, 3, 8]", "one matrix"],
    ),
    "prepacked in matmul": (lambda: hbfp.matmul(X, hbfp.prepack(U)), DTypeError, ["hbfp.linear"]),
    "prepack floats": (lambda: hbfp.prepack(W), DTypeError, ["BlockArray", "ndarray", "hbfp.encode"]),
    "prepack more than a matrix": (
        lambda: hbfp.prepack(hbfp.encode(W[None], HBFP4)),
        ShapeError,
        ["[N, K]", "[1, 5, 70]"],
    ),
    "prepack across": (
        lambda: hbfp.prepack(hbfp.encode(W, HBFP4, 0)),
        ShapeError,
        ["weight must be blocked along axis -1"],
    ),
    "no threads": (lambda: hbfp.matmul(T, U.T, threads=0), HBFPError, ["threads", "found 0"]),
    "half a thread": (lambda: hbfp.set_num_threads(0.5), HBFPError, ["threads must be an integer", "0.5"]),
    "negative threads": (lambda: hbfp.set_num_threads(-1), HBFPError, ["threads", "found -1"]),
    # parts and planes
    "codes as floats": (
        lambda: BlockArray.from_parts([1.0], [127], HBFP4, (1,)),
        DTypeError,
        ["mantissas", "integers", "float64"],
    ),
    "codes of another shape": (
        lambda: BlockArray.from_parts([1, 2], [127], HBFP4, (3,)),
        ShapeError,
        ["mantissas", "[3]", "found [2]"],
    ),
    "exponents of another shape": (
        lambda: BlockArray.from_parts([1, 2], [127, 127], HBFP4, (2,)),
        ShapeError,
        ["exponents", "[1]", "found [2]"],
    ),
    "code too large": (
        lambda: BlockArray.from_parts([[0, 7], [8, 0]], [[127], [127]], HBFP4, (2, 2)),
        CodeError,
        ["mantissas", "-7 ... 7", "found 8 at index [1, 0]"],
    ),
    "forbidden code": (lambda: BlockArray.from_parts([-8], [127], HBFP4, (1,)), CodeError, ["-7 ... 7", "found -8"]),
    "code beyond its type": (lambda: BlockArray.from_parts([256], [127], HBFP4, (1,)), CodeError, ["found 256"]),
    "exponent too large": (lambda: BlockArray.from_parts([0], [256], HBFP4, (1,)), CodeError, ["0 ... 255", "256"]),
    "exponent negative": (lambda: BlockArray.from_parts([0], [-1], HBFP4, (1,)), CodeError, ["exponents", "found -1"]),
    "codes in a NaN block": (lambda: BlockArray.from_parts([1], [255], HBFP4, (1,)), CodeError, ["expected", "found"]),
    "plane of another shape": (
        lambda: BlockArray(planes()[0][:2], planes()[1], HBFP4, (3, 70)),
        ShapeError,
        ["exponent_plane", "hbfp4b64", "[3, 70]", "[3, 2]", "found [2, 2]"],
    ),
    "plane of another type": (
        lambda: BlockArray(planes()[0], planes()[1].astype(np.int8), HBFP4, (3, 70)),
        DTypeError,
        ["mantissa_plane", "uint8", "int8"],
    ),
    "plane as list": (lambda: BlockArray([[1]], planes()[1], HBFP4, (3, 70)), DTypeError, ["exponent_plane", "list"]),
    "shape negative": (lambda: BlockArray(*planes(), HBFP4, (-3, 70)), HBFPError, ["dimension", "found -3"]),
    "shape too large": (lambda: BlockArray(*planes(), HBFP4, (2**40, 2**40)), ShapeError, ["found"]),
    "axis outside the planes": (lambda: BlockArray(*planes(), HBFP4, (3, 70), 2), ShapeError, ["axis", "found 2"]),
    "lines held transposed": (
        lambda: BlockArray(*planes(), HBFP4, (3, 70), transposed=True),
        ShapeError,
        ["only tiles and whole tensors"],
    ),
    # views
    "T of a vector": (lambda: hbfp.encode(X[0], HBFP4).T, ShapeError, ["matrices", "[70]"]),
    "T of a batch": (lambda: TILED.T, ShapeError, ["matrices", "[2, 3, 8]", "mT"]),
    "mT of a vector": (lambda: hbfp.encode(X[0], HBFP4).mT, ShapeError, ["two dimensions", "[70]"]),
    "mT across the blocks": (
        lambda: hbfp.encode(np.ones((2, 3, 8)), HBFP4, 0).mT,
        ShapeError,
        ["axis 0", "[2, 3, 8]", "encode again"],
    ),
    "floats without a copy": (lambda: T.__array__(copy=False), HBFPError, ["copy=False"]),
}


@pytest.mark.parametrize("kind", CASES)
def test_bad_input(kind):
    act, error, words = CASES[kind]
    with pytest.raises(HBFPError) as caught:
        act()
    assert type(caught.value) is error
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize("error", [getattr(hbfp, name) for name in dir(hbfp) if name.endswith("Error")], ids=str)
def test_every_error_is_a_value_error(error):
    """Code that caught ValueError before there were names for them goes on working."""
    assert issubclass(error, HBFPError)
    assert issubclass(error, ValueError)


def test_wide_floats_are_refused():
    """Rounding them twice, to float64 and to float32, would be silent."""
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long double is float64 on this system")
    with pytest.raises(DTypeError, match=re.escape("astype(np.float64)")):
        hbfp.encode(np.ones(2, np.longdouble), HBFP4)


def test_tensors_that_cannot_be_read_say_why():
    torch = pytest.importorskip("torch")
    with pytest.raises(DTypeError, match=r"Tensor.*detach"):
        hbfp.encode(torch.ones(3, requires_grad=True), HBFP4)
    with pytest.raises(DTypeError, match=r"Tensor"):
        hbfp.encode(torch.ones(3, dtype=torch.bfloat16), HBFP4)
    with pytest.raises(DTypeError, match="int64"):
        hbfp.encode(torch.arange(3), HBFP4)


def test_a_refused_call_leaves_out_alone():
    out = np.full((3, 70), 5, np.float32)
    x = X.copy()
    x[2, 69] = np.nan
    with pytest.raises(NonFiniteError):
        hbfp.quantize(x, HBFP4, check=True, out=out)
    assert (out == 5).all()


def test_prepacked_weights_meet_any_activations():
    """One layout serves every width on the left; blocks that end elsewhere are refused."""
    packed = hbfp.prepack(U)
    for format in (HBFP(3), HBFP6, HBFP(16)):
        assert np.array_equal(hbfp.linear(X, packed, format=format), hbfp.linear(X, U, format=format))
    with pytest.raises(ShapeError, match="same block"):
        hbfp.linear(X, packed, format="hbfp4b16")


def test_roundings_are_listed_in_full():
    with pytest.raises(FormatError) as caught:
        Rounding.parse("nearest")
    assert all(repr(str(rounding)) in str(caught.value) for rounding in Rounding)
