"""The oracle against values derived by hand from the specification; each test names the mistake it hunts.

Clause numbers are those of docs/spec.md.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from hbfp import reference
from hbfp.reference import Encoded, FormatDescription, arithmetic, encode

NAN = 0x7FC00000
INF = 0x7F800000


def fmt(text: str) -> FormatDescription:
    return FormatDescription.parse(text)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def bits(array: np.ndarray) -> list[int]:
    return np.ascontiguousarray(array, np.float32).view(np.uint32).ravel().tolist()


def patterns(*words: int) -> np.ndarray:
    return np.array(words, np.uint32).view(np.float32)


def codes(encoded: Encoded) -> list[int]:
    return encoded.mantissas.ravel().tolist()


def scales(encoded: Encoded) -> list[int]:
    return encoded.exponents.ravel().tolist()


# ---------------------------------------------------------------------------------------------------- its independence


def nodes_of_the_oracle() -> Iterator[ast.AST]:
    for path in Path(reference.__file__).parent.glob("*.py"):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def test_it_imports_nothing_but_numpy_and_the_standard_library():
    """An oracle that borrows from what it checks agrees with every bug."""
    imported = set()
    for node in nodes_of_the_oracle():
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    strangers = {name for name in imported if not name.startswith("hbfp.reference.")}
    assert {name.split(".")[0] for name in strangers} - set(sys.stdlib_module_names) == {"numpy"}


def test_it_calls_no_float_arithmetic():
    """No float literal, no float() and no true division: each would let the host's arithmetic in by the back door."""
    for node in nodes_of_the_oracle():
        assert not isinstance(node, ast.Div)
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "float"


# ------------------------------------------------------------------------------------------------------------- float32


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Fraction(1), 0x3F800000),
        (1 + Fraction(1, 2**24), 0x3F800000),  # tie, stays even
        (1 + Fraction(3, 2**24), 0x3F800002),  # tie, goes up to even
        (1 + Fraction(1, 2**24) + Fraction(1, 2**60), 0x3F800001),  # just above the tie
        (2 - Fraction(1, 2**25), 0x40000000),  # carry into the exponent
        (Fraction(1, 2**149), 0x00000001),
        (Fraction(1, 2**150), 0x00000000),  # tie at the bottom
        (Fraction(-1, 2**150), 0x80000000),  # underflow keeps the sign
        (Fraction(3, 2**150), 0x00000002),
        (Fraction(1, 2**126) - Fraction(1, 2**150), 0x00800000),  # subnormal rounds up to normal
        (Fraction(2**128 - 2**104), 0x7F7FFFFF),
        (Fraction(2**128 - 2**103), INF),  # tie at the top goes to infinity
        (2**128 - 2**103 - Fraction(1, 7), 0x7F7FFFFF),
        (Fraction(-(2**200)), 0xFF800000),
        (Fraction(0), 0),
    ],
)
def test_float32_rounding(value, expected):
    """Ties, gradual underflow, the carry and the step to infinity."""
    assert reference.round_to_float32(value) == expected


@given(st.floats(width=64, allow_nan=False, allow_infinity=False))
def test_float32_rounding_agrees_with_the_host(value):
    """A wrong spacing somewhere in the range: the host converts a double by the same rule."""
    with np.errstate(all="ignore"):
        host = np.float64(value).astype(np.float32)
    if value != 0:
        assert reference.round_to_float32(Fraction(value)) == int(host.view(np.uint32))


@given(st.one_of(st.integers(-(2**60), 2**60), st.integers(-(2**26), 2**26)), st.integers(-260, 130))
def test_the_two_roundings_to_float32_agree(n, exponent):
    """Terms and sums are rounded in integers, everything else by fractions."""
    assert arithmetic._round_scaled(n, exponent) == reference.round_to_float32(n * Fraction(2) ** exponent)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_float32_sums_agree_with_the_host(a, b):
    """Signed zeros, infinities, NaN, subnormals of a single addition."""
    with np.errstate(all="ignore"):
        host = patterns(a)[0] + patterns(b)[0]
    expected = NAN if np.isnan(host) else int(host.view(np.uint32))
    assert reference.float32_add(a, b) == expected


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("hbfp4b64", (4, 64, None, "max_exponent", 8, None)),
        ("hbfp4t8", (4, None, 8, "max_exponent", 8, None)),
        ("hbfp16tensor", (16, None, None, "max_exponent", 8, None)),
        ("hbfp4b64-ceil", (4, 64, None, "ceil", 8, None)),
        ("hbfp6b16-noclip-e5", (6, 16, None, "no_clip", 5, None)),
        ("hbfp4b64-e5-bias20", (4, 64, None, "max_exponent", 5, 20)),
    ],
)
def test_written_form(text, fields):
    """A suffix read into the wrong field, or lost on the way out."""
    description = fmt(text)
    assert description == FormatDescription(*fields)
    assert str(description) == text


