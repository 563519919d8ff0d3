"""The norm at the end of a stack: where the stream leaves it, who owns it, and how it is made."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from codemods._prenorm_branch import is_constructor
from codemods._prenorm_common import Impossible, defining, quoted, receiver_name, values_in
from codemods._prenorm_sizes import Translator
from modernizer.edit import AddImport, Edit, Insert, Replace
from modernizer.graph import Graph
from modernizer.graph.query import alternatives
from modernizer.graph.values import Class, Frame, Many, Module, Node, Package, Value, flatten
from modernizer.imports import Imports
from modernizer.model_map.residual import Residual
from modernizer.model_map.stack import LOOP, SEQUENTIAL, Stack
from modernizer.syntax import below, loops_around, statement_of, walk

NAME = "_the_final_norm_"  # stands for the name of the final norm until that is chosen
# Arguments of torch's layers that its norms get: what a LayerNorm calls them, and their place.
NORM_ARGUMENTS = {
    "d_model": ("", 0),
    "layer_norm_eps": ("eps", 5),
    "bias": ("bias", 8),
    "device": ("device", 9),
    "dtype": ("dtype", 10),
}


@dataclass(eq=False)
class Exit:
    """Where the stream leaves a stack: in which activation, and the edit that norms it there.

    `code` has NAME for the name of the norm: it is chosen once all exits of a class are known. `replaces` is the norm
    call that the final norm takes the place of.
    """

    stack: Stack
    frame: Frame
    owner: Module
    attribute: str
    edits: tuple[Edit, ...]
    replaces: ast.Call | None = None
    call: ast.Call | None = None  # behind which the norm is called


def exit_of(graph: Graph, stack: Stack, others: Sequence[Stack]) -> Exit:
    """Where the final norm of a stack is called; `others` are all that are upgraded with it. Raises Impossible."""
    if stack.kind == LOOP:
        if _is_bare_container(stack.frame):
            return _around_container(graph, stack)
        return _after_loop(graph, stack, [s for s in others if s.frame is stack.frame and s.node is stack.node])
    end = _only_end(stack)
    if stack.kind == SEQUENTIAL:
        assert isinstance(stack.node, ast.Call)
        return _after_call(graph, stack, end, stack.node, stack.frame)
    return _plain(graph, stack, end)


def _is_bare_container(frame: Frame) -> bool:
    """Whether the stack's class is one of torch's containers with another `forward`: nothing else fits in there."""
    owner = frame.receiver
    if not isinstance(owner, Module) or owner.cls is None or owner.children is None:
        return False
    return defining(owner.cls, "__init__") is None


def _around_container(graph: Graph, stack: Stack) -> Exit:
    call, caller = stack.frame.call, stack.frame.caller
    if not isinstance(call, ast.Call) or caller is None:
        raise _lost(stack)
    return _after_call(graph, stack, _only_end(stack), call, caller)


def _only_end(stack: Stack) -> Residual:
    if len(stack.ends) != 1:
        raise _lost(stack)
    return stack.ends[0]


def _lost(stack: Stack, reason: str = "", hint: str = "") -> Impossible:
    r = stack.residuals[-1]
    assert r.sum.node is not None
    return Impossible(
        r.sum.node,
        r.frame,
        reason or "the place where the stream leaves its stack, which needs a final norm, cannot be told",
        hint,
    )


def _owner(stack: Stack, frame: Frame) -> tuple[Module, str]:
    """The module in whose method the stream leaves the stack, and the attribute of it that holds the layers."""
    owner = frame.receiver
    if not isinstance(owner, Module) or owner.cls is None or not receiver_name(frame):
        raise _lost(stack, "the layers are called from a function, not from a module that could own their final norm")
    r = stack.residuals[-1]
    start = r.layer or (r.norm.module if r.norm else None)
    inner = [f.receiver for f in r.frame.outward() if isinstance(f.receiver, Module) and f.receiver is not owner]
    for module in [*([start] if start else []), *inner]:
        chain: Module | None = module
        while chain is not None and chain.owner is not owner:
            chain = chain.owner
        if chain is not None:
            return owner, chain.name
    return owner, ""


# -- where it is called


def _after_loop(graph: Graph, stack: Stack, runs: Sequence[Stack]) -> Exit:
    loop, frame = stack.node, stack.frame
    assert isinstance(loop, ast.For | ast.While) and frame.function is not None
    tree = frame.scope.source.tree
    owner, attribute = _owner(stack, frame)
    passes = values_in(graph.machine, loop.iter, frame) if isinstance(loop, ast.For) else [None]
    if len(passes) > len(runs):
        around = list(loops_around(tree, loop))
        if len(around) != 1:
            raise _lost(stack, "the stack is run through several times, one run after the other")
        loop = around[0]
    if len({frozenset(id(r.norm.module) for r in run.residuals if r.norm) for run in runs}) > 1:
        raise _lost(stack, "one loop runs several stacks, each of which needs a final norm of its own")
    if loop.orelse:
        raise _lost(stack)
    carried = {key for run in runs for end in run.ends for key in run.flow.carried(end)}
    code = _after_loop_code(graph, stack, frame, loop, carried)
    return Exit(stack, frame, owner, attribute, (Insert(frame.path, loop, code),))


def _after_loop_code(graph: Graph, stack: Stack, frame: Frame, loop: ast.For | ast.While, carried: set[int]) -> str:
    """What norms the stream behind a loop: the variable that holds it, its other names, and what was collected."""
    norm = f"{receiver_name(frame)}.{NAME}"
    held = _carriers(graph, loop, frame, carried)
    used = [n for n in held if _is_read_after(frame, loop, n)]
    if not used and len(held) == 1 and _collected(stack, frame, loop, next(iter(held)), carried):
        used = list(held)
    if not used:
        return _collected_alone(stack, frame, loop, norm, carried)
    if len({id(held[n]) for n in used}) != 1:
        raise _lost(stack)
    name = used[0]
    others = "".join(f"{other} = {name}\n" for other in used[1:])
    return f"{name} = {norm}({name})\n{others}" + _collected(stack, frame, loop, name, carried)


def _collected_alone(stack: Stack, frame: Frame, loop: ast.AST, norm: str, carried: set[int]) -> str:
    """For a stream that is only held as the last element of a list."""
    lists = [
        name
        for name, value in frame.names.items()
        if isinstance(value, Many)
        and value.kind == "list"
        and value.items
        and id(value.items[-1]) in carried
        and any(isinstance(n, ast.Name) and n.id == name for n in walk(loop))
    ]
    if len(lists) != 1:
        raise _lost(stack)
    return f"{lists[0]}[-1] = {norm}({lists[0]}[-1])\n"


def _carriers(graph: Graph, loop: ast.For | ast.While, frame: Frame, carried: set[int]) -> dict[str, Value]:
    """The variables that hold the stream when a loop is over."""
    found: dict[str, Value] = {}
    for node in walk(loop):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            values = values_in(graph.machine, node, frame)
            if values:
                found[node.id] = max([v for v in (found.get(node.id), values[-1]) if v is not None], key=_age)
    return {name: value for name, value in found.items() if id(value) in carried and not _may_be_container(value)}


def _may_be_container(value: Value) -> bool:
    """Whether a value is a tuple or list in some case: it may hold the stream, it is not the stream."""
    return any(isinstance(option, Many) for option in alternatives(value))


def _age(value: Value) -> int:
    return value.order if isinstance(value, Node) else -1


def _is_read_after(frame: Frame, loop: ast.AST, name: str) -> bool:
    """Whether a variable is read behind a loop before it is bound again (textually)."""
    assert frame.function is not None
    end = loop.end_lineno  # type: ignore[attr-defined]
    reads = [
        n
        for n in walk(frame.function.node)
        if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) and n.lineno > end
    ]
    return bool(reads)


def _collected(stack: Stack, frame: Frame, loop: ast.AST, name: str, carried: set[int]) -> str:
    """The last of hidden states that the loop collects is the stack's output, so it is normed as well."""
    code = ""
    for variable, value in frame.names.items():
        if not isinstance(value, Many) or not value.items or id(value.items[-1]) not in carried:
            continue
        touched = [n for n in walk(loop) if isinstance(n, ast.Name) and n.id == variable]
        if not touched:
            continue
        if value.kind == "tuple" or any(isinstance(n.ctx, ast.Store) for n in touched):
            if value.kind != "tuple":
                raise _lost(stack, f"the hidden states are collected in `{variable}` in a way that is not understood")
            code += f"if {variable}:\n    {variable} = (*{variable}[:-1], {name})\n"
        else:
            code += f"if {variable}:\n    {variable}[-1] = {name}\n"
    return code


