"""The state of an optimizer moves with its parameters, where these are only renamed, joined and cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modernizer.weights.apply import carry, shapes_of, wanted
from modernizer.weights.maps import MapError, WeightMap
from modernizer.weights.resolve import Shape, outcome, resolve

# What is kept for each number of a parameter, by what the groups of an optimizer's state are known by.
KINDS = {
    "Adam": (frozenset({"betas", "eps", "amsgrad"}), frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"})),
    "SGD": (frozenset({"momentum", "dampening", "nesterov"}), frozenset({"momentum_buffer"})),
}
COUNTERS = frozenset({"step"})
DROP = "--drop-optimizer leaves it out"


def is_optimizer(value: object) -> bool:
    """Whether a value is what `Optimizer.state_dict()` gives."""
    if not isinstance(value, Mapping) or not {"state", "param_groups"} <= value.keys():
        return False
    groups = value["param_groups"]
    return isinstance(groups, list) and all(isinstance(g, Mapping) and "params" in g for g in groups) and bool(groups)


@dataclass(frozen=True)
class Slot:
    """One parameter of an optimizer: its number there, its group, and what is kept for it."""

    number: int
    group: int
    kept: Mapping[str, Any]

    @property
    def shape(self) -> Shape | None:
        """The parameter's shape, None where nothing is kept that would tell."""
        return next((tuple(v.shape) for k, v in self.kept.items() if k not in COUNTERS and isinstance(v, Tensor)), None)


@dataclass(frozen=True)
class Change:
    """What `migrate` does to a model: its old and new state, and the map between them.

    `like` is a state such as comes out, which tells how long parts are that are cut. `order` are the names of the new
    state in the model's order, where that is known.
    """

    weights: WeightMap
    old: Mapping[str, Any]
    new: Mapping[str, Any]
    like: Mapping[str, Any] | None = None
    order: Sequence[str] = ()


