"""Training: data that depends on (seed, step) alone, runs that resume to the bit, checkpoints that survive Ctrl-C, and
the demo from the command line to its report."""

# ruff: noqa: E402, where there is no torch the imports below fail

import json
import math
import os
import re
import signal

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nested_state import bits

import hbfp
from hbfp.errors import FileError, HBFPError
from hbfp.tools.cli import main
from hbfp.training.bottleneck import Bottleneck, BottleneckResNet, BottleneckShape
from hbfp.training.data import UNKNOWN, Corpus, Digits, Windows
from hbfp.training.densenet import DenseLayer, DenseNet, DenseNetShape, Transition
from hbfp.training.digits import DigitsClassifier
from hbfp.training.gpt import GPT, GPTShape
from hbfp.training.loop import (
    Run,
    read_checkpoint,
    replacing,
    save_checkpoint,
    train,
)
from hbfp.training.plan import SGD, AdamW, Drops, Plan
from hbfp.training.resnet import Block, ResNet, ResNetShape
from hbfp.training.stopping import Terminated, deferred_interrupt

TEXT = "".join(f"line {number}: the quick brown fox\n" for number in range(200))


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small to share: two threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def windows():
    return Windows(Corpus.of(TEXT, "a text"), size=2, context=16, held_out=4)


def tiny_run(windows, recipe, steps=6, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTShape(len(windows.corpus.vocabulary), layers=1, width=64, context=windows.context))
    return Run(model, Plan(recipe, steps, seed=seed), windows.batch(seed, 0)[0])


# --- data