def _after_call(graph: Graph, stack: Stack, end: Residual, call: ast.Call, frame: Frame) -> Exit:
    """Behind one call whose result is the stream, or holds it."""
    owner, attribute = _owner(stack, frame)
    carried = stack.flow.carried(end)
    norm = f"{receiver_name(frame)}.{NAME}"
    if not isinstance(call, ast.Call) or frame.function is None:
        raise _lost(stack)
    source = frame.scope.source
    statement = statement_of(source.tree, call)
    if isinstance(statement, ast.Assign) and statement.value is call and len(statement.targets) == 1:
        names = [
            n.id
            for n in walk(statement.targets[0])
            if isinstance(n, ast.Name) and any(id(v) in carried for v in values_in(graph.machine, n, frame))
        ]
        if len(names) == 1:
            code = f"{names[0]} = {norm}({names[0]})\n"
            return Exit(stack, frame, owner, attribute, (Insert(frame.path, statement, code),), call=call)
    if all(id(v) in carried for v in values_in(graph.machine, call, frame)):
        code, holes = quoted(source.code(call), call)
        return Exit(stack, frame, owner, attribute, (Replace(frame.path, call, f"{norm}({code})", holes),), call=call)
    raise _lost(stack)


def _plain(graph: Graph, stack: Stack, end: Residual) -> Exit:
    """Layers that are written out one after the other, or a single one."""
    if len(stack.residuals) == 1 and stack.residuals[0].layer is None:
        raise _lost(stack, "one residual sum alone is no layer, and what it belongs to cannot be followed")
    frame = stack.frame
    while True:
        call = _call_into(end, frame)
        if call is not None and not _is_one_layer(stack, frame):
            return _after_call(graph, stack, end, call, frame)
        results = flatten(frame.result) if frame.result is not None else ()
        returned = any(id(leaf) in stack.flow.carried(end) for leaf in results)
        if call is None and not returned and end.norm is not None:
            return _in_place(stack, end, frame)
        if frame.caller is None or frame.caller.function is None:
            raise _lost(
                stack, "a layer that no stack of this program calls: its stack would need a final norm",
                "name the file in which the stack is built as well",
            )  # fmt: skip
        frame = frame.caller