@pytest.mark.parametrize(
    "text",
    [
        *("hbfp", "hbfp4", "HBFP4b64", "hbfp4b64 ", "hbfp4b64-bias3", "hbfp4b64-e5-ceil"),
        *("hbfp4b064", "hbfp4b64-e8", "hbfp4b64-e5-bias15"),  # read by a lenient parser, but written otherwise
    ],
)
def test_written_form_that_is_none(text):
    with pytest.raises(ValueError, match="expected"):
        fmt(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hbfp4b64", (-127, 127)),
        ("hbfp4b64-e5", (-15, 15)),
        ("hbfp4b64-e5-bias20", (-20, 10)),
        ("hbfp4b64-e8-bias100", (-100, 127)),
        ("hbfp4b64-e2", (-1, 1)),
    ],
)
def test_scale_range(text, expected):
    """The all-ones field is the NaN block's, so the range ends one below it."""
    assert reference.scale_range(fmt(text)) == expected


# ------------------------------------------------------------------------------------------------------------ exponent


@pytest.mark.parametrize(
    ("value", "rule", "c", "q"),
    [
        # amax = 1.0 is the power of two on which the rules part (m = 4).
        (1.0, "max_exponent", 125, 4),  # E = 1, s = -2
        (1.0, "ceil", 124, 7),  # E = 0, s = -3: y = 8 saturates, 1.0 becomes 0.875
        (1.0, "no_clip", 125, 4),  # E = 0 would saturate
        # 1.875 · 4 = 7.5 ties up to 8: saturates unless the exponent makes room.
        (1.875, "max_exponent", 125, 7),
        (1.875, "ceil", 125, 7),
        (1.875, "no_clip", 126, 4),
        (1.8671875, "no_clip", 125, 7),  # 7.46875 does not
        (-1.0, "ceil", 124, -7),
        (0.75, "max_exponent", 124, 6),  # E = 0
        (0.75, "ceil", 124, 6),
        (0.75, "no_clip", 124, 6),
    ],
)
def test_exponent_rules(value, rule, c, q):
    """PowerOfTwoMax and the room that no_clip makes."""
    encoded = encode(f32(value), FormatDescription(4, exponent_rule=rule))
    assert (scales(encoded), codes(encoded)) == ([c], [q])


@pytest.mark.parametrize("m", range(2, 17))
def test_no_clip_makes_room_exactly_where_the_maximum_would_saturate(m):
    """The threshold is Q + 1/2 steps, tie included, for every width."""
    threshold = Fraction(2 ** (m - 1)) - Fraction(1, 2)
    above, below = threshold, threshold - Fraction(1, 2**20)
    assert reference.block_exponent(above, m, "no_clip") == reference.block_exponent(above, m, "max_exponent") + 1
    assert reference.block_exponent(below, m, "no_clip") == reference.block_exponent(below, m, "max_exponent")


def test_exponent_does_not_depend_on_the_rounding():
    """no_clip under toward_zero still asks what nearest rounding would do."""
    assert scales(encode(f32(1.875), fmt("hbfp4b64-noclip"), rounding="toward_zero")) == [126]
    assert codes(encode(f32(1.875), fmt("hbfp4b64-noclip"), rounding="toward_zero")) == [3]


def test_bounds_of_a_block():
    """The largest magnitude that fits is 2^E - 2^s."""
    for m in range(2, 17):
        e = 5
        s = e - (m - 1)
        largest = Fraction(2**e) - (Fraction(2**s) if s >= 0 else Fraction(1, 2**-s))
        encoded = encode(patterns(reference.round_to_float32(largest)), fmt(f"hbfp{m}b64"))
        assert codes(encoded) == [2 ** (m - 1) - 1]
        assert scales(encoded) == [s + 127]
        assert encoded.decode()[0] == largest


