"""Where query and key of an attention can be rotated: at their product, or at the call that hands them in."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codemods._survey import Cannot, place
from modernizer.edit import Edit, Insert
from modernizer.graph import Graph
from modernizer.graph.query import SHAPES, is_none, location, origin
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Function, Module, Node, Value
from modernizer.model_map.attention import Attention, Operand
from modernizer.removal import Removal
from modernizer.syntax import names_below, walk

SCALAR_OPS = frozenset(
    "config dim shape sqrt pow rsqrt mul div add sub neg floordiv float int getitem attr number".split()
)
SHAPE_READS = frozenset("size shape dim device dtype ndim is_cuda ndimension numel new_zeros new_ones type".split())
MAX_LIFT = 3


@dataclass(frozen=True)
class Part:
    """One operand as code: an expression, with time and feature axes of what it evaluates to."""

    expr: ast.expr
    time: int
    feature: int

    @property
    def is_plain(self) -> bool:
        return self.time == -2 and self.feature == -1


@dataclass(frozen=True)
class Context:
    """One attention as seen from an anchor: the frame in which the anchor's code ran."""

    attention: Attention
    frame: Frame
    changes: bool  # whether it gets relative positions


@dataclass(frozen=True)
class Anchor:
    """A product, or a call that leads to one, in one function, with all its contexts."""

    node: ast.expr
    function: Function
    contexts: tuple[Context, ...]
    query: Part
    key: Part

    @property
    def frame(self) -> Frame:
        return self.contexts[0].frame


class Code:
    """The syntax around anchors: statements, names, which evaluations belong to which."""

    def __init__(self, graph: Graph, removal: Removal) -> None:
        self.graph, self.tree = graph, removal

    def value(self, node: ast.AST, frame: Frame) -> Value | None:
        """What a node evaluated to in a frame, the last time."""
        found = [v for f, v in self.graph.machine.at.get(node, ()) if f is frame]
        return found[-1] if found else None

    def statement(self, node: ast.AST) -> ast.stmt:
        return self.tree.statement(node)

    def loads(self, function: Function, name: str) -> list[ast.Name]:
        return [n for n in names_below(function.node).get(name, ()) if isinstance(n.ctx, ast.Load)]

    def is_shape_read(self, node: ast.Name) -> bool:
        """Whether only the size, type or device of a tensor is asked for, or whether it is None."""
        above = self.tree.parent(node)
        if isinstance(above, ast.Attribute):
            return above.attr in SHAPE_READS
        if isinstance(above, ast.Compare):
            return all(isinstance(op, ast.Is | ast.IsNot) for op in above.ops)
        return isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id == "len"

    def self_name(self, frame: Frame) -> tuple[str, Module] | None:
        """The name under which the module whose method runs can be read in a frame."""
        active: Frame | None = frame
        while active is not None:
            if isinstance(active.receiver, Module) and active.function is not None:
                arguments = active.function.node.args
                first = next(iter([*arguments.posonlyargs, *arguments.args]), None)
                if first is not None and active.names.get(first.arg) is active.receiver:
                    return first.arg, active.receiver
            active = active.function.closure if active.function else None
        return None


def product_anchor(code: Code, contexts: Sequence[Context]) -> Anchor:
    """The anchor at the score product (or SDPA call) itself."""
    first = contexts[0]
    node, function = first.attention.scores.node, first.frame.function
    assert isinstance(node, ast.expr)
    if function is None:
        raise Cannot("this attention stands outside of any function", place(first.attention))
    parts: list[Part] = []
    for operands in ([c.attention.query_operand for c in contexts], [c.attention.key_operand for c in contexts]):
        found = [operand_expression(code, node, c, o) for c, o in zip(contexts, operands, strict=True)]
        if any(e is not found[0] for e in found) or found[0] is None:
            raise Cannot("which expressions are the query and the key here cannot be told", place(first.attention))
        operand = operands[0]
        if operand.time_axis is None or operand.feature_axis is None:
            raise Cannot("which axes of query and key are time and features cannot be told", place(first.attention))
        parts.append(Part(found[0], operand.time_axis, operand.feature_axis))
    return Anchor(node, function, tuple(contexts), parts[0], parts[1])


