"""Statements: assignment, branches (all open ones are run and joined), loops (unrolled), and what ends a path."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from modernizer.graph import calls, containers
from modernizer.graph.inplace import rebind
from modernizer.graph.machine import Dead, Loop, Machine, Outcome, Repeat
from modernizer.graph.truth import truth
from modernizer.graph.values import Class, Const, Frame, Function, Many, Module, Node, Object, Table, Value

S = TypeVar("S", bound=ast.stmt)


def executes(*kinds: type[S]) -> Callable[[Callable[[Machine, Frame, S], None]], Callable[[Machine, Frame, S], None]]:
    """Registers the handler of statement types."""

    def register(handler: Callable[[Machine, Frame, S], None]) -> Callable[[Machine, Frame, S], None]:
        for kind in kinds:
            Machine.statements[kind] = handler  # type: ignore[assignment]
        return handler

    return register


@executes(ast.Expr)
def expression(m: Machine, frame: Frame, node: ast.Expr) -> None:
    m.evaluate(frame, node.value)


@executes(ast.Assign)
def assign(m: Machine, frame: Frame, node: ast.Assign) -> None:
    value = m.evaluate(frame, node.value)
    for target in node.targets:
        bind(m, frame, target, value)


@executes(ast.AnnAssign)
def annotated(m: Machine, frame: Frame, node: ast.AnnAssign) -> None:
    if node.value is not None:
        bind(m, frame, node.target, m.evaluate(frame, node.value))


@executes(ast.AugAssign)
def augmented(m: Machine, frame: Frame, node: ast.AugAssign) -> None:
    """`x += y` makes a new value; the list form extends the list in place."""
    load = m.evaluate(frame, _as_load(m, node.target))
    m.at[node.target].append((frame, load))
    value = m.evaluate(frame, node.value)
    if isinstance(load, Many) and isinstance(node.op, ast.Add):
        m.set_items(load, [*load.items, *containers.items_of(m, frame, value, node.value)])
        load.open = load.open or (isinstance(value, Many) and value.open)
        return
    made = containers.binary(m, frame, node, node.op, load, value)
    if isinstance(load, Node) and isinstance(made, Node) and load.op not in NUMBERS:
        rebind(m, frame, load, made)  # a tensor changes for everybody who holds it
    bind(m, frame, node.target, made)
    m.reads[id(made)].append((node.target, frame))


# Data that are numbers: `n += 1` gives the name another number and changes nobody else's.
NUMBERS = frozenset({"dim", "rank", "numel", "shape", "config", "int", "float", "len", "merge"})


def _as_load(m: Machine, target: ast.Name | ast.Attribute | ast.Subscript) -> ast.expr:
    """The target of `+=` read as an expression; one copy each, so that it can be found again."""
    if target not in m.loads:
        fields = {name: getattr(target, name) for name in target._fields if name != "ctx"}
        m.loads[target] = ast.copy_location(type(target)(**fields, ctx=ast.Load()), target)
    return m.loads[target]


def bind(m: Machine, frame: Frame, target: ast.expr, value: Value) -> None:
    """Assigns a value to a name, attribute, element or pattern of these."""
    m.at[target].append((frame, value))
    if isinstance(target, ast.Name):
        frame.names[target.id] = value
    elif isinstance(target, ast.Attribute):
        receiver = m.evaluate(frame, target.value)
        if isinstance(receiver, Object):
            m.set_attribute(receiver, target.attr, value)
    elif isinstance(target, ast.Subscript):
        _set_item(m, frame, target, value)
    elif isinstance(target, ast.Starred):
        bind(m, frame, target.value, value)
    elif isinstance(target, ast.Tuple | ast.List):
        for part, item in zip(target.elts, containers.unpack(m, frame, value, target), strict=True):
            bind(m, frame, part, item)


def _set_item(m: Machine, frame: Frame, target: ast.Subscript, value: Value) -> None:
    receiver = m.evaluate(frame, target.value)
    index = m.evaluate(frame, target.slice)
    if isinstance(receiver, Table) and isinstance(index, Const):
        m.set_entry(receiver, index.value, value)
    elif isinstance(receiver, Many) and isinstance(index, Const) and isinstance(index.value, int):
        if -len(receiver.items) <= index.value < len(receiver.items):
            items = list(receiver.items)
            items[index.value] = value
            m.set_items(receiver, items)
    elif isinstance(receiver, Module):
        items_ = receiver.children
        named = receiver.attributes.get("#names")
        if items_ is not None and isinstance(named, Table) and isinstance(index, Const):
            m.set_items(items_, [*(i for k, i in named.entries.items() if k != index.value), value])
            m.set_entry(named, index.value, value)
            calls.adopt(receiver, value, str(index.value))
            return
        if items_ is not None and isinstance(index, Const) and isinstance(index.value, int):
            fresh = list(items_.items)
            if index.value < len(fresh):
                fresh[index.value] = value
                m.set_items(items_, fresh)
    elif isinstance(receiver, Node):
        rebind(m, frame, receiver, m.node("setitem", (receiver, index, value), target, frame))


@executes(ast.Return)
def leave(m: Machine, frame: Frame, node: ast.Return) -> None:
    value = m.evaluate(frame, node.value) if node.value else Const(None)
    frame.returns.append((node, value))
    raise Dead


@executes(ast.Raise)
def fail(m: Machine, frame: Frame, node: ast.Raise) -> None:
    raise Dead


@executes(ast.Break)
def stop(m: Machine, frame: Frame, node: ast.Break) -> None:
    if m.loops.get(id(frame)):
        m.loops[id(frame)][-1].broken.append(dict(frame.names))
    raise Dead


@executes(ast.Continue)
def skip(m: Machine, frame: Frame, node: ast.Continue) -> None:
    if m.loops.get(id(frame)):
        m.loops[id(frame)][-1].continued.append(dict(frame.names))
    raise Dead


@executes(ast.If)
def choose(m: Machine, frame: Frame, node: ast.If) -> None:
    """A test whose outcome the code decides takes one branch; any other takes both."""
    known = truth(m, frame, node.test, m.evaluate(frame, node.test))
    if known is not None:
        m.execute(frame, node.body if known else node.orelse)
        return
    outcomes = [
        m.branch(frame, lambda: m.execute(frame, node.body)),
        m.branch(frame, lambda: m.execute(frame, node.orelse)),
    ]
    m.join(frame, outcomes, node.test)


@executes(ast.For)
def loop(m: Machine, frame: Frame, node: ast.For) -> None:
    iterable = m.evaluate(frame, node.iter)
    items = containers.items_of(m, frame, iterable, node.iter)
    _iterate(m, frame, node, [partial(bind, m, frame, node.target, item) for item in items])


@executes(ast.While)
def repeat(m: Machine, frame: Frame, node: ast.While) -> None:
    m.evaluate(frame, node.test)
    _iterate(m, frame, node, [lambda: None, lambda: None])


def _iterate(m: Machine, frame: Frame, node: ast.For | ast.While, starts: list[Callable[[], None]]) -> None:
    state = Loop()
    m.loops.setdefault(id(frame), []).append(state)
    repeat = Repeat(frame, len(m.nodes), len(m.nodes))
    m.repeats[node].append(repeat)
    alive = True
    try:
        for start in starts:
            start()
            try:
                m.execute(frame, node.body)
            except Dead:
                alive = False
            if state.continued:
                _merge_names(m, frame, [*([frame.names] if alive else []), *state.continued], node)
                state.continued, alive = [], True
            if not alive:
                break
    finally:
        m.loops[id(frame)].pop()
        repeat.last = len(m.nodes)
    if state.broken:
        _merge_names(m, frame, [*([frame.names] if alive else []), *state.broken], node)
    elif not alive:
        raise Dead
    if alive:
        m.execute(frame, node.orelse)


def _merge_names(m: Machine, frame: Frame, states: list[dict[str, Value]], node: ast.stmt) -> None:
    states = [dict(s) for s in states]
    m.join(frame, [Outcome(True, s, {}) for s in states], node)


@executes(ast.With)
def within(m: Machine, frame: Frame, node: ast.With) -> None:
    for item in node.items:
        value = m.evaluate(frame, item.context_expr)
        if item.optional_vars is not None:
            bind(m, frame, item.optional_vars, value)
    m.execute(frame, node.body)


@executes(ast.Try)
def attempt(m: Machine, frame: Frame, node: ast.Try) -> None:
    """The handlers are alternatives to the body; one that only raises leaves no trace."""

    def main() -> None:
        m.execute(frame, node.body)
        m.execute(frame, node.orelse)

    outcomes = [m.branch(frame, main)]
    outcomes += [m.branch(frame, partial(m.execute, frame, handler.body)) for handler in node.handlers]
    try:
        m.join(frame, outcomes, node)
    finally:
        m.execute(frame, node.finalbody)


@executes(ast.FunctionDef)
def define(m: Machine, frame: Frame, node: ast.FunctionDef) -> None:
    frame.names[node.name] = Function(node, frame.scope, frame, None)


@executes(ast.ClassDef)
def define_class(m: Machine, frame: Frame, node: ast.ClassDef) -> None:
    made: Class = frame.scope.make_class(node, frame)
    frame.names[node.name] = made


@executes(ast.Delete)
def remove(m: Machine, frame: Frame, node: ast.Delete) -> None:
    for target in node.targets:
        if isinstance(target, ast.Name):
            frame.names.pop(target.id, None)
        elif isinstance(target, ast.Subscript):
            m.evaluate(frame, target.value)


@executes(ast.Assert)
def claim(m: Machine, frame: Frame, node: ast.Assert) -> None:
    m.evaluate(frame, node.test)


@executes(ast.Import, ast.ImportFrom)
def bring(m: Machine, frame: Frame, node: ast.stmt) -> None:
    """An import inside a function binds like one at the top."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            module = alias.name if alias.asname else alias.name.split(".")[0]
            frame.names[alias.asname or module] = m.scopes.module(frame.path, module)
    elif isinstance(node, ast.ImportFrom):
        package = m.scopes.module(frame.path, node.module or "", node.level)
        for alias in node.names:
            value = m.scopes.member(package, alias.name)
            if value is not None:
                frame.names[alias.asname or alias.name] = value
