"""Which layers make query, key and value: found from the attentions, grouped by the code that constructs them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from modernizer.graph.query import is_torch, location, origin
from modernizer.graph.values import Class, Module, Node
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.rule import Modern, Refusal
from modernizer.source import Location

ROLES = ("query", "key", "value")
MODERN_FORMS = {
    "mha": "torch's own module, in which one matrix projects query, key and value",
    "torch_layer": "torch's own layers, in which one matrix projects query, key and value",
}


class Cannot(Exception):
    """Why projections are not fused, where that is seen, and what the person could change."""

    def __init__(self, reason: str, at: Location | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.at, self.hint = reason, at, hint


class DifferentInputs(Cannot):
    """Query, key and value are not all made of one input."""


@dataclass(eq=False)
class Family:
    """The layers that one piece of code makes for query, key and value, in this order."""

    calls: tuple[ast.Call, ...]  # their constructors
    modules: tuple[Sequence[Module], ...]  # for each constructor, what it has made
    contexts: list[Attention] = field(default_factory=list)
    trouble: Cannot | None = None  # another attention uses these layers in a way that is not understood

    @property
    def location(self) -> Location:
        frame = self.modules[0][0].frame
        assert frame is not None
        return location(self.calls[0], frame)

    def without_query(self) -> Family:
        """The layers of key and value alone."""
        return Family(self.calls[1:], self.modules[1:], self.contexts, self.trouble)


@dataclass(eq=False)
class Bare:
    """The products of inputs with parameters that are query, key and value, in this order."""

    products: tuple[Sequence[Node], ...]  # for each of them, in the contexts of the attention
    location: Location

    @property
    def nodes(self) -> list[Node]:
        return [node for row in self.products for node in row]

    @property
    def syntax(self) -> set[ast.AST | None]:
        """The products in the code."""
        return {node.node for node in self.nodes}

    @property
    def classes(self) -> list[ast.ClassDef]:
        """The classes that use the parameters, and those they derive from."""
        owners = [node.frame.receiver for node in self.nodes]
        mro = [cls for owner in owners if isinstance(owner, Module) and owner.cls for cls in owner.cls.mro]
        return list(dict.fromkeys(cls.node for cls in mro if isinstance(cls, Class)))

    def without_query(self) -> Bare:
        """The products that are key and value alone."""
        return Bare(self.products[1:], self.location)


@dataclass(eq=False)
class LayerList:
    """Layers of query, key and value that are items of one list, the attribute `name` of a module."""

    name: str
    modules: list[Module]  # the lists
    contexts: list[Attention]
    location: Location

    @property
    def owners(self) -> list[Module]:
        """The modules whose attribute it is."""
        return [module.owner for module in self.modules if module.owner is not None]

    @property
    def classes(self) -> list[ast.ClassDef]:
        """The classes of those, and what they derive from."""
        mro = [cls for owner in self.owners if owner.cls for cls in owner.cls.mro]
        return list(dict.fromkeys(cls.node for cls in mro if isinstance(cls, Class)))


@dataclass
class Found:
    """What the attentions of a program say about their projections."""

    families: list[Family] = field(default_factory=list)
    bare: list[Bare] = field(default_factory=list)
    lists: list[LayerList] = field(default_factory=list)
    modern: list[Modern] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def places(self) -> list[Location]:
        """Where projections are separate."""
        places = [family.location for family in self.families] + [bare.location for bare in self.bare]
        return places + [listed.location for listed in self.lists]


def find_families(model: ModelMap) -> Found:
    """The families of separate projections, the attentions that have none, and those of which it cannot be told."""
    found = Found()
    families: dict[tuple[ast.Call, ...], Family] = {}
    bare: dict[tuple[frozenset[ast.AST | None], ...], list[Attention]] = defaultdict(list)
    lists: dict[tuple[str, ast.ClassDef], LayerList] = {}
    unclear: list[tuple[Attention, Cannot]] = []
    made: dict[ast.AST, list[Module]] = defaultdict(list)
    for module in model.graph.machine.modules:
        if module.call is not None:
            made[module.call].append(module)
    for site in model.attentions:
        reasons = [_why_modern(context) for context in site.contexts]
        if all(reasons):
            found.modern.append(Modern(site.location, reasons[0]))
        for context, reason in zip(site.contexts, reasons, strict=True):
            if not reason and all(nodes and not any(n.module for n in nodes) for nodes in _projections(context)):
                bare[tuple(frozenset(n.node for n in nodes) for nodes in _projections(context))].append(context)
                continue
            listed = None if reason else _list_of(context)
            if listed is not None:
                assert context.scores.node is not None and listed.owner is not None and listed.owner.cls is not None
                scored = location(context.scores.node, context.frame)
                key = (listed.name, listed.owner.cls.node)
                group = lists.setdefault(key, LayerList(listed.name, [], [], scored))
                group.contexts.append(context)
                if listed not in group.modules:
                    group.modules.append(listed)
                continue
            try:
                calls = () if reason else _constructors(context)
            except Cannot as cannot:
                unclear.append((context, cannot))
                continue
            if calls:
                family = families.setdefault(calls, Family(calls, tuple(made[call] for call in calls)))
                family.contexts.append(context)
    found.families, found.lists = list(families.values()), list(lists.values())
    for contexts in bare.values():
        rows = zip(*map(_projections, contexts), strict=True)
        products = tuple([node for nodes in row for node in nodes] for row in rows)
        at = contexts[0].scores
        assert at.node is not None
        found.bare.append(Bare(products, location(at.node, contexts[0].frame)))
    for context, trouble in unclear:
        touched = [family for family in found.families if set(family.calls) & _layers(context)]
        for family in touched:
            family.trouble = family.trouble or trouble
        if not touched and trouble.at is not None:
            found.refusals.append(Refusal(trouble.at, trouble.reason, trouble.hint))
    found.refusals = list({(r.location, r.reason): r for r in found.refusals}.values())
    return found


def _projections(context: Attention) -> tuple[Sequence[Node], Sequence[Node], Sequence[Node]]:
    return context.query_projections, context.key_projections, context.value_projections


def _is_one_of_many(node: Node) -> bool:
    """Whether a layer is an item of a list of unknown length."""
    owner = node.module.owner if node.module is not None else None
    return owner is not None and owner.children is not None and owner.children.open


def _list_of(context: Attention) -> Module | None:
    """The list, an attribute of a module of the project, that holds all three layers."""
    owners = {node.module.owner if node.module else None for nodes in _projections(context) for node in nodes}
    (owner,) = owners if len(owners) == 1 else (None,)
    if owner is None or not all(_projections(context)) or not is_torch(owner, "ModuleList"):
        return None
    if owner.children is None or owner.children.open:
        return None
    return owner if owner.owner is not None and owner.owner.cls is not None else None


def _layers(context: Attention) -> set[ast.AST | None]:
    return {_maker(node) for nodes in _projections(context) for node in nodes if node.module}


def _maker(node: Node) -> ast.AST | None:
    """The constructor of the layer that projects, the product itself where there is no layer."""
    return origin(node.module).call if node.module is not None else node.node


def _why_modern(context: Attention) -> str:
    """Why there is nothing to fuse, '' where there may be."""
    if context.form in MODERN_FORMS:
        return MODERN_FORMS[context.form]
    if any(_is_one_of_many(node) for nodes in _projections(context) for node in nodes):
        return ""
    query, key, value = ({node.module or node.node for node in nodes} for nodes in _projections(context))
    if query == key == value and len(query) == 1:
        return "query, key and value come out of one projection"
    if key == value and len(key) == 1 and query and not query & key:
        return "key and value come out of one projection"
    return ""


def _constructors(context: Attention) -> tuple[ast.Call, ...]:
    """The constructors of the three layers; raises Cannot where there are no three."""
    at = location(context.scores.node, context.frame) if context.scores.node is not None else None
    found: dict[ast.Call, str] = {}
    for role, nodes in zip(ROLES, _projections(context), strict=True):
        if not nodes:
            raise Cannot(f"where its {role} is projected cannot be told", at)
        if any(node.module is None for node in nodes):
            raise Cannot(f"its {role} is the product with a bare parameter, not the output of a layer", at)
        if any(_is_one_of_many(node) for node in nodes):
            raise Cannot(f"which layer of its list makes its {role} cannot be told", at)
        makers = {_maker(node) for node in nodes}
        if len(makers) > 1:
            raise Cannot(f"its {role} is made of several projections", at)
        other = next((said for node in nodes if (said := _other_kind(node))), "")
        if other:
            raise Cannot(f"its {role} is projected by {other}, not by a linear layer of torch's", at)
        (maker,) = makers
        if not isinstance(maker, ast.Call):
            raise Cannot(f"how the layer of its {role} is made cannot be seen", at)
        if maker in found:
            raise Cannot(f"one piece of code makes the layers of both {found[maker]} and {role}", at)
        found[maker] = role
    return tuple(found)


def _other_kind(node: Node) -> str:
    """What projects, '' where it is a plain linear layer of torch's."""
    module = node.module
    assert module is not None
    if is_torch(module, "Linear"):
        return ""
    if module.cls is not None:
        return f"the project's own class {module.cls.name}"
    return "a convolution" if node.op.startswith("conv") else module.class_name


__all__ = ["ROLES", "Bare", "Cannot", "DifferentInputs", "Family", "Found", "LayerList", "find_families"]