@pytest.mark.parametrize(
    ("text", "word", "c", "q"),
    [
        ("hbfp4b64", 0x00000001, 0, 0),  # 2^-149: s = -151 is clamped to -127, and c = 0 is not a block of zeros
        ("hbfp4b64", 0x00400000, 0, 1),  # 2^-127 is one step
        ("hbfp4b64", 0x00600000, 0, 2),  # 1.5 steps tie to even
        ("hbfp4b64", 0x01000000, 0, 4),  # 2^-125: s = -127 without clamping
        ("hbfp2b64", 0x7F7FFFFF, 254, 1),  # s = 127
        ("hbfp2b64-noclip", 0x7F7FFFFF, 254, 1),  # s = 128 is clamped, the code saturates
        ("hbfp4b64-e5", 0x7F7FFFFF, 142, 7),  # s = 15
        ("hbfp4b64-e5", 0x37800000, 112, 0),  # 2^-16: s = -15, half a step ties to 0; the exponent stays
        ("hbfp4b64-e5", 0x38000000, 112, 1),  # 2^-15
        ("hbfp4b64-e5-bias20", 0x7F7FFFFF, 137, 7),
    ],
)
def test_clamping(text, word, c, q):
    """ExponentClamp: at either end, of the byte and of narrower fields."""
    encoded = encode(patterns(word), fmt(text))
    assert (scales(encoded), codes(encoded)) == ([c], [q])


# ------------------------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("nearest_even", [4, 0, 2, 2, 4, 0, -2, -2]),
        ("nearest_away", [4, 1, 2, 3, 4, -1, -2, -3]),
        ("toward_zero", [4, 0, 1, 2, 3, 0, -1, -2]),
    ],
)
def test_ties(rounding, expected):
    """TieToEven, TieAway and truncation of negative values."""
    x = f32(4.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5)  # E = 3, s = 0: the values are their own y
    assert codes(encode(x, fmt("hbfp4b64"), rounding=rounding)) == expected


def test_zeros():
    """NegZero: the sign of zero is not kept, and a block of zeros has c = 0 whatever the exponent field."""
    for text in ("hbfp4b64", "hbfp4b64-e5", "hbfp4tensor", "hbfp4t2"):
        encoded = encode(f32(-0.0, 0.0), fmt(text))
        assert set(scales(encoded)) == {0}
        assert bits(encoded.decode()) == [0, 0]
    assert bits(encode(f32(1.0, -0.0, -0.01), fmt("hbfp4b64")).decode()) == [0x3F800000, 0, 0]


@pytest.mark.parametrize("value", [0.3, -0.3, 5.5, -6.99, 1e-9, -1e-9, 3.0])
def test_stochastic_rounding_is_exactly_unbiased(value):
    """Over all 65,536 values of r the codes sum to Y, the value in steps of 2^-16 of a code."""
    exact = Fraction(float(np.float32(value)))
    y = round(exact * 2**16)
    drawn = [reference.round_to_code(exact, 0, 4, "stochastic", r) for r in range(1 << 16)]
    assert sum(drawn) == y
    assert set(drawn) <= {math.floor(exact), math.floor(exact) + 1}


def test_stochastic_rounding_saturates_before_the_random_bits():
    """Saturate: at ±Q there is nothing left to round, whatever r."""
    for r in (0, 1, 0xFFFF):
        assert reference.round_to_code(Fraction(9), 0, 4, "stochastic", r) == 7
        assert reference.round_to_code(Fraction(-9), 0, 4, "stochastic", r) == -7


def test_stochastic_rounding_of_negative_values_is_a_floor():
    """An implementation that shifts magnitudes rounds -1/65536 to 0 for r = 0."""
    tiny = Fraction(-1, 2**16)
    assert reference.round_to_code(tiny, 0, 4, "stochastic", 0) == -1
    assert reference.round_to_code(tiny, 0, 4, "stochastic", 1) == 0


# --------------------------------------------------------------------------------------------------------- random bits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The answers published with Random123 (kat_vectors, philox4x32 10)."""
    assert reference.philox4x32(counter, key) == expected


def test_random_bits_follow_the_tensor_as_given():
    """PhiloxCounter: the words' order, the halves' order, and a counter that runs on from row to row."""
    seed, stream = 0x1111111122222222, 0x3333333344444444
    words = reference.philox4x32((1, 5, 0x44444444, 0x33333333), (0x22222222, 0x11111111))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert [reference.random_bits(5, 8 + j, seed, stream) for j in range(8)] == halves


