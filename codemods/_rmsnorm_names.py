"""What the parameters of modules are called in a checkpoint: `layers.*.norm`, with a star for each number of a list."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass

from modernizer.graph.machine import Machine
from modernizer.graph.values import Many, Module, Table


class Unnamed(Exception):
    """Why the name of a module in a checkpoint cannot be told. `str()` of it is a clause."""


@dataclass(frozen=True)
class Path:
    """The name of a module below its model: `numbers` are what the stars are for this one, `root` is the model."""

    pattern: str
    numbers: tuple[str, ...]
    root: str

    def to(self, name: str) -> str:
        """The name of a parameter of the module."""
        return f"{self.pattern}.{name}" if self.pattern else name


class Names:
    """The names of all modules of a program."""

    def __init__(self, machine: Machine) -> None:
        self._held: Counter[int] = Counter()  # in how many places each module is
        for owner in machine.modules:
            inside = [v for v in owner.attributes.values() if isinstance(v, Module)]
            inside += [v for v in owner.children.items if isinstance(v, Module)] if owner.children else []
            self._held.update(id(v) for v in inside)

    def of(self, roles: Iterable[tuple[Module, str]]) -> dict[int, Path]:
        """The name of each module that plays a role. Elements of a list have a star for their number where all of them
        play the same roles. Raises Unnamed where a module has no name or several, or they are of several models."""
        played = list(dict.fromkeys(roles))
        apart = _lists_of_parts(played)
        found: dict[int, Path] = {}
        roots: dict[object, str] = {}
        for module, _ in played:
            if id(module) not in found:
                path, root = self._path(module, apart)
                found[id(module)] = path
                roots[root.cls.node if root.cls is not None else id(root)] = path.root
        if len(roots) > 1:
            raise Unnamed(f"{' and '.join(sorted(set(roots.values())))} are several models that share them")
        return found

    def _path(self, module: Module, apart: Container[int]) -> tuple[Path, Module]:
        parts: list[str] = []
        numbers: list[str] = []
        current = module
        while current.owner is not None:
            if self._held[id(current)] > 1:
                raise Unnamed(f"`{current.name}` is in the model under several names")
            name = _name_in(current, current.owner)
            if id(current.owner) not in apart and _is_one_of_many(current, current.owner):
                numbers.insert(0, name)
                name = "*"
            parts.insert(0, name)
            current = current.owner
        if current.cls is None or isinstance(current.call, ast.Call):
            raise Unnamed(f"where a {module.class_name} is in its model is not seen")
        return Path(".".join(parts), tuple(numbers), current.cls.name), current


def _lists_of_parts(roles: Iterable[tuple[Module, str]]) -> set[int]:
    """The lists whose elements play different roles, so that each goes by its number."""
    played: dict[int, dict[int, set[tuple[str, str]]]] = defaultdict(lambda: defaultdict(set))
    lists: dict[int, Module] = {}
    for module, role in roles:
        below, current = "", module
        while current.owner is not None:
            if current.owner.children is not None:
                lists[id(current.owner)] = current.owner
                played[id(current.owner)][id(current)].add((below, role))
            below = f"{_name_in(current, current.owner)}.{below}"
            current = current.owner
    apart: set[int] = set()
    for key, owner in lists.items():
        assert owner.children is not None
        first, *others = [played[key].get(id(item), set()) for item in owner.children.items]
        if any(other != first for other in others):
            if owner.children.open:
                raise Unnamed(
                    f"the elements of `{owner.name}` are not all treated alike, and how many there are is open"
                )
            apart.add(key)
    return apart


def _name_in(module: Module, owner: Module) -> str:
    named = owner.attributes.get("#names")  # a copy of a ModuleDict has lost them otherwise
    keys = [key for key, value in named.entries.items() if value is module] if isinstance(named, Table) else []
    return str(keys[0]) if keys else module.name


def _is_one_of_many(module: Module, owner: Module) -> bool:
    """Whether a module is an element of a list whose elements are alike, so that its number stands for any."""
    many = owner.children
    if not isinstance(many, Many) or isinstance(owner.attributes.get("#names"), Table):
        return False
    if not any(item is module for item in many.items):
        return False
    alike = [item for item in many.items if isinstance(item, Module) and item.call is module.call]
    if many.open and len(alike) < len(many.items):
        raise Unnamed(f"how the elements of `{owner.name}` are numbered is open")
    return many.open or (len(alike) > 1 and len(alike) == len(many.items))


__all__ = ["Names", "Path", "Unnamed"]
