"""The command line: exit codes, one-line errors, and what is printed where."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hbfp
from hbfp import reference
from hbfp.tools import explain
from hbfp.tools.cli import COMMANDS, main, parser
from hbfp.tools.explain import derive


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """The command line as users start it."""
    return subprocess.run([sys.executable, "-m", "hbfp", *arguments], capture_output=True, text=True, **options)


def one_line(text: str) -> str:
    """The only line of an error: a traceback or a usage text would be more."""
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(command.NAME in printed for command in COMMANDS)


@pytest.mark.parametrize("name", [command.NAME for command in COMMANDS])
def test_help_of_a_command_can_be_formatted(name, capsys):
    # A lone % in a help text raises only when somebody asks for the help.
    with pytest.raises(SystemExit) as exit_:
        parser().parse_args([name, "--help"])
    assert exit_.value.code == 0
    assert name in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hbfp {hbfp.__version__}\n"


def test_no_command_is_a_usage_error(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "explain" in captured.err


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "info --nonsense",
        "demo --task chess",
        "demo --steps many",
        "vectors mend",
        "train --recipe hbfp3",
    ],
)
def test_usage_errors_take_one_line_and_exit_2(line, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    assert exit_.value.code == 2
    assert "--help" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("explain one", "'one'"),
        ("explain 0x123456789", "0x123456789"),
        ("explain 1 --format fp8", "fp8"),
        ("explain 1 --rounding up", "nearest_even"),
        ("explain 1 2 3 --format hbfp4b2", "3 values"),
        ("explain 1 --seed -1", "seed"),
    ],
)
def test_bad_input_takes_one_line_and_exits_2(line, named, capsys):
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in one_line(captured.err)


def test_info_needs_no_torch():
    # In a process of its own: here torch may be loaded already.
    code = (
        "import sys; sys.modules['torch'] = None; from hbfp.tools.cli import main; sys.exit(main(['info', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["level"] == hbfp.info()["level"]
    assert set(facts["versions"]) == {"python", "hbfp", "numpy", "torch"}


def test_info_as_text(capsys):
    assert main(["info"]) == 0
    assert hbfp.info()["level"] in capsys.readouterr().out


def test_a_missing_extra_is_named(capsys, monkeypatch):
    missing = ModuleNotFoundError("No module named 'rich'", name="rich")
    monkeypatch.setattr("hbfp.tools.demo.run", lambda arguments: (_ for _ in ()).throw(missing))
    assert main(["demo"]) == 2
    assert "pip install 'hbfp[demo]'" in one_line(capsys.readouterr().err)


def test_an_unwritable_place_is_named(capsys, monkeypatch):
    failure = PermissionError(13, "Permission denied", "/nowhere/report.json")
    monkeypatch.setattr("hbfp.tools.demo.run", lambda arguments: (_ for _ in ()).throw(failure))
    assert main(["demo"]) == 2
    assert one_line(capsys.readouterr().err) == "hbfp demo: /nowhere/report.json: Permission denied\n"


def test_interrupt_exits_130(monkeypatch):
    monkeypatch.setattr("hbfp.tools.info.run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["info"]) == 130


def test_a_reader_that_leaves_is_no_error():
    # Without care Python ends with "Exception ignored ... BrokenPipeError" and code 120.
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hbfp", "info", "--json"], stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def test_negative_numbers_are_values_not_options(capsys):
    # argparse by itself takes -1e-3 and -inf for options.
    assert main(["explain", "1", "-1e-3", "-2", "-inf", "--json"]) == 0
    block = json.loads(capsys.readouterr().out)
    assert [element["x"] for element in block["elements"]] == [1.0, -0.001, -2.0, "-inf"]


@pytest.mark.parametrize("rounding", [rounding.value for rounding in hbfp.Rounding])
@pytest.mark.parametrize(
    "form", ["hbfp4b64", "hbfp6b16-ceil", "hbfp2b8-noclip", "hbfp16tensor", "hbfp4t8", "hbfp5b32-e4"]
)
def test_explained_block_is_the_encoded_block(form, rounding):
    # The derivation tells each clause anew; it must end where encode ends.
    fmt = hbfp.HBFP.parse(form)
    values = np.array([0.3, -1.75, 0.0, -0.0, 1e-40, 2.0, 0.875, -1e-3], np.float32)
    block = derive(values.view(np.uint32).tolist(), fmt, hbfp.Rounding.parse(rounding), seed=7, stream=9)
    encoded = hbfp.encode(values[None], fmt, rounding=rounding, seed=7, stream=9)
    assert [element.code for element in block.elements] == encoded.mantissas[0].tolist()
    assert block.exponent_byte == encoded.exponents.reshape(-1)[0]
    assert block.scale_exponent == block.exponent_byte - 127
    decoded = np.array([element.value for element in block.elements], np.float32)
    assert np.array_equal(decoded, encoded.decode()[0])


def test_explain_names_clauses_that_exist():
    # The numbers are typed by hand, and the specification goes on growing.
    source = Path(explain.__file__).read_text(encoding="utf-8")
    numbers = set(re.findall(r"""["(]([1-7]\.\d+)[") ]""", source))
    spec = Path(__file__).parents[2] / "docs" / "spec.md"
    clauses = set(re.findall(r"^\*\*(\d\.\d+)\*\*", spec.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(numbers) > 10
    assert numbers <= clauses


def test_explain_tells_a_nan_block(capsys):
    assert main(["explain", "1", "nan"]) == 0
    printed = capsys.readouterr().out
    assert "NaN block" in printed
    assert "exponent plane  ff" in printed


def test_explain_tells_a_block_of_zeros(capsys):
    assert main(["explain", "0", "-0.0"]) == 0
    printed = capsys.readouterr().out
    assert "block of zeros" in printed
    assert "minus zero" in printed


def test_explain_takes_float32_patterns(capsys):
    assert main(["explain", "0x3f800000", "0x00000001", "--json"]) == 0
    block = json.loads(capsys.readouterr().out)
    assert [element["bits"] for element in block["elements"]] == ["0x3f800000", "0x00000001"]
    assert "subnormal" in block["elements"][1]["note"]


def test_explain_marks_ties_saturation_and_clamping():
    (even, odd, large) = derive(
        np.array([0.125, 0.375, 1.99], np.float32).view(np.uint32).tolist(), hbfp.HBFP4, hbfp.Rounding.NEAREST_EVEN
    ).elements
    assert "tie" in even.note
    assert "tie" in odd.note
    assert odd.code == 2
    assert (large.note, large.code) == ("saturates (3.5)", 7)
    narrow = hbfp.HBFP.parse("hbfp4b64-e5")
    tiny = derive(np.array([1e-30], np.float32).view(np.uint32).tolist(), narrow, hbfp.Rounding.NEAREST_EVEN)
    assert tiny.scale_exponent == reference.scale_range(narrow)[0]
    assert tiny.scale_exponent > tiny.block_exponent - (narrow.bits - 1)


def test_vectors_gen_makes_what_check_accepts(tmp_path, capsys):
    assert main(["vectors", "gen", "--dir", str(tmp_path)]) == 0
    assert main(["vectors", "check", "--dir", str(tmp_path)]) == 0
    changed = sorted(tmp_path.glob("*.json"))[0]
    changed.write_text(changed.read_text() + " ")
    capsys.readouterr()
    assert main(["vectors", "check", "--dir", str(tmp_path), "--json"]) == 1
    assert [os.path.basename(path) for path in json.loads(capsys.readouterr().out)["stale"]] == [changed.name]


def test_python_m_hbfp_is_hbfp():
    done = run("info", "--nonsense")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "hbfp: unrecognized arguments: --nonsense" in one_line(done.stderr)
