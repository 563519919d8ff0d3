"""torch's own transformer layers, whose norms no argument chooses: they become ours, told to norm by size alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from codemods._rmsnorm_mentions import bias_reads
from codemods._rmsnorm_sites import LAYERS, Refused
from codemods._swiglu_torch import OURS
from modernizer.edit import AddArgument, Edit, Replace
from modernizer.graph.values import Class, Const, External, Frame, Module, Value
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.source import Location, SourceFile
from modernizer.syntax import below, function_of

NORMS = ("norm1", "norm2", "norm3")


@dataclass(eq=False)
class TorchLayers:
    """All layers that one constructor call makes, or all of one subclass."""

    call: ast.Call | ast.ClassDef
    frame: Frame
    cls: Class | None
    modules: list[Module] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.modules[0].torch_name.rpartition(".")[2]

    @property
    def location(self) -> Location:
        return self.frame.scope.source.location(self.call)

    @property
    def is_modern(self) -> bool:
        return all(_is_asked(m) for m in self.modules)


def _is_asked(layer: Module) -> bool:
    asked = layer.args.get("rms_norm", Const(False))
    return not (isinstance(asked, Const) and not asked.value)


def torch_layers(model: ModelMap) -> list[TorchLayers]:
    """Every use of torch's layers, or of a class made from them, that has norms which torch's constructor made."""
    found: dict[ast.AST, TorchLayers] = {}
    for module in model.graph.machine.modules:
        if module.torch_name not in LAYERS or module.frame is None:
            continue
        if not isinstance(module.call, ast.Call | ast.ClassDef) or _brings_its_own(module):
            continue
        if module.cls is None and not isinstance(module.call, ast.Call):
            continue
        key: ast.AST = module.cls.node if module.cls is not None else module.call
        known = found.setdefault(key, TorchLayers(module.call, module.frame, module.cls))
        known.modules.append(module)
    return list(found.values())


def _brings_its_own(module: Module) -> bool:
    given = [module.args.get(f"custom_{part}", Const(None)) for part in ("encoder", "decoder")]
    return module.torch_name.endswith("Transformer") and not any(isinstance(g, Const) for g in given)


def torch_edits(model: ModelMap, layers: TorchLayers) -> list[Edit]:
    """The edits for one call or class. Raises Refused where there is no safe one."""
    for file in model.project.files():
        for read in bias_reads(file, NORMS, "bias"):
            raise Refused(f"line {read.lineno} of {file.path.name} reads the bias of a norm, which an RMSNorm has not")
    if layers.cls is not None:
        return _subclass(model, layers, layers.cls)
    assert isinstance(layers.call, ast.Call)
    called = _values(model, layers.call.func)
    if not called or not all(_is_torchs(v, layers) for v in called):
        raise Refused(f"nn.{layers.name} is not called by its name here", f"write the call of nn.{layers.name} out")
    return [*_renamed(layers, layers.call.func, layers.frame.scope.source), _argument(layers.call, layers.frame)]


def _values(model: ModelMap, node: ast.expr) -> list[Value]:
    return [value for _, value in model.graph.machine.at.get(node, ())]


def _is_torchs(value: Value, layers: TorchLayers) -> bool:
    return isinstance(value, External) and value.dotted == layers.modules[0].torch_name


def _renamed(layers: TorchLayers, place: ast.expr, source: SourceFile) -> Iterator[Edit]:
    if any(m.args.keys() & OURS for m in layers.modules):
        return  # ours already, for another reason
    function = function_of(source.tree, place)
    text, added = Imports(source).reference(f"modernizer.components.{layers.name}", function)
    if source.code(place) != text:
        yield Replace(source.path, place, text)
    if added is not None:
        yield added


def _argument(call: ast.Call, frame: Frame) -> Edit:
    return AddArgument(frame.path, call, "True", "rms_norm")


def _subclass(model: ModelMap, layers: TorchLayers, cls: Class) -> list[Edit]:
    what = f"{cls.name}, a subclass of nn.{layers.name},"
    if sum(isinstance(c, Class) for c in cls.mro) > 1:
        raise Refused(f"{what} has further base classes of the project")
    if any(isinstance(n, ast.Attribute) and n.attr in ("bias", "__setstate__") for n in below(cls.node)):
        raise Refused(f"{what} works with biases of its parts")
    for module in layers.modules:
        for name in NORMS:
            part = module.attributes.get(name)
            if part is not None and not (isinstance(part, Module) and part.call is module.call and part.cls is None):
                raise Refused(f"{what} has norms of its own", "make them RMSNorms there")
    bases = [b for b in cls.node.bases if any(_is_torchs(v, layers) for v in _values(model, b))]
    if len(bases) != 1:
        raise Refused(f"{what} does not name its base class")
    home = cls.scope.frame
    found: list[Edit] = list(_renamed(layers, bases[0], cls.scope.source))
    if "__init__" in cls.members:
        return [*found, AddArgument(home.path, _super_call(cls, what), "True", "rms_norm")]
    calls = {m.call: m.frame for m in layers.modules if isinstance(m.call, ast.Call) and m.frame is not None}
    if not calls:
        raise Refused(f"{what} is constructed out of sight")
    for call, frame in calls.items():
        if not all(isinstance(v, Class) and v.node is cls.node for v in _values(model, call.func)):
            raise Refused(f"{what} is not called by its name")
        found.append(_argument(call, frame))
    return found


def _super_call(cls: Class, what: str) -> ast.Call:
    calls = [
        node
        for node in ast.walk(cls.members["__init__"])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "__init__"
        and isinstance(node.func.value, ast.Call)
        and isinstance(node.func.value.func, ast.Name)
        and node.func.value.func.id == "super"
    ]
    if len(calls) != 1:
        raise Refused(f"{what} does not call super().__init__ once")
    return calls[0]


__all__ = ["TorchLayers", "torch_edits", "torch_layers"]
