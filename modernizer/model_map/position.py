"""Position: something that is made of places alone, not of content, and is added to the stream of a model."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modernizer.graph import Graph
from modernizer.graph.query import (
    LIKE,
    SHAPES,
    VIEWS,
    class_of,
    inputs,
    is_const,
    is_torch,
    location,
    strip_views,
    through,
)  # fmt: skip
from modernizer.graph.rank import is_number
from modernizer.graph.values import Const, Frame, Many, Node, Value, flatten

if TYPE_CHECKING:
    from modernizer.model_map.map import Role

REDUCTIONS = frozenset("mean sum max min amax amin norm std var prod logsumexp".split())
RANGES = frozenset("arange linspace range cumsum".split())
WAVES = frozenset("sin cos polar".split())
# What is true or false of data: a mask made of them is not their content.
COMPARISONS = frozenset(
    "eq ne noteq lt lte le gt gte ge isnan isin logical_not logical_and logical_or invert not".split()
)
NOISE = frozenset("rand randn randint rand_like randn_like normal bernoulli multinomial randperm uniform".split())
PRODUCTS = frozenset("matmul einsum baddbmm scaled_dot_product_attention".split())
ADDS = frozenset({"add"})
# Operations of which all operands but the first give a size, a type or a device.
AS_OTHER = frozenset("expand_as view_as reshape_as type_as to expand view reshape repeat".split())
KINDS = frozenset("device dtype requires_grad is_cuda ndim".split())
CASTS = frozenset("int long bool byte short".split())
ASKS = frozenset("get_device is_floating_point is_contiguous element_size".split())


@dataclass(frozen=True, eq=False)
class Position:
    """Positions added to a stream in one context: `add` = `stream` + `term`."""

    add: Node
    stream: Value
    term: Value
    kind: str  # "learned", "sinusoid" or "table"
    given: tuple[Node, ...]  # arguments of the model that can replace or shift the positions

    @property
    def frame(self) -> Frame:
        return self.add.frame


@dataclass(frozen=True, eq=False)
class PositionSite:
    """One place in the code that adds positions, with all contexts in which it runs."""

    node: ast.AST
    frame: Frame
    contexts: tuple[Position, ...]
    others: tuple[Node, ...] = ()  # its evaluations in which what is added is no position, or nothing is added to


class Contents:
    """Which data are free of content: made of sizes, ranges, tables and parameters alone."""

    def __init__(self, graph: Graph) -> None:
        self.optional = _optional_parameters(graph)
        # What a factory is given builds the model; what a model's methods are given is content.
        self.handed = {id(v) for run in graph.runs if run.frame for v in run.frame.arguments.values()}
        self._known: dict[int, frozenset[Node] | None] = {}
        self._kinds: dict[int, str] = {}
        self._tokens: frozenset[int] = frozenset()
        looked_up = [n for n in graph.machine.nodes if n.op == "embedding" and n.module is not None and n.args]
        self._tokens = frozenset(id(n.module) for n in looked_up if not self.is_free(n.args[0]))
        self._known.clear()  # a start token that the code itself fills in is content as much as those that follow

    def given(self, value: Value) -> frozenset[Node] | None:
        """The optional arguments that `value` is made of if it is otherwise free of content, None if it is not."""
        if id(value) not in self._known:
            self._compute(value)
        return self._known[id(value)]

    def is_free(self, value: Value) -> bool:
        return self.given(value) is not None

    def _compute(self, value: Value) -> None:
        """Without recursion: graphs are deeper than Python's stack."""
        todo: list[tuple[Value, bool]] = [(value, False)]
        while todo:
            current, ready = todo.pop()
            if id(current) in self._known and not ready:
                continue
            parts = self._parts(current)
            if not ready:
                self._known[id(current)] = None  # what it is while its own parts are looked at
                todo.append((current, True))
                todo.extend((part, False) for part in parts if id(part) not in self._known)
                continue
            self._known[id(current)] = self._own(current, parts)

    def _parts(self, value: Value) -> list[Node]:
        if not isinstance(value, Node):
            return [leaf for leaf in flatten(value) if isinstance(leaf, Node)]
        if value.op in COMPARISONS or (value.op in NOISE and not _fills_parameter(value)):
            return []
        return [] if value.op == "cumsum" else content_inputs(value)

    def _own(self, value: Value, parts: list[Node]) -> frozenset[Node] | None:
        if isinstance(value, Node):
            if value.op == "input":
                if id(value) not in self.handed:
                    return frozenset()
                return frozenset({value}) if value.node in self.optional else None
            if value.op in NOISE and not _fills_parameter(value):
                return None
            if value.op == "opaque" or value.op.startswith("torch_"):
                return None if any(self._known[id(p)] is None for p in parts) or not _is_pure(value) else frozenset()
            if value.op == "cumsum" and not _counts_kept(value):
                return None
            is_token = value.op == "embedding" and id(value.module) in self._tokens
            if is_token and value.args and "range" not in self._evidences(value.args[0]):
                return None
        given: set[Node] = set()
        for part in parts:
            known = self._known[id(part)]
            if known is None:
                return None
            given |= known
        return frozenset(given)

    def kind(self, value: Value) -> str:
        """How a content-free value tells one place from another; "" where it does not."""
        if id(value) not in self._kinds:
            self._kinds[id(value)] = self._kind(value)
        return self._kinds[id(value)]

    def _kind(self, value: Value) -> str:
        found = self._evidences(value)
        if "learned" in found:
            return "learned"
        if "wave" in found and found & {"range", "filled"}:
            return "sinusoid"
        if "mask" in found:
            return ""
        return "table" if found & {"range", "by hand"} else ""

    def _evidences(self, value: Value) -> set[str]:
        """What the operations that a content-free value is made of say about how places are told apart."""
        found: set[str] = set()
        seen: set[int] = set()
        todo: list[Node] = [leaf for leaf in flatten(value) if isinstance(leaf, Node)]
        while todo:
            node = todo.pop()
            if id(node) in seen or node.op in SHAPES or node.op in COMPARISONS:
                continue
            seen.add(id(node))
            if _is_one_for_all(node):
                continue
            found.add(self._evidence(node))
            if not (node.op == "embedding" and is_torch(node.module, "Embedding")):
                todo.extend(inputs(node) if node.op == "parameter" else content_inputs(node))
        return found

    def _evidence(self, node: Node) -> str:
        """What one operation says about how places are told apart."""
        if node.op in RANGES:
            return "range"
        if node.op in WAVES:
            return "wave"
        if node.op == "embedding" and is_torch(node.module, "Embedding") and node.args:
            # A mask among the numbers looked up gives padding a row of its own: they count places all the same.
            return "learned" if self._kind(node.args[0]) or "range" in self._evidences(node.args[0]) else ""
        if node.op == "parameter" and (is_table(node) if node.module is None else _is_whole_table(node)):
            return "learned"
        if node.op in ("tril", "triu", "masked_fill"):
            return "mask"
        if node.op == "setitem":
            return "by hand" if _is_filled_by_hand(node) else "filled"
        return ""


