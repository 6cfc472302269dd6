"""Formats and roundings as values: equality, written form, derived sizes."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given

import hbfp
from hbfp import HBFP, HBFP4, ExponentRule, FormatError, Rounding, ShapeError, reference, testing


def test_named_formats_are_what_they_say():
    assert [(f.bits, f.block) for f in (hbfp.HBFP4, hbfp.HBFP5, hbfp.HBFP6, hbfp.HBFP8, hbfp.HBFP12, hbfp.HBFP16)] == [
        (4, 64),
        (5, 64),
        (6, 64),
        (8, 64),
        (12, 64),
        (16, 64),
    ]
    assert HBFP(4) == HBFP4


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HBFP(4), "hbfp4b64"),
        (HBFP(6, 16), "hbfp6b16"),
        (HBFP(4, tile=8), "hbfp4t8"),
        (HBFP(4, None), "hbfp4tensor"),
        (HBFP(4, exponent_rule="ceil"), "hbfp4b64-ceil"),
        (HBFP(6, 16, exponent_rule="no_clip", exponent_bits=5), "hbfp6b16-noclip-e5"),
        (HBFP(16, 1024, exponent_bits=5, exponent_bias=20), "hbfp16b1024-e5-bias20"),
    ],
)
def test_written_form(format, text):
    assert str(format) == text
    assert HBFP.parse(text) == format


@given(testing.formats(blocks=(1, 1024)))
def test_written_form_round_trips(format):
    """A suffix that is printed and not read back, or read into another field."""
    parsed = HBFP.parse(str(format))
    assert parsed == format
    assert hash(parsed) == hash(format)
    assert eval(repr(format), {"HBFP": HBFP}) == format


@given(testing.formats(blocks=(1, 1024)))
def test_written_form_is_the_oracles(format):
    """Core and oracle each have a printer: files written by one must open in the other."""
    assert str(reference.FormatDescription.parse(str(format))) == str(format)


NOT_FORMATS = """
    hbfp hbfp4 HBFP4b64 hbfp4b hbfp4b064 hbfp1b64 hbfp17b64 hbfp4b0 hbfp4b1025 hbfp4t0 hbfp4t33 hbfp4t hbfp4b64-
    hbfp4b64-max hbfp4b64-e5-ceil hbfp4b64-e1 hbfp4b64-e9 hbfp4b64-bias20 hbfp4b64-e8 hbfp4b64-e5-bias15 hbfp+4b64
"""


@pytest.mark.parametrize("text", NOT_FORMATS.split())
def test_parse_refuses_what_it_would_not_write(text):
    with pytest.raises(FormatError, match="expected"):
        HBFP.parse(text)


@pytest.mark.parametrize("text", ["", " hbfp4b64", "hbfp4b64\n"])
def test_parse_refuses_blanks(text):
    with pytest.raises(FormatError, match="expected"):
        HBFP.parse(text)


def test_parse_takes_a_format_as_it_is():
    assert HBFP.parse(HBFP4) is HBFP4


def test_resolved_defaults_make_equal_descriptions_equal():
    """Two spellings of one format that differ as dictionary keys."""
    assert HBFP(4) == HBFP(4, 64, exponent_bias=127) == HBFP(np.int64(4), exponent_rule=ExponentRule.MAX_EXPONENT)
    assert hash(HBFP(4)) == hash(HBFP(4, exponent_bias=127))
    assert HBFP(4, exponent_bits=5).exponent_bias == 15
    assert HBFP(4) != HBFP(4, exponent_rule="ceil")
    assert len({HBFP(4), HBFP(4, 64), HBFP(4, 32), HBFP(4, tile=8), HBFP(4, None)}) == 4


def test_a_tile_leaves_no_block():
    """A format with both would mean two things to two readers."""
    format = HBFP(4, 16, tile=8)
    assert format.block is None
    assert format.tile == 8
    assert format == HBFP(4, None, tile=8)


def test_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HBFP4.bits = 5
    assert not hasattr(HBFP4, "__dict__")


@given(testing.formats())
def test_pickle_and_copy(format):
    """The compiled half of a format cannot be pickled, and training scripts copy their configuration."""
    for twin in (pickle.loads(pickle.dumps(format)), copy.copy(format), copy.deepcopy(format)):
        assert twin == format
        assert twin.core == format.core
    assert dataclasses.replace(format, bits=3) == HBFP.parse(str(format).replace(f"hbfp{format.bits}", "hbfp3", 1))


@given(testing.formats())
def test_max_code(format):
    assert format.max_code == reference.max_code(format.bits)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (HBFP(4), 4.125),
        (HBFP(6), 6.125),
        (HBFP(4, 16), 4.5),
        (HBFP(4, tile=8), 4.125),
        (HBFP(4, 64, exponent_bits=4), 4.0625),
        (HBFP(8, None), 8.0),
    ],
)
def test_bits_per_element(format, expected):
    assert format.bits_per_element == expected


@pytest.mark.parametrize(
    ("format", "shape", "axis", "expected"),
    [
        (HBFP(4), (64,), -1, 33),
        (HBFP(6), (64,), -1, 49),
        (HBFP(4), (10, 65), 1, 10 * (33 + 2)),
        (HBFP(4), (10, 65), 0, 65 * (1 + 5)),
        (HBFP(3, 5), (2, 7), -1, 2 * (1 + 2 + 1 + 1)),
        (HBFP(4, tile=8), (9, 8), -1, 2 * 33),
        (HBFP(4, tile=8), (3, 9, 8), 0, 3 * 2 * 33),
        (HBFP(4, None), (3, 5), -1, 1 + 8),
        (HBFP(4), (), 0, 2),
        (HBFP(4), (0, 64), -1, 0),
    ],
)
def test_storage_bytes(format, shape, axis, expected):
    """Short last blocks take only their own bytes; tiles are padded."""
    assert format.storage_bytes(shape, axis) == expected
    assert hbfp.encode(np.ones(shape, np.float32), format, axis).nbytes == expected


def test_storage_bytes_of_what_no_memory_holds():
    with pytest.raises(ShapeError, match="found"):
        HBFP4.storage_bytes((2**40, 2**40))
    with pytest.raises(ShapeError, match="found"):
        HBFP4.storage_bytes((2**70, 2))
    with pytest.raises(ShapeError, match="axis"):
        HBFP4.storage_bytes((4, 4), 2)


def test_rounding_codes_are_the_cores():
    assert {str(rounding): rounding.code for rounding in Rounding} == {
        "nearest_even": 0,
        "nearest_away": 1,
        "toward_zero": 2,
        "stochastic": 3,
    }


def test_enums_are_their_strings():
    assert Rounding.parse("stochastic") is Rounding.STOCHASTIC
    assert Rounding.parse(Rounding.TOWARD_ZERO) is Rounding.TOWARD_ZERO
    assert Rounding.NEAREST_EVEN == "nearest_even"
    assert f"{Rounding.NEAREST_EVEN}" == "nearest_even"
    assert HBFP(4, exponent_rule="ceil").exponent_rule is ExponentRule.CEIL
