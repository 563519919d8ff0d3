"""What the masks of an attention are: boolean, binary or float, which fill, and whether every row keeps an open key."""

from __future__ import annotations

import math

from modernizer.graph.query import IDENTITY, is_const, is_none, same_size, strip_views
from modernizer.graph.rank import is_number
from modernizer.graph.values import Const, External, Many, Node, Value

COMPARISONS = frozenset("eq ne noteq lt gt le ge lte gte isnan isinf logical_not logical_and logical_or isin".split())
_KEEPS_VALUES = (IDENTITY - {"dropout"}) | frozenset(
    "view reshape unsqueeze squeeze expand expand_as repeat getitem flatten permute transpose byte bool int long"
    " repeat_interleave Variable from_numpy tensor as_tensor unflatten".split()
)
_KEEPS_LAST_AXIS = (IDENTITY - {"dropout"}) | frozenset(
    "view reshape unsqueeze expand byte bool int long Variable from_numpy tensor as_tensor parameter repeat".split()
)
# What takes a dtype, and gives another than its operand's without.
TYPED = frozenset("ones zeros full full_like ones_like zeros_like tensor as_tensor to type".split())
SMALLEST_FILL = -1000.0


def is_boolean(value: Value) -> bool:
    """Whether a tensor surely is boolean."""
    if not isinstance(value, Node):
        return False
    if value.op == "merge":
        return all(is_boolean(v) for v in value.args if not is_none(v))
    if value.op in COMPARISONS or value.op == "bool":
        return True
    if value.op in TYPED:
        operands = (*value.args, *value.kwargs.values())
        if any(isinstance(a, External) and a.dotted in ("torch.bool", "builtins.bool") for a in operands):
            return True
        if value.op not in ("to", "type") or any(_names_a_type(a) for a in operands[1:]):
            return False
    if value.op in ("and", "or", "xor", "invert"):
        return all(is_boolean(a) for a in value.args)
    keeps = (_KEEPS_VALUES | {"tril", "triu"}) - {"byte", "int", "long", "float", "half", "double", "bfloat16"}
    return value.op in keeps and bool(value.args) and is_boolean(value.args[0])


def _names_a_type(value: Value) -> bool:
    """Whether an operand of `to` or `type` may be a type; devices and flags are not."""
    if isinstance(value, Const):
        return isinstance(value.value, str) and value.value.startswith("torch.")
    return not (isinstance(value, Node) and value.op == "attr" and value.name == "device")


def is_float(value: Value) -> bool:
    """Whether a tensor surely is floating, so that it means the same as SDPA's additive mask."""
    if isinstance(value, Const):
        return isinstance(value.value, float)
    if not isinstance(value, Node):
        return False
    if value.op == "merge":
        return all(is_float(v) for v in value.args if not is_none(v))
    if value.op in ("float", "double", "parameter", "linear", "embedding", "div", "matmul", "einsum", "log", "exp"):
        return True
    if value.op in ("add", "sub", "mul", "neg", "pow"):
        return any(is_float(a) for a in value.args)
    if value.op in ("masked_fill", "where"):
        return any(is_float(a) for a in value.args[0 if value.op == "masked_fill" else 1 :])
    if value.op in ("ones", "zeros", "rand", "randn", "full", "empty"):
        return not value.kwargs and value.op in ("rand", "randn")
    return value.op in (_KEEPS_VALUES | {"tril", "triu"}) - {"byte", "bool", "int", "long", "to", "type"} and (
        bool(value.args) and is_float(value.args[0])
    )


def is_binary(value: Value) -> bool:
    """Whether every entry surely is 0 or 1."""
    if not isinstance(value, Node):
        return False
    if value.op in COMPARISONS or value.op in ("ones", "zeros", "ones_like", "zeros_like", "bool"):
        return True
    if value.op == "merge":
        return all(is_binary(v) for v in value.args if not is_none(v))
    if value.op in ("mul", "and", "or"):
        return all(is_binary(a) for a in value.args)
    if value.op == "parameter" and value.name != "Parameter":
        return bool(value.args) and is_binary(value.args[0])
    return value.op in (_KEEPS_VALUES | {"tril", "triu"}) and bool(value.args) and is_binary(value.args[0])


def fill_number(value: Value) -> float | None:
    """The number that blocked scores are set to; the lowest of a dtype counts as -1e30; None where it is not known."""
    if isinstance(value, Const):
        return float(value.value) if isinstance(value.value, int | float) else None
    if isinstance(value, External):
        infinite = value.dotted.rpartition(".")[2] in ("inf", "Inf", "infty", "Infinity")
        low = value.dotted.rpartition(".")[2] in ("NINF",)
        return math.inf if infinite else -math.inf if low else None
    if not isinstance(value, Node) or (not value.args and value.op != "attr"):
        return None
    if value.op == "neg":
        inner = fill_number(value.args[0])
        return None if inner is None else -inner
    if value.op == "attr" and value.name in ("min", "max") and value.args:
        owner = value.args[0]
        if isinstance(owner, Node) and owner.op == "finfo":
            return -1e30 if value.name == "min" else 1e30
        return None
    if value.op in ("tensor", "as_tensor", "FloatTensor", "Tensor") or value.op in IDENTITY:
        inner_value = value.args[0]
        if isinstance(inner_value, Many) and len(inner_value.items) == 1:
            inner_value = inner_value.items[0]
        return fill_number(inner_value)
    if value.op in ("full_like", "new_tensor", "new_full", "full") and len(value.args) > 1:
        return fill_number(value.args[1])
    if value.op == "mul":
        return _scaled_ones(value)
    if value.op == "merge":
        numbers = {fill_number(v) for v in value.args}
        return numbers.pop() if len(numbers) == 1 else None
    return None


