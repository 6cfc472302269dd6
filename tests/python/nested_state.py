"""States as checkpoints hold them, for comparing."""

from __future__ import annotations

import torch


def bits(state):
    """Every number of a nested state, as something that compares bit for bit."""
    if isinstance(state, torch.Tensor):
        return (tuple(state.shape), str(state.dtype), state.detach().reshape(-1).view(torch.uint8).tolist())
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [bits(value) for value in state]
    return state
