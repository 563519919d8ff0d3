"""Which function of its input an elementwise computation is: decided by computing it, not by how it is spelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from modernizer.graph.query import IDENTITY
from modernizer.graph.values import Const, External, Node, Value

SAMPLES = (-4.0, -2.5, -1.0, -0.3, 0.0, 0.2, 0.9, 1.7, 3.1)
PRECISE = 1e-9
TOLERANCE = 1e-3  # the published approximations of GELU's constants have four digits


class Unknown(Exception):
    """A computation that is no elementwise function of numbers."""


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _elu(x: float, alpha: float = 1.0, scale: float = 1.0) -> float:
    return scale * (x if x > 0 else alpha * math.expm1(x))


def _leaky_relu(x: float, slope: float = 0.01, inplace: float = 0.0) -> float:
    return x if x > 0 else slope * x


# The functions by what they compute. The first that fits gives the name.
KNOWN: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "gelu": _gelu,
    "gelu (tanh)": _tanh_gelu,
    "quick gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "elu": _elu,
    "selu": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),
    "squared relu": lambda x: max(x, 0.0) ** 2,
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
}
RELU_FAMILY = frozenset({"relu", "gelu", "gelu (tanh)", "quick gelu", "elu", "selu", "leaky relu"})

OPERATIONS: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b, "neg": lambda a: -a, "tanh": math.tanh, "erf": math.erf, "sigmoid": _sigmoid,
    "exp": math.exp, "sqrt": math.sqrt, "square": lambda a: a * a, "abs": abs, "log": math.log,
    "reciprocal": lambda a: 1 / a,
    "relu": lambda a, inplace=0.0: max(a, 0.0), "silu": lambda a: a * _sigmoid(a), "elu": _elu, "celu": _elu,
    "selu": KNOWN["selu"], "leaky_relu": _leaky_relu, "relu6": KNOWN["relu6"], "mish": KNOWN["mish"],
    "softplus": KNOWN["softplus"], "maximum": max, "max": max, "tensor": float, "as_tensor": float, "float": float,
    "clamp": lambda a, min=-math.inf, max=math.inf: (min if a < min else max if a > max else a),
    "clamp_min": max,
    "hardswish": lambda a: a * min(max(a + 3, 0.0), 6.0) / 6, "softsign": lambda a: a / (1 + abs(a)),
    "quick_gelu": KNOWN["quick gelu"], "rsqrt": lambda a: 1 / math.sqrt(a),
    "logsigmoid": lambda a: math.log(_sigmoid(a)),
}  # fmt: skip
ELEMENTWISE = frozenset(OPERATIONS) | {"gelu", "merge"} | IDENTITY
NUMBERS = {"math.pi": math.pi, "math.e": math.e, "numpy.pi": math.pi, "torch.pi": math.pi, "numpy.e": math.e}
# Arguments of modules that change what they compute.
MODULE_ARGUMENTS = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "celu": ("alpha",)}


def evaluate(value: Value, leaves: Mapping[int, float], choice: Mapping[int, int]) -> float:
    """The number a computation gives when `leaves` (by id) are numbers and `choice` says which way each merge goes."""
    if id(value) in leaves:
        return leaves[id(value)]
    if isinstance(value, Const) and isinstance(value.value, int | float):
        return float(value.value)
    if isinstance(value, External) and value.dotted in NUMBERS:
        return NUMBERS[value.dotted]
    if not isinstance(value, Node):
        raise Unknown
    if value.op == "merge":
        return evaluate(value.args[choice.get(id(value), 0)], leaves, choice)
    if value.op in IDENTITY:
        return evaluate(value.args[0], leaves, choice)
    return _operation(value, leaves, choice)


def _operation(node: Node, leaves: Mapping[int, float], choice: Mapping[int, int]) -> float:
    if node.op == "gelu":
        kinds = [*node.args[1:2], *node.kwargs.values(), *(node.module.args.values() if node.module else ())]
        approximate = any(isinstance(k, Const) and k.value == "tanh" for k in kinds)
        return (_tanh_gelu if approximate else _gelu)(evaluate(node.args[0], leaves, choice))
    if node.op not in OPERATIONS:
        raise Unknown
    numbers = [evaluate(a, leaves, choice) for a in node.args]
    named = {k: evaluate(v, leaves, choice) for k, v in node.kwargs.items() if k not in ("inplace", "device", "dtype")}
    if node.module is not None:
        given = node.module.args
        numbers += [evaluate(given[n], leaves, choice) for n in MODULE_ARGUMENTS.get(node.op, ()) if n in given]
    if node.op == "leaky_relu" and "negative_slope" in named:
        numbers.append(named.pop("negative_slope"))
    try:
        return OPERATIONS[node.op](*numbers, **named)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise Unknown from error


def name_of(value: Value, leaf: Value, choice: Mapping[int, int]) -> str:
    """The name of a function of one variable: one of KNOWN, `leaky relu`, `linear`, or `other`."""
    try:
        found = [evaluate(value, {id(leaf): x}, choice) for x in SAMPLES]
    except Unknown:
        return "other"
    for tolerance in (PRECISE, TOLERANCE):  # the two forms of GELU are nearer to each other than some write either
        for name, function in KNOWN.items():
            if _close(found, [function(x) for x in SAMPLES], tolerance):
                return name
    slope = -found[2]  # at -1
    if _close(found, [found[6] / SAMPLES[6] * x for x in SAMPLES]):
        return "linear"
    return "leaky relu" if slope < 1 and _close(found, [_leaky_relu(x, slope) for x in SAMPLES]) else "other"


def is_gate(value: Value, gate: Value, content: Value, choice: Mapping[int, int]) -> bool:
    """Whether a computation is `f(gate) * content`: twice the content gives twice the result, none gives none."""
    try:
        rows = [[evaluate(value, {id(gate): x, id(content): y}, choice) for x in SAMPLES] for y in (1.0, 2.0, 0.0)]
    except Unknown:
        return False
    once, twice, none = rows
    return any(once) and _close(twice, [2 * v for v in once]) and not any(none)


def _close(found: Sequence[float], wanted: Sequence[float], tolerance: float = TOLERANCE) -> bool:
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(found, wanted, strict=True))
