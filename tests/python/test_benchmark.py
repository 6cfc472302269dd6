"""The bench: every case on tiny shapes, answers that are checked, gates that can fail, files that read back.

Nothing here depends on how long anything takes.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import replace
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


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (lambda b: cases.packed_product(b, 64), OURS | {"hbfp4b32", "hbfp4b16", "torch fp32"}),
        (lambda b: cases.packed_product_far_apart(b, 64), {"hbfp4b64", "torch fp32"}),
        (lambda b: cases.forward(b, 5, 64, 128), OURS | TORCH),
        (lambda b: cases.few_rows(b, 2, 64, 128), {"hbfp4b64"} | TORCH),
        (lambda b: cases.cold_row(b, 64, 64, total=20_000), {"hbfp4b64"} | TORCH),
        (lambda b: cases.batched(b, 3, 9, 17, 64), {"hbfp4b64", "torch fp32"}),
        (lambda b: cases.encode(b, 64), {name for name in ALL_ORIENTATIONS if name.startswith("right")}),
        (lambda b: cases.training_step(b, 64, 64, 64), {"hbfp4", "torch fp32", "torch bf16 autocast"}),
        (lambda b: cases.scaling(b, 64, (1, 2)), {"hbfp4b64"}),
        (lambda b: cases.sweep(b, (64,), limit=1e9), OURS | TORCH),
        (lambda b: cases.measure_ceilings(b, 1 << 16), {ceilings.PEAK, ceilings.L3, ceilings.DRAM}),
        (
            lambda b: cases.overhead(b, 1, 8, 8),
            {"torch.empty", "hbfp.linear", "converted Linear, no grad", "converted Linear, grad"},
        ),
    ],
    ids=[
        "packed",
        "far-apart",
        "forward",
        "few-rows",
        "cold-row",
        "batched",
        "encode",
        "training",
        "scaling",
        "sweep",
        "ceilings",
        "overhead",
    ],
)
def test_a_case_gives_rows(bench, case, expected):
    case(bench)
    assert expected <= contestants(bench)
    for each in bench.results.rows:
        assert len(each.rounds) == BRIEF.rounds
        assert each.seconds > 0
        assert each.figure > 0
    # Who did not run is told, with a reason; nobody is in both lists.
    assert all(gap.reason for gap in bench.results.missing)
    assert not contestants(bench) & {gap.contestant for gap in bench.results.missing}


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
    """A gate whose case, shape or contestant is misspelt would be "not measured" for ever."""
    results = Results("avx2", "cpu")

    def record(case, shape, names):
        def run(bench, *args, **kwargs):
            shapes = shape(*args, **kwargs)
            results.rows += [row(case, name, shape=shapes, threads=bench.threads) for name in names]

        return run

    every = (*OURS, "hbfp4b32", "hbfp4b16", *peers.BY_NAME)
    matrix = lambda m, n=4096, k=4096: f"{m}x{n}x{k}"  # noqa: E731
    monkeypatch.setattr(cases, "packed_product", record("packed", lambda: gates._CUBE, every))
    far_apart = record("packed", lambda: gates._CUBE + cases.FAR_APART, every)
    monkeypatch.setattr(cases, "packed_product_far_apart", far_apart)
    monkeypatch.setattr(cases, "forward", record("forward", matrix, every))
    monkeypatch.setattr(cases, "few_rows", record("few rows", matrix, every))
    monkeypatch.setattr(cases, "cold_row", record("cold row", lambda: matrix(1), every))
    monkeypatch.setattr(cases, "encode", record("encode", lambda: "1024x1024", ALL_ORIENTATIONS))
    batch = record("batched", lambda matrices, m, n, k: f"{matrices} of {matrix(m, n, k)}", every)
    monkeypatch.setattr(cases, "batched", batch)
    steps = ("hbfp4", "torch fp32", "torch bf16 autocast")
    monkeypatch.setattr(cases, "training_step", record("training step", matrix, steps))
    empty_and_ours = {gates.EMPTY, "hbfp.linear", "hbfp.nn.functional.linear"}
    empty_and_ours |= {"converted Linear, no grad", "converted Linear, grad"}
    monkeypatch.setattr(cases, "overhead", record("overhead", matrix, empty_and_ours))
    for_one = record("scaling", lambda size, thread_counts: matrix(size, size, size), every)
    monkeypatch.setattr(
        cases, "scaling", lambda bench, **k: [for_one(replace(bench, threads=t), **k) for t in k["thread_counts"]]
    )
    monkeypatch.setattr(cases, "sweep", lambda bench, sizes: None)
    tops = (ceilings.PEAK, ceilings.L3, ceilings.DRAM)
    monkeypatch.setattr(cases, "measure_ceilings", record(ceilings.CASE, lambda: "", tops))
    networks = {
        "convolution": ("convolution", lambda channels, pixels: f"32x{channels}x{pixels}x{pixels}"),
        "lstm": ("lstm", lambda: "100x32x512"),
        "gpt": ("gpt", lambda: "6x384, 12x256"),
        "resnet20": ("resnet20", lambda: "128x3x32x32"),
    }
    for name, (case, shape) in networks.items():
        monkeypatch.setattr(layers, name, record(case, shape, steps))

    def attention(bench, context, dropout=0.0):
        case = "attention, dropout 0.1" if dropout == 0.1 else "attention"
        record(case, lambda: f"4x8x{context}x64", steps)(bench)

    monkeypatch.setattr(layers, "attention", attention)
    for name in ("saved_activations", "peak_memory"):
        monkeypatch.setattr(layers, name, lambda bench: None)
    suite.run(results, suite.plan((1, 2)))
    amounts = ("peak memory", "saved activations")
    for count in (1, 2):
        shapes = (*memory.STEPS, "linear 1024")
        for case, shape in ((case, shape) for case in amounts for shape in shapes):
            results.rows += [row(case, name, (1.0,), shape=shape, threads=count, unit="MiB") for name in steps]
    assert [each.gate for each in evaluate(results, (1, 2)) if each.figure is None] == []


def test_cases_of_layers_name_their_rows_as_the_gates_do(monkeypatch):
    # Tiny sizes through the real cases: each measures ours and FP32, and a memory is an amount and no rate.
    results = Results("avx2", "cpu")
    bench = Bench(results, 1, Effort(rounds=1, calls=1, sample=1e-6, slow_rounds=1))
    torch.set_num_threads(1)
    layers.convolution(bench, 16, 4, batch=2)
    layers.lstm(bench, 16, 3, 2)
    layers.attention(bench, 16, 1, 2, 16)
    layers.attention(bench, 16, 1, 2, 16, dropout=0.1)
    layers.gpt(bench, 1, 64, 16, 2)
    layers.resnet20(bench, 32)
    layers.saved_activations(bench, 1, 64, 16, 2)
    assert {row.case for row in results.rows} == {
        "convolution", "lstm", "attention", "attention, dropout 0.1", "gpt", "resnet20", "saved activations"
    }  # fmt: skip
    assert results.find("saved activations", "linear 1024", "torch fp32", 1).figure == 4.0
    assert 7.0 < 4.0 / results.find("saved activations", "linear 1024", "hbfp4", 1).figure < 8.0
    assert results.find("saved activations", "lstm 512", "hbfp4", 1).figure < 33.0  # four gates and a tanh are 31.25
    assert (
        results.find("convolution", "2x16x4x4", "hbfp4", 1).times_as_fast_as(
            results.find("convolution", "2x16x4x4", "torch fp32", 1)
        )
        > 0
    )


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
