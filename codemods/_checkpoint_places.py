"""Where the layers of a stack are called one after the other, and whether they are run again for gradients already."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._checkpoint_region import NEW_TENSOR, Region, Runs, hands_code_in, is_in_place, modules_only, roots
from codemods._survey import Cannot
from modernizer.graph.query import location
from modernizer.graph.values import External, Frame, Module, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.residual import PROJECTIONS, Residual
from modernizer.model_map.stack import PLAIN, SEQUENTIAL, Stack
from modernizer.source import Location, SourceFile
from modernizer.syntax import below, mentions, outward, statement_of

TAKEN = frozenset("use_reentrant preserve_rng_state determinism_check debug context_fn early_stop function".split())
SIMPLE = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Return
HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_backward_hook")
SCRIPTING = ("script", "script_method", "ScriptModule")
HARMLESS_CONTEXTS = frozenset("no_grad enable_grad set_grad_enabled inference_mode autocast record_function".split())
# What speaks of checkpoints on disk.
ON_DISK = ("save", "load", "path", "dir", "file", "name", "resume", "restore", "latest", "best", "every", "epoch")


@dataclass(eq=False)
class Place:
    """The calls of layers in one loop, or one call of a Sequential, in all activations that reach them.

    `guards`: the variables that must be None, as the layers change what they hold.
    """

    kind: str
    node: ast.AST  # the loop, or the call of the Sequential
    frames: list[Frame]
    calls: list[ast.Call] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    residuals: list[Residual] = field(default_factory=list)
    sequentials: list[Value] = field(default_factory=list)  # what is called, where that is a Sequential

    @property
    def frame(self) -> Frame:
        return self.frames[0]

    @property
    def source(self) -> SourceFile:
        return self.frame.scope.source

    @property
    def location(self) -> Location:
        return location(self.node, self.frame)


def find_places(model: ModelMap) -> list[Place]:
    """The stacks of layers that attend, by the loop or call that runs them; a call belongs to the innermost."""
    stacks: defaultdict[ast.AST, list[Stack]] = defaultdict(list)
    for stack in model.stacks.all:
        if stack.attends and stack.kind != PLAIN and stack.node is not None:
            stacks[stack.node].append(stack)
    found: list[Place] = []
    claimed: set[ast.AST] = set()
    for node, same in stacks.items():
        place = Place(same[0].kind, node, list({id(s.frame): s.frame for s in same}.values()))
        wanted = {call for stack in same for r in stack.residuals for call in _calls(model, stack, r)}
        wanted |= set(_more_calls(model, place, wanted, any(r.frame is s.frame for s in same for r in s.residuals)))
        place.calls = sorted(wanted - claimed, key=lambda c: (c.lineno, c.col_offset))
        claimed |= wanted
        if isinstance(node, ast.Call):
            place.sequentials = [v for f, v in model.graph.machine.at.get(node.func, ()) if f in place.frames]
        place.residuals = [r for stack in same for r in stack.residuals]
        if place.calls or not wanted:
            found.append(place)
    return found


def _calls(model: ModelMap, stack: Stack, r: Residual) -> Iterator[ast.Call]:
    """The calls of the stack's own function below which a sum, or what it adds, is computed."""
    if r.layer is not None and r.frame is stack.frame:
        if isinstance(r.sum.node, ast.Call):
            yield r.sum.node
        return
    if stack.kind == SEQUENTIAL:
        assert isinstance(stack.node, ast.Call)
        yield stack.node
        return
    around = _call_below(r.frame, stack.frame)
    if around is not None:
        yield around
        return
    heavy = [n for n in r.between.values() if n.op in PROJECTIONS]
    for node in heavy:
        call = _call_below(node.frame, stack.frame)
        if call is None and node.frame is stack.frame and node.module is not None and node.op != "linear":
            call = node.node if isinstance(node.node, ast.Call) else None
        if call is not None and call in below(stack.node or call):
            yield call


