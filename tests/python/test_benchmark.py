"""The bench: every case on tiny shapes, answers that are checked, gates that can fail, files that read back.

Nothing here depends on how long anything takes.
"""

import datetime
import importlib.util
import inspect
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import hbfp  # noqa: E402
from hbfp import _core, ops  # noqa: E402
from hbfp.benchmark import (  # noqa: E402
    CASES,
    cases,
    ceilings,
    checks,
    gates,
    ggml,
    inference,
    layers,
    loading,
    memory,
    peers,
    plot,
    report,
    suite,
    timing,
)
from hbfp.benchmark.cases import Bench  # noqa: E402
from hbfp.benchmark.checks import WrongAnswer  # noqa: E402
from hbfp.benchmark.gates import Gate, Outcome, evaluate  # noqa: E402
from hbfp.benchmark.results import Missing, NotMeasured, NotRun, Results, Row, cpu_name, rows_from_csv  # noqa: E402
from hbfp.benchmark.timing import Effort  # noqa: E402
from hbfp.errors import FileError  # noqa: E402
from hbfp.packed import PackedWeight  # noqa: E402
from hbfp.tools.cli import main  # noqa: E402
from hbfp.training.gpt import GPTShape  # noqa: E402

BRIEF = Effort(rounds=2, calls=1, sample=0.0, slow=1e9)


@pytest.fixture
def bench(monkeypatch):
    # Where torchao is installed, importing it takes longer than all of these tests.
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench(Results("avx2", "a cpu"), 1, BRIEF)
    torch.set_num_threads(kept)


def contestants(bench: Bench) -> set[str]:
    return {row.contestant for row in bench.results.rows}


def row(case="packed", contestant="hbfp4b64", rounds=(1.0,), threads=1, shape=gates._CUBE, unit="GOP/s", work=1e9):
    return Row(case, shape, contestant, threads, work, unit, rounds)


# --- cases -----------------------------------------------------------------------------------------------------------

OURS = {"hbfp4b64", "hbfp6b64", "hbfp8b64"}
TORCH = {"torch fp32", "torch bf16", "torch int8 dynamic"}
ALL_ORIENTATIONS = {f"{o}, {r}" for o in cases.ORIENTATIONS for r in ("nearest_even", "stochastic")}
FEW_ROWS = {"hbfp4b64"} | {peer.name for peer in peers.PEERS if peer.few_rows}
NETWORK = {"hbfp4", "torch fp32", "torch bf16 autocast"}
CALLS = {cases.EMPTY, "hbfp.linear", "hbfp.nn.functional.linear", "torch Linear, no grad"}
CALLS |= {"converted Linear, no grad", "converted Linear, grad"}
FROZEN = {"hbfp4, frozen", "torch fp32"}


@dataclass(frozen=True)
class Rows:
    """What a case adds to the results: its shapes, and the case itself, are made of the arguments it is called with."""

    case: str
    shapes: Callable[..., list[str]] | str
    contestants: set[str]
    small: Sequence[dict[str, object]] = ({},)
    """Arguments that make it cheap: of each name of the case."""

    def of(self, case, bench, **arguments):
        bound = inspect.signature(case).bind(bench, **arguments)
        bound.apply_defaults()
        given = dict(bound.arguments)
        given["dropped"] = f", dropout {given['dropout']}" if given.get("dropout") else ""
        shapes = [self.shapes.format(**given)] if isinstance(self.shapes, str) else self.shapes(**given)
        name = self.case.format(**given)
        threads = given.get("thread_counts", [bench.threads])
        return [row(name, each, shape=s, threads=t) for s in shapes for each in self.contestants for t in threads]


