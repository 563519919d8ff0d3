"""Where execution starts: the models that nobody constructs, the factories that construct one, and their methods."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from modernizer.graph import calls, expressions, statements  # noqa: F401 - they register their handlers
from modernizer.graph.activations import Activations
from modernizer.graph.machine import MAX_STEPS, MAX_STEPS_TO_BUILD, Dead, Machine, OutOfSteps
from modernizer.graph.scope import Scope
from modernizer.graph.values import Class, External, Frame, Function, Many, Module, Node, Object, Partial, Value
from modernizer.project import Project
from modernizer.syntax import walk


@dataclass(eq=False)
class Run:
    """One entry point executed: a method of a model, with everything left open that its caller would decide."""

    module: Module
    entry: str
    frame: Frame | None
    first: int  # the orders of the nodes it made
    last: int
    complete: bool = True


@dataclass(eq=False)
class Graph:
    """Everything that was seen. `roots` are the models that runs start from."""

    machine: Machine
    roots: list[Module] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def project(self) -> Project:
        return self.machine.project

    @cached_property
    def activations(self) -> Activations:
        """What happened within what; to be asked for once everything has run."""
        return Activations(self.machine)


def execute(project: Project) -> Graph:
    """Executes every model of the named files symbolically."""
    machine = Machine(project)
    graph = Graph(machine)
    scopes = [s for path in project.named if (s := machine.scopes.get(path)) is not None]
    classes = [c for scope in scopes for c in scope.classes() if is_module_class(c)]
    built = _build_factories(graph, scopes, classes)
    made = {cls.node: module for cls in classes if (module := _construct(graph, cls)) is not None}
    inner = _constructed_by_others(graph, set(made.values()))
    ran = _Ran(machine)
    for module in built:
        _run_methods(graph, module)
    for cls in classes:
        if cls.node in made and cls.node not in inner and cls not in ran:
            _run_methods(graph, made[cls.node])
    for cls in classes:
        if cls.node in made and cls not in ran and not _subclassed(cls, classes):
            _run_methods(graph, made[cls.node])
    return graph


OTHER_FRAMEWORKS = frozenset(
    "paddle tensorflow keras mxnet gluon flax jax haiku mindspore chainer oneflow tinygrad".split()
)


def is_module_class(cls: Class) -> bool:
    """Whether instances of a class are modules: it inherits torch's, or has a `forward` and a base from outside."""
    if cls.torch_base():
        return cls.torch_base().startswith("torch.nn.")
    outside = any(isinstance(c, External) for c in cls.mro)
    if any(isinstance(c, External) and c.dotted.split(".")[0] in OTHER_FRAMEWORKS for c in cls.mro):
        return False
    return outside and any(isinstance(c, Class) and "forward" in c.members for c in cls.mro)


def _subclassed(cls: Class, classes: list[Class]) -> bool:
    return any(c is not cls and any(isinstance(b, Class) and b.node is cls.node for b in c.mro) for c in classes)


