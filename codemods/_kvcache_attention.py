"""Where a cache takes the new keys and values of one attention, and gives back those of the whole past."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field

from codemods._anchors import MAX_LIFT, Anchor, Code, Context, Part, lift, operand_expression, product_anchor, unwrap
from codemods._survey import Cannot, place
from modernizer.graph.values import Frame, Module, Value
from modernizer.model_map.attention import Attention
from modernizer.syntax import block_of, names_below, walk

RANDOM = frozenset("dropout rand randn randint rand_like randn_like bernoulli multinomial normal uniform".split())


@dataclass(eq=False)
class Update:
    """One place where keys and values pass: before `statement` in the code of one function.

    `frames` are its activations, with the attention of each. `moved` are statements that have to come first.
    """

    anchor: Anchor
    statement: ast.stmt
    key: Part
    value: Part
    self_name: str
    frames: list[tuple[Frame, Attention]]
    query: Part | None = None  # where it is a name at the product
    moved: list[ast.stmt] = field(default_factory=list)

    @property
    def function(self) -> ast.FunctionDef:
        node = self.anchor.function.node
        assert isinstance(node, ast.FunctionDef)
        return node

    @property
    def frame(self) -> Frame:
        return self.anchor.frame


def updates_for(code: Code, attentions: Sequence[Attention]) -> list[Update]:
    """One update for each place in the code at which attentions stand; raises Cannot."""
    by_node: dict[ast.AST, list[Attention]] = {}
    for attention in attentions:
        assert attention.scores.node is not None
        by_node.setdefault(attention.scores.node, []).append(attention)
    return [update for found in by_node.values() for update in _updates(code, found)]


def _updates(code: Code, attentions: Sequence[Attention]) -> list[Update]:
    first = attentions[0]
    if first.form not in ("matmul", "einsum", "sdpa"):
        what = {"mha": "torch's own attention module", "torch_layer": "torch's own layers"}.get(first.form, first.form)
        raise Cannot(f"keys and values inside {what} cannot be kept", place(first),
                     "use rope or swiglu first where they apply, or write the attention out")  # fmt: skip
    contexts = [Context(a, a.frame, True) for a in attentions]
    anchor = product_anchor(code, contexts)
    key = unwrap(code, anchor.key, contexts)
    value = _value_part(code, contexts)
    query: Part | None = unwrap(code, anchor.query, contexts)
    node: ast.AST = anchor.node
    made: list[Update] = []
    anchors = [Anchor(anchor.node, anchor.function, tuple(contexts), key, value)]
    for _ in range(MAX_LIFT):
        if all(code.self_name(c.frame) is not None for a in anchors for c in a.contexts):
            break
        anchors = [lifted for a in anchors for lifted in lift(code, a, is_only_read=False)]
        query = None
    for found in anchors:
        key, value = (unwrap(code, p, found.contexts) for p in (found.query, found.key))
        node = found.node
        made.append(
            _update(code, found, node, key, value, query if query and isinstance(query.expr, ast.Name) else None)
        )
    return made


def _value_part(code: Code, contexts: Sequence[Context]) -> Part:
    first = contexts[0].attention
    if len({c.attention.output.node for c in contexts}) > 1 or first.output.frame is not first.frame:
        raise Cannot("scores and values meet in different places", place(first))
    node, operand = first.output.node, first.value_operand
    found = [
        operand_expression(code, node, c, c.attention.value_operand) if isinstance(node, ast.expr) else None
        for c in contexts
    ]
    if found[0] is None or any(e is not found[0] for e in found) or operand.time_axis is None:
        raise Cannot("which expression is the value here cannot be told", place(first))
    feature = operand.feature_axis if operand.feature_axis is not None else -1
    return unwrap(code, Part(found[0], operand.time_axis, feature), contexts)


def _update(code: Code, anchor: Anchor, node: ast.AST, key: Part, value: Part, query: Part | None) -> Update:
    at = place(anchor.contexts[0].attention)
    statement = code.statement(node)
    if not isinstance(anchor.function.node, ast.FunctionDef) or not isinstance(
        statement, ast.Assign | ast.Return | ast.Expr | ast.AnnAssign | ast.AugAssign
    ):
        raise Cannot("the product of query and key stands where nothing can be put before it", at)
    if not isinstance(key.expr, ast.Name) or not isinstance(value.expr, ast.Name):
        raise Cannot("key and value have no names at the product", at, "give them names: `k = …`, `v = …`")
    names = [p.expr.id for p in (key, value, query) if p is not None and isinstance(p.expr, ast.Name)]
    if len(set(names)) < len(names):
        raise Cannot("query, key and value share a name", at)
    named = [code.self_name(c.frame) for c in anchor.contexts]
    if any(n is None for n in named) or named[0] is None:
        raise Cannot("no module's method hands key and value in here", at)
    frames = [(c.frame, c.attention) for c in anchor.contexts]
    made = Update(anchor, statement, key, value, named[0][0], frames, query)
    made.moved = _moved(code, made, at)
    _check_names(code, made)
    return made


def module_of(code: Code, frame: Frame) -> Module:
    """The module by which a cache tells a layer."""
    named = code.self_name(frame)
    assert named is not None
    return named[1]


# -- what has to come first


def _moved(code: Code, update: Update, at: object) -> list[ast.stmt]:
    """The statements after the score product that make the value: they move before it."""
    source = update.frame.scope.source
    block = block_of(source.tree, update.statement)
    reader = code.statement(update.value.expr)
    if reader is update.statement:
        return []
    if reader not in block:
        raise Cannot("scores and values meet in different blocks of code", place(update.frames[0][1]))
    start, stop = block.index(update.statement), block.index(reader)
    assert isinstance(update.value.expr, ast.Name)
    needed, moved = {update.value.expr.id}, list[ast.stmt]()
    for statement in reversed(block[start:stop]):
        if not _stored(statement) & needed:
            continue
        if statement is update.statement or not isinstance(statement, ast.Assign):
            raise Cannot("the value is made of what comes out of the scores", place(update.frames[0][1]))
        moved.insert(0, statement)
        needed |= _loaded(statement)
    _check_moves(code, update, block[start:stop], moved)
    return moved


def _check_moves(code: Code, update: Update, between: Sequence[ast.stmt], moved: Sequence[ast.stmt]) -> None:
    made = {name for s in moved for name in _stored(s)}
    read = {name for s in moved for name in _loaded(s)}
    for statement in between:
        if statement in moved:
            continue
        if _stored(statement) & (made | read) or _loaded(statement) & made:
            raise Cannot("what makes the value cannot be moved before the scores", place(update.frames[0][1]))
    for frame, attention in update.frames:
        inside = {id(e) for s in moved for e in walk(s)}
        nodes = code.graph.activations.nodes(frame, inside) if moved else ()
        if any(n.op in RANDOM or n.name.endswith("_") for n in nodes):
            raise Cannot("what makes the value draws random numbers after the scores", place(attention))


def _stored(node: ast.AST) -> set[str]:
    return {n for n, found in names_below(node).items() if any(not isinstance(name.ctx, ast.Load) for name in found)}


def _loaded(node: ast.AST) -> set[str]:
    return {n for n, found in names_below(node).items() if any(isinstance(name.ctx, ast.Load) for name in found)}


def _check_names(code: Code, update: Update) -> None:
    """The same tensor must not be read under another name once the cache has been asked."""
    assert isinstance(update.key.expr, ast.Name) and isinstance(update.value.expr, ast.Name)
    wanted = (update.key.expr, update.value.expr)
    for frame, attention in update.frames:
        for name in wanted:
            value = code.value(name, frame)
            for found in names_below(update.function).values():
                for load in found:
                    if (
                        not isinstance(load.ctx, ast.Load)
                        or load.id == name.id
                        or load.lineno < update.statement.lineno
                    ):
                        continue
                    if code.value(load, frame) is value:
                        raise Cannot(f"`{load.id}` is the same tensor as `{name.id}`", place(attention))
            if value is None or _is_kept(frame, value):
                raise Cannot(f"`{name.id}` is kept on the module", place(attention))


def _is_kept(frame: Frame, value: Value) -> bool:
    receiver = frame.receiver
    return isinstance(receiver, Module) and any(v is value for v in receiver.attributes.values())


# -- text


def update_lines(update: Update, cache: str) -> list[str]:
    """The statements that ask the cache."""
    key, value = update.key, update.value
    assert isinstance(key.expr, ast.Name) and isinstance(value.expr, ast.Name)
    names = key.expr.id, value.expr.id
    turned = [n for n, p in zip(names, (key, value), strict=True) if p.time != time_axis(update)]
    given = [_turned(n) if n in turned else n for n in names]
    lines = [f"if {cache} is not None:"]
    lines.append(f"    {names[0]}, {names[1]} = {cache}.update({given[0]}, {given[1]}, {update.self_name})")
    lines += [f"    {n} = {_turned(n)}" for n in turned]
    return lines


def _turned(name: str) -> str:
    return f"{name}.transpose(-2, -1)"


def time_axis(update: Update) -> int:
    """The axis of time of what the cache is given: that of the values."""
    return update.value.time


def check_axes(update: Update) -> None:
    """Key and value must have time on one axis, or on the last two in turn."""
    key, value = update.key, update.value
    if key.time == value.time:
        return
    if {key.time, key.feature} != {-1, -2} or value.time != -2:
        raise Cannot("keys and values have time on different axes", place(update.frames[0][1]))


def past_length(update: Update) -> str:
    """The number of all keys, as code after the update."""
    assert isinstance(update.key.expr, ast.Name)
    return f"{update.key.expr.id}.size({update.key.time})"


def new_length(update: Update) -> str:
    """The number of queries, as code."""
    if update.query is None or not isinstance(update.query.expr, ast.Name):
        raise Cannot("the query has no name at the product", place(update.frames[0][1]))
    return f"{update.query.expr.id}.size({update.query.time})"
