"""Questions to the value graph: what is this really, what does it depend on, where does it go."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from modernizer.graph.values import Class, Const, Frame, Many, Module, Node, Value, flatten
from modernizer.source import Location

# The same values in the same places: only noise, precision or memory differ.
IDENTITY = frozenset(
    "dropout clone contiguous detach to type float half bfloat16 double cuda cpu type_as data requires_grad identity"
    " alias".split()
)
# The same values, elsewhere: axes moved, split, joined, picked or repeated.
VIEWS = IDENTITY | frozenset(
    "view reshape permute transpose t mT movedim unsqueeze squeeze flatten unflatten expand expand_as repeat"
    " repeat_interleave rearrange split chunk unbind item getitem iter narrow select index_select view_as reshape_as"
    " tensor_split swapaxes unfold".split()
)
ACTIVATIONS = frozenset(
    "relu relu6 gelu silu elu selu celu leaky_relu prelu mish hardswish sigmoid tanh softplus softsign".split()
)
NORMS = frozenset("layer_norm rms_norm batch_norm group_norm instance_norm".split())
SHAPES = frozenset("shape dim rank numel".split())
# What is made of another tensor's size alone.
LIKE = frozenset("zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty"
                 " new_tensor".split())  # fmt: skip


def inputs(value: Value) -> Iterator[Node]:
    """The data a datum is made of directly, containers opened."""
    if isinstance(value, Node):
        yield from value.sources
        return
    for part in value.inputs:
        for leaf in flatten(part):
            if isinstance(leaf, Node):
                yield leaf


def through(value: Value, ops: frozenset[str]) -> Value:
    """The datum behind a chain of operations of the given kinds (their first operand). Merges whose alternatives
    have one origin are seen through as well."""
    seen: set[int] = set()
    while isinstance(value, Node) and id(value) not in seen:
        seen.add(id(value))
        if value.op == "merge":
            origins = {id(o): o for o in (through(a, ops) for a in value.args if not is_none(a))}
            if len(origins) != 1:
                return value
            value = next(iter(origins.values()))
        elif value.op in ops and value.args:
            value = value.args[0]
        else:
            return value
    return value


def base(value: Value) -> Value:
    """What a datum is, apart from dropout, copies and casts."""
    return through(value, IDENTITY)


def strip_views(value: Value) -> Value:
    """The datum of which this is a rearrangement."""
    return through(value, VIEWS)


def is_none(value: Value) -> bool:
    """Whether a value is the constant None."""
    return isinstance(value, Const) and value.value is None


def is_const(value: Value, *wanted: object) -> bool:
    """Whether a value is a constant, and one of `wanted` if any are given."""
    return isinstance(value, Const) and (not wanted or value.value in wanted)


def alternatives(value: Value) -> list[Value]:
    """The values a merge may be (nested merges opened), None left out; the value itself where it is no merge."""
    if isinstance(value, Node) and value.op == "merge":
        return [leaf for option in value.args for leaf in alternatives(option) if not is_none(leaf)]
    return [value]


def ancestors(value: Value, stop: Callable[[Node], bool] | None = None) -> dict[int, Node]:
    """Every datum that a value is made of, itself included, by id. `stop` ends the walk at a node (kept itself)."""
    found: dict[int, Node] = {}
    todo = [leaf for leaf in flatten(value) if isinstance(leaf, Node)]
    while todo:
        node = todo.pop()
        if id(node) in found:
            continue
        found[id(node)] = node
        if stop is None or not stop(node):
            todo.extend(node.sources)
    return found


def data_ancestors(value: Value) -> dict[int, Node]:
    """As `ancestors`, but not through sizes: a tensor's shape says nothing of its content."""
    return ancestors(value, lambda node: node.op in SHAPES or node.op in LIKE)


def depends_on(value: Value, origin: Value) -> bool:
    """Whether the content of `value` is made of `origin`."""
    if not isinstance(origin, Node):
        return False
    first = origin.order  # a datum is made of earlier ones only
    return id(origin) in ancestors(value, lambda n: n.order <= first or n.op in SHAPES or n.op in LIKE)


def users(node: Node) -> list[Node]:
    """The data made of this one directly, each once, in order."""
    return list(dict.fromkeys(node.users))


def sinks(node: Node, ops: frozenset[str] = IDENTITY) -> list[Node]:
    """The first users of a datum that are not operations of the given kinds; merges are passed through."""
    found: dict[int, Node] = {}
    seen: set[int] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for user in users(current):
            if user.op == "merge" or (user.op in ops and user.args and _first(user) is current):
                todo.append(user)
            else:
                found[id(user)] = user
    return sorted(found.values(), key=lambda n: n.order)


def _first(node: Node) -> Value:
    return node.args[0]


def location(node: ast.AST, frame: Frame) -> Location:
    """Where a syntax node of a frame's file stands."""
    return frame.scope.source.location(node)


def enclosing_modules(frame: Frame | None) -> Iterator[Module]:
    """The modules whose methods are active in a frame, innermost first, each once."""
    seen: set[int] = set()
    for active in frame.outward() if frame else ():
        if isinstance(active.receiver, Module) and id(active.receiver) not in seen:
            seen.add(id(active.receiver))
            yield active.receiver


def origin(module: Module) -> Module:
    """The module that a deepcopy was first made from."""
    while module.template is not None:
        module = module.template
    return module


def is_torch(module: Value | None, *names: str) -> bool:
    """Whether a value is a module of one of torch's classes (by short name), not of a class of the project."""
    return isinstance(module, Module) and module.cls is None and module.torch_name in {f"torch.nn.{n}" for n in names}


def same_size(a: Value, b: Value) -> bool:
    """Whether two size expressions are built alike from the same parts, as `4 * cfg.dim` and `4 * cfg.dim` are."""
    if a is b:
        return True
    if isinstance(a, Const) and isinstance(b, Const):
        return a.value == b.value
    if isinstance(a, Many) and isinstance(b, Many):
        return len(a.items) == len(b.items) and all(same_size(x, y) for x, y in zip(a.items, b.items, strict=True))
    if isinstance(a, Node) and isinstance(b, Node) and a.op == b.op and a.name == b.name:
        if a.op in ("config", "input", "unknown", "opaque", "merge") or len(a.inputs) != len(b.inputs) or not a.inputs:
            return False
        return all(same_size(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
    return False


def class_of(frame: Frame) -> Class | None:
    """The class whose method a frame executes, seen through lambdas and inner functions."""
    active: Frame | None = frame
    while active is not None:
        if active.owner is not None:
            return active.owner
        active = active.function.closure if active.function else None
    return None
