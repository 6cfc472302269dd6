"""Models for inference: the weights of converted layers become codes, in place, and floats again.

What is packed is what `save_model` packs: weights that only converted layers read, in one way, whose encoding is
idempotent. Everything else stays as it is, and the report says why. A weight that a layer shares with a module outside
the conversion (the table of an embedding) is packed for the layer alone; the other keeps the floats, and `unfreeze_`
ties them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hbfp.checkpoint import is_idempotent
from hbfp.errors import ConversionError, HBFPError
from hbfp.files.description import EXPONENTS, MANTISSAS
from hbfp.format import HBFP
from hbfp.nn.conversion import FROZEN, convert_, take_back
from hbfp.packed import PackedWeight
from hbfp.policy import Backend, LayerState, OperandPolicy, Recipe, Weight, layer_states, weights_of
from hbfp.tables import table

__all__ = ["FreezeReport", "FreezeRow", "freeze_", "unfreeze_"]


@dataclass(frozen=True, slots=True)
class FreezeRow:
    """One weight of a converted layer."""

    name: str
    format: HBFP | None
    """Of its codes; None: it stayed as it was."""
    floats: int
    """Bytes before."""
    packed: int
    """Bytes now."""
    note: str = ""
    """Why it stayed as it was, or what else there is to say."""


@dataclass(frozen=True, slots=True)
class FreezeReport:
    """Every weight of the converted layers. Prints as a table."""

    rows: tuple[FreezeRow, ...]

    @property
    def packed(self) -> tuple[FreezeRow, ...]:
        """The weights that are codes now."""
        return tuple(row for row in self.rows if row.format is not None)

    @property
    def left(self) -> tuple[FreezeRow, ...]:
        """The weights that stayed as they were, each with the reason in `note`."""
        return tuple(row for row in self.rows if row.format is None)

    def __str__(self) -> str:
        header = ("weight", "held as", "bytes before", "bytes now", "note")
        rows = [
            (row.name, str(row.format or "float"), f"{row.floats:,}", f"{row.packed:,}", row.note) for row in self.rows
        ]
        before, now = (sum(getattr(row, name) for row in self.rows) for name in ("floats", "packed"))
        summary = f"{len(self.packed)} packed, {len(self.left)} left; {before:,} bytes before, {now:,} now"
        return "\n".join([table(header, rows, right=(2, 3)), summary])


@dataclass(slots=True)
class _Frozen:
    """What `unfreeze_` must know of one packed weight."""

    requires_grad: bool
    tied: nn.Parameter | None
    """The floats, where somebody else still has them."""


@torch.inference_mode(False)
@torch.no_grad()
def freeze_(
    model: nn.Module, format: HBFP | str | Recipe | None = None, *, activations: str | None = None
) -> FreezeReport:
    """Packs the weights of converted layers, in place, and puts the model into evaluation mode.

    Outputs have the bits of the converted model's in evaluation mode. In lines of 4 bits or fewer a weight takes what
    its codes take, 4.125 bits an element in HBFP4, and up to 8 bits a byte an element; linear layers (those inside
    attention, recurrent and transformer layers too) and convolutions read the codes as they lie. Formats of tiles or of
    more bits, and convolutions of few channels, hold the planes and lay them out at each call: they save memory, not
    time.

    `parameters()` then yields `hbfp.packed.PackedWeight`s, float32 to torch and without gradients; `state_dict()` holds
    both planes of each (docs/spec.md, 7.8), and `load_state_dict` takes planes or floats. `save_model` and
    `load_model`, copies, pickles, `torch.compile` and `torch.export` work as before. Freezing a frozen model lays out
    for the kernels what is still as a file holds it.

    Args:
        model: converted by `hbfp.convert_`; one that is not is converted first. On "meta", too.
        format: what to convert a model by that is not converted yet: a format, a recipe or its name; None: HBFP4.
        activations: None: encoded on the way into each product, in the layer's format. "float32": the conversion is
            taken back, so that all products are torch's own in FP32, with decoded weights; less memory, but each call
            decodes what it uses.

    Returns:
        What was packed and what was not, with reasons; prints as a table.

    Raises:
        ConversionError: the model is converted and a format is given; or a layer's forward product isn't computed by
            the integer kernels; or nothing can be packed. The model is as it was, or converted.
        HBFPError: `activations` is something else.
    """
    if activations not in (None, "float32"):
        raise HBFPError(f"unknown activations {activations!r}: expected None or 'float32'")
    frozen = [module for module in model.modules() if FROZEN in module.__dict__]
    converted = any(True for _ in layer_states(model))
    if format is not None and (converted or frozen):
        raise ConversionError(
            "the model is converted already, and frozen in the formats of its layers: leave out format=, or convert it "
            "to others (hbfp.revert_, hbfp.convert_)"
        )
    if not converted and not frozen:
        convert_(model, "hbfp4" if format is None else format)
    for weight in {id(w): w for module in frozen for w in packed_weights(module).values()}.values():
        weight.lay_out()
    plans = [plan for name, layer, state in layer_states(model) for plan in _plans(name, layer, state)]
    if not frozen and not any(plan.policy is not None for plan in plans):
        reasons = "; ".join(f"{plan.name}: {plan.note}" for plan in plans[:8])
        raise ConversionError(f"{type(model).__name__} has no weight that can be packed: {reasons}")
    rows = _pack(model, plans, for_products=activations is None)
    model.eval()
    if activations is not None and any(state.undo is not None for *_, state in layer_states(model)):
        take_back(model)
    return FreezeReport(rows)


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """The packed parameters of a module itself, by name."""
    entries: dict[str, Any] = module._parameters
    return {name: x for name, x in entries.items() if isinstance(x, PackedWeight)}


# --- what is packed, and how -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """One weight of one layer."""

    name: str
    weight: Weight
    policy: OperandPolicy | None
    """None: it stays as it is."""
    note: str


def _plans(name: str, layer: nn.Module, state: LayerState) -> list[_Plan]:
    if state.recipe.backends.forward is not Backend.INTEGER:
        raise ConversionError(
            f"{name or type(layer).__name__}: expected a forward product of the integer kernels; found the backend "
            f"{str(state.recipe.backends.forward)!r}, which multiplies floats: convert it with the backend 'integer'"
        )
    right = state.recipe.forward.right
    plans = []
    for weight in weights_of(layer, right.format):
        if weight.owner._parameters.get(weight.name, weight) is None:
            continue  # a parameter that this layer does without
        owners = [path for path, module in layer.named_modules() if module is weight.owner]
        full = ".".join(part for part in (name, owners[0], weight.name) if part)
        note = ""
        if weight.owner._parameters.get(weight.name) is None:
            note = "computed from other parameters"
        elif not weight.packs:
            note = "blocks over flattened patches or groups, which no axis has: encoded at each call"
        elif not is_idempotent(right):
            note = f"{right}: other codes at each call, or after decoding"
        plans.append(_Plan(full, weight, None if note else right, note))
    return plans


def _pack(model: nn.Module, plans: list[_Plan], *, for_products: bool) -> tuple[FreezeRow, ...]:
    """`for_products`: the layers' own, which read the kernels of convolutions as they are laid out for them."""
    packed: dict[Any, nn.Parameter] = {}
    floats: dict[int, nn.Parameter] = {}
    replaced: list[tuple[_Plan, nn.Parameter, nn.Parameter]] = []
    rows: dict[int, FreezeRow] = {}
    for number, plan in enumerate(plans):
        owner, name = plan.weight.owner, plan.weight.name
        old = owner._parameters.get(name)
        if plan.policy is None or old is None:
            size = 0 if old is None else old.numel() * old.element_size()
            rows[number] = FreezeRow(plan.name, None, size, size, plan.note)
        elif isinstance(old, PackedWeight):
            old.lay_out(plan.weight.groups if for_products else 0)
            rows[number] = FreezeRow(plan.name, old.format, 4 * old.numel(), old.packed_bytes)
        else:
            policy = plan.policy
            floats[id(old)] = old  # as long as its identity counts
            key = id(old), policy, plan.weight.axis % old.dim()
            if key not in packed:
                groups = plan.weight.groups if for_products else 0
                made = PackedWeight.of(old, policy.format, plan.weight.axis, policy.rounding, groups).to(old.dtype)
                packed[key] = nn.Parameter(made, requires_grad=False)
            owner._parameters[name] = packed[key]
            replaced.append((plan, old, packed[key]))
            size = packed[key].packed_bytes  # type: ignore[attr-defined]
            rows[number] = FreezeRow(plan.name, policy.format, old.numel() * old.element_size(), size)
    others = {id(x) for x in model.parameters()}
    for plan, old, _ in replaced:
        owner = plan.weight.owner
        if FROZEN not in owner.__dict__:
            owner.__dict__[FROZEN] = {}
            owner.register_state_dict_post_hook(_write_planes)
            owner.register_load_state_dict_pre_hook(_read_planes)
        owner.__dict__[FROZEN][plan.weight.name] = _Frozen(old.requires_grad, old if id(old) in others else None)
    for number, plan in enumerate(plans):
        entry = plan.weight.owner.__dict__.get(FROZEN, {}).get(plan.weight.name)
        if entry is not None and entry.tied is not None:
            row = rows[number]
            note = "tied: others keep the floats"
            rows[number] = FreezeRow(row.name, row.format, row.floats, row.floats + row.packed, note)
    return tuple(rows[number] for number in range(len(plans)))