@pytest.fixture(autouse=True)
def _signals_are_heard():
    """A shell that starts the tests in the background has Ctrl-C ignored, which `deferred_interrupt` respects."""

    def terminate(number, frame):
        raise Terminated  # by default the signal ends the process, which here is pytest

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("make", [lambda windows: windows, lambda windows: Digits.load(8)], ids=["text", "digits"])
def test_batches_are_a_function_of_seed_and_step(make, windows):
    # A generator that remembers would give a resumed run other batches.
    data = make(windows)
    again = make(windows)
    _ = again.batch(3, 0), again.batch(4, 7)
    for seed, step in ((0, 0), (3, 11), (3, 1000)):
        for ours, theirs in zip(data.batch(seed, step), again.batch(seed, step), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(data.batch(0, 0)[0], data.batch(0, 1)[0])
    assert not torch.equal(data.batch(0, 0)[0], data.batch(1, 0)[0])


def test_text_targets_are_the_next_characters(windows):
    inputs, targets = windows.batch(0, 5)
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = windows.corpus.decode([*inputs[0].tolist(), int(targets[0, -1])])
    assert text in TEXT


def test_no_validation_character_is_trained_on():
    # Text whose last tenth is made of characters of its own.
    corpus = Corpus.of("a" * 900 + "b" * 100, "a text")
    windows = Windows(corpus, size=64, context=8)
    b = corpus.encode("b")[0]
    for step in range(20):
        inputs, targets = windows.batch(0, step)
        assert b not in inputs
        assert b not in targets
    assert all((targets == b).all() for _, targets in windows.validation())
    trained = {tuple(row) for row in Digits.load().train[0].tolist()}
    held_out = {tuple(row) for row in Digits.load().held_out[0].tolist()}
    assert len(trained) + len(held_out) == 1797
    assert not trained & held_out


def test_an_epoch_of_digits_shows_each_image_once():
    digits = Digits.load(100)
    rows = torch.cat([digits.batch(0, step)[0] for step in range(digits.steps_per_epoch)])
    assert len({tuple(row) for row in rows.tolist()}) == len(rows) == 1100


def test_rare_characters_become_unknown():
    text = "a" * 250_000 + "é" * 3 + "ü"
    corpus = Corpus.of(text, "a text")
    assert corpus.vocabulary == f"aé{UNKNOWN}"
    assert corpus.decode(corpus.codes[-4:].tolist()) == f"ééé{UNKNOWN}"


def test_library_is_bounded_and_the_same_twice():
    first, second = Corpus.library(50_000), Corpus.library(50_000)
    assert first.sha256 == second.sha256
    assert 25_000 < len(first.codes) <= 50_000
    assert "import" in first.decode(first.codes.tolist())


@pytest.mark.parametrize(
    ("content", "named"), [(None, "cannot read"), (b"", "empty"), (b"too short", "a smaller --context")]
)
def test_unusable_texts_are_refused(content, named, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HBFPError, match=named):
        Windows(Corpus.read(path), size=2, context=16)


# --- models


def test_gpt_does_not_look_ahead(windows):
    model = tiny_run(windows, "fp32").model.eval()
    codes, _ = windows.batch(0, 0)
    changed = codes.clone()
    changed[:, 9:] = 0
    assert torch.equal(model(codes)[:, :9], model(changed)[:, :9])


@pytest.mark.parametrize("sizes", [{"width": 100}, {"width": 0}, {"layers": 0}, {"context": 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(HBFPError):
        GPTShape(10, **sizes)


@pytest.mark.parametrize(
    "sizes", [{"channels": 0}, {"classes": 0}, {"blocks": 0}, {"widths": ()}, {"widths": (0, 8)}, {"widths": (16, 8)}]
)
def test_impossible_residual_networks_are_refused(sizes):
    with pytest.raises(HBFPError, match=next(iter(sizes))):
        ResNetShape(**sizes)


def test_resnet20_is_the_published_network():
    """270 thousand parameters and 40.6 million multiply-accumulates in the paper; a stride or a stage off is others."""
    shape = ResNetShape()
    model = ResNet(shape)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert len(weights) == shape.layers == 20
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 10)
    forward = [row.macs for row in hbfp.audit(model, images).rows if not row.product.endswith("backward")]
    assert sum(forward) == 2 * 40_551_040


def forward_macs(model, images):
    return sum(row.macs for row in hbfp.audit(model, images).rows if not row.product.endswith("backward"))


def test_resnet50_is_the_published_network_with_a_small_stem():
    """23.5 million parameters: those of the large network but for stem and head; a stride elsewhere is other MACs."""
    model = BottleneckResNet(BottleneckShape())
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert model.shape.layers == 50
    assert len(weights) == 50 + 4  # and the convolutions of four shortcuts
    assert sum(parameter.numel() for parameter in model.parameters()) == 23_520_842
    assert forward_macs(model, torch.randn(1, 3, 32, 32)) == 1_297_829_888


def test_densenet40_is_the_published_network():
    """1.0 million parameters in the paper's table 2; a bottleneck, a compression or a wider stem has others."""
    model = DenseNet(DenseNetShape())
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    assert len(weights) == model.shape.layers == 40
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_019_722
    images = torch.randn(1, 3, 32, 32)
    assert model(images).shape == (1, 10)
    assert forward_macs(model, images) == 264_812_928


def test_a_dense_layer_keeps_its_input_and_a_transition_halves_the_sides():
    x = torch.rand(2, 5, 4, 4)
    y = DenseLayer(5, 3)(x)
    assert y.shape == (2, 8, 4, 4)
    assert torch.equal(y[:, :5], x)
    assert Transition(5)(x).shape == (2, 5, 2, 2)


def test_a_bottleneck_adds_its_input_where_sizes_stay():
    x = torch.rand(2, 8, 4, 4)
    block = Bottleneck(8, 2, 1)
    torch.nn.init.zeros_(block.widen_norm.weight)  # the branch adds nothing
    assert torch.equal(block(x), x)
    assert not isinstance(Bottleneck(8, 2, 2).shortcut, torch.nn.Identity)
    assert Bottleneck(8, 4, 2)(x).shape == (2, 16, 2, 2)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        *((BottleneckShape, {name: 0}) for name in ("channels", "classes", "stem")),
        *((BottleneckShape, sizes) for sizes in ({"widths": ()}, {"blocks": (1, 0, 1, 1)}, {"blocks": (1, 1)})),
        *((DenseNetShape, {name: 0}) for name in ("channels", "classes", "stem", "growth", "blocks")),
        (DenseNetShape, {"layers_per_block": 0}),
    ],
)
def test_other_impossible_networks_are_refused(shape, sizes):
    with pytest.raises(HBFPError, match=next(iter(sizes))):
        shape(**sizes)


def test_a_shortcut_keeps_every_second_pixel_and_adds_empty_channels():
    block = Block(2, 5, 2)
    torch.nn.init.zeros_(block.second_norm.weight)  # the branch adds nothing
    x = torch.rand(1, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert y.shape == (1, 5, 3, 3)
    assert not y[:, 2:].any()


def test_the_classifier_reads_images_row_by_row():
    # Pixels taken as channels, or columns for rows, would train as well on shuffled pixels.
    model = DigitsClassifier((4,)).eval()
    pixels = torch.rand(3, 64)
    assert torch.equal(model(pixels), model.network(torch.stack([row.view(8, 8) for row in pixels])[:, None]))


# --- the loop


def test_learning_rate_warms_up_and_ends_at_a_tenth():
    plan = Plan("fp32", 200, learning_rate=1.0)
    rates = [plan.rate(step) for step in range(200)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.101


def test_learning_rate_climbs_to_that_of_all_workers_and_drops_to_a_tenth_twice():
    plan = Plan("fp32", 160, learning_rate=0.4, schedule=Drops((82, 122), warmup=5, start=0.1))
    rates = [plan.rate(step) for step in range(160)]
    assert rates[0] == 0.1
    assert rates[:6] == sorted(set(rates[:6]))
    assert set(rates[5:82]) == {0.4}
    assert set(rates[82:122]) == {0.04}
    assert set(rates[122:]) == {0.004}


def test_weights_decay_and_norms_and_biases_do_not():
    model = ResNet(ResNetShape(widths=(4,), blocks=1))
    for update, decay in ((SGD(), 1e-4), (AdamW(), 0.01)):
        decays = {
            id(parameter): group["weight_decay"]
            for group in update.optimizer(model, 0.1).param_groups
            for parameter in group["params"]
        }
        assert len(decays) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            assert decays[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else decay)
    (group, _) = SGD().optimizer(model, 0.1).param_groups
    assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, 0.1)


@pytest.mark.parametrize("recipe", ["fp32", "booster"])
def test_a_run_is_the_loop_that_it_says_it_is(recipe, windows):
    """AdamW, clipped gradients, a cosine and the last tenth boosted, written out; anything else is other bits."""
    steps = 12
    run = tiny_run(windows, recipe, steps)
    for step in range(steps):
        run.advance(windows.batch(0, step))

    model = tiny_run(windows, "fp32", steps).model
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    if recipe == "booster":
        hbfp.convert_(model, "booster", example_inputs=(windows.batch(0, 0)[0],), seed=0)
        booster = hbfp.Booster(model, total_steps=steps, last_fraction=0.1)
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    if recipe == "booster":
        hbfp.wide_weights(optimizer, model)
    losses = []
    for step in range(steps):
        if recipe == "booster":
            booster.step(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if step == 0 else 1e-3 * (0.55 + 0.45 * math.cos(math.pi * ((step - 1) / (steps - 1))))
        inputs, targets = windows.batch(0, step)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert run.losses == losses
    assert bits(run.model.state_dict()) == bits(model.state_dict())


@pytest.mark.parametrize(
    "bad",
    [
        {"recipe": "hbfp3"},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"seed": -1},
        {"seed": 2**64},
        {"boosted": -1},
        {"boosted": 2},
    ],
)
def test_impossible_plans_are_refused(bad):
    with pytest.raises(HBFPError):
        Plan(**{"recipe": "fp32", "steps": 1, **bad})


@pytest.mark.parametrize("recipe", ["fp32", "hbfp4", "booster"])
def test_cut_and_resumed_run_equals_the_uncut_one(recipe, windows, tmp_path):
    # Hunts state outside of the checkpoint: generators, counters, the optimizer's moments, Booster's phase.
    whole = tiny_run(windows, recipe)
    train(whole, windows, tmp_path / "whole.pt", every=100, settings={})

    first = tiny_run(windows, recipe)
    for _ in range(4):
        first.advance(windows.batch(0, first.step))
    save_checkpoint(tmp_path / "part.pt", first, {})
    torch.rand(7)
    second = tiny_run(windows, recipe)
    second.load_state_dict(read_checkpoint(tmp_path / "part.pt"))
    train(second, windows, tmp_path / "resumed.pt", every=100, settings={})

    assert second.step == whole.step == 6
    assert bits(second.state_dict()) == bits(whole.state_dict())


class Noise:
    """Images of 8 × 8 pixels and classes, all of them random."""

    def batch(self, seed, step):
        random = np.random.default_rng((seed, step))
        images = torch.from_numpy(random.standard_normal((4, 3, 8, 8)).astype(np.float32))
        return images, torch.from_numpy(random.integers(3, size=4))

    def validation(self):
        return [self.batch(0, 1000), self.batch(0, 1001)]


NETWORKS = {
    "resnet": lambda: ResNet(ResNetShape(classes=3, widths=(4, 8), blocks=1)),
    "bottleneck": lambda: BottleneckResNet(BottleneckShape(classes=3, stem=4, widths=(2, 4), blocks=(1, 1))),
    "densenet": lambda: DenseNet(DenseNetShape(classes=3, stem=4, growth=3, blocks=2, layers_per_block=2)),
    "gpt": lambda: GPT(GPTShape(90, layers=1, width=64, context=16)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_cut_at_every_step_equals_the_uncut_one(name, threads, windows, tmp_path):
    """Hunts state outside of the checkpoint: the norms' buffers, momentum, phase, random streams, a validation that
    was due, and a thread's share of the work."""
    torch.set_num_threads(threads)
    steps = 5

    def start():
        torch.manual_seed(0)
        update, schedule = SGD(), Drops((3,), warmup=2, start=0.01)
        plan = Plan("booster", steps, 0.05, boosted=2, update=update, schedule=schedule)
        return Run(NETWORKS[name](), plan, data.batch(0, 0)[0])

    data = windows if name == "gpt" else Noise()
    whole = start()
    train(whole, data, tmp_path / "whole.pt", every=100, settings={}, validate_every=2)

    path = tmp_path / "parts.pt"
    for last in range(1, steps + 1):
        part = start()
        if last > 1:
            part.load_state_dict(read_checkpoint(path))
        torch.rand(last)
        if last < steps:
            with pytest.raises(KeyboardInterrupt):
                train(part, Interrupting(data, last), path, every=100, settings={}, validate_every=2)
        else:
            train(part, data, path, every=100, settings={}, validate_every=2)
        assert part.step == last
    assert [step for step, _, _ in whole.validations] == [2, 4, 5]
    assert bits(read_checkpoint(path)) == bits(read_checkpoint(tmp_path / "whole.pt"))


def test_a_validation_that_was_interrupted_is_done_after_resumption(windows, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run = tiny_run(windows, "fp32")

    class Stopping(Interrupting):
        def validation(self):
            yield from self.windows.validation()
            signal.raise_signal(signal.SIGINT)
            yield from self.windows.validation()

    with pytest.raises(KeyboardInterrupt):
        train(run, Stopping(windows, 100), path, every=100, settings={}, validate_every=4)
    assert read_checkpoint(path)["step"] == 4
    assert read_checkpoint(path)["validations"] == []
    resumed = tiny_run(windows, "fp32")
    resumed.load_state_dict(read_checkpoint(path))
    train(resumed, windows, path, every=100, settings={}, validate_every=4)
    assert [step for step, _, _ in resumed.validations] == [4, 6]


def test_there_is_a_checkpoint_from_before_the_first_step(windows, tmp_path):
    """A run killed early must resume, too."""
    path = tmp_path / "checkpoint.pt"

    class Killed(Interrupting):
        def batch(self, seed, step):
            assert read_checkpoint(path)["step"] == 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny_run(windows, "fp32"), Killed(windows, 0), path, every=100, settings={})


@pytest.mark.parametrize("recipe", ["fp32", "hbfp4"])
def test_the_loss_falls(recipe):
    digits = Digits.load()
    torch.manual_seed(0)
    run = Run(DigitsClassifier((16, 32)), Plan(recipe, 60, learning_rate=5e-3), digits.batch(0, 0)[0])
    before = run.evaluate(digits.validation())
    for step in range(60):
        run.advance(digits.batch(0, step))
    after = run.evaluate(digits.validation())
    assert after.loss < before.loss / 2
    assert after.accuracy > 0.8


def test_a_loss_that_is_not_finite_ends_the_run(windows):
    run = tiny_run(windows, "fp32")
    with torch.no_grad():
        run.model.norm.weight.fill_(math.inf)
    with pytest.raises(HBFPError, match="learning rate"):
        run.advance(windows.batch(0, 0))


# --- checkpoints and Ctrl-C


class Interrupting:
    """Data that stops the run, as Ctrl-C would between two steps."""

    def __init__(self, windows, at):
        self.windows, self.at = windows, at

    def batch(self, seed, step):
        if step == self.at:
            raise KeyboardInterrupt
        return self.windows.batch(seed, step)

    def validation(self):
        return self.windows.validation()


def test_interrupt_leaves_a_checkpoint_that_resumes(windows, tmp_path):
    run = tiny_run(windows, "fp32")
    with pytest.raises(KeyboardInterrupt):
        train(run, Interrupting(windows, at=3), tmp_path / "checkpoint.pt", every=100, settings={"kept": True})
    content = read_checkpoint(tmp_path / "checkpoint.pt")
    assert content["step"] == 3
    assert content["settings"] == {"kept": True}
    resumed = tiny_run(windows, "fp32")
    resumed.load_state_dict(content)
    train(resumed, windows, tmp_path / "checkpoint.pt", every=100, settings={})
    whole = tiny_run(windows, "fp32")
    train(whole, windows, tmp_path / "whole.pt", every=100, settings={})
    assert bits(resumed.state_dict()) == bits(whole.state_dict())


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["Ctrl-C", "SIGTERM"]
)
def test_first_signal_waits_for_the_step(number, raised, windows, tmp_path):
    # A signal in the middle of the optimizer would leave half of the weights a step behind.
    run = tiny_run(windows, "fp32")
    run.optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), number) if run.step == 2 else None)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stop:
        train(run, windows, tmp_path / "checkpoint.pt", every=100, settings={})
    assert stop.type is raised
    assert signal.getsignal(number) is before
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_a_forward_that_was_interrupted_leaves_no_trace(tmp_path):
    """Norms count a batch in the forward pass: the step that a second Ctrl-C broke off would count twice."""
    digits, path = Digits.load(), tmp_path / "checkpoint.pt"

    def run():
        torch.manual_seed(0)
        return Run(DigitsClassifier((8,)), Plan("fp32", 4), digits.batch(0, 0)[0])

    def interrupt(*_):
        if broken.step == 2:
            raise KeyboardInterrupt

    broken = run()
    broken.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(broken, digits, path, every=100, settings={})
    resumed, whole = run(), run()
    resumed.load_state_dict(read_checkpoint(path))
    assert resumed.step == 2
    train(resumed, digits, path, every=100, settings={})
    train(whole, digits, tmp_path / "whole.pt", every=100, settings={})
    assert bits(read_checkpoint(path)) == bits(read_checkpoint(tmp_path / "whole.pt"))


