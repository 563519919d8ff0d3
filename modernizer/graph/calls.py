"""Calls: functions and methods are entered, classes instantiated, torch's modules and functions become nodes."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from modernizer.graph import builtin_calls, containers, torch_layers
from modernizer.graph.inplace import rebind
from modernizer.graph.machine import MAX_DEPTH, Dead, Machine
from modernizer.graph.torch_api import (
    CALLS,
    MODULE_OPS,
    RANDOM_WEIGHT_FILLERS,
    SIGNATURES,
    function_operation,
    operation,
)
from modernizer.graph.values import (
    Class,
    Const,
    External,
    Frame,
    Function,
    Many,
    Method,
    Module,
    Node,
    Object,
    Partial,
    Table,
    Value,
)

CONTAINERS = {"torch.nn.Sequential", "torch.nn.ModuleList", "torch.nn.ModuleDict", "torch.nn.ParameterList"}
WRAPPERS = {"torch.nn.DataParallel", "torch.nn.parallel.DistributedDataParallel", "torch.compile", "torch.jit.script"}
PRISMATIC = "modernizer.components.Prismatic"  # runs the module that it was given
COMPUTED_ONCE = "modernizer.components.ComputedOnce"  # calls the layer that a call hands it
RECURSION = 2  # how often one function may be active at the same time


@dataclass(eq=False)
class Super(Value):
    """`super()` in a method of `cls`."""

    receiver: Value
    cls: Class


def spread(m: Machine, frame: Frame, parts: Sequence[ast.expr]) -> tuple[list[Value], bool]:
    """The values of positional parts, stars opened; and whether a star's length was not known."""
    values: list[Value] = []
    is_open = False
    for part in parts:
        value = m.evaluate(frame, part)
        if not isinstance(part, ast.Starred):
            values.append(value)
        elif isinstance(value, Node) and value.op == "shape":
            values.append(m.node("star", (value,), part, frame))
        elif isinstance(value, Node) and value.op != "merge":
            values.append(m.node("star", (value,), part, frame))
            is_open = True
        else:
            values.extend(containers.items_of(m, frame, value, part))
            is_open = is_open or (isinstance(value, Many) and value.open)
    return values, is_open


def call(m: Machine, frame: Frame, node: ast.expr) -> Value:
    """A call expression."""
    assert isinstance(node, ast.Call)
    if isinstance(node.func, ast.Name) and node.func.id == "super":
        return _super(m, frame, node)
    callee = m.evaluate(frame, node.func)
    args, _ = spread(m, frame, node.args)
    kwargs: dict[str, Value] = {}
    for keyword in node.keywords:
        value = m.evaluate(frame, keyword.value)
        if keyword.arg is not None:
            kwargs[keyword.arg] = value
        elif isinstance(value, Table):
            kwargs.update({str(k): v for k, v in value.entries.items()})
            if value.open:
                kwargs["**"] = value
        else:
            kwargs["**"] = value
    return invoke(m, frame, node, callee, args, kwargs)


Machine.expressions[ast.Call] = call


