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


class _OneToOne:
    """A step that makes one tensor of one."""

    old: str
    new: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.old,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.new,)


@dataclass(frozen=True)
class Widen(_OneToOne):
    """One tensor becomes twice as long along `axis`; all of the new second half is `fill`.

    The first projection of a feed-forward that gets a gate: with zeros in the weight and ones in the bias, the new half
    puts out one, and the gated layer computes what the plain one did.
    """

    old: str
    new: str
    axis: int = 0
    fill: float = 0.0
    optional: bool = False

    def inverted(self) -> Narrow:
        return Narrow(self.new, self.old, self.axis, self.fill, self.optional)


@dataclass(frozen=True)
class Narrow(_OneToOne):
    """The way back from `Widen`: the second half goes, which must still be `fill` throughout."""

    old: str
    new: str
    axis: int = 0
    fill: float = 0.0
    optional: bool = False

    def inverted(self) -> Widen:
        return Widen(self.new, self.old, self.axis, self.fill, self.optional)


@dataclass(frozen=True)
class Scale(_OneToOne):
    """A tensor is cut along `axis` into as many equal parts as there are `factors`, each multiplied by its own."""

    old: str
    new: str
    factors: tuple[float, ...]
    axis: int = 0
    optional: bool = False

    def inverted(self) -> Scale:
        return Scale(self.new, self.old, tuple(1 / factor for factor in self.factors), self.axis, self.optional)


@dataclass(frozen=True)
class Centre:
    """A tensor loses its mean along `axis`, as everything does that writes to a stream whose norms subtract it.

    The way back leaves it as it is: under the old norms it does what the old one did.
    """

    old: str
    axis: int = 0
    optional: bool = False

    @property
    def new(self) -> str:
        return self.old

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.old,)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.old,)

    def inverted(self) -> Concat:
        return Concat((self.old,), self.old, optional=self.optional)


@dataclass(frozen=True)
class Reader:
    """What reads a norm: a weight, whose outputs are along `axis`, and a bias.

    Of several layers in one tensor only the `parts` of `of` equal ones read it. `made`: the old model has no bias.
    """

    weight: str
    bias: str
    axis: int = 0
    parts: tuple[int, ...] = (0,)
    of: int = 1
    made: bool = False


@dataclass(frozen=True)
class Fold:
    """The bias of a norm goes: what reads the norm adds `weight @ old` to its own. `optional`: there may be none."""

    old: str
    readers: tuple[Reader, ...]
    optional: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.old, *(r.weight for r in self.readers), *(r.bias for r in self.readers if not r.made))

    @property
    def targets(self) -> tuple[str, ...]:
        return (*(r.weight for r in self.readers), *(r.bias for r in self.readers))

    def inverted(self) -> Unfold:
        return Unfold(self.old, self.readers, self.optional)


@dataclass(frozen=True)
class Unfold:
    """A way back from `Fold`: a bias of the norm with which the old model computes what the new one does.

    It is zero, and the readers keep theirs; unless the old model has no bias there: then it is what gives those.
    """

    old: str  # the bias of the norm, which is made
    readers: tuple[Reader, ...]
    optional: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (*(r.weight for r in self.readers), *(r.bias for r in self.readers))

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.old, *(r.weight for r in self.readers), *(r.bias for r in self.readers if not r.made))

    def inverted(self) -> Fold:
        return Fold(self.old, self.readers, self.optional)


Step = Concat | Split | Widen | Narrow | Scale | Centre | Fold | Unfold


@dataclass(frozen=True)
class Group:
    """What happens to the tensors of one class. Names are relative to the module, wherever it sits in a model.

    A place in a state dict belongs to the group where every source that is not optional stands below it. A `*` in a
    name is any number: `layers.*.norm.bias`; in one step the first stars of all names are the same numbers.
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
        if isinstance(step, Fold | Unfold):
            readers = [_reader_data(reader) for reader in step.readers]
            named: dict[str, Any] = {"do": type(step).__name__.lower(), "bias": step.old, "readers": readers}
            data["steps"].append(named | ({"optional": True} if step.optional else {}))
            continue
        old, new = (list(part) if isinstance(part, tuple) else part for part in (step.old, step.new))
        item: dict[str, Any] = {"do": type(step).__name__.lower(), "old": old, "new": new, "axis": step.axis}
        item |= {name: True for name in ("equal", "optional") if getattr(step, name, False)}
        if isinstance(step, Widen | Narrow):
            item["fill"] = step.fill
        elif isinstance(step, Scale):
            item["factors"] = list(step.factors)
        elif not isinstance(step, Centre) and step.sizes:
            item["sizes"] = list(step.sizes)
        data["steps"].append(item)
    return data


def _reader_data(reader: Reader) -> dict[str, Any]:
    data: dict[str, Any] = {"weight": reader.weight, "bias": reader.bias, "axis": reader.axis}
    data |= {"parts": list(reader.parts), "of": reader.of} if reader.of > 1 else {}
    return data | ({"made": True} if reader.made else {})


def _group(data: Mapping[str, Any]) -> Group:
    return Group(str(data["class"]), tuple(_step(step) for step in data["steps"]))


def _step(data: Mapping[str, Any]) -> Step:
    if data["do"] in ("widen", "narrow", "scale", "centre"):
        return _of_one(data)
    if data["do"] in ("fold", "unfold"):
        readers = tuple(_reader(item) for item in data["readers"])
        kind = Fold if data["do"] == "fold" else Unfold
        return kind(str(data["bias"]), readers, bool(data.get("optional", False)))
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
    if data["do"] == "centre":
        return Centre(names[0], axis, optional)
    if data["do"] == "scale":
        return Scale(*names, tuple(map(float, data["factors"])), axis, optional)
    return (Widen if data["do"] == "widen" else Narrow)(*names, axis, float(data["fill"]), optional)


def _reader(data: Mapping[str, Any]) -> Reader:
    parts = tuple(int(part) for part in data.get("parts", (0,)))
    names = str(data["weight"]), str(data["bias"])
    return Reader(*names, int(data["axis"]), parts, int(data.get("of", 1)), bool(data.get("made", False)))
