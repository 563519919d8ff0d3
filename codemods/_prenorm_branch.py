"""The edits at one residual sum: the norm behind it goes, and the branch reads the stream through the same norm."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from codemods._prenorm_common import Impossible, method_frame, quoted, receiver_name, stores, values_in
from modernizer.edit import Delete, Edit, Insert, Replace
from modernizer.graph.machine import Machine
from modernizer.graph.query import base, users
from modernizer.graph.values import External, Frame, Function, Many, Method, Module, Node, Value, flatten
from modernizer.model_map.norm import TINY, Norm
from modernizer.model_map.residual import LAYOUT, PROJECTIONS, Residual
from modernizer.syntax import block_of, children, free_name, loops_around, names_in, outward, statement_of, walk

# What may happen to the features of the stream before they are projected, and the norm still be where it belongs.
HARMLESS = LAYOUT | frozenset(
    "item getitem chunk split unbind iter expand expand_as repeat rearrange pad unfold narrow".split()
)
COMBINING = frozenset("mul add masked_fill merge cat stack".split())


def sum_edits(machine: Machine, contexts: Sequence[Residual]) -> list[Edit]:
    """The edits at one residual sum, which was evaluated in these contexts. Raises Impossible."""
    for r in contexts:
        _check(machine, r)
    places: dict[ast.AST | None, list[Residual]] = {}
    for r in contexts:
        places.setdefault(_norm_call_in(r, _branch_frame(r)), []).append(r)
    branches = [edit for group in places.values() for edit in _branch_edits(machine, group)]
    return [*branches, *_sum_edits(contexts[0]), *drop_edits(contexts[0])]


def _check(machine: Machine, r: Residual) -> None:
    assert r.norm is not None and r.sum.node is not None
    node = r.norm.call or r.sum.node
    if not r.norm.is_per_position:
        raise Impossible(
            node, r.norm.frame, f"the norm behind this sum is a {r.norm.kind}, which does not see each position alone",
            "use a LayerNorm first",
        )  # fmt: skip
    if r.norm.call is None or r.norm.argument is None or r.norm.argument not in _operands(r.norm.call):
        raise Impossible(node, r.norm.frame, "the norm behind this sum has no call of its own that could be moved")
    if base(r.norm.source) is not r.sum:
        raise Impossible(node, r.norm.frame, "the axes of this sum are moved before it is normed")
    if r.norm.eps is not None and r.norm.eps < TINY:
        raise Impossible(
            node, r.norm.frame, f"the norm's eps of {r.norm.eps:g} is too small to normalise a stream before its sum",
            "raise eps to 1e-6",
        )  # fmt: skip
    if r.is_scaled:
        raise Impossible(r.sum.node, r.frame, "the stream or the branch is scaled before the sum, as DeepNorm does")
    if r.sum.name in ("add_", "torch.add_") and base(r.sum.args[0]) is r.stream:
        raise Impossible(
            r.sum.node, r.frame, "the sum is written into the stream itself, which the norm would still need",
            "write `x = x + …`",
        )  # fmt: skip
    for entry in r.entries:
        _check_entry(r, entry)


def _check_entry(r: Residual, entry: Node) -> None:
    """The branch must read features: a mask made of the stream is another thing when the stream is normed."""
    todo, seen = [entry], set[int]()
    while todo:
        node = todo.pop()
        if id(node) in seen or node.op in PROJECTIONS:
            continue
        seen.add(id(node))
        if node.op in COMBINING:
            others = [
                leaf
                for a in node.args
                for leaf in flatten(a)
                if id(leaf) not in r.between and base(leaf) is not r.stream
            ]
            fresh = node.op not in ("cat", "stack") or not others
        else:
            fresh = node.op in HARMLESS
        if not fresh:
            at = node.node or r.sum.node
            assert at is not None
            raise Impossible(at, node.frame, f"the branch reads the stream by `{node.op}`, not by a projection alone")
        todo += [user for user in users(node) if id(user) in r.between]


# -- behind the sum


def drop_edits(r: Residual) -> list[Edit]:
    """Takes the norm's call away from around its operand."""
    norm = r.norm
    assert norm is not None and norm.call is not None and norm.argument is not None
    source, path = norm.frame.scope.source, norm.frame.path
    statement = statement_of(source.tree, norm.call)
    if isinstance(statement, ast.Assign) and statement.value is norm.call and isinstance(norm.argument, ast.Name):
        own = [t for t in statement.targets if isinstance(t, ast.Name) and t.id == norm.argument.id]
        if own and len(statement.targets) == 1:
            return [Delete(path, statement)]
        if own:
            return [Delete(path, own[0]), Replace(path, norm.call, "$0", (norm.argument,))]
    return [Replace(path, norm.call, "$0", (norm.argument,))]


