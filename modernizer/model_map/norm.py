"""Norms: torch's, `F.layer_norm`, and those a program writes out as a formula of mean and deviation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from modernizer.graph import Graph
from modernizer.graph.query import LIKE, NORMS, SHAPES, inputs, is_torch
from modernizer.graph.values import Const, Frame, Function, Many, Module, Node, Value, flatten

TINY = 1e-12  # an eps below this does not keep a constant row finite
CASTS = frozenset("type to float half bfloat16 double type_as contiguous clone data alias".split())
LAYOUT = CASTS | frozenset("transpose permute movedim unsqueeze squeeze view reshape expand expand_as t".split())
CLAMPS = frozenset("clamp clamp_min maximum".split())
# What asks a tensor for anything but its content.
SIZES = SHAPES | LIKE | {"attr"}

FEATURE_NORMS = frozenset({"layer", "rms"})


@dataclass(eq=False)
class Norm:
    """One evaluation of a norm: the call whose result is its argument, normalised.

    `kind` is `layer` or `rms`, or torch's operation where it normalises over something else than the features.
    `call` is evaluated in `frame`; it is None where the norm has no call of its own (an element of a Sequential).
    `argument` is the operand that is normalised; `eps` is None where its value is open.
    """

    kind: str
    source: Node
    result: Node
    frame: Frame
    call: ast.Call | None
    argument: ast.expr | None
    module: Module | None
    eps: float | None
    inner: Frame | None = None  # the activation that holds the formula, where it is a function of the program

    @property
    def is_per_position(self) -> bool:
        """Whether every position is normalised on its own: only such a norm may move."""
        return self.kind in FEATURE_NORMS


class Norms:
    """All norm evaluations of a program, found by what they compute."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.all: list[Norm] = []
        self._by_result: dict[int, Norm] = {}
        self._by_frame: dict[int, Norm] = {}
        self._of_frame: dict[int, Norm | None] = {}
        self._find_functions()
        self._find_operations()

    def of_result(self, value: Value) -> Norm | None:
        """The norm whose result a datum is."""
        return self._by_result.get(id(value))

    def around(self, node: Node) -> Norm | None:
        """The norm of whose computation a datum is part."""
        return self._by_result.get(id(node)) or self._norm_of_frame(node.frame)

    def _norm_of_frame(self, frame: Frame) -> Norm | None:
        if id(frame) not in self._of_frame:
            found = next((self._by_frame[id(f)] for f in frame.outward() if id(f) in self._by_frame), None)
            self._of_frame[id(frame)] = found
        return self._of_frame[id(frame)]

    def _find_functions(self) -> None:
        """Functions whose result is an argument normalised; of nested ones the outermost counts."""
        for frame in self.graph.machine.frames:  # callers come before those they call
            if frame.function is None or frame.caller is None or self._norm_of_caller(frame):
                continue
            found = self._as_norm(frame)
            if found is not None:
                self._add(found)
                self._by_frame[id(frame)] = found

    def _norm_of_caller(self, frame: Frame) -> bool:
        return any(id(f) in self._by_frame for f in frame.outward())

    def _as_norm(self, frame: Frame) -> Norm | None:
        result = frame.result
        if not isinstance(result, Node) or result.frame not in _below(result.frame, frame):
            return None
        for value in frame.arguments.values():
            if not isinstance(value, Node) or value.order >= result.order:
                continue
            formula = normalises(result, value)
            if formula is not None:
                module = frame.receiver if isinstance(frame.receiver, Module) else None
                call, argument = _call_of(self.graph, frame, value)
                assert frame.caller is not None
                kind, eps = formula
                return Norm(kind, value, result, frame.caller, call, argument, module, eps, frame)
        return None

    def _find_operations(self) -> None:
        for node in self.graph.machine.nodes:
            if node.op not in NORMS or self._norm_of_frame(node.frame) or not node.args:
                continue
            source = node.args[0]
            if isinstance(source, Node):
                call, argument = self._operation_call(node, source)
                self._add(
                    Norm(_kind(node), source, node, node.frame, call, argument, node.module, _eps_of_operation(node))
                )

    def _operation_call(self, node: Node, source: Node) -> tuple[ast.Call | None, ast.expr | None]:
        if not isinstance(node.node, ast.Call):
            return None, None
        if node.module is not None:
            callees = [v for f, v in self.graph.machine.at.get(node.node.func, []) if f is node.frame]
            if not any(v is node.module for v in callees):
                return None, None  # it runs inside a Sequential
        return node.node, _argument(self.graph, node.node, node.frame, source)

    def _add(self, norm: Norm) -> None:
        self.all.append(norm)
        self._by_result[id(norm.result)] = norm


