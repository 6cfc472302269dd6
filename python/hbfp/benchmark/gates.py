"""The table of figures to reach: what must be and what would be better, per level, and how each is read off the rows.

A gate is passed, stretched (passed, and the better figure too), missed, reported (this level has no bar), not run (with
the reason) or not measured (the run was not asked to). With several threads the bars of ratios are 15 % lower.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from hbfp.benchmark import ceilings
from hbfp.benchmark.cases import BATCHES, EMPTY, FAR_APART, ORIENTATIONS
from hbfp.benchmark.results import NotMeasured, NotRun, Results

__all__ = ["GATES", "QUICK_FLOOR", "Gate", "Outcome", "Verdict", "evaluate", "quick_failure"]

LOOSER = 0.85
"""What of a bar is asked of more than one thread."""

QUICK_FLOOR = 2.0
"""`--quick` fails where HBFP4's packed product is not so many times as fast as torch's FP32: what is left after any
noise that a shared machine has shown."""

Figure = Callable[[Results, int], float]
"""A figure at a number of threads. Raises NotRun."""

Bars = Mapping[str, tuple[float, float]]
"""Level -> must, stretch. A level that is missing has no bar."""


class Outcome(Enum):
    """What became of a gate."""

    PASS = "pass"
    STRETCH = "pass, stretch"
    MISS = "MISS"
    REPORT = "no bar"
    NOT_RUN = "not run"
    LEFT_OUT = "not measured"


@dataclass(frozen=True, slots=True)
class Gate:
    """One line of the table."""

    name: str
    figure: Figure
    bars: Bars
    form: str = "{:.2f}"
    at_most: bool = False
    """The bars are upper bounds."""
    threads: str = "any"
    """any; "one": a figure of one core; "several": of more than one."""
    loosened: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """A gate at a number of threads."""

    gate: str
    threads: int
    outcome: Outcome
    figure: float | None
    must: float | None
    stretch: float | None
    reason: str
    form: str


def evaluate(results: Results, threads: Sequence[int], gates: "Sequence[Gate] | None" = None) -> list[Verdict]:
    """All gates at all numbers of threads that they are about, in the table's order."""
    return [
        _verdict(gate, results, count)
        for gate in (GATES if gates is None else gates)
        for count in threads
        if gate.threads == "any" or (gate.threads == "one") == (count == 1)
    ]


def _verdict(gate: Gate, results: Results, threads: int) -> Verdict:
    must, stretch = gate.bars.get(results.level, (None, None))
    if gate.loosened and threads > 1 and must is not None and stretch is not None:
        must, stretch = LOOSER * must, LOOSER * stretch
    try:
        figure = gate.figure(results, threads)
    except NotRun as reason:
        outcome = Outcome.LEFT_OUT if isinstance(reason, NotMeasured) else Outcome.NOT_RUN
        return Verdict(gate.name, threads, outcome, None, must, stretch, str(reason), gate.form)
    if must is None or stretch is None:
        return Verdict(gate.name, threads, Outcome.REPORT, figure, None, None, "", gate.form)
    sign = -1 if gate.at_most else 1
    if not sign * figure >= sign * must:  # a figure that is no number misses
        outcome = Outcome.MISS
    else:
        outcome = Outcome.STRETCH if sign * figure >= sign * stretch else Outcome.PASS
    return Verdict(gate.name, threads, outcome, figure, must, stretch, "", gate.form)


def quick_failure(results: Results) -> str | None:
    """Why the quick run fails, or None: the floor asks nothing of the scalar level, nor where it was not measured."""
    if results.level == "scalar":
        return None
    try:
        figure = ratio("packed", _CUBE, "hbfp4b64", "torch fp32")(results, 1)
    except NotRun:
        return None
    if figure >= QUICK_FLOOR:
        return None
    return f"HBFP4, packed, {_CUBE}, one thread: {figure:.2f} times torch's FP32, at least {QUICK_FLOOR} expected"


# --- ways to read a figure -------------------------------------------------------------------------------------------


def ratio(case: str, shape: str, own: str, *others: str) -> Figure:
    """Times as fast as the fastest of the others that ran."""

    def figure(results: Results, threads: int) -> float:
        row = results.find(case, shape, own, threads)
        found: list[float] = []
        reasons: list[NotRun] = []
        for other in others:
            try:
                found.append(row.times_as_fast_as(results.find(case, shape, other, threads)))
            except NotRun as reason:
                reasons.append(reason)
        if not found:
            raise reasons[0]
        return min(found)

    return figure


