"""Turning a model's layers into fixed-point ones in place, and back.

A layer is converted by exchanging its class: parameters, buffers, hooks, optimizers and state_dict keys stay what they
were. A parametrised module has a class of its own, derived by torch, whose properties compute the weights: it gets
another, derived in the same way from the fixed-point class.

To add a layer: write a subclass of the torch class whose `forward` asks `self.hbfp_state` (see `linear.py`) and enter
it in `LAYERS`. If it computes several products at a time, its class says how many numbers it takes
(`hbfp_sites`), what they are called (`hbfp_parts`) and which weights it reads (`hbfp_weights`; see `recurrent.py`); if
not every recipe has products for it, which it does (`hbfp_accepts`; see `convolution.py`).

A container computes nothing itself, but torch has fused inference paths that reach into its parts' weights without
calling them: `CONTAINERS` and `_FUSED` say how these are taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from hbfp.errors import ConversionError, FormatError, RuleError
from hbfp.nn.attention import DotProductAttention
from hbfp.nn.bilinear import Bilinear
from hbfp.nn.convolution import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from hbfp.nn.functional import RecipeLike
from hbfp.nn.linear import Linear
from hbfp.nn.multihead import MultiheadAttention
from hbfp.nn.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from hbfp.nn.report import ConversionReport, ReportRow
from hbfp.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from hbfp.policy import (
    SITES,
    LayerState,
    Position,
    Recipe,
    RootState,
    Rule,
    RuleValue,
    layer_states,
    parse_rules,
)
from hbfp.policy import recipe as _recipe

__all__ = ["LAYERS", "convert_", "revert_"]

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    Linear: Linear,
    nn.Conv1d: Conv1d,
    Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    ConvTranspose3d: ConvTranspose3d,
    DotProductAttention: DotProductAttention,
    nn.Bilinear: Bilinear,
    Bilinear: Bilinear,
    nn.MultiheadAttention: MultiheadAttention,
    MultiheadAttention: MultiheadAttention,
    nn.RNN: RNN,
    RNN: RNN,
    nn.GRU: GRU,
    GRU: GRU,
    nn.LSTM: LSTM,
    LSTM: LSTM,
    nn.RNNCell: RNNCell,
    RNNCell: RNNCell,
    nn.GRUCell: GRUCell,
    GRUCell: GRUCell,
    nn.LSTMCell: LSTMCell,
    LSTMCell: LSTMCell,
}
"""Class -> class that computes the same in fixed point."""

CONTAINERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    TransformerDecoderLayer: TransformerDecoderLayer,
}
"""Class -> class that does the same by calling its parts, for layers whose parts are converted one by one."""

_FUSED: dict[type[nn.Module], tuple[str, Any]] = {nn.TransformerEncoder: ("use_nested_tensor", False)}
"""Class, subclasses included -> the attribute that takes a fused path off, and its value for that."""

_WHOLE: tuple[type[nn.Module], ...] = (nn.MultiheadAttention,)
"""Classes that reach into their parts' weights without calling them: the parts are not converted by themselves."""

FROZEN = "hbfp_frozen"
"""The entry of a module's `__dict__` that says which of its weights are packed; see `hbfp.freezing`."""

_HARMLESS = frozenset({"__init__", "reset_parameters", "extra_repr", "__annotate__", "__annotate_func__", "_abc_impl"})
"""What a subclass may define and still be computed by its base's forward, with nothing lost."""

_MAY_MULTIPLY = "may multiply by "
"""Begins the note on a module that has matrices of its own. Whether it does is what the audit finds."""

_COMPUTES_WEIGHTS = "computes a layer's weight, outside its products"


# --- the plan: who is converted, decided before anything changes -----------------------------------------------------


@dataclass(slots=True)
class _Candidate:
    """A module that computes products, and what is to become of it."""

    module: nn.Module
    names: list[str]
    target: type[nn.Module] | None
    recipe: Recipe | None = None
    """None: it stays in FP32."""
    pinned: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    @property
    def sites(self) -> int:
        """How many numbers the layer takes."""
        count: Any = getattr(self.target, "hbfp_sites", None)
        return 1 if count is None else int(count(self.module))


