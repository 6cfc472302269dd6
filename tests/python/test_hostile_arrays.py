"""Arrays of every layout at every entrance of the core: the bits of plain arrays, or an error with a name.

The bugs these hunt: strides that are taken for others, or counted in another unit; a slice of floats that begins at an
odd address; an output that is read-only, has gaps that are written to, or is an input's memory; a size of 0 that leaves
a loop without its first turn; memory that another thread writes to, read twice and believed to be the same.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from contextlib import suppress

import numpy as np
import pytest

import hbfp
from hbfp import _core
from hbfp.errors import DTypeError, HBFPError, ShapeError

FORMAT = hbfp.HBFP.parse("hbfp4b16").core
CODING = [(FORMAT, 0, 0)] * 2
SIZES = (1, [(1, 2, 3), (1, 2, 3), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)])
RNG = np.random.default_rng(5)


def floats(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def operand(x, axis=-1):
    return _core.Floats(x, axis, FORMAT)


def planes_of(x):
    return dict(zip(("exponents", "mantissas"), _core.encode(x, FORMAT, -1, 0, 0, 0, False, 1), strict=True))


def call_of(q, k, v, mask=None):
    return q, k, v, mask, False, 0.5, None, CODING, 3


A, B = floats(6, 20), floats(5, 20)
PLANES = planes_of(B)
CODES = _core.unpack(**PLANES, format=FORMAT, shape=B.shape, axis=-1)
WIDE = hbfp.HBFP.parse("hbfp12b16").core
WIDE_PLANES = dict(zip(("exponents", "mantissas"), _core.encode(B, WIDE, -1, 0, 0, 0, False, 1), strict=True))
QKV = {"q": floats(2, 6, 8), "k": floats(2, 5, 8), "v": floats(2, 5, 4)}
SCORES = floats(2, 6, 5)
DO = floats(2, 6, 4)
IMAGE, KERNEL = floats(2, 1, 2, 3, 8), floats(6, 8, 1, 1, 1)
DY = floats(2, 1, 2, 3, 6)

# Entrance -> the arrays it is given, the shapes of its outputs, and the call.
ENTRANCES = {
    "encode": ({"x": A}, {}, lambda x: _core.encode(x, FORMAT, -1, 3, 1, 2, True, 2)),
    "quantize": ({"x": A}, {"out": A.shape}, lambda x, out: _core.quantize(x, out, FORMAT, 0, 3, 1, 2, True, 2)),
    "measure": ({"x": A}, {}, lambda x: _core.measure(x, FORMAT, 0, 0, 0, 0, 2)),
    "decode": (PLANES, {}, lambda exponents, mantissas: _core.decode(exponents, mantissas, FORMAT, B.shape, -1, 2)),
    "check": (PLANES, {}, lambda exponents, mantissas: _core.check(exponents, mantissas, FORMAT, B.shape, -1, 2)),
    "unpack": (PLANES, {}, lambda exponents, mantissas: _core.unpack(exponents, mantissas, FORMAT, B.shape, -1)),
    "pack": (
        {"codes": CODES, "exponents": PLANES["exponents"]},
        {},
        lambda **x: _core.pack(**x, format=FORMAT, axis=-1),
    ),
    "pack 16 bits": (
        {
            "codes": _core.unpack(**WIDE_PLANES, format=WIDE, shape=B.shape, axis=-1),
            "exponents": WIDE_PLANES["exponents"],
        },
        {},
        lambda **x: _core.pack(**x, format=WIDE, axis=-1),
    ),
    "prepack": ({"x": B}, {}, lambda x: _core.prepack(operand(x), 2).nbytes),
    "lay_out": ({"x": B}, {}, lambda x: _core.lay_out(operand(x), True, 2)),
    "product": (
        {"a": A, "b": B, "bias": floats(5)},
        {"out": (6, 5)},
        lambda a, b, bias, out: _core.product(operand(a), operand(b), out, bias, False, 2),
    ),
    "product of columns": (
        {"a": floats(20, 6), "b": floats(20, 5)},
        {"out": (6, 5)},
        lambda a, b, out: _core.product(operand(a, -2), operand(b, -2), out, None, False, 2),
    ),
    "product of planes": (
        {"a": A, **PLANES},
        {"out": (6, 5)},
        lambda a, out, **planes: _core.product(
            operand(a), _core.Planes(**planes, format=FORMAT, shape=B.shape, axis=-1), out, None, False, 2
        ),
    ),
    "attention": (
        {**QKV, "mask": SCORES},
        {"out": (2, 6, 4)},
        lambda out, **x: _core.attention(call_of(**x), CODING, out, 2),
    ),
    "attention_backward": (
        {"do": DO, **QKV, "mask": SCORES},
        {"dq": (2, 6, 8), "dk": (2, 5, 8), "dv": (2, 5, 4)},
        lambda do, q, k, v, mask, dq, dk, dv: _core.attention_backward(
            call_of(q, k, v, mask), do, (CODING,) * 4, (dq, dk, dv), 2
        ),
    ),
    "attention_mask_gradient": (
        {"do": DO, **QKV, "mask": SCORES},
        {"out": (2, 1, 5)},
        lambda do, out, **x: _core.attention_mask_gradient(call_of(**x), do, CODING, out, True, 2),
    ),
    "softmax": (
        {"scores": SCORES, "mask": floats(2, 6, 5)},
        {"out": SCORES.shape},
        lambda scores, mask, out: _core.softmax(scores, out, 0.5, False, mask, 2),
    ),
    "softmax_backward": (
        {"p": SCORES, "dp": floats(2, 6, 5)},
        {"out": SCORES.shape},
        lambda p, dp, out: _core.softmax_backward(p, dp, out, 0.5, 2),
    ),
    "dropout": ({"x": A}, {"out": A.shape}, lambda x, out: _core.dropout(x, out, 1 << 14, 7, 2)),
    "column_sums": ({"x": A}, {"out": (20,)}, lambda x, out: _core.column_sums(x, out, 2)),
    "convolution_forward": (
        {"x": IMAGE, "w": KERNEL, "bias": floats(6)},
        {"out": DY.shape},
        lambda x, w, bias, out: _core.convolution_forward(x, w, out, SIZES, CODING, False, bias, 0, 2, None),
    ),
    "convolution_input_gradient": (
        {"dy": DY, "w": KERNEL, "bias": floats(8)},
        {"out": IMAGE.shape},
        lambda dy, w, bias, out: _core.convolution_input_gradient(dy, w, out, SIZES, CODING, bias, 0, 2, None),
    ),
    "convolution_weight_gradient": (
        {"dy": DY, "x": IMAGE},
        {"out": (1, 1, 8, 6)},
        lambda dy, x, out: _core.convolution_weight_gradient(
            dy, x, [False, False], 2, [6, 8], out, SIZES, CODING, 0, 2
        ),
    ),
    "read_memory": ({"x": A}, {}, lambda x: _core.read_memory(x, 2, 2)),
}
# Those that take or give torch's tensors and nothing else, and those that take no arrays.
OF_TORCH = {"keep", "keep_kernel", "kept_planes", "kept_product", "tensor_convolution", "tensor_product"}
NO_ARRAYS = {"info", "kept_kernel_bytes", "kept_panels", "multiply_adds", "philox4x32", "set_tensor_type"}


def test_every_entrance_is_here():
    there = {name for name, function in vars(_core).items() if inspect.isbuiltin(function) and not name.startswith("_")}
    assert there - OF_TORCH - NO_ARRAYS == {name.split(" ")[0] for name in ENTRANCES}


# --- layouts ---------------------------------------------------------------------------------------------------------


def at(memory, offset, x):
    """The place of an array like x in bytes."""
    return memory[offset : offset + x.nbytes].view(x.dtype).reshape(x.shape)


def padded(x):
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 77, x.dtype)
    return wide[..., 1::2]


def reversed_(x):
    return np.empty_like(x)[::-1]


def misaligned(x):
    return at(np.zeros(x.nbytes + 1, np.uint8), 1, x)


def mapped(x, folder):
    path = folder / "array"
    path.write_bytes(b"\0" * x.nbytes)
    return np.memmap(path, x.dtype, "r+", shape=x.shape)


def mapped_read_only(x, folder):
    path = folder / "read-only"
    path.write_bytes(x.tobytes())
    return np.memmap(path, x.dtype, "r", shape=x.shape)


def read_only(x):
    x = x.copy()
    x.setflags(write=False)
    return x


def one_place(x):
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


LAYOUTS = {
    "plain": np.empty_like,
    "Fortran": lambda x: np.empty_like(x, order="F"),
    "reversed": reversed_,
    "with gaps": padded,
    "misaligned": misaligned,
    "other byte order": lambda x: np.empty_like(x, x.dtype.newbyteorder()),
    "mapped": mapped,
    "mapped read-only": mapped_read_only,
    "read-only": read_only,
    "broadcast": one_place,
}


def laid_out(x, layout, folder):
    make = LAYOUTS[layout]
    out = make(x, folder) if layout.startswith("mapped") else make(x)
    if out.flags.writeable:
        out[...] = x
    return out


def bits(result):
    """All bits of a result, to be compared."""
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.tobytes()
    return tuple(map(bits, result)) if isinstance(result, (tuple, list)) else result


def run(name, arrays, outputs):
    found = ENTRANCES[name][2](**arrays, **outputs)
    return bits(found), {key: bits(out) for key, out in outputs.items()}


def attempt(name, arrays, outputs):
    """What `run` gives, or the message of its error."""
    try:
        return run(name, arrays, outputs), "expected no error"
    except HBFPError as error:
        return None, str(error)


def plain_outputs(name):
    return {key: np.zeros(shape, np.float32) for key, shape in ENTRANCES[name][1].items()}


INPUTS = [(name, argument) for name, (arrays, _, _) in ENTRANCES.items() for argument in arrays]
OUTPUTS = [(name, argument) for name, (_, outputs, _) in ENTRANCES.items() for argument in outputs]
READ_AS_THEY_ARE = {"plain", "mapped", "mapped read-only", "read-only"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "argument"), INPUTS)
def test_inputs_of_every_layout(name, argument, layout, tmp_path):
    arrays = dict(ENTRANCES[name][0])
    x = arrays[argument] = laid_out(arrays[argument], layout, tmp_path)
    expected = run(name, {**arrays, argument: x.astype(x.dtype.newbyteorder("="), order="C")}, plain_outputs(name))
    before = x.tobytes()
    found, message = attempt(name, arrays, plain_outputs(name))
    assert "expected" in message
    assert found == expected or (found is None and layout not in READ_AS_THEY_ARE), message
    assert x.tobytes() == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "argument"), OUTPUTS)
def test_outputs_of_every_layout(name, argument, layout, tmp_path):
    arrays, outputs = ENTRANCES[name][0], plain_outputs(name)
    expected = run(name, arrays, plain_outputs(name))
    out = outputs[argument] = laid_out(outputs[argument], layout, tmp_path)
    if layout in ("plain", "mapped"):
        assert run(name, arrays, outputs) == expected
        return
    memory = out.base if isinstance(out.base, np.ndarray) else out
    before = memory.tobytes()
    # Those of one row, of which nothing lies apart, are plain ones.
    if layout in ("Fortran", "reversed") and out.flags.c_contiguous:
        assert run(name, arrays, outputs) == expected
        return
    with pytest.raises((ShapeError, DTypeError), match="expected"):
        run(name, arrays, outputs)
    assert memory.tobytes() == before


@pytest.mark.parametrize("offset", [-4, 0, 4])
@pytest.mark.parametrize(("name", "argument"), OUTPUTS)
def test_an_output_on_an_input_is_refused_or_is_in_place(name, argument, offset):
    for other, x in ENTRANCES[name][0].items():
        arrays, outputs = dict(ENTRANCES[name][0]), plain_outputs(name)
        expected = run(name, arrays, plain_outputs(name))
        memory = np.zeros(4096, np.uint8)
        arrays[other] = at(memory, 1024, x)
        arrays[other][...] = x
        outputs[argument] = at(memory, 1024 + offset, outputs[argument])
        before = memory.tobytes()
        found, message = attempt(name, arrays, outputs)
        assert "expected" in message
        if found is None:
            assert memory.tobytes() == before
        else:
            assert offset == 0
            assert found == expected


@pytest.mark.parametrize("name", ENTRANCES)
def test_sizes_of_zero_have_a_result_or_an_error(name):
    """Each dimension of each array, and then the same one of all."""
    arrays, shapes, _ = ENTRANCES[name]
    outputs = plain_outputs(name)
    everything = {**arrays, **outputs}

    def cut(x, axis):
        return np.ascontiguousarray(x.take(range(0), axis=axis)) if axis < x.ndim else x

    cases = [({key}, axis) for key, x in everything.items() for axis in range(x.ndim)]
    cases += [(set(everything), axis) for axis in range(max(x.ndim for x in everything.values()))]
    for keys, axis in cases:
        given = {key: cut(x, axis) if key in keys else x for key, x in everything.items()}
        _, message = attempt(name, {key: given[key] for key in arrays}, {key: given[key] for key in shapes})
        assert "expected" in message, (keys, axis)


def test_what_another_thread_writes_spoils_results_and_nothing_else():
    x, y = floats(64, 512), floats(48, 512)
    planes, format = planes_of(y), FORMAT
    expected = np.zeros((64, 48), np.float32)
    _core.product(operand(x), operand(y), expected, None, False, 2)
    kept = x.copy(), {key: plane.copy() for key, plane in planes.items()}
    stop = threading.Event()

    def write():
        noise = np.random.default_rng(3)
        while not stop.is_set():
            x.view(np.uint32)[...] = noise.integers(0, 2**32, x.shape, np.uint32)
            for plane in planes.values():
                plane[...] = noise.integers(0, 256, plane.shape, np.uint8)

    thread = threading.Thread(target=write)
    thread.start()
    out = np.zeros_like(expected)
    try:
        for _ in range(50):
            _core.encode(x, format, -1, 3, 0, 0, False, 2)
            _core.measure(x, format, -1, 0, 0, 0, 2)
            _core.product(operand(x), operand(y), out, None, False, 2)
            encoded = {**planes, "format": format, "shape": y.shape, "axis": -1}
            for read in (
                lambda encoded=encoded: _core.decode(**encoded, threads=2),
                lambda encoded=encoded: _core.check(**encoded, threads=2),
                lambda encoded=encoded: _core.unpack(**encoded),
                lambda encoded=encoded: _core.product(operand(x), _core.Planes(**encoded), out, None, False, 2),
            ):
                with suppress(HBFPError):
                    read()
    finally:
        stop.set()
        thread.join()
    x[...] = kept[0]
    for key, plane in planes.items():
        plane[...] = kept[1][key]
    _core.product(operand(x), _core.Planes(**planes, format=format, shape=y.shape, axis=-1), out, None, False, 2)
    assert bits(out) == bits(expected)


def test_planes_that_were_resized_since_are_refused():
    planes = {key: plane.copy() for key, plane in PLANES.items()}
    encoded = _core.Planes(**planes, format=FORMAT, shape=B.shape, axis=-1)
    planes["mantissas"].resize((1, 1), refcheck=False)
    with pytest.raises(HBFPError, match="expected"):
        _core.product(operand(A), encoded, np.zeros((6, 5), np.float32), None, False, 1)


def odd(torch, x):
    """A tensor that begins at an odd address."""
    memory = bytearray(x.nbytes + 1)
    memory[1:] = x.tobytes()
    return torch.frombuffer(memory, dtype=torch.float32, offset=1, count=x.size).view(x.shape)


def test_tensors_at_odd_addresses_are_refused_by_the_core():
    torch = pytest.importorskip("torch")
    pytest.importorskip("hbfp.nn")  # the core takes tensors then

    for name, (arrays, _, _) in ENTRANCES.items():
        for argument, x in arrays.items():
            if x.dtype == np.float32:
                with pytest.raises(DTypeError, match="aligned to 4 bytes"):
                    run(name, {**arrays, argument: odd(torch, x)}, plain_outputs(name))


def test_layers_copy_tensors_at_odd_addresses():
    """A weight that is mapped from a file may lie so."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("hbfp.nn.functional")
    x, weight, bias = floats(2, 4, 20), floats(5, 20), floats(5)
    q, k, v = QKV.values()
    image, kernel = floats(2, 8, 3, 3), floats(6, 8, 2, 2)
    for function, inputs in (
        (functional.linear, (x, weight, bias)),
        (functional.bmm, (x, floats(2, 20, 3))),
        (functional.scaled_dot_product_attention, (q, k, v)),
        (functional.conv2d, (image, kernel, floats(6))),
    ):
        found = []
        for make in (torch.from_numpy, lambda x: odd(torch, x)):
            leaves = [make(x).requires_grad_() for x in inputs]
            with torch.no_grad():
                found.append([function(*leaves, recipe="hbfp4").numpy()])
            out = function(*leaves, recipe="hbfp4")
            out.square().sum().backward()
            found[-1] += [out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]
        assert bits(found[0]) == bits(found[1]), function.__name__


