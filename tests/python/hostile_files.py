# ruff: noqa: E501
"""Files that a reader must refuse, each with the message that it gives: tests/hostile.

`python tests/python/hostile_files.py` writes them. Each is a healthy file, `b` and `w` in hbfp4b4, with one thing wrong.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE = Path(__file__).resolve().parents[1] / "hostile"

DATA = struct.pack("<2f", 1, 2) + bytes.fromhex("7d7e7d 7d7d00 e401170203 f197030001")
"""b [2] f32; w [2, 9]: 3 exponents a row, then 5 bytes of codes a row."""
HEADER: dict[str, Any] = {
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "w.hbfp_exponents": {"dtype": "U8", "shape": [2, 3], "data_offsets": [8, 14]},
    "w.hbfp_mantissas": {"dtype": "U8", "shape": [2, 5], "data_offsets": [14, 24]},
}
DESCRIPTION: dict[str, Any] = {"version": 1, "tensors": {"w": {"format": "hbfp4b4", "shape": [2, 9], "axis": 1}}}


def text(header: Any = None, description: Any = None) -> str:
    """The JSON of the header."""
    whole = dict(HEADER if header is None else header)
    told = DESCRIPTION if description is None else description
    whole["__metadata__"] = {"hbfp": told if isinstance(told, str) else json.dumps(told)}
    return json.dumps(whole)


def build(header: str | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file of a header's text and data, whatever they are; `length` is what its first 8 bytes say."""
    encoded = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(name: str, **fields: Any) -> bytes:
    """A healthy file with some fields of one stored array changed; None removes one."""
    changed = {**HEADER[name], **fields}
    return build(text({**HEADER, name: {key: value for key, value in changed.items() if value is not None}}))


def described(**fields: Any) -> bytes:
    """A healthy file with some fields of w's description changed."""
    return build(text(description={"version": 1, "tensors": {"w": {**DESCRIPTION["tensors"]["w"], **fields}}}))


def codes(exponents: str, mantissas: str) -> bytes:
    """A healthy file with other planes."""
    return build(text(), DATA[:8] + bytes.fromhex(exponents) + bytes.fromhex(mantissas))


def _raw(old: str, new: str) -> bytes:
    assert old in text()
    return build(text().replace(old, new, 1))


