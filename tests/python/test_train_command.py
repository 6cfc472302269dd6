"""`hbfp train` on images, as users meet it: killed at the worst moments, resumed, logged, and mistyped."""

# ruff: noqa: E402, where there is no torch the imports below fail

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from cifar_archives import files, write_archive, write_folder
from nested_state import bits

from hbfp.errors import HBFPError
from hbfp.tools.cli import main
from hbfp.training.loop import Run, read_checkpoint, train
from hbfp.training.plan import Plan
from hbfp.training.scalars import ScalarLog
from hbfp.training.train import ARCHITECTURES, CLASSIFIERS, Settings, Training


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the twenty images of a small CIFAR-10."""
    return write_folder(tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin", files("binary", 10, 20, 4))


# --- from the command line


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_trains_every_network(arch, data, tmp_path, capsys):
    out = tmp_path / "out"
    line = f"train --arch {arch} --data {data} --steps 1 --batch 2 --out {out} --json"
    assert main(line.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["arch"], result["recipe"], result["steps"]) == (arch, "booster", 1)
    assert math.isfinite(result["final_loss"])
    assert 0.9 < result["share_4bit"] < 1  # without the first and the last layer
    assert [steps for steps, _, _ in result["validations"]] == [1]
    content = read_checkpoint(out / "checkpoint.pt")
    assert content["step"] == 1
    assert any(name.endswith("running_var") for name in content["model"])


def test_shows_what_it_found(data, tmp_path, capsys):
    out = tmp_path / "out"
    line = f"train --arch resnet20 --data {data} --epochs 3 --batch 10 --recipe hbfp6 --out {out}"
    assert main(line.split()) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "3 epochs of 2 steps of 10" in captured.err
    assert [line.split()[:3] for line in captured.out.splitlines() if " hbfp6 " in line and "%" in line] == [
        ["2", "1.00", "hbfp6"],
        ["4", "2.00", "hbfp6"],
        ["6", "3.00", "hbfp6"],
    ]
    report = json.loads((out / "report.json").read_text())
    assert len(report["losses"]) == 6
    assert [steps for steps, _, _ in report["validations"]] == [2, 4, 6]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.tmp"))


def test_a_plot_is_not_worth_a_failure(data, tmp_path, capsys, monkeypatch):
    """matplotlib is missed at the end of a run that may have taken a week."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = f"train --arch resnet20 --data {data} --steps 1 --batch 2 --out {tmp_path / 'out'}"
    assert main(line.split()) == 0
    assert "pip install 'hbfp[demo]'" in capsys.readouterr().err


# --- the published runs


@pytest.mark.parametrize(
    ("arch", "epochs", "drops"),
    [("resnet20", 160, (82, 122)), ("resnet50-cifar", 300, (150, 225)), ("densenet40", 300, (150, 225))],
)
def test_defaults_are_those_of_the_published_runs(arch, epochs, drops, data):
    """Epochs counted in other steps than the data's, a drop an epoch off, the wrong epoch boosted."""
    settings = Settings.of({"arch": arch, "data": str(data), "batch": 4})
    assert (settings.epochs, settings.steps, settings.lr, settings.workers) == (epochs, None, 0.1, 1)
    assert Settings.of({"arch": arch, "data": ""}).batch == 128
    plan = Training.start(settings).run.plan
    assert plan.steps == 5 * epochs  # twenty images in batches of four
    assert plan.boosted_steps == 5
    first, second = (5 * drop for drop in drops)
    for step, rate in ((0, 0.1), (first - 1, 0.1), (first, 0.01), (second - 1, 0.01), (second, 0.001)):
        assert plan.rate(step) == rate
    assert (plan.update.momentum, plan.update.weight_decay, plan.update.clip) == (0.9, 1e-4, None)


def test_workers_have_a_batch_each_and_warm_up_for_five_epochs(data):
    settings = Settings.of({"arch": "resnet20", "data": str(data), "batch": 2, "workers": 2})
    training = Training.start(settings)
    assert training.data.size == 4
    plan = training.run.plan
    assert plan.rate(0) == 0.1
    assert 0.1 < plan.rate(24) < plan.rate(25) == plan.rate(409) == 0.2


def test_a_shorter_run_drops_at_the_same_parts(data):
    plan = Training.start(Settings.of({"arch": "resnet20", "data": str(data), "batch": 10, "steps": 80})).run.plan
    assert [plan.rate(step) for step in (40, 41, 60, 61)] == [0.1, 0.01, 0.01, 0.001]
    assert plan.boosted_steps == 8


# --- killed