@torch.inference_mode(False)
@torch.no_grad()
def unfreeze_(model: nn.Module) -> None:
    """Takes back `freeze_`: packed weights are float parameters again, with the values of their codes.

    A converted model stays converted; where the conversion was taken back (`activations="float32"`), it stays so. A
    weight that was tied to one outside the conversion is tied to it again.

    Raises:
        ConversionError: nothing under `model` is frozen.
    """
    frozen = [module for module in model.modules() if FROZEN in module.__dict__]
    if not frozen:
        raise ConversionError(f"{type(model).__name__} holds no frozen weight: there is nothing to take back")
    floats: dict[int, nn.Parameter] = {}
    for module in frozen:
        entries: dict[str, _Frozen] = module.__dict__.pop(FROZEN)
        for name, weight in packed_weights(module).items():
            entry = entries.get(name, _Frozen(False, None))
            if id(weight) not in floats:
                tied = entry.tied
                floats[id(weight)] = nn.Parameter(weight.decode(), entry.requires_grad) if tied is None else tied
            module._parameters[name] = floats[id(weight)]
        for hooks, hook in (
            (module._state_dict_hooks, _write_planes),
            (module._load_state_dict_pre_hooks, _read_planes),
        ):
            for key in [key for key, found in hooks.items() if getattr(found, "hook", found) is hook]:
                del hooks[key]


