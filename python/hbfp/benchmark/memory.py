"""Peak memory of a step above what its inputs take, measured in a process of its own.

    python -m hbfp.benchmark.memory CASE CONTESTANT

prints MiB. Linux only: the kernel keeps the peak of a process's resident memory, and takes it back on request.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hbfp.benchmark.results import NotRun

__all__ = ["CONTESTANTS", "STEPS", "peak"]

_STEPS = 2  # an optimizer's state is there from the second on
CONTESTANTS = ("hbfp4", "torch fp32")


def _attention(contestant: str, dropout: float = 0.0) -> Callable[[], object]:
    import torch

    import hbfp

    q, k, v = (torch.randn(4, 8, 2048, 64, requires_grad=True) for _ in range(3))
    dy = torch.randn(4, 8, 2048, 64)

    def step() -> object:
        if contestant == "hbfp4":
            out = hbfp.nn.functional.scaled_dot_product_attention(q, k, v, None, dropout, True, recipe="hbfp4")
        else:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, None, dropout, True)
        return torch.autograd.grad(out, (q, k, v), dy)

    return step


def _gpt(contestant: str) -> Callable[[], object]:
    import torch

    import hbfp
    from hbfp.training.gpt import GPT, GPTShape

    model = GPT(GPTShape(vocabulary=96, layers=6, width=384, context=256))
    if contestant == "hbfp4":
        hbfp.convert_(model, "hbfp4")
    codes = torch.randint(0, 96, (12, 256))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(codes).flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
        return model

    return step


STEPS: dict[str, Callable[[str], Callable[[], object]]] = {
    "attention 2048": _attention,
    "attention 2048, dropout 0.1": partial(_attention, dropout=0.1),
    "gpt": _gpt,
}


def peak(case: str, contestant: str, threads: int) -> float:
    """MiB.

    Raises:
        NotRun: the system does not tell, or the process failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise NotRun("this system does not tell")
    command = [sys.executable, "-m", "hbfp.benchmark.memory", case, contestant, str(threads)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NotRun(f"its process failed: {lines[-1]}"[:200])
    return float(done.stdout)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _main(case: str, contestant: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    step = STEPS[case](contestant)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(_STEPS):
        step()
    print((_resident("VmHWM") - before) / 1024)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
