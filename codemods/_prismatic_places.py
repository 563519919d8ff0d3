"""Which modules hold a self-attention and nothing else, and whether experts can take their place."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._relay_axes import START, Time, attends_over_time, time_of
from codemods._relay_checks import Refused, is_causal_mask, joins_others, masks_of
from codemods._relay_places import check_program
from modernizer.graph.calls import PRISMATIC
from modernizer.graph.query import (
    ACTIVATIONS,
    IDENTITY,
    alternatives,
    ancestors,
    enclosing_modules,
    is_torch,
    location,
    origin,
    same_size,
)
from modernizer.graph.rank import rank
from modernizer.graph.values import Class, Const, External, Frame, Function, Many, Method, Module, Node, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.source import Location
from modernizer.syntax import below, mentions, parents
from modernizer.vendoring import is_vendored

# What a Prismatic module calls its own.
_TAKEN = frozenset(
    "settings batch_first routing expert operations router balance metrics expert_parameters modify_expert_gradients"
    " log_gradient_dynamics from_settings".split()
)
# Methods that put a module somewhere.
_KEEPERS = frozenset({"append", "extend", "insert", "add_module", "register_module"})
# What leaves every token where it is.
_IN_PLACE = IDENTITY | ACTIVATIONS | frozenset("layer_norm rms_norm add sub mul div neg merge parameter config".split())


@dataclass(eq=False)
class Holder:
    """Everything that one call makes, a constructor's or one that copies: modules around a self-attention."""

    call: ast.Call
    made_in: Frame
    modules: list[Module] = field(default_factory=list)
    contexts: list[Attention] = field(default_factory=list)
    runs: list[Frame] = field(default_factory=list)  # of `forward`

    @property
    def cls(self) -> Class:
        found = self.modules[0].cls
        assert found is not None
        return found

    @property
    def location(self) -> Location:
        return location(self.call, self.made_in)

    @property
    def is_done(self) -> bool:
        """Whether it is the expert of a Prismatic module already."""
        return all(m.owner is not None and m.owner.torch_name == PRISMATIC for m in self.modules)

    @property
    def forward(self) -> ast.FunctionDef:
        function = self.runs[0].function
        assert function is not None and isinstance(function.node, ast.FunctionDef)
        return function.node

    @property
    def linears(self) -> list[tuple[str, Module]]:
        """Every plain linear layer in the first of the modules, with its path there."""
        return list(linears_in(self.modules[0]))


# -- finding them


def holders(model: ModelMap) -> tuple[list[Holder], list[tuple[Attention, Refused]]]:
    """The holders of all self-attention, and the self-attentions that no module of their own holds."""
    found: dict[ast.AST, Holder] = {}
    alone: list[tuple[Attention, Refused]] = []
    for context in (c for site in model.attentions for c in site.contexts if c.kind != "cross"):
        try:
            module, run = _held(model, context)
        except Refused as refused:
            alone.append((context, refused))
            continue
        call, frame = maker(model, module)
        if not isinstance(call, ast.Call) or frame is None:
            alone.append((context, Refused("no module holds this attention", "make a class of it")))
            continue
        holder = found.setdefault(call, Holder(call, frame))
        holder.contexts.append(context)
        if module not in holder.modules:
            holder.modules.append(module)
        if run not in holder.runs:
            holder.runs.append(run)
    return list(found.values()), alone


def maker(model: ModelMap, module: Module) -> tuple[ast.AST | None, Frame | None]:
    """The call that makes a module: one that copies it, if all that it copies is of this class, or its constructor."""
    return model.derived(_makers).get(id(module), (origin(module).call, origin(module).frame))


def _makers(model: ModelMap) -> dict[int, tuple[ast.AST, Frame]]:
    """The calls of `copy.deepcopy` by what they made, and by what was copied from that in turn."""
    machine = model.graph.machine
    found: dict[int, tuple[ast.AST, Frame]] = {}
    for module in machine.modules:
        for copied in (m for m in (module, *_templates(module)) if m.template is not None):
            for node, frame in machine.reads.get(id(copied), ()):
                if isinstance(node, ast.Call) and _copies(model, node, frame) and _makes_alone(model, node, module):
                    found.setdefault(id(module), (node, frame))
    return found