def _call_into(end: Residual, frame: Frame) -> ast.Call | None:
    """The call in the function of `frame` below which the last norm of a stack is evaluated."""
    inner = end.norm.frame if end.norm else end.frame
    if inner is frame:
        return end.sum.node if end.layer is not None and isinstance(end.sum.node, ast.Call) else None
    for active in inner.outward():
        if active.caller is frame:
            return active.call if isinstance(active.call, ast.Call) else None
    return None


def _is_one_layer(stack: Stack, frame: Frame) -> bool:
    """Whether an activation is that of the layer itself: its own code holds sublayers, not layers."""
    if stack.frame is not frame:
        return False
    owners = {id(_below(r, frame)) for r in stack.residuals if _below(r, frame) is not None}
    per_child = [sum(1 for r in stack.residuals if id(_below(r, frame)) == o) for o in owners]
    return not any(count > 1 for count in per_child) and not any(r.layer for r in stack.residuals)


def _below(r: Residual, frame: Frame) -> Frame | None:
    return next((f for f in r.frame.outward() if f.caller is frame), None)


def _in_place(stack: Stack, end: Residual, frame: Frame) -> Exit:
    """The last norm call of a model in one class becomes that of the final norm."""
    owner, attribute = _owner(stack, frame)
    norm = end.norm
    assert norm is not None and norm.call is not None and norm.argument is not None
    code = f"{receiver_name(frame)}.{NAME}($0)"
    edit = Replace(frame.path, norm.call, code, (norm.argument,))
    return Exit(stack, frame, owner, attribute, (edit,), norm.call)


