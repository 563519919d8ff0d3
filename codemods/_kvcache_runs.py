"""Loops outside of the model: functions and objects that are handed one run with it, so that what they do is known."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product

from modernizer.graph import Graph, execute
from modernizer.graph.calls import hasattr_of_module
from modernizer.graph.machine import MAX_STEPS, Machine
from modernizer.graph.roots import construct, is_module_class, run_function
from modernizer.graph.scope import Scope
from modernizer.graph.values import Class, Frame, Function, Module, Object, Value
from modernizer.model_map import ModelMap
from modernizer.syntax import below, every_node

_ENOUGH = 20_000  # steps; what does more than put a model together and call it is no loop of generation
_MANY = 4  # more ways than that to hand models to a function say nothing


@dataclass(frozen=True)
class Entry:
    """A function or method with a loop that may generate."""

    function: Function
    owner: Class | None  # whose method it is

    @property
    def node(self) -> ast.FunctionDef:
        assert isinstance(self.function.node, ast.FunctionDef)
        return self.function.node


def with_outer_loops(model: ModelMap) -> ModelMap:
    """The map of the same program in which functions and objects that are handed a model have run with it."""
    return model.derived(_extended)


def _extended(model: ModelMap) -> ModelMap:
    if not model.attentions:
        return model
    followed = _attending_functions(model)
    entries = [e for e in _entries(model.graph) if e.node not in followed]
    if not entries:
        return model
    open_ = Graph(Machine(model.project))
    plans: list[tuple[Entry, dict[str, list[Class]]]] = []
    for entry in entries:
        first = len(open_.machine.nodes)
        _run(open_, entry, {}, _ENOUGH)
        needs = _needs(open_, first)
        attending = _attending(model)
        wanted = {name: found for name, need in needs.items() if (found := _fitting(attending, need))}
        if wanted or _makes_one(entry, open_, first, model):
            plans.append((entry, wanted))
    if not plans:
        return model
    graph = execute(model.project)
    for entry, wanted in plans:
        ways = list(product(*wanted.values()))
        for way in ways if len(ways) <= _MANY else []:
            given = {name: root for name, cls in zip(wanted, way, strict=True) if (root := _root(graph, cls))}
            _run(graph, entry, given)
    return ModelMap(graph)


# -- which functions


def _entries(graph: Graph) -> Iterator[Entry]:
    """The functions and methods of the named files in whose loops a sequence may grow."""
    found: list[Entry] = []
    for path in graph.project.named:
        scope = graph.machine.scopes.get(path)
        if scope is None or not _imports_torch(scope):
            continue
        found += [Entry(function, None) for function in scope.functions()]
        for cls in scope.classes():
            for member in cls.members.values():
                if isinstance(member, ast.FunctionDef) and member.name != "__init__":
                    found.append(Entry(Function(member, cls.scope, cls.closure, cls), cls))
    growing = {e.node.name for e in found if _grows(e.node, frozenset())} | _GROWING
    for entry in found:
        loops = (n for n in below(entry.node) if isinstance(n, ast.For | ast.While))
        if any(_grows(loop, growing) for loop in loops):
            yield entry


def _imports_torch(scope: Scope) -> bool:
    """Whether a file names torch: without it no tensor is put together."""
    statements = (n for n in every_node(scope.source.tree) if isinstance(n, ast.Import | ast.ImportFrom))
    modules = (
        m for s in statements for m in ([s.module] if isinstance(s, ast.ImportFrom) else [a.name for a in s.names])
    )
    return any(m is not None and m.partition(".")[0] == "torch" for m in modules)


_GROWING = frozenset({"cat", "concat", "concatenate", "append", "hstack"})


def _grows(part: ast.AST, calls: Set[str]) -> bool:
    """Whether code writes into a tensor, or calls one of these."""
    for node in below(part):
        called = node.func if isinstance(node, ast.Call) else None
        if getattr(called, "attr", getattr(called, "id", "")) in calls:
            return True
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            return True
    return False


def _attending_functions(model: ModelMap) -> set[ast.AST]:
    """The functions in whose activations attention already happens."""
    contexts = (c for site in model.attentions for c in site.contexts)
    return {f.function.node for c in contexts for f in c.frame.outward() if f.function is not None}


# -- what is handed in


@dataclass(frozen=True)
class Need:
    """What a function does with an argument: the attributes it asks for, and whether it is called."""

    attributes: frozenset[str]
    is_called: bool


def _needs(graph: Graph, first: int) -> dict[str, Need]:
    """What is asked of the open arguments of a run, by their names."""
    found: dict[str, Need] = {}
    for node in graph.machine.nodes[first:]:
        if node.op not in ("input", "config") or not node.name:
            continue
        attributes = {u.name for u in node.users if u.op == "attr"}
        called = any(u.op == "opaque" and u.args and u.args[0] is node and u.name == node.name for u in node.users)
        known = found.get(node.name, Need(frozenset(), False))
        found[node.name] = Need(known.attributes | attributes, known.is_called or called)
    return found


def _attending(model: ModelMap) -> list[Module]:
    """The models in which attention happens, one of each class."""
    found: dict[ast.AST, Module] = {}
    receivers = {
        id(f.receiver) for site in model.attentions for c in site.contexts for f in c.frame.outward()
    }  # fmt: skip
    for root in model.graph.roots:
        if root.cls is not None and id(root) in receivers:
            found.setdefault(root.cls.node, root)
    return list(found.values())


def _fitting(models: Sequence[Module], need: Need) -> list[Class]:
    """The classes whose instances have all that is asked for; none where nothing special is."""
    own = {name for name in need.attributes if name != "training" and not hasattr_of_module(name)}
    if not own and not need.is_called:
        return []
    return [
        m.cls for m in models
        if m.cls is not None
        and all(n in m.attributes or any(isinstance(c, Class) and n in c.members for c in m.cls.mro) for n in own)
    ]  # fmt: skip


def _makes_one(entry: Entry, graph: Graph, first: int, model: ModelMap) -> bool:
    """Whether a function attends with a model that it makes itself, or finds at module level."""
    return any(n.op in ("softmax", "scaled_dot_product_attention", "mha") for n in graph.machine.nodes[first:])


def _root(graph: Graph, cls: Class) -> Module | None:
    return next((r for r in graph.roots if r.cls is not None and r.cls.node is cls.node), None)


# -- running


def _run(graph: Graph, entry: Entry, given: Mapping[str, Value], max_steps: int = MAX_STEPS) -> Frame | None:
    """Runs a function, or a method on an object whose constructor is handed the same."""
    receiver: Object | None = None
    if entry.owner is not None and not _is_static(entry.node):
        receiver = construct(graph, entry.owner, _accepted(entry.owner, given), max_steps)
        if receiver is None:
            return None
    names = {a.arg for a in [*entry.node.args.posonlyargs, *entry.node.args.args, *entry.node.args.kwonlyargs]}
    done = run_function(
        graph, entry.function, receiver, {n: v for n, v in given.items() if n in names}, max_steps=max_steps
    )
    return done.frame if done.complete else None


def _accepted(cls: Class, given: Mapping[str, Value]) -> dict[str, Value]:
    owner = next((c for c in cls.mro if isinstance(c, Class) and "__init__" in c.members), None)
    member = owner.members["__init__"] if owner is not None else None
    if not isinstance(member, ast.FunctionDef):
        return {}
    names = {a.arg for a in [*member.args.posonlyargs, *member.args.args, *member.args.kwonlyargs]}
    return {n: v for n, v in given.items() if n in names}


def _is_static(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)


__all__ = ["Entry", "is_module_class", "with_outer_loops"]
