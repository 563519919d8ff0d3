"""A weight map meets the names and shapes of a checkpoint: what is joined, cut and kept, or why it cannot be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from modernizer.weights.maps import (
    Centre,
    Concat,
    Fold,
    Group,
    MapError,
    Narrow,
    Scale,
    Split,
    Step,
    Unfold,
    Widen,
)
from modernizer.weights.stars import STAR, spread

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """One step for named tensors: `old` are joined along `axis`, or the one of them is cut into `sizes`.

    With `fill` the one of them becomes as long as `sizes` says, with `factors` its parts are multiplied.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    axis: int
    sizes: tuple[int, ...]  # along the axis, of the parts; of a tensor that stays one, what it shall be
    fill: float | None = None  # what the second half is filled with, or must be filled with to go
    factors: tuple[float, ...] = ()  # of the equal parts of a tensor that stays one
    step: Fold | Unfold | Centre | None = None  # what computes: its names are those of the tensors

    @property
    def is_plain(self) -> bool:
        """Whether a tensor is handed on as it is, under its name."""
        return self.old == self.new and self.step is None and self.fill is None and not self.factors


def resolve(
    groups: Sequence[Group], shapes: Mapping[str, Shape], like: Mapping[str, Shape] | None = None
) -> list[Move]:
    """The moves of one stage, in the order of the first tensor each one takes.

    Names that no group speaks of are moved to themselves. `like` are the shapes of tensors such as shall come out, by
    which a tensor is cut whose parts the map does not tell. Raises MapError where a group does not fit, or two do.
    """
    taken: dict[str, tuple[str, Group]] = {}
    made: dict[str, list[Move]] = {}  # by the first of the old names, in the order of the file
    for group in groups:
        for prefix, steps in _places(group, shapes):
            moves = [move for step in steps if (move := _move(step, prefix, shapes, like or {}))]
            used = [name for move in moves for name in move.old]
            for name in used:
                if name in taken:
                    raise MapError(f"{name}: both {taken[name][1].owner} and {group.owner} would take it")
                taken[name] = (prefix, group)
            for move in moves:
                made.setdefault(move.old[0], []).append(move)
    if not made and any(not step.optional for group in groups for step in group.steps):
        raise MapError(f"no tensor here is one that this map moves ({', '.join(group.owner for group in groups)})")
    result: list[Move] = []
    for name in shapes:
        result += made.get(name, [])
        if name not in taken:
            result.append(Move((name,), (name,), 0, ()))
    times = Counter(name for move in result for name in move.new)
    twice = [name for name, count in times.items() if count > 1]
    if twice:
        raise MapError(f"{twice[0]}: is there already; was this checkpoint migrated before?")
    return result


def _places(group: Group, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Sequence[Step]]]:
    """Where a group applies, and its steps there, without stars."""
    if any(STAR in name for step in group.steps for name in (*step.sources, *step.targets)):
        yield from ((prefix, steps) for prefix, steps in spread(group, shapes))
    else:
        yield from ((prefix, group.steps) for prefix in _prefixes(group, shapes))


def _prefixes(group: Group, shapes: Mapping[str, Shape]) -> list[str]:
    """Where the class sits in the model. A place with only some of the sources is an error where its like has all."""
    wanted = [name for step in group.steps if not step.optional for name in step.sources]
    found: dict[str, set[str]] = {}
    for name in shapes:
        for source in wanted:
            if name == source or name.endswith("." + source):
                found.setdefault(name[: len(name) - len(source)], set()).add(source)
    whole = [prefix for prefix, names in found.items() if len(names) == len(set(wanted))]
    alike = {_pattern(prefix) for prefix in whole}
    for prefix, names in found.items():
        if prefix not in whole and (not whole or _pattern(prefix) in alike):
            missing = next(name for name in wanted if name not in names)
            raise MapError(f"{prefix}{missing}: missing, while {prefix}{min(names)} is there ({group.owner})")
    return whole


def _pattern(prefix: str) -> str:
    return re.sub(r"\d+", "*", prefix)


