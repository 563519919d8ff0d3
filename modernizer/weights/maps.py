"""Weight maps as data, as the rules emit them: which tensors of a class become which, forwards and backwards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = "modernizer weight map"
VERSION = 1


class MapError(Exception):
    """A weight map that cannot be read, or that does not fit a checkpoint. `str()` of it is for the user."""


@dataclass(frozen=True)
class Concat:
    """Several tensors become one, end to end along `axis`. With one old name it is a rename.

    `equal`: all parts are equally long, so that the way back needs no `sizes`. `optional`: they may all be absent,
    as the biases of layers that were made without.
    """

    old: tuple[str, ...]
    new: str
    axis: int = 0
    equal: bool = True
    optional: bool = False
    sizes: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        return self.old

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.new,)

    def inverted(self) -> Split:
        return Split(self.new, self.old, self.axis, self.equal, self.optional, self.sizes)


@dataclass(frozen=True)
class Split:
    """The way back from `Concat`: one tensor is cut along `axis`."""

    old: str
    new: tuple[str, ...]
    axis: int = 0
    equal: bool = True
    optional: bool = False
    sizes: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.old,)

    @property
    def targets(self) -> tuple[str, ...]:
        return self.new

    def inverted(self) -> Concat:
        return Concat(self.new, self.old, self.axis, self.equal, self.optional, self.sizes)


@dataclass(frozen=True)
class Widen:
    """One tensor becomes twice as long along `axis`; all of the new second half is `fill`.

    The first projection of a feed-forward that gets a gate: with zeros in the weight and ones in the bias, the new half
    puts out one, and the gated layer computes what the plain one did.
    """

    old: str
    new: str
    axis: int = 0
    fill: float = 0.0
    optional: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.old,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.new,)

    def inverted(self) -> Narrow:
        return Narrow(self.new, self.old, self.axis, self.fill, self.optional)


@dataclass(frozen=True)
class Narrow:
    """The way back from `Widen`: the second half goes, which must still be `fill` throughout."""

    old: str
    new: str
    axis: int = 0
    fill: float = 0.0
    optional: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.old,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.new,)

    def inverted(self) -> Widen:
        return Widen(self.new, self.old, self.axis, self.fill, self.optional)


@dataclass(frozen=True)
class Scale:
    """A tensor is cut along `axis` into as many equal parts as there are `factors`, each multiplied by its own."""

    old: str
    new: str
    factors: tuple[float, ...]
    axis: int = 0
    optional: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.old,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.new,)

    def inverted(self) -> Scale:
        return Scale(self.new, self.old, tuple(1 / factor for factor in self.factors), self.axis, self.optional)


Step = Concat | Split | Widen | Narrow | Scale


@dataclass(frozen=True)
class Group:
    """What happens to the tensors of one class. Names are relative to the module, wherever it sits in a model.

    A place in a state dict belongs to the group where every source that is not optional stands below it.
    """

    owner: str  # the class, for people
    steps: tuple[Step, ...]

    def inverted(self) -> Group:
        return Group(self.owner, tuple(step.inverted() for step in self.steps))


@dataclass(frozen=True)
class WeightMap:
    """The groups of an upgrade. `stages` run one after the other, the groups of a stage at once."""

    stages: tuple[tuple[Group, ...], ...] = field(default=())

    @classmethod
    def of(cls, *groups: Group) -> WeightMap:
        """The map of one upgrade."""
        return cls((tuple(groups),))

    def inverted(self) -> WeightMap:
        """The way back."""
        return WeightMap(tuple(tuple(group.inverted() for group in stage) for stage in reversed(self.stages)))

    def to_json(self, rules: Iterable[str] = ()) -> str:
        """The file's text: the same map always gives the same bytes."""
        stages = [[_group_data(group) for group in stage] for stage in self.stages]
        data = {"format": FORMAT, "version": VERSION, "rules": list(rules), "stages": stages}
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> WeightMap:
        """The map in a file's text. Raises MapError where it is none, or of a later version."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise MapError(f"not a weight map: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise MapError("not a weight map")
        if data.get("version") != VERSION:
            raise MapError(f"a weight map of version {data.get('version')}; this program reads version {VERSION}")
        try:
            return cls(tuple(tuple(_group(group) for group in stage) for stage in data["stages"]))
        except (KeyError, TypeError, ValueError) as error:
            raise MapError(f"a damaged weight map: {type(error).__name__} {error}") from error


def compose(maps: Iterable[WeightMap]) -> WeightMap:
    """One map that does what these do one after the other."""
    return WeightMap(tuple(stage for item in maps for stage in item.stages))


def together(maps: Iterable[WeightMap]) -> WeightMap:
    """One map of upgrades that were made at the same time. What several of them say is said once."""
    stages: list[dict[Group, None]] = []
    for item in maps:
        stages += [{} for _ in item.stages[len(stages) :]]
        for stage, groups in zip(stages, item.stages, strict=False):
            stage.update(dict.fromkeys(groups))
    return WeightMap(tuple(map(tuple, stages)))


def _group_data(group: Group) -> dict[str, Any]:
    data: dict[str, Any] = {"class": group.owner, "steps": []}
    for step in group.steps:
        old, new = (list(part) if isinstance(part, tuple) else part for part in (step.old, step.new))
        item: dict[str, Any] = {"do": type(step).__name__.lower(), "old": old, "new": new, "axis": step.axis}
        item |= {name: True for name in ("equal", "optional") if getattr(step, name, False)}
        if isinstance(step, Widen | Narrow):
            item["fill"] = step.fill
        elif isinstance(step, Scale):
            item["factors"] = list(step.factors)
        elif step.sizes:
            item["sizes"] = list(step.sizes)
        data["steps"].append(item)
    return data


def _group(data: Mapping[str, Any]) -> Group:
    return Group(str(data["class"]), tuple(_step(step) for step in data["steps"]))


def _step(data: Mapping[str, Any]) -> Step:
    if data["do"] in ("widen", "narrow", "scale"):
        return _of_one(data)
    rest: dict[str, Any] = {
        "axis": int(data["axis"]),
        "equal": bool(data.get("equal", False)),
        "optional": bool(data.get("optional", False)),
        "sizes": tuple(int(size) for size in data.get("sizes", ())),
    }
    if data["do"] == "concat" and isinstance(data["new"], str) and isinstance(data["old"], list):
        return Concat(tuple(map(str, data["old"])), data["new"], **rest)
    if data["do"] == "split" and isinstance(data["old"], str) and isinstance(data["new"], list):
        return Split(data["old"], tuple(map(str, data["new"])), **rest)
    raise ValueError(f"an unknown step, {data['do']}")


def _of_one(data: Mapping[str, Any]) -> Step:
    """A step that makes one tensor of one."""
    if not isinstance(data["old"], str) or not isinstance(data["new"], str):
        raise ValueError(f"{data['do']} takes one name and gives one")
    names, axis, optional = (data["old"], data["new"]), int(data["axis"]), bool(data.get("optional", False))
    if data["do"] == "scale":
        return Scale(*names, tuple(map(float, data["factors"])), axis, optional)
    return (Widen if data["do"] == "widen" else Narrow)(*names, axis, float(data["fill"]), optional)