def share(case: str, shape: str, own: str, ceiling: str) -> Figure:
    """Percent of a ceiling on the same number of threads."""

    def figure(results: Results, threads: int) -> float:
        # The best ever seen: a ceiling that was disturbed is none.
        top = results.find(ceilings.CASE, "", ceiling, threads).best
        return 100 * results.find(case, shape, own, threads).figure / top

    return figure


def slowest(case: str, shape: str, contestants: Sequence[str]) -> Figure:
    """The lowest rate of several contestants, all of which must have run."""

    def figure(results: Results, threads: int) -> float:
        return min(results.find(case, shape, name, threads).figure for name in contestants)

    return figure


def speed_up(case: str, shape: str, own: str) -> Figure:
    """Times as fast as on one thread."""

    def figure(results: Results, threads: int) -> float:
        one = results.find(case, shape, own, 1)
        return results.find(case, shape, own, threads).times_as_fast_as(one)

    return figure


def above(case: str, shape: str, own: str, baseline: str) -> Figure:
    """Time beyond that of another row, in the rows' unit."""

    def figure(results: Results, threads: int) -> float:
        return results.find(case, shape, own, threads).figure - results.find(case, shape, baseline, threads).figure

    return figure


def fraction(case: str, shape: str, own: str, other: str) -> Figure:
    """What of another row's amount."""

    def figure(results: Results, threads: int) -> float:
        return results.find(case, shape, own, threads).figure / results.find(case, shape, other, threads).figure

    return figure


# --- the table -------------------------------------------------------------------------------------------------------

_LEVELS = ("scalar", "avx2", "avx512vnni", "amx")

_CUBE = "1024x1024x1024"
_WIDE = "256x4096x4096"
_ROWS = "32x4096x4096"
_ROW = "1x4096x4096"
_H4 = "hbfp4b64"
_FP32, _BF16, _INT8 = "torch fp32", "torch bf16", "torch int8 dynamic"
_FP32_TOGETHER = f"{_FP32}, channels last"
_GGML = ("ggml Q4_0", "ggml Q4_0 repacked")


def _bars(avx2: tuple[float, float] | None = None, vnni: tuple[float, float] | None = None) -> Bars:
    levels = {"avx2": avx2, "avx512vnni": vnni, "amx": vnni}
    return {level: bars for level, bars in levels.items() if bars is not None}


def _packed(label: str, own: str, avx2: tuple[float, float], vnni: tuple[float, float] | None) -> Gate:
    return Gate(f"packed product {label} / FP32", ratio("packed", _CUBE, own, _FP32), _bars(avx2, vnni))


def _share_of_peak(label: str, own: str, vnni: tuple[float, float]) -> Gate:
    figure = share("packed", _CUBE, own, ceilings.PEAK)
    # A matrix unit's peak is far above what can leave it: there the share is told, and has no bar.
    bars = {level: bar for level, bar in _bars(None, vnni).items() if level != "amx"}
    return Gate(f"packed product {label}, share of multiply-add peak", figure, bars, "{:.0f} %")


def _forward(shape: str) -> list[Gate]:
    def gate(name: str, bars: Bars, *others: str) -> Gate:
        return Gate(f"forward {shape} / {name}", ratio("forward", shape, _H4, *others), bars)

    return [
        gate("FP32", _bars((2.8, 3.2), (4.0, 4.7)), _FP32),
        gate("bf16", _bars(None, (1.7, 2.0)), _BF16),
        gate("dynamic int8", _bars((1.5, 1.75), (1.05, 1.18)), _INT8),
        gate("ggml Q4_0", _bars((2.3, 2.8)), *_GGML),
    ]


def _encoder(rounding: str, avx2: tuple[float, float], vnni: tuple[float, float]) -> Gate:
    names = [f"{orientation}, {rounding}" for orientation in ORIENTATIONS]
    label = f"encode in L3, {rounding}, slowest orientation, Gelem/s"
    return Gate(label, slowest("encode", "1024x1024", names), _bars(avx2, vnni), threads="one")


def _overhead(own: str, *, barred: bool = True) -> Gate:
    label = f"overhead of {own}, µs"
    # Through torch, without a graph: what autograd adds is torch's own, and what numpy's views cost is not a layer's.
    bars = dict.fromkeys(_LEVELS if barred else (), (10.0, 5.0))
    figure = above("overhead", "8x64x64", own, EMPTY)
    return Gate(label, figure, bars, "{:.1f}", at_most=True, threads="one")


def _speed_up(size: int) -> Gate:
    figure = speed_up("scaling", f"{size}x{size}x{size}", _H4)
    bars = _bars((1.8, 1.95), (1.8, 1.95))
    return Gate(f"packed product {size}³, times as fast as one thread", figure, bars, threads="several", loosened=False)