# -- how it is made


def creation(graph: Graph, exit_: Exit, name: str) -> list[Edit]:
    """The line that makes the final norm, below the one that builds the stack. Raises Impossible."""
    owner, stack = exit_.owner, exit_.stack
    assert owner.cls is not None
    found = defining(owner.cls, "__init__")
    if found is None:
        raise _lost(stack, f"{owner.cls.name} has no constructor in which a final norm could be made")
    cls, init = found
    frame = _constructor_frame(graph, owner, init)
    if frame is None:
        raise _lost(stack)
    anchor = _building_statement(init, exit_.attribute, receiver_name(frame))
    code, imports = _constructor(graph, exit_, frame, init)
    line = f"{receiver_name(frame)}.{name} = {code}\n"
    return [Insert(cls.path, anchor, line), *imports]


def _constructor_frame(graph: Graph, owner: Module, init: ast.FunctionDef) -> Frame | None:
    instance: Module | None = owner
    while instance is not None:
        for frame in graph.machine.frames:
            if frame.receiver is instance and frame.function is not None and frame.function.node is init:
                return frame
        instance = instance.template
    return None


def _building_statement(init: ast.FunctionDef, attribute: str, own: str) -> ast.stmt:
    """The statement of a constructor that last builds an attribute; its last one where none does."""
    found: ast.stmt | None = None
    for statement in init.body:
        for node in below(statement):
            is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own
            if is_own and isinstance(node, ast.Attribute) and node.attr == attribute:
                filled = any(
                    isinstance(c, ast.Call)
                    and isinstance(c.func, ast.Attribute)
                    and c.func.value is node
                    and c.func.attr in ("append", "extend", "insert", "add_module")
                    for c in below(statement)
                )
                if isinstance(node.ctx, ast.Store) or filled:
                    found = statement
    if found is None:
        found = init.body[-1]
    return found


def _constructor(graph: Graph, exit_: Exit, frame: Frame, init: ast.FunctionDef) -> tuple[str, list[AddImport]]:
    """The expression that makes a norm like the layers' own in the constructor of the stack's owner."""
    r = exit_.stack.ends[0]
    if r.layer is not None:
        return torch_norm(graph, r.layer, frame, init) or _fail(exit_)
    module = r.norm.module if r.norm else None
    if module is None:
        raise _lost(exit_.stack, "the norm is a function with weights of its own; a final one would need weights too")
    call, made_in = module.call, module.frame
    if isinstance(call, ast.Call) and made_in is not None:
        makers = values_in(graph.machine, call.func, made_in)
        if makers and all(is_constructor(v, module) for v in makers):
            translator = Translator(graph.machine, frame)
            arguments = _arguments(translator, call, made_in)
            named = _class_name(graph, call, made_in, module, frame, init)
            if arguments is not None and named is not None:
                return f"{named[0]}({arguments})", named[1]
    return _copy(exit_, module, frame, init)


def _fail(exit_: Exit) -> tuple[str, list[AddImport]]:
    raise _lost(exit_.stack, "the size of the final norm cannot be said where the stack is built")


def _arguments(translator: Translator, call: ast.Call, frame: Frame) -> str | None:
    parts: list[str] = []
    for argument in call.args:
        made = translator.translate(argument, frame)
        if made is None or isinstance(argument, ast.Starred):
            return None
        parts.append(_text(made, argument, frame))
    for keyword in call.keywords:
        made = translator.translate(keyword.value, frame)
        if made is None or keyword.arg is None:
            return None
        parts.append(f"{keyword.arg}={_text(made, keyword.value, frame)}")
    return ", ".join(parts)


