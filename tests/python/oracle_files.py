"""Files as the specification has them, from the exact-arithmetic oracle and some JSON: nothing of `hbfp.files`.

`python tests/python/oracle_files.py` writes those of tests/golden that are missing. Files that are there are
never written again: version 1 is what they hold, and every later release must read them.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hbfp.reference import Encoded, FormatDescription, encode

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
_DTYPES = {"uint8": "U8", "int16": "I16", "float32": "F32"}


def container(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    data = b""
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        begin, data = len(data), data + np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def oracle_file(
    encoded: Mapping[str, tuple[Encoded, str, int]], plain: Mapping[str, np.ndarray] | None = None
) -> bytes:
    """A file of encoded tensors, each with its rounding and its blocked axis, and of plain ones."""
    tensors, described = dict(plain or {}), {}
    for name, (array, rounding, axis) in encoded.items():
        exponents, mantissas = array.planes()
        tensors |= {f"{name}.hbfp_exponents": exponents, f"{name}.hbfp_mantissas": mantissas}
        described[name] = {
            "format": str(array.format),
            "shape": list(array.shape),
            "axis": axis,
            "rounding": rounding,
            "sha256": hashlib.sha256(exponents.tobytes() + mantissas.tobytes()).hexdigest(),
        }
    return container(tensors, {"hbfp": json.dumps({"version": 1, "tensors": described}, separators=(",", ":"))})


def sample(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values over 16 binades, minus zeros and subnormals among them; the same in every release of numpy."""
    raw = np.random.Philox(key=1000 * seed + math.prod(shape)).random_raw(math.prod(shape))
    patterns = raw & 0x807FFFFF | (raw >> 32 & 15) + 119 << 23
    dice = (raw >> 40) % 20
    patterns[dice < 2] = 0x80000000
    patterns[dice == 2] = 0x00012345
    return patterns.astype(np.uint32).view(np.float32).reshape(shape)


KINDS = {
    "lines": ("b5", (3, 12), 1),
    "columns": ("b4-ceil", (9, 3), 0),
    "middle": ("b8-noclip", (2, 9, 2), 1),
    "long": ("b64", (2, 70), 1),
    "narrow": ("b6-e5", (2, 13), 1),
    "tiles": ("t3", (2, 4, 5), 2),
    "tensor": ("tensor", (3, 5), 1),
    "row": ("b16", (21,), 0),
    "one": ("b64", (), 0),
    "empty": ("b64", (0, 3), 1),
}
"""By the name of the golden file: the format without its width, the shape, the blocked axis."""


def golden() -> Iterator[tuple[str, bytes]]:
    """Name and content of each golden file: tensors w2 ... w16, and for each its codes and its values, plain."""
    roundings = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
    for seed, (kind, (form, shape, axis)) in enumerate(KINDS.items()):
        encoded, plain = {}, {}
        for bits in range(2, 17):
            rounding = roundings[bits % 4]
            x = sample(shape, seed)
            if bits % 5 == 0 and x.size:
                x.reshape(-1)[-1] = np.nan
            t = encode(x, FormatDescription.parse(f"hbfp{bits}{form}"), axis, rounding, seed=bits, stream=7)
            encoded[f"w{bits}"] = t, rounding, axis
            plain[f"w{bits}.codes"] = np.asarray(t.mantissas).astype(np.int16)
            plain[f"w{bits}.values"] = t.decode()
        yield f"v1-{kind}.safetensors", oracle_file(encoded, plain)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file_name, content in golden():
        if not (GOLDEN / file_name).exists():
            (GOLDEN / file_name).write_bytes(content)
            print(GOLDEN / file_name, len(content), file=sys.stderr)