def operand_expression(code: Code, node: ast.expr, context: Context, operand: Operand) -> ast.expr | None:
    """The part of a product's expression that evaluates to an operand."""
    candidates: list[ast.expr] = []
    if isinstance(node, ast.BinOp):
        candidates = [node.left, node.right]
    elif isinstance(node, ast.Call):
        candidates = [*node.args, *(k.value for k in node.keywords if k.arg)]
        if isinstance(node.func, ast.Attribute):
            candidates.append(node.func.value)
        for listed in list(candidates):
            if isinstance(listed, ast.List | ast.Tuple):
                candidates += listed.elts
    found = [e for e in candidates if code.value(e, context.frame) is operand.value]
    return found[0] if len(found) == 1 else None


def unwrap(code: Code, part: Part, contexts: Sequence[Context]) -> Part:
    """The name behind an operand, seen through transpositions and scaling by a number, with which rotation commutes."""
    while not isinstance(part.expr, ast.Name):
        inner = _unwrap_once(code, part, contexts)
        if inner is None:
            return part
        part = inner
    return part


def trace(code: Code, part: Part, function: Function, contexts: Sequence[Context]) -> list[Part]:
    """The names an operand goes by, last first: through assignments of one name that only transpose or scale."""
    found = [unwrap(code, part, contexts)]
    while isinstance(found[-1].expr, ast.Name):
        name = found[-1].expr
        values = [code.value(name, c.frame) for c in contexts]
        assigned = [
            s for s in walk(function.node)
            if isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name)
            and s.targets[0].id == name.id
            and all(code.value(s.value, c.frame) is v for c, v in zip(contexts, values, strict=True))
        ]  # fmt: skip
        if len(assigned) != 1 or any(v is None for v in values):
            break
        inner = unwrap(code, Part(assigned[0].value, found[-1].time, found[-1].feature), contexts)
        if not isinstance(inner.expr, ast.Name):
            break
        found.append(inner)
    return found


def _unwrap_once(code: Code, part: Part, contexts: Sequence[Context]) -> Part | None:
    expr = part.expr
    if isinstance(expr, ast.BinOp) and isinstance(expr.op, ast.Mult | ast.Div):
        if all(is_number(code.value(expr.right, c.frame)) for c in contexts):
            return Part(expr.left, part.time, part.feature)
        if isinstance(expr.op, ast.Mult) and all(is_number(code.value(expr.left, c.frame)) for c in contexts):
            return Part(expr.right, part.time, part.feature)
        return None
    if isinstance(expr, ast.Attribute) and expr.attr in ("mT",):
        return Part(expr.value, part.feature, part.time) if {part.time, part.feature} == {-1, -2} else None
    if not isinstance(expr, ast.Call):
        return None
    receiver, arguments = _method_call(code, expr, contexts)
    if receiver is None or expr.keywords:
        return None
    name = expr.func.attr if isinstance(expr.func, ast.Attribute) else ""
    if name == "contiguous" and not arguments:
        return Part(receiver, part.time, part.feature)
    if name in ("transpose", "swapaxes") and len(arguments) == 2:
        return _transposed(code, part, receiver, arguments, contexts)
    swaps_last = [_int(code.value(a, contexts[0].frame)) for a in arguments] in ([0, 1, 3, 2], [0, 2, 1])
    if name == "permute" and swaps_last and {part.time, part.feature} == {-1, -2}:
        return Part(receiver, part.feature, part.time)
    return None


def _method_call(code: Code, expr: ast.Call, contexts: Sequence[Context]) -> tuple[ast.expr | None, list[ast.expr]]:
    """Receiver and arguments of `x.f(…)` or `torch.f(x, …)`."""
    if not isinstance(expr.func, ast.Attribute):
        return None, []
    is_method = all(isinstance(code.value(expr.func.value, c.frame), Node) for c in contexts)
    if is_method:
        return expr.func.value, list(expr.args)
    return (expr.args[0], list(expr.args[1:])) if expr.args else (None, [])