# fmt: off
CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    # The container.
    "empty": (lambda: b"", "expected a safetensors file, which begins with 8 bytes, the length of its header; found a file of 0 bytes"),
    "seven-bytes": (lambda: b"\x02" + bytes(6), "expected a safetensors file, which begins with 8 bytes"),
    "length-2-63": (lambda: build(text(), length=2**63), "expected a safetensors file, with a header of at most 100000000 bytes; found one of 9223372036854775808, by the file's first 8"),
    "length-all-ones": (lambda: build(text(), length=2**64 - 1), "expected a safetensors file, with a header of at most 100000000 bytes; found one of 18446744073709551615"),
    "length-beyond": (lambda: build("{}", b"", 3), "expected a safetensors file, with its whole header of 3 bytes; found 2 after the first 8"),
    "length-zero": (lambda: build(""), "expected a safetensors file, whose header begins with '{'; found b''"),
    "header-list": (lambda: build("[]", b""), "expected a safetensors file, whose header begins with '{'; found b'[]'"),
    "header-cut": (lambda: build(text()[:-1]), "header: expected JSON; found "),
    "header-latin-1": (lambda: build(text().replace('"b"', '"\xe9"').encode("latin-1")), "header: expected JSON; found 'utf-8' codec can't decode"),
    "header-nul": (lambda: build(text() + "\0"), "header: expected JSON; found Extra data"),
    "header-digits": (lambda: _raw("[2]", f"[{'9' * 5000}]"), "header: expected JSON; found Exceeds the limit"),
    "name-twice": (lambda: _raw("{", '{"b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, '), "header: expected every name once; found the name 'b' twice"),
    "metadata-twice": (lambda: _raw("{", '{"__metadata__": {}, '), "header: expected every name once; found the name '__metadata__' twice"),
    "field-twice": (lambda: _raw('"dtype": "F32"', '"dtype": "F32", "dtype": "I32"'), "header: expected every name once; found the name 'dtype' twice"),
    "name-surrogate": (lambda: _raw('"b"', '"\\ud83d"'), "header: expected names that are text; found half a surrogate pair in '\\ud83d'"),
    "metadata-list": (lambda: build(json.dumps({"__metadata__": []}), b""), "__metadata__: expected an object of strings; found []"),
    "metadata-number": (lambda: build(json.dumps({"__metadata__": {"epoch": 3}}), b""), "__metadata__: expected an object of strings; found {'epoch': 3}"),
    "metadata-surrogate": (lambda: build('{"__metadata__": {"a": "\\udc00"}}', b""), "__metadata__: expected an object of strings; found {'a': '\\udc00'}"),
    "entry-list": (lambda: _raw('{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}', "[0, 8]"), "tensor 'b': header: expected an object with dtype, shape and data_offsets; found [0, 8]"),
    "dtype-unknown": (lambda: entry("b", dtype="F128"), "tensor 'b': dtype: expected one of F4, "),
    "dtype-number": (lambda: entry("b", dtype=32), "tensor 'b': dtype: expected one of F4, "),
    "dtype-missing": (lambda: entry("b", dtype=None), "tensor 'b': dtype: expected one of F4, "),
    "shape-missing": (lambda: entry("b", shape=None), "tensor 'b': shape: expected a list of sizes from 0 to 2^63 - 1; found None"),
    "shape-negative": (lambda: entry("b", shape=[-2]), "tensor 'b': shape: expected a list of sizes from 0 to 2^63 - 1; found [-2]"),
    "shape-bool": (lambda: entry("b", shape=[2, True]), "tensor 'b': shape: expected a list of sizes from 0 to 2^63 - 1; found [2, True]"),
    "shape-float": (lambda: entry("b", shape=[2.0]), "tensor 'b': shape: expected a list of sizes from 0 to 2^63 - 1; found [2.0]"),
    "shape-nan": (lambda: _raw("[2]", "[NaN]"), "header: expected JSON; found NaN, which JSON does not have"),
    "shape-infinity": (lambda: _raw("[2]", "[1e999]"), "tensor 'b': shape: expected a list of sizes from 0 to 2^63 - 1; found [inf]"),
    "shape-2-63": (lambda: entry("b", shape=[2**63]), "tensor 'b': shape: expected a list of sizes from 0 to 2^63 - 1; found [9223372036854775808]"),
    "shape-overflow": (lambda: entry("b", shape=[2**32, 2**32]), "tensor 'b': shape: expected at most 2^63 - 1 elements; found [4294967296, 4294967296]"),
    "shape-overflow-of-bytes": (lambda: entry("b", shape=[2**62]), "tensor 'b': shape: expected at most 2^63 - 1 bytes; found [4611686018427387904] of F32"),
    "shape-overflow-behind-zero": (lambda: entry("b", shape=[0, 2**40, 2**40]), "tensor 'b': shape: expected at most 2^63 - 1 elements; found [0, 1099511627776, 1099511627776]"),
    "shape-dimensions": (lambda: entry("b", shape=[2] + [1] * 64), "tensor 'b': shape: expected at most 64 dimensions; found 65"),
    "shape-half-bytes": (lambda: entry("b", dtype="F4", shape=[3], data_offsets=[0, 8]), "tensor 'b': shape: expected elements of F4 that fill whole bytes; found [3]"),
    "shape-other": (lambda: entry("b", shape=[3]), "tensor 'b': data_offsets: expected 12 bytes, for [3] of F32; found 8"),
    "offsets-negative": (lambda: entry("b", data_offsets=[-8, 0]), "tensor 'b': data_offsets: expected 0 <= start <= end < 2^63; found [-8, 0]"),
    "offsets-swapped": (lambda: entry("b", data_offsets=[8, 0]), "tensor 'b': data_offsets: expected 0 <= start <= end < 2^63; found [8, 0]"),
    "offsets-bool": (lambda: entry("b", data_offsets=[False, 8]), "tensor 'b': data_offsets: expected two integers, start and end; found [False, 8]"),
    "offsets-float": (lambda: entry("b", data_offsets=[0, 8.0]), "tensor 'b': data_offsets: expected two integers, start and end; found [0, 8.0]"),
    "offsets-three": (lambda: entry("b", data_offsets=[0, 8, 8]), "tensor 'b': data_offsets: expected two integers, start and end; found [0, 8, 8]"),
    "offsets-huge": (lambda: entry("b", data_offsets=[2**63, 2**63 + 8]), "tensor 'b': data_offsets: expected 0 <= start <= end < 2^63; found [9223372036854775808, 9223372036854775816]"),
    "offsets-beyond": (lambda: entry("w.hbfp_mantissas", shape=[2, 50], data_offsets=[14, 114]), "expected a safetensors file, with 114 bytes of data by its header; found 24"),
    "overlap": (lambda: entry("w.hbfp_exponents", data_offsets=[7, 13]), "tensor 'w.hbfp_exponents': data_offsets: expected a start at 8, where the tensor before it ends; found 7, an overlap"),
    "same-place": (lambda: entry("w.hbfp_mantissas", shape=[2, 3], data_offsets=[8, 14]), "tensor 'w.hbfp_mantissas': data_offsets: expected a start at 14, where the tensor before it ends; found 8, an overlap"),
    "hole": (lambda: build(text({**HEADER, "w.hbfp_mantissas": {"dtype": "U8", "shape": [2, 5], "data_offsets": [15, 25]}}), DATA + b"\0"), "tensor 'w.hbfp_mantissas': data_offsets: expected a start at 14, where the tensor before it ends; found 15, a hole before it"),
    "hole-at-the-begin": (lambda: build(text({"b": {"dtype": "U8", "shape": [23], "data_offsets": [1, 24]}}, {"version": 1, "tensors": {}})), "tensor 'b': data_offsets: expected a start at 0, where the tensor before it ends; found 1, a hole before it"),
    "trailing-bytes": (lambda: build(text(), DATA + b"\0"), "expected a safetensors file, with 24 bytes of data by its header; found 25"),
    "data-cut": (lambda: build(text(), DATA[:-1]), "expected a safetensors file, with 24 bytes of data by its header; found 23"),
    # The description.
    "description-text": (lambda: build(text(description="hbfp4b4")), "description: expected JSON; found "),
    "description-list": (lambda: build(text(description="[1]")), "description: expected a JSON object; found [1]"),
    "description-twice": (lambda: build(text(description='{"version": 1, "tensors": {"w": {}, "w": {}}}')), "description: expected every name once; found the name 'w' twice"),
    "description-nan": (lambda: build(text(description='{"version": NaN}')), "description: expected JSON; found NaN, which JSON does not have"),
    "version-2": (lambda: build(text(description={"version": 2, "tensors": {}})), "version: expected 1, which is what this release reads; found 2"),
    "version-float": (lambda: build(text(description={"version": 1.0, "tensors": {}})), "version: expected 1, which is what this release reads; found 1.0"),
    "version-bool": (lambda: build(text(description={"version": True, "tensors": {}})), "version: expected 1, which is what this release reads; found True"),
    "format-unknown": (lambda: described(format="hbfp99b4"), "tensor 'w': format: expected a mantissa width of 2…16 bits, sign included; found 99"),
    "format-surrogate": (lambda: described(format="hbfp4b\udc64"), "tensor 'w': format: expected a format such as hbfp.HBFP4 or 'hbfp4b64'; found 'hbfp4b\\udc64'"),
    "format-number": (lambda: described(format=4), "tensor 'w': format: expected a written form such as 'hbfp4b64'; found 4"),
    "format-spelling": (lambda: described(format="hbfp04b4"), "tensor 'w': format: expected a format such as hbfp4b64"),
    "format-long": (lambda: described(format="hbfp4b" + "4" * 5000), "tensor 'w': format: expected a written form such as 'hbfp4b64'; found 'hbfp4b4444"),
    "described-shape-bool": (lambda: described(shape=[2, True]), "tensor 'w': shape: expected a list of sizes from 0 to 2^63 - 1; found [2, True]"),
    "described-shape-overflow": (lambda: described(shape=[2**62, 4]), "tensor 'w': shape: expected at most 2^63 - 1 elements; found [4611686018427387904, 4]"),
    "described-shape-planes-overflow": (lambda: described(format="hbfp16b1", shape=[2**61, 2]), "tensor 'w': shape: expected a shape whose elements can be counted"),
    "described-shape-other": (lambda: described(shape=[2, 11]), "tensor 'w': hbfp_mantissas: expected U8 [2, 6]; found U8 [2, 5]"),
    "axis-other": (lambda: described(axis=0), "tensor 'w': hbfp_exponents: expected U8 [9, 1]; found U8 [2, 3]"),
    "axis-outside": (lambda: described(axis=2), "tensor 'w': axis: expected an axis of shape [2, 9], counted from 0; found 2"),
    "axis-negative": (lambda: described(axis=-1), "tensor 'w': axis: expected an axis of shape [2, 9], counted from 0; found -1"),
    "axis-float": (lambda: described(axis=1.0), "tensor 'w': axis: expected an axis of shape [2, 9], counted from 0; found 1.0"),
    "rounding-unknown": (lambda: described(rounding="up"), "tensor 'w': rounding: expected one of nearest_even, nearest_away, toward_zero, stochastic; found 'up'"),
    "sha256-short": (lambda: described(sha256="00"), "tensor 'w': sha256: expected 64 hexadecimal digits; found '00'"),
    "sha256-other": (lambda: described(sha256="0" * 64), "tensor 'w': sha256: expected 0000000000000000000000000000000000000000000000000000000000000000; found "),
    "no-partner": (lambda: build(text({name: HEADER[name] for name in list(HEADER)[:2]}), DATA[:14]), "tensor 'w': planes: expected a plane 'w.hbfp_mantissas'; found none in the file"),
    "no-description": (lambda: build(text(description={"version": 1, "tensors": {}})), "tensor 'w': description: expected one for the plane 'w.hbfp_exponents'; found none in the header"),
    "plain-twin": (lambda: build(text({"w" if name == "b" else name: value for name, value in HEADER.items()})), "tensor 'w': planes: expected an encoded array only; found a plain array of the same name as well"),
    "planes-signed": (lambda: entry("w.hbfp_mantissas", dtype="I8"), "tensor 'w': hbfp_mantissas: expected U8 [2, 5]; found I8 [2, 5]"),
    # The codes.
    "code-forbidden": (lambda: codes("7d7e7d 7d7d00", "e801170203 f197030001"), "tensor 'w': expected codes above −2^(m−1); found the forbidden code at element 0 in block 0 of row 0"),
    "code-under-nan": (lambda: codes("ff7e7d 7d7d00", "e401170203 f197030001"), "tensor 'w': expected zero codes under exponent 255; found another at element 0 in block 0 of row 0"),
    "padding": (lambda: codes("7d7e7d 7d7d00", "e401170213 f197030001"), "tensor 'w': expected zero bits after the last code; found others in block 2 of row 0"),
}
# fmt: on
"""By name: what makes it, and how its message begins, after the file's name."""


def build_all() -> dict[str, bytes]:
    return {f"{name}.safetensors": make() for name, (make, _) in CASES.items()}


if __name__ == "__main__":
    shutil.rmtree(HOSTILE, ignore_errors=True)
    HOSTILE.mkdir()
    for file_name, content in build_all().items():
        (HOSTILE / file_name).write_bytes(content)