def _layer(
    label: str, case: str, shape: str, avx2: tuple[float, float] | None, vnni: tuple[float, float] | None
) -> Gate:
    figure = ratio(case, shape, "hbfp4", _FP32)
    # These bars are those of two threads.
    return Gate(f"{label} / FP32", figure, _bars(avx2, vnni), loosened=False)


def _memory(label: str, case: str, shape: str, bar: tuple[float, float] | None = None) -> Gate:
    figure = fraction(case, shape, "hbfp4", _FP32)
    bars = {} if bar is None else dict.fromkeys(_LEVELS, bar)
    return Gate(label, figure, bars, at_most=True, loosened=False)


def _everywhere(must: float, stretch: float) -> Bars:
    return dict.fromkeys(("scalar", "avx2", "avx512vnni"), (must, stretch))


def _seconds(case: str, shape: str, own: str) -> Figure:
    return lambda results, threads: results.find(case, shape, own, threads).seconds


def _inference() -> list[Gate]:
    frozen = "hbfp4, frozen"
    bars = {1: _bars((10, 14), (20, 28)), 16: _bars((4.0, 4.5), (6, 9))}
    gates = []
    for m in (1, 4, 16):
        shape = f"{m}x4096x4096"
        for name in (frozen, f"{frozen}, compiled"):
            label = f"{name}, linear {shape}"
            gates.append(Gate(f"{label} / FP32", ratio("frozen linear", shape, name, _FP32), bars.get(m, _bars())))
            figure = ratio("frozen linear", shape, name, _INT8)
            gates.append(Gate(f"{label} / dynamic int8", figure, _bars((2, 2.7), (2, 2.8)) if m == 1 else _bars()))
    # No bars where it comes out even: one image on two threads, and eight at level avx2.
    for batch, both in ((1, None), (8, (1.0, 1.5))):
        figure = ratio("frozen resnet20", f"{batch}x3x32x32", frozen, _FP32, _FP32_TOGETHER)
        label = f"{frozen}, ResNet20, batch {batch} / FP32, the faster layout"
        gates.append(Gate(label, figure, _bars(None, both), loosened=False))
    for name in ("demo", "100 M"):
        figure = ratio("generation", name, frozen, _FP32)
        gates.append(Gate(f"tokens per second, {name} GPT / FP32", figure, _bars((3, 4), (3, 4)), loosened=False))
    bars_of_time = _everywhere(0.2, 0.1)
    for name in ("load_model", "load_model and layout"):
        label, figure = f"{name}, 500 MB, s", _seconds("loading", "500 MB", name)
        gates.append(Gate(label, figure, bars_of_time, "{:.3f}", at_most=True, loosened=False))
    peak = fraction("loading", "500 MB", "peak memory", "file")
    gates.append(
        Gate("peak memory of loading, of the file", peak, _everywhere(1.1, 1.03), at_most=True, loosened=False)
    )
    return gates


