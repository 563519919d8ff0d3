"""Names with stars meet those of a checkpoint: `layers.*.norm.bias` stands for that of every layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from modernizer.weights.maps import Centre, Concat, Fold, Group, MapError, Reader, Split, Step, Unfold

STAR = "*"


def spread(group: Group, names: Mapping[str, object]) -> Iterator[tuple[str, Sequence[Step]]]:
    """Each place of the group, with a step for each of the numbers that the stars stand for there.

    Raises MapError where only some of its tensors are there.
    """
    wanted = dict.fromkeys(name for step in group.steps if not step.optional for name in step.sources)
    found: dict[str, set[str]] = {}
    for pattern in wanted or dict.fromkeys(name for step in group.steps for name in step.sources):
        for name in names:
            match = re.fullmatch(rf"(|.*\.){_expression(pattern)}", name)
            if match:
                found.setdefault(match[1], set()).add(pattern)
    whole = [prefix for prefix, patterns in found.items() if len(patterns) >= len(wanted)]
    if found and not whole:
        prefix, patterns = max(found.items(), key=lambda item: len(item[1]))
        missing = next(pattern for pattern in wanted if pattern not in patterns)
        raise MapError(f"{prefix}{missing}: missing, while {prefix}{min(patterns)} is there ({group.owner})")
    for prefix in whole:
        for pattern in wanted:
            _check_alike(pattern, prefix, names)
        yield prefix, [each for step in group.steps for each in _each(step, prefix, names)]


def _check_alike(pattern: str, prefix: str, names: Mapping[str, object]) -> None:
    """Every element of a list has a tensor that one of them has, or they are not all alike."""
    head, star, _ = pattern.partition(STAR)
    if star:
        having = {numbers[0] for numbers in _numbers(pattern, prefix, names)}
        expression = re.compile(rf"{re.escape(prefix + head)}(\d+)\..*")
        there = {match[1] for name in names if (match := expression.fullmatch(name))}
        if there != having:
            number = min(there - having, key=int)
            raise MapError(f"{prefix}{pattern.replace(STAR, number, 1)}: missing, so these layers are not all alike")


def _expression(pattern: str) -> str:
    return r"(\d+)".join(re.escape(part) for part in pattern.split(STAR))


def _numbers(pattern: str, prefix: str, names: Mapping[str, object]) -> list[tuple[str, ...]]:
    """What the stars of a name are, each way that there is."""
    expression = re.compile(re.escape(prefix) + _expression(pattern))
    return [match.groups() for name in names if (match := expression.fullmatch(name))]


def _filled(pattern: str, numbers: Sequence[str]) -> str:
    """A name with its first stars replaced; others stay."""
    parts = pattern.split(STAR)
    count = min(len(numbers), len(parts) - 1)
    filled = "".join(part + number for part, number in zip(parts, numbers[:count], strict=False))
    return filled + STAR.join(parts[count:])


def _each(step: Step, prefix: str, names: Mapping[str, object]) -> Iterator[Step]:
    if isinstance(step, Fold | Unfold):
        yield from _folds(step, prefix, names)
    elif isinstance(step, Centre):
        for numbers in _numbers(step.old, prefix, names):
            yield replace(step, old=_filled(step.old, numbers))
    elif isinstance(step, Concat) and len(step.old) == 1:
        for numbers in _numbers(step.old[0], prefix, names):
            yield replace(step, old=(_filled(step.old[0], numbers),), new=_filled(step.new, numbers))
    elif isinstance(step, Split) and len(step.new) == 1:
        for numbers in _numbers(step.old, prefix, names):
            yield replace(step, old=_filled(step.old, numbers), new=(_filled(step.new[0], numbers),))
    else:
        yield step


def _folds(step: Fold | Unfold, prefix: str, names: Mapping[str, object]) -> Iterator[Step]:
    count = step.old.count(STAR)
    by = step.old if isinstance(step, Fold) else step.readers[0].weight
    for numbers in dict.fromkeys(found[:count] for found in _numbers(by, prefix, names)):
        readers: list[Reader] = []
        for reader in step.readers:
            weight, bias = _filled(reader.weight, numbers), _filled(reader.bias, numbers)
            more = _numbers(weight, prefix, names) if STAR in weight else [()]
            readers += [replace(reader, weight=_filled(weight, m), bias=_filled(bias, m)) for m in more]
        yield replace(step, old=_filled(step.old, numbers), readers=tuple(readers))
