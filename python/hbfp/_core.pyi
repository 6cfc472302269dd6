"""The compiled core. Private: the public surface is `hbfp`.

Arrays named `x`, `out`, ... may be numpy arrays or CPU torch tensors (once `set_tensor_type` was called); they are read
in place, by pointer and strides. Every function checks its arguments, releases the GIL and raises a child of
`HBFPError`.
Roundings are numbered 0 nearest_even, 1 nearest_away, 2 toward_zero, 3 stochastic. `threads` is an upper bound; results
never depend on it.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CodeError",
    "DTypeError",
    "Floats",
    "Format",
    "FormatError",
    "Geometry",
    "GrownAttention",
    "HBFPError",
    "KeptKernel",
    "KeptMatrix",
    "LevelError",
    "NonFiniteError",
    "Packed",
    "Planes",
    "Residual",
    "ShapeError",
    "__version__",
    "attention",
    "attention_backward",
    "attention_mask_gradient",
    "check",
    "column_sums",
    "convolution_forward",
    "convolution_input_gradient",
    "convolution_weight_gradient",
    "decode",
    "dropout",
    "encode",
    "info",
    "keep",
    "keep_kernel",
    "kept_kernel_bytes",
    "kept_panels",
    "kept_planes",
    "kept_product",
    "lay_out",
    "measure",
    "multiply_adds",
    "pack",
    "philox4x32",
    "prepack",
    "product",
    "quantize",
    "read_memory",
    "set_tensor_type",
    "softmax",
    "softmax_backward",
    "tensor_convolution",
    "tensor_product",
    "unpack",
]

__version__: str

class HBFPError(ValueError): ...
class FormatError(HBFPError): ...
class ShapeError(HBFPError): ...
class DTypeError(HBFPError): ...
class NonFiniteError(HBFPError): ...
class CodeError(HBFPError): ...
class LevelError(HBFPError): ...

@final
class Format:
    """A block format, validated (FORMAT.md sections 1, 2 and 4)."""

    def __new__(
        cls,
        bits: int,
        block: int | None = ...,
        tile: int | None = None,
        exponent_rule: str = "max_exponent",
        exponent_bits: int = 8,
        exponent_bias: int | None = None,
    ) -> Format: ...
    @staticmethod
    def parse(text: str) -> Format: ...
    @property
    def bits(self) -> int: ...
    @property
    def block(self) -> int | None: ...
    @property
    def tile(self) -> int | None: ...
    @property
    def exponent_rule(self) -> str: ...
    @property
    def exponent_bits(self) -> int: ...
    @property
    def exponent_bias(self) -> int: ...
    @property
    def encodes_to_panels(self) -> bool:
        """Whether the kernels take it straight from floats: lines of at most 8 bits under a full range of exponents."""
    def plane_shapes(self, shape: tuple[int, ...], axis: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the exponent and the mantissa plane of a tensor."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

def encode(
    x: Any, format: Format, axis: int, rounding: int, seed: int, stream: int, check: bool, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """f32 tensor -> (exponent plane, mantissa plane), FORMAT.md section 7."""

def quantize(
    x: Any, out: Any, format: Format, axis: int, rounding: int, seed: int, stream: int, check: bool, threads: int
) -> None:
    """decode(encode(x)) in one pass into `out`, C-contiguous f32 of x's shape; `out` may be `x` itself."""

def measure(
    x: Any, format: Format, axis: int, rounding: int, seed: int, stream: int, threads: int
) -> tuple[int, float, float, int, int, list[int]]:
    """What encoding costs x: its elements that are not zero; the sums of x² and of (x − q · 2^s)²; how many elements
    saturate, |x| > (Q + ½) · 2^s; how many are not zero and have the code 0; 256 numbers of blocks by exponent byte.
    NaN blocks count in the last only. The sums have one order for any number of threads."""

def decode(
    exponents: NDArray[np.uint8],
    mantissas: NDArray[np.uint8],
    format: Format,
    shape: tuple[int, ...],
    axis: int,
    threads: int,
) -> NDArray[np.float32]: ...
def check(
    exponents: NDArray[np.uint8],
    mantissas: NDArray[np.uint8],
    format: Format,
    shape: tuple[int, ...],
    axis: int,
    threads: int,
) -> None:
    """Reads all codes. Raises CodeError as `unpack` does, and makes nothing."""