# --- memory that one side knows as bytes and the other as floats -----------------------------------------------------


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    importlib.import_module("hbfp.ops")  # which hands torch to the core
    return torch


def test_codes_that_lie_in_the_output(torch):
    memory = torch.zeros(1 << 14, dtype=torch.float32)
    kept = _core.keep(operand(floats(64, 40), 0), 1)
    inside = memory.view(torch.uint8)[100 : 100 + len(kept)]
    inside.copy_(kept)
    left = operand(floats(64, 30), 0)
    out = memory[: 30 * 40].view(30, 40)
    with pytest.raises(ShapeError, match="memory apart"):
        _core.kept_product(left, inside, FORMAT, out, 1)
    for sums in (memory[:30], memory[25:55], memory[1200:1230]):
        with pytest.raises(ShapeError, match="memory apart"):
            _core.kept_product(left, kept, FORMAT, memory[25 : 25 + 30 * 40].view(30, 40), 1, None, sums)
    with pytest.raises(ShapeError, match="memory apart"):
        _core.kept_product(left, inside, FORMAT, torch.empty(30, 40), 1, None, memory[40:70])
    elsewhere = memory[8192 : 8192 + 30 * 40].view(30, 40)
    expected = torch.empty(30, 40)
    _core.kept_product(left, kept, FORMAT, expected, 1)
    _core.kept_product(left, inside, FORMAT, elsewhere, 1)
    assert torch.equal(elsewhere, expected)


