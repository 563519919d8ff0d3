"""Expressions: names, attributes, operators, displays, comprehensions, lambdas."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import TypeVar

from modernizer.graph import calls, containers, statements
from modernizer.graph.machine import Machine
from modernizer.graph.truth import compare, truth_of
from modernizer.graph.values import (
    Class,
    Const,
    External,
    Frame,
    Function,
    Many,
    Method,
    Module,
    Node,
    Object,
    Package,
    Table,
    Value,
)

E = TypeVar("E", bound=ast.expr)


Handler = Callable[[Machine, Frame, E], Value]


def evaluates(*kinds: type[E]) -> Callable[[Handler[E]], Handler[E]]:
    """Registers the handler of expression types."""

    def register(handler: Handler[E]) -> Handler[E]:
        for kind in kinds:
            Machine.expressions[kind] = handler  # type: ignore[assignment]
        return handler

    return register


@evaluates(ast.Constant)
def constant(m: Machine, frame: Frame, node: ast.Constant) -> Value:
    return Const(node.value)


@evaluates(ast.Name)
def name(m: Machine, frame: Frame, node: ast.Name) -> Value:
    scope: Frame | None = frame
    while scope is not None:
        if node.id in scope.names:
            return scope.names[node.id]
        scope = scope.function.closure if scope.function else None
    found = frame.scope.lookup(node.id)
    return found if found is not None else m.node("unknown", (), node, frame, name=node.id)


@evaluates(ast.Attribute)
def attribute(m: Machine, frame: Frame, node: ast.Attribute) -> Value:
    return get_attribute(m, frame, node, m.evaluate(frame, node.value), node.attr)


def get_attribute(m: Machine, frame: Frame, node: ast.AST, receiver: Value, attr: str) -> Value:
    """`receiver.attr`."""
    if isinstance(receiver, External | Package):
        found = m.scopes.member(receiver, attr)
        return found if found is not None else m.node("unknown", (), node, frame, name=attr)
    if isinstance(receiver, Object):
        return _of_object(m, frame, node, receiver, attr)
    if isinstance(receiver, Class):
        found = _of_class(m, frame, node, receiver, receiver, attr)
        return found if found is not None else m.node("unknown", (), node, frame, name=attr)
    if isinstance(receiver, Node):
        return _of_datum(m, frame, node, receiver, attr)
    if isinstance(receiver, calls.Super):
        return calls.super_member(m, frame, node, receiver, attr)
    return Method(receiver, External(f"builtins.{type(receiver).__name__}.{attr}"))


def _of_object(m: Machine, frame: Frame, node: ast.AST, receiver: Object, attr: str) -> Value:
    if attr in receiver.attributes:
        return receiver.attributes[attr]
    if receiver.cls is not None:
        found = _of_class(m, frame, node, receiver, receiver.cls, attr)
        if found is not None:
            return found
    if isinstance(receiver, Module):
        if attr == "training":
            return m.node("attr", (), node, frame, name="training")
        items = receiver.attributes.get("#names")
        if isinstance(items, Table) and attr in items.entries:
            return items.entries[attr]
        if attr == "_modules" and receiver.children is not None:
            children = receiver.children
            if isinstance(items, Table):
                return items
            return Table({str(i): item for i, item in enumerate(children.items)}, children.open)
        return calls.torch_attribute(m, frame, node, receiver, attr)
    return m.node("attr", (receiver,), node, frame, name=attr)


def _of_class(m: Machine, frame: Frame, node: ast.AST, receiver: Value, cls: Class, attr: str) -> Value | None:
    for base in cls.mro:
        if isinstance(base, Class) and attr in base.members:
            return class_member(m, frame, node, receiver, base, base.members[attr])
    return None


def class_member(m: Machine, frame: Frame, node: ast.AST, receiver: Value, cls: Class, member: ast.stmt) -> Value:
    """A member of a class as seen through an instance (bound) or through the class itself."""
    if isinstance(member, ast.FunctionDef):
        function = Function(member, cls.scope, cls.closure, cls)
        decorators = {d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in member.decorator_list}
        if "staticmethod" in decorators:
            return function
        if "classmethod" in decorators:
            owner = receiver.cls if isinstance(receiver, Object) else receiver
            return Method(owner or cls, function)
        if isinstance(receiver, Object):
            if decorators & {"property", "cached_property", "lazyproperty"}:
                return calls.enter(m, frame, node, function, [receiver], {}, receiver)
            return Method(receiver, function)
        return function
    if isinstance(member, ast.ClassDef):
        return cls.scope.make_class(member, cls.closure)
    if isinstance(member, ast.Assign | ast.AnnAssign) and member.value is not None:
        return m.evaluate(cls.scope.frame, member.value)
    return m.node("unknown", (), node, frame)


SEEN_THROUGH = {"data": "data", "T": "t", "mT": "mT", "H": "t"}


def _of_datum(m: Machine, frame: Frame, node: ast.AST, receiver: Node, attr: str) -> Value:
    if attr == "shape":
        return m.node("shape", (receiver,), node, frame)
    if attr in SEEN_THROUGH and receiver.op not in ("config", "unknown"):
        return m.node(SEEN_THROUGH[attr], (receiver,), node, frame)
    if receiver.op == "merge":
        objects = [o for o in receiver.args if isinstance(o, Object | Many | Class | External)]
        if objects and len(objects) == len([o for o in receiver.args if not isinstance(o, Const)]):
            return m.merge([get_attribute(m, frame, node, o, attr) for o in objects], node, frame)
        methods = [o for o in receiver.args if isinstance(o, Object) and _has_method(o, attr)]
        # What is not known of is called as the others are; no other attribute of them says anything about it.
        if methods and all(o in methods or isinstance(o, Const) or _is_open(o) for o in receiver.args):
            return m.merge([get_attribute(m, frame, node, o, attr) for o in methods], node, frame)
    return m.node("attr", (receiver,), node, frame, name=attr)


def _is_open(value: Value) -> bool:
    return isinstance(value, Node) and value.op in ("config", "input", "argument", "unknown")


def _has_method(value: Object, name: str) -> bool:
    bases = value.cls.mro if value.cls is not None else ()
    member = next((b.members[name] for b in bases if isinstance(b, Class) and name in b.members), None)
    return name not in value.attributes and isinstance(member, ast.FunctionDef) and not member.decorator_list


@evaluates(ast.BinOp)
def operation(m: Machine, frame: Frame, node: ast.BinOp) -> Value:
    left, right = m.evaluate(frame, node.left), m.evaluate(frame, node.right)
    if isinstance(left, Const) and isinstance(left.value, str) and isinstance(node.op, ast.Mod):
        return _formatted(m, frame, node, left.value, right)
    return containers.binary(m, frame, node, node.op, left, right)


def _formatted(m: Machine, frame: Frame, node: ast.AST, pattern: str, value: Value) -> Value:
    values = value.items if isinstance(value, Many) else [value]
    if all(isinstance(v, Const) for v in values):
        try:
            return Const(pattern % tuple(v.value for v in values if isinstance(v, Const)))
        except (TypeError, ValueError):
            pass
    return m.node("unknown", (value,), node, frame)


@evaluates(ast.UnaryOp)
def unary(m: Machine, frame: Frame, node: ast.UnaryOp) -> Value:
    value = m.evaluate(frame, node.operand)
    if isinstance(node.op, ast.Not):
        known = truth_of(value)
        return Const(not known) if known is not None else m.node("not", (value,), node, frame)
    if isinstance(value, Const) and isinstance(value.value, int | float):
        number = value.value
        return Const(
            -number if isinstance(node.op, ast.USub) else +number if isinstance(node.op, ast.UAdd) else ~int(number)
        )
    return m.node({ast.USub: "neg", ast.UAdd: "pos"}.get(type(node.op), "invert"), (value,), node, frame)


@evaluates(ast.BoolOp)
def junction(m: Machine, frame: Frame, node: ast.BoolOp) -> Value:
    """`a or b` is a where a is true; operands after an open one are alternatives."""
    stops = isinstance(node.op, ast.Or)
    options: list[Value] = []
    for part in node.values:
        value = m.evaluate(frame, part)
        known = truth_of(value)
        if known is None:
            options.append(value)
        elif known == stops or part is node.values[-1]:
            options.append(value)
            break
    if isinstance(node.op, ast.And) and all(truth_of(o) is None for o in options[:-1]) and len(options) > 1:
        return Const(False) if truth_of(options[-1]) is False else m.node("and", options, node, frame)
    return m.merge(options, node, frame) if options else Const(not stops)


@evaluates(ast.Compare)
def comparison(m: Machine, frame: Frame, node: ast.Compare) -> Value:
    values = [m.evaluate(frame, part) for part in (node.left, *node.comparators)]
    outcomes = [compare(op, a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False)]
    if any(o is False for o in outcomes):
        return Const(False)
    if all(o is True for o in outcomes):
        return Const(True)
    made = m.node(type(node.ops[0]).__name__.lower(), values, node, frame)
    return made


@evaluates(ast.IfExp)
def conditional(m: Machine, frame: Frame, node: ast.IfExp) -> Value:
    known = truth_of(m.evaluate(frame, node.test))
    if known is not None:
        return m.evaluate(frame, node.body if known else node.orelse)
    return m.merge([m.evaluate(frame, node.body), m.evaluate(frame, node.orelse)], node.test, frame)


@evaluates(ast.Tuple, ast.List, ast.Set)
def display(m: Machine, frame: Frame, node: ast.expr) -> Value:
    assert isinstance(node, ast.Tuple | ast.List | ast.Set)
    items, is_open = calls.spread(m, frame, node.elts)
    return Many(items, type(node).__name__.lower(), is_open, node)


@evaluates(ast.Dict)
def mapping(m: Machine, frame: Frame, node: ast.Dict) -> Value:
    table = Table({})
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            inner = m.evaluate(frame, value)
            if isinstance(inner, Table):
                table.entries.update(inner.entries)
            else:
                table.open = True
            continue
        known = m.evaluate(frame, key)
        made = m.evaluate(frame, value)
        if isinstance(known, Const) and isinstance(known.value, str | int | float | bool | type(None)):
            table.entries[known.value] = made
        else:
            table.open = True
    return table


@evaluates(ast.Subscript)
def element(m: Machine, frame: Frame, node: ast.Subscript) -> Value:
    receiver = m.evaluate(frame, node.value)
    return containers.subscript(m, frame, node, receiver, m.evaluate(frame, node.slice))


@evaluates(ast.Slice)
def bounds(m: Machine, frame: Frame, node: ast.Slice) -> Value:
    parts = [m.evaluate(frame, p) if p else Const(None) for p in (node.lower, node.upper, node.step)]
    return m.node("slice", parts, node, frame)


@evaluates(ast.Lambda)
def anonymous(m: Machine, frame: Frame, node: ast.Lambda) -> Value:
    return Function(node, frame.scope, frame)


@evaluates(ast.Starred)
def starred(m: Machine, frame: Frame, node: ast.Starred) -> Value:
    return m.evaluate(frame, node.value)


@evaluates(ast.NamedExpr)
def walrus(m: Machine, frame: Frame, node: ast.NamedExpr) -> Value:
    value = m.evaluate(frame, node.value)
    statements.bind(m, frame, node.target, value)
    return value


@evaluates(ast.JoinedStr)
def text(m: Machine, frame: Frame, node: ast.JoinedStr) -> Value:
    parts: list[str] = []
    for part in node.values:
        value = m.evaluate(frame, part.value if isinstance(part, ast.FormattedValue) else part)
        if not isinstance(value, Const):
            return m.node("unknown", (value,), node, frame)
        parts.append(str(value.value))
    return Const("".join(parts))


@evaluates(ast.ListComp, ast.GeneratorExp, ast.SetComp)
def comprehension(m: Machine, frame: Frame, node: ast.expr) -> Value:
    assert isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp)
    result = Many([], "list", False, node)

    def take() -> None:
        result.items.append(m.evaluate(frame, node.elt))

    _generate(m, frame, node.generators, take, result)
    return result


@evaluates(ast.DictComp)
def dict_comprehension(m: Machine, frame: Frame, node: ast.DictComp) -> Value:
    table, lengths = Table({}), Many([])

    def take() -> None:
        key, value = m.evaluate(frame, node.key), m.evaluate(frame, node.value)
        if isinstance(key, Const) and isinstance(key.value, str | int):
            table.entries[key.value] = value
        else:
            table.open = True

    _generate(m, frame, node.generators, take, lengths)
    table.open = table.open or lengths.open
    return table


def _generate(
    m: Machine, frame: Frame, generators: Sequence[ast.comprehension], take: Callable[[], None], result: Many
) -> None:
    """Runs the loops of a comprehension; its variables are its own, as those of an inner function are."""
    if not generators:
        take()
        return
    first, before = generators[0], dict(frame.names)
    iterable = m.evaluate(frame, first.iter)
    many = containers.as_many(m, frame, iterable, first.iter)
    result.open = result.open or many is None or many.open
    for item in containers.items_of(m, frame, iterable, first.iter):
        statements.bind(m, frame, first.target, item)
        tests = [truth_of(m.evaluate(frame, test)) for test in first.ifs]
        if any(t is False for t in tests):
            continue
        result.open = result.open or any(t is None for t in tests)
        _generate(m, frame, generators[1:], take, result)
    for changed in set(frame.names) - set(before):
        del frame.names[changed]
    frame.names.update(before)


@evaluates(ast.Await, ast.YieldFrom)
def passed_on(m: Machine, frame: Frame, node: ast.expr) -> Value:
    assert isinstance(node, ast.Await | ast.YieldFrom)
    value = m.evaluate(frame, node.value)
    frame.yields.append(value)
    return value


@evaluates(ast.Yield)
def produced(m: Machine, frame: Frame, node: ast.Yield) -> Value:
    value = m.evaluate(frame, node.value) if node.value else Const(None)
    frame.yields.append(value)
    return m.node("unknown", (), node, frame)