def _sum_edits(r: Residual) -> list[Edit]:
    """`x += f(x)` writes into the stream; a norm that has read it needs it unchanged for its gradient."""
    node = r.sum.node
    if isinstance(node, ast.AugAssign) and base(r.sum.args[0]) is r.stream:
        source = r.frame.scope.source
        target = source.code(node.target)
        return [Replace(r.frame.path, node, f"{target} = {target} + $0", (node.value,))]
    return []


# -- before the branch


@dataclass(eq=False)
class _Read:
    """An operand of the branch, and whether it is the stream in every context."""

    node: ast.expr
    is_sure: bool


def _branch_edits(machine: Machine, contexts: Sequence[Residual]) -> list[Edit]:
    frames = [_branch_frame(r) for r in contexts]
    first, frame = contexts[0], frames[0]
    reads = _reads(machine, contexts, frames)
    template = _template(machine, first, frame)
    _check_names(first, frame, reads)
    tree, path = frame.scope.source.tree, frame.path
    sure = sorted((r.node for r in reads if r.is_sure), key=lambda n: (n.lineno, n.col_offset))
    unsure = [r.node for r in reads if not r.is_sure]
    plain = [n for n in sure if not isinstance(n, ast.Starred)]
    starred = [r.node for r in reads if isinstance(r.node, ast.Starred)]
    if not plain:
        plain = _summed(machine, contexts, frames)
        return _hoisted(first, frame, tree, plain, [n for n in unsure if n not in starred], starred, template, False)
    if len(reads) == 1:
        code, holes = quoted(frame.scope.source.code(plain[0]), plain[0])
        return [Replace(path, plain[0], template(code), holes)]
    return _hoisted(first, frame, tree, plain, [n for n in unsure if n not in starred], starred, template)


def _hoisted(
    r: Residual,
    frame: Frame,
    tree: ast.Module,
    sure: Sequence[ast.expr],
    unsure: Sequence[ast.expr],
    starred: Sequence[ast.expr],
    template: Callable[[str], str],
    read: bool = True,
) -> list[Edit]:
    """`normed = norm(x)` before the first read, which the reads then use. `read`: whether `sure` are reads at all."""
    assert frame.function is not None
    if isinstance(frame.function.node, ast.Lambda) or not all(isinstance(n, ast.Name) for n in unsure):
        raise _unclear(r)
    if read and not all(isinstance(n, ast.Name) for n in sure):
        raise _unclear(r)
    names = [n.id if isinstance(n, ast.Name) else frame.scope.source.code(n) for n in sure]
    parameters = {a.arg for a in walk(frame.function.node.args) if isinstance(a, ast.arg)}
    stream = names[0]
    rebound = {n.id for n in unsure if isinstance(n, ast.Name)}
    rebound |= {n for n in names if n != stream and n in parameters and stream in parameters}
    if rebound - parameters or stream in rebound:
        raise _unclear(r)
    anchor = _anchor(tree, [*(sure if read else ()), *unsure, *starred], frame.function.node)
    for name in {stream, *rebound}:
        if any(_before(store, sure[0]) and _within(tree, store, anchor) for store in stores(anchor, name)):
            raise _unclear(r)
    normed = free_name("normed", names_in(frame.function.node))
    code = f"{normed} = {template(stream)}\n"
    for name in sorted(rebound, key=[*names, *(n.id for n in unsure if isinstance(n, ast.Name))].index):
        code += f"{name} = {normed} if {name} is {stream} else {name}\n"
    edits: list[Edit] = [Insert(frame.path, anchor, code, "before")]
    if read:
        edits += [Replace(frame.path, n, normed) for n in sure if isinstance(n, ast.Name) and n.id not in rebound]
    for node in starred:
        assert isinstance(node, ast.Starred)
        item = free_name("value", names_in(frame.function.node))
        rest = frame.scope.source.code(node.value)
        choice = f"({normed} if {item} is {stream} else {item} for {item} in {rest})"
        edits.append(Replace(frame.path, node.value, choice))
    return edits