def _below(frame: Frame, top: Frame) -> list[Frame]:
    """`frame` alone if it was called from `top`, else nothing."""
    return [frame] if any(f is top for f in frame.outward()) else []


def _call_of(graph: Graph, frame: Frame, value: Node) -> tuple[ast.Call | None, ast.expr | None]:
    """The call that entered a frame and the operand that became `value`, if it calls just that function."""
    call, caller = frame.call, frame.caller
    if not isinstance(call, ast.Call) or caller is None:
        return None, None
    for at, callee in graph.machine.at.get(call.func, []):
        if at is caller and _enters(callee, frame):
            return call, _argument(graph, call, caller, value)
    return None, None


def _enters(callee: Value, frame: Frame) -> bool:
    if isinstance(callee, Module):
        return callee is frame.receiver
    function = getattr(callee, "function", callee)
    return isinstance(function, Function) and frame.function is not None and function.node is frame.function.node


def _argument(graph: Graph, call: ast.Call, frame: Frame, source: Node) -> ast.expr | None:
    operands = [*call.args, *(keyword.value for keyword in call.keywords)]
    if isinstance(call.func, ast.Attribute):
        operands.append(call.func.value)
    for operand in operands:
        if any(f is frame and value is source for f, value in graph.machine.at.get(operand, [])):
            return operand
    return None


def _kind(node: Node) -> str:
    return {"layer_norm": "layer", "rms_norm": "rms"}.get(node.op, node.op)


def _eps_of_operation(node: Node) -> float | None:
    if node.module is not None:
        given = node.module.args.get("eps")
    else:
        given = node.kwargs.get("eps") or (node.args[4] if len(node.args) > 4 else None)
    if given is None:
        return 1e-5
    return _number(given)


def _number(value: Value) -> float | None:
    number = value.value if isinstance(value, Const) else None
    return float(number) if isinstance(number, int | float) and not isinstance(number, bool) else None


# -- the formulas


def made_of(value: Value, x: Node) -> bool:
    """Whether the content of `value` is made of `x`. Only data younger than `x` need a look."""
    todo = [leaf for leaf in flatten(value) if isinstance(leaf, Node)]
    seen: set[int] = set()
    while todo:
        node = todo.pop()
        if node is x:
            return True
        if id(node) not in seen and node.order > x.order and node.op not in SIZES:
            seen.add(id(node))
            todo.extend(inputs(node))
    return False


def normalises(result: Node, x: Node) -> tuple[str, float | None] | None:
    """Kind and eps where `result` is `x` normalised (and scaled and shifted), None where it is anything else."""
    value = _through(result, LAYOUT)
    if isinstance(value, Node) and value.op in NORMS and value.args:
        return (_kind(value), _eps_of_operation(value)) if _through(value.args[0], LAYOUT) is x else None
    if not isinstance(value, Node) or value.op not in ("add", "sub", "mul", "div"):
        return None
    factors = list(_factors(_unshifted(value, x), x, True))
    centres = [f for f, above in factors if above and _is_centre(f, x)]
    rest = [(f, above) for f, above in factors if f not in centres]
    if len(centres) != 1 or len(rest) != 1:
        return None
    factor, above = rest[0]
    spread = _spread(factor, x, inverse=above)
    if spread is None:
        return None
    centred = _through(centres[0], CASTS) is not x
    if spread[0] == "deviation" and not centred:
        return None
    return ("layer" if centred else "rms"), spread[1]


def _through(value: Value, ops: frozenset[str]) -> Value:
    while isinstance(value, Node) and value.op in ops and value.args:
        value = value.args[0]
    return value


def _unshifted(value: Value, x: Node) -> Value:
    """Without what is added that has nothing to do with `x`: the bias."""
    value = _through(value, LAYOUT)
    while isinstance(value, Node) and value.op in ("add", "sub") and len(value.args) == 2:
        dependent = [a for a in value.args if made_of(a, x)]
        if len(dependent) != 1:
            break
        value = _through(dependent[0], LAYOUT)
    return value


def _factors(value: Value, x: Node, above: bool) -> Iterator[tuple[Value, bool]]:
    """The factors of a product that are made of `x`; `above` is False for those it is divided by."""
    value = _through(value, CASTS)
    if not isinstance(value, Node) or not made_of(value, x):
        return
    if value.op in ("mul", "div") and len(value.args) == 2 and value is not x:
        yield from _factors(value.args[0], x, above)
        yield from _factors(value.args[1], x, above == (value.op == "mul"))
    else:
        yield value, above


def _is_centre(value: Value, x: Node) -> bool:
    """`x` itself or `x - mean(x)`."""
    value = _through(value, CASTS)
    if value is x:
        return True
    if not isinstance(value, Node) or value.op != "sub" or len(value.args) != 2:
        return False
    mean = _through(value.args[1], LAYOUT)
    return _through(value.args[0], CASTS) is x and _is_mean(mean, x)


