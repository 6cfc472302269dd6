"""README and CONTRIBUTING say what is so: their examples run, and what they name exists."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


EXAMPLES_IN = ("README.md", "docs/files.md", "docs/inference.md")


def examples() -> list[tuple[str, int, str]]:
    """Page, line and text of each."""
    return [
        (name, page(name)[: found.start(1)].count("\n"), found[1])
        for name in EXAMPLES_IN
        for found in re.finditer(r"^```python\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.parametrize(("name", "line", "example"), examples())
def test_example_runs(name: str, line: int, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that no longer works is the first thing a newcomer meets."""
    if "import torch" in example:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * line + example, name, "exec")  # so that tracebacks show the page's lines
    exec(code, {"__name__": "__main__"})


def test_there_are_examples() -> None:
    """Were the pattern above to match nothing, nothing would be tested."""
    assert len(examples()) == sum(page(name).count("```python") for name in EXAMPLES_IN) >= 4


def test_commands_of_the_page_about_files_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with the files that they name."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from hbfp.tools.cli import main

    monkeypatch.chdir(tmp_path)
    shapes = {"blocks.0.mlp.weight": (8, 512), "lm_head.weight": (10, 64), "embed.weight": (10, 64)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, "model.safetensors")
    torch.save(tensors, "model.pt")
    commands = re.findall(r"^    hbfp (.*)$", page("docs/files.md"), re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        words = shlex.split(command, comments=True)
        assert main(words) == (words[0] == "diff"), command


@pytest.mark.parametrize("name", PAGES)
def test_named_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", page("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`(?:\w+=\w+ )?|^\$ )make ([a-z][a-z-]*)", page(name), re.MULTILINE))
    assert {"demo", "test", "help"} <= targets
    assert named
    assert not named - targets


@pytest.mark.parametrize("name", [*PAGES, *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page(name))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_places_on_the_map_exist() -> None:
    """Each `name` in the map, from the root or from the place in its row's first column."""
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", page("README.md").partition("## Map")[2], re.MULTILINE)
    assert len(rows) > 5
    missing = [place for place, _ in rows if not (ROOT / place).exists()]
    for place, text in rows:
        names = re.findall(r"`([\w./]+)`", text)
        missing += [
            f"{place}: {name}" for name in names if not ((ROOT / place / name).exists() or (ROOT / name).exists())
        ]
    assert missing == []