def _scaled_ones(value: Node) -> float | None:
    for ones, number in (value.args, value.args[::-1]):
        if isinstance(ones, Node) and ones.op in ("ones_like", "ones", "new_ones"):
            return fill_number(number)
    return None


def keeps_a_key(blocked: Value, attends: bool = False) -> bool:
    """Whether a causal pattern leaves every row a key, however it is cut at the right and the top.

    Lower triangles hold the first column, strict comparisons of one range with itself too.
    """
    if not isinstance(blocked, Node):
        return False
    if blocked.op == "merge":
        found = [v for v in blocked.args if not is_none(v)]
        return bool(found) and all(keeps_a_key(v, attends) for v in found)
    if blocked.op in ("eq", "ne", "noteq", "lt", "le", "gt", "ge", "lte", "gte") and len(blocked.args) == 2:
        return _compared(blocked, attends)
    if blocked.op in ("invert", "logical_not"):
        return keeps_a_key(blocked.args[0], not attends)
    if blocked.op == "sub" and isinstance(blocked.args[0], Const) and blocked.args[0].value == 1:
        return keeps_a_key(blocked.args[1], not attends)
    if blocked.op in ("tril", "triu"):
        return _triangle(blocked, attends)
    if blocked.op == "getitem":
        return _keeps_first_column(blocked.args[1]) and keeps_a_key(blocked.args[0], attends)
    if blocked.op == "unsqueeze" and not (len(blocked.args) > 1 and is_const(blocked.args[1], 0, 1, -3, -4)):
        return False
    if blocked.op in _KEEPS_LAST_AXIS and blocked.args:
        return keeps_a_key(blocked.args[0], attends)
    return False


def _compared(node: Node, attends: bool) -> bool:
    left, right = node.args
    if isinstance(right, Const) and right.value in (0, 1, True, False):
        truth_is_one = (node.op == "eq") == bool(right.value)
        if node.op in ("eq", "ne", "noteq"):
            return keeps_a_key(left, attends if truth_is_one else not attends)
        if node.op == "gt" and right.value == 0:
            return keeps_a_key(left, attends)
        if node.op == "lt" and right.value == 1:
            return keeps_a_key(left, not attends)
        return False
    if not attends and node.op in ("lt", "gt"):
        return _is_range_against_itself(left, right)
    if attends and node.op in ("le", "ge", "lte", "gte"):
        return _is_range_against_itself(left, right)
    return False


def _is_range_against_itself(left: Value, right: Value) -> bool:
    """Two views of ranges of one length: the diagonal is equal, whichever of them is the row."""
    a, b = strip_views(left), strip_views(right)
    if not (isinstance(a, Node) and isinstance(b, Node) and a.op == b.op == "arange"):
        return False
    if a is b:
        return True
    return len(a.args) == len(b.args) == 1 and same_size(a.args[0], b.args[0])


def _triangle(node: Node, attends: bool) -> bool:
    """A triangle of ones: `tril` says where to attend, `triu` above the diagonal what is blocked."""
    ones = node.args[0]
    while isinstance(ones, Node) and ones.op in _KEEPS_LAST_AXIS and ones.args:
        ones = ones.args[0]
    if not (isinstance(ones, Node) and ones.op in ("ones", "ones_like", "full", "new_ones")):
        return False
    if ones.op == "full" and not (
        len(ones.args) > 1 and isinstance(ones.args[1], Const) and ones.args[1].value in (1, True)
    ):
        return False
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", node.kwargs.get("k", Const(0)))
    if not isinstance(given, Const) or not isinstance(given.value, int):
        return False
    return given.value >= 0 if node.op == "tril" and attends else given.value >= 1 and node.op == "triu" and not attends


def _keeps_first_column(index: Value) -> bool:
    """Whether the last index starts at the first column. An index that leaves the last axis alone does."""
    parts = index.items if isinstance(index, Many) else [index]
    last = parts[-1] if parts else None
    if isinstance(last, Const):
        return last.value is Ellipsis
    if isinstance(last, Node) and last.op == "slice":
        start, _, step = last.args
        begins = is_none(start) or (isinstance(start, Const) and start.value == 0)
        return begins and (is_none(step) or (isinstance(step, Const) and step.value == 1))
    return False


def is_scalar_tensor(value: Value) -> bool:
    """Whether a factor is a tensor of one number, or one number per head, so that it can as well multiply the query."""
    if is_number(value):
        return True
    if not isinstance(value, Node):
        return False
    if value.op in ("sqrt", "exp", "clamp", "neg", "log", "rsqrt", "abs", "softplus") or value.op in IDENTITY:
        return bool(value.args) and is_scalar_tensor(value.args[0])
    if value.op in ("mul", "div", "add", "sub", "pow"):
        return all(is_scalar_tensor(a) for a in value.args)
    if value.op in ("tensor", "FloatTensor", "Tensor", "as_tensor", "parameter") and value.args:
        made = value.args[0]
        if isinstance(made, Many):
            return len(made.items) == 1 and is_number(made.items[0])
        return is_scalar_tensor(made)
    if value.op in ("ones", "zeros", "full", "rand", "randn") and value.args:
        sizes = value.args[:1] if value.op == "full" else value.args
        flat = [i for s in sizes for i in (s.items if isinstance(s, Many) else [s])]
        return all(isinstance(s, Const) and s.value == 1 for s in flat[-2:])
    return False