# --- state_dicts -----------------------------------------------------------------------------------------------------


def _write_planes(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Both planes in the place of each packed weight; with `keep_vars`, which asks for tensors themselves, those."""
    for name, weight in packed_weights(module).items():
        key = prefix + name
        if key in state and state[key] is not weight:
            del state[key]
            state[key + EXPONENTS], state[key + MANTISSAS] = weight.planes()


def _read_planes(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """One packed weight in the place of its planes; floats are left to be encoded."""
    for name, weight in packed_weights(module).items():
        key = prefix + name
        planes = [state.pop(key + suffix, None) for suffix in (EXPONENTS, MANTISSAS)]
        if planes == [None, None]:
            continue
        shapes = weight.format.plane_shapes(tuple(weight.shape), weight.axis)
        found = [tuple(x.shape) if isinstance(x, Tensor) and x.dtype is torch.uint8 else None for x in planes]
        if found != list(shapes):
            errors.append(
                f"{key}: expected uint8 planes of shapes {shapes[0]} and {shapes[1]}, those of {weight.format}; found "
                f"{found[0]} and {found[1]}"
            )
            state[key] = weight  # so that it is not missing as well
            continue
        exponents, mantissas = planes
        state[key] = PackedWeight(
            mantissas.contiguous(),
            exponents.contiguous(),
            weight.format,
            tuple(weight.shape),
            weight.axis,
            groups=weight.groups,
        )