def _transposed(
    code: Code, part: Part, receiver: ast.expr, arguments: list[ast.expr], contexts: Sequence[Context]
) -> Part | None:
    axes: list[int] = []
    for argument in arguments:
        values = {_int(code.value(argument, c.frame)) for c in contexts}
        value = values.pop() if len(values) == 1 else None
        if value is None:
            return None
        if value >= 0:
            ranks = {rank(v) if (v := code.value(receiver, c.frame)) is not None else None for c in contexts}
            known = ranks.pop() if len(ranks) == 1 else None
            if known is None:
                return None
            value -= known
        axes.append(value)
    swap = {axes[0]: axes[1], axes[1]: axes[0]}
    return Part(receiver, swap.get(part.time, part.time), swap.get(part.feature, part.feature))


def _int(value: Value | None) -> int | None:
    return value.value if isinstance(value, Const) and isinstance(value.value, int) else None


def is_number(value: Value | None) -> bool:
    """Whether a factor is surely a plain number: a constant, a size, an option, or computed from these."""
    if isinstance(value, Const):
        return isinstance(value.value, int | float)
    if not isinstance(value, Node):
        return False
    if value.op in ("config", "dim"):
        return True
    if value.op == "merge" or (value.op in SCALAR_OPS and value.op not in SHAPES):
        return bool(value.args) and all(is_number(a) for a in value.args if not is_none(a))
    return value.op == "dim"


# -- from a product to the call that hands its operands in


def lift(code: Code, anchor: Anchor, is_only_read: bool = True) -> list[Anchor]:
    """The anchors one call further out, one for each call expression. Raises Cannot where the operands are not simply
    arguments of the function, or read for something else and `is_only_read` asks for that."""
    traces = [trace(code, p, anchor.function, anchor.contexts) for p in (anchor.query, anchor.key)]
    query, key = (found[-1] for found in traces)
    names = [_parameter(code, anchor, found, is_only_read) for found in traces]
    calls: dict[ast.AST, list[Context]] = {}
    for context in anchor.contexts:
        caller, call = context.frame.caller, context.frame.call
        if caller is None or caller.function is None or call is None:
            raise Cannot("query and key come from outside of all code that was read", place(context.attention))
        calls.setdefault(call, []).append(Context(context.attention, caller, context.changes))
    found: list[Anchor] = []
    for call, contexts in calls.items():
        if not isinstance(call, ast.Call) or contexts[0].frame.function is None:
            raise Cannot("query and key are handed in by something that is no plain call", place(contexts[0].attention))
        parts = [
            Part(_argument(anchor.function, call, name, contexts[0]), part.time, part.feature)
            for name, part in zip(names, (query, key), strict=True)
        ]
        found.append(Anchor(call, contexts[0].frame.function, tuple(contexts), parts[0], parts[1]))
    return found


def _parameter(code: Code, anchor: Anchor, found: Sequence[Part], is_only_read: bool) -> str:
    """The parameter an operand is, if it is read for nothing else."""
    first = found[-1].expr
    if not isinstance(first, ast.Name):
        raise Cannot("query and key are computed inside this function", place(anchor.contexts[0].attention))
    for context in anchor.contexts:
        given = context.frame.arguments.get(first.id)
        if given is None or code.value(first, context.frame) is not given:
            raise Cannot("query and key are computed inside this function", place(anchor.contexts[0].attention))
    used = [part.expr for part in found]
    for part in found if is_only_read else ():
        assert isinstance(part.expr, ast.Name)
        for load in code.loads(anchor.function, part.expr.id):
            if load not in used and not code.is_shape_read(load) and not _is_other(code, anchor, part.expr, load):
                raise Cannot(f"`{load.id}` is read for something else too", location(load, anchor.frame))
    return first.id


def _is_other(code: Code, anchor: Anchor, name: ast.Name, load: ast.Name) -> bool:
    """Whether a name is bound to something else where it is loaded."""
    pairs = [(code.value(load, c.frame), code.value(name, c.frame)) for c in anchor.contexts]
    return all(a is not None and a is not b for a, b in pairs)


