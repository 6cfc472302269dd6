"""Several processes: DDP as it is, and bits that depend on seed and step and on nothing else of a process.

The bugs these hunt: replicas that drift apart, a hook of DDP that loses the step, a batch whose results depend on how
it is spread, a generator or thread pool that a forked worker inherits.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from replica import MODES, STEPS, train  # noqa: E402

import hbfp  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(hbfp.__file__).parents[1])}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """What each of two processes of one run has in the end, by mode."""
    folder = tmp_path_factory.mktemp("replicas")
    script = Path(__file__).with_name("replica.py")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), "2", str(folder)],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def same(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("mode", MODES)
def test_replicas_are_the_same_to_the_bit(mode, replicas):
    first, second = (run[mode][STEPS:] for run in replicas)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_two_processes_with_one_block_of_the_batch_each_equal_one_process(replicas):
    """docs/spec.md, 9.31: nearest rounding, and as many rows in each process as a block has."""
    first, second = (run["nearest"] for run in replicas)
    alone = train("nearest")
    for step in range(STEPS):
        assert same(torch.cat([first[step], second[step]]), alone[step])
    assert all(same(a, b) for a, b in zip(first[STEPS:], alone[STEPS:], strict=True))


def test_seeds_of_their_own_draw_other_bits(replicas):
    assert not same(replicas[0]["stochastic"][-2], replicas[0]["own seeds"][-2])


FORKED = """
import os, signal
import numpy as np
import torch
import hbfp
torch.set_num_threads(2)
model = torch.nn.Linear(512, 512)
hbfp.convert_(model, "emulator", seed=3)
hbfp.set_step(model, 11)
x = torch.randn(256, 512)
expected = np.from_dlpack(model(x).detach()).tobytes()  # by now hbfp's threads run
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if np.from_dlpack(model(x).detach()).tobytes() == expected else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_after_use_has_the_same_bits():
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


class Rounded(torch.utils.data.Dataset):
    """Examples that are rounded stochastically where they are loaded, by their own number."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.randn(40, generator=torch.Generator().manual_seed(i))
        return hbfp.nn.functional.linear(x, torch.eye(40), recipe="emulator", seed=5, stream=hbfp.policy.stream(i))


@pytest.mark.filterwarnings("ignore:.*use of fork\\\\(\\\\) may lead to deadlocks:DeprecationWarning")
def test_workers_of_a_loader_have_the_same_bits():
    torch.manual_seed(1)
    alone = list(torch.utils.data.DataLoader(Rounded(), batch_size=2))
    spread = list(torch.utils.data.DataLoader(Rounded(), batch_size=2, num_workers=2, multiprocessing_context="fork"))
    assert all(same(a, b) for a, b in zip(alone, spread, strict=True))


def test_no_global_generator_is_read_or_moved():
    model = torch.nn.Linear(40, 8)
    hbfp.convert_(model, "emulator")
    hbfp.set_step(model, 2)
    x, found = torch.randn(9, 40), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(model(x))
        found[-1].sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
    assert same(*(y.detach() for y in found))
