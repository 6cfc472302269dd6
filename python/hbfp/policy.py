"""Which format and which rounding each operand of each product gets, and the random stream it draws from.

From the inside out: an `OperandPolicy` is a format and a rounding; a `MatmulPolicy` is one product, two of those and
who computes it; a `Recipe` is what a layer needs, three products. Rules choose a recipe per module. A converted layer
carries a `LayerState`: the recipe it was given, the one in force now (a schedule may exchange it), its number and its
place; the layers of one conversion share a `RootState`: the seed and the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling, is_exporting

from hbfp import ops
from hbfp.errors import ConversionError, FormatError, HBFPError, RuleError
from hbfp.format import HBFP, HBFP4, HBFP6, HBFP8, Rounding
from hbfp.patterns import Matches, covers, matcher

__all__ = [
    "Backend",
    "Backends",
    "LayerState",
    "MatmulPolicy",
    "OperandPolicy",
    "Position",
    "ProductValue",
    "Recipe",
    "RootState",
    "Rule",
    "RuleValue",
    "Weight",
    "layer_states",
    "parse_rules",
    "recipe",
    "stream",
    "weights_of",
]


class Backend(str, Enum):
    """Who computes the products. Their operands have the same codes, bit for bit, whoever it is."""

    INTEGER = "integer"
    """The compiled kernels: integers inside each block, the same bits on every CPU."""
    EMULATE = "emulate"
    """torch, on the device of the tensors, a GPU for one: decoded codes are multiplied in float32. The codes are the
    contract; the sums are the device's, close to those of the integer kernels and not bit-identical with them."""
    REFERENCE = "reference"
    """The exact-arithmetic oracle, with the bits of the kernels: for checking, some 10^5 times slower."""

    def __str__(self) -> str:
        return self.value


def _backend(value: str) -> Backend:
    try:
        return Backend(value)
    except ValueError:
        known = ", ".join(repr(backend.value) for backend in Backend)
        raise HBFPError(f"unknown backend {value!r}: expected one of {known}") from None


class Position(str, Enum):
    """Where a layer stands in the order of execution. Accuracy Booster keeps the first and the last at more bits."""

    FIRST = "first"
    INNER = "inner"
    LAST = "last"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class OperandPolicy:
    """How one operand of a product is encoded."""

    format: HBFP
    rounding: Rounding = Rounding.NEAREST_EVEN

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", HBFP.parse(self.format))
        object.__setattr__(self, "rounding", Rounding.parse(self.rounding))

    def __str__(self) -> str:
        return f"{self.format} {self.rounding}"


@dataclass(frozen=True, slots=True)
class MatmulPolicy:
    """How the two operands of one product are encoded, and who multiplies them.

    Attributes:
        backend: None: whoever the recipe names.

    Raises:
        FormatError: the formats would cut the reduction at different places.
        HBFPError: there is no such backend.
    """

    left: OperandPolicy
    right: OperandPolicy
    backend: Backend | None = None
    formats: tuple[HBFP, HBFP] = field(init=False, repr=False, compare=False)
    roundings: tuple[int, int] = field(init=False, repr=False, compare=False)
    """As the compiled core numbers them."""

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        edges = [policy.format.tile or policy.format.block for policy in (left, right)]
        if edges[0] != edges[1]:
            raise FormatError(
                f"the operands of a product must be cut alike along its reduction; found {left.format} and "
                f"{right.format}: give both the same block or tile"
            )
        object.__setattr__(self, "formats", (left.format, right.format))
        object.__setattr__(self, "roundings", (left.rounding.code, right.rounding.code))
        if self.backend is not None:
            object.__setattr__(self, "backend", _backend(self.backend))

    def at(self, format: HBFP) -> MatmulPolicy:
        """The same roundings and backend, both operands in `format`."""
        return replace(self, left=replace(self.left, format=format), right=replace(self.right, format=format))

    def __str__(self) -> str:
        operands = str(self.left) if self.left == self.right else f"{self.left} × {self.right}"
        return operands if self.backend is None else f"{operands} by {self.backend}"

    @property
    def bits(self) -> int:
        """Width of the product: that of its wider operand."""
        return max(self.left.format.bits, self.right.format.bits)


