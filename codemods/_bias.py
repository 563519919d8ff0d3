"""Adds ALiBi's bias to the scores of hand-written attention, or to the mask of SDPA."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from codemods._anchors import MAX_LIFT, Anchor, Code, Context, Part, free_name, kept_test, simple_statement
from codemods._folds import fold_of
from codemods._parts import Attached, Parts
from codemods._rotation import keeps_past
from codemods._survey import Cannot, place
from modernizer.edit import AddArgument, AddParameter, Delete, Edit, Insert, Replace
from modernizer.graph.query import VIEWS, is_torch, origin, same_size
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Many, Module, Node, Value
from modernizer.imports import Imports
from modernizer.model_map.attention import Attention
from modernizer.syntax import walk


def bias(code: Code, parts: Parts, contexts: Sequence[tuple[Attention, bool]]) -> list[Edit]:
    """The edits that lower the scores with distance wherever the flag says so. Raises Cannot."""
    changing = [a for a, changes in contexts if changes]
    for attention in changing:
        keeps_past(attention)
    if not changing:
        return []
    if changing[0].form == "sdpa":
        return _in_mask(code, parts, contexts)
    spots = {id(a.weights.node): a for a, _ in contexts if a.weights is not None and a.weights.node is not None}
    if len(spots) != 1:
        raise Cannot("the scores take several ways to a softmax", place(changing[0]))
    weights = changing[0].weights
    assert weights is not None and isinstance(weights.node, ast.expr)
    held = [Context(a, a.weights.frame, changes) for a, changes in contexts if a.weights is not None]
    function = held[0].frame.function
    if function is None:
        raise Cannot("this attention stands outside of any function", place(changing[0]))
    operand = _scores_expression(code, weights.node, held)
    anchor = Anchor(weights.node, function, tuple(held), Part(operand, -2, -1), Part(operand, -2, -1))
    heads = _heads(code, [c for c in held if c.changes])
    if heads.per_module is not None:
        return _per_head(code, parts, anchor, heads.per_module)
    return _at(code, parts, anchor, heads, 0)


def _scores_expression(code: Code, node: ast.expr, contexts: Sequence[Context]) -> ast.expr:
    """What the softmax is taken of."""
    candidates: list[ast.expr] = []
    if isinstance(node, ast.Call):
        candidates = [*node.args, *(k.value for k in node.keywords if k.arg)]
        if isinstance(node.func, ast.Attribute):
            candidates.append(node.func.value)
    for candidate in candidates:
        if all(_weights(c) is not None and code.value(candidate, c.frame) is _weights(c).args[0] for c in contexts):
            return candidate
    raise Cannot("which expression the scores are cannot be told", place(contexts[0].attention))


def _weights(context: Context) -> Node:
    assert context.attention.weights is not None
    return context.attention.weights


# -- which axis of the scores are the heads


@dataclass(frozen=True)
class _Heads:
    arguments: str = ""
    per_module: Module | None = None  # one module a head: the container of the modules
    counted_by: str = ""  # the attribute that the arguments read


def _heads(code: Code, contexts: Sequence[Context]) -> _Heads:
    """What the constructor must be told about heads. Raises Cannot where they cannot be found."""
    first = contexts[0].attention
    if first.form == "einsum":
        return _Heads(_einsum_heads(first))
    container = _container(code, contexts)
    if container is not None and not any(_has_heads(c) for c in contexts):
        return _Heads(per_module=container)
    ranks = {c.attention.rank or rank(c.attention.key) or _rank_by_transposition(c) for c in contexts}
    if ranks == {4}:
        for context in contexts:
            if _is_batch_at_heads(context.attention.query):
                raise Cannot("the batch, not the heads, is the third axis of the scores from the end", place(first))
        return _Heads()
    if ranks == {3}:
        return _folded(code, contexts)
    raise Cannot("which axis of the scores are the heads cannot be told", place(first))


def _rank_by_transposition(context: Context) -> int | None:
    """Scores of heads of which only `transpose(1, 2)` is known: with heads before or after time, four axes."""
    for node in _way(context):
        if node.op == "transpose" and [a.value for a in node.args[1:] if isinstance(a, Const)] in ([1, 2], [2, 1]):
            return 4
    return None


def _einsum_heads(context: Attention) -> str:
    equation = context.equation
    left, _, out = equation.partition("->")
    first, second = left.split(",")
    shared = [c for c in out if c in first and c in second]
    if "." in out or len(shared) != 2 or len(out) != 4:
        raise Cannot("which letter of the einsum are the heads cannot be told", place(context))
    axis = out.index(shared[1]) - 4
    rest = [c for c in out if c != shared[1]]
    query, key = (set(first) - set(second)) & set(out), (set(second) - set(first)) & set(out)
    if ({rest[-2]}, {rest[-1]}) not in ((query, key), (key, query)):
        raise Cannot("the axes of the einsum's result stand in an order that is not known here", place(context))
    keys = rest[-1]
    if context.softmax_axis is None or out[context.softmax_axis] != keys:
        raise Cannot("the keys are not the last axis of the scores", place(context))
    return f"head_axis={axis}" if axis != -3 else ""


def _is_batch_at_heads(value: Value) -> bool:
    """Whether the third axis from the end of a query is surely the first axis of the model's input: the batch."""
    axis = -3
    for _ in range(12):
        if not isinstance(value, Node) or not value.args:
            return False
        if value.op == "transpose" and len(value.args) == 3:
            given = [a.value if isinstance(a, Const) and isinstance(a.value, int) else None for a in value.args[1:]]
            if None in given:
                return False
            places = [g if g is not None and g < 0 else (g or 0) - 4 for g in given]
            axis = places[1] if axis == places[0] else places[0] if axis == places[1] else axis
        elif value.op == "permute":
            order = [a for part in value.args[1:] for a in (part.items if isinstance(part, Many) else [part])]
            if len(order) != 4 or not all(isinstance(a, Const) and isinstance(a.value, int) for a in order):
                return False
            axis = [a.value for a in order if isinstance(a, Const)][axis + 4] % 4 - 4  # type: ignore[operator]
        elif value.op in ("view", "reshape"):
            sizes = [a for part in value.args[1:] for a in (part.items if isinstance(part, Many) else [part])]
            return len(sizes) == 4 and axis == -4
        elif value.op not in VIEWS and value.op not in ("mul", "div"):
            return False
        value = value.args[0]
    return False


