"""Where a syntax node stands: its parents, its statement, the loops and the function around it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Loop = ast.For | ast.While


def children(node: ast.AST) -> list[ast.AST]:
    """As `ast.iter_child_nodes` at a third of its time, without `Load()` and its like, which all names share."""
    found: list[ast.AST] = []
    for name in node._fields:
        if name == "ctx":
            continue
        value = getattr(node, name, None)
        if isinstance(value, list):
            found += [item for item in value if isinstance(item, ast.AST)]
        elif isinstance(value, ast.AST):
            found.append(value)
    return found


def walk(node: ast.AST) -> list[ast.AST]:
    """As `ast.walk`, by `children`."""
    found = [node]
    for current in found:  # grows on the way
        found += children(current)
    return found


@lru_cache(maxsize=256)
def parents(tree: ast.Module) -> dict[ast.AST, ast.AST]:
    """The parent of every node of a tree."""
    return {child: node for node in walk(tree) for child in children(node)}


def every_node(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, without looking for the nodes again."""
    yield tree
    yield from parents(tree)


class Mentions:
    """Where a tree names things: the names it reads, attributes and strings by their text, and its imports."""

    def __init__(self, tree: ast.Module) -> None:
        self.loads: dict[str, list[ast.Name]] = defaultdict(list)
        self.attributes: dict[str, list[ast.Attribute]] = defaultdict(list)
        self.strings: dict[str, list[ast.Constant]] = defaultdict(list)
        self.by_key: dict[str, list[ast.Call]] = defaultdict(list)  # getattr(x, "key"), x.register_buffer("key", …)
        self.methods: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self.imports: list[ast.ImportFrom] = []
        self.bindings: dict[str, list[ast.stmt | ast.alias]] = defaultdict(list)  # what gives a global its value
        for node in every_node(tree):
            if isinstance(node, ast.Name):
                if isinstance(node.ctx, ast.Load):
                    self.loads[node.id].append(node)
            elif isinstance(node, ast.Attribute):
                self.attributes[node.attr].append(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.strings[node.value].append(node)
            elif isinstance(node, ast.Call):
                if (key := _key(node)) is not None:
                    self.by_key[key].append(node)
            elif isinstance(node, ast.FunctionDef):
                self.methods[node.name].append(node)
            elif isinstance(node, ast.ImportFrom):
                self.imports.append(node)
        for statement in tree.body:
            for name, binding in _bindings(statement):
                self.bindings[name].append(binding)


def _key(call: ast.Call) -> str | None:
    """The attribute that a call names by a string."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    place = {"register_buffer": 0, "register_parameter": 0, "getattr": 1, "hasattr": 1, "delattr": 1}.get(name)
    key = call.args[place] if place is not None and len(call.args) > place else None
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def _bindings(statement: ast.stmt) -> Iterator[tuple[str, ast.stmt | ast.alias]]:
    """The names that a statement at the top level binds alone, with what would have to go if they went."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        yield statement.name, statement
    elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        if isinstance(statement.targets[0], ast.Name):
            yield statement.targets[0].id, statement
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            root = alias.name.partition(".")[0] if isinstance(statement, ast.Import) else alias.name
            yield alias.asname or root, alias


@lru_cache(maxsize=256)
def mentions(tree: ast.Module) -> Mentions:
    """What a tree names, collected once."""
    return Mentions(tree)


@lru_cache(maxsize=4096)  # asked again for every site of a program
def below(node: ast.AST) -> tuple[ast.AST, ...]:
    """As `ast.walk`, for functions and classes that are looked through again and again."""
    return tuple(walk(node))


@lru_cache(maxsize=4096)
def names_below(node: ast.AST) -> dict[str, list[ast.Name]]:
    """Where each name stands below a node, in the order of `ast.walk`."""
    found: dict[str, list[ast.Name]] = defaultdict(list)
    for part in below(node):
        if isinstance(part, ast.Name):
            found[part.id].append(part)
    return dict(found)


def outward(tree: ast.Module, node: ast.AST) -> Iterator[ast.AST]:
    """The node, its parent, its parent's parent … up to the module."""
    above = parents(tree)
    current: ast.AST | None = node
    while current is not None:
        yield current
        current = above.get(current)


def statement_of(tree: ast.Module, node: ast.AST) -> ast.stmt:
    """The innermost statement a node is in."""
    return next(n for n in outward(tree, node) if isinstance(n, ast.stmt))


def loops_around(tree: ast.Module, node: ast.AST) -> Iterator[Loop]:
    """The loops of the same function in whose body a node stands, innermost first."""
    inner: ast.AST | None = None
    for current in outward(tree, node):
        if isinstance(current, Function):
            return
        if isinstance(current, Loop) and inner is not None and inner in current.body:
            yield current
        inner = current


def block_of(tree: ast.Module, statement: ast.stmt) -> list[ast.stmt]:
    """The list of statements that a statement is one of."""
    above = parents(tree)[statement]
    for name in ("body", "orelse", "finalbody"):
        block = getattr(above, name, None)
        if isinstance(block, list) and statement in block:
            return block
    return [statement]


def function_of(tree: ast.Module, node: ast.AST) -> Function | None:
    """The innermost function a node is in."""
    return next((n for n in outward(tree, node) if n is not node and isinstance(n, Function)), None)


def names_in(node: ast.AST) -> set[str]:
    """Every name that is read, bound or a parameter somewhere below a node."""
    return set(names_below(node)) | {n.arg for n in below(node) if isinstance(n, ast.arg)}


def free_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, or the first `wanted_2`, `wanted_3` … that nobody uses."""
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name