MATRIX, CUBE = "{m}x{n}x{k}", "{size}x{size}x{size}"
GPT = {"layers": 1, "width": 64, "context": 16, "batch": 2}
HEADS = {"context": 16, "batch": 1, "heads": 2, "width": 16}
# Of every case there is.
ROWS = {
    cases.packed_product: Rows("packed", CUBE, OURS | {"hbfp4b32", "hbfp4b16", "torch fp32"}, [{"size": 64}]),
    cases.packed_product_far_apart: Rows("packed", CUBE + cases.FAR_APART, {"hbfp4b64", "torch fp32"}, [{"size": 64}]),
    cases.forward: Rows("forward", MATRIX, OURS | set(peers.BY_NAME), [{"m": 5, "n": 64, "k": 128}]),
    cases.few_rows: Rows("few rows", MATRIX, FEW_ROWS, [{"m": 2, "n": 64, "k": 128}]),
    cases.cold_row: Rows("cold row", "1x{n}x{k}", FEW_ROWS, [{"n": 64, "k": 64, "total": 20_000}]),
    cases.batched: Rows(
        "batched", f"{{matrices}} of {MATRIX}", {"hbfp4b64", "torch fp32"}, [{"matrices": 3, "m": 9, "n": 17, "k": 64}]
    ),
    cases.encode: Rows("encode", "{size}x{size}", ALL_ORIENTATIONS, [{"size": 64}]),
    cases.training_step: Rows("training step", MATRIX, NETWORK, [{"m": 64, "n": 64, "k": 64}]),
    cases.scaling: Rows("scaling", CUBE, {"hbfp4b64"}, [{"size": 64, "thread_counts": (1, 2)}]),
    cases.sweep: Rows("sweep", lambda sizes, **_: [f"{n}x{n}x{n}" for n in sizes], OURS | TORCH, [{"sizes": (64,)}]),
    cases.measure_ceilings: Rows(
        ceilings.CASE, "", {ceilings.PEAK, ceilings.L3, ceilings.DRAM}, [{"dram_bytes": 1 << 16}]
    ),
    cases.overhead: Rows("overhead", MATRIX, CALLS, [{"m": 1, "n": 8, "k": 8}]),
    layers.grouped_convolution: Rows(
        "grouped convolution",
        "{batch}x{channels}x{pixels}x{pixels}, {groups} groups of {size}x{size}",
        NETWORK,
        [{"channels": 16, "pixels": 4, "groups": 8, "size": 3, "batch": 2}],
    ),
    layers.convolution: Rows(
        "convolution", "{batch}x{channels}x{pixels}x{pixels}", NETWORK, [{"channels": 16, "pixels": 4, "batch": 2}]
    ),
    layers.lstm: Rows("lstm", "{steps}x{batch}x{width}", NETWORK, [{"width": 16, "steps": 3, "batch": 2}]),
    layers.attention: Rows(
        "attention{dropped}", "{batch}x{heads}x{context}x{width}", NETWORK, [HEADS, {**HEADS, "dropout": 0.1}]
    ),
    layers.gpt: Rows("gpt", "{layers}x{width}, {batch}x{context}", NETWORK, [GPT]),
    layers.resnet20: Rows("resnet20", "{batch}x3x32x32", NETWORK, [{"batch": 32}]),
    layers.saved_activations: Rows(
        "saved activations",
        lambda **_: ["linear 1024", "transposed convolution 64", "lstm 512", "gru 512", "gpt"],
        {"hbfp4", "torch fp32"},
        [GPT],
    ),
    layers.peak_memory: Rows("peak memory", lambda **_: list(memory.STEPS), set(memory.CONTESTANTS)),
    inference.frozen_linear: Rows(
        "frozen linear",
        MATRIX,
        {"torch int8 dynamic"} | {name + way for name in FROZEN for way in ("", ", compiled")},
        [{"m": 2, "n": 64, "k": 128}],
    ),
    inference.frozen_resnet20: Rows(
        "frozen resnet20", "{batch}x3x32x32", FROZEN | {"torch fp32, channels last"}, [{"batch": 2}]
    ),
    inference.generation: Rows(
        "generation", "{name}", FROZEN, [{"name": "x", "shape": GPTShape(11, 1, 64, 32), "tokens": 4, "prompt": 4}]
    ),
    inference.load: Rows(
        "loading", "{megabytes} MB", {"load_model", "load_model and layout", "peak memory", "file"}, [{"megabytes": 1}]
    ),
}