def _folded(code: Code, contexts: Sequence[Context]) -> _Heads:
    """Scores of three axes: a module a head, one head for all features, or heads in the batch."""
    first = contexts[0]
    if not any(_has_heads(c) for c in contexts):
        return _Heads("1, head=0")
    counts: set[tuple[str, str]] | None = None
    for context in contexts:
        query, key = fold_of(context.attention.query), fold_of(context.attention.key)
        if query is None or key is None or query.order != key.order or not same_size(query.heads, key.heads):
            raise Cannot(
                "heads are folded into the batch here, and how they are ordered is not told by the scores",
                place(first.attention), "give the scores an axis of heads",
            )  # fmt: skip
        named = code.self_name(query.view.frame)
        module = origin(named[1]) if named else None
        names = [n for n, v in module.attributes.items() if v is query.heads] if module is not None else []
        found = {(query.order, name) for name in names}
        counts = found if counts is None else counts & found
    if not counts:
        raise Cannot(
            "heads are folded into the batch here, and no attribute of their module says how many there are",
            place(first.attention), "keep the number of heads on the module: `self.num_heads = num_heads`",
        )  # fmt: skip
    order, attribute = min(counts)
    return _Heads(f'self.{attribute}, folded="{order}"', counted_by=attribute)


def _has_heads(context: Context) -> bool:
    """Whether the features of a query are split into heads after the projection."""
    return any(n.op in ("view", "reshape", "cat", "chunk", "rearrange", "flatten", "unflatten") for n in _way(context))


def _way(context: Context) -> list[Node]:
    from codemods._survey import on_the_way

    return list(on_the_way(context.attention.query, context.attention.query_projections))


def _container(code: Code, contexts: Sequence[Context]) -> Module | None:
    """The list whose modules each are one head: all are called on one input, in one loop."""
    found: set[int] = set()
    container: Module | None = None
    for context in contexts:
        named = code.self_name(context.frame)
        owner = named[1].owner if named else None
        if owner is None or not is_torch(owner, "ModuleList") or owner.owner is None or owner.children is None:
            return None
        container = owner
        found.add(id(owner.call))
    if container is None or len(found) != 1:
        return None
    return container if _is_split(code, contexts) else None


