"""One process of a data-parallel run, for test_distributed.py: python replica.py RANK WORLD FOLDER."""

import sys
from dataclasses import replace
from datetime import timedelta

import torch
from torch import nn

import hbfp
from hbfp.policy import MatmulPolicy, OperandPolicy

ROWS, STEPS = 128, 6
MODES = ("nearest", "stochastic", "own seeds")


def train(mode, rank=0, world=1):
    """Results of this process's rows at each step, then the weights; the rows of a step are spread in their order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    recipe = hbfp.recipe("booster")
    if mode == "nearest":
        nearest = MatmulPolicy(OperandPolicy(hbfp.HBFP4), OperandPolicy(hbfp.HBFP4))
        recipe = replace(recipe, forward=nearest, input_gradient=nearest, weight_gradient=nearest)
    hbfp.convert_(model, recipe, example_inputs=torch.zeros(2, 24), seed=rank if mode == "own seeds" else 7)
    booster = hbfp.Booster(model, STEPS, last_fraction=0.5)
    replica = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.125, momentum=0.5)
    results, share = [], ROWS // world
    for step in range(STEPS):
        booster.step(step)
        x = torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        y = replica(x[rank * share : (rank + 1) * share])
        (y.square().sum() / y.numel()).backward()
        optimizer.step()
        results.append(y.detach())
    return [*results, *(p.detach() for p in model.parameters())]


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.save({mode: train(mode, rank, world) for mode in MODES}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