def _is_filled_by_hand(node: Node) -> bool:
    """Whether a table was made of zeros by putting numbers in, cell by cell."""
    cells: set[tuple[object, ...]] = set()
    current: Value = node
    while isinstance(current, Node) and current.op == "setitem" and len(current.args) == 3:
        index = current.args[1]
        parts = index.items if isinstance(index, Many) else [index]
        if len(parts) < 2 or not all(isinstance(p, Const) for p in parts):
            return False
        cells.add(tuple(p.value for p in parts if isinstance(p, Const)))
        current = current.args[0]
    return len({cell[0] for cell in cells}) > 1 and isinstance(current, Node) and current.op in ("zeros", "empty")


def content_inputs(node: Node) -> list[Node]:
    """The data that the content of a datum is made of, not those that only say its size, type or device."""
    if (
        node.op in SHAPES
        or node.op in LIKE
        or node.op in ASKS
        or node.op == "parameter"
        or (node.op == "attr" and node.name in KINDS)
    ):
        return []
    if node.op in AS_OTHER or "out" in node.kwargs:  # what was in `out` before is overwritten
        return [leaf for leaf in flatten(node.args[0]) if isinstance(leaf, Node)] if node.args else []
    return list(inputs(node))


def is_table(parameter: Node) -> bool:
    """Whether a parameter has at least two axes longer than one: places and features."""
    return len(_long_axes(parameter)) >= 2


def _is_whole_table(parameter: Node) -> bool:
    """Whether it is every row of an embedding: added as it is, row by row, it has one for each place."""
    return parameter.name == "weight" and is_torch(parameter.module, "Embedding")


def _is_one_for_all(node: Node) -> bool:
    """Whether it is one row of a learned table, or what its rows have in common: the same at every place."""
    if node.op not in REDUCTIONS and node.op not in ("getitem", "select", "item", "iter", "unbind"):
        return False
    table = strip_views(node.args[0]) if node.args else None
    if not isinstance(table, Node) or table.op != "parameter":
        return False
    index = node.args[1] if node.op == "getitem" and len(node.args) > 1 else None
    if index is None:
        return True
    if node.args[0] is not table:  # which axis is which is not known behind a view
        return any(is_number(part) for part in flatten(index))
    sizes = _sizes(table)
    parts = index.items if isinstance(index, Many) else [index]
    return any(
        is_number(part) and not (axis < len(sizes) and is_const(sizes[axis], 1)) for axis, part in enumerate(parts)
    )


def _long_axes(parameter: Node) -> list[Value]:
    """The sizes other than one of a parameter, as its initial value states them; none where it does not."""
    return [size for size in _sizes(parameter) if not is_const(size, 1)]