def _is_split(code: Code, contexts: Sequence[Context]) -> bool:
    """Whether the modules of the list are heads of one attention, which read one input, not layers in a row."""
    sources: dict[int, set[int]] = {}
    for context in contexts:
        named = code.self_name(context.frame)
        assert named is not None
        caller = _caller_of(named[1], context.frame)
        sources.setdefault(id(caller), set()).add(id(context.attention.query_source))
    counts: dict[int, int] = {}
    for context in contexts:
        named = code.self_name(context.frame)
        assert named is not None
        counts[id(_caller_of(named[1], context.frame))] = counts.get(id(_caller_of(named[1], context.frame)), 0) + 1
    return all(len(s) == 1 for s in sources.values()) and all(n > 1 for n in counts.values())


def _caller_of(module: Module, frame: Frame) -> Frame | None:
    active: Frame | None = frame
    while active is not None and active.receiver is module:
        active = active.caller
    return active


def _per_head(code: Code, parts: Parts, anchor: Anchor, container: Module) -> list[Edit]:
    """Each module of a list gets the bias of its own head, from the class that holds the list."""
    if not all(c.changes for c in anchor.contexts):
        raise Cannot(
            "heads that are modules of their own serve other sequences too", place(anchor.contexts[0].attention)
        )
    while container.template is not None:
        container = container.template
    call, frame, parent = container.call, container.frame, container.owner
    if not isinstance(call, ast.Call) or frame is None or parent is None or frame.receiver is not parent:
        raise Cannot("what constructs the list of heads cannot be found", place(anchor.contexts[0].attention))
    statement = code.statement(call)
    named = code.self_name(frame)
    if named is None or not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        raise Cannot("what constructs the list of heads cannot be found", place(anchor.contexts[0].attention))
    source = frame.scope.source
    function = frame.function.node if frame.function is not None else None
    reference, new = Imports(source).reference(
        parts.component, function if isinstance(function, ast.FunctionDef) else None
    )
    listed = f"{named[0]}.{container.name}"
    made = f"head.{parts.attribute} = {reference}(len({listed}), head=index)"
    loop = f"for index, head in enumerate({listed}):\n    {made}\n"
    self_name = code.self_name(anchor.frame)
    assert self_name is not None
    holder = Replace(
        anchor.frame.path, anchor.query.expr, f"{self_name[0]}.{parts.attribute}($0)", (anchor.query.expr,)
    )
    edits: list[Edit] = [Insert(frame.path, statement, loop, "after"), holder]
    return [*edits, new] if new is not None else edits


# -- at the softmax, or handed in to it


def _at(code: Code, parts: Parts, anchor: Anchor, heads: _Heads, lifted: int) -> list[Edit]:
    try:
        attached = parts.attach(anchor, heads.arguments, heads.counted_by)
    except Cannot as reason:
        if lifted >= MAX_LIFT:
            raise
        return _handed_in(code, parts, anchor, heads, reason)
    return _written(code, anchor, attached)


def _written(code: Code, anchor: Anchor, attached: Attached) -> list[Edit]:
    """`softmax(self.alibi(scores))`, or under the test that tells where it applies."""
    operand, module, path = anchor.query.expr, attached.text, anchor.frame.path
    if not attached.optional and not attached.test:
        return [Replace(path, operand, f"{module}($0)", (operand,))]
    before, test = kept_test(anchor, attached.test) if attached.test else ([], f"{module} is not None")
    statement = simple_statement(code, anchor)
    if statement is None:
        if not isinstance(operand, ast.Name):
            raise Cannot("the scores are computed inside the softmax, in a class that serves other sequences too",
                         place(anchor.contexts[0].attention), "give the scores a name")  # fmt: skip
        return [*before, Replace(path, operand, f"({module}($0) if {test} else $0)", (operand,))]
    if isinstance(operand, ast.Name):
        return [*before, Insert(path, statement, f"if {test}:\n    {operand.id} = {module}({operand.id})\n", "before")]
    name = free_name(anchor.function.node, "scores", "attention_scores")
    text = anchor.frame.scope.source.code(operand)
    lines = f"{name} = {text}\nif {test}:\n    {name} = {module}({name})\n"
    return [*before, Insert(path, statement, lines, "before"), Replace(path, operand, name)]


