"""How many axes a tensor has, as far as the last view, permute or einsum before it tells."""

from __future__ import annotations

import ast
from typing import NamedTuple
from weakref import WeakKeyDictionary

from modernizer.graph.containers import slice_bounds
from modernizer.graph.query import IDENTITY, NORMS
from modernizer.graph.values import Const, Many, Node, Value

_SAME = (
    IDENTITY
    | NORMS
    | frozenset(
        "linear softmax log_softmax relu gelu silu tanh sigmoid exp sqrt neg masked_fill transpose split chunk tril"
        " triu clamp pos cumsum flip roll setitem fill zeros_like ones_like invert logical_not nan_to_num movedim"
        " swapaxes narrow index_select abs rsqrt cos sin softplus elu leaky_relu tensor_split zero"
        " rotary alibi bool byte int long short astype numpy".split()
    )
)
_BROADCAST = frozenset(
    "add sub mul div where and or eq ne lt gt le ge lte gte noteq maximum minimum masked_fill pow floordiv"
    " logical_or logical_and logical_xor polar".split()
)


def rank(value: Value) -> int | None:
    """The number of axes, None where the code does not say. To be asked of a graph that is complete."""
    if isinstance(value, Const):
        return 0 if isinstance(value.value, int | float) else None
    return _facts(value).rank if isinstance(value, Node) else None


def is_number(value: Value) -> bool:
    """Whether a value is a Python or numpy number: a constant, a size, a constructor's option, or computed of these."""
    if isinstance(value, Const):
        return isinstance(value.value, int | float) and not isinstance(value.value, bool)
    return isinstance(value, Node) and _facts(value).is_number


class _Facts(NamedTuple):
    rank: int | None
    is_number: bool


_UNKNOWN = _Facts(None, False)
_KNOWN: WeakKeyDictionary[Node, _Facts] = WeakKeyDictionary()


def _facts(value: Node) -> _Facts:
    """Worked out once a value, from what it is made of; no recursion, as graphs are deep, with many ways to a value."""
    pending = [] if value in _KNOWN else [value]
    while pending:
        top = pending[-1]
        below = () if top in _KNOWN else [v for v in top.sources if v not in _KNOWN and v.order < top.order]
        if below:
            pending.extend(below)
        elif pending.pop() not in _KNOWN:
            _KNOWN[top] = _UNKNOWN  # for whoever asks in a circle
            number = _is_number(top)
            _KNOWN[top] = _Facts(0 if number else _rank(top), number)
    return _KNOWN[value]


def _rank(value: Node) -> int | None:
    known = _unpacked(value)
    if known is not None:
        return known
    if value.op == "merge":
        found = {rank(option) for option in value.args if not (isinstance(option, Const) and option.value is None)}
        return found.pop() if len(found) == 1 else None
    if value.op in (
        "view",
        "reshape",
        "permute",
        "expand",
        "repeat",
        "zeros",
        "ones",
        "empty",
        "rand",
        "randn",
        "full",
    ):
        return _from_sizes(value)
    if value.op in _SAME and value.args:
        return rank(value.args[0])
    if value.op in _BROADCAST:
        ranks = [rank(a) for a in value.args]
        return None if any(r is None for r in ranks) else max(r for r in ranks if r is not None)
    return _special(value)


def _is_number(value: Node) -> bool:
    if value.name.startswith("torch."):
        return False
    if value.op in ("dim", "rank", "config") or _is_factory_argument(value):
        return True
    if value.op == "attr" and value.args and isinstance(value.args[0], Node):
        return is_number(value.args[0]) and value.args[0].op in ("config", "attr")
    if value.op in ("getitem", "item", "iter") and isinstance(value.args[0], Node):  # `config.heads[i]`
        within = ("config", "attr", "getitem") if _has_text_key(value) else ("config", "attr")
        return value.args[0].op in within and is_number(value.args[0])
    return value.op in _ARITHMETIC and bool(value.args) and all(is_number(a) for a in value.args)


def _has_text_key(value: Node) -> bool:
    """Whether a value is `options["width"]`: a mapping's item, of however many mappings within each other."""
    return len(value.args) > 1 and isinstance(value.args[1], Const) and isinstance(value.args[1].value, str)


def _is_factory_argument(value: Node) -> bool:
    """Whether a value was handed to a function that puts a model together: an option, as a constructor's are."""
    return value.op == "input" and value.frame.calls_factory


_ARITHMETIC = frozenset("add sub mul div floordiv mod pow sqrt neg int float round min max abs merge log exp".split())