def test_random_bits_do_not_depend_on_the_block_axis():
    """StochasticColumnAxis: the same tensor draws the same bits whichever way its blocks lie."""
    x = np.full((3, 9), 0.3, np.float32)
    x[0, 0] = 4.0
    along_rows = encode(x, fmt("hbfp4tensor"), -1, "stochastic", 7, 9)
    expected = [
        (round(Fraction(float(value)) * 2**16) + reference.random_bits(i, j, 7, 9)) >> 16
        for (i, j), value in np.ndenumerate(x)
    ]
    assert codes(along_rows) == expected
    columns = encode(x, fmt("hbfp4b1"), 0, "stochastic", 7, 9)
    rows = encode(x, fmt("hbfp4b1"), 1, "stochastic", 7, 9)
    assert np.array_equal(columns.mantissas, rows.mantissas)


def test_rows_of_a_3d_tensor_are_counted_through_its_leading_dimensions():
    x = np.full((2, 3, 4), 0.3, np.float32)
    flat = encode(x.reshape(6, 4), fmt("hbfp4b4"), -1, "stochastic", 1, 2)
    assert np.array_equal(encode(x, fmt("hbfp4b4"), -1, "stochastic", 1, 2).mantissas.reshape(6, 4), flat.mantissas)


def test_stream_number():
    """step (32) · site (20) · index (8) · role (4), high to low."""
    assert reference.stream_number(0x12345678, 0xABCDE, 0x9F, 0x7) == 0x12345678_ABCDE_9F_7
    assert reference.stream_number(0, 0, 256 + 3, 0) == 3 << 4
    for bad in ((1 << 32, 0, 0, 0), (0, 1 << 20, 0, 0), (0, 0, 0, 16), (-1, 0, 0, 0)):
        with pytest.raises(ValueError, match="must fit"):
            reference.stream_number(*bad)


@pytest.mark.parametrize("field", ["seed", "stream"])
@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_seed_and_stream_are_64_bits(field, number):
    with pytest.raises(ValueError, match=field):
        encode(f32(1.0), fmt("hbfp4b64"), rounding="stochastic", **{field: number})


# -------------------------------------------------------------------------------------------------- blocks that are NaN


def test_nan_blocks():
    """NaNBlock, InfBlock: the whole block and only that block, in every decoded element the canonical NaN."""
    x = f32(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    x[1] = patterns(0xFFC12345)[0]
    x[5] = -np.inf
    encoded = encode(x, fmt("hbfp4b2"))
    assert scales(encoded) == [255, 127, 255, 127]
    assert codes(encoded) == [0, 0, 3, 4, 0, 0, 7]
    assert bits(encoded.decode()) == [NAN, NAN, 0x40400000, 0x40800000, NAN, NAN, 0x40E00000]


def test_check_names_the_first_bad_index():
    x = np.zeros((2, 3), np.float32)
    x[1, 2] = np.inf
    x[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"\(1, 0\)"):
        encode(x, fmt("hbfp4b2"), axis=0, check=True)


def test_decoding_beyond_float32_gives_infinity():
    """Overflow: no_clip puts 4 · 2^126 on the largest float32."""
    encoded = encode(patterns(0x7F7FFFFF, 0xFF7FFFFF), fmt("hbfp4b64-noclip"))
    assert (scales(encoded), codes(encoded)) == ([253], [4, -4])
    assert bits(encoded.decode()) == [INF, 0xFF800000]


# --------------------------------------------------------------------------------------------------------------- inputs


def test_input_types():
    """float16 widens, float64 is rounded once, byte order and strides do not matter."""
    halves = np.array([1.5, -(2.0**-24), 65504.0, np.inf], np.float16)
    assert arithmetic._float32_patterns(halves).tolist() == [0x3FC00000, 0xB3800000, 0x477FE000, INF]
    doubles = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 2.0**-150, 1e300, -0.0, np.nan])
    assert arithmetic._float32_patterns(doubles).tolist() == [0x3F800000, 0x3F800001, 0, INF, 0x80000000, NAN]
    assert arithmetic._float32_patterns(np.array([1.5], ">f4")).tolist() == [0x3FC00000]
    assert arithmetic._float32_patterns(f32(1, 2, 3, 4)[::-2]).tolist() == [0x40800000, 0x40000000]


