"""ggml's Q4_0 product, through ctypes on the libraries that llama-cpp-python installs: never imported, only loaded."""

import ctypes
import importlib.util
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbfp.benchmark.results import NotRun

__all__ = ["Product"]

_F32, _Q4_0 = 0, 2  # enum ggml_type, which only grows


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_POINTER, _INT, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_BASE = {
    "ggml_init": (_POINTER, _InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, _INT64, _INT64),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_nbytes": (_SIZE, _POINTER),
    "ggml_quantize_chunk": (_SIZE, _INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_buft_name": (ctypes.c_char_p, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_reg_dev_get": (_POINTER, _POINTER, _SIZE),
    "ggml_backend_free": (None, _POINTER),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
}
_CPU = {
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    "ggml_backend_cpu_reg": (_POINTER,),
}


class _Library:
    """The functions used here, by name."""

    def __init__(self, folder: Path) -> None:
        suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
        for name, functions in (("libggml-base", _BASE), ("libggml-cpu", _CPU)):
            # Global, as the second resolves its symbols in the first.
            library = ctypes.CDLL(str(folder / f"{name}.{suffix}"), mode=ctypes.RTLD_GLOBAL)
            for function, (result, *arguments) in functions.items():
                found = getattr(library, function)
                found.restype, found.argtypes = result, arguments
                setattr(self, function, found)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@cache
def _library() -> _Library:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise NotRun("llama-cpp-python, which brings ggml, is not installed: make bench-peers")
    try:
        return _Library(Path(spec.origin).parent / "lib")
    except (OSError, AttributeError) as error:
        raise NotRun(f"the ggml of this llama-cpp-python cannot be used: {error}") from error


@cache
def _repacking() -> int:
    """The buffer type that lays weights out for the CPU's products, which llama.cpp uses where it can."""
    library = _library()
    registry = library.ggml_backend_cpu_reg()
    address = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        list_types = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)
        types = list_types(library.ggml_backend_reg_dev_get(registry, 0))
        for kind in takewhile(bool, types) if types else ():  # the list ends with a null pointer
            if library.ggml_backend_buft_name(kind) == b"CPU_REPACK":
                return int(kind)
    raise NotRun("this ggml has no layout of its own for this CPU")


class Product:
    """x [M, K] in f32 times a Q4_0 weight [N, K], as a graph of one node."""

    def __init__(self, x: NDArray[np.float32], w: NDArray[np.float32], threads: int, *, repack: bool) -> None:
        if w.shape[1] % 32:
            raise NotRun(f"blocks of 32 do not divide K = {w.shape[1]}")
        self._library = library = _library()
        layout = _repacking() if repack else library.ggml_backend_cpu_buffer_type()
        (m, k), n = x.shape, w.shape[0]
        self._shape = m, n
        # Two contexts: the weight's buffer is of another type than that of the rest.
        self._contexts = [library.ggml_init(_InitParams(1 << 18, None, True)) for _ in range(2)]
        weight = library.ggml_new_tensor_2d(self._contexts[0], _Q4_0, k, n)
        left = library.ggml_new_tensor_2d(self._contexts[1], _F32, k, m)
        self._out = library.ggml_mul_mat(self._contexts[1], weight, left)
        self._graph = library.ggml_new_graph(self._contexts[1])
        library.ggml_build_forward_expand(self._graph, self._out)
        allocate = library.ggml_backend_alloc_ctx_tensors_from_buft
        self._buffers = [
            allocate(self._contexts[0], layout),
            allocate(self._contexts[1], library.ggml_backend_cpu_buffer_type()),
        ]
        if not all(self._buffers):
            raise NotRun("ggml could not allocate its tensors")
        x, w = np.ascontiguousarray(x), np.ascontiguousarray(w)
        codes = np.empty(library.ggml_nbytes(weight), np.uint8)
        written = library.ggml_quantize_chunk(_Q4_0, w.ctypes.data, codes.ctypes.data, 0, n, k, None)
        library.ggml_backend_tensor_set(weight, codes.ctypes.data, 0, written)
        library.ggml_backend_tensor_set(left, x.ctypes.data, 0, x.nbytes)
        self._backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def run(self) -> None:
        """Computes the product."""
        if self._library.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml reports that its graph failed")

    def result(self) -> NDArray[np.float32]:
        """What `run` computed, [M, N]."""
        out = np.empty(self._shape, np.float32)
        self._library.ggml_backend_tensor_get(self._out, out.ctypes.data, 0, out.nbytes)
        return out

    def __del__(self) -> None:
        # Half-made products have fewer of these.
        library = self.__dict__.get("_library")
        if library is not None:
            if "_backend" in self.__dict__:
                library.ggml_backend_free(self._backend)
            for buffer in filter(None, self.__dict__.get("_buffers", ())):
                library.ggml_backend_buffer_free(buffer)
            for context in self.__dict__.get("_contexts", ()):
                library.ggml_free(context)
