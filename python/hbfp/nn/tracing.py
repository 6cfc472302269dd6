"""torch.fx: a converted layer is one node of a symbolic trace, as torch's own layers are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "node"]


def node(layer: nn.Module, given: Proxy, *arguments: Any, **keywords: Any) -> Any:
    """The call of `layer`, a module of the one being traced, as a node; called by a layer that is given a Proxy.

    torch's tracer asks a class for its module's name to tell layers from what it is to look into, and does not know
    ours. It could not follow them: shapes are checked, and formats chosen, by numbers that a Proxy does not have.
    """
    tracer: Any = given.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (given, *arguments), keywords)