def _more_calls(model: ModelMap, place: Place, known: set[ast.Call], is_written_out: bool) -> Iterator[ast.Call]:
    """Further calls in the same loop: of the same layers, and of all sublayers where the loop itself is the layer."""
    if not isinstance(place.node, ast.For | ast.While):
        return
    at, runs = model.graph.machine.at, model.derived(Runs.of)
    layers = {id(v) for call in known for f, v in at.get(call.func, ()) if f in place.frames}
    for call in below(place.node):
        if not isinstance(call, ast.Call) or call in known:
            continue
        values = [v for f, v in at.get(call.func, ()) if f in place.frames]
        if not is_written_out:
            if any(id(v) in layers for v in values):
                yield call
        elif modules_only(values):
            found = [n for f in place.frames for n in runs.below(call, f) if n.op in PROJECTIONS]
            if len(found) > 1 or any(n.op != "linear" for n in found):
                yield call


def _call_below(frame: Frame, outer: Frame) -> ast.Call | None:
    """The call in an activation under which another one lies."""
    found = next((f for f in frame.outward() if f.caller is outer), None)
    return found.call if found is not None and isinstance(found.call, ast.Call) else None


def check_place(model: ModelMap, place: Place) -> None:
    """Sets what must be None. Raises Cannot where the layers cannot be run again, or not be told to."""
    if place.source.path not in model.project.named:
        raise Cannot("it is in a file that was not named")
    _check_program(model)
    if not place.calls:
        raise Cannot("the layers of this loop are no modules that could be run again",
                     hint="make a class of the layer, and call it in the loop")  # fmt: skip
    function = place.frame.function
    if function is None or not isinstance(function.node, ast.FunctionDef) or function.owner is None:
        raise Cannot("the layers are not called in a method of a module")
    if any(not isinstance(f.receiver, Module) for f in place.frames):
        raise Cannot("the layers are not called in a method of a module")
    inner = [c for c in place.calls for other in place.calls if c is not other and c in below(other)]
    if inner:
        raise Cannot("a layer is called inside of the call of another", place.source.location(inner[0]))
    if place.kind == SEQUENTIAL and len(set(_children(place))) < 2:
        raise Cannot("the layers are in a Sequential that lies in another", hint="give them an attribute of their own")
    guards: dict[str, None] = {}
    for call in place.calls:
        _check_call(model, place, call)
        region = Region(model, call, place.frames)
        own = region.guards()
        guards.update(dict.fromkeys(own))
        _check_arguments(model, place, region, own)
    place.guards = list(guards)


def _children(place: Place) -> Iterator[int]:
    """The elements of a Sequential in which the sums are, by id."""
    for r in place.residuals:
        top = next((f for f in r.frame.outward() if f.call is place.node), None)
        module = top.receiver if top is not None else r.layer
        while isinstance(module, Module) and isinstance(module.owner, Module) and not _is_run(module.owner, place):
            module = module.owner
        yield id(module)


def _is_run(module: Module, place: Place) -> bool:
    """Whether a module is the Sequential that is called."""
    return module in place.sequentials


def _check_call(model: ModelMap, place: Place, call: ast.Call) -> None:
    source, machine = place.source, model.graph.machine
    where = source.location(call)
    statement = statement_of(source.tree, call)
    if not isinstance(statement, SIMPLE) or any(
        isinstance(n, ast.Lambda | ast.comprehension | ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp)
        for n in _between(source, call, statement)
    ):
        raise Cannot("a layer is called inside of an expression that cannot be told apart", where)
    values = [v for f, v in machine.at.get(call.func, ()) if any(f is g for g in place.frames)]
    if not modules_only(values):
        raise Cannot("what is called here is not always a module", where)
    if any(k.arg in TAKEN for k in call.keywords):
        raise Cannot("a layer takes an argument that torch's checkpoint takes for itself", where)
    if hands_code_in(machine, call, place.frames):
        raise Cannot("a layer is handed a function, which may do something else by the time it runs again", where)
    for context in _contexts(source, call):
        name = context.func if isinstance(context, ast.Call) else context
        last = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")
        if last not in HARMLESS_CONTEXTS:
            raise Cannot(f"layers run under `with {ast.unparse(context)}`, and would run again without it", where)