class _Ran:
    """The classes on an instance of which a method other than the constructor was executed; grows as execution does."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: set[ast.ClassDef] = set()
        self._count = 0  # of the activations that were looked at

    def __contains__(self, cls: Class) -> bool:
        for frame in self._machine.frames[self._count :]:
            owner = frame.receiver.cls if isinstance(frame.receiver, Module) else None
            if owner is None or owner.node in self._known or frame.function is None:
                continue
            if frame.function.name != "__init__" and not _in_constructor(frame):
                self._known.add(owner.node)
        self._count = len(self._machine.frames)
        return cls.node in self._known


def _in_constructor(frame: Frame) -> bool:
    return any(f.function is not None and f.function.name == "__init__" for f in frame.outward())


def _constructed_by_others(graph: Graph, alone: set[Module]) -> set[ast.ClassDef]:
    """The classes of which another class or a factory of the project makes instances."""
    return {m.cls.node for m in graph.machine.modules if m.cls is not None and (m not in alone or m.owner is not None)}


def _construct(graph: Graph, cls: Class) -> Module | None:
    made = construct(graph, cls, {})
    return made if isinstance(made, Module) else None


def construct(graph: Graph, cls: Class, given: Mapping[str, Value], max_steps: int = MAX_STEPS) -> Object | None:
    """An instance of a class; constructor arguments that are not given are open. None where it cannot be followed."""
    machine = graph.machine
    machine.start_run(min(max_steps, MAX_STEPS_TO_BUILD))
    frame = Frame(cls.scope, run=machine.run)
    args = {**_open_arguments(machine, frame, cls, "__init__", "config"), **given}
    try:
        made = calls.instantiate(machine, frame, cls.node, cls, [], args)
    except Dead:
        return None
    except (OutOfSteps, RecursionError):
        graph.problems.append(f"{cls.scope.path}: {cls.name}: its constructor is too large to follow")
        return None
    return made if isinstance(made, Object) else None


def _open_arguments(machine: Machine, frame: Frame, cls: Class, method: str, op: str) -> dict[str, Value]:
    owner = next((c for c in cls.mro if isinstance(c, Class) and method in c.members), None)
    member = owner.members[method] if owner else None
    if owner is None or not isinstance(member, ast.FunctionDef):
        return {}
    return open_arguments(machine, frame, member, owner.scope, op)


def open_arguments(machine: Machine, frame: Frame, node: ast.FunctionDef, scope: Scope, op: str) -> dict[str, Value]:
    """A value for each parameter of which nothing is known, but for those whose default is a class or function:
    whoever calls without one gets that, and nothing else in the code says what to call."""
    spec = node.args
    positional = [*spec.posonlyargs, *spec.args]
    is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    defaults = dict(
        zip([a.arg for a in positional[len(positional) - len(spec.defaults) :]], spec.defaults, strict=True)
    )
    defaults.update({a.arg: d for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None})
    values: dict[str, Value] = {}
    for parameter in [*(positional if is_static or op == "argument" else positional[1:]), *spec.kwonlyargs]:
        if parameter.arg in defaults:
            default = machine.evaluate(scope.frame, defaults[parameter.arg])
            if isinstance(default, External | Class | Function | Module | Partial):
                values[parameter.arg] = default
                continue
        values[parameter.arg] = machine.node(
            "input" if op == "argument" else op, (), parameter, frame, name=parameter.arg
        )
    return values


def _run_methods(graph: Graph, module: Module) -> None:
    """Runs `forward`, then each public method that none of the earlier runs reached."""
    graph.roots.append(module)
    if module.cls is None:
        return
    names: dict[str, Class] = {}
    named = set(graph.project.named)
    for base in module.cls.mro:
        if isinstance(base, Class) and (base.path in named or "forward" in base.members):
            for name, member in base.members.items():
                if isinstance(member, ast.FunctionDef) and (name == "forward" or base.path in named):
                    names.setdefault(name, base)
    order = sorted(names, key=lambda n: (n != "forward", names[n].members[n].lineno))
    reached: set[ast.AST] = set()
    for name in order:
        member = names[name].members[name]
        assert isinstance(member, ast.FunctionDef)
        if name != "forward" and (name.startswith("__") or member in reached or _bound_to_class(member)):
            continue
        start = len(graph.machine.frames)
        _run_method(graph, module, names[name], name)
        reached |= {f.function.node for f in graph.machine.frames[start:] if f.function and f.receiver is module}


def _bound_to_class(member: ast.FunctionDef) -> bool:
    return any(
        (d.id if isinstance(d, ast.Name) else getattr(d, "attr", "")) in ("staticmethod", "classmethod", "property")
        for d in member.decorator_list
    )


def _run_method(graph: Graph, module: Module, owner: Class, name: str) -> None:
    machine = graph.machine
    member = owner.members[name]
    assert isinstance(member, ast.FunctionDef)
    done = run_function(graph, Function(member, owner.scope, owner.closure, owner), module, {})
    graph.runs.append(Run(module, name, done.frame, done.first, len(machine.nodes), done.complete))


@dataclass(frozen=True)
class Activation:
    """A function executed from nowhere: its frame, the order of the first datum it made, and whether it was followed
    to its end."""

    frame: Frame | None
    first: int
    complete: bool


def run_function(
    graph: Graph,
    function: Function,
    receiver: Value | None,
    given: Mapping[str, Value],
    is_factory: bool = False,
    max_steps: int = MAX_STEPS,
) -> Activation:
    """Executes a function or method; arguments that are not given are open."""
    machine = graph.machine
    machine.start_run(min(max_steps, MAX_STEPS_TO_BUILD) if is_factory else max_steps)
    node = function.node
    assert isinstance(node, ast.FunctionDef)
    outer = Frame(function.scope, run=machine.run, calls_factory=is_factory)
    op = "input" if receiver is not None else "argument"
    args = {**open_arguments(machine, outer, node, function.scope, op), **given}
    first, frames, complete = len(machine.nodes), len(machine.frames), True
    try:
        calls.enter(machine, outer, node, function, [] if receiver is None else [receiver], args, receiver)
    except Dead:
        pass
    except (OutOfSteps, RecursionError):
        complete = False
        owner = f"{function.owner.name}." if function.owner is not None else ""
        graph.problems.append(f"{function.scope.path}: {owner}{function.name} is too large to follow")
    return Activation(machine.frames[frames] if len(machine.frames) > frames else None, first, complete)


# -- factories


def _build_factories(graph: Graph, scopes: list[Scope], classes: list[Class]) -> list[Module]:
    """Runs the functions that put a model together from parts, and gives the models they return."""
    names = {c.name for c in classes}
    built: list[Module] = []
    for scope in scopes:
        for function in scope.functions():
            if _constructs(function, names):
                built.extend(_run_factory(graph, function))
    return [module for module in built if module.owner is None and _has_parts(module)]


def _constructs(function: Function, names: set[str]) -> bool:
    """Whether a function puts objects of several project classes together and returns one: a factory."""
    found = [n for n in walk(function.node) if isinstance(n, ast.Call) and _called(n) in names]
    several = len({_called(c) for c in found}) > 1 or any(
        inner is not outer and inner in walk(outer) for outer in found for inner in found
    )
    return several and _returns_one(function.node, names)


def _returns_one(node: ast.AST, names: set[str]) -> bool:
    """Whether a function returns an instance of one of the classes: made in the return, or held by a variable."""
    holders = {
        target.id
        for statement in walk(node)
        if isinstance(statement, ast.Assign) and _makes(statement.value, names)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    return any(
        isinstance(n, ast.Return)
        and n.value is not None
        and (_makes(n.value, names) or (isinstance(n.value, ast.Name) and n.value.id in holders))
        for n in walk(node)
    )


def _makes(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression is a constructor call, perhaps with `.to(device)` or the like behind it."""
    while isinstance(node, ast.Call):
        if _called(node) in names:
            return True
        node = node.func.value if isinstance(node.func, ast.Attribute) else node.func
    return False


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _run_factory(graph: Graph, function: Function) -> list[Module]:
    done = run_function(graph, function, None, {}, is_factory=True)
    if done.frame is None or done.frame.result is None or not done.complete:
        return []
    return [v for v in _leaves(done.frame.result) if isinstance(v, Module)]


def _leaves(value: Value) -> list[Value]:
    if isinstance(value, Many):
        return [leaf for item in value.items for leaf in _leaves(item)]
    if isinstance(value, Node) and value.op == "merge":
        return [leaf for item in value.args for leaf in _leaves(item)]
    return [value]


def _has_parts(module: Module) -> bool:
    """Whether a model was handed modules from outside: such a class says nothing when it is run on its own."""
    frame_of = module.frame
    return any(
        isinstance(child, Module) and child.frame is frame_of and child.call is not module.call
        for child in module.attributes.values()
    )
