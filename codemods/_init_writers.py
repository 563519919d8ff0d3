"""What writes to the residual stream of each stack, and how the constructor of the whole model can name it."""

from __future__ import annotations

import ast
import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._survey import Cannot
from modernizer.graph.query import IDENTITY, ancestors, is_none, is_torch, location, strip_views
from modernizer.graph.values import Class, Const, Many, Module, Node, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.projection import Projection, Projections, own_parameters
from modernizer.model_map.residual import LAYOUT, Residual
from modernizer.model_map.stack import PLAIN, Stack
from modernizer.source import Location

THROUGH = IDENTITY | LAYOUT | {"item", "getitem"}
DROPS = frozenset({"DropPath", "StochasticDepth"})
LAYER_WRITERS = {
    "TransformerEncoderLayer": (".self_attn.out_proj", ".linear2"),
    "TransformerDecoderLayer": (".self_attn.out_proj", ".multihead_attn.out_proj", ".linear2"),
}
Steps = tuple[str, ...]  # from the model to a part of it: attributes and places


@dataclass(eq=False)
class Writers:
    """The projections of one stack, by the list of its layers: `.layers` with `.attention.out` and `.ff[2]`.

    `model` is the module whose constructor can name them all; `stream` what comes into the stack.
    """

    model: Module
    location: Location
    lists: dict[str, list[str]] = field(default_factory=dict)
    weights: list[Value] = field(
        default_factory=list
    )  # the modules or weights that are meant, as far as they are known
    modules: list[Module] = field(default_factory=list)
    streams: list[Node] = field(default_factory=list)
    sums: list[tuple[Residual, tuple[object, ...]]] = field(default_factory=list)  # with the way from the stack to each
    of_sum: dict[int, list[Module]] = field(default_factory=dict)

    def by_sum(self, r: Residual) -> list[Module]:
        """What writes at one sum."""
        return self.of_sum.get(id(r), [])


def find_writers(model: ModelMap) -> Iterator[Writers | tuple[Location, Cannot]]:
    """What writes in each stack of the program, or why that cannot be said."""
    projections = model.derived(_projections)
    stacks: defaultdict[tuple[object, int], list[Stack]] = defaultdict(list)
    for stack in model.stacks.all:
        root = _root(stack)
        if stack.attends and stack.kind != PLAIN and stack.node is not None and root is not None:
            stacks[stack.node, id(root)].append(stack)
    for same in stacks.values():
        first = same[0]
        assert first.node is not None
        where = location(first.node, first.frame)
        try:
            yield _of_stack(projections, same, where)
        except Cannot as cannot:
            yield where, cannot
    for node in model.graph.machine.nodes:
        is_stack = node.op in ("torch_encoder", "torch_decoder", "torch_transformer") and node.args
        if is_stack and node.module is not None and node.node is not None:
            where = location(node.node, node.frame)
            try:
                yield from list(_of_torch(node, node.module, where))
            except Cannot as cannot:
                yield where, cannot


def _of_torch(node: Node, stack: Module, where: Location) -> Iterator[Writers]:
    """One of torch's own stacks, which holds copies of a layer of torch's; an nn.Transformer holds two of them."""
    kinds = {"torch_encoder": ["Encoder"], "torch_decoder": ["Decoder"], "torch_transformer": ["Encoder", "Decoder"]}
    root = outermost(stack)
    for number, kind in enumerate(kinds[node.op]):
        layer = stack.args.get(f"{kind.lower()}_layer")
        inner = f".{kind.lower()}" if node.op == "torch_transformer" else ""
        given = stack.args.get(f"custom_{kind.lower()}", Const(None))
        known = is_none(given) if inner else is_torch(layer, f"Transformer{kind}Layer")
        if stack.cls is not None or not known:
            raise Cannot("the layers of this stack are not torch's own", where)
        container = "".join(_path(stack, root)) + f"{inner}.layers"
        stream = node.args[number] if inner and len(node.args) > 1 else node.args[0]
        found = Writers(root, where, streams=[stream] if isinstance(stream, Node) else [])
        found.lists[container] = list(LAYER_WRITERS[f"Transformer{kind}Layer"])
        yield found


def _projections(model: ModelMap) -> Projections:
    return Projections(model.graph)


def _root(stack: Stack) -> Module | None:
    """The model that holds the module which runs a stack."""
    module = stack.frame.receiver
    if not isinstance(module, Module):
        return None
    return outermost(module)


def outermost(module: Module) -> Module:
    """The model that a module is a part of."""
    while isinstance(module.owner, Module):
        module = module.owner
    return module