# Runs `hbfp train` again and again, each time in a fork of its own (an import of torch takes seconds), and kills it: in
# the middle of an optimizer's step, with half a checkpoint written, and with a whole one that is not in its place yet.
KILLED = """
import json, os, shutil, signal, sys
import torch, torch._dynamo, torch.utils.tensorboard
from torch.optim.optimizer import register_optimizer_step_pre_hook
from hbfp.tools.cli import main
from hbfp.training import loop, outcome, progress, scalars, train

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def run(moment, at, threads, line):
    steps = 0

    def in_the_optimizer(optimizer, arguments, keywords):
        nonlocal steps
        steps += 1
        if moment == "optimizer" and steps == at:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].zero_()
            kill()

    def save(content, file, real=torch.save):
        real(content, file)
        if moment == "writing" and content["step"] == at:
            file.truncate(file.tell() // 2)
            file.flush()
            kill()

    def fsync(number, real=os.fsync):
        real(number)
        if moment == "renaming" and steps == at:
            kill()

    torch.set_num_threads(threads)
    register_optimizer_step_pre_hook(in_the_optimizer)
    torch.save, os.fsync = save, fsync
    os._exit(main(line))

for moment, at, threads, line, checkpoint, copy in json.load(sys.stdin):
    child = os.fork()
    if not child:
        run(moment, at, threads, line)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        sys.exit(f"not killed: {moment} {line}")
    shutil.copy(checkpoint, copy)
"""

# By threads: a network with norms, and one that two threads of a busy machine do not spend their time waiting in. Then
# the steps and the kills: when; at which step of its process (its third optimizer step, half done; its second step's
# checkpoint; the checkpoint of step 2); the step of the checkpoint that is left.
KILLS = {
    1: ("--arch resnet20 --batch 4", 7, [("optimizer", 3, 2), ("renaming", 2, 2)]),
    2: ("--arch gpt --batch 4 --layers 1 --width 64 --context 32", 5, [("writing", 2, 0)]),
}


@pytest.fixture(scope="module")
def starts(data, tmp_path_factory):
    """By threads: the command line that begins a run, but for its output."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"line {number}: the quick brown fox\n" for number in range(300)))
    lines = {}
    for threads, (options, steps, _) in KILLS.items():
        source = text if "gpt" in options else data
        lengths = ["--data", str(source), "--steps", str(steps), "--eval-every", "3", "--boosted-steps", "2"]
        lines[threads] = ["train", *options.split(), *lengths]
    return lines


@pytest.fixture(scope="module")
def killed(starts, tmp_path_factory):
    """For each number of threads the folder of a run that was killed, and the options that it goes on with."""
    runs, orders = {}, []
    for threads, (_, _, kills) in KILLS.items():
        out = tmp_path_factory.mktemp(f"threads{threads}")
        often = ["--out", str(out), "--save-every", "2", "--tensorboard", str(out / "log")]
        line = [*starts[threads], *often]
        for number, (moment, at, _) in enumerate(kills):
            checkpoint, copy = str(out / "checkpoint.pt"), str(out / f"after{number}.pt")
            orders.append((moment, at, threads, line, checkpoint, copy))
            line = ["train", "--resume", *often]
        runs[threads] = (out, line)
    script = [sys.executable, "-c", KILLED]
    done = subprocess.run(script, input=json.dumps(orders), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return runs


@pytest.mark.parametrize("threads", KILLS)
def test_killed_and_resumed_runs_end_in_the_same_bits(threads, killed, starts, tmp_path, capsys):
    """SIGKILL at the worst moments leaves the last checkpoint whole, and a run that goes on from it loses nothing; its
    curves in TensorBoard have each step once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.set_num_threads(threads)
    logged = ["--out", str(tmp_path), "--tensorboard", str(tmp_path / "log")]
    assert main([*starts[threads], *logged]) == 0

    out, line = killed[threads]
    _, steps, kills = KILLS[threads]
    for number, (_, _, left) in enumerate(kills):
        assert read_checkpoint(out / f"after{number}.pt")["step"] == left
    assert main(line) == 0
    assert not list(out.glob(".*.tmp")), "what the killed run left half written is gone"

    ours, theirs = (read_checkpoint(folder / "checkpoint.pt") for folder in (out, tmp_path))
    assert ours["step"] == steps
    assert bits(ours) == bits(theirs)

    curves = []
    for folder in (out, tmp_path):
        log = accumulator.EventAccumulator(str(folder / "log"))
        log.Reload()
        names = log.Tags()["scalars"]
        curves.append({name: [(event.step, event.value) for event in log.Scalars(name)] for name in names})
    for curve in curves:
        assert [step for step, _ in curve.pop("train/seconds_per_step")] == list(range(steps))
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]["validation/loss"]] == sorted({*range(2, steps, 3), steps - 1})
    assert [value for _, value in curves[0]["train/boosted"]] == [0.0] * (steps - 2) + [1.0] * 2
    assert set(curves[0]) == {
        "train/loss",
        "train/learning_rate",
        "train/boosted",
        "validation/loss",
        "validation/accuracy",
    }