GATES: tuple[Gate, ...] = (
    _packed("HBFP4", _H4, (3.0, 3.3), (4.2, 4.8)),
    _packed("HBFP6", "hbfp6b64", (2.8, 3.1), (4.2, 4.8)),
    _packed("HBFP8", "hbfp8b64", (1.5, 1.7), (4.2, 4.8)),
    _packed("HBFP4, B = 32", "hbfp4b32", (2.5, 2.9), None),
    _packed("HBFP4, B = 16", "hbfp4b16", (2.0, 2.35), None),
    Gate("packed product HBFP4, exponents far apart / FP32", ratio("packed", _CUBE + FAR_APART, _H4, _FP32), {}),
    _share_of_peak("HBFP4", _H4, (88, 96)),
    _share_of_peak("HBFP6", "hbfp6b64", (88, 96)),
    _share_of_peak("HBFP8", "hbfp8b64", (88, 96)),
    _share_of_peak("HBFP4, B = 32", "hbfp4b32", (80, 92)),
    _share_of_peak("HBFP4, B = 16", "hbfp4b16", (70, 79)),
    *_forward(_CUBE),
    *_forward(_WIDE),
    Gate(f"few rows {_ROWS} / FP32", ratio("few rows", _ROWS, _H4, _FP32), _bars((4.0, 4.5), (6, 9))),
    Gate(f"few rows {_ROWS} / ggml Q4_0", ratio("few rows", _ROWS, _H4, *_GGML), _bars((2.3, 2.8))),
    Gate(f"one row {_ROW}, warm / FP32", ratio("few rows", _ROW, _H4, _FP32), _bars((10, 14), (20, 28))),
    Gate(f"one row {_ROW}, warm / dynamic int8", ratio("few rows", _ROW, _H4, _INT8), _bars((2, 2.7), (2, 2.8))),
    Gate(f"one row {_ROW}, warm / ggml Q4_0", ratio("few rows", _ROW, _H4, *_GGML), _bars((2, 2.7))),
    Gate(
        f"one row {_ROW}, cold, share of memory's rate",
        share("cold row", _ROW, _H4, ceilings.DRAM),
        _bars((70, 80), (80, 92)),
        "{:.0f} %",
    ),
    *(
        Gate(f"batch of products {shape} / FP32", ratio("batched", shape, _H4, _FP32), _bars(None, (1.0, 1.5)))
        for shape in (f"{matrices} of {m}x{n}x{k}" for matrices, m, n, k in BATCHES)
    ),
    _encoder("nearest_even", (4, 5.5), (5, 6.8)),
    _encoder("stochastic", (1.6, 2.0), (2.3, 3.0)),
    *(
        gate
        for shape, fp32, bf16 in (
            (_CUBE, _bars((2.2, 2.6), (2.8, 3.4)), _bars(None, (1.3, 1.5))),
            (_WIDE, _bars(), _bars()),
        )
        for gate in (
            Gate(f"training step {shape} / FP32", ratio("training step", shape, "hbfp4", _FP32), fp32),
            Gate(
                f"training step {shape} / bf16 autocast",
                ratio("training step", shape, "hbfp4", "torch bf16 autocast"),
                bf16,
            ),
        )
    ),
    _speed_up(1024),
    _speed_up(2048),
    _overhead("hbfp.linear", barred=False),
    _overhead("hbfp.nn.functional.linear"),
    _overhead("converted Linear, no grad"),
    _overhead("converted Linear, grad", barred=False),
    _layer("GPT step, 6 layers of 384", "gpt", "6x384, 12x256", (1.6, 2.1), (2.0, 2.8)),
    Gate(
        "GPT step, 6 layers of 384 / bf16 autocast",
        ratio("gpt", "6x384, 12x256", "hbfp4", "torch bf16 autocast"),
        _bars(None, (1.1, 1.4)),
        loosened=False,
    ),
    *(
        _layer(
            f"3x3 convolution {channels} at {pixels}², forward and backward",
            "convolution",
            f"32x{channels}x{pixels}x{pixels}",
            (1.5, 2.2),
            (2.0, 3.0),
        )
        for channels, pixels in ((64, 56), (128, 28), (256, 14))
    ),
    # No bars: in depthwise 3 x 3 ones an element meets nine others, and is encoded three times.
    _layer(
        "depthwise 3x3 convolution, 128 at 28², forward and backward",
        "grouped convolution",
        "32x128x28x28, 128 groups of 3x3",
        None,
        None,
    ),
    _layer(
        "depthwise 7x7 convolution, 96 at 56², forward and backward",
        "grouped convolution",
        "8x96x56x56, 96 groups of 7x7",
        None,
        (1.0, 1.5),
    ),
    *(
        _layer(
            f"3x3 convolution 128 at 28² in {groups} groups, forward and backward",
            "grouped convolution",
            f"32x128x28x28, {groups} groups of 3x3",
            None,
            (1.0, 1.5),
        )
        for groups in (32, 16)
    ),
    _layer("ResNet20 step", "resnet20", "128x3x32x32", (1.1, 1.5), (1.3, 1.8)),
    _layer("causal attention, context 512", "attention", "4x8x512x64", (1.0, 1.5), (1.0, 1.5)),
    _layer("causal attention, context 2048", "attention", "4x8x2048x64", (1.0, 1.5), (1.0, 1.5)),
    *(
        _layer(
            f"causal attention, dropout 0.1, context {context}",
            "attention, dropout 0.1",
            f"4x8x{context}x64",
            (4.0, 6.0),
            (4.0, 6.0),
        )
        for context in (512, 2048)
    ),
    _layer("LSTM 512, 100 steps", "lstm", "100x32x512", (1.0, 1.5), (1.0, 1.5)),
    _memory("peak memory of attention, context 2048, of FP32's", "peak memory", "attention 2048", (1.0, 0.9)),
    _memory(
        "peak memory of attention, dropout 0.1, context 2048, of FP32's",
        "peak memory",
        "attention 2048, dropout 0.1",
        (0.1, 0.05),
    ),
    _memory("peak memory of a GPT step, of FP32's", "peak memory", "gpt"),
    _memory("saved activations of a linear layer, of FP32's", "saved activations", "linear 1024", (1 / 7, 1 / 7.5)),
    _memory("saved activations of a GPT, of FP32's", "saved activations", "gpt"),
    *_inference(),
)
