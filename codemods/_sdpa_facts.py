"""Questions about values and syntax that the parts of the new call depend on."""

from __future__ import annotations

import ast

from codemods._sdpa_events import Event
from codemods._sdpa_masks import (
    fill_number,
)
from codemods._sdpa_trace import Trace
from modernizer.graph.query import VIEWS, data_ancestors, is_const
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Many, Node, Value
from modernizer.syntax import walk


def swaps_last_two(node: Node) -> bool:
    """Whether an operation swaps exactly the last two axes."""
    axes = rank(node.args[0]) if node.args else None
    if node.op == "mT":
        return True
    if node.op == "t":
        return axes == 2 or node.name.rpartition(".")[2] == "t"
    if node.op == "transpose" and len(node.args) == 3:
        places = [a.value for a in node.args[1:] if isinstance(a, Const) and isinstance(a.value, int)]
        if len(places) != 2:
            return False
        if axes is not None:
            places = [p - axes if p >= 0 else p for p in places]
        return sorted(places) == [-2, -1]
    if node.op == "permute":
        order = [a for part in node.args[1:] for a in (part.items if isinstance(part, Many) else [part])]
        count = len(order)
        numbers = [a.value % count for a in order if isinstance(a, Const) and isinstance(a.value, int)]
        return count >= 2 and numbers == [*range(count - 2), count - 1, count - 2]
    return False


def complement_factor(value: Value, binary: Value) -> float | None:
    """c where a value is `c * (1 - binary)`."""
    if not (isinstance(value, Node) and value.op == "mul"):
        return None
    for number, rest in (value.args, value.args[::-1]):
        known = fill_number(number)
        if known is None or not (isinstance(rest, Node) and rest.op == "sub" and is_const(rest.args[0], 1)):
            continue
        if rest.args[1] is binary:
            return known
    return None


def is_pure(node: ast.expr, trace: Trace) -> bool:
    """Whether evaluating an expression later gives the same and has no side effect: no module runs in it."""
    for inner in walk(node):
        if not isinstance(inner, ast.Call):
            continue
        values = trace.values(inner)
        if not values or not all(isinstance(v, Const) or (isinstance(v, Node) and is_plain(v)) for v in values):
            return False
    return True


def is_plain(node: Node) -> bool:
    """Whether an operation can be done again: no weights, no chance, nothing unknown in it."""
    learned = (
        "linear",
        "dropout",
        "opaque",
        "layer_norm",
        "conv1d",
        "embedding",
        "merge",
        "batch_norm",
        "rand",
        "randn",
    )
    return node.op not in learned and not (node.name.endswith("_") and not node.name.endswith("__"))


def is_in_place(node: ast.AST, names: set[str]) -> bool:
    """A method that changes one of the named variables."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_")):
        return False
    root: ast.AST = node.func.value
    while isinstance(root, ast.Attribute | ast.Subscript):
        root = root.value
    return isinstance(root, ast.Name) and root.id in names and root.id != "self"


def changed_in_place(statement: ast.stmt) -> list[ast.expr]:
    """The expressions whose tensor a statement changes."""
    found: list[ast.expr] = []
    for node in walk(statement):
        if isinstance(node, ast.AugAssign):
            target = node.target
            found.append(target.value if isinstance(target, ast.Subscript) else target)
        elif isinstance(node, ast.Assign):
            found += [t.value for t in node.targets if isinstance(t, ast.Subscript)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            in_place = node.func.attr.endswith("_") and not node.func.attr.endswith("__")
            found += [node.func.value] if in_place else []
    return found


def storage(value: Value) -> set[int]:
    """The tensors that may share memory with a value: those it is a view of."""
    found: set[int] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, Node) and id(node) not in found:
            found.add(id(node))
            in_place = node.name.endswith("_") and not node.name.endswith("__")
            if node.op == "merge":
                todo.extend(node.args)
            elif node.op in VIEWS or node.op == "setitem" or in_place:
                todo.extend(node.args[:1])
    return found


def is_own(mask: Value, frame: Frame) -> bool:
    """Whether a pattern is made in this call or by the module itself."""
    made = [n for n in data_ancestors(mask).values() if n.op in ("tril", "triu", "arange")]
    return bool(made) and all(
        node.frame is frame or (frame.receiver is not None and node.frame.receiver is frame.receiver) for node in made
    )


def guard_texts(event: Event) -> list[tuple[str, int]]:
    """The tests around an event, for comparing two of them."""
    return [(ast.dump(node.test), branch) for node, branch in event.guard] + [
        (ast.dump(test), int(is_true)) for test, is_true in event.tests
    ]


def leaves_of(value: Value) -> list[Value]:
    """The alternatives of a merge, None left out."""
    if isinstance(value, Node) and value.op == "merge":
        return [leaf for inner in value.args for leaf in leaves_of(inner)]
    return [] if isinstance(value, Const) and value.value is None else [value]