def outcome(moves: Sequence[Move], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The names and shapes that moves make of these."""
    made: dict[str, Shape] = {}
    for move in moves:
        if move.step is not None:
            made |= _shapes_of(move.step, shapes)
            continue
        old = shapes[move.old[0]]
        lengths = move.sizes if len(move.new) > 1 else (sum(move.sizes),)
        for name, length in zip(move.new, lengths, strict=False):
            made[name] = (*old[: move.axis], length, *old[move.axis + 1 :]) if move.sizes else old
    return made


def _shapes_of(step: Fold | Unfold | Centre, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    made = {name: shapes[name] for name in step.targets if name in shapes}
    for reader in step.readers if not isinstance(step, Centre) else ():
        outputs, inputs = shapes[reader.weight] if reader.axis == 0 else shapes[reader.weight][::-1]
        made[step.old if isinstance(step, Unfold) else reader.bias] = (inputs if isinstance(step, Unfold) else outputs,)
    return made


def _move(step: Step, prefix: str, shapes: Mapping[str, Shape], like: Mapping[str, Shape]) -> Move | None:
    old = tuple(prefix + name for name in step.sources)
    new = tuple(prefix + name for name in step.targets)
    missing = [name for name in old if name not in shapes]
    if isinstance(step, Fold | Unfold):
        return _fold(step, prefix, shapes, like)
    if step.optional and len(missing) == len(old):
        return None
    if missing:
        raise MapError(f"{missing[0]}: missing, while {next(n for n in old if n in shapes)} is there")
    if isinstance(step, Centre):
        if len(shapes[old[0]]) <= step.axis:
            raise MapError(f"{old[0]}: of shape {list(shapes[old[0]])}, which has no axis {step.axis}")
        return Move(old, new, step.axis, (), step=replace(step, old=old[0]))
    if isinstance(step, Widen | Narrow | Scale):
        return _of_one(step, old, new, shapes[old[0]])
    sizes = _joined(step, old, shapes) if isinstance(step, Concat) else _cut(step, old, new, shapes, like)
    return Move(old, new, step.axis, sizes)


def _fold(step: Fold | Unfold, prefix: str, shapes: Mapping[str, Shape], like: Mapping[str, Shape]) -> Move | None:
    """A fold with whole names, if what it folds is there."""
    readers = tuple(replace(r, weight=prefix + r.weight, bias=prefix + r.bias) for r in step.readers)
    whole = replace(step, old=prefix + step.old, readers=readers)
    if isinstance(step, Fold) and step.optional and whole.old not in shapes:
        return None
    if isinstance(step, Unfold) and step.optional:
        if not like:
            raise MapError(
                f"{whole.old}: whether the old model has it is not in the map; any checkpoint of it tells (--like)"
            )
        if whole.old not in like:
            return None
    for name in whole.sources:
        if name not in shapes:
            raise MapError(f"{name}: missing, while {next(n for n in whole.sources if n in shapes)} is there")
    for reader in readers:
        shape = shapes[reader.weight]
        if len(shape) != 2 or shape[reader.axis] % reader.of:
            raise MapError(f"{reader.weight}: of shape {list(shape)}, which is no layer of {reader.of} parts")
        inputs = shape[1 - reader.axis]
        if isinstance(step, Fold) and shapes[whole.old] != (inputs,):
            raise MapError(
                f"{whole.old}: of shape {list(shapes[whole.old])}, while {reader.weight} reads {inputs} features"
            )
    return Move(whole.sources, whole.targets, 0, (), step=whole)


def _of_one(step: Widen | Narrow | Scale, old: tuple[str, ...], new: tuple[str, ...], shape: Shape) -> Move:
    if len(shape) <= step.axis:
        raise MapError(f"{old[0]}: of shape {list(shape)}, which has no axis {step.axis}")
    length = shape[step.axis]
    parts = {Widen: 1, Narrow: 2}.get(type(step), len(getattr(step, "factors", ())))
    if length % parts:
        raise MapError(f"{old[0]}: {length} long, which {parts} equal parts cannot be")
    if isinstance(step, Scale):
        return Move(old, new, step.axis, (length,), factors=step.factors)
    wanted = 2 * length if isinstance(step, Widen) else length // 2
    return Move(old, new, step.axis, (wanted,), fill=step.fill)


def _joined(step: Concat, old: Sequence[str], shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    if len(old) == 1 and not step.sizes:  # a rename, of numbers too
        return ()
    first = shapes[old[0]]
    for name in old:
        shape = shapes[name]
        if len(shape) <= step.axis:
            raise MapError(f"{name}: of shape {list(shape)}, which has no axis {step.axis}")
        if _others(shape, step.axis) != _others(first, step.axis):
            raise MapError(f"{name}: of shape {list(shape)}, which does not fit {old[0]} of shape {list(first)}")
    sizes = tuple(shapes[name][step.axis] for name in old)
    if step.equal and len(set(sizes)) > 1:
        raise MapError(f"{old[0]}, …: the lengths {list(sizes)} differ, and the new model wants equal ones")
    if step.sizes and sizes != step.sizes:
        raise MapError(f"{old[0]}, …: the lengths are {list(sizes)}, the map says {list(step.sizes)}")
    return sizes


def _cut(
    step: Split, old: Sequence[str], new: Sequence[str], shapes: Mapping[str, Shape], like: Mapping[str, Shape]
) -> tuple[int, ...]:
    if len(step.new) == 1 and not step.sizes:
        return ()
    shape = shapes[old[0]]
    if len(shape) <= step.axis:
        raise MapError(f"{old[0]}: of shape {list(shape)}, which has no axis {step.axis}")
    total, count = shape[step.axis], len(step.new)
    if step.sizes:
        if sum(step.sizes) != total:
            raise MapError(f"{old[0]}: {total} long, the map says {' + '.join(map(str, step.sizes))}")
        return step.sizes
    if not step.equal and count > 1:
        parts = [like[name] for name in new if name in like]
        if len(parts) < count:
            raise MapError(
                f"{old[0]}: how long its {count} parts are depends on the model and is not in the map; any checkpoint"
                " of the old model tells (--like)"
            )
        if any(len(part) != len(shape) or _others(part, step.axis) != _others(shape, step.axis) for part in parts):
            raise MapError(f"{old[0]}: of shape {list(shape)}, which does not fit {new[0]} of shape {list(parts[0])}")
        sizes = tuple(part[step.axis] for part in parts)
        if sum(sizes) != total:
            raise MapError(f"{old[0]}: {total} long, while its parts were {' + '.join(map(str, sizes))}")
        return sizes
    if total % count:
        raise MapError(f"{old[0]}: {total} long, which {count} equal parts cannot be")
    return (total // count,) * count


def _others(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]