def test_half_a_step_is_not_saved(windows, tmp_path):
    run = tiny_run(windows, "fp32")

    def interrupt(*_):
        if run.step == 2:
            raise KeyboardInterrupt

    run.optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(run, windows, tmp_path / "checkpoint.pt", every=1, settings={})
    assert run.torn
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_second_signal_is_raised_at_once(number):
    """Of whichever kind: torchrun passes Ctrl-C on as SIGTERM to workers that the terminal has told already."""
    with deferred_interrupt() as interrupted:
        assert interrupted() == 0
        signal.raise_signal(number)
        assert interrupted() == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_was_ignored_stays_ignored():
    """`nohup` and `&` have Ctrl-C ignored; SIGTERM must be heard all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted() == 0
        signal.raise_signal(signal.SIGTERM)
        assert interrupted() == signal.SIGTERM


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as file:
        file.write(b"old")

    def fail():
        with replacing(path) as file:
            file.write(b"new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "noise", "other"])
def test_other_files_are_no_checkpoints(content, tmp_path):
    path = tmp_path / "file"
    if content is None:
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(FileError):
        read_checkpoint(path)
    with pytest.raises(FileError, match="no checkpoint"):
        read_checkpoint(tmp_path / "absent")


# --- hbfp train


@pytest.fixture
def small(tmp_path):
    """Options of a run that takes a second."""
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    options = f"--steps 4 --batch 2 --layers 1 --width 64 --context 16 --recipe hbfp4 --data {data}"
    return options.split()


def test_train_from_the_command_line(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", *small, "--out", str(out), "--sample", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 4
    assert math.isfinite(result["final_loss"])
    assert 0 <= result["accuracy"] <= 1
    assert len(result["sample"]) == 10
    assert read_checkpoint(out / "checkpoint.pt")["settings"]["recipe"] == "hbfp4"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_train_stopped_and_resumed(number, code, small, tmp_path, capsys, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *small, "--out", str(whole)]) == 0
    batch = Windows.batch

    def stopping(self, seed, step):
        if step == 2:
            signal.raise_signal(number)
        return batch(self, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "batch", stopping)
        assert main(["train", *small, "--out", str(parts)]) == code
    told = capsys.readouterr().err
    assert "stopped after 3 of 4 steps, saved" in told
    assert f"hbfp train --resume --out {parts}" in told
    assert main(["train", "--resume", "--out", str(parts)]) == 0
    ours, theirs = (read_checkpoint(folder / "checkpoint.pt") for folder in (parts, whole))
    assert bits(ours) == bits(theirs)


def test_train_refuses_what_would_be_another_run(small, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["train", *out]) == 2
    assert "--data" in capsys.readouterr().err
    assert main(["train", "--resume", *out]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert main(["train", *small, *out]) == 0
    capsys.readouterr()
    assert main(["train", *small, *out]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--lr", "0.5", *out]) == 2
    assert "--lr" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    assert main(["train", "--resume", "--data", str(other), *out]) == 2
    assert "does not hold the data" in capsys.readouterr().err


# --- hbfp demo


def test_demo_writes_its_report(tmp_path, capsys):
    assert main(["demo", "--quick", "--steps", "6", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert all(name in captured.out for name in ("fp32", "hbfp4", "hbfp6", "booster", "report.html"))
    assert "step 6/6" in captured.err
    assert "\x1b" not in captured.out + captured.err

    report = json.loads((tmp_path / "report.json").read_text())
    assert [task["task"] for task in report["tasks"]] == ["digits", "text"]
    for task in report["tasks"]:
        runs = {run["name"]: run for run in task["runs"]}
        assert list(runs) == ["fp32", "hbfp4", "hbfp6", "booster"]
        for run in runs.values():
            assert len(run["losses"]) == 6
            assert all(map(math.isfinite, [run["final_loss"], *run["losses"]]))
            assert 0 <= run["accuracy"] <= 1
            assert run["seconds_per_step"] > 0
        # The runs start from the same weights and see the same batch: only rounding tells their first losses apart.
        first = [run["losses"][0] for run in runs.values()]
        assert np.ptp(first) < 0.1
        assert (runs["fp32"]["share_4bit"], runs["hbfp4"]["share_4bit"], runs["hbfp6"]["share_4bit"]) == (0, 1, 0)
        # Booster: 6 bits in the first and last layer, and, in the last of six steps, everywhere.
        assert 0 < runs["booster"]["share_4bit"] < runs["booster"]["share_4bit_paper"] < 1
        assert task["packed"]["logits_identical"] is True
        assert task["packed"]["file_bytes"] == runs["hbfp4"]["file_bytes"]
        assert task["packed"]["file_bytes"] < task["packed"]["fp32_bytes"] / 3
        assert all(run["logits_identical"] for name, run in runs.items() if name != "fp32")

    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    # Self-contained: nothing is fetched (namespaces are names, not addresses that are read).
    fetched = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)([^"']*)|url\((?!#)([^)]*)\)|@import""", page)
    assert fetched == []
    assert not list(tmp_path.glob("**/*.tmp"))


def test_demo_runs_one_task(tmp_path, capsys):
    assert main(["demo", "--task", "digits", "--quick", "--steps", "4", "--out", str(tmp_path), "--json"]) == 0
    assert [task["task"] for task in json.loads(capsys.readouterr().out)["tasks"]] == ["digits"]
