"""Python's builtins and the standard-library functions that models are put together with."""

from __future__ import annotations

import ast
from collections.abc import Callable

from modernizer.graph import calls, containers, torch_layers
from modernizer.graph.machine import KNOWN_REPEATS, UNKNOWN_REPEATS, Machine
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

Handler = Callable[[Machine, Frame, ast.AST, list[Value], dict[str, Value]], Value]
FUNCTIONS: dict[str, Handler] = {}


def handles(*dotted: str) -> Callable[[Handler], Handler]:
    """Registers the handler of functions by dotted name."""

    def register(handler: Handler) -> Handler:
        FUNCTIONS.update(dict.fromkeys(dotted, handler))
        return handler

    return register


def unknown(m: Machine, frame: Frame, node: ast.AST, args: list[Value], name: str = "") -> Node:
    """A datum of which only the operands are known."""
    return m.node("opaque", args, node, frame, name=name)


@handles("builtins.range")
def range_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """Known and short: as it is. Unknown or long: the first two numbers, marked open."""
    if args and all(isinstance(a, Const) and isinstance(a.value, int) for a in args):
        numbers = range(*(a.value for a in args if isinstance(a, Const) and isinstance(a.value, int)))
        if len(numbers) <= KNOWN_REPEATS:
            return Many([Const(n) for n in numbers], "list", False, node)
        return Many([Const(n) for n in numbers[:UNKNOWN_REPEATS]], "list", True, node)
    start = args[0].value if len(args) > 1 and isinstance(args[0], Const) else 0
    first = start if isinstance(start, int) else 0
    return Many([Const(first + i) for i in range(UNKNOWN_REPEATS)], "list", True, node)