def _copies(model: ModelMap, call: ast.Call, frame: Frame) -> bool:
    callee = [v for f, v in model.graph.machine.at.get(call.func, ()) if f is frame]
    return bool(callee) and all(isinstance(v, External) and v.dotted == "copy.deepcopy" for v in callee)


def _makes_alone(model: ModelMap, call: ast.Call, module: Module) -> bool:
    made = [v for _, v in model.graph.machine.at[call]]
    return module.cls is not None and all(
        isinstance(v, Module) and v.cls is not None and v.cls.node is module.cls.node for v in made
    )


def _held(model: ModelMap, context: Attention) -> tuple[Module, Frame]:
    """The innermost module that has all projections of an attention, and its run of `forward` around this one."""
    if context.form == "torch_layer":
        raise Refused(
            "this attention is inside one of torch's layers, and there is no place to put experts in",
            "write the layer out with an attention of its own",
        )
    if context.form == "mha":
        raise Refused(
            "torch's attention keeps its projections in one matrix of its own, in which experts cannot differ",
            "write the attention out with linear layers",
        )
    projections = [*context.query_projections, *context.key_projections, *context.value_projections]
    made = [p.module for p in projections]
    if context.kind != "self" or not projections:
        raise Refused("query and key are not surely made of one sequence")
    if not all(p.op == "linear" and is_torch(p.module, "Linear") for p in projections):
        raise Refused("query, key and value are not all made by plain nn.Linear layers, which experts could differ in")
    for module in enclosing_modules(context.frame):
        if all(m is not None and is_below(m, module) for m in made):
            run = _forward_of(context.frame, module)
            siblings = _heads_beside(model, module, run)
            if siblings is not None:  # one of several heads: what holds them all
                outer = next(enclosing_modules(siblings), None)
                if outer is None:
                    break
                module, run = outer, _forward_of(siblings, outer)
            if module.cls is None:
                break
            return module, run
    raise Refused("no module holds this attention", "make a class of it")


def is_below(module: Module, above: Module) -> bool:
    """Whether a module is a part of another."""
    current: Module | None = module
    while current is not None:
        current = current.owner
        if current is above:
            return True
    return False


def _forward_of(frame: Frame, module: Module) -> Frame:
    """The outermost activation of a module's method around a frame."""
    return [f for f in frame.outward() if f.receiver is module][-1]


def _heads_beside(model: ModelMap, module: Module, run: Frame) -> Frame | None:
    """Where a module is called, if others of its kind are called on the same input there."""
    x = first_argument(run)
    for other in model.graph.machine.frames:
        if (
            other.caller is run.caller
            and run.caller is not None
            and other is not run
            and isinstance(other.receiver, Module)
            and other.receiver is not module
            and maker(model, other.receiver)[0] is maker(model, module)[0]
            and first_argument(other) is x
        ):
            return run.caller
    return None


def first_argument(run: Frame) -> Value | None:
    """What a method got behind `self`."""
    return next((value for name, value in list(run.arguments.items())[1:2]), None)