class Backends(NamedTuple):
    """Who computes each of the three products."""

    forward: Backend
    input_gradient: Backend
    weight_gradient: Backend


@dataclass(frozen=True, slots=True, repr=False)
class Recipe:
    """Everything that decides the arithmetic of a layer.

    Prints as the name under which `hbfp.recipe` gives it; any other as its products, operand by operand, and what it
    sets beside them. Two recipes that differ print differently.

    Attributes:
        forward: Y = X Wᵀ; left X, right W. In attention left is Q and P, right K and V.
        input_gradient: dX = dY W; left dY, right W. In attention left is dO and dS, right V and K.
        weight_gradient: dW = dYᵀ X; left dY, right X. In attention left is dO and dS, right P and Q.
        boost: format of the first and the last layer, for recipes that widen them; None: like every other.
        wide_weights: width of the block format in which the optimizer's master copy is kept; None: float32.
        backend: who computes the products that name nobody themselves. What is no product goes with one: the softmax
            with the forward product, its derivative with the input gradient, a bias gradient with the weight gradient.
        name: what it is called; no part of the arithmetic.
    """

    forward: MatmulPolicy
    input_gradient: MatmulPolicy
    weight_gradient: MatmulPolicy
    boost: HBFP | None = None
    wide_weights: int | None = None
    backend: Backend = Backend.INTEGER
    name: str = field(default="custom", compare=False)
    backends: Backends = field(init=False, repr=False, compare=False)
    """Who computes each product, in fact."""

    def __post_init__(self) -> None:
        if self.boost is not None:
            object.__setattr__(self, "boost", HBFP.parse(self.boost))
        if self.wide_weights is not None and not 2 <= self.wide_weights <= 16:
            raise FormatError(f"wide weights are 2 to 16 bits wide, or None for float32; found {self.wide_weights!r}")
        object.__setattr__(self, "backend", _backend(self.backend))
        policies = (self.forward, self.input_gradient, self.weight_gradient)
        object.__setattr__(self, "backends", Backends(*(policy.backend or self.backend for policy in policies)))

    def at(self, format: HBFP | str) -> Recipe:
        """The same roundings, every operand in `format`."""
        format = HBFP.parse(format)
        return replace(
            self,
            forward=self.forward.at(format),
            input_gradient=self.input_gradient.at(format),
            weight_gradient=self.weight_gradient.at(format),
        )

    def __str__(self) -> str:
        if _is_named(self):
            return self.name
        parts = [f"{name} {policy}" for name, policy in zip(_SHORT, self.products.values(), strict=True)]
        if self.boost is not None:
            parts.append(f"first and last layer {self.boost}")
        if self.wide_weights is not None:
            parts.append(f"wide weights of {self.wide_weights} bits")
        if self.backend is not Backend.INTEGER:
            parts.append(f"backend {self.backend}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"hbfp.recipe({self.name!r})" if _is_named(self) else f"<Recipe {self.name!r}: {self}>"

    @property
    def products(self) -> dict[str, MatmulPolicy]:
        """The three products by their names, in the order in which a step computes them."""
        return {
            "forward": self.forward,
            "input gradient": self.input_gradient,
            "weight gradient": self.weight_gradient,
        }

    @property
    def formats(self) -> str:
        """The formats in short: one where all operands share it, else those of Y, dX and dW; left × right if they
        differ.
        """
        pairs = [policy.formats for policy in self.products.values()]
        if len({format for pair in pairs for format in pair}) == 1:
            return str(pairs[0][0])
        return _of_each(str(left) if left == right else f"{left}×{right}" for left, right in pairs)

    @property
    def computed_by(self) -> str:
        """The backends in short: one where all products share it, else those of Y, dX and dW."""
        return str(self.backends[0]) if len(set(self.backends)) == 1 else _of_each(map(str, self.backends))


_SHORT = ("Y", "dX", "dW")


def _of_each(products: Iterable[str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in zip(_SHORT, products, strict=True))


# --- recipes by name -------------------------------------------------------------------------------------------------


def _uniform(
    name: str,
    format: HBFP,
    *,
    gradients: Rounding = Rounding.STOCHASTIC,
    others: Rounding = Rounding.NEAREST_EVEN,
    boost: HBFP | None = None,
) -> Recipe:
    gradient, other = OperandPolicy(format, gradients), OperandPolicy(format, others)
    mixed = MatmulPolicy(gradient, other)
    return Recipe(MatmulPolicy(other, other), mixed, mixed, boost=boost, name=name)


@lru_cache(maxsize=1)
def _named() -> dict[str, Recipe]:
    return {
        "hbfp4": _uniform("hbfp4", HBFP4),
        "hbfp6": _uniform("hbfp6", HBFP6),
        "hbfp8": _uniform("hbfp8", HBFP8),
        "booster": _uniform("booster", HBFP4, boost=HBFP6),
        "emulator": _uniform("emulator", HBFP(4, exponent_rule="ceil"), others=Rounding.STOCHASTIC),
    }


def recipe(value: str | HBFP | Recipe, **changes: ProductValue) -> Recipe:
    """The recipe called, written or given as `value`.

        hbfp.recipe("hbfp4", input_gradient="hbfp6b64", weight_gradient="reference")

    Args:
        value: "hbfp4", "hbfp6", "hbfp8" (stochastic gradients, nearest-even weights and activations, one width),
            "booster" (hbfp4 with the first and last layer in HBFP6; see `hbfp.Booster` for its schedule), "emulator"
            (what the published emulators do: `ceil` exponents, stochastic rounding everywhere); or a format, as
            `hbfp.HBFP6` or "hbfp6b16", which gives the default roundings in that format; or a recipe, returned as it
            is.
        changes: what is to differ: `backend`, and `forward`, `input_gradient`, `weight_gradient`. A product is given
            as a format for both operands, or a pair of formats (roundings stay as they are); as a pair of
            `OperandPolicy`, which name roundings too; as a `MatmulPolicy`; or as a backend, the rest staying as it is.

    Raises:
        HBFPError: no recipe is called so, no format is written so, or a change cannot be read.
    """
    if changes:
        return _changed(recipe(value), changes)
    if isinstance(value, Recipe):
        return value
    if isinstance(value, HBFP):
        return _of_format(value)
    named = _named()
    if value in named:
        return named[value]
    try:
        return _of_format(HBFP.parse(value))
    except FormatError as error:
        known = ", ".join(repr(name) for name in named)
        raise HBFPError(
            f"unknown recipe {value!r}: expected one of {known}, or a format such as 'hbfp6b16' ({error})"
        ) from None


@lru_cache(maxsize=64)
def _of_format(format: HBFP) -> Recipe:
    return _uniform(str(format), format)


def _is_named(value: Recipe) -> bool:
    """Whether `recipe` gives an equal one for the name that `value` has."""
    try:
        return recipe(value.name) == value
    except HBFPError:
        return False


# --- a recipe, product by product ------------------------------------------------------------------------------------

ProductValue = HBFP | str | Backend | MatmulPolicy | tuple[Any, Any]
"""One product of a recipe: its format, its backend, or a pair of formats or of `OperandPolicy`; see `recipe`."""

_PRODUCTS = ("forward", "input_gradient", "weight_gradient")
_BACKENDS = tuple(backend.value for backend in Backend)


def _changed(base: Recipe, changes: Mapping[str, ProductValue]) -> Recipe:
    """`base` with some products, or the backend of all, exchanged; see `recipe`."""
    changed: dict[str, Any] = {}
    for name, value in changes.items():
        if name == "backend":
            changed[name] = value
        elif name in _PRODUCTS:
            try:
                changed[name] = _product(getattr(base, name), value)
            except HBFPError as error:
                raise type(error)(f"{name}: {error}") from None
        else:
            known = ", ".join(map(repr, _PRODUCTS))
            raise HBFPError(f"unknown part {name!r} of a recipe: expected {known} or 'backend'")
    return replace(base, **changed, name="custom") if changed else base


def _product(base: MatmulPolicy, value: Any) -> MatmulPolicy:
    if isinstance(value, MatmulPolicy):
        return value
    if isinstance(value, str) and value in _BACKENDS:
        return replace(base, backend=Backend(value))
    if isinstance(value, HBFP | str):
        return base.at(HBFP.parse(value))
    if value is None:
        raise HBFPError("None keeps whole modules in FP32, not one product of three: give a format, or None for all")
    if not isinstance(value, tuple) or len(value) != 2:
        raise HBFPError(f"expected a format, a backend, a pair of formats or a MatmulPolicy; found {value!r}")
    left, right = (
        new if isinstance(new, OperandPolicy) else replace(old, format=new)
        for old, new in zip((base.left, base.right), value, strict=True)
    )
    return replace(base, left=left, right=right)


def _names_formats(changes: Mapping[str, ProductValue]) -> bool:
    return any(name in _PRODUCTS and value not in _BACKENDS for name, value in changes.items())


# --- rules -----------------------------------------------------------------------------------------------------------

RuleValue = HBFP | Recipe | str | Mapping[str, ProductValue] | None


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table of rules, read."""

    pattern: str
    recipe: Recipe | None
    """None: what the pattern matches stays in FP32."""
    matches: Matches = field(repr=False, compare=False)
    """Whether the pattern matches a module's name."""
    pinned: bool = False
    """A layer for which a rule names a format keeps it, whatever a schedule does with the others."""

    def covers(self, name: str) -> bool:
        """Whether the rule speaks of the module called `name`: by its own name, or by that of a module around it."""
        return covers(self.matches, name)


def parse_rules(rules: Mapping[str, RuleValue] | None, base: Recipe) -> tuple[Rule, ...]:
    """Reads a table of rules.

    Args:
        rules: pattern -> value. A pattern is a glob on the module's name ("blocks.*.mlp"), or, after "re:", a regular
            expression that must match all of it. A value is a format (`base` at that format), a recipe or its name, a
            mapping of what is to differ from `base` (the keywords of `recipe`), or None, which keeps FP32. The first
            rule that covers a module decides.
        base: the recipe that a format or a mapping modifies.

    Raises:
        RuleError: a pattern or a value cannot be read.
    """
    parsed = []
    for pattern, value in (rules or {}).items():
        if not isinstance(pattern, str):
            raise RuleError(f"a rule's pattern is a glob or 're:' and a regular expression; found {pattern!r}")
        try:
            chosen, pinned = _rule(value, base)
        except HBFPError as error:
            raise RuleError(f"rule {pattern!r}: {error}") from None
        parsed.append(Rule(pattern, chosen, matcher(pattern), pinned))
    return tuple(parsed)


def _rule(value: RuleValue, base: Recipe) -> tuple[Recipe | None, bool]:
    """The recipe that a rule's value stands for, and whether it names formats that a schedule must leave alone."""
    if value is None:
        return None, False
    if isinstance(value, HBFP):
        return replace(base.at(value), boost=None, name=str(value)), True
    if isinstance(value, Mapping):
        chosen = _changed(base, value)
        if not _names_formats(value):
            return chosen, False
        return replace(chosen, boost=None), True
    chosen = recipe(value)
    return chosen, chosen.boost is None


# --- random streams --------------------------------------------------------------------------------------------------

STEPS = 2**32
SITES = 2**20
INDICES = 2**8
ROLES = 2**4


def stream(step: int, site: int = 0, index: int = 0, role: int = 0) -> int:
    """The 64-bit stream of one operand: step (32 bits, high), site (20), index (8, taken modulo 256), role (4).

    Functional calls take it with role 0 and set the role of each operand themselves.

    Raises:
        HBFPError: a part does not fit its bits.
    """
    for name, value, end in (("step", step, STEPS), ("site", site, SITES), ("role", role, ROLES)):
        if not 0 <= value < end:
            raise HBFPError(f"{name} must be in 0..{end - 1}; found {value}")
    return step << 32 | site << 12 | index % INDICES << 4 | role


# --- what a converted layer carries ----------------------------------------------------------------------------------


class RootState:
    """What the layers of one conversion share.

    The step is held twice. Eager code wants a number. torch.compile would make a number part of the graph and compile
    anew at each step; a tensor without dimensions enters the graph as an input. It is exchanged and never changed in
    place: a graph may have saved it for its backward pass.
    """

    __slots__ = ("_clock", "_step", "automatic", "left", "seed")

    def __init__(self, seed: int = 0, step: int = 0) -> None:
        self._step: int | None
        self._clock: torch.Tensor
        self.seed = seed
        self.step = step
        self.automatic = True
        """Nobody has set the step: each training forward of the converted root advances it."""
        self.left: dict[str, str] = {}
        """Modules that stayed in FP32, with the reason."""

    @property
    def step(self) -> int:
        """The step that random streams are drawn from."""
        if self._step is None:
            self._step = int(self._clock)
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self._clock = torch.scalar_tensor(step, dtype=torch.int64)

    @property
    def clock(self) -> torch.Tensor:
        """The step for a graph: int64, no dimensions."""
        return self._clock

    def set_step(self, step: int) -> None:
        """Raises HBFPError unless step is in 0 .. 2^32 - 1."""
        if not 0 <= step < STEPS:
            raise HBFPError(f"step must be in 0..{STEPS - 1}; found {step}")
        self.step = step
        self.automatic = False

    def advance(self) -> None:
        """Called before each training forward: a new step, unless somebody else counts them.

        A forward that runs inside a backward pass is a recomputation (activation checkpointing) and must draw the bits
        of the pass that it repeats.
        """
        if not self.automatic or is_exporting():
            return
        if is_dynamo_compiling():
            self._clock = ops.next_step(self._clock)
            self._step = None  # written and not read: a graph must not depend on the number
        elif torch._C._current_graph_task_id() == -1:
            self.step = (self.step + 1) % STEPS


@dataclass(slots=True, eq=False)
class LayerState:
    """What one converted layer carries beside its parameters: mutable, copied and pickled with the module."""

    base: Recipe
    """As conversion set it."""
    recipe: Recipe
    """In force now."""
    root: RootState
    site: int = 0
    """The layer's number in the order of conversion; the first of them, where it has several."""
    position: Position = Position.INNER
    pinned: bool = False
    """A rule named the width: schedules leave it alone."""
    solo: bool = False
    """Made by its constructor and not by `convert_`: the layer advances the step itself."""
    undo: tuple[type[nn.Module], LayerState | None] | None = None
    """The class and the state before `convert_`."""

    def stream(self, index: int = 0, part: int = 0) -> int:
        """The stream of the layer's products in this step, role 0; `part` counts the sites of a layer with several.

        Under torch.compile a tensor without dimensions stands for the number, int64 with the same 64 bits; what is
        or-ed to it becomes part of the graph. An exported program has the step of its export.
        """
        low = self.site + part << 12 | (index & 0xFF) << 4
        if is_dynamo_compiling() and not is_exporting():
            return cast(int, self.root.clock << 32 | low)
        step = self.root._step  # as it is almost always: a property takes a call
        return (self.root.step if step is None else step) << 32 | low


def solo_state(value: str | HBFP | Recipe, seed: int, site: int, sites: int = 1) -> LayerState:
    """The state of a layer that a user builds directly, with `sites` sites from `site` on.

    Raises:
        HBFPError: `value` is no recipe, or the sites do not fit 20 bits.
    """
    stream(0, site)
    stream(0, site + sites - 1)
    chosen = recipe(value)
    return LayerState(base=chosen, recipe=chosen, root=RootState(seed=seed), site=site, solo=True)


def layer_states(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerState]]:
    """Name, module and state of each layer under `model` (itself included) that computes in fixed point."""
    for name, module in model.named_modules():
        state: Any = module.__dict__.get("hbfp_state")
        if state is not None:
            yield name, module, state


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight of a converted layer, and how its forward product blocks it."""

    owner: nn.Module
    name: str
    axis: int = -1
    """The axis of the blocks."""
    packs: bool = True
    """Whether encoding the tensor along this axis gives what the forward product reads."""
    groups: int = 0
    """Of the convolution whose kernel it is; 0: it is none."""


def weights_of(module: nn.Module, format: HBFP) -> list[Weight]:
    """The weights of a converted layer, whose forward products block them in `format`."""
    own: Any = getattr(module, "hbfp_weights", None)
    return [Weight(module, "weight")] if own is None else list(own(format))


def root_states(model: nn.Module) -> list[RootState]:
    """The distinct shared states of the layers under `model`.

    Raises:
        ConversionError: there are none.
    """
    roots = {id(state.root): state.root for _, _, state in layer_states(model)}
    if not roots:
        raise ConversionError(
            f"{type(model).__name__} has no layer in fixed point: convert it first, with hbfp.convert_(model)"
        )
    return list(roots.values())