def _of_stack(projections: Projections, stacks: Sequence[Stack], where: Location) -> Writers:
    root = _root(stacks[0])
    assert root is not None
    found = Writers(root, where)
    named: list[tuple[tuple[object, ...], Module, str]] = []
    for stack in stacks:
        found.streams.append(stack.residuals[0].stream)
        for r in stack.residuals:
            found.sums.append((r, _way(r, stack)))
            for module, rest in _written(projections, r):
                named.append((_way(r, stack), module, rest))
                found.modules.append(module)
                found.of_sum.setdefault(id(r), []).append(module)
                weight = module.attributes.get(rest[1:]) if rest else module
                found.weights += [weight] if weight is not None else []
    found.lists = _lists(named, root, where)
    return found


def named_lists(modules: Sequence[tuple[tuple[object, ...], Module]], found: Writers) -> dict[str, list[str]]:
    """Other modules of a stack's layers, by what they have in common, as the constructor of the model names them."""
    return _lists([(key, module, "") for key, module in modules], found.model, found.location)


def _lists(
    named: Sequence[tuple[tuple[object, ...], Module, str]], root: Module, where: Location
) -> dict[str, list[str]]:
    """By the list of a stack's layers, how each element names modules that have a way and an ending in common."""
    groups: defaultdict[tuple[object, str], dict[Steps, Module]] = defaultdict(dict)
    for way, module, rest in named:
        groups[way, rest].setdefault(_path(module, root), module)
    lists: dict[str, list[str]] = {}
    for (_, rest), paths in groups.items():
        container, inside = _common(list(paths), root, where)
        text = f"{inside}{rest}"
        if text in lists.setdefault(container, []):
            raise Cannot("one layer writes to the stream several times", where)
        lists[container].append(text)
    return lists


def _way(r: Residual, stack: Stack) -> tuple[object, ...]:
    """The calls from the stack down to a sum: one class may hold the sum of several sublayers."""
    frames = list(r.frame.outward())
    return r.sum.node, *(f.call for f in frames[: frames.index(stack.frame)])


def _written(projections: Projections, r: Residual) -> list[tuple[Module, str]]:
    """The modules whose weights write a branch, and how those are named from there."""
    if r.layer is not None:
        if r.layer.cls is not None:
            raise Cannot("a layer is a class of the program that is made from torch's", _at(r))
        return [(r.layer, rest) for rest in LAYER_WRITERS[r.layer.torch_name.rpartition(".")[2]]]
    found = {(id(module), rest): (module, rest) for module, rest in _ends(projections, r.branch, r)}
    if len(found) != 1:
        raise Cannot("what writes to the stream depends on how the model is made", _at(r))
    return list(found.values())


def _ends(projections: Projections, value: Value, r: Residual) -> list[tuple[Module, str]]:
    """The projections behind a branch, apart from what only moves, drops or scales what they put out."""
    if not isinstance(value, Node) or id(value) not in r.between:
        raise Cannot("a branch does not end in a projection", _at(r))
    projection = projections.at(value)
    if projection is not None:
        return [(projection.module, _weight_of(projection, r))]
    if value.op == "mha" and value.module is not None and is_torch(value.module, "MultiheadAttention"):
        return [(value.module, ".out_proj")]
    if value.op in ("matmul", "einsum", "linear") and value.module is None:
        return [_raw(value, r)]
    if value.op == "merge":
        return [end for option in value.args for end in _ends(projections, option, r)]
    if value.op in ("mul", "div"):
        if any(map(_is_learned, value.args)):
            raise Cannot("a branch has a learned scale of its own already", _at(r))
        return _one_of(projections, value.args, r)
    drops = value.op == "opaque" and value.module is not None and value.module.class_name in DROPS
    if (value.op in THROUGH or drops) and value.args:
        return _ends(projections, value.args[0], r)
    raise Cannot("a branch does not end in a projection", _at(r))


def _one_of(projections: Projections, factors: Sequence[Value], r: Residual) -> list[tuple[Module, str]]:
    """The projections behind the one factor that has any."""
    found: list[list[tuple[Module, str]]] = []
    for factor in factors:
        with contextlib.suppress(Cannot):
            found.append(_ends(projections, factor, r))
    if len(found) != 1:
        raise Cannot("a branch does not end in a projection", _at(r))
    return found[0]


def _weight_of(projection: Projection, r: Residual) -> str:
    """How the weight is named from its module, '' where that is `weight`."""
    if projection.kind != "own" or "weight" in projection.module.attributes:
        return ""
    named = own_parameters(projection)
    if named is None:
        raise Cannot(f"what the weight of {projection.module.class_name} is called cannot be said", _at(r))
    return f".{named[0]}"