def places(rows):
    return {(each.case, each.shape, each.contestant, each.threads) for each in rows}


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.__name__)
def test_a_case_gives_its_rows(bench, case, monkeypatch):
    """With the names by which the gates look for them."""
    monkeypatch.setattr(memory, "peak", lambda *_: 1.0)  # processes, which have tests of their own
    monkeypatch.setattr(loading, "measure", lambda *_: loading.Loading(0.1, 0.2, 1 << 20))
    expected = []
    for small in ROWS[case].small:
        case(bench, **small)
        expected += ROWS[case].of(case, bench, **small)
    # Who did not run is told, with a reason, and in one list only.
    absent = {gap.contestant for gap in bench.results.missing if gap.reason}
    assert absent <= set(peers.BY_NAME) - TORCH | {"torch bf16 autocast"}
    assert places(bench.results.rows) == places(each for each in expected if each.contestant not in absent)
    for each in bench.results.rows:
        assert len(each.rounds) >= (1 if each.unit == "MiB" else BRIEF.rounds)
        assert each.seconds > 0
        assert each.figure > 0


def test_all_orientations_are_encoded(bench):
    """A slowest orientation over two of four would be a wrong figure."""
    cases.encode(bench, 64)
    assert contestants(bench) == ALL_ORIENTATIONS


def test_a_rotation_is_large_enough_and_goes_round(bench, monkeypatch):
    """Copies that fit in the caches together would be timed warm under the name of cold."""
    packed, used = [], []
    monkeypatch.setattr(_core, "prepack", lambda *a, f=_core.prepack: packed.append(f(*a)) or packed[-1])
    monkeypatch.setattr(_core, "product", lambda a, b, *r, f=_core.product: used.append(b) or f(a, b, *r))
    cases.cold_row(bench, 64, 64, total=20_000)
    assert sum(each.nbytes for each in packed) > 20_000
    used = used[len(packed) :]  # after the checks
    assert len(used) >= 2
    assert all(a is not b for a, b in itertools.pairwise(used))


def test_a_sweep_drops_what_has_become_slow(bench):
    cases.sweep(bench, (64, 128), limit=0.0)
    assert {each.shape for each in bench.results.rows} == {"64x64x64"}
    assert {gap.contestant for gap in bench.results.missing} >= OURS


# --- answers ---------------------------------------------------------------------------------------------------------


def test_our_wrong_answer_stops_the_bench(bench, monkeypatch):
    real = _core.product

    def wrong(a, b, out, *rest):
        real(a, b, out, *rest)
        out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(float("inf")))

    monkeypatch.setattr(_core, "product", wrong)
    for case in (
        lambda: cases.packed_product(bench, 64),
        lambda: cases.cold_row(bench, 64, 64, total=1),
        lambda: cases.scaling(bench, 64, (1,)),
        lambda: cases.encode(bench, 64),
    ):
        with pytest.raises(checks.WrongAnswer, match="oracle"):
            case()
    assert bench.results.rows == []


def test_a_wrong_gradient_stops_the_bench(bench, monkeypatch):
    real = hbfp.ops.product
    monkeypatch.setattr(
        hbfp.ops, "product", lambda *a, **k: 2 * real(*a, **k) if k["name"] != "forward" else real(*a, **k)
    )
    with pytest.raises(checks.WrongAnswer, match="gradient"):
        cases.training_step(bench, 64, 64, 64)


