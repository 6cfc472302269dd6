"""The processes of one run: each computes its rows of every batch, and all apply the same update.

DistributedDataParallel is for loops of one's own. It groups gradients anew after its first backward pass, and with
more than two processes a sum's order, and so its last bits, depends on the grouping: a resumed run would not be the
uncut one. Here all gradients are one buffer, always summed in the same order.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hbfp.errors import HBFPError
from hbfp.training.data import Batch

_PATIENCE = timedelta(hours=6)
"""The others wait while the first process validates; one that has ended is noticed at once."""


class LostProcess(HBFPError):
    """Another process of the run has ended."""


@dataclass(frozen=True, slots=True)
class Processes:
    """How many there are and which one this is; by default the only one, in which nothing here does anything."""

    count: int = 1
    rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the one that validates, writes and prints."""
        return self.rank == 0

    def part(self, batch: Batch) -> Batch:
        """This process's rows of a batch, whose number they divide."""
        inputs, targets = batch
        size = len(inputs) // self.count
        rows = slice(self.rank * size, (self.rank + 1) * size)
        return inputs[rows], targets[rows]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces float32 tensors by their means over all processes, the same bits in each."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        _reduce(flat, dist.ReduceOp.SUM)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def highest(self, number: int) -> int:
        """The highest of the processes' numbers."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number)
        _reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)


ALONE = Processes()


def _reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostProcess(
            f"another process of the run has ended, go on with --resume in all of them ({reason})"
        ) from None


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that a launcher such as torchrun started, by its environment variables; this one alone without.

    Raises:
        HBFPError: the variables are not all there, or the processes do not meet.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield ALONE
        return
    if not dist.is_available():
        raise HBFPError(f"WORLD_SIZE={count}, but this torch has no torch.distributed: start one process")
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise HBFPError(
            f"WORLD_SIZE={count} says that this is one of several processes, but they do not meet: start them with "
            f"torchrun, or unset WORLD_SIZE ({error})"
        ) from error
    try:
        yield Processes(dist.get_world_size(), dist.get_rank())
    finally:
        dist.destroy_process_group()
