"""Reads hbfp files (docs/spec.md, sections 1, 4 and 7) with numpy and the standard library: python reader.py FILE."""

import json
import math
import re
import sys

import numpy as np


def read(path):
    """Every encoded tensor of a file by name: (values float32, codes, exponent bytes of its blocks in plane order)."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = np.frombuffer(file.read(), np.uint8)
    description = json.loads(header["__metadata__"]["hbfp"])
    assert description["version"] == 1

    def plane(name):
        return data[slice(*header[name]["data_offsets"])].reshape(header[name]["shape"])

    return {
        name: decode(plane(name + ".hbfp_exponents"), plane(name + ".hbfp_mantissas"), **entry)
        for name, entry in description["tensors"].items()
    }


def decode(exponents, mantissas, format, shape, axis, **_):
    bits, kind, size = re.match(r"hbfp(\d+)(b|t(?=\d)|tensor)(\d*)", format).groups()
    bits, shape = int(bits), tuple(shape)
    if kind == "b":  # 7.2: lines along the axis, moved last
        lines = [shape[i] for i in range(len(shape)) if i != axis]
        rows, length, step = math.prod(lines), (shape or (1,))[axis], int(size)
    elif kind == "t":  # 7.4: rows of tiles
        tall, wide = (1, 1, *shape)[-2:]
        t, batch = int(size), math.prod(shape[:-2])
        rows, length, step = batch * -(-tall // t), -(-wide // t) * t * t, t * t
    else:  # 7.5: one row, one block
        rows, length, step = 1, math.prod(shape), max(math.prod(shape), 1)
    codes = np.zeros((rows, length), np.int32)
    at = 0
    for begin in range(0, length if rows else 0, step):  # 7.3: blocks as streams of bits
        count = min(step, length - begin)
        end = at + -(-count * bits // 8)
        stream = np.unpackbits(mantissas[:, at:end], axis=1, bitorder="little")
        assert not stream[:, count * bits :].any(), "padding that is not zero"
        words = stream[:, : count * bits].reshape(rows, count, bits) @ (1 << np.arange(bits, dtype=np.int32))
        codes[:, begin : begin + count] = words - (words >> (bits - 1) << bits)
        at = end
    assert (codes > -(1 << (bits - 1))).all(), "a forbidden code"
    c = np.repeat(exponents, step, axis=1)[:, :length]
    assert not codes[c == 255].any(), "codes in a NaN block"
    with np.errstate(over="ignore"):
        values = np.where(c == 255, np.nan, np.ldexp(codes.astype(np.float64), c.astype(np.int32) - 127))
        values = values.astype(np.float32)

    def logical(array):
        if kind == "b":
            return np.moveaxis(array.reshape(*lines, length), -1, axis).reshape(shape)
        if kind == "t":
            tiles = array.reshape(batch, rows // max(batch, 1), -(-wide // t), t, t).swapaxes(2, 3)
            array = tiles.reshape(batch, -(-tall // t) * t, -(-wide // t) * t)[:, :tall, :wide]
        return array.reshape(shape)

    return logical(values), logical(codes), exponents


if __name__ == "__main__":
    for name, (values, codes, _) in read(sys.argv[1]).items():
        print(name, values.shape, f"codes {codes.min(initial=0)} ... {codes.max(initial=0)}")