def test_a_peers_wrong_answer_is_no_contestant(bench, monkeypatch):
    def wrong(x, w, threads):
        return peers.Prepared(lambda: 1.5 * (x @ w.t()), lambda result: result)

    def failing(x, w, threads):
        raise RuntimeError("no such instruction\nand a long trace")

    listed = (
        replace(peers.BY_NAME["torch fp32"], prepare=wrong),
        replace(peers.BY_NAME["torch bf16"], prepare=failing),
    )
    monkeypatch.setattr(cases, "PEERS", listed)
    cases.few_rows(bench, 2, 64, 64)
    assert contestants(bench) == {"hbfp4b64"}
    reasons = {gap.contestant: gap.reason for gap in bench.results.missing}
    assert reasons["torch fp32"].startswith("wrong answer: torch fp32: off by 0.5")
    assert reasons["torch bf16"] == "RuntimeError: no such instruction"


def test_close_refuses_nan_and_shapes():
    x = torch.ones(2, 2)
    checks.close("x", x * 1.01, x, 0.02)
    for found in (x * 1.03, torch.full((2, 2), float("nan")), x[:1]):
        with pytest.raises(checks.WrongAnswer):
            checks.close("x", found, x, 0.02)


def test_missing_peers_are_said_to_be(bench, monkeypatch):
    """An installation without ggml or torchao is the usual one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    ggml._library.cache_clear()
    try:
        cases.forward(bench, 2, 64, 64)
    finally:
        ggml._library.cache_clear()
    reasons = {gap.contestant: gap.reason for gap in bench.results.missing}
    assert {"ggml Q4_0", "ggml Q4_0 repacked", "torchao int8"} <= set(reasons)
    assert "make bench-peers" in reasons["ggml Q4_0"]
    assert "make bench-peers" in reasons["torchao int8"]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", ["ggml Q4_0", "ggml Q4_0 repacked"])
def test_ggml_computes_the_product(name):
    x, w = torch.randn(5, 64), torch.randn(32, 64)
    assert cases.checked(peers.BY_NAME[name], x, w, 2, x @ w.t())
    with pytest.raises(NotRun, match="off by"):
        cases.checked(peers.BY_NAME[name], x, w, 2, 2 * (x @ w.t()))


# --- statistics ------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    """A disturbance of one round, even a long one, must not show."""
    assert timing.ratio((1.0, 10.0, 1.0), (3.0, 30.0, 5.0)) == 3.0
    assert timing.ratio((1.0, 10.0, 1.0), (4.0,)) == 4.0  # a slow contestant has fewer rounds


def test_rounds_take_the_best_and_the_slow_take_fewer(monkeypatch):
    clock = itertools.count()
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def fast():
        now[0] += 0.01 + 0.01 * (next(clock) % 3)

    def slow():
        now[0] += 1.0

    times = timing.interleave({"fast": fast, "slow": slow}, Effort(rounds=5, calls=3, slow_rounds=2))
    assert times["fast"] == pytest.approx([0.01] * 5)
    assert times["slow"] == pytest.approx([1.0] * 2)


def test_short_calls_are_repeated_inside_a_sample(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 1e-5

    times = timing.interleave({"x": call}, Effort(rounds=1, calls=1, sample=1e-3))
    assert times["x"] == pytest.approx([1e-5])
    assert len(calls) >= 100


def test_figures():
    assert row(rounds=(2.0, 4.0, 3.0)).figure == pytest.approx(1 / 3)
    assert row(rounds=(2.0, 4.0, 3.0)).best == pytest.approx(0.5)
    assert row(rounds=(2e-6,), unit="µs", work=0).figure == pytest.approx(2.0)


# --- gates -----------------------------------------------------------------------------------------------------------


def verdict(figure, bars=None, threads=1, level="avx2", **options):
    gate = Gate("g", lambda results, count: figure, bars or {"avx2": (3.0, 4.0)}, **options)
    (found,) = evaluate(Results(level, "cpu"), [threads], [gate])
    return found


@pytest.mark.parametrize(
    ("figure", "options", "outcome"),
    [
        (2.99, {}, Outcome.MISS),
        (3.0, {}, Outcome.PASS),
        (4.0, {}, Outcome.STRETCH),
        (2.56, {"threads": 2}, Outcome.PASS),
        (2.54, {"threads": 2}, Outcome.MISS),
        (2.56, {"threads": 2, "loosened": False}, Outcome.MISS),
        (3.5, {"level": "scalar"}, Outcome.REPORT),
        (11.0, {"bars": {"avx2": (10.0, 5.0)}, "at_most": True}, Outcome.MISS),
        (9.0, {"bars": {"avx2": (10.0, 5.0)}, "at_most": True}, Outcome.PASS),
        (4.0, {"bars": {"avx2": (10.0, 5.0)}, "at_most": True}, Outcome.STRETCH),
        (float("nan"), {}, Outcome.MISS),
    ],
)
def test_outcomes(figure, options, outcome):
    assert verdict(figure, **options).outcome is outcome


def test_what_did_not_run_is_told_from_what_was_left_out():
    results = Results("avx2", "cpu", rows=[row()], missing=[Missing("packed", "torch fp32", "it is ill")])
    figure = gates.ratio("packed", gates._CUBE, "hbfp4b64", "torch fp32")
    left_out = gates.ratio("packed", "1x1x1", "hbfp4b64", "torch fp32")
    found = evaluate(results, [1], [Gate("a", figure, {}), Gate("b", left_out, {})])
    assert [each.outcome for each in found] == [Outcome.NOT_RUN, Outcome.LEFT_OUT]
    assert found[0].reason == "torch fp32: it is ill"
    table = report.gate_table(found)
    assert "it is ill" in table
    assert "1 more were not measured" in table


def test_figures_are_read_off_the_right_rows():
    top = row(ceilings.CASE, ceilings.PEAK, (0.5, 1.0, 2.0), shape="")
    results = Results("avx2", "cpu", rows=[
        row(rounds=(2.0,)), row(rounds=(1.0,), threads=2), row(contestant="slow", rounds=(8.0,)),
        row(contestant="quick", rounds=(4.0,)), top,
        row("overhead", "a", (5e-6,), shape="s", unit="µs"), row("overhead", "b", (1e-6,), shape="s", unit="µs"),
    ])  # fmt: skip
    cube = ("packed", gates._CUBE, "hbfp4b64")
    assert gates.ratio(*cube, "slow", "quick")(results, 1) == 2.0  # against the fastest of them
    assert gates.ratio(*cube, "absent", "slow")(results, 1) == 4.0
    assert gates.share(*cube, ceilings.PEAK)(results, 1) == 25.0  # of the best, not of the median
    assert gates.speed_up(*cube)(results, 2) == 2.0
    assert gates.slowest("packed", gates._CUBE, ["slow", "quick"])(results, 1) == 0.125
    assert gates.above("overhead", "s", "a", "b")(results, 1) == pytest.approx(4.0)
    with pytest.raises(NotMeasured):
        gates.slowest("packed", gates._CUBE, ["slow", "absent"])(results, 1)


def test_a_full_run_measures_every_gate(monkeypatch):
    """A gate whose case, shape or contestant is misspelt would be "not measured" for ever, and so would a case that is
    in no plan."""
    results = Results("avx2", "cpu")
    there = {
        case
        for module in (cases, layers, inference)
        for name, case in inspect.getmembers(module, inspect.isfunction)
        if case.__module__ == module.__name__
        and not name.startswith("_")
        and "bench" in inspect.signature(case).parameters
    }
    assert set(ROWS) == there
    ran = set()

    def stand_in(case):
        def run(bench, **arguments):
            ran.add(case)
            results.rows += ROWS[case].of(case, bench, **arguments)

        return run

    stand_ins = [stand_in(case) for case in ROWS]
    for case, instead in zip(ROWS, stand_ins, strict=True):
        monkeypatch.setattr(sys.modules[case.__module__], case.__name__, instead)
    steps = suite.plan((1, 2))
    # One that is planned under another name would run for minutes.
    assert [step.label for step in steps if getattr(step.work, "func", step.work) not in stand_ins] == []
    suite.run(results, steps)
    assert ran == there
    # Memory of layers is measured on the most threads alone.
    once = ("peak memory of a", "saved activations of a")
    left_out = [(each.gate, each.threads) for each in evaluate(results, (1, 2)) if each.figure is None]
    assert left_out == [(gate.name, 1) for gate in gates.GATES if gate.name.startswith(once)]


def test_saved_activations_are_amounts_and_no_rates(bench):
    layers.saved_activations(bench, **GPT)
    found = bench.results.find
    assert found("saved activations", "linear 1024", "torch fp32", 1).figure == 4.0
    assert 7.0 < 4.0 / found("saved activations", "linear 1024", "hbfp4", 1).figure < 8.0
    assert found("saved activations", "lstm 512", "hbfp4", 1).figure < 33.0  # four gates and a tanh are 31.25


@pytest.mark.parametrize(
    ("case", "process"), [(layers.peak_memory, (memory, "peak")), (inference.load, (loading, "measure"))]
)
def test_a_process_that_fails_is_told_and_does_not_end_the_bench(bench, monkeypatch, case, process):
    def fail(*_):
        raise NotRun("its process failed: killed")

    monkeypatch.setattr(*process, fail)
    case(bench, **ROWS[case].small[0])
    assert bench.results.rows == []
    for each in ROWS[case].of(case, bench, **ROWS[case].small[0]):
        with pytest.raises(NotRun, match="killed") as caught:
            bench.results.find(each.case, each.shape, each.contestant, 1)
        assert caught.type is NotRun


def test_a_layer_whose_bits_depend_on_threads_is_a_wrong_answer():
    bench = Bench(Results("avx2", "cpu"), 1)
    with pytest.raises(WrongAnswer, match="different bits"):
        layers._measure(bench, "x", "y", 1, lambda name: [torch.full((2,), torch.get_num_threads())], lambda name: None)
    with pytest.raises(WrongAnswer, match="away from FP32"):
        layers._measure(bench, "x", "y", 1, lambda name: [torch.ones(2) * (1 if name == "torch fp32" else 3)], None)


def test_only_what_is_said_to_be_exact_is_compared_across_threads():
    """A normalisation's gradients have other bits on other threads; the scores of a network must not."""
    bench = Bench(Results("avx2", "cpu"), 1)

    def results(name):
        return [torch.ones(2), torch.ones(2) + 0.01 * torch.get_num_threads()]

    with pytest.raises(WrongAnswer, match="different bits"):
        layers._measure(bench, "x", "y", 1, results, None, 2)
    with pytest.raises(TypeError):  # got as far as timing
        layers._measure(bench, "x", "y", 1, results, None, 1)