def _summed(machine: Machine, contexts: Sequence[Residual], frames: Sequence[Frame]) -> list[ast.expr]:
    """What the sum itself calls the stream: the only name for it where the branch gets all arguments at once."""
    r, frame = contexts[0], frames[0]
    assert r.sum.node is not None
    if r.frame is frame and not isinstance(r.sum.node, ast.AugAssign):
        for operand in _operands(r.sum.node):
            if _is_path(operand) and all(base(v) is r.stream for v in values_in(machine, operand, frame)):
                return [operand]
    raise _unclear(r)


def _unclear(r: Residual) -> Impossible:
    assert r.sum.node is not None
    return Impossible(
        r.sum.node, r.frame, "where the branch of this sum reads the stream cannot be told apart from its other uses",
        "give the branch the stream under one name: `x = norm(x + f(x))`",
    )  # fmt: skip


def _branch_frame(r: Residual) -> Frame:
    """The innermost activation from which the norm and all reads of the branch are reached."""
    assert r.norm is not None
    for frame in r.norm.frame.outward():
        if all(any(f is frame for f in entry.frame.outward()) for entry in r.entries):
            if frame.function is None:
                break
            return frame
    raise _unclear(r)


def _norm_call_in(r: Residual, frame: Frame) -> ast.AST | None:
    """The call in the function of `frame` by which the norm is reached: it tells the sums of that function apart."""
    assert r.norm is not None
    call: ast.AST | None = r.norm.call
    for active in r.norm.frame.outward():
        if active is frame:
            break
        call = active.call
    return call


def _reads(machine: Machine, contexts: Sequence[Residual], frames: Sequence[Frame]) -> list[_Read]:
    """The operands through which the branch reads the stream, in the function of `frames`."""
    found: dict[ast.expr, None] = {}
    for r, frame in zip(contexts, frames, strict=True):
        for entry in r.entries:
            operands = list(_entry_operands(machine, r, entry, frame))
            if not operands:
                raise _unclear(r)
            found.update(dict.fromkeys(operands))
    reads = []
    for node in found:
        outcomes: set[bool] = set()
        for frame in {id(f): f for f in frames}.values():
            streams = [r for r, f in zip(contexts, frames, strict=True) if f is frame]
            for value in values_in(machine, node, frame):
                outcomes.add(any(base(value) is r.stream for r in streams))
                if not isinstance(node, ast.Starred) and not outcomes <= {True} and not isinstance(value, Node | Many):
                    outcomes.add(False)
        reads.append(_Read(node, outcomes == {True} and not isinstance(node, ast.Starred)))
    _check_identity(machine, contexts, frames, reads)
    return reads


def _check_identity(
    machine: Machine, contexts: Sequence[Residual], frames: Sequence[Frame], reads: Sequence[_Read]
) -> None:
    """`k is q` must hold at run time wherever `k` is the stream here: both must be one object, not copies."""
    if len({ast.dump(r.node) for r in reads}) < 2:
        return
    for r, frame in zip(contexts, frames, strict=True):
        seen: set[int] = set()
        for read in reads:
            for value in values_in(machine, read.node, frame):
                for leaf in flatten(value):
                    if base(leaf) is r.stream:
                        seen.add(id(leaf))
        if len(seen) > 1:
            raise _unclear(r)


