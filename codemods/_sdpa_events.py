"""One step on the way of the scores, and what calls and branches on that way are."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from modernizer.graph.machine import Machine
from modernizer.graph.query import IDENTITY, is_none
from modernizer.graph.torch_api import CALLS, MODULE_OPS, function_operation
from modernizer.graph.values import Class, External, Method, Module, Node, Value
from modernizer.graph.values import Function as GraphFunction
from modernizer.source import SourceFile
from modernizer.syntax import walk

CASTS = frozenset("to type float half bfloat16 double type_as".split())


SILENT = IDENTITY - CASTS - {"dropout"}


class Decline(Exception):
    """Why a site is not rewritten, and what the user could change."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, eq=False)
class Event:
    """One step on the way of the scores.

    `kind` is product, scale, bias, fill, softmax, dropout, cast, zero_nan or product_mask. `code` is its operand as it
    stands in the file (the factor, what is added, the mask, the probability), `values` what that is on the graph.
    """

    kind: str
    node: ast.AST
    statement: ast.stmt | None
    operand: ast.expr | None = None
    values: Sequence[Value] = ()
    guard: tuple[tuple[ast.If, int], ...] = ()
    tests: tuple[tuple[ast.expr, bool], ...] = ()  # conditional expressions around it
    divides: bool = False  # a scale
    negative: bool = False  # a bias that is subtracted
    attends: bool = False  # a fill whose mask is True where the score stays
    fill: ast.expr | None = None
    fills: Sequence[Value] = ()
    callee: ast.expr | None = None  # a dropout's
    sizes: tuple[ast.expr, ...] = ()  # of a view


State = tuple[Event, ...]


def entered(value: Value) -> ast.AST | None:
    """The function that calling a value enters, if it is one of the project's."""
    if isinstance(value, GraphFunction):
        return value.node
    if isinstance(value, Method):
        return entered(value.function)
    if isinstance(value, Module) and value.cls is not None:
        owner = next((c for c in value.cls.mro if isinstance(c, Class) and "forward" in c.members), None)
        return owner.members["forward"] if owner is not None else None
    return None


def factors(node: ast.expr, machine: Machine) -> list[ast.expr]:
    """The two factors of a product as they stand in the code, einsum's equation left out; for baddbmm the last two."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    assert isinstance(node, ast.Call)
    arguments = [
        *node.args,
        *(k.value for k in node.keywords if k.arg in ("input", "other", "mat2", "batch1", "batch2")),
    ]
    if isinstance(node.func, ast.Attribute) and all(
        isinstance(value, Node) for _, value in machine.at.get(node.func.value, ())
    ):
        arguments = [node.func.value, *arguments]
    ops = {value.op for _, value in machine.at.get(node, ()) if isinstance(value, Node)}
    if ops == {"einsum"}:
        rest = arguments[1:]
        if len(rest) == 1 and isinstance(rest[0], ast.Tuple | ast.List):
            return list(rest[0].elts)
        return rest
    if ops == {"baddbmm"}:
        return arguments[1:3]
    return arguments[:2]


def named(op: str, args: Sequence[ast.expr], keywords: Sequence[ast.keyword]) -> dict[str, ast.expr]:
    """Arguments by torch's names, operands first."""
    names = CALLS.get(op, ("input",))
    if op == "softmax":
        names = ("input", "dim")
    found = dict(zip(names, args, strict=False))
    found.update({f"#{i}": a for i, a in enumerate(args) if i >= len(names)})
    renamed = {"axis": "dim"}
    found.update({renamed.get(k.arg, k.arg): k.value for k in keywords if k.arg})
    return found


def options(value: Value) -> Iterator[Value]:
    """The alternatives of a merge, None left out; else the value itself."""
    if isinstance(value, Node) and value.op == "merge":
        for inner in value.args:
            yield from options(inner)
    elif not is_none(value):
        yield value


def kind_of_callee(value: Value) -> str:
    """The operation that calling a value means; '' where it is the project's own or unknown."""
    if isinstance(value, External):
        return function_operation(value.dotted) or ""
    if isinstance(value, Module) and value.cls is None:
        short = value.torch_name.rpartition(".")[2]
        return "identity" if short == "Identity" else MODULE_OPS.get(short, "")
    return ""


def is_nothing(node: ast.expr | None) -> bool:
    """Whether a default is one that stands for a missing argument: None or False."""
    return isinstance(node, ast.Constant) and node.value in (None, False)


def bound_names(targets: Sequence[ast.expr]) -> set[str]:
    """The names that an assignment to these targets binds."""
    return {n.id for t in targets for n in walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def leaves(body: Sequence[ast.stmt]) -> bool:
    """Whether a block ends by leaving its function or loop."""
    return bool(body) and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)


def stable_test(source: SourceFile, function: ast.FunctionDef, test: ast.expr) -> str | None:
    """The text of a test that is known when the function starts and stays the same, None for any other."""
    allowed = (ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.expr_context, ast.cmpop,
               ast.boolop, ast.unaryop)  # fmt: skip
    if not all(isinstance(n, allowed) for n in walk(test)):
        return None
    parameters = {a.arg for a in (*function.args.args, *function.args.kwonlyargs, *function.args.posonlyargs)}
    stored = {n.id for n in walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    attributes = {n.attr for n in walk(function) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)}
    for node in walk(test):
        if isinstance(node, ast.Name) and (node.id not in parameters or node.id in stored):
            return None
        if isinstance(node, ast.Attribute) and node.attr in attributes:
            return None
    text = source.code(test)
    return ast.unparse(test) if "\n" in text else text


def common_end(one: list[Event], other: list[Event]) -> tuple[list[Event], list[Event], list[Event]]:
    """Two branches without what both do last, the softmax most often, and that."""
    ending: list[Event] = []
    while (
        one and other and one[-1].kind == other[-1].kind and one[-1].kind in ("softmax", "dropout", "cast", "zero_nan")
    ):
        if ast.dump(_without_receiver(one[-1].node)) != ast.dump(_without_receiver(other[-1].node)):
            break
        guard = one[-1].guard[:-1] if one[-1].guard else ()
        ending.insert(0, replace(one.pop(), guard=guard))
        other.pop()
    return one, other, ending


def _without_receiver(node: ast.AST) -> ast.AST:
    """A call with its first operand left out, for comparing what two calls do."""
    if not isinstance(node, ast.Call):
        return node
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("softmax", "float", "to", "type_as"):
        return ast.Call(ast.Name(node.func.attr, ast.Load()), node.args, node.keywords)
    return ast.Call(node.func, node.args[1:], node.keywords)