@pytest.mark.parametrize("x", [np.array([1]), np.array([True]), np.array([1j]), np.array(["1"])])
def test_other_inputs_raise(x):
    with pytest.raises(ValueError, match="expected float32"):
        encode(x, fmt("hbfp4b64"))


# ------------------------------------------------------------------------------------------------------ shapes, packing


def test_a_short_last_block_has_its_own_exponent():
    """ShortTail: encoded from the elements that exist."""
    encoded = encode(f32(8, 8, 8, 8, 8, 1), fmt("hbfp4b4"))
    assert scales(encoded) == [128, 128]
    assert scales(encode(f32(8, 8, 8, 8, 1), fmt("hbfp4b4"))) == [128, 125]


def test_blocks_along_the_first_axis():
    x = f32(1, 8, 2, 16, 4, 32).reshape(3, 2)
    encoded = encode(x, fmt("hbfp4b2"), axis=0)
    assert encoded.exponents.tolist() == [[126, 129], [127, 130]]
    exponents, mantissas = encoded.planes()
    assert exponents.tolist() == [[126, 127], [129, 130]]  # the blocked axis is last in the planes
    assert mantissas.tolist() == [[0x42, 0x04], [0x42, 0x04]]


def test_tiles():
    """Tile: 2 x 2 tiles of a 3 x 3 matrix, one exponent in both directions, padding inside the plane."""
    x = f32(1, 1, 4, 1, 1, 1, 16, 1, 64).reshape(3, 3)
    encoded = encode(x, fmt("hbfp4t2"))
    assert encoded.exponents.tolist() == [[125, 127], [129, 131]]
    assert encoded.mantissas.tolist() == [[4, 4, 4], [4, 4, 1], [4, 0, 4]]
    exponents, mantissas = encoded.planes()
    assert exponents.tolist() == [[125, 127], [129, 131]]
    assert mantissas.tolist() == [[0x44, 0x44, 0x04, 0x01], [0x04, 0x00, 0x04, 0x00]]
    transposed = encode(x.T, fmt("hbfp4t2"))
    assert np.array_equal(transposed.mantissas, encoded.T.mantissas)
    assert np.array_equal(transposed.exponents, encoded.T.exponents)


def test_tiles_of_a_batch_are_stacked():
    x = np.ones((2, 3, 2), np.float32)
    x[1] *= 2
    encoded = encode(x, fmt("hbfp4t2"))
    assert encoded.exponents.tolist() == [[[125], [125]], [[126], [126]]]
    assert encoded.planes()[0].tolist() == [[125], [125], [126], [126]]
    assert encoded.planes()[1].shape == (4, 2)


def test_whole_tensor():
    """WholeTensor: one exponent, one row, the stream in row-major order whatever the axis."""
    x = f32(1, 2, 3, 4, 5, 6).reshape(2, 3)
    for axis in (0, 1):
        encoded = encode(x, fmt("hbfp4tensor"), axis=axis)
        assert encoded.exponents.tolist() == [[127]]
        exponents, mantissas = encoded.planes()
        assert exponents.tolist() == [[127]]
        assert mantissas.tolist() == [[0x21, 0x43, 0x65]]


@pytest.mark.parametrize(
    ("text", "shape", "axis", "exponents", "mantissas"),
    [
        ("hbfp4b64", (64,), 0, (1, 1), (1, 32)),  # 33 bytes
        ("hbfp6b64", (64,), 0, (1, 1), (1, 48)),  # 49 bytes
        ("hbfp4b64", (3, 65), 1, (3, 2), (3, 33)),
        ("hbfp5b3", (2, 7), 1, (2, 3), (2, 2 + 2 + 1)),
        ("hbfp4b64", (65, 3), 0, (3, 2), (3, 33)),
        ("hbfp4b64", (), 0, (1, 1), (1, 1)),
        ("hbfp4b64", (0,), 0, (1, 0), (1, 0)),
        ("hbfp4b64", (0, 64), 1, (0, 1), (0, 32)),
        ("hbfp4b64", (64, 0), 1, (64, 0), (64, 0)),
        ("hbfp4tensor", (0, 5), 1, (1, 0), (1, 0)),
        ("hbfp4tensor", (3, 5), 1, (1, 1), (1, 8)),
        ("hbfp4t8", (9, 17), 1, (2, 3), (2, 96)),
        ("hbfp4t8", (17,), 0, (1, 3), (1, 96)),
        ("hbfp4t8", (), 0, (1, 1), (1, 32)),
        ("hbfp3t3", (2, 4, 4), 1, (4, 2), (4, 2 * 4)),
        ("hbfp4t8", (0, 5), 1, (0, 1), (0, 32)),
    ],
)
def test_plane_shapes(text, shape, axis, exponents, mantissas):
    """Sizes of both planes, from 4.125 bits an element down to nothing."""
    planes = encode(np.zeros(shape, np.float32), fmt(text), axis).planes()
    assert (planes[0].shape, planes[1].shape) == (exponents, mantissas)


