"""Rotates query and key of hand-written attention, in the form that reads best where it stands."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from codemods._anchors import (
    MAX_LIFT,
    Anchor,
    Code,
    Context,
    Part,
    kept_test,
    lift,
    product_anchor,
    simple_statement,
    unwrap,
)
from codemods._parts import Attached, Parts
from codemods._survey import Cannot, on_the_way, place
from modernizer.edit import Edit, Insert, Replace
from modernizer.graph.query import VIEWS, ancestors, inputs
from modernizer.graph.values import Const, Many, Node, Value, flatten
from modernizer.model_map.attention import Attention

SOURCES = frozenset("input attr getitem item iter unknown unbind".split())


def rotate(code: Code, parts: Parts, contexts: Sequence[tuple[Attention, bool]]) -> list[Edit]:
    """The edits that rotate query and key at one score product wherever the flag says so. Raises Cannot."""
    start = product_anchor(code, [Context(a, a.frame, changes) for a, changes in contexts])
    past = [keeps_past(a) for a, changes in contexts if changes]
    return _at(code, parts, start, any(past), 0)


def _at(code: Code, parts: Parts, anchor: Anchor, past: bool, lifted: int) -> list[Edit]:
    """At this anchor if the module there can be given a rotary, else at the calls that lead to it."""
    if not any(c.changes for c in anchor.contexts):
        return []
    try:
        return _apply(code, parts, anchor, past)
    except Cannot as reason:
        if lifted >= MAX_LIFT:
            raise
        try:
            outer = lift(code, anchor)
        except Cannot:
            raise reason from None
        return [edit for each in outer for edit in _at(code, parts, each, past, lifted + 1)]


def _apply(code: Code, parts: Parts, anchor: Anchor, past: bool) -> list[Edit]:
    changing = [c for c in anchor.contexts if c.changes]
    query, key = (unwrap(code, part, anchor.contexts) for part in (anchor.query, anchor.key))
    seq_dim = query.time if query.feature == key.feature == -1 and query.time == key.time != -2 else None
    attached = parts.attach(anchor, f"seq_dim={seq_dim}" if seq_dim is not None else "")
    if past and (attached.optional or attached.test):
        raise Cannot("keys of earlier calls are kept here, in a class that also attends to another sequence",
                     place(changing[0].attention))  # fmt: skip
    writer = _Writer(code, anchor, attached, seq_dim, past)
    return writer.statements(query, key) or writer.wrapped(query, key)


class _Writer:
    """Writes the rotation of one anchor."""

    def __init__(self, code: Code, anchor: Anchor, attached: Attached, seq_dim: int | None, past: bool) -> None:
        self.code, self.anchor, self.attached = code, anchor, attached
        self.seq_dim, self.past = seq_dim, past
        self.path = anchor.frame.path

    def statements(self, query: Part, key: Part) -> list[Edit]:
        """`q, k = self.rotary(q), self.rotary(k)` before the statement; nothing where names or uses forbid it."""
        if not (isinstance(query.expr, ast.Name) and isinstance(key.expr, ast.Name)) or query.expr.id == key.expr.id:
            return []
        statement = simple_statement(self.code, self.anchor)
        if statement is None or not all(self._may_rebind(name, statement) for name in (query.expr, key.expr)):
            return []
        q, k = query.expr.id, key.expr.id
        if self.past:
            length = f"{k}.size({key.time}) - {q}.size({query.time})"
            code = f"{q} = {self._rotated(q, query, length)}\n{k} = {self._rotated(k, key)}\n"
        else:
            code = f"{q}, {k} = {self._rotated(q, query)}, {self._rotated(k, key)}\n"
        before, test = self._test()
        if test:
            code = f"if {test}:\n" + "".join(f"    {line}\n" for line in code.splitlines())
        return [*before, Insert(self.path, statement, code, "before")]

    def wrapped(self, query: Part, key: Part) -> list[Edit]:
        """`self.rotary(q)` where the operand stands."""
        before, test = self._test()
        made: list[Edit] = list(before)
        for part, other in ((query, key), (key, query)):
            hole = "$0"
            offset = ""
            if self.past and part is query:
                if not isinstance(key.expr, ast.Name) or not isinstance(query.expr, ast.Name):
                    raise Cannot("how many keys of earlier calls are kept cannot be told from a name",
                                 place(self.anchor.contexts[0].attention))  # fmt: skip
                offset = f"{key.expr.id}.size({other.time}) - $0.size({part.time})"
            text = self._rotated(hole, part, offset)
            if test:
                if not isinstance(part.expr, ast.Name):
                    raise Cannot("query or key is computed inside the product, in a class that serves others too",
                                 place(self.anchor.contexts[0].attention))  # fmt: skip
                text = f"({text} if {test} else $0)"
            made.append(Replace(self.path, part.expr, text, (part.expr,)))
        return made

    def _rotated(self, text: str, part: Part, offset: str = "") -> str:
        more = f", offset={offset}" if offset else ""
        module = self.attached.text
        time, feature = part.time, part.feature
        if feature == -1:
            if time != -2 and self.seq_dim is None:
                more += f", seq_dim={time}"
            return f"{module}({text}{more})"
        time = feature if time == -1 else time
        if time != -2:
            more += f", seq_dim={time}"
        swap = f".transpose({min(feature, -1)}, -1)"
        return f"{module}({text}{swap}{more}){swap}"

    def _test(self) -> tuple[list[Edit], str]:
        """What must hold, and the statement that keeps it where its names are bound anew before it is needed."""
        if self.attached.optional:
            return [], f"{self.attached.text} is not None"
        if not self.attached.test:
            return [], ""
        return kept_test(self.anchor, self.attached.test)

    def _may_rebind(self, name: ast.Name, statement: ast.stmt) -> bool:
        """Whether everything that reads a name from here on either is the operand or only asks for its size."""
        start = (statement.lineno, statement.col_offset)
        frames = [c.frame for c in self.anchor.contexts]
        for load in self.code.loads(self.anchor.function, name.id):
            if load is name or (load.lineno, load.col_offset) < start or self.code.is_shape_read(load):
                continue
            values = [(self.code.value(load, f), self.code.value(name, f)) for f in frames]
            if not all(a is not None and a is not b for a, b in values):
                return False
        return True


# -- keys of earlier calls


def keeps_past(context: Attention) -> bool:
    """Whether keys of earlier calls stand before the new ones: queries are then the last of the keys. Raises Cannot
    where keys come from elsewhere in a way that does not tell their positions."""
    found = False
    for node in on_the_way(context.key, context.key_projections):
        if node.op in ("setitem", "index_copy", "scatter", "index_put") and _is_stored(node):
            raise Cannot("keys are written into a store of fixed size here: which positions they have cannot be told",
                         place(context), "rotate before keys are stored")  # fmt: skip
        if node.op == "cat":
            kinds = [_is_projected(part, context) for part in _listed(node)]
            if all(kinds):
                continue
            if kinds[-1] and not any(kinds[:-1]) and all(_is_from_outside(p) for p in _listed(node)[:-1]):
                found = True
                continue
            raise Cannot("keys are joined with others here that have no known position", place(node))
    if found and any(n.op == "cat" for n in on_the_way(context.query, context.query_projections)):
        raise Cannot("queries are joined with others here that have no known position", place(context))
    return found


def _listed(node: Node) -> list[Value]:
    first = node.args[0] if node.args else None
    return list(first.items) if isinstance(first, Many) else list(flatten(first)) if first is not None else []


def _is_projected(value: Value, context: Attention) -> bool:
    projections = {id(p) for p in context.key_projections}
    return any(n in projections for n in ancestors(value, lambda n: id(n) in projections))


def _is_from_outside(value: Value) -> bool:
    """Whether a value is something that was handed in: no parameter, nothing computed here."""
    todo = [leaf for leaf in flatten(value) if isinstance(leaf, Node)]
    while todo:
        node = todo.pop()
        if node.op in SOURCES and node.op not in VIEWS:
            continue
        if node.op in VIEWS or node.op in ("merge", "getitem", "item"):
            todo.extend(n for n in inputs(node) if n.op != "slice")
            continue
        return False
    return True


def _is_stored(node: Node) -> bool:
    return not isinstance(node.args[0], Const)