def _entry_operands(machine: Machine, r: Residual, entry: Node, frame: Frame) -> Iterator[ast.expr]:
    """The expressions in the function of `frame` that hand the stream to `entry`."""
    node: ast.AST | None = entry.node
    for active in entry.frame.outward():
        if active is frame:
            break
        _check_closure(machine, r, active, node)
        if any(f is active for f in r.norm.frame.outward()) if r.norm else False:
            raise _unclear(r)
        node = active.call
    if isinstance(node, ast.AugAssign) or node is None:
        raise _unclear(r)
    tree = frame.scope.source.tree
    for operand in _operands(node):
        for source in _sources(tree, operand):
            for value in values_in(machine, source, frame):
                held = any(base(leaf) is r.stream for leaf in flatten(value))
                if held and not isinstance(source, ast.Starred) and not isinstance(value, Node):
                    raise _unclear(r)  # in a list or dict, where nobody knows it
                if held:
                    yield source
                    break


def _check_closure(machine: Machine, r: Residual, frame: Frame, node: ast.AST | None) -> None:
    """What an inner function reads must have come by its arguments: a variable around it is not what it was handed."""
    if frame.function is None or frame.function.closure is None or node is None:
        return
    free = [n for n in walk(node) if isinstance(n, ast.Name) and n.id not in frame.names]
    for operand in free:
        if any(base(value) is r.stream for value in values_in(machine, operand, frame)):
            raise Impossible(
                operand, frame, "this inner function reads the stream from around it, not as its argument",
                "use the function's own parameter",
            )  # fmt: skip


def _sources(tree: ast.Module, operand: ast.expr) -> list[ast.expr]:
    """The operand itself; for the variable of a comprehension over `(q, k, v)`, what stands in that display."""
    if not isinstance(operand, ast.Name):
        return [operand]
    for node in outward(tree, operand):
        if isinstance(node, ast.stmt):
            break
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            for generator in node.generators:
                if operand.id in {n.id for n in walk(generator.target) if isinstance(n, ast.Name)}:
                    displays = [n for n in walk(generator.iter) if isinstance(n, ast.Tuple | ast.List)]
                    return [item for display in displays for item in display.elts]
    return [operand]


def _operands(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Call):
        receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return [*node.args, *(keyword.value for keyword in node.keywords), *receiver]
    return [child for child in children(node) if isinstance(child, ast.expr)]


def _anchor(tree: ast.Module, nodes: Sequence[ast.expr], function: ast.AST) -> ast.stmt:
    """Before which a name must be bound for all these reads: the first statement in their innermost common block."""
    ways = [[n for n in outward(tree, node) if isinstance(n, ast.stmt)] for node in nodes]
    for way in ways:
        if function in way:
            del way[way.index(function) :]
    for statement in ways[0]:
        block = block_of(tree, statement)
        holders = [next((s for s in way if s in block), None) for way in ways]
        if all(h is not None for h in holders):
            return min((h for h in holders if h is not None), key=lambda s: s.lineno)
    raise AssertionError("reads of one function without a common block")


def _before(one: ast.expr, other: ast.expr) -> bool:
    return (one.lineno, one.col_offset) < (other.lineno, other.col_offset)


def _within(tree: ast.Module, node: ast.AST, statement: ast.stmt) -> bool:
    inside = any(n is statement for n in outward(tree, node))
    simple = isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Expr | ast.Return)
    return inside and not simple


# -- naming the norm


