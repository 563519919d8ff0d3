"""Where a relay is made: the constructor of the class that holds the sum, and how it states the stream's width."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from codemods._relay_checks import Refused
from modernizer.graph.query import ancestors, is_torch
from modernizer.graph.values import Class, Module
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.model_map.residual import Residual
from modernizer.source import Location, SourceFile
from modernizer.syntax import below, loops_around, mentions, outward, parents, walk
from modernizer.vendoring import is_vendored

_WIDTHS = {"LayerNorm": "normalized_shape", "RMSNorm": "normalized_shape", "MultiheadAttention": "embed_dim"}
# A relay's choice of tokens is code that looks at sizes.
_COMPILERS = (("script", "jit"), ("script_method", "jit"), ("ScriptModule", "jit"), ("trace", "jit"),
              ("symbolic_trace", "fx"), ("export", "onnx"), ("vmap", "torch"), ("vmap", "func"))  # fmt: skip
_SIZES = frozenset("dim ndim ndimension shape size".split())
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")
_NEED_TWO_AXES = ("xavier", "kaiming", "orthogonal", "eye", "sparse", "dirac")
_WALKS = ("modules", "named_modules", "children", "named_children")


@dataclass(frozen=True)
class Place:
    """A relay of `width` is made behind `anchor`, as attribute `name` of what the sum's method calls `receiver`."""

    source: SourceFile
    constructor: ast.FunctionDef
    anchor: ast.stmt
    width: str
    name: str
    receiver: str

    @property
    def attribute(self) -> str:
        """The relay, in the constructor."""
        return f"{self.constructor.args.args[0].arg}.{self.name}"


def find_place(model: ModelMap, residuals: Sequence[Residual], contexts: Sequence[Attention]) -> Place:
    """Raises Refused where there is none."""
    first = residuals[0].frame
    owner, function = first.owner, first.function.node if first.function is not None else None
    if owner is None or not isinstance(function, ast.FunctionDef) or not function.args.args:
        raise Refused("the sum does not stand in a method of a module")
    source = first.scope.source
    if source.path not in model.project.named:
        raise Refused("it is in a file that was not named")
    init = owner.members.get("__init__")
    receivers = [r.frame.receiver for r in residuals]
    modules = [m for m in receivers if isinstance(m, Module)]
    if len(modules) < len(receivers) or any(r.frame.owner is None or r.frame.owner.node is not owner.node
                                            for r in residuals):  # fmt: skip
        raise Refused("the sum does not stand in a method of a module")
    if not isinstance(init, ast.FunctionDef) or not init.args.args:
        raise Refused("the class around the sum has no constructor of its own")
    if "__setattr__" in owner.members or owner.torch_base().rpartition(".")[2] in _CONTAINERS:
        raise Refused("the class around the sum treats its parts in its own way: it may run, count or refuse new ones")
    _check_one_layer(source, residuals, contexts)
    _check_heirs(model, owner)
    for module in _of_known_width(residuals, contexts):
        stated = _stated(source, init, module)
        if stated is not None:
            name = _free_name(owner, modules)
            return Place(source, init, stated[0], stated[1], name, function.args.args[0].arg)
    raise Refused("the width of the stream is not stated in the constructor of this class")


def _check_one_layer(source: SourceFile, residuals: Sequence[Residual], contexts: Sequence[Attention]) -> None:
    """Raises Refused where one module runs this sum for several layers: they would share a relay."""
    node = residuals[0].sum.node
    layers: dict[int, set[frozenset[int]]] = {}
    for residual in residuals:
        made = (p for c in contexts if id(c.scores) in residual.between
                for p in (*c.query_projections, *c.key_projections, c.scores))  # fmt: skip
        layers.setdefault(id(residual.frame.receiver), set()).add(frozenset(id(p.module) for p in made if p.module))
    if (node is not None and next(loops_around(source.tree, node), None)) or any(len(s) > 1 for s in layers.values()):
        raise Refused(
            "one module runs this sum for several layers, which would share a relay", "make a class of the layer"
        )


def _check_heirs(model: ModelMap, owner: Class) -> None:
    for module in model.graph.machine.modules:
        kinds = [c for c in module.cls.mro if isinstance(c, Class)] if module.cls is not None else []
        if any(c.node is owner.node for c in kinds[1:]):
            raise Refused("other classes inherit from this one, and may not run its constructor")


def _of_known_width(residuals: Sequence[Residual], contexts: Sequence[Attention]) -> Iterator[Module]:
    """Modules whose width is that of the stream: norms of it, and attention that reads it unprojected."""
    first = residuals[0]
    for norm in (*first.entry_norms, *([first.norm] if first.norm is not None else [])):
        if is_torch(norm.module, "LayerNorm", "RMSNorm") and isinstance(norm.module, Module):
            yield norm.module
    for context in contexts:
        if context.form == "mha" and context.scores.module is not None:
            yield context.scores.module
        for projection in context.query_projections:
            way = [n for n in ancestors(projection.args[0]).values() if id(n) in first.between]
            if is_torch(projection.module, "Linear") and projection.module and not any(n.op == "linear" for n in way):
                yield projection.module


