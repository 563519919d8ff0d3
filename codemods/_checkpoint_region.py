"""What runs inside of a layer's call, and whether it may run a second time when gradients are computed."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codemods._survey import HARMLESS, KNOWN_PACKAGES, Cannot
from modernizer.graph.machine import Machine
from modernizer.graph.query import VIEWS, alternatives, is_none, location, origin
from modernizer.graph.values import (
    Const,
    External,
    Frame,
    Function,
    Many,
    Module,
    Node,
    Object,
    Partial,
    Table,
    Value,
    flatten,
)
from modernizer.model_map import ModelMap
from modernizer.source import Location
from modernizer.syntax import Function as FunctionSyntax
from modernizer.syntax import below, block_of, every_node, function_of, outward, statement_of

Key = tuple[ast.AST, int]  # a call expression, and the id of the activation that it stands in

# Methods that change what they are called on; a tensor has some of these names for things that do not.
CHANGES = frozenset("append extend insert pop popitem clear remove update setdefault discard appendleft put".split())
CHANGES_LISTS = CHANGES | {"add", "sort", "reverse"}
# Methods of a module by which it keeps something.
KEEPS = frozenset("register_buffer register_parameter register_module add_module load_state_dict __setattr__".split())
FRESH = frozenset("list dict set deque OrderedDict defaultdict Counter".split())
COUNTS_BATCHES = frozenset("BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm LazyBatchNorm1d".split())
SAME_MEMORY = VIEWS - frozenset("clone repeat repeat_interleave index_select type_as".split())
PICKS = frozenset("getitem item attr iter setitem".split())
# Packages whose functions give what their arguments say, and change nothing.
PURE = (*KNOWN_PACKAGES, "flash_attn.", "xformers.", "apex.", "typing.", "collections.", "copy.", "functools.")
RANDOM = ("numpy.random", "random.")
NOT_KEPT = frozenset("data grad requires_grad training".split())
NEW_TENSOR = "make a new tensor: `x = x + y` for `x += y`"
LAYERS_OF_OTHERS = HARMLESS | {"FusedRMSNorm"}


@dataclass(eq=False)
class Runs:
    """The activations and data of a program, by the call that they belong to."""

    frames: dict[Key, list[Frame]]  # the activations that a call starts
    inner: dict[int, list[Frame]]  # by the id of an activation: those that it starts
    data: dict[int, list[Node]]  # by the id of an activation: the data it makes itself
    made: dict[Key, list[Node]]  # the data that a call of one of torch's modules makes

    @classmethod
    def of(cls, model: ModelMap) -> Runs:
        made = cls(defaultdict(list), defaultdict(list), defaultdict(list), defaultdict(list))
        for frame in model.graph.machine.frames:
            if frame.caller is not None and frame.call is not None:
                made.frames[frame.call, id(frame.caller)].append(frame)
                made.inner[id(frame.caller)].append(frame)
        for node in model.graph.machine.nodes:
            made.data[id(node.frame)].append(node)
            if node.module is not None and node.node is not None:
                made.made[node.node, id(node.frame)].append(node)
        return made

    def below(self, call: ast.AST, caller: Frame) -> list[Node]:
        """All data that a call in an activation makes."""
        todo, found = list(self.frames.get((call, id(caller)), ())), list(self.made.get((call, id(caller)), ()))
        while todo:
            frame = todo.pop()
            found += self.data.get(id(frame), ())
            todo += self.inner.get(id(frame), ())
        return found


class Region:
    """Everything that the call of a layer runs, in all activations in which the call stands."""

    def __init__(self, model: ModelMap, call: ast.Call, callers: Sequence[Frame]) -> None:
        self.model, self.call, self.callers = model, call, callers
        self.machine: Machine = model.graph.machine
        runs = model.derived(Runs.of)
        todo = [f for caller in callers for f in runs.frames.get((call, id(caller)), ())]
        self.frames: list[Frame] = []
        while todo:
            frame = todo.pop()
            self.frames.append(frame)
            todo += runs.inner.get(id(frame), ())
        self.nodes = [n for caller in callers for n in runs.made.get((call, id(caller)), ())]
        self.nodes += [n for frame in self.frames for n in runs.data.get(id(frame), ())]
        self._inside = set(map(id, self.frames))
        self._made = set(map(id, self.nodes))
        functions = {f.function.node: f for f in self.frames if f.function is not None}
        self.functions = [(node, f) for node, f in functions.items() if getattr(node, "name", "") != "__init__"]

    def guards(self) -> list[str]:
        """The arguments that must be None for the layer to be run twice, as it changes what they hold.

        Raises Cannot where it changes something else, or does not give the same again.
        """
        found: dict[str, None] = {}
        for node in self.nodes:
            self._check_datum(node)
            if is_in_place(node):
                found.update(dict.fromkeys(self._owner(node.args[0], self._where(node))))
        for function, frame in self.functions:
            found.update(dict.fromkeys(self._changes(function, frame)))
        self._check_kept()
        return list(found)

    # -- what gives something else, or runs unseen

    def _check_datum(self, node: Node) -> None:
        module = node.module
        kind = module.torch_name.rpartition(".")[2] if module is not None else ""
        tracks = module.args.get("track_running_stats", Const(False)) if module is not None else Const(False)
        follows = kind.startswith("InstanceNorm") and not (isinstance(tracks, Const) and not tracks.value)
        if kind in COUNTS_BATCHES or follows or (node.op == "batch_norm" and module is None):
            raise Cannot(f"{kind or 'batch norm'} would count every batch twice", self._where(node))
        if node.name.startswith(RANDOM) or "generator" in node.kwargs:
            raise Cannot("a layer draws random numbers that torch does not draw again", self._where(node))
        if node.op == "opaque" and not self._is_known(node):
            what = f"`{ast.unparse(node.node.func)}`" if isinstance(node.node, ast.Call) else "a part from outside"
            raise Cannot(f"what {what} does inside of a layer cannot be seen", self._where(node))

    def _where(self, node: Node) -> Location:
        """Where a datum is made; the call of the layer where that is not in the file of its activation."""
        if node.node is not None and node.node in node.frame.scope.source.parents:
            return location(node.node, node.frame)
        return location(self.call, self.callers[0])

    def _is_known(self, node: Node) -> bool:
        if node.module is not None:
            short = node.module.torch_name.rpartition(".")[2]
            return node.module.torch_name.startswith(("torch.nn.", "modernizer.")) or short in LAYERS_OF_OTHERS
        if node.name.startswith(PURE):
            return True
        receiver = node.args[0] if node.args else None
        if "." in node.name or receiver is None:
            return False
        if node.name in CHANGES:  # what it changes is looked at in the code
            return True
        # A method of something that is no module of unknown kind: of a list, a text, a size, a setting.
        return node.name != "" and isinstance(receiver, Const | Many | Table | Node)

    # -- what changes

    def _changes(self, function: ast.AST, frame: Frame) -> Iterator[str]:
        """The arguments whose content a function of the layer changes; raises Cannot for anything else."""
        source = frame.scope.source
        for node in below(function):
            if isinstance(node, ast.Global | ast.Nonlocal):
                raise Cannot("a layer changes variables outside of it", source.location(node))
            if isinstance(node, ast.Name) and node.id in self.model.derived(late_globals):
                raise Cannot(f"layers read `{node.id}`, a global that functions set", source.location(node))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield from self._by_method(function, node, node.func, frame)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                raise Cannot("a layer keeps something from call to call", source.location(node))
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                values = self._values(node.value)
                if not all(isinstance(v, Node) for v in values) or not values:
                    yield from self._by_list(function, node.value, frame)
            elif isinstance(node, ast.AugAssign) and not self._values(node.value):
                yield from self._by_list(function, node.target, frame)

    def _by_method(self, function: ast.AST, call: ast.Call, func: ast.Attribute, frame: Frame) -> Iterator[str]:
        values = self._values(func.value)
        if func.attr in KEEPS:
            raise Cannot("a layer keeps something from call to call", frame.scope.source.location(call))
        if call not in self.machine.at or not self._values(call):  # a branch that was not taken
            self._check_unseen(call, func, frame)
            if func.attr.endswith("_") and not func.attr.endswith("__"):
                yield from self._by_list(function, func.value, frame)
        tensors = bool(values) and all(isinstance(v, Node) for v in values)
        if func.attr not in (CHANGES if tensors else CHANGES_LISTS):
            return
        if values and all(isinstance(v, External) for v in values):
            return  # a function of a package
        yield from self._by_list(function, func.value, frame)

    def _by_list(self, function: ast.AST, changed: ast.expr, frame: Frame) -> Iterator[str]:
        if not _is_fresh(function, changed):
            where = frame.scope.source.location(changed)
            values = self._values(changed)
            for value in values:
                yield from self._owner(value, where)
            if not values:
                yield from self._left_out(function, changed, where)

    def _left_out(self, function: ast.AST, changed: ast.expr, where: Location) -> Iterator[str]:
        """What a branch that this program never takes would change: an argument that is left out, or a new value."""
        root = changed
        while isinstance(root, ast.Subscript | ast.Attribute):
            root = root.value
        name = root.id if isinstance(root, ast.Name) else ""
        given = [f.arguments.get(name) for f in self.frames if f.function is not None and f.function.node is function]
        if any(value is None for value in given) or not given:
            if not _is_new(function, name):
                raise Cannot("a layer changes something outside of it", where)
            return
        for value in given:
            if value is not None and is_none(value):
                handed = self._argument(value)
                if handed is not None:
                    yield handed
            elif not isinstance(value, Const):  # a number cannot change
                if _is_bound(function, name) or value is None:
                    raise Cannot("a layer changes what it is given", where, NEW_TENSOR)
                yield from self._owner(value, where)

    def _check_unseen(self, call: ast.Call, func: ast.Attribute, frame: Frame) -> None:
        """Raises Cannot where a branch that this program does not take would count batches, or draw numbers."""
        where = frame.scope.source.location(call)
        if ast.unparse(func).startswith(("random.", "np.random.", "numpy.random.")):
            raise Cannot("a layer draws random numbers that torch does not draw again", where)
        for active in self.frames:
            held = active.receiver.attributes.get(func.attr) if isinstance(active.receiver, Module) else None
            if any(m.torch_name.rpartition(".")[2] in COUNTS_BATCHES for m in _modules(held)):
                raise Cannot("batch norm would count every batch twice", where)

    def _owner(self, changed: Value, at: Location) -> Iterator[str]:
        """The argument that holds what is changed; nothing where the layer has made it itself."""
        whole = [r for r in roots(changed) if not is_none(r)]
        for root in [r for r in whole if not self._has_made(r)]:
            name = self._argument(root)
            if name is None:
                raise Cannot("a layer changes what it is given, or keeps something from call to call", at, NEW_TENSOR)
            yield name

    def _has_made(self, value: Value) -> bool:
        """Whether a value did not exist before the layer ran."""
        if isinstance(value, Many):
            return value.node is not None and any(value.node in below(s) for f, _ in self.functions for s in _body(f))
        return isinstance(value, Node) and id(value) in self._made

    def _argument(self, root: Value) -> str | None:
        """The variable that hands something in, where it may be None instead."""
        for argument in [*self.call.args, *(k.value for k in self.call.keywords)]:
            if isinstance(argument, ast.Name):
                given = [v for f, v in self.machine.at.get(argument, ()) if any(f is c for c in self.callers)]
                if any(root is r for v in given for r in roots(v, PICKS)) and any(map(self._may_be_none, given)):
                    return argument.id
        return None

    def _may_be_none(self, value: Value) -> bool:
        """Whether an argument is one that callers may leave out."""
        options = value.args if isinstance(value, Node) and value.op == "merge" else (value,)
        for option in options:
            spot = option.node if isinstance(option, Node) and option.op == "input" else None
            if is_none(option) or (isinstance(spot, ast.arg) and _defaults_to_none(spot, self.callers)):
                return True
        return False

    # -- what is kept on modules

    def _check_kept(self) -> None:
        """An attribute that the layers read must be the same when they run again."""
        late = self.model.derived(late_stores)
        for function, frame in self.functions:
            for node in below(function):
                if not isinstance(node, ast.Attribute) or node.attr in NOT_KEPT:
                    continue
                above = frame.scope.source.parents.get(node)
                if not isinstance(node.ctx, ast.Load) and not isinstance(above, ast.AugAssign):
                    continue
                stores = [s for s in late.get(node.attr, ()) if self._may_be_same(s, node)]
                if stores and not any(_is_behind(s, node, function, frame) for s in stores):
                    raise Cannot(f"layers read `{node.attr}`, which is set again while the model runs",
                                 frame.scope.source.location(node))  # fmt: skip

    def _may_be_same(self, store: ast.Attribute, load: ast.Attribute) -> bool:
        """Whether an attribute that is set may be the one that is read: not where the objects are known and others."""
        owners = [v for _, v in self.machine.at.get(store.value, ())]
        readers = self._values(load.value)
        known = owners and readers and all(isinstance(v, Object) for v in (*owners, *readers))
        return not known or any(_source(a) is _source(b) for a in owners for b in readers)

    def _values(self, node: ast.AST) -> list[Value]:
        return [v for f, v in self.machine.at.get(node, ()) if id(f) in self._inside]


def _source(value: Value) -> Value:
    """The object that others are copies of."""
    return origin(value) if isinstance(value, Module) else value


def is_in_place(node: Node) -> bool:
    """Whether a datum stands in the memory of its first operand."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "setitem" or (node.name.endswith("_") and not node.name.endswith("__")):
        return node.op not in ("requires_grad", "requires_grad_")
    return isinstance(node.node, ast.AugAssign) and node.args[0].op not in ("dim", "rank", "numel", "shape", "config")


