"""Projections in a list of layers, `self.layers = clones(nn.Linear(d, d), 4)`: the first three become one layer."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codemods._fuse_calls import Site, check_run, join_calls, joint_call, may_be_one, products_site
from codemods._fuse_definitions import linear_arguments
from codemods._fuse_families import Cannot, LayerList
from codemods._fuse_layout import copies_needed
from codemods._fuse_uses import Calls, Uses
from modernizer.edit import Edit, Replace
from modernizer.graph.query import is_torch, origin
from modernizer.graph.values import Class, Module, Node
from modernizer.source import SourceFile
from modernizer.syntax import below, free_name, function_of, names_in, walk

PARTS = 3
Comprehension = ast.ListComp | ast.GeneratorExp


@dataclass(eq=False)
class Loop:
    """`[layer(x).view(…) for layer, x in zip(self.layers, (query, key, value))]`"""

    source: SourceFile
    function: ast.FunctionDef
    receiver: str
    node: Comprehension
    layers: ast.expr  # `self.layers`
    inputs: Sequence[ast.expr]
    call: ast.Call  # `layer(x)`
    copy: str = ""
    shares: bool = field(default=False)

    @property
    def one_input(self) -> bool:
        return len({ast.dump(given) for given in self.inputs}) == 1


@dataclass(eq=False)
class Layers:
    """The layers of a list as a constructor makes them, and everything that reads them."""

    source: SourceFile
    owner: ast.ClassDef
    init: ast.FunctionDef
    receiver: str
    statement: ast.Assign
    name: str
    count: int
    maker: ast.Call
    listed: LayerList
    sites: list[Site] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    others: list[tuple[Path, ast.Subscript]] = field(default_factory=list)  # reads of the layers behind the first three

    @property
    def plain(self) -> bool:
        """Whether one input serves all, so that torch's own layer will do."""
        return all(site.one_input for site in self.sites) and all(loop.one_input for loop in self.loops)

    @property
    def has_bias(self) -> bool | None:
        bias = self.arguments.get("bias")
        return True if bias is None else bool(bias.value) if isinstance(bias, ast.Constant) else None

    @property
    def arguments(self) -> dict[str, ast.expr]:
        return linear_arguments(self.maker, self.listed.location)


def read_layers(listed: LayerList, uses: Uses) -> Layers:
    """The list of layers, checked; raises Cannot where its first three cannot become one."""
    made = _definition(listed, uses)
    _check_instances(made, uses)
    uses.check_strings(made.name)
    uses.check_inside(made.owner, listed.owners)
    called: dict[ast.FunctionDef, dict[str, list[ast.expr]]] = defaultdict(lambda: defaultdict(list))
    for use in uses.reads(made.owner, made.name, [made.statement]):
        method = uses.method(use, made.name)
        around = uses.removal.parent(use)
        index = _index(around, made) if isinstance(around, ast.Subscript) else None
        if isinstance(around, ast.Subscript) and index is not None:
            call = uses.removal.parent(around)
            if index >= PARTS:
                made.others.append((uses.source(use).path, around))
            elif isinstance(call, ast.Call) and call.func is around and len(call.args) == 1 and not call.keywords:
                called[method][str(index)].append(call)
            else:
                raise Cannot(
                    f"`{ast.unparse(around)}` is not only called: {uses.shown(use)}", uses.removal.location(use)
                )
        elif isinstance(around, ast.Call) and isinstance(use, ast.Attribute):
            made.loops.append(_loop(around, use, method, made, uses))
        else:
            raise Cannot(
                f"`{made.name}` is not only read layer by layer: {uses.shown(use)}", uses.removal.location(use)
            )
    if called or not made.loops:
        made.sites = [_site(calls, uses) for calls in uses.together(called, list("012"), listed.location)]
    if not any(site.shares for site in made.sites) and not any(loop.shares for loop in made.loops):
        raise Cannot("no two of its layers are ever seen to read one tensor", listed.location)
    return made