def _stated(source: SourceFile, init: ast.FunctionDef, module: Module) -> tuple[ast.stmt, str] | None:
    """The statement of the constructor that makes a module, and the width that it gives."""
    call = module.call
    if not isinstance(call, ast.Call) or not isinstance(module.owner, Module):
        return None
    keyword = _WIDTHS.get(module.torch_name.rpartition(".")[2], "in_features")
    given = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == keyword), None)
    if given is None or not _is_plain(given):
        return None
    way = list(outward(source.tree, call))
    anchor = next((n for n in way if isinstance(n, ast.stmt) and n in init.body), None)
    inside = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda | ast.FunctionDef | ast.ClassDef
    if anchor is None or any(isinstance(n, inside) for n in way[: way.index(anchor)]):
        return None
    names = {n.id for n in walk(given) if isinstance(n, ast.Name)}
    # Where the statement around it binds the name too, a loop say, the name may mean something else behind it.
    if any(isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in names for n in below(anchor)):
        return None
    return anchor, ast.unparse(given)


def _is_plain(width: ast.expr) -> bool:
    while isinstance(width, ast.Attribute):
        width = width.value
    return isinstance(width, ast.Name) or (isinstance(width, ast.Constant) and type(width.value) is int)


def _free_name(owner: Class, modules: Sequence[Module]) -> str:
    taken = {n.attr for n in below(owner.node) if isinstance(n, ast.Attribute)} | set(owner.members)
    taken |= {name for module in modules for name in module.attributes}
    return next(name for name in ("relay", *(f"relay_{i}" for i in range(2, 99))) if name not in taken)


def check_program(model: ModelMap, knows: Callable[[ast.FunctionDef], bool] = lambda sorting: False) -> None:
    """Raises Refused where the program counts its parameters one by one, or compiles its modules from their source.

    `knows` says of a function that sorts parameters whether it will know the new ones.
    """
    for source in model.project.files():
        if is_vendored(source):
            continue
        found = mentions(source.tree)
        for name in found.attributes["named_parameters"]:
            around = next((n for n in outward(source.tree, name) if isinstance(n, ast.FunctionDef)), None)
            if around is not None and _stops(around) and not knows(around):
                raise Refused(f"the program sorts its parameters by name at {_short(source.location(name))} and stops"
                              " at unknown ones")  # fmt: skip
        for sorting, place in _sorts_modules(source):
            if not knows(sorting):
                raise Refused(f"the program sorts its modules by class at {_short(source.location(place))} and stops"
                              " at unknown ones")  # fmt: skip
        for place in _initialises_all(source):
            raise Refused(f"the program initialises all parameters alike at {_short(source.location(place))}, which"
                          " fails on vectors")  # fmt: skip
        for place in _compiled(source):
            raise Refused(f"modules are made into graphs at {_short(source.location(place))}, which parts that look"
                          " at sizes do not allow")  # fmt: skip


def _stops(function: ast.AST) -> bool:
    return any(isinstance(n, ast.Assert | ast.Raise) for n in below(function))


def _sorts_modules(source: SourceFile) -> Iterator[tuple[ast.FunctionDef, ast.AST]]:
    """Functions that ask each module for its class and may stop: they walk over modules, or are applied to all."""
    found = mentions(source.tree)
    for word in _WALKS:
        for walked in found.attributes[word]:
            loop = next(loops_around(source.tree, walked), None) or _loop_over(source.tree, walked)
            around = next((n for n in outward(source.tree, walked) if isinstance(n, ast.FunctionDef)), None)
            if loop is not None and around is not None and _asks_for_classes(loop) and _stops(loop):
                yield around, walked
    for applied in found.attributes["apply"]:
        call = parents(source.tree)[applied]
        given = call.args[0] if isinstance(call, ast.Call) and call.func is applied and call.args else None
        name = given.attr if isinstance(given, ast.Attribute) else given.id if isinstance(given, ast.Name) else ""
        for function in found.methods.get(name, ()):
            if _asks_for_classes(function) and _stops(function):
                yield function, applied


def _initialises_all(source: SourceFile) -> Iterator[ast.AST]:
    """Loops over parameters or modules that use an initialiser for matrices, and look at no class and no size."""
    found = mentions(source.tree)
    for word in ("parameters", "named_parameters", *_WALKS):
        for walked in found.attributes[word]:
            loop = next(loops_around(source.tree, walked), None) or _loop_over(source.tree, walked)
            if loop is None or _asks_for_classes(loop):
                continue
            attributes = {n.attr for n in below(loop) if isinstance(n, ast.Attribute)}
            if any(a.startswith(_NEED_TWO_AXES) for a in attributes) and not attributes & _SIZES:
                yield walked


def _loop_over(tree: ast.Module, walked: ast.Attribute) -> ast.stmt | None:
    """The loop whose modules an expression names."""
    statement = next((n for n in outward(tree, walked) if isinstance(n, ast.stmt)), None)
    return statement if isinstance(statement, ast.For) else None


def _asks_for_classes(part: ast.AST) -> bool:
    return any(isinstance(n, ast.Name) and n.id in ("isinstance", "type") for n in below(part))


def _compiled(source: SourceFile) -> Iterator[ast.AST]:
    found = mentions(source.tree)
    for word, home in _COMPILERS:
        for name in found.attributes[word]:
            if isinstance(name.value, ast.Attribute | ast.Name) and ast.unparse(name.value).endswith(home):
                yield name
        for statement in found.imports:
            module = statement.module or ""
            if module.startswith("torch") and (module.endswith(home) or module == f"torch.{home}"):
                yield from (statement for alias in statement.names if alias.name == word)


def _short(where: Location) -> str:
    return f"{where.path.name}:{where.line}"