def _special(value: Node) -> int | None:
    first = rank(value.args[0]) if value.args else None
    if value.op == "parameter" and not value.args:
        return None
    if value.op in ("parameter", "Variable"):
        return first
    if value.op == "matmul":
        if value.name.rpartition(".")[2] == "bmm":
            return 3
        second = rank(value.args[1]) if len(value.args) > 1 else None
        return None if first is None or second is None or min(first, second) < 2 else max(first, second)
    if value.op in _FIXED:
        return _FIXED[value.op]
    if value.op in ("cat", "stack") and value.args and isinstance(value.args[0], Many):
        parts = {rank(part) for part in value.args[0].items} - {None}
        return None if len(parts) != 1 else parts.pop() + (value.op == "stack")  # type: ignore[operator]
    if (
        value.op == "einsum"
        and value.args
        and isinstance(value.args[0], Const)
        and isinstance(value.args[0].value, str)
    ):
        output = value.args[0].value.replace(" ", "").partition("->")[2]
        return len(output) if output and "." not in output else None
    if value.op == "rearrange" and len(value.args) > 1 and isinstance(value.args[1], Const):
        return _rearranged(str(value.args[1].value))
    if value.op == "getitem":
        return None if first is None else _indexed(first, value.args[1])
    if value.op in _MADE_OF and value.args and isinstance(value.args[0], Many):
        return _nesting(value.args[0])
    if value.op in _MADE_OF:
        return first
    if value.op in ("item", "iter"):
        return _of_part(value, first)
    if first is None:
        return None
    change = {
        "unsqueeze": 1,
        "stack": 1,
        "embedding": 1,
        "unbind": 0,
        "select": -1,
        "t": 0,
        "mT": 0,
        "cat": 0,
        "view_as_complex": -1,
        "view_as_real": 1,
        "addmm": 0,
    }
    return first + change[value.op] if value.op in change and not isinstance(value.args[0], Many) else None


_FIXED = {"baddbmm": 3, "arange": 1, "linspace": 1, "outer": 2, "ger": 2, "eye": 2}
_MADE_OF = frozenset("array asarray tensor as_tensor Tensor FloatTensor LongTensor from_numpy".split())


def _nesting(value: Value) -> int | None:
    """How deep lists of numbers or tensors are nested, axes of the tensors included."""
    if not isinstance(value, Many):
        return rank(value)
    found = {_nesting(item) for item in value.items}
    inner = found.pop() if len(found) == 1 else None
    return None if inner is None else inner + 1


def _of_part(value: Node, first: int | None) -> int | None:
    """One of several results: of split and chunk as it was, of anything else one axis less."""
    whole = value.args[0]
    if first is None or not isinstance(whole, Node):
        return None
    return first if whole.op in ("split", "chunk", "tensor_split") else first - 1


def _from_sizes(value: Node) -> int | None:
    sizes = value.args[1:] if value.op in ("view", "reshape", "permute", "expand", "repeat") else value.args
    if "size" in value.kwargs:
        sizes = (value.kwargs["size"],)
    if len(sizes) == 1:
        return _length(sizes[0])
    total = 0
    for size in sizes:
        length = _length(size.args[0]) if isinstance(size, Node) and size.op == "star" else 1
        if length is None:
            return None
        total += length
    return total or None


def _length(sizes: Value) -> int | None:
    """The number of sizes in a shape expression such as `x.size()[:-1] + (heads, width)`."""
    if isinstance(sizes, Many):
        return None if sizes.open else len(sizes.items)
    if isinstance(sizes, Const):
        return 1
    if not isinstance(sizes, Node):
        return None
    if sizes.op == "star":
        return _length(sizes.args[0])
    if sizes.op == "shape":
        return rank(sizes.args[0])
    if sizes.op == "add":
        parts = [_length(part) for part in sizes.args]
        return None if any(p is None for p in parts) else sum(p for p in parts if p is not None)
    if sizes.op == "getitem":
        whole = _length(sizes.args[0])
        cut = sizes.args[1]
        if whole is None or not (isinstance(cut, Node) and cut.op == "slice"):
            return None
        bounds = slice_bounds(cut)
        return None if bounds is None else len(range(whole)[bounds])
    return 1 if sizes.op in ("dim", "floordiv", "mul", "config", "int") else None


def _indexed(axes: int, index: Value) -> int | None:
    parts = index.items if isinstance(index, Many) else [index]
    for part in parts:
        if isinstance(part, Const) and part.value is None:
            axes += 1
        elif isinstance(part, Const) and isinstance(part.value, int) and not isinstance(part.value, bool):
            axes -= 1
        elif not (is_ellipsis(part) or (isinstance(part, Node) and part.op == "slice")):
            return None
    return axes


def is_ellipsis(value: Value) -> bool:
    """Whether a value is `...`."""
    return isinstance(value, Const) and value.value is Ellipsis


def _rearranged(pattern: str) -> int | None:
    output = pattern.partition("->")[2]
    if not output or "..." in output:
        return None
    count, inside = 0, False
    for token in output.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside, count = True, count + 1
        elif token == ")":
            inside = False
        elif not inside:
            count += 1
    return count


def _unpacked(value: Node) -> int | None:
    """`b, t, c = x.shape` says that x has three axes."""
    for size in value.users:
        if size.op != "dim" or not isinstance(size.node, ast.expr):
            continue
        pattern = size.frame.scope.source.parents.get(size.node)
        if not isinstance(pattern, ast.Tuple | ast.List) or not isinstance(pattern.ctx, ast.Store):
            continue
        if not any(isinstance(part, ast.Starred) for part in pattern.elts):
            return len(pattern.elts)
    return None
