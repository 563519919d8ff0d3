"""What takes the place of a plain activation: SwiGLU, or a gate that keeps what was trained; and the weights of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from codemods._swiglu_places import Refused
from modernizer.graph.query import is_const, origin
from modernizer.graph.values import Const, Module
from modernizer.model_map.feed_forward import CHOSEN, FeedForward
from modernizer.model_map.projection import Projection, own_parameters
from modernizer.weights import Group, Scale, Step, WeightMap, Widen

# silu(beta x) / beta comes nearest to a trained layer's activation with these (for quick GELU it is the same function).
BETAS = {"relu": 8.0, "gelu": 1.702, "gelu (tanh)": 1.702, "quick gelu": 1.702}
KEPT = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu (tanh)": "gelu_tanh",
    "quick gelu": "quick_gelu",
    "elu": "elu",
    "selu": "selu",
}


@dataclass(frozen=True)
class Gate:
    """A gated activation as text. `beta` bridges from the old activation, `kept` is the old activation itself."""

    axis: int = -1
    beta: float = 1.0
    kept: str = ""

    @property
    def function(self) -> str:
        return "gated" if self.kept else "swiglu"

    @property
    def module(self) -> str:
        return "Gated" if self.kept else "GatedSiLU"

    @property
    def keywords(self) -> list[str]:
        """What the function needs besides its operand."""
        given = [f'activation="{self.kept}"'] if self.kept else []
        given += [f"dim={self.axis}"] if self.axis != -1 else []
        return given + ([f"beta={self.beta}"] if self.beta != 1.0 else [])

    @property
    def arguments(self) -> list[str]:
        """The same where nothing is in the way of a place."""
        return [text.removeprefix("activation=") for text in self.keywords]


@dataclass(frozen=True)
class Wishes:
    """What the user asked for.

    `keep_hidden`: the old hidden width. `keep_weights`: a layer that can compute what the old one did, whose trained
    weights are carried over; `keep_activation`: exactly so, with the old activation under the gate.
    """

    keep_hidden: bool = False
    keep_weights: bool = False
    keep_activation: bool = False

    @classmethod
    def of(cls, options: Mapping[str, bool]) -> Wishes:
        activation = bool(options.get("keep_activation", False))
        weights = activation or bool(options.get("keep_weights", False))
        return cls(weights or bool(options.get("keep_hidden", False)), weights, activation)

    def gate(self, made: FeedForward) -> Gate:
        """The gate for one feed-forward; raises Refused where none computes what it did."""
        axis = made.first.axis
        return self.gate_for(made.activations, axis) if self.keep_weights else Gate(axis)

    def gate_for(self, activations: Collection[str], axis: int = -1) -> Gate:
        """The gate that can do what one of the activations does, whichever of them it is."""
        if CHOSEN in activations:
            raise Refused("which activation it has is decided when it is built, and its weights go with it",
                          "write ReLU or GELU out, or leave out --keep-weights")  # fmt: skip
        names = sorted(activations)
        if self.keep_activation:
            if len(names) != 1 or names[0] not in KEPT:
                raise Refused(f"no gate is known that keeps {' or '.join(names)} as it is")
            return Gate(axis, kept=KEPT[names[0]])
        betas = {BETAS.get(name) for name in names}
        if len(betas) != 1 or None in betas:
            raise Refused(f"SiLU cannot stand for {' or '.join(names)}", "--keep-activation keeps it under the gate")
        (beta,) = betas
        return Gate(axis, beta=beta or 1.0)


# -- weights


def check_bias(projection: Projection) -> None:
    """Raises Refused where a projection has no bias for sure: nothing could be one throughout then."""
    module, name = projection.module, f"`{projection.module.name or projection.module.class_name}`"
    if projection.kind == "own":
        if own_parameters(projection) is None:
            raise Refused(f"where the weight and bias of {name} lie in a checkpoint cannot be told")
    elif is_const(module.args.get("bias", Const(True)), False):
        raise Refused(f"{name} has no bias, and the unit gate needs one", "give it a bias of zeros")


def place_of(module: Module) -> Place:
    """Where the code makes a module, and what holds it: all that it makes there are alike in every model."""
    chain: list[object] = []
    part: Module | None = origin(module)
    while part is not None:
        chain.append(part.call if part.cls is None else part.cls.node)
        chain += ["*" if _is_repeated(part) else part.name] if part.name else []
        part = origin(part.owner) if part.owner is not None else None
    return tuple(chain)


Place = tuple[object, ...]


def widening(members: Iterable[FeedForward], upgraded: Collection[Place], modules: Collection[Module]) -> WeightMap:
    """How the first projections get a gate of ones: a zero weight and a bias of one for the second half of each.

    `upgraded` are the places of all first projections that are upgraded, `modules` all modules of the program.
    """
    groups: dict[Group, None] = {}
    for weight, bias, axis in _parameters(members, upgraded, modules):
        steps: tuple[Step, ...] = (Widen(weight, weight, axis), Widen(bias, bias, 0, fill=1.0))
        groups[Group("feed-forward", steps)] = None
    return WeightMap.of(*groups)


def scaling(
    members: Iterable[FeedForward], beta: float, upgraded: Collection[Place], modules: Collection[Module]
) -> WeightMap:
    """How gates take their beta up: `silu(beta z) / beta * v` is `silu(z) * v` of beta times as large a gate and a
    value that is divided by it."""
    groups: dict[Group, None] = {}
    factors = (beta, 1 / beta)
    for weight, bias, axis in _parameters(members, upgraded, modules):
        steps: tuple[Step, ...] = (Scale(weight, weight, factors, axis), Scale(bias, bias, factors, 0, optional=True))
        groups[Group("feed-forward", steps)] = None
    return WeightMap.of(*groups)


def _parameters(
    members: Iterable[FeedForward], upgraded: Collection[Place], modules: Collection[Module]
) -> Iterator[tuple[str, str, int]]:
    """The weight and bias of each first projection, by names that tell them from others, and its axis of outputs."""
    for made in members:
        name = _name(origin(made.first.module), upgraded, modules)
        own = own_parameters(made.first)
        if own is None and made.first.kind == "own":
            raise Refused(f"where the weight and bias of `{name}` lie in a checkpoint cannot be told")
        weight, bias, axis = own or ("weight", "bias", 0)
        yield f"{name}.{weight}", f"{name}.{bias}", axis


def _name(module: Module, upgraded: Collection[Place], modules: Collection[Module]) -> str:
    """The shortest end of a module's path in a state dict by which no other module of the program is called."""
    known = {place[:length] for place in upgraded for length in range(1, len(place) + 1)}
    others = [f".{'.'.join(reversed(list(_path(m))))}" for m in modules if m.name and place_of(m) not in known]
    found = ""
    for part in _path(module, until_repeated=True):
        found = f"{part}.{found}" if found else part
        if part.isdigit():
            continue  # a place in a list says nothing without the list
        if not any(other.endswith("." + found) for other in others):
            return found
    raise Refused("a checkpoint could not tell it from another part of the program",
                  "give its first projection a name of its own")  # fmt: skip


def _path(module: Module, until_repeated: bool = False) -> Iterator[str]:
    """The parts of a module's name, innermost first; up to where it is one of several that are made alike."""
    part: Module | None = origin(module)
    while part is not None and part.name:
        if until_repeated and _is_repeated(part):
            return
        yield part.name
        part = origin(part.owner) if part.owner is not None else None


def _is_repeated(part: Module) -> bool:
    """Whether it lies in a list of several that are made alike."""
    owner = part.owner
    alike = [m for m in owner.children.items if m is not part] if owner and owner.children else []
    return any(isinstance(m, Module) and origin(m).call is part.call for m in alike)