def linears_in(module: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """Every plain linear layer below a module, with its path there."""
    for name, child in children_of(module):
        where = f"{path}.{name}" if path else name
        if is_torch(child, "Linear"):
            yield where, child
        yield from linears_in(child, where)


def children_of(module: Module) -> Iterator[tuple[str, Module]]:
    """The sub-modules by name, those of containers by place."""
    items = module.attributes.get("#items")
    names = module.attributes.get("#names")
    if names is not None and hasattr(names, "entries"):
        yield from ((str(k), v) for k, v in names.entries.items() if isinstance(v, Module))
    elif isinstance(items, Many):
        yield from ((str(i), v) for i, v in enumerate(items.items) if isinstance(v, Module))
    for name, value in module.attributes.items():
        if not name.startswith("#"):
            yield from ((name, option) for option in alternatives(value) if isinstance(option, Module))


# -- whether experts can take their place


def check(model: ModelMap, holder: Holder, routing: str) -> None:
    """Raises Refused where a Prismatic module around this attention would not do what was promised."""
    source = holder.made_in.scope.source
    if source.path not in model.project.named:
        raise Refused("it is made in a file that was not named")
    _check_made(model, holder)
    _check_calls(model, holder)
    for context in holder.contexts:
        _check_attention(context, routing)
    _check_content(model, holder)
    for run in holder.runs:
        _check_axes(holder, run, model)
    _check_reads(model, holder)
    _check_layers(model, holder)
    check_program(model, knows=_sorts_by_kind)


def _check_made(model: ModelMap, holder: Holder) -> None:
    """Whether the call makes self-attention of this class alone, while the model is put together."""
    call, machine = holder.call, model.graph.machine
    kinds = [v for _, v in machine.at.get(call.func, ())]
    is_copied = _copies(model, call, holder.made_in)
    if not is_copied and (not kinds or any(not isinstance(v, Class) or v.node is not holder.cls.node for v in kinds)):
        raise Refused("the class of this attention is chosen while the program runs")
    if any(module.owner is None for module in holder.modules):
        raise Refused("this attention is the whole model, or what holds it was not read")
    if _is_in_call(holder.made_in):
        raise Refused("the attention is made anew in every call", "make it in the constructor")
    made = {id(m) for m in machine.modules if maker(model, m)[0] is call}
    for site in model.attentions:
        for context in site.contexts:
            if context in holder.contexts:
                continue
            if any(id(m) in made for m in enclosing_modules(context.frame)):
                raise Refused(
                    "what this call makes also attends to another sequence",
                    "construct self-attention and cross-attention apart",
                )
    if any(id(m) not in made and id(t) in made for m in machine.modules for t in _templates(m)):
        raise Refused("what this call makes is copied for other uses, which would get experts too")
    if any(isinstance(n, ast.Name | ast.Attribute) and "checkpoint" in _word(n) for n in below(holder.cls.node)):
        raise Refused("this attention recomputes parts of itself for the gradient, which would not be routed then")


def _templates(module: Module) -> Iterator[Module]:
    """What a module was copied from, and what that was copied from."""
    current = module.template
    while current is not None:
        yield current
        current = current.template


def _is_in_call(made_in: Frame) -> bool:
    methods = [f for f in made_in.outward() if isinstance(f.receiver, Module)]
    return bool(methods) and not any(f.function is not None and f.function.name == "__init__" for f in methods)


def _word(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def _check_calls(model: ModelMap, holder: Holder) -> None:
    """Whether every call hands the input in first, and only `forward` is called."""
    modules = {id(m) for m in holder.modules}
    for frame in model.graph.machine.frames:
        if id(frame.receiver) not in modules or (frame.caller is not None and id(frame.caller.receiver) in modules):
            continue
        name = frame.function.name if frame.function is not None else ""
        if name == "__init__" or frame.caller is None:
            continue
        if name != "forward":
            raise Refused(f"its method {name} is called from outside, which experts would not take part in")
    for run in holder.runs:
        call, caller = run.call, run.caller
        if not isinstance(call, ast.Call) or caller is None or run.function is None or run.function.name != "forward":
            raise Refused("this attention is not called as a module")
        callee = [v for f, v in model.graph.machine.at.get(call.func, ()) if f is caller]
        if any(isinstance(v, Module) and is_torch(v, "Sequential") for v in callee):
            continue
        if not any(v is run.receiver or (isinstance(v, Method) and v.receiver is run.receiver) for v in callee):
            raise Refused("this attention is called by code that was not read")
        first = list(run.arguments)[1:2]
        if not call.args and not any(k.arg in first for k in call.keywords):
            raise Refused("the input of this attention comes out of a dictionary", "hand it in by itself")
        if any(k.arg in ("padding_mask", "pos_type") for k in call.keywords):
            raise Refused("it is called with an argument that a Prismatic module takes for its own")


def _check_attention(context: Attention, routing: str) -> None:
    if joins_others(context):
        raise Refused(
            "keys are joined with others (a cache or memory), and a router would not know of them",
            "wrap it by hand, and generate within modernizer.components.prismatic.decoding",
        )
    if not attends_over_time(context):
        raise Refused("it cannot be told that it attends over the time of [batch, time, features]")
    if routing == "sequence":
        hidden = list(masks_of(context))
        if hidden:
            what = "a causal mask" if all(is_causal_mask(mask) for mask in hidden) else "a mask"
            raise Refused(
                f"this attention has {what}, and routing by the whole sequence would tell of what it hides",
                "leave --routing out: the prefix of every position is pooled then",
            )


def _check_content(model: ModelMap, holder: Holder) -> None:
    """Whether the class holds an attention and nothing more."""
    for found in model.feed_forwards:
        if found.counts and any(m in holder.modules for m in enclosing_modules(found.second.value.frame)):
            raise Refused("the attention is written out in a class that does more", "make a class of it")
    own = set(holder.cls.members) | {name for m in holder.modules for name in m.attributes}
    clash = sorted(own & _TAKEN - {"batch_first"})
    if clash:
        raise Refused(f"the class has {clash[0]}, which a Prismatic module has too")


def _sorts_by_kind(sorting: ast.FunctionDef) -> bool:
    """Whether parameters are sorted by the class of their module and the end of their name: those of experts and
    routers belong to linear layers too, and end in `weight` and `bias`."""
    calls = [n for n in below(sorting) if isinstance(n, ast.Call)]
    ends = {
        a.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "endswith"
        for a in call.args
        if isinstance(a, ast.Constant)
    }
    asked = {_called(call) for call in calls}
    names = {_word(n) for n in below(sorting) if isinstance(n, ast.Name | ast.Attribute)}
    return (
        {"weight", "bias"} <= ends and "isinstance" in asked and "Linear" in names and not names & {"type", "__class__"}
    )


# -- where positions are


def _check_axes(holder: Holder, run: Frame, model: ModelMap) -> None:
    """Whether every linear layer in there gets an input whose first axes are batch and time."""
    contexts = [c for c in holder.contexts if any(f is run for f in c.frame.outward())]
    x = first_argument(run)
    given = [v for v in run.arguments.values() if isinstance(v, Node)]
    reads = [p.args[0] for c in contexts for p in _projections(c)]
    if not isinstance(x, Node) or not all(_comes_in_place(r, given) for r in reads):
        raise Refused("what is projected to query, key and value is not the input as it came in")
    result = run.result.items[0] if isinstance(run.result, Many) and run.result.items else run.result
    known: dict[int, Time] = {id(r): START for r in reads if isinstance(r, Node)}
    for context in contexts:
        query = time_of(context.query, {id(p): START for p in context.query_projections})
        place = _query_letter(context) if context.form == "einsum" else -2
        if query is not None and place is not None:
            known[id(context.output)] = Time(query.axes + place, query.axes, query.folded)
    first = next(linear for _, linear in linears_in(_receiver(run)))
    if not any(_is_as_wide(first, p) and _comes_in_place(p.args[0], [x]) for c in contexts for p in _projections(c)):
        raise Refused("the first linear layer of the class is not as wide as the input")
    outs = []
    for node in used_by(model, run):
        if node.op == "parameter":
            raise Refused("the weights of its linear layers are read by themselves, which experts would not change")
        time = time_of(node.args[0], known) if node.op == "linear" else None
        if time not in (START, Time(1, 4)):
            raise Refused("a linear layer in it gets something else than [batch, time, features]")
        outs += [node] if time == START else []
    if not _is_of_three_axes(model, contexts, [x, *reads, *([result] if result is not None else [])], outs):
        raise Refused("it cannot be told that the input is [batch, time, features]")


def _is_as_wide(first: Module, projection: Node) -> bool:
    """Whether a router of the width that the first layer takes fits the input of a projection."""
    if projection.module is first:
        return True
    own, other = (m.args.get("in_features") if m is not None else None for m in (first, projection.module))
    return own is not None and other is not None and same_size(own, other)


def used_by(model: ModelMap, run: Frame) -> list[Node]:
    """Every use of a plain linear layer of the module in one run of it."""
    by_module = model.derived(_by_module)
    return [
        node
        for _, linear in linears_in(_receiver(run))
        for node in by_module.get(id(linear), ())
        if any(f is run for f in node.frame.outward())
    ]


def _by_module(model: ModelMap) -> dict[int, list[Node]]:
    found: dict[int, list[Node]] = {}
    for node in model.graph.machine.nodes:
        if node.module is not None:
            found.setdefault(id(node.module), []).append(node)
    return found


def _receiver(run: Frame) -> Module:
    assert isinstance(run.receiver, Module)
    return run.receiver


def _projections(context: Attention) -> list[Node]:
    return [*context.query_projections, *context.key_projections, *context.value_projections]


def _comes_in_place(value: Value, given: Sequence[Node]) -> bool:
    """Whether a datum is one of those given, normed or added to: every token is still where it was."""
    ends = {id(g) for g in given}
    way = ancestors(value, lambda n: id(n) in ends or n.op not in _IN_PLACE)
    reached = [n for n in way.values() if id(n) in ends]
    return bool(reached) and all(id(n) in ends or n.op in _IN_PLACE or not _has_input(n, ends) for n in way.values())


def _has_input(node: Node, ends: set[int]) -> bool:
    return any(i in ends for i in ancestors(node))


def _is_of_three_axes(
    model: ModelMap, contexts: Sequence[Attention], ends: Sequence[Value], outs: Sequence[Node]
) -> bool:
    """Whether ranks or the numbers of axes that are exchanged say so, and nothing says otherwise."""
    sums = [r for r in model.residuals.all if any(id(n) in r.between for n in outs)]
    values = [*ends, *outs, *(v for r in sums for v in (r.stream, r.sum))]
    known = {rank(v) for v in values} - {None}
    return known == {3} or (not known and all(_is_exchanged(c) for c in contexts))


def _is_exchanged(context: Attention) -> bool:
    """Whether heads and time change places by axes that are counted from the front."""
    ends = {id(p) for p in context.query_projections}
    way = ancestors(context.query, lambda n: id(n) in ends).values()
    return any(
        n.op in ("transpose", "permute") and all(isinstance(a, Const) and _is_front(a.value) for a in n.args[1:])
        for n in way
        if id(n) not in ends
    )


def _is_front(axis: object) -> bool:
    return isinstance(axis, int) and axis >= 0


def _query_letter(context: Attention) -> int | None:
    """Where the query's time is in the result of the second einsum, counted from the end."""
    first, second = context.scores, context.output
    time = context.query_operand.time_axis
    if first.op != "einsum" or second.op != "einsum" or time is None:
        return -2 if second.op != "einsum" else None
    scores = context.equation.partition("->")[2]
    place = scores.find(context.query_operand.letters[time])
    equation = str(second.args[0].value).replace(" ", "") if isinstance(second.args[0], Const) else ""
    parts, _, result = equation.partition("->")
    weights = [part for part in parts.split(",") if len(part) == len(scores)]
    if place < 0 or "." in equation + scores or not weights:
        return None
    operand = context.value_operand.letters
    (own, *_) = [part for part in weights if part != operand] or weights
    found = result.find(own[place])
    return found - len(result) if found >= 0 and len(result) == len(context.query_operand.letters) else None


# -- who else knows of them


def _check_reads(model: ModelMap, holder: Holder) -> None:
    """Whether all that is done with the attention can be done with a Prismatic module."""
    machine = model.graph.machine
    modules = {id(m) for m in machine.modules if maker(model, m)[0] is holder.call}
    for module in machine.modules:
        if id(module) not in modules:
            continue
        for node, frame in machine.reads.get(id(module), ()):
            if frame.receiver is not module:
                _check_read(model, node, frame)
    names = {m.name for m in holder.modules if m.name.isidentifier()}
    for source in model.project.files():
        if is_vendored(source):
            continue
        for name in names:
            for attribute in mentions(source.tree).attributes[name]:
                if attribute not in machine.at and isinstance(attribute.ctx, ast.Load):
                    _check_unread(source.location(attribute), parents(source.tree)[attribute], attribute)
            for text, constants in mentions(source.tree).strings.items():
                if f".{name}." in text or text.startswith(f"{name}."):
                    where = source.location(constants[0])
                    raise Refused(f"weights of it are called by their names at {where.path.name}:{where.line}")


def _check_layers(model: ModelMap, holder: Holder) -> None:
    """Whether the linear layers are plain ones to the end: nothing re-parametrises or replaces one."""
    for module in holder.modules:
        for _, linear in linears_in(module):
            for node, frame in model.graph.machine.reads.get(id(linear), ()):
                source = frame.scope.source
                above = parents(source.tree).get(node)
                if not isinstance(above, ast.Call) or above.func is node:
                    continue
                callee = [v for f, v in model.graph.machine.at.get(above.func, ()) if f is frame]
                if not all(_takes_modules(v) and not _is_utility(v) for v in callee):
                    raise Refused(f"a linear layer of it is handed to {ast.unparse(above.func)}, which may change it")


def _is_utility(value: Value) -> bool:
    return isinstance(value, External) and value.dotted.startswith("torch.nn.utils.")


def _check_read(model: ModelMap, node: ast.AST, frame: Frame) -> None:
    source = frame.scope.source
    above = parents(source.tree).get(node)
    if isinstance(above, ast.keyword):
        above = parents(source.tree).get(above)
    if isinstance(above, ast.Attribute):
        _check_unread(source.location(node), above, node)
    elif isinstance(above, ast.Call) and above.func is not node:
        callee = [v for f, v in model.graph.machine.at.get(above.func, ()) if f is frame]
        if not all(_takes_modules(v) for v in callee):
            where = source.location(node)
            raise Refused(f"it is handed to {ast.unparse(above.func)} at {where.path.name}:{where.line}, which may look"
                          " for what it is")  # fmt: skip


def _check_unread(where: Location, above: ast.AST, node: ast.AST) -> None:
    place = f"{where.path.name}:{where.line}"
    if isinstance(above, ast.Attribute) and not isinstance(above.ctx, ast.Load):
        raise Refused(f"an attribute of it is set from outside at {place}, which would not reach the experts")
    if isinstance(above, ast.Attribute) and above.attr == "__class__":
        raise Refused(f"its class is asked for at {place}")
    if isinstance(above, ast.Call) and above.func is not node and _called(above) in ("isinstance", "type", "setattr"):
        raise Refused(f"{_called(above)} looks at it at {place}")


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _takes_modules(value: Value) -> bool:
    """Whether a call with a module among its arguments only keeps, copies or calls it."""
    if isinstance(value, Class | Function) or (isinstance(value, Module) and value.cls is not None):
        return True
    if isinstance(value, Method):
        name = value.function.dotted.rpartition(".")[2] if isinstance(value.function, External) else ""
        return isinstance(value.function, Function) or name in _KEEPERS
    if isinstance(value, External):
        return value.dotted.startswith(("torch.nn.", "copy.")) or value.dotted in (
            "builtins.list", "builtins.tuple", "builtins.enumerate", "builtins.zip",
            "modernizer.components.Prismatic", "collections.OrderedDict",
        )  # fmt: skip
    return False


__all__ = ["Holder", "check", "children_of", "holders", "is_below", "linears_in", "maker", "used_by"]