def carry_optimizer(change: Change, optimizer: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
    """The state of the same optimizer over the parameters of the rewritten model.

    Training goes on as it would have, bit for bit: Adam, AdamW and SGD treat each number by itself. `names` are those
    of the old parameters in the order in which the optimizer got them; without, that is `model.parameters()`.

    Raises:
        MapError: another optimizer, a map that computes, or it cannot be told which state belongs to which parameter.
    """
    fields = _fields(optimizer)
    slots = list(_slots(optimizer))
    if not optimizer["state"].keys() <= {slot.number for slot in slots}:
        raise MapError(f"the optimizer keeps something of parameters that are in none of its groups; {DROP}")
    order, is_sorted = _assign(slots, change.old, names or _own_names(optimizer))
    first = dict(zip(order, slots, strict=True))
    by_name = {name: first[twin] for name, twin in _twins(change.old).items() if twin in first}
    origins = lineage(change)
    _check_whole(origins, by_name, fields)
    kept = {field: _kept(change, by_name, field) for field in fields}
    placed: list[list[tuple[str, dict[str, Any]]]] = [[] for _ in optimizer["param_groups"]]
    for name in _new_order(change, is_sorted):
        parts = [by_name[old] for old in origins.get(name, ()) if old in by_name]
        if parts:
            state = {field: kept[field][name] for field in fields if field in parts[0].kept}
            placed[parts[0].group].append((name, {**_counters(name, parts), **state}))
    return _numbered(optimizer, placed)


def _new_order(change: Change, is_sorted: bool) -> list[str]:
    """The new parameters in the order in which the optimizer will be given them."""
    names = _first_names(change.new)
    if is_sorted:
        return sorted(names)
    return [name for name in change.order if name in names] if change.order else list(names)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of a state dict as a model lists them: of each module its own first, then those of its parts.

    Tensors that were joined stand where the first of them did, among what is left of other modules.
    """
    root: dict[str, Any] = {}
    for name in names:
        *path, leaf = name.split(".")
        inside = root
        for part in path:
            inside = inside.setdefault(f"{part}.", {})
        inside[leaf] = name
    return list(_listed(root))


def _listed(module: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for key, name in module.items() if not key.endswith("."))
    for key, part in module.items():
        if key.endswith("."):
            yield from _listed(part)


def _check_whole(origins: Mapping[str, Sequence[str]], by_name: Mapping[str, Slot], fields: frozenset[str]) -> None:
    """Raises MapError where the optimizer knows only some parts of a new parameter, or treats them differently."""
    for name, parts in origins.items():
        known = [by_name.get(part) for part in parts]
        alike = {
            (slot.group, *sorted(fields & slot.kept.keys())) if slot is not None else None for slot in known
        }  # fmt: skip
        if len(alike) > 1:
            raise MapError(f"{name}: the optimizer treats its parts {', '.join(parts)} differently; {DROP}")


def lineage(change: Change) -> dict[str, tuple[str, ...]]:
    """The old tensors that each new one is made of. Raises MapError where a map does more than join and cut."""
    shapes = shapes_of(change.old)
    origins: dict[str, tuple[str, ...]] = {name: (name,) for name in shapes}
    for groups, target in zip(change.weights.stages, wanted(change.weights, change.like), strict=True):
        moves = resolve(groups, shapes, target)
        for move in moves:
            if move.step is not None or move.factors or move.fill is not None:
                raise MapError(f"{move.new[0]}: is computed anew, so what the optimizer knows of it is void; {DROP}")
        origins = {new: tuple(o for old in move.old for o in origins[old]) for move in moves for new in move.new}
        shapes = outcome(moves, shapes)
    return origins


# -- which state belongs to which parameter


def _fields(optimizer: Mapping[str, Any]) -> frozenset[str]:
    for keys, fields in KINDS.values():
        if all(keys <= group.keys() for group in optimizer["param_groups"]):
            kept = {key for state in optimizer["state"].values() for key in state}
            if kept <= fields | COUNTERS:
                return fields
    raise MapError(f"the optimizer's state is not that of torch's Adam, AdamW or SGD; {DROP}")


def _slots(optimizer: Mapping[str, Any]) -> Iterator[Slot]:
    for index, group in enumerate(optimizer["param_groups"]):
        for number in group["params"]:
            kept = optimizer["state"].get(number, {})
            yield Slot(number, index, {k: v for k, v in kept.items() if v is not None})


def _own_names(optimizer: Mapping[str, Any]) -> list[str] | None:
    """The names that newer optimizers keep, where they were given any."""
    names = [name for group in optimizer["param_groups"] for name in group.get("param_names", ())]
    return names if len(names) == sum(len(group["params"]) for group in optimizer["param_groups"]) else None


def _twins(state: Mapping[str, Any]) -> dict[str, str]:
    """What may be a parameter, numbers with a fraction, each with the first of the names that share its memory."""
    found: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name in in_order(state):
        value = state[name]
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            memory = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
            found[name] = seen.setdefault(memory if value.numel() else name, name)
    return found


def _first_names(state: Mapping[str, Any]) -> dict[str, Shape]:
    """The parameters that a model may have, in its order, of those that share memory the first."""
    return {name: tuple(state[name].shape) for name, twin in _twins(state).items() if name == twin}


def _assign(slots: Sequence[Slot], state: Mapping[str, Any], names: Sequence[str] | None) -> tuple[list[str], bool]:
    """The parameter of each slot, and whether they came sorted by name instead of in the model's order."""
    shapes = _first_names(state)
    if names is not None:
        return _named(slots, shapes, names)
    order = _embedded(slots, list(shapes), shapes)
    if order is None:
        raise _unknown("its parameters are not those of this model, in its order")
    if len({slot.group for slot in slots}) > 1:
        other = _embedded(slots, sorted(shapes), shapes)
        if other is not None and other != order:
            raise _unknown("it has several groups, and how their parameters are ordered cannot be told")
    return order, False


def _unknown(why: str) -> MapError:
    return MapError(f"the optimizer: {why}; name them in its order (--optimizer-names), or {DROP}")


def _named(slots: Sequence[Slot], shapes: Mapping[str, Shape], names: Sequence[str]) -> tuple[list[str], bool]:
    if len(names) != len(slots) or len(set(names)) < len(names):
        raise MapError(f"the optimizer has {len(slots)} parameters, and {len(set(names))} names are given")
    for slot, name in zip(slots, names, strict=True):
        if name not in shapes:
            raise MapError(f"{name}: is named as a parameter of the optimizer, and not in the model")
        if slot.shape is not None and slot.shape != shapes[name]:
            raise MapError(f"{name}: of shape {list(shapes[name])}, while the optimizer has {list(slot.shape)} for it")
    places = {name: place for place, name in enumerate(shapes)}
    by_group = [[n for s, n in zip(slots, names, strict=True) if s.group == g] for g in {s.group for s in slots}]
    if all(group == sorted(group, key=places.__getitem__) for group in by_group):
        return list(names), False
    if all(group == sorted(group) for group in by_group):
        return list(names), True
    raise MapError(f"the optimizer's parameters are neither in the model's order nor sorted by name; {DROP}")


def _embedded(slots: Sequence[Slot], names: Sequence[str], shapes: Mapping[str, Shape]) -> list[str] | None:
    """The one way in which the slots of each group follow each other among names of their shapes; None without any.

    Raises MapError where there are several.
    """
    result: dict[int, str] = {}
    groups = sorted({slot.group for slot in slots})
    used = [{slot.shape for slot in slots if slot.group == g} for g in groups]
    if len(groups) > 1 and (any(None in u for u in used) or sum(map(len, used)) > len(set().union(*used))):
        raise _unknown("parameters of one shape are in several groups")
    for group, shapes_here in zip(groups, used, strict=True):
        own = [slot for slot in slots if slot.group == group]
        among = [n for n in names if shapes[n] in shapes_here] if len(groups) > 1 else list(names)
        first = _greedy(own, among, shapes)
        last = _greedy(own[::-1], among[::-1], shapes)
        if first is None or last is None:
            return None
        if first != last[::-1]:
            where = next(a for a, b in zip(first, last[::-1], strict=True) if a != b)
            raise _unknown(f"whether {where} is one of its parameters cannot be told")
        result.update(zip((slot.number for slot in own), first, strict=True))
    return [result[slot.number] for slot in slots]


def _greedy(slots: Sequence[Slot], names: Sequence[str], shapes: Mapping[str, Shape]) -> list[str] | None:
    """The earliest names that slots can belong to, one after the other."""
    found: list[str] = []
    rest = iter(names)
    for slot in slots:
        name = next((n for n in rest if slot.shape is None or shapes[n] == slot.shape), None)
        if name is None:
            return None
        found.append(name)
    return found


# -- what becomes of it


def _kept(change: Change, by_name: Mapping[str, Slot], field: str) -> dict[str, Any]:
    """One of the tensors that are kept, for all new parameters, joined and cut as the parameters are."""
    state = {
        name: by_name[name].kept[field] if name in by_name and field in by_name[name].kept else _blank(value)
        for name, value in change.old.items()
        if isinstance(value, Tensor)
    }
    return dict(carry(change.weights, state, change.like).state)


def _blank(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=torch.float32, device="meta")


def _counters(name: str, parts: Sequence[Slot]) -> dict[str, Any]:
    """The steps that were taken, which must be as many for all parts."""
    found = [{key: part.kept[key] for key in COUNTERS if key in part.kept} for part in parts]
    if any(float(f[key]) != float(found[0].get(key, -1)) for f in found for key in f) or any(
        f.keys() != found[0].keys() for f in found
    ):
        raise MapError(f"{name}: the optimizer has taken different numbers of steps for its parts; {DROP}")
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found[0].items()}


def _numbered(optimizer: Mapping[str, Any], placed: Sequence[Sequence[tuple[str, dict[str, Any]]]]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for group, members in zip(optimizer["param_groups"], placed, strict=True):
        numbers = range(number, number + len(members))
        number += len(members)
        state.update({i: kept for i, (_, kept) in zip(numbers, members, strict=True) if kept})
        named = {"param_names": [name for name, _ in members]} if "param_names" in group else {}
        groups.append({**group, **named, "params": list(numbers)})
    return {**optimizer, "state": state, "param_groups": groups}