def invoke(
    m: Machine, frame: Frame, node: ast.AST, callee: Value, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """The result of calling a value."""
    if isinstance(callee, Partial):
        return invoke(m, frame, node, callee.function, [*callee.args, *args], {**callee.kwargs, **kwargs})
    if isinstance(callee, Function):
        unbound = callee.owner is not None and bool(args) and isinstance(args[0], Object)  # Base.method(self)
        return enter(m, frame, node, callee, args, kwargs, args[0] if unbound else None)
    if isinstance(callee, Method):
        return _method(m, frame, node, callee, args, kwargs)
    if isinstance(callee, Class):
        return instantiate(m, frame, node, callee, args, kwargs)
    if isinstance(callee, Module):
        return call_module(m, frame, node, callee, args, kwargs)
    if isinstance(callee, Object):
        return _call_object(m, frame, node, callee, args, kwargs)
    if isinstance(callee, External):
        return _external(m, frame, node, callee.dotted, args, kwargs)
    if isinstance(callee, Node) and callee.op == "merge":
        return _alternatives(m, frame, node, callee, args, kwargs)
    if isinstance(callee, Node) and callee.op == "attr" and callee.args:
        return _datum_method(m, frame, node, callee.args[0], callee.name, args, kwargs)
    if isinstance(callee, Node) and callee.op in ("data", "t", "mT"):
        return m.node("opaque", (callee, *args), node, frame, kwargs)
    return m.node("opaque", (callee, *args), node, frame, kwargs, name=getattr(callee, "name", ""))


def _alternatives(
    m: Machine, frame: Frame, node: ast.AST, callee: Node, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """Calls every alternative whose code is at hand; None and unknown ones are what the others stand in for."""
    known = [o for o in callee.args if not isinstance(o, Const | Node)] or list(callee.args)
    if len(known) == 1:
        return invoke(m, frame, node, known[0], args, kwargs)
    results: list[Value] = []

    def take(option: Value) -> None:
        results.append(invoke(m, frame, node, option, list(args), dict(kwargs)))

    outcomes = [m.branch(frame, lambda o=option: take(o)) for option in known]  # type: ignore[misc]
    m.join(frame, outcomes, node)
    return m.merge(results, node, frame)


# -- functions


def enter(
    m: Machine,
    frame: Frame,
    node: ast.AST,
    function: Function,
    args: Sequence[Value],
    kwargs: dict[str, Value],
    receiver: Value | None,
) -> Value:
    """Executes a function of the project and gives what it returns."""
    active = sum(1 for f in frame.outward() if f.function and f.function.node is function.node)
    if frame.depth >= MAX_DEPTH or active > RECURSION:
        return m.node("opaque", tuple(args), node, frame, kwargs, name=function.name)
    made = Frame(function.scope, function, receiver, frame, node, depth=frame.depth + 1, run=m.run, order=len(m.frames))
    m.frames.append(made)
    _bind_arguments(m, made, function, list(args), dict(kwargs))
    body = function.node.body
    if isinstance(body, list):
        _run_body(m, made, body)
    else:
        made.result = m.evaluate(made, body)
    assert made.result is not None
    m.results[id(made.result)].append(made)
    return made.result


def _run_body(m: Machine, made: Frame, body: list[ast.stmt]) -> None:
    try:
        m.execute(made, body)
        fell_through = True
    except Dead:
        fell_through = False
    if made.yields:
        made.result = Many(list(made.yields), "list", True)
        return
    values = [value for _, value in made.returns]
    if fell_through and values:
        values.append(Const(None))
    made.result = m.merge(values, made.call, made) if values else Const(None)


def _bind_arguments(m: Machine, made: Frame, function: Function, args: list[Value], kwargs: dict[str, Value]) -> None:
    spec = function.node.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = dict(
        zip([a.arg for a in positional[len(positional) - len(spec.defaults) :]], spec.defaults, strict=True)
    )
    defaults.update({a.arg: d for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None})
    rest = kwargs.pop("**", None)
    for parameter in positional:
        if args:
            made.arguments[parameter.arg] = args.pop(0)
        elif parameter.arg in kwargs:
            made.arguments[parameter.arg] = kwargs.pop(parameter.arg)
    for parameter in spec.kwonlyargs:
        if parameter.arg in kwargs:
            made.arguments[parameter.arg] = kwargs.pop(parameter.arg)
    for parameter in (*positional, *spec.kwonlyargs):
        if parameter.arg not in made.arguments:
            made.arguments[parameter.arg] = _default(m, made, function, parameter, defaults, rest)
    if spec.vararg:
        made.arguments[spec.vararg.arg] = Many(args, "tuple")
    if spec.kwarg:
        made.arguments[spec.kwarg.arg] = Table(dict(kwargs.items()), open=rest is not None)
    made.names.update(made.arguments)
    for parameter in (*positional, *spec.kwonlyargs):
        m.at[parameter].append((made, made.arguments[parameter.arg]))


def _default(
    m: Machine, made: Frame, function: Function, parameter: ast.arg, defaults: dict[str, ast.expr], rest: Value | None
) -> Value:
    if rest is not None:
        return m.node("unknown", (rest,), parameter, made, name=parameter.arg)
    if parameter.arg in defaults:
        return m.evaluate(function.closure or function.scope.frame, defaults[parameter.arg])
    return m.node("unknown", (), parameter, made, name=parameter.arg)


def _method(
    m: Machine, frame: Frame, node: ast.AST, callee: Method, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    if isinstance(callee.function, Function):
        return enter(m, frame, node, callee.function, [callee.receiver, *args], kwargs, callee.receiver)
    assert isinstance(callee.function, External)
    name = callee.function.dotted.rpartition(".")[2]
    if isinstance(callee.receiver, Module):
        return builtin_calls.module_method(m, frame, node, callee.receiver, name, args, kwargs)
    return builtin_calls.method(m, frame, node, callee.receiver, name, args, kwargs)


def _super(m: Machine, frame: Frame, node: ast.Call) -> Value:
    for arg in node.args:
        m.evaluate(frame, arg)
    active: Frame | None = frame
    while active is not None and active.owner is None:
        active = active.function.closure if active.function else None
    if active is None or active.owner is None or active.receiver is None:
        return m.node("unknown", (), node, frame)
    return Super(active.receiver, active.owner)


def super_member(m: Machine, frame: Frame, node: ast.AST, receiver: Super, attr: str) -> Value:
    """`super().attr`."""
    from modernizer.graph.expressions import class_member

    target = receiver.receiver
    own = target.cls if isinstance(target, Object) else target if isinstance(target, Class) else None
    order = list(own.mro) if own is not None else list(receiver.cls.mro)
    places = [i for i, c in enumerate(order) if isinstance(c, Class) and c.node is receiver.cls.node]
    for base in order[places[0] + 1 :] if places else []:
        if isinstance(base, Class) and attr in base.members:
            return class_member(m, frame, node, target, base, base.members[attr])
        if isinstance(base, External):
            return Method(target, External(f"{base.dotted}.{attr}"))
    return Method(target, External(f"builtins.object.{attr}"))


# -- classes


def instantiate(
    m: Machine, frame: Frame, node: ast.AST, cls: Class, args: Sequence[Value], kwargs: dict[str, Value]
) -> Value:
    """An instance of a class of the project, its `__init__` executed."""
    torch_base = cls.torch_base()
    is_module = bool(torch_base) or _has(cls, "forward")
    made: Object
    if is_module:
        made = Module(cls, {}, node, frame, torch_name=torch_base)
        m.modules.append(made)
    else:
        made = Object(cls, {}, node, frame)
    initialiser = next((c for c in cls.mro if isinstance(c, Class) and "__init__" in c.members), None)
    if initialiser is not None:
        member = initialiser.members["__init__"]
        if isinstance(member, ast.FunctionDef):
            function = Function(member, initialiser.scope, initialiser.closure, initialiser)
            enter(m, frame, node, function, [made, *args], kwargs, made)
    elif isinstance(made, Module) and torch_base not in ("", "torch.nn.Module"):
        init_torch(m, frame, made, torch_base, list(args), kwargs)
    else:
        _fill_fields(m, frame, made, cls, list(args), kwargs)
    return made


def _has(cls: Class, name: str) -> bool:
    return any(isinstance(c, Class) and name in c.members for c in cls.mro)


def _fill_fields(
    m: Machine, frame: Frame, made: Object, cls: Class, args: list[Value], kwargs: dict[str, Value]
) -> None:
    """A dataclass or NamedTuple takes its annotated fields in order."""
    fields = [
        (name, member)
        for base in reversed(cls.mro)
        if isinstance(base, Class)
        for name, member in base.members.items()
        if isinstance(member, ast.AnnAssign)
    ]
    for name, member in fields:
        if args:
            made.attributes[name] = args.pop(0)
        elif name in kwargs:
            made.attributes[name] = kwargs[name]
        elif member.value is not None:
            made.attributes[name] = m.evaluate(cls.scope.frame, member.value)


def make_torch(
    m: Machine, frame: Frame, node: ast.AST, dotted: str, args: list[Value], kwargs: dict[str, Value]
) -> Module:
    """An instance of one of torch's own module classes."""
    made = Module(None, {}, node, frame, torch_name=dotted)
    m.modules.append(made)
    init_torch(m, frame, made, dotted, args, kwargs)
    return made


def init_torch(
    m: Machine, frame: Frame, made: Module, dotted: str, args: list[Value], kwargs: dict[str, Value]
) -> None:
    """What the constructor of a torch module class does: children of containers, named arguments of the others."""
    made.torch_name = dotted
    short = dotted.rpartition(".")[2]
    if dotted in CONTAINERS:
        _fill_container(m, frame, made, short, args)
        return
    names = SIGNATURES.get(short, tuple(f"arg{i}" for i in range(len(args))))
    made.args = {**dict(zip(names, args, strict=False)), **kwargs}
    if dotted == PRISMATIC:
        m.set_attribute(made, "expert", made.args.get("expert", Const(None)))
    torch_layers.add_parts(m, frame, made, short)


def _fill_container(m: Machine, frame: Frame, made: Module, short: str, args: list[Value]) -> None:
    source: Value = args[0] if args else Many([])
    items: list[Value]
    names: dict[object, Value] = {}
    is_open = False
    if isinstance(source, Table):
        names, items, is_open = dict(source.entries), list(source.entries.values()), source.open
    elif short == "Sequential":
        items = list(args)
        is_open = any(isinstance(a, Node) for a in args)
    else:
        found = containers.as_many(m, frame, source, made.call or ast.Pass())
        items = list(found.items) if found else containers.items_of(m, frame, source, made.call or ast.Pass())
        is_open = found is None or found.open
    many = Many(items, short, is_open, made.call)
    m.set_attribute(made, "#items", many)
    if names or short == "ModuleDict":
        m.set_attribute(made, "#names", Table(names, is_open))
    for index, item in enumerate(items):
        adopt(made, item, str(next((k for k, v in names.items() if v is item), index)))


def adopt(owner: Module, item: Value, name: str) -> None:
    """Notes where a module sits, the first time it is put somewhere."""
    if isinstance(item, Module) and item.owner is None and item is not owner:
        item.owner, item.name = owner, name


# -- modules and data


def call_module(
    m: Machine, frame: Frame, node: ast.AST, module: Module, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """`module(...)`."""
    if module.cls is not None:
        owner = next((c for c in module.cls.mro if isinstance(c, Class) and "forward" in c.members), None)
        if owner is not None and isinstance(owner.members["forward"], ast.FunctionDef):
            function = Function(owner.members["forward"], owner.scope, owner.closure, owner)
            return enter(m, frame, node, function, [module, *args], kwargs, module)
    return call_torch(m, frame, node, module, args, kwargs)


def call_torch(
    m: Machine, frame: Frame, node: ast.AST, module: Module, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """The call of a torch module, or of a project class that only inherits torch's `forward`."""
    short = module.torch_name.rpartition(".")[2]
    if short == "Identity":
        return args[0] if args else m.node("opaque", args, node, frame, kwargs, module)
    if short == "Sequential" and module.children is not None:
        value = args[0] if args else next(iter(kwargs.values()), Const(None))
        for child in module.children.items:
            value = invoke(m, frame, node, child, [value], {})
        return value
    if short == "Rearrange":
        pattern = module.args.get("arg0", Const(None))
        return m.node("rearrange", (*args, pattern), node, frame, {}, module)
    if short == "FusedLinear" and args and not kwargs:
        return _fused_linear(m, frame, node, module, args)
    if module.torch_name == COMPUTED_ONCE and len(args) == 2 and not kwargs:
        return invoke(m, frame, node, args[0], args[1:], {})
    if module.torch_name == PRISMATIC and isinstance(module.attributes.get("expert"), Module):
        return _expert(m, frame, node, module, args, kwargs)
    op = MODULE_OPS.get(short)
    if op is None:
        return m.node("opaque", args, node, frame, kwargs, module, name=short)
    args, kwargs = ordered(op, args, kwargs)
    inner = torch_layers.run_layers(m, frame, node, module, args, kwargs)
    if inner is not None:
        return inner
    made = m.node(op, args, node, frame, kwargs, module)
    if op == "mha":
        return Many([made, m.node("mha_weights", (made,), node, frame, {}, module)], "tuple")
    return made


def _fused_linear(m: Machine, frame: Frame, node: ast.AST, module: Module, args: list[Value]) -> Value:
    """Our layer that stands for several: one projection for each of its parts, of one input or of one each."""
    parts = module.args.get("out_features")
    if len(args) == 1 and isinstance(parts, Many):
        args = args * len(parts.items)
    return Many([m.node("linear", (arg,), node, frame, {}, module) for arg in args], "tuple")


def _expert(
    m: Machine, frame: Frame, node: ast.AST, module: Module, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """What a Prismatic module does: its expert runs, with the operation left open where there are several."""
    left = {name: value for name, value in kwargs.items() if name != "padding_mask"}
    kinds = module.args.get("architectures")
    if isinstance(kinds, Many) and kinds.items:
        same = all(isinstance(k, Const) for k in kinds.items) and len({repr(k) for k in kinds.items}) == 1
        left["pos_type"] = kinds.items[0] if same else m.node("unknown", (), node, frame, name="pos_type")
    return invoke(m, frame, node, module.attributes["expert"], args, left)


def ordered(op: str, args: Sequence[Value], kwargs: dict[str, Value]) -> tuple[list[Value], dict[str, Value]]:
    """The leading operands in positional order, whether they came by name or not; the others stay named."""
    names = CALLS.get(op)
    result = list(args)
    if names is None:
        for key in ("input", "self", "tensor", "x"):
            if key in kwargs:
                return [kwargs[key], *result], {k: v for k, v in kwargs.items() if k != key}
        return result, kwargs
    left = dict(kwargs)
    if "axis" in left and "dim" in names:
        left["dim"] = left.pop("axis")
    while len(result) < len(names) and names[len(result)] in left:
        result.append(left.pop(names[len(result)]))
    return result, left


def torch_attribute(m: Machine, frame: Frame, node: ast.AST, module: Module, attr: str) -> Value:
    """An attribute of a torch module: its weights and arguments; otherwise a method."""
    if attr in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
        made = m.node("parameter", (), node, frame, module=module, name=attr)
        m.set_attribute(module, attr, made)
        return made
    expert = module.attributes.get("expert") if module.torch_name == PRISMATIC else None
    if isinstance(expert, Module) and not hasattr_of_module(attr):
        from modernizer.graph.expressions import get_attribute

        return get_attribute(m, frame, node, expert, attr)
    if attr in module.args:
        return module.args[attr]
    if module.torch_name in ("", "torch.nn.Module") and not hasattr_of_module(attr):
        return m.node("attr", (module,), node, frame, name=attr)
    return Method(module, External(f"{module.torch_name}.{attr}"))


MODULE_METHODS = frozenset(
    "add_module append apply bfloat16 buffers children compile cpu cuda double eval extend extra_repr float forward"
    " get_parameter get_submodule half insert items keys load_state_dict modules named_buffers named_children"
    " named_modules named_parameters parameters register_backward_hook register_buffer register_forward_hook"
    " register_forward_pre_hook register_full_backward_hook register_module register_parameter requires_grad_ "
    " set_submodule share_memory state_dict to train type update values xpu zero_grad __init__ __call__ pop"
    " clear __getattr__ __getattribute__ __setattr__".split()
)


def hasattr_of_module(attr: str) -> bool:
    """Whether every nn.Module (or container of modules) has a method of this name."""
    return attr in MODULE_METHODS


def _call_object(
    m: Machine, frame: Frame, node: ast.AST, callee: Object, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    owner = next((c for c in callee.cls.mro if isinstance(c, Class) and "__call__" in c.members), None)
    member = owner.members["__call__"] if owner else None
    if owner is not None and isinstance(member, ast.FunctionDef):
        function = Function(member, owner.scope, owner.closure, owner)
        return enter(m, frame, node, function, [callee, *args], kwargs, callee)
    return m.node("opaque", (callee, *args), node, frame, kwargs)


def _datum_method(
    m: Machine, frame: Frame, node: ast.AST, receiver: Value, name: str, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """`tensor.name(...)`; one that ends in `_` puts its result where the tensor was."""
    if not isinstance(receiver, Node):
        return m.node("opaque", (receiver, *args), node, frame, kwargs, name=name)
    op = operation(name)
    if op == "shape":
        if args and isinstance(args[0], Const):
            return m.node("dim", (receiver, args[0]), node, frame)
        return m.node("dim" if args else "shape", (receiver, *args), node, frame)
    if op == "dim" or op == "ndimension":
        return m.node("rank", (receiver,), node, frame)
    if receiver.op == "config" or (receiver.op == "unknown" and not receiver.args):
        return m.node("opaque", (receiver, *args), node, frame, kwargs, name=name)
    values, named = ordered(op, [receiver, *args], kwargs)
    made = m.node(op, values, node, frame, named, name=name)
    if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
        rebind(m, frame, receiver, made)
    return made


# -- everything from outside


def _external(
    m: Machine, frame: Frame, node: ast.AST, dotted: str, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    special = builtin_calls.FUNCTIONS.get(dotted)
    if special is not None:
        return special(m, frame, node, args, kwargs)
    base, _, method = dotted.rpartition(".")
    if args and isinstance(args[0], Module) and args[0].torch_name == base:  # nn.Module.__init__(self)
        return builtin_calls.module_method(m, frame, node, args[0], method, args[1:], kwargs)
    if dotted.startswith(RANDOM_WEIGHT_FILLERS):
        return m.node("opaque", args, node, frame, kwargs, name=dotted)
    if dotted.startswith("torch.nn.") and dotted.count(".") == 2:
        short = dotted.rpartition(".")[2]
        if short in ("Parameter", "Buffer"):
            return m.node("parameter", args[:1], node, frame, name=short)
        if dotted in WRAPPERS and args and isinstance(args[0], Module):
            return args[0]
        if short[:1].isupper():
            return make_torch(m, frame, node, dotted, args, kwargs)
    if dotted.startswith("einops.layers.torch.") or _is_component_class(dotted):
        return make_torch(m, frame, node, dotted, args, kwargs)
    op = function_operation(dotted)
    if op is None:
        return m.node("opaque", args, node, frame, kwargs, name=dotted)
    return _function(m, frame, node, op, dotted, args, kwargs)


def _is_component_class(dotted: str) -> bool:
    package, _, name = dotted.rpartition(".")
    return package == "modernizer.components" and name[:1].isupper()


def _function(
    m: Machine, frame: Frame, node: ast.AST, op: str, dotted: str, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    if args and not kwargs and all(isinstance(a, Const) for a in args):
        folded = containers.fold_function(op, [a.value for a in args if isinstance(a, Const)])
        if folded is not None and not dotted.startswith("torch."):
            return folded
    values, named = ordered(op, args, kwargs)
    if op == "shape" and values:
        return m.node("shape", values, node, frame)
    made = m.node(op, values, node, frame, named, name=dotted)
    if dotted.endswith("_") and values and isinstance(values[0], Node):
        rebind(m, frame, values[0], made)
    return made