def test_curves_are_on_disk_before_the_checkpoint(tmp_path):
    """A resumed run does not log the steps before its checkpoint again: those still in memory would be missing."""
    pytest.importorskip("tensorboard")
    model = torch.nn.Linear(2, 2)
    run = Run(model, Plan("fp32", 2), torch.zeros(1, 2))
    batches = SimpleNamespace(batch=lambda seed, step: (torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)))
    path, seen = tmp_path / "checkpoint.pt", []
    with ScalarLog(tmp_path / "log", run) as log:
        flush = log._writer.flush
        log._writer.flush = lambda: (flush(), seen.append(read_checkpoint(path)["step"] if path.exists() else None))
        train(run, batches, path, every=1, settings={}, observers=[log])
    assert seen[:3] == [None, 0, 1]


def test_resumes_from_the_same_data_in_other_packing(data, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["train", "--arch", "resnet20", "--data", str(data), "--steps", "1", "--batch", "2", *out]) == 0
    archive = write_archive(tmp_path / "cifar.tar.gz", "any", files("python", 10, 20, 4))
    assert main(["train", "--resume", "--data", str(archive), *out]) == 0
    other = write_archive(tmp_path / "other.tar.gz", "any", files("python", 10, 20, 3))
    capsys.readouterr()
    assert main(["train", "--resume", "--data", str(other), *out]) == 2
    assert "does not hold the data" in capsys.readouterr().err


# --- mistyped


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--arch resnet20", "which images?"),
        ("--arch resnet20 --data {data} --layers 3", "--layers is no option of --arch resnet20"),
        ("--arch resnet20 --data {data} --sample 3", "--sample is no option of --arch resnet20"),
        ("--arch densenet40 --data {data} --steps 3 --epochs 2", "give one of them"),
        ("--arch densenet40 --data {data} --steps 0", "--steps is at least 1, not 0"),
        ("--arch densenet40 --data {data} --epochs -1", "--epochs is at least 1, not -1"),
        ("--arch resnet20 --data {data} --workers 0", "--workers is at least 1"),
        ("--arch resnet20 --data {data} --eval-every 0", "--eval-every is at least 1"),
        ("--arch resnet20 --data {data} --batch 2 --save-every 0", "--save-every is at least 1"),
        ("--arch resnet20 --data {data} --batch 2 --seed -1", "seed"),
        ("--arch resnet20 --data {data} --batch 2 --lr 0", "learning rate"),
        ("--arch resnet20 --data {data} --batch 2 --steps 3 --boosted-steps 4", "0 to 3 can be boosted, not 4"),
        ("--arch resnet20 --data {data}", "1 to 20 images"),
        ("--arch resnet20 --data {data}/absent", "no "),
        ("--data {data}", "a text file"),
        ("--arch resnet20 --data {data}/test_batch.bin", "neither a folder nor a whole tar archive"),
    ],
)
def test_mistakes_take_one_line(line, named, data, tmp_path, capsys):
    assert main(["train", *line.format(data=data).split(), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(HBFPError, match=r"resnet18.*densenet40"):
        Settings.of({"arch": "resnet18", "data": ""})


def test_help_offers_the_architectures_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "{" + ",".join(ARCHITECTURES) + "}" in capsys.readouterr().out


def test_a_missing_tensorboard_is_named_before_the_first_step(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    line = f"train --arch resnet20 --data {data} --steps 1 --batch 2 --out {tmp_path / 'out'} --tensorboard {tmp_path}"
    assert main([*line.split(), "--json"]) == 2
    assert capsys.readouterr().err == (
        "hbfp train: tensorboard is not installed; get it with: pip install 'hbfp[tensorboard]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_keeps_its_options(data, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    options = ["--arch", "resnet20", "--data", str(data), "--steps", "1", "--batch", "2", "--eval-every", "1"]
    assert main(["train", *options, *out]) == 0
    for changed, named in (
        (["--arch", "gpt"], "started with --arch resnet20"),
        (["--epochs", "3"], "started with no --epochs"),
        (["--eval-every", "2"], "started with --eval-every 1"),
        (["--boosted-steps", "1"], "started with no --boosted-steps"),
    ):
        capsys.readouterr()
        assert main(["train", "--resume", *changed, *out]) == 2
        assert named in capsys.readouterr().err
    assert main(["train", "--resume", *options, *out]) == 0
