"""The layer norms of the programs that attend: what makes them, and in which program."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from modernizer.graph.query import is_none
from modernizer.graph.scope import Scope
from modernizer.graph.values import Class, External, Frame, Module, Node, Package, Partial, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.norm import Norm
from modernizer.source import Location

LAYER_NORM, RMS_NORM = "torch.nn.LayerNorm", "torch.nn.RMSNorm"
LAYERS = frozenset({"torch.nn.TransformerEncoderLayer", "torch.nn.TransformerDecoderLayer", "torch.nn.Transformer"})

DIRECT, HANDED, OWN, DERIVED, CALL = "direct", "handed", "own", "derived", "call"


class Refused(Exception):
    """Why a norm is left alone, and what its author could change."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(eq=False)
class Site:
    """One expression that makes layer norms, or is one: all that it was seen to make, in which programs.

    `kind` says how: torch's class is called by its name (`direct`) or through a variable (`handed`), a class of the
    program that writes the formula out (`own`) or that is made from torch's (`derived`) is, or it is a call of
    `F.layer_norm`. `frame` is one activation in which the call is evaluated, `norms` what of it was seen to run.
    """

    kind: str
    call: ast.Call
    frame: Frame
    modules: list[Module] = field(default_factory=list)
    programs: set[int] = field(default_factory=set)
    norms: list[Norm] = field(default_factory=list)

    @property
    def location(self) -> Location:
        return self.frame.scope.source.location(self.call)

    @property
    def cls(self) -> Class | None:
        return self.modules[0].cls if self.modules else None


def program_of(frame: Frame) -> int:
    """What is put together at once: a model and everything that its constructor, or one factory, makes."""
    *_, last = frame.outward()
    return id(last)


def attending(model: ModelMap) -> set[int]:
    """The programs in which a residual branch attends, or one of torch's transformer classes does."""
    found: set[int] = set()
    for residual in model.residuals.all:
        frames = list(residual.frame.outward())
        programs = {program_of(f.receiver.frame) for f in frames if isinstance(f.receiver, Module) and f.receiver.frame}
        if not programs <= found and residual.attends:
            found |= programs
    for module in model.graph.machine.modules:
        if module.torch_name in LAYERS and module.frame is not None:
            found.add(program_of(module.frame))
    return found


def sites(model: ModelMap) -> list[Site]:
    """Every place where a layer norm of an attending program is made, in the order of evaluation."""
    machine = model.graph.machine
    programs: set[int] | None = None
    found: dict[ast.AST, Site] = {}
    own = {
        n.module.cls.node
        for n in model.norms.all
        if n.kind == "layer" and n.inner is not None and n.module is not None and n.module.cls is not None
    }
    for module in machine.modules:
        kind = _kind(model, module, own)
        if not kind or module.frame is None:
            continue
        if programs is None:
            programs = attending(model)
        assert isinstance(module.call, ast.Call)
        site = found.setdefault(module.call, Site(kind, module.call, module.frame))
        site.modules.append(module)
        site.programs.add(program_of(module.frame))
    for norm in model.norms.all:
        if norm.kind == "layer" and norm.module is None and norm.inner is None and norm.call is not None:
            if programs is None:
                programs = attending(model)
            site = found.setdefault(norm.call, Site(CALL, norm.call, norm.frame))
            site.programs |= {
                program_of(f.receiver.frame)
                for f in norm.frame.outward()
                if isinstance(f.receiver, Module) and f.receiver.frame is not None
            }
    by_module = {id(m): site for site in found.values() for m in site.modules}
    for norm in model.norms.all:
        holder = by_module.get(id(norm.module)) if norm.module is not None else found.get(norm.call or ast.Pass())
        if holder is not None:
            holder.norms.append(norm)
    return [site for site in found.values() if programs and site.programs & programs]


def _kind(model: ModelMap, module: Module, own: set[ast.ClassDef]) -> str:
    call = module.call
    if not isinstance(call, ast.Call) or module.frame is None:
        return ""
    if module.cls is not None:
        if module.torch_name == LAYER_NORM:
            return DERIVED
        return OWN if module.cls.node in own else ""
    if module.torch_name != LAYER_NORM:
        return ""
    made = [v for f, v in model.graph.machine.at.get(call.func, ()) if f is module.frame]
    if not made or not all(_makes_layer_norms(v) for v in made):
        return ""  # a norm of torch's own layers, whose call this is
    is_named = all(isinstance(v, External) and v.dotted == LAYER_NORM for v in made)
    named = resolved(call.func, module.frame.scope)
    return DIRECT if is_named and isinstance(named, External) and named.dotted == LAYER_NORM else HANDED


def _makes_layer_norms(value: Value) -> bool:
    return any(isinstance(v, External) and v.dotted == LAYER_NORM for v in classes_of(value))


def classes_of(value: Value) -> Iterator[Value]:
    """What a call of a value calls: its alternatives, and what a partial is of; what is not known is left out."""
    if isinstance(value, Partial):
        yield from classes_of(value.function)
    elif isinstance(value, Node) and value.op == "merge":
        for option in value.args:
            if not is_none(option):
                yield from classes_of(option)
    elif not isinstance(value, Node):
        yield value


def resolved(node: ast.expr, scope: Scope) -> Value | None:
    """What a name or dotted name is bound to at the top level of a file."""
    if isinstance(node, ast.Name):
        return scope.lookup(node.id)
    if isinstance(node, ast.Attribute):
        base = resolved(node.value, scope)
        if isinstance(base, External | Package):
            return scope.scopes.member(base, node.attr)
    return None