def _sizes(parameter: Node) -> list[Value]:
    made = strip_views(parameter.args[0]) if parameter.args else None
    while (
        isinstance(made, Node) and made.op in ("mul", "div", "trunc_normal", "normal", "uniform", "neg") and made.args
    ):
        made = next((strip_views(a) for a in made.args if isinstance(a, Node)), None)
    if not isinstance(made, Node) or made.op not in (
        "zeros",
        "randn",
        "rand",
        "empty",
        "ones",
        "Tensor",
        "FloatTensor",
    ):
        return []
    sizes: list[Value] = list(made.args)
    if len(sizes) == 1 and isinstance(sizes[0], Many):
        sizes = sizes[0].items
    return sizes


def _counts_kept(node: Node) -> bool:
    """Whether a running sum counts the tokens that are no padding: positions. One of separators counts segments."""
    counted = through(node.args[0], VIEWS | CASTS) if node.args else None
    return isinstance(counted, Node) and counted.op in (
        "ne",
        "noteq",
        "input",
        "logical_not",
        "invert",
        "ones",
        "ones_like",
        "fill",
    )


def _fills_parameter(node: Node) -> bool:
    """Whether random numbers are put into a parameter, in place: its initialisation."""
    return node.name.endswith("_") and bool(node.args)


def _is_pure(node: Node) -> bool:
    """Whether an unknown function of content-free things is surely content-free: one of numpy or torch."""
    return node.name.startswith(("torch.", "numpy.", "math.", "builtins."))


def _optional_parameters(graph: Graph) -> set[ast.arg]:
    """The parameters of the project's functions whose default is None or a number."""
    found: set[ast.arg] = set()
    for frame in graph.machine.frames:
        if frame.function is None:
            continue
        spec = frame.function.node.args
        positional = [*spec.posonlyargs, *spec.args]
        pairs = list(zip(positional[len(positional) - len(spec.defaults) :], spec.defaults, strict=True))
        pairs += [(a, d) for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None]
        found |= {a for a, d in pairs if isinstance(d, ast.Constant) and (d.value is None or isinstance(d.value, int))}
    return found


def find_positions(graph: Graph) -> Sequence[PositionSite]:
    """Every place that adds positions to content, in the order of files and lines."""
    contents = Contents(graph)
    sites: dict[ast.AST, list[Position]] = defaultdict(list)
    others: dict[ast.AST, list[Node]] = defaultdict(list)
    for node in graph.machine.nodes:
        if node.op in ADDS and len(node.args) >= 2 and node.node is not None:
            found = _position(contents, node)
            if found is not None:
                sites[node.node].append(found)
            else:
                others[node.node].append(node)
    ordered = sorted(
        sites, key=lambda n: (str(sites[n][0].frame.path), getattr(n, "lineno", 0), getattr(n, "col_offset", 0))
    )
    return [
        PositionSite(n, sites[n][0].frame, tuple(sites[n]), _elsewhere(others.get(n, ()), sites[n])) for n in ordered
    ]


def _elsewhere(others: Sequence[Node], contexts: Sequence[Position]) -> tuple[Node, ...]:
    """Those in other frames: the sum of a list is several additions, of which one adds the positions."""
    frames = {id(p.frame) for p in contexts}
    return tuple(n for n in others if id(n.frame) not in frames)


def _position(contents: Contents, node: Node) -> Position | None:
    for term, stream in ((node.args[1], node.args[0]), (node.args[0], node.args[1])):
        given = contents.given(term) if isinstance(term, Node) else None
        if given is None or not isinstance(stream, Node) or contents.is_free(stream):
            continue
        kind = contents.kind(term)
        if kind and not is_score(stream, contents):
            return Position(node, stream, term, kind, tuple(sorted(given, key=lambda n: n.order)))
    return None


def is_score(value: Value, contents: Contents) -> bool:
    """Whether a value is a product of two contents, scaled or masked: attention scores, not a stream."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        current = strip_views(todo.pop())
        if not isinstance(current, Node) or id(current) in seen:
            continue
        seen.add(id(current))
        if current.op in PRODUCTS:
            return sum(isinstance(a, Node) and not contents.is_free(a) for a in flatten_all(current)) >= 2
        if current.op in ("mul", "div", "add", "sub", "masked_fill", "where", "merge"):
            todo.extend(a for a in current.args[: 1 if current.op == "masked_fill" else None])
    return False


def flatten_all(node: Node) -> Iterator[Value]:
    """The positional operands of a datum, containers opened."""
    for part in node.args:
        yield from flatten(part)


def roles(sites: Sequence[PositionSite]) -> Iterator[Role]:
    """One role for each place that adds positions."""
    from modernizer.model_map.map import Evidence, Role

    for site in sites:
        at = location(site.node, site.frame)
        owner = class_of(site.frame)
        kinds = " or ".join(sorted({context.kind for context in site.contexts}))
        sentence = f"adds something made of places alone ({kinds}) to something made of content"
        yield Role("position", at, owner.name if owner else "", (Evidence(at, sentence),))


__all__ = ["Contents", "Position", "PositionSite", "find_positions", "is_score", "is_table", "roles"]