def _template(machine: Machine, r: Residual, frame: Frame) -> Callable[[str], str]:
    """How the norm is called on something else in the function of `frame`."""
    norm = r.norm
    assert norm is not None and norm.call is not None
    source = norm.frame.scope.source
    func = source.code(norm.call.func)
    if frame is not norm.frame:
        others = len(norm.call.args) + len(norm.call.keywords) - 1
        own = receiver_name(norm.frame)
        if others or not own or not (func == own or func.startswith(own + ".")) or not _is_dotted(norm.call.func):
            raise _unclear(r)
        func = _receiver(machine, r, norm.frame, frame) + func[len(own) :]
        return lambda code: f"{func}({code})"
    parts: list[str] = []
    for argument in norm.call.args:
        parts.append("{}" if argument is norm.argument else source.code(argument))
    for keyword in norm.call.keywords:
        value = "{}" if keyword.value is norm.argument else source.code(keyword.value)
        parts.append(f"{keyword.arg}={value}" if keyword.arg else f"**{value}")
    if parts.count("{}") + sum(p.endswith("={}") for p in parts) != 1 or "{" in func:
        raise _unclear(r)
    head, _, tail = ", ".join(parts).partition("{}")
    return lambda code: f"{func}({head}{code}{tail})"


def _receiver(machine: Machine, r: Residual, inner: Frame, outer: Frame) -> str:
    """How `outer` calls the instance whose method `inner` is, by the calls that lead from one to the other."""
    if inner is outer:
        name = receiver_name(outer)
        if not name:
            raise _unclear(r)
        return name
    caller, call = inner.caller, inner.call
    if caller is None or not isinstance(call, ast.Call):
        raise _unclear(r)
    func: ast.expr = call.func
    values = values_in(machine, func, caller)
    if any(isinstance(v, Method) and v.receiver is inner.receiver for v in values) and isinstance(func, ast.Attribute):
        func = func.value
    elif not any(v is inner.receiver for v in values):
        raise _unclear(r)
    text = caller.scope.source.code(func)
    if caller is outer:
        if not _is_path(func):
            raise _unclear(r)
        return text
    own = receiver_name(caller)
    if not own or not _is_dotted(func) or not (text == own or text.startswith(own + ".")):
        raise _unclear(r)
    return _receiver(machine, r, caller, outer) + text[len(own) :]


def _is_dotted(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _is_path(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name)


def _check_names(r: Residual, frame: Frame, reads: Sequence[_Read]) -> None:
    """Local names in the norm's call must mean the same where the branch reads the stream."""
    norm = r.norm
    assert norm is not None and norm.call is not None and frame.function is not None
    used = {n for part in _operands_but(norm) for n in names_in(part)}
    tree = frame.scope.source.tree
    function = frame.function.node
    first = min((read.node for read in reads), key=lambda n: (n.lineno, n.col_offset))
    for name in used:
        for store in stores(function, name):
            loops = list(loops_around(tree, first))
            in_target = any(isinstance(loop, ast.For) and store in walk(loop.target) for loop in loops)
            same_loops = list(loops_around(tree, store)) == loops
            if not (in_target or (same_loops and _before(store, first) and len(list(stores(function, name))) == 1)):
                raise _unclear(r)


def _operands_but(norm: Norm) -> list[ast.expr]:
    assert norm.call is not None
    others = [a for a in norm.call.args if a is not norm.argument]
    return [norm.call.func, *others, *(k.value for k in norm.call.keywords if k.value is not norm.argument)]


def unused_calls(machine: Machine, r: Residual) -> ast.Call | None:
    """A call of the same norm in the same class that is never evaluated: the other order, by a flag nobody sets."""
    norm = r.norm
    assert norm is not None and norm.call is not None
    method = method_frame(norm.frame)
    if method is None or method.owner is None:
        return None
    wanted = ast.dump(norm.call.func)
    for node in walk(method.owner.node):
        if isinstance(node, ast.Call) and ast.dump(node.func) == wanted and node not in machine.at:
            return node
    return None


def is_constructor(value: Value, norm: Module) -> bool:
    """Whether calling a value makes modules of the class of `norm`."""
    if isinstance(value, External):
        return norm.cls is None and value.dotted == norm.torch_name
    return value is norm.cls or getattr(value, "node", 0) is getattr(norm.cls, "node", 1)


def function_name(frame: Frame) -> str:
    """`Class.method`, for messages."""
    function = frame.function
    if not isinstance(function, Function):
        return "the module"
    return f"{function.owner.name}.{function.name}" if function.owner else function.name
