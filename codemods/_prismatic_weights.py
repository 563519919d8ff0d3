"""How trained weights reach the experts: every tensor of a wrapped module moves below `expert`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from codemods._prismatic_places import Holder, children_of, maker, used_by
from modernizer.graph.query import alternatives, origin
from modernizer.graph.values import Class, Many, Module, Node
from modernizer.model_map import ModelMap
from modernizer.syntax import mentions
from modernizer.weights import Concat, Group, WeightMap

_DEPTH = 6  # how many names of the path to a module may be needed to tell it from others
_WEIGHTS = ("weight", "bias")


def weight_map(model: ModelMap, holders: Sequence[Holder]) -> WeightMap | None:
    """The map of all modules of one class that are wrapped; None where they cannot be told from others by their names.

    Then nothing is lost: a Prismatic module takes the old names too.
    """
    calls = {holder.call for holder in holders}
    wrapped = [m for m in model.graph.machine.modules if maker(model, m)[0] in calls]
    found: dict[frozenset[str], dict[str, Concat]] = {}  # by the names that a place must have
    for holder in holders:
        steps = _steps(model, holder, wrapped)
        if steps is None:
            return None
        needed = frozenset(step.new for step in steps if not step.optional)
        known = found.setdefault(needed, {})
        for step in steps:
            known.setdefault(step.new, step)
    return WeightMap.of(*(Group(holders[0].cls.name, tuple(steps.values())) for steps in found.values()))


def _steps(model: ModelMap, holder: Holder, wrapped: Sequence[Module]) -> list[Concat] | None:
    first, own = holder.modules[0], [m for m in wrapped if m.owner and maker(model, m)[0] is holder.call]
    if any(items.open for items in _containers(first)):
        return None
    ran = {id(n.module) for run in holder.runs for n in used_by(model, run)}
    needed = [f"{path}.weight" for path, linear in holder.linears if id(linear) in ran]
    needed = [name for name in needed if _has(first, name, certain=True)]
    if not needed:
        return None
    for depth in range(_DEPTH):
        paths = {_path(m, depth) for m in own}
        if None in paths or len(paths) != 1:
            continue
        path = paths.pop()
        if not _are_others(model, wrapped, path or "", needed):
            before, after = (f"{path}." if path else ""), (f"{path}.expert." if path else "expert.")
            names = dict.fromkeys([*needed, *_tensors(first)])
            return [Concat((before + n,), after + n, optional=n not in needed) for n in names]
    return None


def _path(module: Module, depth: int) -> str | None:
    """The last names of the path to a module, so many; None where there are not as many or they are not known."""
    names: list[str] = []
    current: Module | None = module
    for _ in range(depth):
        if current is None or not current.name:
            return None
        names.insert(0, current.name)
        current = current.owner
    return ".".join(names)


def _are_others(model: ModelMap, wrapped: Sequence[Module], path: str, needed: Sequence[str]) -> bool:
    """Whether the names would also move tensors of a module that is not wrapped."""
    own = {id(m) for m in wrapped}
    for module in model.graph.machine.modules:
        if isinstance(origin(module).call, ast.ClassDef) and module not in model.graph.roots:
            continue  # made to be looked at, not by the program
        target = module
        for name in path.split(".") if path else ():
            found = next((c for n, c in children_of(target) if n == name), None)
            if found is None:
                break
            target = found
        else:
            if id(target) not in own and all(_has(target, name) for name in needed):
                return True
    return False


def _has(module: Module, name: str, certain: bool = False) -> bool:
    """Whether a module has a linear layer of this path, for sure where `certain`."""
    *parts, _ = name.split(".")
    for part in parts:
        value = module.attributes.get(part)
        if certain and value is not None and not isinstance(value, Module):
            return False
        found = next((c for n, c in children_of(module) if n == part), None)
        if found is None:
            return False
        module = found
    return True


def _containers(module: Module) -> Iterator[Many]:
    if module.children is not None:
        yield module.children
    for _, child in children_of(module):
        yield from _containers(child)


def _tensors(module: Module, path: str = "") -> Iterator[str]:
    """The names of everything that a state dict may hold of a module."""
    before = f"{path}." if path else ""
    if module.cls is None and not list(children_of(module)):
        yield from (before + name for name in _WEIGHTS)
    for name, value in module.attributes.items():
        if any(isinstance(v, Node) and v.op == "parameter" for v in alternatives(value)) or _is_registered(
            module, name
        ):
            yield before + name
    for name, child in children_of(module):
        yield from _tensors(child, before + name)


def _is_registered(module: Module, name: str) -> bool:
    kinds = [c for c in module.cls.mro if isinstance(c, Class)] if module.cls is not None else []
    return any(name in mentions(c.scope.source.tree).by_key for c in kinds)


__all__ = ["weight_map"]