def _at(r: Residual) -> Location | None:
    return location(r.sum.node, r.frame) if r.sum.node is not None else None


def _is_learned(value: Value) -> bool:
    """Whether a factor is a parameter, perhaps in another shape."""
    return (isinstance(value, Node) and (end := strip_views(value)) is not value and _is_learned(end)) or (
        isinstance(value, Node) and value.op == "parameter")  # fmt: skip


def _raw(product: Node, r: Residual) -> tuple[Module, str]:
    """A weight without a module of its own: `x @ self.w_o`."""
    for operand in product.args:
        weight = operand
        while isinstance(weight, Node) and weight.op in ("t", "mT", "transpose") and weight.args:
            weight = weight.args[0]
        if isinstance(weight, Node) and weight.op == "parameter":
            for frame in product.frame.outward():
                holder = frame.receiver
                names = [k for k, v in holder.attributes.items() if v is weight] if isinstance(holder, Module) else []
                if names and isinstance(holder, Module):
                    return holder, f".{names[0]}"
    raise Cannot("a branch does not end in a projection", _at(r))


def _path(module: Module, root: Module) -> Steps:
    """From the model to a module; raises Cannot where it is not held by it."""
    steps: list[str] = []
    current = module
    while current is not root:
        if not isinstance(current.owner, Module):
            raise Cannot(f"where {module.class_name} sits in the model cannot be said", None)
        if current.owner.children is None:
            steps.append(f".{current.name}")
        elif is_torch(current.owner, "ModuleDict"):
            steps.append(f'["{current.name}"]')
        else:
            steps.append(f"[{current.name}]")
        current = current.owner
    return tuple(reversed(steps))


def _common(paths: Sequence[Steps], root: Module, where: Location) -> tuple[str, str]:
    """The list in which paths differ, and what follows in each of its elements."""
    if len({len(p) for p in paths}) > 1:
        raise Cannot("the layers of this stack are built in different ways", where)
    differ = [i for i, parts in enumerate(zip(*paths, strict=True)) if len(set(parts)) > 1]
    if not differ:
        raise Cannot("one layer runs several times", where)
    if len(differ) > 1:
        raise Cannot("the layers of this stack are in several lists", where)
    at = differ[0]
    container = root
    for step in paths[0][:at]:
        container = _step(container, step)
    if not all(p[at].startswith("[") and p[at][1:-1].isdigit() for p in paths):
        raise Cannot("the layers of this stack are in no list", where)
    children = container.children
    if children is None or len({_kind(c) for c in children.items}) > 1:
        raise Cannot("the list of this stack's layers holds other modules too", where)
    if not children.open and len(paths) < len(children.items):
        raise Cannot("not all layers of this list write to the stream", where)
    return "".join(paths[0][:at]), "".join(paths[0][at + 1 :])


def _kind(value: Value) -> object:
    if not isinstance(value, Module):
        return None
    return value.cls.node if isinstance(value.cls, Class) else value.torch_name


def _step(module: Module, step: str) -> Module:
    if step.startswith("."):
        inner = module.attributes.get(step[1:])
    else:
        children = module.children or Many([])
        inner = next((c for c in children.items if isinstance(c, Module) and c.name == step[1:-1].strip('"')), None)
    if not isinstance(inner, Module):
        raise Cannot("where the layers sit in the model cannot be said", None)
    return inner


def find_embeddings(model: ModelMap, root: Module, streams: Sequence[Node]) -> list[str]:
    """The tables of a model whose rows come into its streams, as its constructor names them."""
    found: dict[str, None] = {}
    for node in (n for stream in streams for n in ancestors(stream).values()):
        module = node.module
        if node.op == "embedding" and module is not None and _is_drawn(model, module):
            with contextlib.suppress(Cannot):  # where it is handed in from outside
                found["".join(_path(module, root))] = None
    return list(found)


def _is_drawn(model: ModelMap, module: Module) -> bool:
    """Whether a table is made at random, and not of one that is there, as by `from_pretrained`."""
    if module.torch_name != "torch.nn.Embedding" or "_weight" in module.args:
        return False
    func = module.call.func if isinstance(module.call, ast.Call) else None
    makers = [v for _, v in model.graph.machine.at.get(func, ())] if func is not None else []
    return any(isinstance(v, Class) or getattr(v, "dotted", "") == "torch.nn.Embedding" for v in makers)