def _definition(listed: LayerList, uses: Uses) -> Layers:
    """The only statement that makes the list, in the constructor of a class."""
    at = listed.location
    found: dict[ast.Assign, ast.ClassDef] = {}
    for cls in listed.classes:
        for use in uses.reads(cls, listed.name, ()):
            if isinstance(getattr(use, "ctx", None), ast.Store):
                statement = uses.removal.parent(use)
                if not (isinstance(statement, ast.Assign) and statement.targets == [use]):
                    raise Cannot(f"`{listed.name}` is not made by a plain assignment", at)
                found[statement] = cls
    if len(found) != 1:
        raise Cannot(f"`{listed.name}` is not made in one place", at)
    (statement,) = found
    source = uses.source(statement)
    init = function_of(source.tree, statement)
    owner = source.parents.get(init) if init is not None else None
    if not (
        isinstance(init, ast.FunctionDef)
        and init.name == "__init__"
        and statement in init.body
        and isinstance(owner, ast.ClassDef)
    ):
        raise Cannot(f"`{listed.name}` is not made in the constructor of a class", at)
    items = [layers.children.items if layers.children else [] for layers in listed.modules]
    makers = {origin(child).call for row in items for child in row if isinstance(child, Module)}
    (maker,) = makers if len(makers) == 1 else (None,)
    if not isinstance(maker, ast.Call) or maker not in below(statement.value):
        raise Cannot("its layers are not made by one expression where the list is", at)
    bound = {n.id for n in below(statement.value) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    if bound & {n.id for n in below(maker) if isinstance(n, ast.Name)}:
        raise Cannot("the layers of its list are not alike", at)
    counts = {len(row) for row in items}
    if len(counts) > 1 or not counts <= {PARTS, PARTS + 1}:
        raise Cannot("how many layers are in its list cannot be told, or there are more than four", at)
    receiver = init.args.args[0].arg
    return Layers(source, owner, init, receiver, statement, listed.name, counts.pop(), maker, listed)


def _check_instances(made: Layers, uses: Uses) -> None:
    """Every such list must be what it seems, and its first three layers query, key and value in some order."""
    at = made.listed.location
    lists = [m for m in uses.machine.modules if m.name == made.name and m.owner is not None and m.owner.cls is not None
             and made.owner in [c.node for c in m.owner.cls.mro if isinstance(c, Class)]]  # fmt: skip
    for module in lists:
        children = module.children
        if not is_torch(module, "ModuleList") or children is None or children.open:
            raise Cannot(f"what is in `{made.name}` cannot be told", at)
        for child in children.items:
            if not (isinstance(child, Module) and is_torch(child, "Linear") and origin(child).call is made.maker):
                raise Cannot(f"`{made.name}` holds other things than linear layers of one kind", at)
            if child.owner is not module:
                raise Cannot(f"a layer of `{made.name}` is also part of another module", at)
    for context in made.listed.contexts:
        rows = (context.query_projections, context.key_projections, context.value_projections)
        places = [{node.module.name for node in row if node.module} for row in rows]
        if sorted("".join(sorted(place)) for place in places) != ["0", "1", "2"]:
            raise Cannot("query, key and value are not the first three layers of its list", at)


def _index(node: ast.Subscript, made: Layers) -> int | None:
    try:
        index = ast.literal_eval(node.slice)
    except ValueError:
        return None
    if not isinstance(index, int) or not -made.count <= index < made.count:
        return None
    return index % made.count


def _site(calls: Calls, uses: Uses) -> Site:
    """Calls by constant places: `self.layers[0](query)` and so on."""
    given = [call.args[0] for call in calls.calls if isinstance(call, ast.Call)]
    receiver = calls.function.args.args[0].arg
    return products_site(calls, given, receiver, uses.source(calls.function), uses.machine)


def _loop(zipped: ast.Call, use: ast.Attribute, method: ast.FunctionDef, made: Layers, uses: Uses) -> Loop:
    """The comprehension that goes over the layers; raises Cannot where it is none that is understood."""
    source = uses.source(use)
    generator = source.parents.get(zipped)
    node = source.parents.get(generator) if isinstance(generator, ast.comprehension) else None
    unknown = Cannot(f"`{made.name}` is gone through in a way that is not understood: {uses.shown(use)}",
                     uses.removal.location(use))  # fmt: skip
    if not (isinstance(generator, ast.comprehension) and isinstance(node, Comprehension)):
        raise unknown
    is_zip = isinstance(zipped.func, ast.Name) and zipped.func.id == "zip" and not zipped.keywords
    target = generator.target
    if not is_zip or len(zipped.args) != 2 or len(node.generators) != 1 or generator.ifs or generator.is_async:
        raise unknown
    place = zipped.args.index(use)
    others = zipped.args[1 - place]
    if not (isinstance(target, ast.Tuple) and len(target.elts) == 2 and isinstance(others, ast.Tuple | ast.List)):
        raise unknown
    layer, given = target.elts[place], target.elts[1 - place]
    if not (isinstance(layer, ast.Name) and isinstance(given, ast.Name) and layer.id != given.id):
        raise unknown
    if len(others.elts) != PARTS or any(isinstance(e, ast.Starred) for e in others.elts):
        raise unknown
    reads = [n for n in below(node.elt) if isinstance(n, ast.Name) and n.id == layer.id]
    call = source.parents.get(reads[0]) if len(reads) == 1 else None
    if not (isinstance(call, ast.Call) and call.func is reads[0] and len(call.args) == 1 and not call.keywords):
        raise unknown
    if not (isinstance(call.args[0], ast.Name) and call.args[0].id == given.id):
        raise unknown
    if any(isinstance(n, ast.NamedExpr | ast.Await | ast.Yield | ast.Lambda | Comprehension) for n in below(node.elt)):
        raise unknown
    loop = Loop(source, method, method.args.args[0].arg, node, use, others.elts, call)
    _look_at_runs(loop, uses)
    return loop


def _look_at_runs(loop: Loop, uses: Uses) -> None:
    machine, at = uses.machine, loop.source.location(loop.call)
    if any(isinstance(n, ast.Call) for given in loop.inputs for n in below(given)):
        raise Cannot("the input of a layer is computed in its call", at, "give it a name before the calls")
    if loop.call not in machine.at:
        raise Cannot("a call of its layers is never reached", at)
    runs: dict[int, list[Node]] = defaultdict(list)
    for frame, value in machine.at[loop.call]:
        if not isinstance(value, Node) or value.op != "linear":
            raise Cannot("a layer gives something else than its product", at)
        runs[id(frame)].append(value)
        loop.copy = max(loop.copy, copies_needed(value), key=["", "contiguous", "clone"].index)
    inputs = [[value for _, value in machine.at.get(given, ())] for given in loop.inputs]
    loop.shares = loop.one_input or any(may_be_one(a, b) or may_be_one(b, c) for a, b, c in zip(*inputs, strict=False))
    for products in runs.values():
        check_run(products, [product.args[0] for product in products], machine, at)


# -- the edits


def layer_edits(made: Layers, attribute: str, rest: str, reference: str) -> Iterator[Edit]:
    """One layer, and one more for what was behind it, in the place of the list; and what reads them."""
    source, given = made.source, made.arguments
    outputs = source.code(given["out_features"])
    factor = outputs if isinstance(given["out_features"], ast.Name | ast.Attribute | ast.Constant) else f"({outputs})"
    parts = [source.code(given["in_features"]), f"{PARTS} * {factor}" if made.plain else f"{PARTS} * [{outputs}]"]
    parts += [f"{name}={source.code(given[name])}" for name in ("bias", "device", "dtype") if name in given]
    code = f"{made.receiver}.{attribute} = {reference}({', '.join(parts)})\n"
    if made.count > PARTS:
        code += f"{made.receiver}.{rest} = {source.code(made.maker)}\n"
    yield Replace(source.path, made.statement, code)
    splits = f".chunk({PARTS}, dim=-1)" if made.plain else ""
    for site in made.sites:
        yield from join_calls(site, joint_call(site, attribute) + splits)
    for loop in made.loops:
        yield from _loop_edits(loop, attribute, splits)
    for path, node in made.others:
        receiver = next(n.id for n in walk(node.value) if isinstance(n, ast.Name))
        yield Replace(path, node, f"{receiver}.{rest}")


def _loop_edits(loop: Loop, attribute: str, splits: str) -> Iterator[Edit]:
    path, generator = loop.source.path, loop.node.generators[0]
    texts = [loop.source.code(given) for given in loop.inputs]
    joined = f"{loop.receiver}.{attribute}({', '.join(texts[:1] if loop.one_input else texts)}){splits}"
    given, own = loop.call.args[0], loop.call.func
    assert isinstance(given, ast.Name) and isinstance(own, ast.Name)
    is_read = any(isinstance(n, ast.Name) and n.id == given.id and n is not given for n in below(loop.node.elt))
    if is_read:
        name = own.id
        yield Replace(path, loop.layers, joined)
    else:
        taken = names_in(loop.function)
        name = "part" if "part" not in taken else free_name("part", taken)
        yield Replace(path, generator.target, name)
        yield Replace(path, generator.iter, joined)
    yield Replace(path, loop.call, f"{name}.{loop.copy}()" if loop.copy else name)


__all__ = ["PARTS", "Layers", "layer_edits", "read_layers"]