def _handed_in(code: Code, parts: Parts, anchor: Anchor, heads: _Heads, reason: Cannot) -> list[Edit]:
    """The function of the softmax takes the module as an argument, which its callers pass where it applies."""
    function = anchor.function.node
    if not isinstance(function, ast.FunctionDef):
        raise reason
    name = parts.attribute
    taken = {n.id for n in walk(function) if isinstance(n, ast.Name)} | {a.arg for a in walk(function.args)
                                                                            if isinstance(a, ast.arg)}  # fmt: skip
    if name in taken or function.args.kwarg is not None:
        raise reason
    edits: list[Edit] = [AddParameter(anchor.frame.path, function, f"{name}=None")]
    edits += _written(code, anchor, Attached(name, optional=True))
    calls: dict[ast.AST, list[Context]] = {}
    for context in anchor.contexts:
        caller, call = context.frame.caller, context.frame.call
        if caller is None or not isinstance(call, ast.Call) or caller.function is None:
            raise reason
        calls.setdefault(call, []).append(Context(context.attention, caller, context.changes))
    for call, contexts in calls.items():
        if not any(c.changes for c in contexts):
            continue
        assert isinstance(call, ast.Call)
        outer = Anchor(call, contexts[0].frame.function or anchor.function, tuple(contexts), anchor.query, anchor.key)
        attached = parts.attach(outer, heads.arguments, heads.counted_by)
        before, test = kept_test(outer, attached.test) if attached.test else ([], "")
        edits += before
        text = f"{attached.text} if {test} else None" if test else attached.text
        edits.append(AddArgument(contexts[0].frame.path, call, text, name))
    return edits


# -- SDPA


def _in_mask(code: Code, parts: Parts, contexts: Sequence[tuple[Attention, bool]]) -> list[Edit]:
    """The bias joins `attn_mask`, and with it `is_causal`, which SDPA does not take beside a mask."""
    first = contexts[0][0]
    node = first.scores.node
    held = [Context(a, a.frame, changes) for a, changes in contexts]
    if not isinstance(node, ast.Call) or first.frame.function is None:
        raise Cannot("SDPA is not called by a plain call here", place(first))
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        raise Cannot("SDPA's arguments cannot be told apart here", place(first))
    given: dict[str, ast.expr] = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)
    )
    given.update({k.arg: k.value for k in node.keywords if k.arg})
    query, key = given.get("query"), given.get("key")
    if not (isinstance(query, ast.Name) and isinstance(key, ast.Name)):
        raise Cannot("query and key of SDPA are no names here", place(first), "give them names")
    if len(node.args) > 3:
        raise Cannot("SDPA's mask is a positional argument here", place(first), "pass attn_mask= by name")
    ranks = {a.rank for a, changes in contexts if changes}
    arguments = ""
    if ranks != {4}:
        raise Cannot("which axis of query and key are the heads cannot be told", place(first))
    attached = parts.attach(
        Anchor(node, first.frame.function, tuple(held), Part(query, -2, -1), Part(key, -2, -1)), arguments
    )
    if attached.optional or (attached.test and not attached.is_chosen):
        raise Cannot("this SDPA call also serves another sequence", place(first))
    text = f"{attached.text}.attn_mask({query.id}, {key.id}"
    source = first.frame.scope.source
    mask, causal = given.get("attn_mask"), given.get("is_causal")
    text += f", {source.code(mask)}" if mask is not None else ""
    text += f", is_causal={source.code(causal)})" if causal is not None else ")"
    path, edits, test = first.frame.path, list[Edit](), attached.test
    if test:  # both calls in one: what the mask holds then, `is_causal` must not say too
        text = f"{text} if {test} else {source.code(mask) if mask is not None else None}"
    for keyword in node.keywords:
        if keyword.arg == "is_causal" and test:
            edits.append(Replace(path, keyword.value, f"$0 and not ({test})", (keyword.value,)))
        elif keyword.arg == "is_causal" or (keyword.arg == "attn_mask" and mask is None):
            edits.append(Delete(path, keyword))
    if mask is not None:
        edits.append(Replace(path, mask, text))
    else:
        edits.append(AddArgument(path, node, text, "attn_mask"))
    return edits


__all__ = ["bias"]