@handles("torch.nn._get_activation_fn")
def torchs_activation(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """The function that torch's layers make of `relu` or `gelu`; it raises for every other name."""
    given = args[0] if args else kwargs.get("activation")
    options = [External(f"torch.nn.functional.{name}") for name in ("relu", "gelu")]
    if isinstance(given, Const):
        options = [o for o in options if o.dotted.endswith(f".{given.value}")]
    return m.merge(options, node, frame) if options else m.node("opaque", args, node, frame, kwargs)


@handles("builtins.len")
def len_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    many = containers.as_many(m, frame, args[0], node) if args else None
    if many is not None and not many.open:
        return Const(len(many.items))
    if args and isinstance(args[0], Const) and isinstance(args[0].value, str | tuple):
        return Const(len(args[0].value))
    if args and isinstance(args[0], Node):
        return m.node("dim", (args[0], Const(0)), node, frame)
    return m.node("unknown", args, node, frame)


@handles("builtins.enumerate")
def enumerate_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = containers.items_of(m, frame, args[0], node) if args else []
    pairs: list[Value] = [Many([Const(i), item], "tuple") for i, item in enumerate(items)]
    return Many(pairs, "list", _is_open(m, frame, args[0], node) if args else False)


@handles("builtins.zip")
def zip_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """As long as the shortest list whose length is known; open ones are stretched to it."""
    known = [many for a in args if (many := containers.as_many(m, frame, a, node)) is not None]
    lists = [containers.items_of(m, frame, a, node) for a in args]
    fixed = [len(k.items) for k in known if not k.open]
    length = min(fixed) if fixed else min((len(k.items) for k in known), default=UNKNOWN_REPEATS)
    rows: list[Value] = []
    for i in range(length):
        rows.append(Many([items[min(i, len(items) - 1)] if items else Const(None) for items in lists], "tuple"))
    return Many(rows, "list", not fixed)


@handles("builtins.map")
def map_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if len(args) < 2:
        return unknown(m, frame, node, args)
    columns = [containers.items_of(m, frame, a, node) for a in args[1:]]
    items = [calls.invoke(m, frame, node, args[0], list(row), {}) for row in zip(*columns, strict=False)]
    return Many(items, "list", _is_open(m, frame, args[1], node))


def _is_open(m: Machine, frame: Frame, value: Value, node: ast.AST) -> bool:
    many = containers.as_many(m, frame, value, node)
    return many is None or many.open


@handles("builtins.list", "builtins.tuple", "builtins.sorted", "builtins.set", "builtins.iter", "collections.deque")
def list_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if not args:
        return Many([], "list", False, node)
    if isinstance(args[0], Node) and args[0].op == "shape":
        return args[0]
    return Many(containers.items_of(m, frame, args[0], node), "list", _is_open(m, frame, args[0], node), node)


@handles("builtins.reversed")
def reversed_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    made = list_(m, frame, node, args, kwargs)
    return Many(made.items[::-1], "list", made.open) if isinstance(made, Many) else made


@handles("builtins.dict", "collections.OrderedDict")
def dict_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    table = Table(dict(kwargs.items()))
    if args and isinstance(args[0], Table):
        table.entries = {**args[0].entries, **table.entries}
    elif args:
        for item in containers.items_of(m, frame, args[0], node):
            if isinstance(item, Many) and len(item.items) == 2 and isinstance(item.items[0], Const):
                table.entries[item.items[0].value] = item.items[1]
            else:
                table.open = True
    return table


@handles("builtins.sum")
def sum_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    items = containers.items_of(m, frame, args[0], node) if args else []
    total: Value = items[0] if items else Const(0)
    for item in items[1:]:
        total = containers.binary(m, frame, node, ast.Add(), total, item)
    return total


@handles("builtins.isinstance")
def isinstance_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if len(args) == 2:
        wanted = args[1].items if isinstance(args[1], Many) else [args[1]]
        outcomes = [_is_instance(args[0], kind) for kind in wanted]
        if any(o is True for o in outcomes):
            return Const(True)
        if all(o is False for o in outcomes):
            return Const(False)
    return m.node("isinstance", args, node, frame)


def _is_instance(value: Value, kind: Value) -> bool | None:
    if isinstance(value, Module):
        if isinstance(kind, Class):
            return value.cls is not None and any(isinstance(c, Class) and c.node is kind.node for c in value.cls.mro)
        if isinstance(kind, External) and kind.dotted.startswith("torch.nn."):
            return kind.dotted in (value.torch_name, "torch.nn.Module")
        return False
    if isinstance(value, Many) and isinstance(kind, External):
        return {"builtins.list": value.kind == "list", "builtins.tuple": value.kind == "tuple"}.get(kind.dotted, False)
    if isinstance(value, Table) and isinstance(kind, External):
        return kind.dotted == "builtins.dict"
    if isinstance(value, Const) and isinstance(kind, External):
        types = {
            "builtins.int": int,
            "builtins.float": float,
            "builtins.str": str,
            "builtins.bool": bool,
            "builtins.tuple": tuple,
        }
        return isinstance(value.value, types[kind.dotted]) if kind.dotted in types else False
    if isinstance(value, Function) and isinstance(kind, External):
        return False
    return None


@handles("builtins.hasattr")
def hasattr_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if len(args) == 2 and isinstance(args[0], Object) and isinstance(args[1], Const):
        name = str(args[1].value)
        if name in args[0].attributes:
            return Const(True)
    return m.node("hasattr", args, node, frame)


@handles("builtins.getattr")
def getattr_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    from modernizer.graph.expressions import get_attribute

    if len(args) >= 2 and isinstance(args[1], Const) and isinstance(args[1].value, str):
        found = get_attribute(m, frame, node, args[0], args[1].value)
        if len(args) > 2 and isinstance(found, Node) and found.op in ("unknown", "attr"):
            return m.merge([found, args[2]], node, frame)
        return found
    if len(args) >= 2 and isinstance(args[0], External):
        return m.node("unknown", args, node, frame)
    return m.node("unknown", args, node, frame)


@handles("builtins.setattr")
def setattr_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if len(args) == 3 and isinstance(args[0], Object) and isinstance(args[1], Const):
        m.set_attribute(args[0], str(args[1].value), args[2])
    return Const(None)


@handles("builtins.int", "builtins.float", "builtins.round", "builtins.abs", "builtins.bool", "builtins.str",
         "builtins.min", "builtins.max")  # fmt: skip
def number(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """Constants are converted; anything else is a datum made of its arguments."""
    called = node.func if isinstance(node, ast.Call) else None
    name = called.id if isinstance(called, ast.Name) else "number"
    convert: dict[str, Callable[..., object]] = {
        "int": int, "float": float, "round": round, "abs": abs, "bool": bool, "str": str, "min": min, "max": max,
    }  # fmt: skip
    if args and name in convert and all(isinstance(a, Const) for a in args):
        try:
            return Const(convert[name](*(a.value for a in args if isinstance(a, Const))))
        except (TypeError, ValueError, OverflowError):
            pass
    return m.node(name, args, node, frame)


@handles("builtins.print", "warnings.warn", "logging.info", "logging.debug", "logging.warning")
def nothing(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return Const(None)


@handles("copy.deepcopy", "copy.copy")
def deepcopy(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return clone(m, args[0], {}) if args else Const(None)


def clone(m: Machine, value: Value, seen: dict[int, Value]) -> Value:
    """A copy of a module with copies of its children; data are shared, for only their origin matters."""
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Many):
        fresh = Many([], value.kind, value.open, value.node)
        seen[id(value)] = fresh
        fresh.items = [clone(m, item, seen) for item in value.items]
        return fresh
    if isinstance(value, Table):
        table = Table({}, value.open)
        seen[id(value)] = table
        table.entries = {key: clone(m, item, seen) for key, item in value.entries.items()}
        return table
    if isinstance(value, Module):
        made = Module(value.cls, {}, value.call, value.frame, value.torch_name, dict(value.args), template=value)
        seen[id(value)] = made
        m.modules.append(made)
        made.args = {key: clone(m, item, seen) for key, item in value.args.items()}
        made.attributes = {key: clone(m, item, seen) for key, item in value.attributes.items()}
        children = [
            *made.attributes.items(),
            *((str(i), c) for i, c in enumerate(made.children.items if made.children else [])),
        ]
        for name, child in children:
            calls.adopt(made, child, name)
        return made
    if isinstance(value, Method) and isinstance(value.receiver, Module):
        return Method(clone(m, value.receiver, seen), value.function)
    return value


@handles("functools.partial")
def partial(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return Partial(args[0], tuple(args[1:]), kwargs) if args else Const(None)


@handles("builtins.type")
def type_(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if len(args) == 1 and isinstance(args[0], Object) and args[0].cls is not None:
        return args[0].cls
    return m.node("unknown", args, node, frame)


@handles("torch.utils.checkpoint.checkpoint")
def checkpoint(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """`checkpoint(f, *args)` is `f(*args)` as far as values go."""
    left = {
        k: v
        for k, v in kwargs.items()
        if k not in ("use_reentrant", "preserve_rng_state", "determinism_check", "debug")
    }
    return calls.invoke(m, frame, node, args[0], args[1:], left) if args else Const(None)


@handles(
    "transformers.pytorch_utils.apply_chunking_to_forward",
    "transformers.modeling_utils.apply_chunking_to_forward",
    "pytorch_utils.apply_chunking_to_forward",
    "modeling_utils.apply_chunking_to_forward",
)
def in_chunks(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """`apply_chunking_to_forward(f, size, dim, *inputs)` is `f(*inputs)` as far as values go."""
    return calls.invoke(m, frame, node, args[0], args[3:], {}) if len(args) > 3 else unknown(m, frame, node, args)


@handles("torch.Size", "torch.autograd.Variable", "torch.autograd.variable.Variable")
def as_is(m: Machine, frame: Frame, node: ast.AST, args: list[Value], kwargs: dict[str, Value]) -> Value:
    return args[0] if args else Many([])


# -- methods of containers and modules

STRING_METHODS = frozenset("lower upper strip format split replace startswith endswith".split())


def method(
    m: Machine, frame: Frame, node: ast.AST, receiver: Value, name: str, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """A method of a list, dict, constant or callable."""
    if isinstance(receiver, Many):
        return _list_method(m, frame, node, receiver, name, args)
    if isinstance(receiver, Table):
        return _table_method(m, frame, node, receiver, name, args, kwargs)
    if isinstance(receiver, Const) and isinstance(receiver.value, str) and name in STRING_METHODS:
        try:
            made = getattr(receiver.value, name)(*(a.value if isinstance(a, Const) else a for a in args))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError):
            return unknown(m, frame, node, args, name)
        if all(isinstance(a, Const) for a in args):
            return Many([Const(v) for v in made]) if isinstance(made, list) else Const(made)
    return m.node("opaque", (receiver, *args), node, frame, kwargs, name=name)


def _list_method(m: Machine, frame: Frame, node: ast.AST, many: Many, name: str, args: list[Value]) -> Value:
    if name == "append" and args:
        m.set_items(many, [*many.items, args[0]])
    elif name == "extend" and args:
        m.set_items(many, [*many.items, *containers.items_of(m, frame, args[0], node)])
        many.open = many.open or _is_open(m, frame, args[0], node)
    elif name == "insert" and len(args) == 2:
        place = args[0].value if isinstance(args[0], Const) and isinstance(args[0].value, int) else 0
        m.set_items(many, [*many.items[:place], args[1], *many.items[place:]])
    elif name == "pop" and many.items:
        place = args[0].value if args and isinstance(args[0], Const) and isinstance(args[0].value, int) else -1
        if -len(many.items) <= place < len(many.items):
            item = many.items[place]
            m.set_items(many, [v for v in many.items if v is not item])
            return item
    elif name == "copy":
        return Many(list(many.items), many.kind, many.open)
    elif name == "reverse":
        m.set_items(many, many.items[::-1])
    elif name not in ("sort", "clear", "remove"):
        return m.node("opaque", (many, *args), node, frame, name=name)
    return Const(None)


def _table_method(
    m: Machine, frame: Frame, node: ast.AST, table: Table, name: str, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    if name == "items":
        return Many([Many([Const(k), v], "tuple") for k, v in table.entries.items()], "list", table.open)
    if name == "values":
        return Many(list(table.entries.values()), "list", table.open)
    if name == "keys":
        return Many([Const(k) for k in table.entries], "list", table.open)
    if name in ("get", "pop", "setdefault") and args:
        if isinstance(args[0], Const) and args[0].value in table.entries:
            return table.entries[args[0].value]
        default = args[1] if len(args) > 1 else Const(None)
        if isinstance(args[0], Const) and not table.open:
            return default
        return m.merge([*table.entries.values(), default], node, frame)
    if name == "update":
        if args and isinstance(args[0], Table):
            table.entries.update(args[0].entries)
        table.entries.update(kwargs)
        return Const(None)
    if name == "copy":
        return Table(dict(table.entries), table.open)
    return m.node("opaque", (table, *args), node, frame, kwargs, name=name)


SELF_RETURNING = frozenset(
    "to cuda cpu float half double bfloat16 train eval requires_grad_ type apply xpu share_memory".split()
)


def module_method(
    m: Machine, frame: Frame, node: ast.AST, module: Module, name: str, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    """A method that torch gives a module."""
    if name == "__init__":
        return _init_base(m, frame, module, args, kwargs)
    if name in ("forward", "__call__"):
        if name == "__call__" and module.cls is not None:
            return calls.call_module(m, frame, node, module, args, kwargs)
        return calls.call_torch(m, frame, node, module, args, kwargs)
    if name == "_ff_block" and "linear1" in module.attributes and len(args) == 1:
        return torch_layers.run_feed_forward(m, frame, node, module, args)
    if name in ("__getattr__", "__getattribute__", "__setattr__"):
        return (setattr_ if name == "__setattr__" else getattr_)(m, frame, node, [module, *args], kwargs)
    if name in ("register_buffer", "register_parameter", "add_module", "register_module"):
        return _register(m, frame, node, module, name, args, kwargs)
    if name == "apply" and args:
        return module
    if name in SELF_RETURNING:
        return module
    if module.children is not None:
        return _container_method(m, frame, node, module, module.children, name, args)
    return m.node("opaque", (module, *args), node, frame, kwargs, name=name)


def _init_base(m: Machine, frame: Frame, module: Module, args: list[Value], kwargs: dict[str, Value]) -> Value:
    if args and args[0] is module:  # nn.Module.__init__(self)
        args = args[1:]
    if module.torch_name and module.torch_name != "torch.nn.Module":
        calls.init_torch(m, frame, module, module.torch_name, args, kwargs)
    return Const(None)


def _register(
    m: Machine, frame: Frame, node: ast.AST, module: Module, name: str, args: list[Value], kwargs: dict[str, Value]
) -> Value:
    key = args[0] if args else kwargs.get("name", Const(None))
    rest = args[1:] or [v for k, v in kwargs.items() if k in ("tensor", "param", "module")]
    if isinstance(key, Const) and rest:
        m.set_attribute(module, str(key.value), rest[0])
        children = module.attributes.get("#items")
        if name in ("add_module", "register_module") and isinstance(children, Many):
            m.set_items(children, [*children.items, rest[0]])
    elif rest and name in ("add_module", "register_module"):
        many = module.attributes.setdefault("#items", Many([], "ModuleList"))
        if isinstance(many, Many):
            m.set_items(many, [*many.items, rest[0]])
    return Const(None)


def _container_method(
    m: Machine, frame: Frame, node: ast.AST, module: Module, children: Many, name: str, args: list[Value]
) -> Value:
    names = module.attributes.get("#names")
    if isinstance(names, Table) and name in ("items", "values", "keys", "update", "pop", "get"):
        return _table_method(m, frame, node, names, name, args, {})
    if name in ("append", "extend", "insert", "add_module"):
        before = set(map(id, children.items))
        _list_method(m, frame, node, children, name, args)
        for index, item in enumerate(children.items):
            if id(item) not in before:
                calls.adopt(module, item, str(index))
        return module
    if name in ("children", "modules"):
        return Many(list(children.items), "list", children.open)
    if name in ("named_children", "named_modules"):
        keys = list(names.entries) if isinstance(names, Table) else [str(i) for i in range(len(children.items))]
        pairs: list[Value] = [
            Many([Const(key), item], "tuple") for key, item in zip(keys, children.items, strict=False)
        ]
        return Many(pairs, "list", children.open)
    return m.node("opaque", (module, *args), node, frame, name=name)
