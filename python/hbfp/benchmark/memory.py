"""Peak memory of a step above what its inputs take, measured in a process of its own.

    python -m hbfp.benchmark.memory CASE CONTESTANT

prints MiB. Linux only: the kernel keeps the peak of a process's resident memory, and takes it back on request.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["CONTESTANTS", "STEPS", "peak"]

CONTESTANTS = ("hbfp4", "torch fp32")


def _attention(contestant: str) -> Callable[[], object]:
    import torch

    import hbfp

    q, k, v = (torch.randn(4, 8, 2048, 64, requires_grad=True) for _ in range(3))
    dy = torch.randn(4, 8, 2048, 64)

    def step() -> object:
        if contestant == "hbfp4":
            out = hbfp.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, recipe="hbfp4")
        else:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
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

    def step() -> object:
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(codes).flatten(0, 1), codes.flatten()).backward()
        return model

    return step


STEPS = {"attention 2048": _attention, "gpt": _gpt}


def peak(case: str, contestant: str, threads: int) -> float | None:
    """MiB, or None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "hbfp.benchmark.memory", case, contestant, str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


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
    step()
    print((_resident("VmHWM") - before) / 1024)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
