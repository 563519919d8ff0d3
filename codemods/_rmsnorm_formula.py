"""Reads a layer norm that a class of the program writes out: its parameters, its eps, and how it measures deviation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from codemods._rmsnorm_sites import Refused
from modernizer.graph.query import inputs, is_none, users
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Function, Many, Module, Node, Value
from modernizer.model_map.norm import CASTS, SIZES, Norm, made_of

REDUCTIONS = frozenset("mean var std sum var_mean std_mean norm vector_norm".split())
ODD = "it computes more than a norm with a weight and a bias of its own"


@dataclass(frozen=True)
class Formula:
    """What a class computes: `weight` and `bias` are the names of its parameters, '' where it has none.

    `size` is the expression for the shape of the parameters, evaluated in the activation `init` of the constructor.
    `oddity` says what of the formula an RMSNorm has no form of, '' where centred features give the same.
    """

    weight: str
    bias: str
    size: ast.expr
    init: Frame
    eps: Value
    oddity: str


def read_formula(norm: Norm, init: Frame | None) -> Formula:
    """The formula of a norm of a class of the program. Raises Refused where it is not a layer norm and nothing more.

    `init` is the activation of the constructor of the module that ran.
    """
    module, inner = norm.module, norm.inner
    assert module is not None and module.cls is not None and inner is not None
    x = norm.source
    if init is None or init.function is None or inner.function is None:
        raise Refused("its class has no constructor of its own")
    if inner.function.name not in ("forward", "__call__") or inner.receiver is not module:
        raise Refused(
            "the norm is one method of a class that does other things too", "give the norm a class of its own"
        )
    data = [v for v in inner.arguments.values() if isinstance(v, Node)]
    if [id(v) for v in data] != [id(x)]:
        raise Refused("its class takes more than what it norms")
    _check_parts(norm, module)
    own = {id(v): name for name, value in module.attributes.items() for v in _options(value) if _is_parameter(v)}
    value = _cast(norm.result)
    if isinstance(value, Node) and value.op == "layer_norm":
        weight, bias, eps, oddity = _of_torchs(value, x, own)
    else:
        weight, bias, eps, oddity = _written_out(value, x, own)
    stored = sorted(set(own.values()) - {weight, bias})
    if stored:
        raise Refused(f"its class has more parameters: {', '.join(stored)}")
    size = _size(init, weight or bias)
    if bias and not weight:
        raise Refused("it has a bias and no weight")
    if weight and not all(_starts_at_one(v) for v in _options(module.attributes[weight]) if isinstance(v, Node)):
        raise Refused(f"its `{weight}` does not start as ones")
    return Formula(weight, bias, size, init, eps, oddity)


def _options(value: Value) -> Iterator[Value]:
    if isinstance(value, Node) and value.op == "merge":
        for option in value.args:
            yield from _options(option)
    else:
        yield value


def _is_parameter(value: Value) -> bool:
    return isinstance(value, Node) and value.op == "parameter"


def _cast(value: Value) -> Value:
    while isinstance(value, Node) and value.op in CASTS and value.args:
        value = value.args[0]
    return value


def _check_parts(norm: Norm, module: Module) -> None:
    """Everything on the way from what is normed to the result is made of it, of parameters and of numbers."""
    x, todo, seen = norm.source, [norm.result], set[int]()
    while todo:
        node = todo.pop()
        if id(node) in seen or node is x:
            continue
        seen.add(id(node))
        if node.op in SIZES or node.op in ("parameter", "config", "unknown"):
            continue
        if node.op in REDUCTIONS and made_of(node, x) and not _over_features(node, x):
            raise Refused("it does not norm over the last axis alone")
        if node.op in ("input", "dropout", "opaque"):
            raise Refused(ODD)
        todo.extend(inputs(node))


def _over_features(node: Node, x: Node) -> bool:
    given = node.kwargs.get("dim", node.kwargs.get("axis"))
    place = 2 if node.op in ("norm", "vector_norm") else 1
    if given is None and len(node.args) > place:
        given = node.args[place]
    if isinstance(given, Many) and len(given.items) == 1:
        given = given.items[0]
    if not isinstance(given, Const) or not isinstance(given.value, int) or isinstance(given.value, bool):
        return False
    axes = rank(x)
    return given.value == -1 or (axes is not None and given.value == axes - 1)


def _of_torchs(node: Node, x: Node, own: dict[int, str]) -> tuple[str, str, Value, str]:
    """`F.layer_norm(x, shape, weight, bias, eps)`."""
    if _cast(node.args[0]) is not x:
        raise Refused(ODD)
    names = ("normalized_shape", "weight", "bias", "eps")
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    parts = [_named(given.get(name), own) for name in ("weight", "bias")]
    return parts[0], parts[1], given.get("eps", Const(1e-5)), ""


def _named(value: Value | None, own: dict[int, str]) -> str:
    """The parameter of the class that a value is, '' for None."""
    if value is None:
        return ""
    names = {own.get(id(option), "") for option in _options(_cast(value)) if not is_none(option)}
    if not names:
        return ""
    if len(names) > 1 or "" in names:
        raise Refused(ODD)
    return names.pop()


def _written_out(value: Value, x: Node, own: dict[int, str]) -> tuple[str, str, Value, str]:
    bias = ""
    if isinstance(value, Node) and value.op == "add" and len(value.args) == 2:
        sides = [a for a in value.args if not made_of(a, x)]
        if len(sides) == 1:
            bias = _named(sides[0], own)
            value = _cast(next(a for a in value.args if a is not sides[0]))
    factors = list(_factors(value, True))
    mine = [(f, above) for f, above in factors if not made_of(f, x)]
    if any(not above for _, above in mine) or len(mine) > 1:
        raise Refused(ODD)
    weight = _named(mine[0][0], own) if mine else ""
    rest = [(f, above) for f, above in factors if made_of(f, x)]
    centres = [f for f, above in rest if above and isinstance(f, Node) and f.op == "sub"]
    spreads = [(f, above) for f, above in rest if f not in centres]
    if len(centres) != 1 or len(spreads) != 1 or not _is_mean_left(centres[0], x):
        raise Refused(ODD)
    eps, oddity = _spread(*spreads[0], x)
    return weight, bias, eps, oddity


def _factors(value: Value, above: bool) -> Iterator[tuple[Value, bool]]:
    value = _cast(value)
    if isinstance(value, Node) and value.op in ("mul", "div") and len(value.args) == 2:
        yield from _factors(value.args[0], above)
        yield from _factors(value.args[1], above == (value.op == "mul"))
    else:
        yield value, above


def _is_mean_left(value: Value, x: Node) -> bool:
    """`x - mean(x)`, and nothing scaled."""
    return isinstance(value, Node) and "alpha" not in value.kwargs and _cast(value.args[0]) is x


UNBIASED = "it divides by the unbiased deviation"
OUTSIDE = "it adds eps to the deviation, not to the variance"
BY_HAND = "it divides by a count of its own"
CLAMPED = "it bounds the deviation from below"


def _spread(value: Value, above: bool, x: Node) -> tuple[Value, str]:
    """The eps of what a norm divides by, and what is odd about it. The model map has seen that it is a deviation."""
    said: list[str] = []
    eps: Value | None = None
    rooted = above  # `rsqrt` and powers say so themselves
    todo: Value = _cast(value)
    while isinstance(todo, Node):
        if todo.op == "add" and len(todo.args) == 2 and eps is None:
            parts = [a for a in todo.args if made_of(a, x)]
            added = [a for a in todo.args if not made_of(a, x)]
            if len(parts) != 1:
                raise Refused(ODD)
            eps = added[0]
            said += [] if rooted else [OUTSIDE]
            todo = _plain(parts[0])
        elif todo.op in ("sqrt", "rsqrt") or (todo.op == "pow" and _number(todo) in (0.5, -0.5)):
            rooted = True
            todo = _plain(todo.args[0])
        elif todo.op == "reciprocal":
            rooted = False
            todo = _plain(todo.args[0])
        elif todo.op in ("clamp", "clamp_min", "maximum"):
            said.append(CLAMPED)
            todo = _plain(todo.args[0])
        elif todo.op == "pow" and _number(todo) == 2 and isinstance(todo.args[0], Node) and todo.args[0].op == "std":
            todo = todo.args[0]
        elif todo.op in ("var", "std", "item", "getitem"):
            pair = todo.args[0] if todo.op in ("item", "getitem") else todo
            if not isinstance(pair, Node):
                raise Refused(ODD)
            said += [] if _is_biased(pair) else [UNBIASED]
            break
        elif todo.op in ("mean", "sub"):  # of the squares, or those less the square of the mean
            break
        elif todo.op in ("div", "mul", "sum", "norm", "vector_norm"):
            said.append(BY_HAND)
            break
        else:
            raise Refused(ODD)
    return eps if eps is not None else Const(0.0), " and ".join(dict.fromkeys(said))


def _plain(value: Value) -> Value:
    value = _cast(value)
    while isinstance(value, Node) and value.op in ("unsqueeze", "expand_as", *CASTS) and value.args:
        value = value.args[0]
    return value


def _number(node: Node) -> object:
    return node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], Const) else None


def _is_biased(node: Node) -> bool:
    """Whether a variance divides by the number of features, not by one less."""
    given = node.kwargs.get("unbiased", node.kwargs.get("correction"))
    if given is None and len(node.args) > 2:
        given = node.args[2]  # var(x, dim, unbiased)
    return isinstance(given, Const) and given.value in (False, 0)


# -- the constructor


def _size(init: Frame, name: str) -> ast.expr:
    """The expression that says how many numbers a parameter has."""
    function = init.function
    assert isinstance(function, Function)
    found: list[ast.expr] = []
    for node in ast.walk(function.node):
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if value is not None else []  # type: ignore[attr-defined]
        if any(isinstance(t, ast.Attribute) and t.attr == name for t in targets):
            found += _filled(value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_parameter":
            key = node.args[0] if len(node.args) == 2 else None
            found += _filled(node.args[1]) if isinstance(key, ast.Constant) and key.value == name else []
    if len({ast.dump(size) for size in found}) != 1:
        raise Refused("how many features it norms is not stated where its parameters are made")
    return found[0]


def _filled(value: ast.AST | None) -> list[ast.expr]:
    """The size in `nn.Parameter(torch.ones(size))`."""
    for node in ast.walk(value) if value is not None else ():
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in FILLERS:
            plain = [a for a in node.args if not isinstance(a, ast.Starred)]
            return plain if len(plain) == len(node.args) == 1 else []
    return []


FILLERS = frozenset("ones zeros empty Tensor FloatTensor rand randn".split())


def _starts_at_one(parameter: Node) -> bool:
    """Whether a parameter starts as that of an RMSNorm does."""
    start = _cast(parameter.args[0]) if parameter.args else parameter
    if isinstance(start, Node) and (start.op == "ones" or (start.op == "fill" and _number(start) == 1)):
        return True
    for user in [u for node in (parameter, *users(parameter)) for u in users(node)]:
        last = user.name.rpartition(".")[2]
        if last == "ones_" or (last in ("constant_", "fill_") and _number(user) == 1):
            return True
    return False