def roots(value: Value, ops: frozenset[str] = SAME_MEMORY | PICKS) -> list[Value]:
    """What a value is part of: behind views and picks, with the alternatives of branches."""
    found: list[Value] = []
    todo, seen = [value], set[int]()
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, Node) and current.op == "merge":
            todo += current.args
        elif isinstance(current, Node) and current.op in ops and current.args and isinstance(current.args[0], Node):
            todo.append(current.args[0])
        else:
            found.append(current)
    return found


def _is_fresh(function: ast.AST, changed: ast.expr) -> bool:
    """Whether a variable holds a list or the like that the function itself has made."""
    if not isinstance(changed, ast.Name):
        return False
    rest = getattr(function, "args", None)
    if isinstance(rest, ast.arguments) and rest.kwarg is not None and rest.kwarg.arg == changed.id:
        return True
    given: list[ast.expr | None] = []
    for node in below(function):
        if isinstance(node, ast.arg) and node.arg == changed.id:
            return False
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            given += [node.value for t in targets if isinstance(t, ast.Name) and t.id == changed.id]
    stored = [n for n in below(function) if isinstance(n, ast.Name) and n.id == changed.id and _stores(n)]
    return bool(given) and len(given) == len(stored) and all(_makes_list(value) for value in given)


def _modules(value: Value | None) -> Iterator[Module]:
    """A module and all below it."""
    if isinstance(value, Module):
        yield value
        for child in (*value.attributes.values(), *(value.children.items if value.children else ())):
            if isinstance(child, Module) and child.owner is value:
                yield from _modules(child)