def _is_mean(value: Value, x: Node) -> bool:
    if isinstance(value, Node) and value.op in ("item", "getitem") and isinstance(value.args[0], Node):
        pair = value.args[0]
        return pair.op in ("var_mean", "std_mean") and _through(pair.args[0], CASTS) is x
    if isinstance(value, Node) and value.op == "div":  # sum / size
        value = _through(value.args[0], LAYOUT)
        return isinstance(value, Node) and value.op == "sum" and _through(value.args[0], CASTS) is x
    return isinstance(value, Node) and value.op == "mean" and _through(value.args[0], CASTS) is x


def _spread(value: Value, x: Node, inverse: bool) -> tuple[str, float | None] | None:
    """(`deviation` or `size`, eps) where a value is the deviation or root mean square of `x`, or one over it."""
    value = _through(value, LAYOUT)
    if not isinstance(value, Node):
        return None
    if inverse:
        if value.op == "rsqrt":
            return _variance(value.args[0], x)
        if value.op == "pow" and _number(value.args[1]) == -0.5:
            return _variance(value.args[0], x)
        if value.op == "reciprocal":
            return _spread(value.args[0], x, False)
        return None
    if value.op == "add" and len(value.args) == 2:
        return _with_eps(value, x, lambda part: _spread(part, x, False))
    if value.op in CLAMPS:
        return _spread(value.args[0], x, False)
    if value.op == "sqrt" or (value.op == "pow" and _number(value.args[1]) == 0.5):
        return _variance(value.args[0], x)
    if value.op == "std" and _is_centre(value.args[0], x):
        return "deviation", 0.0
    if value.op in ("norm", "vector_norm") and _is_centre(value.args[0], x):
        return "size", 0.0
    if value.op == "mul":  # norm(x) * size ** -0.5
        parts = [p for p in value.args if made_of(p, x)]
        return _spread(parts[0], x, False) if len(parts) == 1 else None
    return None


def _with_eps(value: Node, x: Node, inner: object) -> tuple[str, float | None] | None:
    assert callable(inner)
    parts = [p for p in value.args if made_of(p, x)]
    added = [p for p in value.args if not made_of(p, x)]
    if len(parts) != 1:
        return None
    found: tuple[str, float | None] | None = inner(parts[0])
    return (found[0], _number(added[0])) if found else None


def _variance(value: Value, x: Node) -> tuple[str, float | None] | None:
    """As `_spread`, for the square: a variance or a mean of squares, eps added."""
    value = _through(value, LAYOUT)
    if not isinstance(value, Node):
        return None
    if value.op == "add" and len(value.args) == 2:
        return _with_eps(value, x, lambda part: _variance(part, x))
    if value.op in CLAMPS:
        return _variance(value.args[0], x)
    if value.op == "var" and _is_centre(value.args[0], x):
        return "deviation", 0.0
    if value.op == "pow" and isinstance(value.args[0], Node) and value.args[0].op == "std":
        return "deviation", 0.0
    if value.op in ("item", "getitem") and isinstance(value.args[0], Node) and value.args[0].op == "var_mean":
        return ("deviation", 0.0) if _through(value.args[0].args[0], CASTS) is x else None
    if value.op == "sub" and all(isinstance(a, Node) and made_of(a, x) for a in value.args):
        first = _variance(value.args[0], x)  # mean(x ** 2) - mean(x) ** 2
        return ("deviation", 0.0) if first else None
    if value.op in ("div", "mul") and len(value.args) == 2:  # sum(x ** 2) / size
        parts = [p for p in value.args if made_of(p, x)]
        return _variance(parts[0], x) if len(parts) == 1 else None
    if value.op in ("mean", "sum") and value.args:
        centre = _squared(value.args[0])
        if centre is not None and _is_centre(centre, x):
            return ("size" if _through(centre, CASTS) is x else "deviation"), 0.0
    return None


def _squared(value: Value) -> Value | None:
    """What a value is the square of."""
    value = _through(value, CASTS)
    if not isinstance(value, Node):
        return None
    if value.op == "pow" and _number(value.args[1]) == 2:
        return value.args[0]
    if value.op == "square":
        return value.args[0]
    if value.op == "mul" and value.args[0] is value.args[1]:
        return value.args[0]
    return None


def is_norm_module(module: Value) -> bool:
    """Whether a module is one of torch's norms."""
    return is_torch(module, "LayerNorm", "RMSNorm")


def size_of(many: Value) -> Value:
    """The size a norm was given: `d` for both `d` and `(d,)`."""
    return many.items[0] if isinstance(many, Many) and len(many.items) == 1 else many