def unpack(
    exponents: NDArray[np.uint8], mantissas: NDArray[np.uint8], format: Format, shape: tuple[int, ...], axis: int
) -> NDArray[Any]:
    """The codes in the logical shape: int8, or int16 above 8 bits. Raises CodeError on a forbidden code, on non-zero
    padding and on codes under c = 255."""

def pack(
    codes: NDArray[Any], exponents: NDArray[np.uint8], format: Format, axis: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Logical int8/int16 codes and the exponent *plane* -> both planes, validated."""

@final
class Floats:
    """An operand still in f32: encoded on the way into a product.

    The last two dimensions are the matrix, leading ones are batch; `axis` (-1 or -2) is the reduction. Random bits
    follow the tensor as given (FORMAT.md section 3)."""

    def __new__(
        cls, x: Any, axis: int, format: Format, rounding: int = 0, seed: int = 0, stream: int = 0
    ) -> Floats: ...

@final
class Planes:
    """An encoded operand: both planes of a tensor of logical `shape`, blocked along `axis` (its reduction)."""

    def __new__(
        cls,
        exponents: NDArray[np.uint8],
        mantissas: NDArray[np.uint8],
        format: Format,
        shape: tuple[int, ...],
        axis: int,
    ) -> Planes: ...

@final
class Packed:
    """A right operand [N, K] in the kernel's layout."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def format(self) -> Format: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def level(self) -> str: ...

def prepack(operand: Floats | Planes, threads: int) -> Packed:
    """Kernel layout of a 2-D right operand."""

def lay_out(operand: Floats | Planes, left: bool, threads: int) -> None:
    """Encodes an operand into a workspace as a product would, and leaves it there: for benches."""

def product(
    a: Floats | Planes,
    b: Floats | Planes | Packed,
    out: Any,
    bias: Any | None,
    accumulate: bool,
    threads: int,
) -> None:
    """out[.., M, N] (C-contiguous f32) = sum over the reduction of a times b, FORMAT.md section 5.

    Batch dimensions of a and b are equal, or absent on b (then a's are flattened into M by the caller)."""

def tensor_product(
    a: Any,
    a_axis: int,
    a_format: Format,
    a_rounding: int,
    a_stream: int,
    b: Any,
    b_axis: int,
    b_format: Format,
    b_rounding: int,
    b_stream: int,
    seed: int,
    bias: Any | None,
    threads: int,
    keep: tuple[Format, int, int] | None = None,
) -> Any | None:
    """The same in one call that allocates: the product of two torch tensors, [.., M, N], or None.

    With keep = (format, rounding, stream), for a right operand b without batch dimensions: a pair, the product and what
    `kept_product` takes, a uint8 tensor, or None where that would be no smaller than the floats. It holds the codes of
    `a` along its rows (axis -2 of the flattened matrix), made in the same pass."""

def keep(operand: Floats | Planes, threads: int, below: int | None = None) -> Any | None:
    """A right operand, one matrix, in a uint8 tensor, laid out as `tensor_product` keeps one. None for a format that
    cannot be kept, and for `below` bytes or more. Raises CodeError for planes that no encoder writes."""

def kept_panels(format: Format, lines: int, k: int) -> tuple[int, int, int] | None:
    """Panels, bytes of a panel and lines of a panel of what `keep` gives for [lines, k]: all panels, and then one
    byte for each."""

def kept_planes(kept: Any, format: Format, lines: int, k: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Exponent and mantissa plane of what `keep` gave for [lines, k]. Blocks of zeros get the exponent byte 0."""

def kept_product(
    a: Floats, kept: Any, kept_format: Format, out: Any, threads: int, bias: Any | None = None, sums: Any | None = None
) -> None:
    """out [M, N] = a, reduced along its K rows or columns, times what `tensor_product` or `keep` kept of an X [K, N] in
    `kept_format`, plus bias: the same bits as the product with that tensor. sums [M]: of a along its reduction, as by
    `column_sums`, in the same pass."""

_Codings = Sequence[tuple[Format, int, int]]
"""Format, rounding and stream of the left and of the right operand of a product."""

_AttentionCall = tuple[Any, Any, Any, Any | None, bool, float, tuple[int, int] | None, _Codings, int]
"""q [.., L, E], k [.., S, E], v [.., S, Ev] and mask [.., L, S], with equal batch dimensions and any strides; causal;
scale; dropout of the softmax, `dropped` and `seed` as in the function of that name; codings of q and k, lines of at
most 8 bits as all here; the seed of all random bits."""

def attention(call: _AttentionCall, context: _Codings, out: Any, threads: int) -> None:
    """out[.., L, Ev] = softmax(scale * q k^T + mask) v without the L x S matrix; the bits of product and softmax.
    `context` are the codings of the softmax and v."""

@final
class KeptMatrix:
    """What `keep` gave for a matrix [lines, k], to be multiplied by many times."""

    def __new__(cls, codes: Any, format: Format, lines: int, k: int) -> KeptMatrix: ...
    def linear(
        self, x: Any, x_format: Format, rounding: int, seed: int, stream: int, bias: Any | None, threads: int
    ) -> Any | None:
        """x [.., k] times the matrix, plus bias, in one call that allocates: [.., lines]. None for all that is not as
        usual, errors included."""

@final
class Residual:
    """x + f(x), branch after branch, for one token x [1, 1, width]; then the steps of an end.

    A step is (matrix, bias, format of x, rounding), a product; (attention, heads), of what holds queries, keys and
    values side by side; or (function, arguments behind the tensor), which keeps no view of the tensor. Branches end
    with a product, and so does an end that has steps.
    """

    def __new__(cls, branches: list[list[tuple[Any, ...]]], end: list[tuple[Any, ...]]) -> Residual: ...
    def __call__(self, x: Any, threads: int) -> Any | None:
        """A new torch tensor. None, and nothing done, where x is not as usual.

        Raises:
            HBFPError: a step behind an attention, whose cache holds the token already, gave no tensor as usual.
        """

@final
class GrownAttention:
    """Causal attention over a text that grows; keys and values of the tokens so far are kept as codes."""

    def __new__(
        cls,
        scores: list[tuple[Format, int, int]],
        context: list[tuple[Format, int, int]],
    ) -> GrownAttention:
        """Format, rounding and stream of the operands of both products, the left one first."""
    def attend(self, q: Any, k: Any, v: Any, scale: float, threads: int) -> Any | None:
        """A new torch tensor [.., tokens, Ev]: attention of the next tokens to all so far.

        None, and nothing done, unless all are float32 torch tensors on the CPU, which may have any strides.
        """
    @property
    def length(self) -> int:
        """Tokens so far."""
    @property
    def nbytes(self) -> int: ...
    def truncate(self, length: int) -> None:
        """Forgets all tokens from number `length` on."""
    def __copy__(self) -> GrownAttention: ...
    def __deepcopy__(self, memo: Any) -> GrownAttention: ...

def attention_backward(
    call: _AttentionCall,
    output: Any,
    products: tuple[_Codings, _Codings, _Codings, _Codings],
    gradients: tuple[Any | None, Any | None, Any | None],
    threads: int,
) -> None:
    """The gradients of q, k and v that are not None, from `output`, that of the output. Products: dO v^T, dS k, dS^T q
    and P^T dO."""

def attention_mask_gradient(
    call: _AttentionCall, output: Any, weights: _Codings, out: Any, summed: bool, threads: int
) -> None:
    """out, the gradient of a mask of its shape: the dimensions of the mask, [.., L, S], or 1 in place of any but the
    last, where rows are then summed as by `column_sums`. weights: of dO v^T. summed: whether the mask was broadcast at
    all."""

_Triple = tuple[int, int, int]
_Sizes = tuple[int, list[_Triple]]
"""Groups; then pixels of X and of Y, taps, stride, padding before and dilation, for three spatial dimensions each."""

def convolution_forward(
    x: Any,
    w: Any,
    out: Any,
    sizes: _Sizes,
    operands: _Codings,
    flatten: bool,
    bias: Any | None,
    seed: int,
    threads: int,
    keep: tuple[Format, int, int] | None,
) -> Any | None:
    """out [N, .., C_out] from x [N, .., C], both C-contiguous with three pixel dimensions, and w [C_out, C/g, k0, k1,
    k2] of any strides. With keep = (format, rounding, stream): X's codes along the batch, a uint8 tensor, or None for a
    format that cannot be kept."""

def convolution_input_gradient(
    dy: Any,
    w: Any,
    out: Any,
    sizes: _Sizes,
    operands: _Codings,
    bias: Any | None,
    seed: int,
    threads: int,
    keep: tuple[Format, int, int] | None,
) -> Any | None:
    """out [N, .., C] from dy [N, .., C_out] and w; codings of dy and w. Also a transposed convolution's forward, which
    keeps its input, in the place of dy, as `convolution_forward` does."""

@final
class Geometry:
    """What of a convolution does not depend on the images, with an entry for each of one to three spatial dimensions:
    taps, strides, zeros before and after the pixels, dilations; flatten: whether forward blocks run over the patch."""

    def __new__(
        cls,
        groups: int,
        flatten: bool,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
    ) -> Geometry: ...

def kept_kernel_bytes(format: Format, shape: _Triple, axis: int, groups: int) -> int | None:
    """Bytes of a kernel of shape [C_out, C/g, taps] as `keep_kernel` lays it out; None: it can't be kept."""

def keep_kernel(
    exponents: NDArray[np.uint8],
    mantissas: NDArray[np.uint8],
    format: Format,
    shape: _Triple,
    axis: int,
    groups: int,
    threads: int,
) -> Any | None:
    """A uint8 tensor of the codes of a kernel of shape [C_out, C/g, taps], laid out for the products that reduce along
    `axis`: 1 for Y, 0 for the input gradient. None: it has fewer than 16 channels there, groups that end inside a
    block, or a format that can't be kept.

    Raises:
        CodeError: the planes hold what no encoder writes.
    """

@final
class KeptKernel:
    """What `keep_kernel` gave for such a kernel, for many products."""

    def __new__(cls, codes: Any, format: Format, shape: _Triple, axis: int, groups: int) -> KeptKernel: ...
    def planes(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The exponent and the mantissa plane; blocks of zeros have the exponent byte 0."""

def tensor_convolution(
    x: Any,
    w: Any,
    operands: _Codings,
    geometry: Geometry,
    spatial: Sequence[int] | None,
    bias: Any | None,
    seed: int,
    threads: int,
) -> Any | None:
    """Y [N, C_out, ..] of x [N, C, ..] and w [C_out, C/g, ..] or a `KeptKernel`, plus bias, in one call that allocates;
    with `spatial`, pixels of an X, the input gradient of an x in the place of dY. x and the result have the channels of
    a pixel together in memory. None for all that is not as usual, errors included."""

def convolution_weight_gradient(
    dy: Any,
    x: Any,
    kept: list[bool],
    batch: int,
    channels: list[int],
    out: Any,
    sizes: _Sizes,
    operands: _Codings,
    seed: int,
    threads: int,
) -> None:
    """out [g, taps, C/g, C_out/g] from dy [N, .., C_out] and x [N, .., C], or what was kept of either; kept, channels
    and codings are of dy and x."""

def softmax(scores: Any, out: Any, scale: float, causal: bool, mask: Any | None, threads: int) -> None:
    """Row softmax of scale * scores (+ mask, f32 of scores' shape) over the last dimension; causal: column j of row i
    of the last two dimensions is masked when j > i. `out` may be `scores`. A fully masked row gives 0."""

def softmax_backward(p: Any, dp: Any, out: Any, scale: float, threads: int) -> None:
    """out = scale * p * (dp - rowsum(p * dp)); `out` may be `dp`."""

def dropout(x: Any, out: Any, dropped: int, seed: int, threads: int) -> None:
    """out = x [.., columns] with `dropped` of 2^16 elements set to 0, chosen by the random bits of `seed` and stream 0,
    and the others multiplied by 2^16 / (2^16 - dropped); `out` may be `x`."""

def column_sums(x: Any, out: Any, threads: int) -> None:
    """Sums over the rows of x [rows, n] in blocks of 64 (FORMAT.md section 6: bias gradients)."""

def multiply_adds(rounds: int, threads: int) -> int:
    """Rounds of the level's multiply-adds in registers, on every thread; the operations done, two per multiply-add."""

def read_memory(x: Any, passes: int, threads: int) -> int:
    """Reads x (C-contiguous f32) from end to end, each thread a part; the bytes read."""

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]: ...
def set_tensor_type(cls: type) -> None:
    """Accept instances of torch.Tensor wherever arrays are taken."""

def info() -> dict[str, Any]:
    """level, levels (name -> "available" | reason), cpu features, threading, build."""
