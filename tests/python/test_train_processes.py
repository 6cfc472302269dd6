"""`hbfp train` in several processes: one model in all of them, stopped together, resumed to the bit.

The bugs these hunt: replicas that drift apart, processes that train on the same rows, a sum of gradients for a mean or
one whose order depends on where the run was cut, a process that waits for one that has stopped, two that write.
"""

# ruff: noqa: E402, where there is no torch the imports below fail

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from cifar_archives import files, write_folder
from nested_state import bits

import hbfp
from hbfp.errors import HBFPError
from hbfp.tools.cli import main
from hbfp.training.loop import read_checkpoint
from hbfp.training.train import Settings, Training

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.timeout(900),  # the first test waits for eight launches
]

# Each run is forked (an import of torch takes seconds) into its processes, with what torchrun sets for them. The last
# may send itself a signal when it asks for a batch. Leaves what each process has in the end beside --out.
LAUNCHED = """
import json, os, signal, sys, time
import torch, torch._dynamo, torch.distributed
from hbfp.tools.cli import main
from hbfp.training import data, images, loop, outcome, progress, train

def run(line, rank, count, number, at):
    def told(batch):
        def asked(self, seed, step):
            if step == at and rank == count - 1:
                os.kill(os.getpid(), number)
            return batch(self, seed, step)
        return asked

    def kept(run, *arguments, real=loop.train, **keywords):
        real(run, *arguments, **keywords)
        torch.save([run.step, run.losses, *run.model.parameters()], f"{line[line.index('--out') + 1]}.{rank}.pt")

    for kind in (data.Windows, images.Images):
        kind.batch = told(kind.batch)
    loop.train = kept
    torch.set_num_threads(1)
    return main(line)

found = []
for line, count, number, at in json.load(sys.stdin):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(count):
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            }
            code = 99
            try:
                code = run(line, rank, count, number, at)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    found.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    del store
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"line {number}: the quick brown fox\n" for number in range(300)))
    cifar = write_folder(tmp_path_factory.mktemp("cifar") / "cifar-10-batches-bin", files("binary", 10, 20, 4))
    small = "--batch 2 --layers 1 --width 64 --context 16"
    return {
        "images": f"train --arch resnet20 --data {cifar} --batch 2 --steps 5 --eval-every 2".split(),
        "text": f"train --data {text} {small} --steps 5 --eval-every 5".split(),
        "fp32": f"train --data {text} {small} --steps 4 --recipe fp32".split(),
    }


@pytest.fixture(scope="module")
def launched(sources, tmp_path_factory):
    """The folder that all runs were written to, and the exit codes of the processes of each."""
    folder = tmp_path_factory.mktemp("runs")
    parts = ["--save-every", "100", "--out"]
    orders = [
        ([*sources["images"], "--out", f"{folder}/images"], 2, 0, None),
        # One is told to stop, all do; then one dies, and nothing of the steps before is lost.
        ([*sources["images"], *parts, f"{folder}/told"], 2, signal.SIGTERM, 1),
        (["train", "--resume", *parts, f"{folder}/told"], 2, signal.SIGKILL, 3),
        (["train", "--resume", *parts, f"{folder}/told"], 2, 0, None),
        ([*sources["text"], "--out", f"{folder}/text"], 3, 0, None),
        ([*sources["text"], *parts, f"{folder}/cut"], 3, signal.SIGTERM, 1),
        (["train", "--resume", *parts, f"{folder}/cut"], 3, 0, None),
        ([*sources["fp32"], "--out", f"{folder}/fp32"], 2, 0, None),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(hbfp.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAUNCHED],
        input=json.dumps(orders), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_signal_to_one_stops_all_and_a_death_loses_nothing(launched):
    _, codes, told = launched
    assert codes == [[0, 0], [143, 143], [2, -signal.SIGKILL], [0, 0], [0] * 3, [143] * 3, [0] * 3, [0, 0]]
    assert told.count("stopped after 2 of 5 steps, saved. Go on, in 2 processes, with: hbfp train --resume") == 1
    assert told.count("another process of the run has ended") == 1


@pytest.mark.parametrize(("whole", "parts"), [("images", "told"), ("text", "cut")])
def test_resumed_runs_end_in_the_same_bits(whole, parts, launched):
    folder, _, _ = launched
    ours, theirs = (read_checkpoint(folder / name / "checkpoint.pt") for name in (parts, whole))
    assert ours["step"] == 5
    assert bits(ours) == bits(theirs)
    assert not list((folder / parts).glob(".*"))


@pytest.mark.parametrize(("run", "count"), [("images", 2), ("told", 2), ("text", 3), ("cut", 3), ("fp32", 2)])
def test_replicas_are_the_same_to_the_bit(run, count, launched):
    folder, _, _ = launched
    first, *others = (bits(torch.load(f"{folder}/{run}.{rank}.pt", weights_only=True)) for rank in range(count))
    assert others == [first] * (count - 1)


def test_gradients_are_means_over_all_rows(launched, sources, tmp_path):
    """In FP32 two processes sum what one process with both batches sums, in another order: hence a tolerance."""
    folder, _, _ = launched
    assert main([*sources["fp32"], "--workers", "2", "--out", str(tmp_path)]) == 0
    alone, spread = (read_checkpoint(path / "checkpoint.pt") for path in (tmp_path, folder / "fp32"))
    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert alone["losses"][0] != pytest.approx(alone["losses"][1], rel=1e-3)
    for name, weight in alone["model"].items():
        torch.testing.assert_close(spread["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_each_process_has_a_batch_and_the_rate_is_that_of_all(launched):
    folder, _, _ = launched
    settings = read_checkpoint(folder / "images" / "checkpoint.pt")["settings"]
    assert (settings["processes"], settings["workers"], settings["batch"]) == (2, 2, 2)
    training = Training.start(Settings.of({"arch": "resnet20", "data": settings["data"], "batch": 2}, processes=2))
    assert training.data.size == 4
    assert training.run.plan.learning_rate == 0.2


def test_another_number_of_processes_is_refused(launched, capsys):
    folder, _, _ = launched
    assert main(["train", "--resume", "--out", str(folder / "images")]) == 2
    assert "was started in 2 processes, not in 1: go on with it in as many" in capsys.readouterr().err


def test_workers_must_be_spread_evenly():
    with pytest.raises(HBFPError, match="a multiple of the 2 processes, not 3"):
        Settings.of({"data": "", "workers": 3}, processes=2)


def test_half_a_launcher_is_named(tmp_path, capsys, monkeypatch):
    """A WORLD_SIZE that something else left in the environment."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("hbfp train: WORLD_SIZE=2 says that this is one of several processes")
    assert told.count("\n") == 1