def test_a_network_with_wrong_gradients_is_a_wrong_answer(monkeypatch):
    """A loss says little: backward may be broken and the loss right."""
    real = ops.kept_product
    monkeypatch.setattr(ops, "kept_product", lambda *a, **k: 3 * real(*a, **k))
    with pytest.raises(WrongAnswer, match="away from FP32"):
        layers.gpt(Bench(Results("avx2", "cpu"), 1), 1, 64, 16, 2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_peak_memory_is_that_of_a_process():
    assert 10 < memory.peak("attention 2048", "torch fp32", 1) < 1000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_a_process_that_fails_has_no_peak_and_says_why():
    with pytest.raises(NotRun, match=r"its process failed: .*nobody"):
        memory.peak("nobody", "torch fp32", 1)


@pytest.mark.parametrize(
    ("level", "fp32", "fails"), [("avx2", 1.99, True), ("avx2", 2.01, False), ("scalar", 0.1, False)]
)
def test_the_floor_of_the_quick_run(level, fp32, fails):
    results = Results(level, "cpu", rows=[row(), row(contestant="torch fp32", rounds=(fp32,))])
    assert (gates.quick_failure(results) is not None) is fails
    assert gates.quick_failure(Results(level, "cpu")) is None


# --- files -----------------------------------------------------------------------------------------------------------


def filled() -> Results:
    rows = [row(rounds=(0.1, 1 / 3, 2e-7)), replace(row("one, two", 'a "b"'), note="x; y")]
    return Results("avx2", "cpu", {"torch": "2"}, True, rows, [Missing("c", "d", "e")])


def test_json_and_csv_read_back():
    results = filled()
    assert Results.from_json(results.to_json({"gates": []})) == results
    assert rows_from_csv(results.to_csv()) == results.rows
    with pytest.raises(FileError, match="columns"):
        rows_from_csv("a,b\n1,2\n")


def test_the_tables_name_everything():
    text = report.row_table(filled())
    assert 'a "b"' in text
    assert "x; y" in text
    assert "slow: 1 of" not in text  # the only row of its case
    assert text.splitlines()[-1].split() == ["c", "d", "e"]


def test_a_cpu_with_a_vague_name_is_told_by_its_numbers():
    vague = "cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"
    assert cpu_name(vague) == "amd-epyc-family-25-model-1"
    named = "cpu family\t: 6\nmodel\t\t: 106\nmodel name\t: Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz\n"
    assert cpu_name(named) == "intel-xeon-platinum-8375c"
    assert cpu_name("") != ""


def test_the_plot_is_a_picture(tmp_path):
    rows = [row("sweep", name, shape=f"{n}x{n}x{n}") for name in ("hbfp4b64", "torch fp32") for n in (64, 128)]
    plot.draw(Results("avx2", "cpu", rows=rows), 1, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(NotRun):
        plot.draw(Results("avx2", "cpu", rows=rows), 2, tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()


# --- the command -----------------------------------------------------------------------------------------------------


def test_every_case_is_planned():
    assert {step.case for step in suite.plan((1, 2))} == set(CASES)
    assert {step.case for step in suite.plan((1,), only=["encode"])} == {"ceilings", "encode"}
    assert {step.threads for step in suite.plan((1, 2), quick=True)} == {1, 2}


@pytest.fixture
def planned(monkeypatch):
    """The command with steps of ours; returns the list to put them in."""
    work = []
    monkeypatch.setattr(suite, "plan", lambda threads, **options: [suite.Step("x", "x", 1, w, BRIEF) for w in work])
    return work


def ratio_of(fp32):
    def work(bench):
        bench.results.rows += [row(), row(contestant="torch fp32", rounds=(fp32,))]

    return work


@pytest.mark.parametrize(
    ("options", "fp32", "code"),
    [((), 0.5, 0), (("--strict",), 0.5, 1), (("--quick",), 0.5, 1), (("--quick",), 9.0, 0), (("--strict",), 9.0, 0)],
)
def test_exit_codes(planned, tmp_path, monkeypatch, capsys, options, fp32, code):
    monkeypatch.setattr(suite, "new_results", lambda quick: Results("avx2", "cpu", quick=quick))
    planned.append(ratio_of(fp32))
    assert main(["bench", "--out", str(tmp_path), "--threads", "1", *options]) == code
    assert ("MISS" in capsys.readouterr().out) is (fp32 < 3)


def test_an_interrupt_keeps_what_was_measured(planned, tmp_path, capsys):
    def interrupt(bench):
        raise KeyboardInterrupt

    planned += [ratio_of(9.0), interrupt]
    assert main(["bench", "--out", str(tmp_path), "--threads", "1"]) == 130
    captured = capsys.readouterr()
    assert "packed product HBFP4 / FP32" in captured.out
    assert "stopped" in captured.err
    written = json.loads((tmp_path / "bench.json").read_text())
    assert len(written["rows"]) == 2
    assert written["gates"][0]["figure"] == 9.0


def test_a_wrong_answer_fails_the_command(planned, tmp_path, capsys):
    def wrong(bench):
        raise checks.WrongAnswer("hbfp4b64: no")

    planned.append(wrong)
    assert main(["bench", "--out", str(tmp_path)]) == 1
    assert "hbfp4b64: no" in capsys.readouterr().err


def test_the_record_is_named_for_cpu_and_day(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned.append(ratio_of(9.0))
    assert main(["bench", "--record"]) == 0
    (record,) = (tmp_path / "benches" / "record").glob("*/*.csv")
    assert record.parent.name == cpu_name()
    assert record.name == f"{datetime.date.today()}-{hbfp.info()['level']}.csv"
    assert len(rows_from_csv(record.read_text())) == 2


def test_bad_threads_are_a_usage_error(capsys):
    assert main(["bench", "--threads", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_torch_missing_is_named():
    code = "import sys; sys.modules['torch'] = None; from hbfp.tools.cli import main; sys.exit(main(['bench']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'hbfp[torch]'" in done.stderr


# --- inference -------------------------------------------------------------------------------------------------------


def test_frozen_layers_are_measured_and_checked(bench, monkeypatch):
    inference.frozen_linear(bench, 2, 64, 128)
    assert contestants(bench) >= {"hbfp4, frozen", "hbfp4, frozen, compiled", "torch fp32"}
    monkeypatch.setattr(hbfp.nn.Linear, "forward", lambda self, x: x @ self.weight.decode().T)
    with pytest.raises(WrongAnswer):
        inference.frozen_linear(bench, 2, 64, 128)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda module, y: y * 1.5 if isinstance(module.weight, PackedWeight) else y, "different bits"),
        (lambda module, y: -y, "off by"),
    ],
)
def test_a_frozen_resnet_is_measured_and_checked(bench, monkeypatch, spoil, message):
    inference.frozen_resnet20(bench, 1)
    assert {row.unit for row in bench.results.rows} == {"images/s"}
    assert all(row.figure == pytest.approx(1 / row.seconds) for row in bench.results.rows)
    real = hbfp.nn.Linear.forward
    monkeypatch.setattr(hbfp.nn.Linear, "forward", lambda self, x: spoil(self, real(self, x)))
    with pytest.raises(WrongAnswer, match=message):
        inference.frozen_resnet20(bench, 1)


def test_generation_is_measured_and_checked(bench, monkeypatch):
    shape = GPTShape(11, 1, 64, 32)
    inference.generation(bench, "small", shape, 4, 4)
    assert contestants(bench) == {"hbfp4, frozen", "torch fp32"}
    assert {row.unit for row in bench.results.rows} == {"tokens/s"}
    assert all(row.figure == pytest.approx(4 / row.seconds) for row in bench.results.rows)
    real = hbfp.nn.KeyValueCache.__call__
    monkeypatch.setattr(hbfp.nn.KeyValueCache, "__call__", lambda self, q, k, v: 3 * real(self, q, k, v))
    with pytest.raises(WrongAnswer, match="cached"):
        inference.generation(bench, "small", shape, 4, 4)


def test_loading_is_measured_in_a_process_of_its_own(bench, tmp_path):
    layers = loading.write(tmp_path / "m.safetensors", 1, 256)
    assert layers == 30
    found = loading.measure(tmp_path / "m.safetensors", layers, 1, 256)
    assert 0 < found.loaded <= found.laid_out
    # Pages of the file are given back as its weights are laid out.
    layers = loading.write(tmp_path / "large.safetensors", 40)
    size = (tmp_path / "large.safetensors").stat().st_size
    assert loading.measure(tmp_path / "large.safetensors", layers, 1).peak < 1.6 * size
    with pytest.raises(NotRun, match="failed"):
        loading.measure(tmp_path / "none", layers, 1, 256)
