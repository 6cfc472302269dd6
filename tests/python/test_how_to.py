"""The how-to pages do what they say: their blocks run in order, one page one script, and print what the page shows.

A block of Python is run where it stands; one whose first line is `# NAME.py` is saved under that name instead. In a
block for the console the lines behind a $ are run by a shell. What either prints stands right behind: in a block of
text, or in the console's own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

import hbfp  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "how-to"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")


class Block(NamedTuple):
    language: str
    line: int
    """Of its first line in the page, counted from 0."""
    code: str


class Example(NamedTuple):
    """A block that is run, and what it prints."""

    block: Block
    shown: str


def examples(text: str) -> Iterator[Example]:
    fences = list(re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    blocks = [Block(fence[1], text[: fence.start(2)].count("\n"), fence[2]) for fence in fences]
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language == "console":
            lines = block.code.splitlines(keepends=True)
            commands = "".join(line.removeprefix("$ ") for line in lines if line.startswith("$ "))
            yield Example(block._replace(code=commands), "".join(line for line in lines if not line.startswith("$ ")))
        elif block.language == "python":
            yield Example(block, after.code if after is not None and after.language == "text" else "")


def printed(block: Block, page: str, namespace: dict[str, object]) -> str:
    """What a block prints that is run in the current folder."""
    if block.language == "console":
        environment = {
            **os.environ,
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "PYTHONPATH": str(Path(hbfp.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(["sh", "-ec", block.code], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout
    if name := re.match(r"# (\w+\.py)\n", block.code):
        Path(name[1]).write_text(block.code, encoding="utf-8")
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile("\n" * block.line + block.code, page, "exec"), namespace)  # tracebacks show the page's lines
    return out.getvalue()


NUMBER = re.compile(r"\d+\.\d+")


def agree(printed: str, shown: str) -> bool:
    """Equal but for the figures with a decimal point, which may be a fiftieth or a unit of the last place off.

    They are losses, accuracies and ratios of noise after some steps of training. What torch computes between the
    products has other last bits on other machines, and training goes on from them.
    """
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(
        abs(float(a) - float(b)) <= max(abs(float(b)) / 50, 1.01 * 10.0 ** -len(b.partition(".")[2])) for a, b in pairs
    )


@pytest.fixture(autouse=True)
def _as_it_was():
    """A page may seed torch, and small models are faster on one thread."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.timeout(900)  # one page starts two launchers of two processes, each of which imports torch
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_does_what_it_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block, shown in examples(path.read_text(encoding="utf-8")):
        found = printed(block, str(path), namespace)
        if not agree(found, shown):
            assert found == shown, f"{path.name}, line {block.line + 1}"  # pytest shows where they differ


def test_index_names_every_page():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| .*?\]\(([\w-]+\.md)\)", index, re.MULTILINE)) == [path.name for path in PAGES]


def test_every_page_has_something_to_run_and_to_show():
    """Were a fence not recognised, nothing would be tested."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        found = list(examples(text))
        assert len(found) == text.count("```python") + text.count("```console") >= 2
        assert sum(bool(shown) for _, shown in found) == text.count("```text") + text.count("```console")


def test_other_figures_and_other_words_are_noticed():
    """The comparison itself."""
    assert agree("loss 0.511, 3 steps", "loss 0.512, 3 steps")
    assert not agree("loss 0.53, 3 steps", "loss 0.51, 3 steps")
    assert not agree("loss 0.51, 4 steps", "loss 0.51, 3 steps")
    assert not agree("loss 0.51\n", "loss 0.51")