def _argument(function: Function, call: ast.Call, name: str, context: Context) -> ast.expr:
    """The expression that a call binds to a parameter."""
    spec = function.node.args
    names = [a.arg for a in [*spec.posonlyargs, *spec.args]]
    is_bound = function.owner is not None and not _is_static(function)
    place_ = names.index(name) - (1 if is_bound else 0) if name in names else -1
    before = call.args[: place_ + 1]
    if 0 <= place_ < len(call.args) and not any(isinstance(a, ast.Starred) for a in before):
        return call.args[place_]
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    raise Cannot("query and key are handed in by a call whose arguments cannot be told apart", place(context.attention))


def _is_static(function: Function) -> bool:
    decorators = getattr(function.node, "decorator_list", [])
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in decorators)


# -- who is changed and who is not, at an anchor


def constructions(code: Code, contexts: Sequence[Context]) -> dict[ast.AST, list[Module]]:
    """The constructor expressions of the modules on which contexts run."""
    found: dict[ast.AST, list[Module]] = {}
    for context in contexts:
        named = code.self_name(context.frame)
        if named is not None and (call := origin(named[1]).call) is not None:
            found.setdefault(call, []).append(origin(named[1]))
    return found


def told_by_arguments(anchor: Anchor) -> str | None:
    """A test on the function's arguments that holds in every context that changes and in no other."""
    function = anchor.function.node
    names = [a.arg for a in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]]
    for name in names:
        given = [(c.frame.arguments[name], c.changes) for c in anchor.contexts]
        if all(is_none(value) if changes else isinstance(value, Node) for value, changes in given):
            return f"{name} is None"
    for first, second in _pairs(names):
        same = [c.frame.arguments[first] is c.frame.arguments[second] for c in anchor.contexts]
        both = all(isinstance(c.frame.arguments[n], Node) for c in anchor.contexts for n in (first, second))
        if both and all(s == c.changes for s, c in zip(same, anchor.contexts, strict=True)):
            return f"{first} is {second}"
    return None


def kept_test(anchor: Anchor, test: str) -> tuple[list[Edit], str]:
    """A test on a function's arguments as it can be asked at the anchor: by itself, or kept in a variable from the
    start where the arguments' names are bound anew."""
    function = anchor.function.node
    names = {n.id for n in walk(ast.parse(test)) if isinstance(n, ast.Name)}
    if not names & {n.id for n in walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}:
        return [], test
    if not isinstance(function, ast.FunctionDef):
        raise Cannot("what tells self-attention from attention to another sequence is bound anew before it is needed",
                     place(anchor.contexts[0].attention))  # fmt: skip
    name = free_name(function, "is_self_attention", "attends_to_itself")
    body = function.body
    is_doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1
    return [Insert(anchor.frame.path, body[1] if is_doc else body[0], f"{name} = {test}\n", "before")], name


def free_name(function: ast.AST, *wanted: str) -> str:
    """The first of the names, or one with a number, that means nothing yet in a function."""
    used = {n.id for n in walk(function) if isinstance(n, ast.Name)}
    used |= {a.arg for a in walk(function) if isinstance(a, ast.arg)}
    return next(n for n in (*wanted, *(f"{wanted[0]}_{i}" for i in range(2, 99))) if n not in used)


def simple_statement(code: Code, anchor: Anchor) -> ast.stmt | None:
    """The statement an anchor is part of, if a line before it runs once, just before it."""
    node: ast.AST | None = anchor.node
    while node is not None and not isinstance(node, ast.stmt):
        if isinstance(node, ast.Lambda | ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp | ast.IfExp):
            return None
        node = code.tree.parent(node)
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr | ast.AugAssign):
        return None
    for above in code.tree.above(node):
        if isinstance(above, ast.For | ast.While):
            return None
        if isinstance(above, ast.FunctionDef | ast.Lambda):
            return node if above is anchor.function.node else None
    return None


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            yield first, second
