"""Takes additive positions out of the stream: where they are added, or at the call of what does nothing else."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from codemods._anchors import free_name
from codemods._survey import Cannot, Group, place
from codemods._unfollowed import unfollowed_uses
from modernizer.edit import AddArgument, AddParameter, Edit, Replace
from modernizer.graph.query import alternatives, ancestors, location
from modernizer.graph.rank import is_number
from modernizer.graph.values import Frame, Many, Module, Node, Value, flatten
from modernizer.model_map.position import Position, PositionSite, content_inputs
from modernizer.removal import Removal, is_pure

Call = tuple[ast.Call, Frame, str]  # a call that only adds positions, the frame it is in, the parameter it passes on


def take_out(removal: Removal, group: Group) -> list[Edit]:
    """Marks everything that goes with the positions of a group. Raises Cannot where some would have to stay.

    What is returned are the edits beside: a function that others need as it is learns to leave its positions out."""
    edits = [edit for site in group.positions for edit in _take_out_site(removal, group, site)]
    removal.settle()
    while _stop_passing(removal, group):
        removal.settle()
    _check_learned(removal, group)
    _check_followed(removal, group)
    return edits


def _take_out_site(removal: Removal, group: Group, site: PositionSite) -> list[Edit]:
    gone = [p for p in site.contexts if p in group.removed]
    stays = [p.frame for p in site.contexts if p not in group.removed] + [n.frame for n in site.others]
    calls = [_adding_call(removal, p, stays) for p in gone]
    if all(c is not None for c in calls):
        for found in calls:
            assert found is not None
            call, _, parameter = found
            removal.replace(call, "$0", (_argument(call, gone[calls.index(found)], parameter),))
        return []
    if stays:
        asked = _leave_out_where_asked(removal, gone, stays) if not site.others else []
        if asked:
            return asked
        other = "where no attention follows" if len(stays) > len(site.others) else "for queries made of positions alone"
        raise Cannot(
            f"what adds positions here also serves {other}, and does more than add",
            place(gone[0]), "give the two uses a class each",
        )  # fmt: skip
    _take_out_sum(removal, gone)
    return []


# -- by an argument


def _leave_out_where_asked(removal: Removal, gone: Sequence[Position], stays: Sequence[Frame]) -> list[Edit]:
    """A parameter for the function that adds, false in the calls that lose their positions; nothing where not every
    one of these is a call of its own."""
    function, node = gone[0].frame.function, gone[0].add.node
    others = {f.call for s in stays for f in s.outward()}
    path = gone[0].frame.path
    if function is None or not isinstance(function.node, ast.FunctionDef) or path not in removal.named:
        return []
    calls: dict[ast.Call, Path] = {}
    for position in gone:
        frame = position.frame
        call, caller = frame.call, frame.caller
        if frame.function is None or frame.function.node is not function.node or position.add.node is not node:
            return []
        if not isinstance(call, ast.Call) or caller is None or call in others or caller.path not in removal.named:
            return []
        if caller.function is None or not _calls_function(removal, call, frame):
            return []
        calls[call] = caller.path
    name = free_name(function.node, "add_positions", "with_positions")
    source = gone[0].frame.scope.source
    edits: list[Edit] = [AddParameter(path, function.node, f"{name}=True")]
    edits += [AddArgument(where, call, "False", name) for call, where in calls.items()]
    statement = removal.statement(node) if isinstance(node, ast.expr | ast.stmt) else None
    if isinstance(node, ast.AugAssign):
        _require_stream_first(gone)
        return [*edits, Replace(path, node, f"if {name}:\n    {source.code(node)}\n")]
    if not isinstance(node, ast.BinOp):
        return []
    kept = _kept([node.left, node.right], removal, gone)
    if isinstance(statement, ast.Assign) and statement.value is node and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Name) and isinstance(kept, ast.Name) and target.id == kept.id:
            return [*edits, Replace(path, statement, f"if {name}:\n    {source.code(statement)}\n")]
    return [*edits, Replace(path, node, f"({source.code(node)} if {name} else {source.code(kept)})")]


# -- at the call


def _adding_call(removal: Removal, position: Position, stays: Sequence[Frame]) -> Call | None:
    """The outermost call that returns its argument with positions added, and nothing else."""
    found: Call | None = None
    frame: Frame | None = position.frame
    while frame is not None and frame.function is not None and frame.caller is not None:
        parameter = _passed_on(frame, position)
        call = frame.call
        if parameter is None or not isinstance(call, ast.Call) or frame.caller.function is None:
            break
        if not _calls_function(removal, call, frame) or any(call is f.call for s in stays for f in s.outward()):
            break
        if frame.caller.path not in removal.named or _argument_of(call, frame, parameter) is None:
            break
        found = (call, frame.caller, parameter)
        frame = frame.caller
    return found


def _passed_on(frame: Frame, position: Position) -> str | None:
    """The parameter that a function returns with positions added, if that is all that it does."""
    assert frame.result is not None
    options = alternatives(frame.result)
    if not all(o is position.add or o is position.stream for o in options) or position.add not in options:
        return None
    names = [n for n, v in frame.arguments.items() if v is position.stream]
    return names[0] if len(names) == 1 else None


def _calls_function(removal: Removal, call: ast.Call, frame: Frame) -> bool:
    """Whether a call expression itself calls the function (not a Sequential that contains it)."""
    for caller, value in removal.graph.machine.at.get(call.func, ()):
        if caller is frame.caller:
            receiver = getattr(value, "receiver", value)
            function = getattr(value, "function", None)
            if receiver is frame.receiver or function is frame.function or value is frame.function:
                return True
            if frame.receiver is None and getattr(value, "node", None) is (
                frame.function.node if frame.function else 0
            ):
                return True
    return False


def _argument(call: ast.Call, position: Position, parameter: str) -> ast.expr:
    frame = next(f for f in position.frame.outward() if f.call is call)
    found = _argument_of(call, frame, parameter)
    assert found is not None
    return found


def _argument_of(call: ast.Call, frame: Frame, parameter: str) -> ast.expr | None:
    assert frame.function is not None
    spec = frame.function.node.args
    names = [a.arg for a in [*spec.posonlyargs, *spec.args]]
    if frame.receiver is not None:
        names = names[1:]
    for keyword in call.keywords:
        if keyword.arg == parameter:
            return keyword.value
    if parameter in names and names.index(parameter) < len(call.args):
        before = call.args[: names.index(parameter) + 1]
        others = [*call.args, *(k.value for k in call.keywords)]
        if not any(isinstance(a, ast.Starred) for a in before) and all(is_pure(a) for a in others):
            return before[-1]
    return None


# -- at the sum


def _take_out_sum(removal: Removal, gone: Sequence[Position]) -> None:
    node = gone[0].add.node
    if isinstance(node, ast.BinOp):
        kept = _kept([node.left, node.right], removal, gone)
        removal.replace(node, "$0", (kept,))
    elif isinstance(node, ast.AugAssign):
        _require_stream_first(gone)
        removal.drop(node)
    elif isinstance(node, ast.Call):
        _take_out_call(removal, node, gone)
    else:
        raise Cannot("positions are added in a form that is not known here", place(gone[0]))


def _require_stream_first(gone: Sequence[Position]) -> None:
    if any(p.add.args[0] is not p.stream for p in gone):
        raise Cannot("positions are the target of an addition in place", place(gone[0]),
                     "write the sum with the stream first")  # fmt: skip


def _take_out_call(removal: Removal, node: ast.Call, gone: Sequence[Position]) -> None:
    """`torch.add(x, pe)`, `x.add(pe)`, `x.add_(pe)`, `sum([tokens, pe])`"""
    listed = node.args[0] if node.args else None
    if isinstance(listed, ast.List | ast.Tuple) and isinstance(node.func, ast.Name):
        for element in listed.elts:
            values = [_value(removal, element, p.frame) for p in gone]
            if all(v is p.term for v, p in zip(values, gone, strict=True)):
                removal.drop(element)
                return
        raise Cannot("which summand are the positions cannot be told", place(gone[0]))
    candidates = [*node.args, *(k.value for k in node.keywords)]
    if isinstance(node.func, ast.Attribute):
        candidates.insert(0, node.func.value)
    kept = _kept(candidates, removal, gone)
    statement = removal.parent(node)
    if isinstance(statement, ast.Expr):
        _require_stream_first(gone)
        removal.drop(statement)
    else:
        removal.replace(node, "$0", (kept,))


def _kept(candidates: Sequence[ast.expr], removal: Removal, gone: Sequence[Position]) -> ast.expr:
    """The operand that is the stream, in every context."""
    for candidate in candidates:
        if all(_value(removal, candidate, p.frame, p.stream) is p.stream for p in gone):
            return candidate
    raise Cannot("which summand are the positions cannot be told", place(gone[0]))


def _value(removal: Removal, node: ast.expr, frame: Frame, wanted: Value | None = None) -> Value | None:
    found = [v for f, v in removal.graph.machine.at.get(node, ()) if f is frame]
    if wanted is not None and any(v is wanted for v in found):
        return wanted
    return found[-1] if found else None


# -- positions that are handed on


def _stop_passing(removal: Removal, group: Group) -> bool:
    """Calls no longer hand in what only served the positions. The parameter stays: others may call the function too."""
    changed = False
    positions = {i for p in group.removed for i in (*ancestors(p.term), *map(id, _tables(p.term)))}
    for frame in removal.graph.machine.frames:
        if frame.function is None or not isinstance(frame.call, ast.Call) or frame.caller is None:
            continue
        unread = removal.unread_parameters(frame.function.node)
        if not unread or frame.call in removal.replaced or not removal.knows(frame.call) or removal.is_gone(frame.call):
            continue
        for name in unread:
            handed = frame.arguments.get(name)
            if handed is None or id(handed) not in positions or _is_option(handed):
                continue
            argument = _argument_of(frame.call, frame, name)
            if argument is None or isinstance(argument, ast.Constant) or not removal.knows(argument):
                continue
            if removal.path(argument) in removal.named and not removal.is_gone(argument):
                removal.replace(argument, "None")
                changed = True
    return changed


def _is_option(value: Value) -> bool:
    """Whether a value is a number or setting: it costs nothing to hand in, and the call reads as it did."""
    if isinstance(value, Node) and value.op == "merge":
        return all(_is_option(v) for v in value.args)
    return not isinstance(value, Node) or is_number(value) or value.op in ("attr", "config")


# -- what must not be left behind


def _check_learned(removal: Removal, group: Group) -> None:
    """A table that was learned for the positions and is read elsewhere serves something else too."""
    for position in group.removed:
        for table in _tables(position.term):
            for reader, frame in removal.graph.machine.reads.get(id(table), ()):
                if _is_made_no_more(removal, frame):
                    continue
                if (
                    isinstance(reader, ast.Attribute)
                    and isinstance(reader.ctx, ast.Load)
                    and not removal.is_gone(reader)
                ):
                    raise Cannot(
                        f"the positions are learned, and their table `{reader.attr}` is read for something else too",
                        location(reader, frame), "give the other use a table of its own",
                    )  # fmt: skip


def _check_followed(removal: Removal, group: Group) -> None:
    """Code that was not executed may add the same positions: it would go on adding them before what is rotated now."""
    held: dict[tuple[int, str], Module] = {}
    for position in group.removed:
        inner = [f.receiver for f in position.term.frame.outward()] if isinstance(position.term, Node) else []
        made = {id(m) for m in (*inner, *_tables(position.term), *ancestors(position.term).values()) if _is_table(m)}
        for owner in (f.receiver for f in position.frame.outward() if isinstance(f.receiver, Module)):
            for name, value in owner.attributes.items():
                if any(id(leaf) in made and leaf is not owner for leaf in flatten(value)):
                    held[id(owner), name] = owner
    for (_, name), owner in held.items():
        for read, where in unfollowed_uses(removal.graph, owner, name):
            if not removal.is_gone(read):
                raise Cannot(f"`{name}` is also used in code that could not be followed", where,
                             "name the files that call this code too, or take it out")  # fmt: skip


def _is_table(value: Value | None) -> bool:
    """Whether positions may be kept as this: a module, a parameter or what was computed when the model was made."""
    if isinstance(value, Node):
        return value.op not in ("config", "input", "attr", "unknown", "dim", "shape") and not is_number(value)
    return isinstance(value, Module)


def _is_made_no_more(removal: Removal, frame: Frame) -> bool:
    """Whether code ran on a module that is constructed no longer."""
    made = frame.receiver.call if isinstance(frame.receiver, Module) else None
    return made is not None and removal.knows(made) and removal.is_gone(made)


def _tables(term: Value) -> list[Value]:
    """The modules and parameters that a term is looked up in."""
    found: list[Value] = []
    seen: set[int] = set()
    todo: list[Value] = [term]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Node):
            if value.op == "parameter":
                found.append(value)
            if value.op == "embedding" and value.module is not None:
                found.append(value.module)
            todo.extend(content_inputs(value))
        elif isinstance(value, Many):
            todo.extend(value.items)
    return found


__all__ = ["take_out"]