def _candidates(model: nn.Module) -> list[_Candidate]:
    """Every module that may compute products, in the order of registration, shared ones once."""
    found: dict[int, _Candidate] = {}
    opaque: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in opaque):
            continue
        if id(module) in found:
            found[id(module)].names.append(name)
            continue
        target, note = _target(module)
        if _is_whole(module, note):
            opaque.append(f"{name}." if name else "")
        if target is not None or note:
            found[id(module)] = _Candidate(module, [name], target, note=note)
        if opaque and opaque[-1] == "":
            break  # the model itself is
    return list(found.values())


def _is_whole(module: nn.Module, note: str) -> bool:
    """Whether the modules inside `module` share its fate: it may use their weights without calling them."""
    left = bool(note) and isinstance(module, nn.TransformerEncoderLayer)
    return left or isinstance(module, _WHOLE)


def _target(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The class to convert a module to, or None and the reason; an empty reason: it computes no products."""
    kind = parametrize.type_before_parametrizations(module)
    base = _base(kind, LAYERS)
    if (base is not None or isinstance(module, nn.TransformerEncoderLayer)) and "forward" in module.__dict__:
        return None, "its forward was replaced on the instance"
    if isinstance(module, nn.TransformerEncoderLayer):
        added = sorted(_added(kind, _base(kind, CONTAINERS)))
        return None, f"subclass of TransformerEncoderLayer with its own {', '.join(added)}" if added else ""
    if base is not None:
        added = sorted(_added(kind, base))
        if not added or isinstance(module, LazyModuleMixin):  # the latter is for `_refuse`
            return LAYERS[base], ""
        return None, f"subclass of {base.__name__} with its own {', '.join(added)}"
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    if own and not kind.__module__.startswith("torch.nn."):
        return None, f"{_MAY_MULTIPLY}{', '.join(own)} itself: hbfp.audit tells, hbfp.nn.functional helps"
    return None, ""


def _base(kind: type, table: Mapping[type[nn.Module], type[nn.Module]]) -> Any:
    """The nearest class of `kind`'s line that the table has."""
    return next((base for base in kind.__mro__ if base in table), None)


def _added(kind: type, base: type) -> set[str]:
    """What the classes from `kind` to `base` define that would be lost: methods, properties and class attributes."""
    between = kind.__mro__[: kind.__mro__.index(base)]
    return {
        name
        for cls in between
        for name, value in vars(cls).items()
        if name not in _HARMLESS
        and (not name.startswith("__") or callable(value) or isinstance(value, property | staticmethod | classmethod))
    }


def _refuse(candidate: _Candidate) -> None:
    """Raises for a module that must not be converted as it stands."""
    module, name = candidate.module, candidate.name
    state: LayerState | None = module.__dict__.get("hbfp_state")
    if state is not None and state.undo is not None:
        raise ConversionError(f"{name!r} is converted already: call hbfp.revert_(model) first, or keep it as it is by "
                              f"rules={{{candidate.names[0]!r}: None}}")  # fmt: skip
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise ConversionError(f"{name!r} has no shape yet: run one batch through the model before converting it")
    if isinstance(module, _WHOLE):
        for part, inside in module.named_children():
            if isinstance(inside, nn.Linear) and inside._forward_pre_hooks and "weight" not in inside._parameters:
                raise ConversionError(
                    f"the weight of {part!r} in {name!r} is computed by a hook (torch.nn.utils.weight_norm, "
                    f"spectral_norm, prune), which never runs, as {part!r} is not called: use "
                    "torch.nn.utils.parametrizations, or remove it"
                )
    accepts: Any = getattr(candidate.target, "hbfp_accepts", None)
    if accepts is not None and candidate.recipe is not None:
        recipe, boost = candidate.recipe, candidate.recipe.boost
        try:
            for possible in (recipe, recipe if boost is None else recipe.at(boost)):
                accepts(possible)
        except FormatError as error:
            raise FormatError(
                f"{name!r}: {error}; or give the layer a format of its own, or keep it in FP32, by rules="
                f"{{{candidate.names[0]!r}: …}}"
            ) from None


def _decide(candidates: Sequence[_Candidate], rules: Sequence[Rule], base: Recipe) -> None:
    """Gives every candidate its recipe, by the first rule that covers it."""
    for candidate in candidates:
        deciding = {name: next((rule for rule in rules if rule.covers(name)), None) for name in candidate.names}
        if len({base if rule is None else rule.recipe for rule in deciding.values()}) > 1:
            raise RuleError(
                f"one module is called {candidate.name!r}, and the rules say different things of its names: "
                + ", ".join(
                    f"{name!r} by {'no rule' if rule is None else repr(rule.pattern)}"
                    for name, rule in deciding.items()
                )
            )
        rule = deciding[candidate.names[0]]
        if candidate.target is None:
            if rule is not None and rule.recipe is None:
                candidate.note = f"rule {rule.pattern!r}"
        elif rule is None:
            candidate.recipe = base
        else:
            candidate.recipe, candidate.pinned, candidate.note = rule.recipe, rule.pinned, f"rule {rule.pattern!r}"


def _check_rules(model: nn.Module, candidates: Sequence[_Candidate], rules: Sequence[Rule]) -> None:
    """Raises for a rule without effect: it matches nothing, names a width for what cannot have one, or speaks of a part
    of a layer that is converted as a whole.
    """
    for candidate in candidates:
        if candidate.target is None or not isinstance(candidate.module, _WHOLE):
            continue
        for whole in candidate.names:
            deciding = next((rule for rule in rules if rule.covers(whole)), None)
            for inside, _ in candidate.module.named_modules(prefix=whole):
                rule = next((rule for rule in rules if rule.covers(inside)), None)
                if rule is not deciding and rule is not None:
                    raise RuleError(
                        f"rule {rule.pattern!r} speaks of {inside!r}, which is computed by {whole!r} and converted "
                        f"with it: name {whole!r}"
                    )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    convertible = {name for candidate in candidates if candidate.target is not None for name in candidate.names}
    for rule in rules:
        covered = [name for name in names if rule.covers(name)]
        if not covered:
            raise RuleError(f"rule {rule.pattern!r} matches no module; the model has {_some(names)}")
        if rule.recipe is not None and not convertible.intersection(covered):
            raise RuleError(
                f"rule {rule.pattern!r} asks for {rule.recipe} but covers no module that can be converted, "
                f"only {_some(covered)}; those that can are {_some(sorted(convertible))}"
            )


def _some(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names if name][:8]
    return (", ".join(shown) or "none") + (", ..." if len(names) > len(shown) + 1 else "")


# --- order of execution ----------------------------------------------------------------------------------------------


def _execution_order(model: nn.Module, layers: Sequence[nn.Module], example_inputs: Any) -> list[nn.Module]:
    """The calls of `layers` in one forward pass, in evaluation mode and without gradients; nothing is left behind."""
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        keywords = dict(example_inputs)
    elif type(example_inputs) in (tuple, list):
        arguments = tuple(example_inputs)
    else:  # a named tuple, such as a PackedSequence, is one argument
        arguments = (example_inputs,)
    calls: list[nn.Module] = []

    def note(module: nn.Module, _: Any) -> None:
        calls.append(module)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            model(*arguments, **keywords)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return calls


def _ends(
    model: nn.Module,
    chosen: Sequence[_Candidate],
    example_inputs: Any,
    named: tuple[str | None, str | None],
) -> tuple[nn.Module, nn.Module, list[str]]:
    """The first and the last of the chosen layers, and what the report should say about how they were found."""
    order = [candidate.module for candidate in chosen]
    notes = []
    if example_inputs is not None:
        calls = _execution_order(model, order, example_inputs)
        missed = [candidate.name for candidate in chosen if not any(call is candidate.module for call in calls)]
        if missed:
            notes.append(f"not reached by example_inputs: {_some(missed)}")
        order = calls or order
    elif None in named:
        notes.append("first and last by order of registration: give example_inputs to take the order of execution")
    by_name = {name: candidate.module for candidate in chosen for name in candidate.names}
    for name in named:
        if name is not None and name not in by_name:
            raise ConversionError(f"{name!r} is not among the converted layers, which are {_some(list(by_name))}")
    first, last = named
    return by_name[first] if first is not None else order[0], by_name[last] if last is not None else order[-1], notes


# --- the step --------------------------------------------------------------------------------------------------------


def _advance_step(module: nn.Module, _: Any) -> None:
    """Forward pre-hook of the converted root."""
    if module.training:
        module.__dict__["hbfp_root"].advance()


# --- the public pair -------------------------------------------------------------------------------------------------


def convert_(
    model: nn.Module,
    recipe: RecipeLike = "booster",
    *,
    rules: Mapping[str, RuleValue] | None = None,
    example_inputs: Any = None,
    first: str | None = None,
    last: str | None = None,
    seed: int = 0,
) -> ConversionReport:
    """Has the layers of `model` compute in fixed point, in place.

    Parameters, their identity, hooks and state_dict keys do not change; `revert_` takes it all back. A converted model
    draws new random bits at each training forward; `hbfp.set_step` or a `hbfp.Booster` ties them to your own step,
    which makes runs resumable. A weight that other parameters make (weight_norm, spectral_norm, pruning, your own
    parametrisation) is made as before, in FP32, and the products encode what comes of it.

    Args:
        model: any module; a layer by itself is fine.
        recipe: "hbfp4", "hbfp6", "hbfp8", "booster", "emulator", a format, or a `hbfp.Recipe`.
        rules: pattern -> format, recipe, None, or a mapping that says what is to differ from `recipe` in single
            products, as the keywords of `hbfp.recipe` do: {"forward": hbfp.HBFP6, "weight_gradient": "reference"}. A
            pattern is a glob on the module's name, or "re:" and a regular expression for all of it; it covers what is
            inside the module too. The first that covers a module decides; None keeps FP32. A layer for which a rule
            names a format is not touched by schedules.
        example_inputs: a tuple of positional or a mapping of keyword arguments; anything else is the only argument. One
            forward pass over them tells which layer comes first and which last. Without, the order of registration is
            taken.
        first, last: names of these layers, where you know better.
        seed: of stochastic rounding. Parts of a model that are converted one by one share random bits unless each has
            a seed of its own.

    Returns:
        What was converted and what stayed in FP32, with reasons; prints as a table.

    Raises:
        RuleError: a rule matches nothing, or cannot be read.
        ConversionError: a module is converted already or has no shape yet, or a hook computes its weight that never
            runs; or there is none to convert.
        FormatError: the recipe has blocks that a layer has no products for, as convolutions have none for tiles.
        HBFPError: there is no such recipe.

    After an error the model is as it was.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError("a scripted model cannot be converted: convert the model it was made of")
    if not 0 <= seed < 2**64:
        raise ConversionError(f"the seed is an unsigned 64-bit number; found {seed}")
    base = _recipe(recipe)
    table_of_rules = parse_rules(rules, base)
    candidates = _candidates(model)
    _check_rules(model, candidates, table_of_rules)
    _decide(candidates, table_of_rules, base)
    chosen = [candidate for candidate in candidates if candidate.recipe is not None]
    for candidate in chosen:
        _refuse(candidate)
    if not chosen:
        left = "; ".join(f"{candidate.name or type(model).__name__}: {candidate.note}" for candidate in candidates[:8])
        raise ConversionError(f"{type(model).__name__} has nothing to convert: {left or 'no module computes products'}")
    if (sites := sum(candidate.sites for candidate in chosen)) > SITES:
        raise ConversionError(f"{sites} products are more than the {SITES} that random streams tell apart")
    first_layer, last_layer, notes = _ends(model, chosen, example_inputs, (first, last))
    if type(model).forward is nn.Module.forward and "forward" not in model.__dict__:
        notes.append(f"{type(model).__name__} has no forward that would count steps: call hbfp.set_step at each step")

    root = RootState(seed=seed)
    rows = []
    site = 0
    for candidate in candidates:
        before = parametrize.type_before_parametrizations(candidate.module)
        position = formats = computed_by = None
        if candidate.recipe is not None and candidate.target is not None:
            position = _position(candidate.module, first_layer, last_layer)
            state = LayerState(
                base=candidate.recipe,
                recipe=_at_position(candidate.recipe, position),
                root=root,
                site=site,
                position=position,
                pinned=candidate.pinned,
                undo=(before, candidate.module.__dict__.get("hbfp_state")),
            )
            _install(candidate.module, candidate.target, state)
            formats, computed_by = state.recipe.formats, state.recipe.computed_by
            _note_parametrisations(candidate, root)
            site += candidate.sites
        elif not candidate.note.startswith(_MAY_MULTIPLY):
            root.left.update(dict.fromkeys(candidate.names, candidate.note))
        rows.append(ReportRow(candidate.name, before.__name__, formats, position, candidate.note, computed_by))
    _take_off_fused_paths(model, {id(candidate.module) for candidate in chosen})
    model.__dict__["hbfp_root"] = root
    model.register_forward_pre_hook(_advance_step)
    return ConversionReport(tuple(rows), tuple(notes))


def _position(module: nn.Module, first: nn.Module, last: nn.Module) -> Position:
    return Position.FIRST if module is first else Position.LAST if module is last else Position.INNER


def _at_position(recipe: Recipe, position: Position) -> Recipe:
    return recipe if recipe.boost is None or position is Position.INNER else recipe.at(recipe.boost)


def _note_parametrisations(candidate: _Candidate, root: RootState) -> None:
    """Says which weights are computed in FP32, and tells the audit where."""
    if not parametrize.is_parametrized(candidate.module):
        return
    weights: Any = candidate.module.parametrizations
    root.left.update(
        {f"{name}.parametrizations.{weight}": _COMPUTES_WEIGHTS for name in candidate.names for weight in weights}
    )
    note = f"parametrised: {', '.join(weights)} computed in FP32"
    candidate.note = f"{candidate.note}, {note}" if candidate.note else note


def _install(module: nn.Module, kind: type[nn.Module], state: LayerState | None) -> None:
    """Makes `kind` the class of a module, under the parametrisations that it may have."""
    if parametrize.is_parametrized(module):
        # torch gives each parametrised module a class of its own, which has its weights as properties.
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    module.__class__ = kind
    if state is None:
        module.__dict__.pop("hbfp_state", None)
    else:
        module.__dict__["hbfp_state"] = state


def _take_off_fused_paths(model: nn.Module, converted: set[int]) -> None:
    """Containers around converted layers call them from now on; what they were is kept in `hbfp_undo`."""
    for module in model.modules():
        inside = any(id(part) in converted for part in module.modules())
        if not inside or "hbfp_undo" in module.__dict__:
            continue
        kind = type(module)
        base = _base(kind, CONTAINERS)
        if base is not None and not _added(kind, base):
            module.__dict__["hbfp_undo"] = kind, {}
            module.__class__ = CONTAINERS[base]
        for fused, (name, value) in _FUSED.items():
            if isinstance(module, fused):
                module.__dict__["hbfp_undo"] = kind, {name: module.__dict__[name]}
                module.__dict__[name] = value


def _put_back_fused_paths(model: nn.Module) -> None:
    for module in model.modules():
        undo = module.__dict__.pop("hbfp_undo", None)
        if undo is not None:
            module.__class__, attributes = undo
            module.__dict__.update(attributes)


def revert_(model: nn.Module) -> None:
    """Takes back `convert_`: every converted layer under `model` is again what it was, with the weights it has now.

    Raises:
        ConversionError: nothing under `model` was converted, or it is frozen.
    """
    frozen = [name for name, module in model.named_modules() if FROZEN in module.__dict__]
    if frozen:
        raise ConversionError(
            f"the weights of {_some(frozen)} are packed: hbfp.unfreeze_(model) first makes floats of them"
        )
    take_back(model)


def take_back(model: nn.Module) -> None:
    """`revert_`, whatever the weights are held as."""
    converted = [(module, state) for _, module, state in layer_states(model) if state.undo is not None]
    if not converted:
        raise ConversionError(f"{type(model).__name__} holds no converted layer: there is nothing to take back")
    for module, state in converted:
        assert state.undo is not None
        _install(module, *state.undo)
    _put_back_fused_paths(model)
    for module in model.modules():
        if module.__dict__.pop("hbfp_root", None) is not None:
            _remove_hook(module, _advance_step)


def _remove_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    for number in [number for number, installed in module._forward_pre_hooks.items() if installed is hook]:
        del module._forward_pre_hooks[number]