def _is_bound(function: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name and _stores(n) for n in below(function))


def _is_new(function: ast.AST, name: str) -> bool:
    """Whether a variable of a function only ever holds what was made there, and no view of something else."""
    given = [n.value for n in below(function) if isinstance(n, ast.Assign)
             for t in n.targets if isinstance(t, ast.Name) and t.id == name]  # fmt: skip
    stored = [n for n in below(function) if isinstance(n, ast.Name) and n.id == name and _stores(n)]
    added = [n for n in below(function) if isinstance(n, ast.AugAssign) and n.target in stored]
    return bool(given) and len(given) + len(added) == len(stored) and all(map(_makes_new, given))


def _makes_new(value: ast.expr) -> bool:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return value.func.attr not in SAME_MEMORY
    return isinstance(value, ast.BinOp | ast.UnaryOp | ast.Constant | ast.Compare) or _makes_list(value)


def _body(function: ast.AST) -> list[ast.AST]:
    """What a call of a function runs: its defaults were made with it."""
    body: list[ast.AST] | ast.AST = getattr(function, "body", [])
    return body if isinstance(body, list) else [body]


def _stores(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _makes_list(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in FRESH
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def _defaults_to_none(parameter: ast.arg, callers: Sequence[Frame]) -> bool:
    for active in (f for caller in callers for f in caller.outward()):
        node = active.function.node if active.function is not None else None
        if isinstance(node, ast.FunctionDef):
            spec = node.args
            positional = [*spec.posonlyargs, *spec.args]
            known = dict(zip(positional[len(positional) - len(spec.defaults) :], spec.defaults, strict=True))
            known.update({a: d for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None})
            default = known.get(parameter)
            if isinstance(default, ast.Constant) and default.value is None:
                return True
    return False


def late_stores(model: ModelMap) -> dict[str, list[ast.Attribute]]:
    """The attributes that are set outside of constructors, by name."""
    machine = model.graph.machine
    inside: dict[ast.AST, bool] = {}  # by function: whether only constructors run it
    for frame in machine.frames:
        if frame.function is not None:
            made = any(f.function is not None and f.function.name == "__init__" for f in frame.outward())
            inside[frame.function.node] = inside.get(frame.function.node, True) and made
    found: dict[str, list[ast.Attribute]] = defaultdict(list)
    for source in model.project.files():
        for node in every_node(source.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                function = function_of(source.tree, node)
                name = getattr(function, "name", "")
                if function is not None and name != "__init__" and not inside.get(function, False):
                    found[node.attr].append(node)
    return dict(found)


def late_globals(model: ModelMap) -> frozenset[str]:
    """The global variables that functions set."""
    found = (n for source in model.project.files() for n in every_node(source.tree) if isinstance(n, ast.Global))
    return frozenset(name for node in found for name in node.names)


def _is_behind(store: ast.Attribute, load: ast.Attribute, function: ast.AST, frame: Frame) -> bool:
    """Whether whoever reads here has always passed the line that sets the attribute."""
    tree = frame.scope.source.tree
    inside = {id(n) for n in below(function)}
    if id(store) not in inside or isinstance(frame.scope.source.parents.get(store), ast.AugAssign):
        return False
    statement = statement_of(tree, store)
    block = block_of(tree, statement)
    later = block[block.index(statement) + 1 :] if statement in block else []
    return any(n in later for n in outward(tree, load))


def hands_code_in(machine: Machine, call: ast.Call, callers: Sequence[Frame]) -> bool:
    """Whether a call is given a function that looks at variables around it, which may be others by then."""
    if any(isinstance(n, FunctionSyntax | ast.GeneratorExp) for a in call.args for n in below(a)):
        return True
    for argument in [*call.args, *(k.value for k in call.keywords)]:
        for frame, value in machine.at.get(argument, ()):
            if any(frame is c for c in callers) and any(_is_closure(leaf) for leaf in flatten(value)):
                return True
    return False


def _is_closure(value: Value) -> bool:
    return any(
        isinstance(v, Partial) or (isinstance(v, Function) and v.closure is not None and v.closure.function is not None)
        for v in alternatives(value)
    )


def modules_only(values: Sequence[Value]) -> bool:
    """Whether each value is a module, or a method of one."""
    options = [o for v in values for o in alternatives(v)]
    return bool(options) and all(isinstance(getattr(o, "receiver", o), Module) for o in options)