def _between(source: SourceFile, node: ast.AST, statement: ast.stmt) -> Iterator[ast.AST]:
    for outer in outward(source.tree, node):
        if outer is statement:
            return
        if outer is not node:
            yield outer


def _contexts(source: SourceFile, call: ast.Call) -> Iterator[ast.expr]:
    """What `with` statements of the same function stand around a call."""
    for outer in outward(source.tree, call):
        if isinstance(outer, ast.FunctionDef | ast.Lambda):
            return
        if isinstance(outer, ast.With):
            yield from (item.context_expr for item in outer.items)


def _check_arguments(model: ModelMap, place: Place, region: Region, guards: Sequence[str]) -> None:
    """What layers were given must still be the same when they run again; `guards` are None by then."""
    runs = model.derived(Runs.of)
    inside = {id(n) for n in region.nodes}
    given: set[int] = set()
    call = region.call
    for argument in [*call.args, *(k.value for k in call.keywords)]:
        if isinstance(argument, ast.Name) and argument.id in guards:
            continue
        for frame, value in model.graph.machine.at.get(argument, ()):
            if frame in place.frames:
                given |= {id(r) for r in roots(value)}
    first = min((n.order for n in region.nodes), default=0)
    for frame in place.frames:
        for node in runs.data.get(id(frame), ()):
            later = id(node) not in inside and node.order > first and is_in_place(node)
            if later and any(id(r) in given for r in roots(node.args[0])):
                at = location(node.node or call, frame)
                raise Cannot("what a layer was given is changed in place afterwards", at, NEW_TENSOR)


def _check_program(model: ModelMap) -> None:
    """Raises Cannot where other parts of the program see how often a layer runs, or compile it from its source."""
    for source in model.project.files():
        found = mentions(source.tree).attributes
        for attribute in (a for name in HOOKS for a in found.get(name, ())):
            raise Cannot("the program hooks into modules, and its hooks would run twice", source.location(attribute))
        for attribute in (a for name in SCRIPTING for a in found.get(name, ())):
            if ast.unparse(attribute.value).endswith("jit"):
                raise Cannot("the program is compiled by TorchScript", source.location(attribute))


# -- what is there already


def is_checkpointed(place: Place) -> bool:
    """Whether the program runs these layers again already, or lets another library do it."""
    for frame in place.frames:
        for active in frame.outward():
            if isinstance(active.call, ast.Call) and _speaks(active.call.func):
                return True
        owner = frame.function.owner if frame.function is not None else None
        if frame.function is not None and any(map(_speaks, below(frame.function.node))):
            return True
        if owner is not None and any(map(_speaks, below(owner.node))):
            return True
        for cls in (m.cls for m in _layers(frame) if m.cls is not None):
            if any(isinstance(c, External) and "Checkpoint" in c.dotted for c in cls.mro):
                return True
            if any(map(_speaks, below(cls.node))):
                return True
    return False


def _layers(frame: Frame) -> Iterator[Module]:
    """The modules that the instance which runs the layers holds in its lists."""
    receiver = frame.receiver
    for value in receiver.attributes.values() if isinstance(receiver, Module) else ():
        children = value.children if isinstance(value, Module) else None
        yield from (c for c in (children.items if children is not None else ()) if isinstance(c, Module))


def _speaks(node: ast.AST) -> bool:
    """Whether code names activation checkpointing."""
    word = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    word = word.lower()
    return "checkpoint" in word and not any(part in word for part in ON_DISK)


# -- torch's own stacks


def torch_stacks(model: ModelMap) -> Iterator[tuple[Location, str]]:
    """The calls of torch's own stacks of layers, which run them out of reach."""
    for node in model.graph.machine.nodes:
        if node.op in ("torch_encoder", "torch_decoder", "torch_transformer") and node.node is not None:
            module = node.module
            if module is not None and node.frame.path in model.project.named:
                yield location(node.node, node.frame), module.torch_name.rpartition(".")[2]