def test_planes_that_lie_in_the_output(torch):
    memory = np.zeros(64 + 6 * 5, np.float32)
    mantissas = memory.view(np.uint8)[: PLANES["mantissas"].size].reshape(PLANES["mantissas"].shape)
    mantissas[...] = PLANES["mantissas"]
    right = _core.Planes(PLANES["exponents"], mantissas, FORMAT, B.shape, -1)
    out = torch.from_numpy(memory)
    with pytest.raises(ShapeError, match="memory apart"):
        _core.product(operand(A), right, out[:30].view(6, 5), None, False, 1)
    _core.product(operand(A), right, out[64:].view(6, 5), None, False, 1)
    expected = np.empty((6, 5), np.float32)
    whole = _core.Planes(**PLANES, format=FORMAT, shape=B.shape, axis=-1)
    _core.product(operand(A), whole, expected, None, False, 1)
    assert np.array_equal(memory[64:].reshape(6, 5), expected)


def test_a_kept_image_that_lies_in_the_output(torch):
    y, out = torch.empty(DY.shape), (1, 1, 8, 6)
    image, kernel, dy = map(torch.from_numpy, (IMAGE, KERNEL, DY))
    kept = _core.convolution_forward(image, kernel, y, SIZES, CODING, False, None, 0, 1, (FORMAT, 0, 0))
    memory = torch.zeros(4096, dtype=torch.float32)
    inside = memory.view(torch.uint8)[4:][: len(kept)]
    inside.copy_(kept)

    def gradient(x, out):
        _core.convolution_weight_gradient(dy, x, [False, True], len(IMAGE), [6, 8], out, SIZES, CODING, 0, 1)
        return out

    with pytest.raises(ShapeError, match="memory apart"):
        gradient(inside, memory[:48].view(out))
    assert torch.equal(gradient(inside, memory[2048:2096].view(out)), gradient(kept, torch.empty(out)))


def test_planes_of_a_kernel_that_do_not_lie_as_they_should(torch):
    shape, axis = (6, 20, 1), 1
    planes = _core.encode(floats(*shape), FORMAT, axis, 0, 0, 0, False, 1)
    kept = _core.keep_kernel(*planes, FORMAT, shape, axis, 1, 1)
    assert torch.equal(_core.keep_kernel(*(plane.copy() for plane in planes), FORMAT, shape, axis, 1, 2), kept)
    for i in range(2):
        apart = np.zeros((*planes[i].shape[:-1], 2 * planes[i].shape[-1]), np.uint8)[..., ::2]
        for wrong in (apart, planes[i][:-1], planes[i].ravel(), planes[i].astype(np.float32)):
            given = [wrong if j == i else plane for j, plane in enumerate(planes)]
            with pytest.raises((HBFPError, TypeError)):
                _core.keep_kernel(*given, FORMAT, shape, axis, 1, 1)