def test_packing_order():
    """Low nibble first; six bits four to three bytes; the least significant bit first; zero padding."""
    assert reference.pack_codes([1, -1, 7, -7, 3], 4).hex() == "f19703"
    assert reference.pack_codes([1, 2, 3, 4], 6).hex() == "813010"
    assert reference.pack_codes([-1], 3).hex() == "07"
    assert reference.pack_codes([-32767, 1], 16).hex() == "01800100"
    assert reference.pack_codes([1, 1, 1, 1, -1], 2).hex() == "5503"


@given(st.integers(2, 16), st.data())
def test_packing_and_back(m, data):
    limit = 2 ** (m - 1) - 1
    values = data.draw(st.lists(st.integers(-limit, limit), max_size=40))
    packed = reference.pack_codes(values, m)
    assert len(packed) == -(-len(values) * m // 8)
    assert reference.unpack_codes(packed, len(values), m) == values


@given(st.sampled_from(["hbfp5b3", "hbfp4t2", "hbfp11tensor", "hbfp2b64"]), st.integers(0, 2), st.integers(0, 2**31))
def test_planes_and_back(text, axis, seed):
    x = np.random.default_rng(seed).standard_normal((2, 5, 4)).astype(np.float32)
    encoded = encode(x, fmt(text), axis)
    again = Encoded.from_planes(*encoded.planes(), fmt(text), x.shape, axis)
    assert np.array_equal(again.mantissas, encoded.mantissas)
    assert np.array_equal(again.exponents, encoded.exponents)


@pytest.mark.parametrize(
    ("text", "shape", "exponents", "mantissas", "message"),
    [
        ("hbfp4b64", (2,), "7f", "81", "forbidden code -8"),
        ("hbfp4b64", (1,), "7f", "11", "non-zero padding"),
        ("hbfp3b64", (2,), "7f", "40", "non-zero padding"),
        ("hbfp4b64", (2,), "ff", "01", "NaN block"),
        ("hbfp4t2", (1, 1), "7f", "0101", "padding of a tile"),
        ("hbfp4b64", (2,), "7f", "0100", "expected planes"),
    ],
)
def test_reading_what_is_no_encoding(text, shape, exponents, mantissas, message):
    """Forbidden codes, padding that is not zero, codes under c = 255, wrong lengths."""
    planes = [np.frombuffer(bytes.fromhex(plane), np.uint8)[None] for plane in (exponents, mantissas)]
    with pytest.raises(ValueError, match=message):
        Encoded.from_planes(*planes, fmt(text), shape)


@given(
    st.integers(2, 16),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.sampled_from(reference.ROUNDINGS),
    st.sampled_from(["", "-noclip", "-e5", "-noclip-e3"]),
)
def test_encoding_is_idempotent(m, values, rounding, suffix):
    """A value already on the grid stays there, whatever the rounding, except under `ceil`."""
    format_ = fmt(f"hbfp{m}b4{suffix}")
    once = reference.quantize(f32(*values), format_, rounding=rounding)
    assume(np.isfinite(once).all())
    assert bits(reference.quantize(once, format_, rounding=rounding)) == bits(once)


def test_ceil_is_not_idempotent():
    """1.0 becomes 0.875, which is on the grid; 0.5 becomes 0.4375: halving each time would show a broken rule."""
    once = reference.quantize(f32(1.0, 0.9), fmt("hbfp4b64-ceil"))
    assert once.tolist() == [0.875, 0.875]
    first = reference.quantize(f32(0.51, 0.5), fmt("hbfp2b1-ceil"))
    assert first.tolist() == [0.5, 0.25]
    assert reference.quantize(first, fmt("hbfp2b1-ceil")).tolist() == [0.25, 0.125]


# ------------------------------------------------------------------------------------------------------------- products


def parts(text: str, mantissas: list, exponents: list, axis: int = -1) -> Encoded:
    return Encoded.from_parts(mantissas, exponents, fmt(text), np.shape(mantissas), axis)


def test_a_product_by_hand():
    """Two blocks of two: (1·3 + 2·-1)·2^(0+1) + (7·7)·2^(-1-2) = 2 + 6.125."""
    a = parts("hbfp4b2", [[1, 2, 7, 0]], [[127, 126]])
    b = parts("hbfp4b2", [[3], [-1], [7], [5]], [[128], [125]], axis=0)
    assert reference.matmul(a, b).tolist() == [[8.125]]


def test_blocks_are_added_in_order():
    """BlockOrder: 2^24 + 1 - 2^24 is 0 in order, 1 in any other."""
    a = parts("hbfp4b1", [[1, 1, -1]], [[127 + 24, 127, 127 + 24]])
    b = parts("hbfp4b1", [[1], [1], [1]], [[127], [127], [127]], axis=0)
    assert bits(reference.matmul(a, b)) == [0]


def test_one_rounding_per_block():
    """SlowScale: D = 2^24 + 2^22 + 1 on a grid of 2^23: rounding D to float32 first makes a tie of what is none."""
    a = parts("hbfp16b2", [[4096, 1]], [[127 - 86]])
    b = parts("hbfp16b2", [[5120], [1]], [[127 - 86]], axis=0)
    assert bits(reference.matmul(a, b)) == [3]


def test_wide_codes():
    """WideCodes: 64 products of 32767² need 37 bits."""
    a = parts("hbfp16b64", [[32767] * 64], [[127]])
    b = parts("hbfp16b64", [[32767]] * 64, [[127]], axis=0)
    assert reference.matmul(a, b).tolist() == [[float(np.float32(64 * 32767**2))]]


def test_zeros_of_a_sum():
    """AccumulateNegZero: -0.0 + 0.0 = +0.0, but -0.0 survives where nothing is added, or only underflow to -0.0."""
    zero = parts("hbfp4b2", [[0, 0]], [[0]])
    down = parts("hbfp4b2", [[-1, 0]], [[0]])
    one = parts("hbfp4b2", [[1], [1]], [[0]], axis=0)
    negative_zero = f32(-0.0).reshape(1, 1)
    assert bits(reference.matmul(zero, one)) == [0]
    assert bits(reference.matmul(down, one)) == [0]  # 2^-254 underflows to -0.0, added to +0.0
    assert bits(reference.matmul(zero, one, out=negative_zero.copy(), accumulate=True)) == [0]
    assert bits(reference.matmul(down, one, out=negative_zero.copy(), accumulate=True)) == [0x80000000]


def test_an_empty_reduction():
    """K = 0: the given C, or +0.0, plus the bias; NaN canonical even then."""
    a = parts("hbfp4b2", np.zeros((1, 0), int), np.zeros((1, 0), int))
    b = parts("hbfp4b2", np.zeros((0, 1), int), np.zeros((0, 1), int), axis=0)
    assert bits(reference.matmul(a, b)) == [0]
    for word, expected in ((0x80000000, 0x80000000), (0x40490FDB, 0x40490FDB), (0xFF800001, NAN)):
        out = patterns(word).reshape(1, 1)
        assert bits(reference.matmul(a, b, out=out, accumulate=True)) == [expected]
    assert bits(reference.product(a, b, None, f32(1.5))) == [0x3FC00000]


def test_non_finite_products():
    """NaNBlock poisons its row only; overflow is infinite; infinity minus infinity is the canonical NaN."""
    a = parts("hbfp4b1", [[0, 1], [2, 1]], [[255, 127], [254, 127]])
    b = parts("hbfp4b1", [[0, 1], [0, 1]], [[0, 254], [0, 127]], axis=0)
    assert bits(reference.matmul(a, b)) == [NAN, NAN, 0, INF]
    cancel = parts("hbfp4b1", [[2, -2]], [[254, 254]])
    both = parts("hbfp4b1", [[1], [1]], [[127], [127]], axis=0)
    assert bits(reference.matmul(cancel, both)) == [NAN]


def test_the_bias_comes_last():
    """BiasLast: a bias added first would be absorbed in another order."""
    a = parts("hbfp4b1", [[1, -1]], [[127 + 24, 127 + 24]])
    b = parts("hbfp4b1", [[1], [1]], [[127], [127]], axis=0)
    assert bits(reference.product(a, b, None, f32(1.0))) == [0x3F800000]


def test_operands_with_different_boundaries_raise():
    """MixedFormats: widths may differ, boundaries along K may not; what counts is where blocks begin."""
    x, w = np.ones((2, 6), np.float32), np.ones((6, 2), np.float32)
    left = encode(x, fmt("hbfp4b3"))
    assert reference.matmul(left, encode(w, fmt("hbfp6b3"), 0)).tolist() == [[6.0, 6.0]] * 2
    assert reference.matmul(left, encode(w, fmt("hbfp6t3"), 0)).tolist() == [[6.0, 6.0]] * 2
    for other in ("hbfp4b2", "hbfp4tensor", "hbfp4t2"):
        with pytest.raises(ValueError, match="begin at different places"):
            reference.matmul(left, encode(w, fmt(other), 0))
    with pytest.raises(ValueError, match="blocked along its reduction"):
        reference.matmul(left, encode(w, fmt("hbfp6b3"), 1))


def test_batches_are_independent():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((2, 3, 5)).astype(np.float32)
    b = rng.standard_normal((2, 5, 4)).astype(np.float32)
    together = reference.matmul(a, b, format=fmt("hbfp4b2"))
    for i in range(2):
        assert bits(reference.matmul(a[i], b[i], format=fmt("hbfp4b2"))) == bits(together[i])
    shared = reference.matmul(a, b[0], format=fmt("hbfp4b2"))
    assert bits(shared[1]) == bits(reference.matmul(a[1], b[0], format=fmt("hbfp4b2")))


# ------------------------------------------------------------------------------------------------------------- training


def test_linear_step_is_three_products_and_a_sum():
    """Each operand is encoded along its own reduction, with its own stream, from the tensor as it is held."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 3, 5)).astype(np.float32)
    w = rng.standard_normal((4, 5)).astype(np.float32)
    dy = rng.standard_normal((2, 3, 4)).astype(np.float32)
    f = fmt("hbfp4b4")
    got = reference.linear_step(x, w, dy, f, "stochastic", seed=3, step=10, site=2, index=1)

    def stream(role: int) -> int:
        return 10 << 32 | 2 << 12 | 1 << 4 | role

    def st_encode(tensor: np.ndarray, axis: int, role: int) -> Encoded:
        return encode(tensor, f, axis, "stochastic", 3, stream(role))

    rows_x, rows_dy = x.reshape(6, 5), dy.reshape(6, 4)
    y = reference.matmul(st_encode(rows_x, 1, 0), st_encode(w, 1, 1).T)
    dx = reference.matmul(st_encode(rows_dy, 1, 2), st_encode(w, 0, 3))
    dw = reference.matmul(st_encode(rows_dy, 0, 4).T, st_encode(rows_x, 0, 5))
    assert bits(got.y) == bits(y)
    assert bits(got.dx) == bits(dx)
    assert bits(got.dw) == bits(dw)
    assert (got.y.shape, got.dx.shape, got.dw.shape, got.db.shape) == (dy.shape, x.shape, w.shape, (4,))


def test_bias_gradient_blocks():
    """A running sum loses the 64 ones that a block of their own keeps."""
    dy = np.zeros((128, 1), np.float32)
    dy[0] = 2.0**24
    dy[64:] = 1.0
    assert reference.bias_gradient(dy).tolist() == [2.0**24 + 64]
    dy[64:] = 0.0
    dy[1:64] = 1.0
    assert reference.bias_gradient(dy).tolist() == [2.0**24]


def test_bias_gradient_ends():
    """No rows, negative zeros, NaN with a payload."""
    assert bits(reference.bias_gradient(np.zeros((0, 2), np.float32))) == [0, 0]
    assert bits(reference.bias_gradient(np.full((3, 1), -0.0, np.float32))) == [0]
    assert bits(reference.bias_gradient(patterns(0xFF812345).reshape(1, 1))) == [NAN]


def test_linear_flattens_leading_dimensions():
    """Tiles of a batch see one matrix: 2 x 3 rows are 6, so a tile of 4 reaches into the second sample."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((2, 3, 4)) * [[[1.0]], [[64.0]]]).astype(np.float32)
    w = encode(rng.standard_normal((5, 4)).astype(np.float32), fmt("hbfp4t4"))
    flat = reference.linear(x.reshape(6, 4), w)
    assert bits(reference.linear(x, w)) == bits(flat)
    assert bits(reference.matmul(x, w.T)) != bits(flat)