def _text(made: ast.expr, original: ast.expr, frame: Frame) -> str:
    """What a person wrote where it is the same (`1e-6`), else the expression in Python's own spelling."""
    return frame.scope.source.code(original) if made is original else ast.unparse(made)


def _class_name(
    graph: Graph, call: ast.Call, made_in: Frame, module: Module, frame: Frame, init: ast.FunctionDef
) -> tuple[str, list[AddImport]] | None:
    """What the norm's class is called in the file of the stack's owner, and the import this takes."""
    source = frame.scope.source
    text = made_in.scope.source.code(call.func)
    if frame.scope is made_in.scope and text.partition(".")[0] not in frame.names:
        return text, []
    if module.cls is None:
        name, added = Imports(source).reference(module.torch_name, init)
        return name, [added] if added else []
    name = module.cls.name
    if name in frame.names:
        return None
    known = frame.scope.lookup(name)
    if isinstance(known, Class) and known.node is module.cls.node:
        return name, []
    if known is not None:
        return None
    for scope in (frame.scope, made_in.scope):
        for statement in scope.source.tree.body:
            if isinstance(statement, ast.ImportFrom) and (scope is frame.scope or not statement.level):
                package = graph.machine.scopes.module(source.path, statement.module or "", statement.level)
                if isinstance(package, Package) and package.path == module.cls.path:
                    return name, [AddImport(source.path, "." * statement.level + (statement.module or ""), name, name)]
    return None


def _copy(exit_: Exit, module: Module, frame: Frame, init: ast.FunctionDef) -> tuple[str, list[AddImport]]:
    """A copy of the last layer's norm, where its constructor cannot be said in the terms of the stack's owner."""
    steps: list[str] = []
    current: Module | None = module
    while current is not None and current is not exit_.owner:
        in_list = current.owner is not None and current.owner.children is not None
        by_number = in_list and current.name.isdigit()
        steps.append("[-1]" if by_number else f".{current.name}")
        if by_number and current.owner is not None and not _is_any(current, current.owner):
            return _fail(exit_)
        current = current.owner
    if current is None:
        return _fail(exit_)
    name, added = Imports(frame.scope.source).reference("copy.deepcopy", init)
    return f"{name}({receiver_name(frame)}{''.join(reversed(steps))})", [added] if added else []


def _is_any(module: Module, owner: Module) -> bool:
    """Whether the elements of a list are copies of each other, so that the last stands for any."""
    items = owner.children.items if owner.children else []
    return all(isinstance(i, Module) and i.call is module.call for i in items)


def torch_norm(graph: Graph, layer: Module, frame: Frame, init: ast.FunctionDef) -> tuple[str, list[AddImport]] | None:
    """A LayerNorm as those in one of torch's layers, said in the activation `frame`."""
    call, made_in = layer.call, layer.frame
    if not isinstance(call, ast.Call) or made_in is None:
        return None
    translator = Translator(graph.machine, frame)
    parts: list[str] = []
    for theirs, (ours, place) in NORM_ARGUMENTS.items():
        given = [k.value for k in call.keywords if k.arg == theirs]
        given += [call.args[place]] if len(call.args) > place else []
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            return None
        if not given:
            if not ours:
                return None
            continue
        made = translator.translate(given[0], made_in)
        if made is None:
            return None
        text = _text(made, given[0], made_in)
        parts.append(f"{ours}={text}" if ours else text)
    name, added = Imports(frame.scope.source).reference("torch.nn.LayerNorm", init)
    return f"{name}({', '.join(parts)})", [added] if added else []


def free_attribute(exits: Sequence[Exit], wanted: str) -> str:
    """`wanted`, or a name after it that no class these exits belong to uses."""
    used: set[str] = set()
    for exit_ in exits:
        assert exit_.owner.cls is not None
        for base in exit_.owner.cls.mro:
            if isinstance(base, Class):
                used |= set(base.members)
                used |= {n.attr for n in below(base.node) if isinstance(n, ast.Attribute)}
        used |= set(exit_.owner.attributes)
    name, number = wanted, 2
    while name in used:
        name, number = f"{wanted}_{number}", number + 1
    return name
