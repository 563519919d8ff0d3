"""torch's own transformer layers: the constructor call, or the base class of a subclass, becomes ours."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from codemods._swiglu_activation import Reference
from codemods._swiglu_branches import unreached_reads
from codemods._swiglu_gate import Wishes
from codemods._swiglu_places import Refused, Uses
from modernizer.edit import AddArgument, Delete, Edit, Replace
from modernizer.graph.query import alternatives, is_const, is_none
from modernizer.graph.torch_api import MODULE_OPS, function_operation
from modernizer.graph.values import Class, Const, External, Frame, Module, Node, Value
from modernizer.model_map.activation import RELU_FAMILY
from modernizer.model_map.feed_forward import CHOSEN, FeedForward
from modernizer.source import SourceFile
from modernizer.syntax import every_node, walk

LAYERS = ("torch.nn.TransformerEncoderLayer", "torch.nn.TransformerDecoderLayer")
STACK = "torch.nn.Transformer"
OURS = frozenset({"rotary", "alibi", "gated", "keep_hidden", "beta", "rms_norm"})  # keywords that only our classes take
PARTS = ("linear1", "linear2", "activation")


@dataclass(eq=False)
class TorchLayers:
    """All layers that one constructor call makes, or all of one subclass (whose `call` may be its definition)."""

    modules: list[Module]
    call: ast.Call | ast.ClassDef
    frame: Frame
    cls: Class | None = None

    @property
    def name(self) -> str:
        return self.modules[0].torch_name.rpartition(".")[2]

    @property
    def is_gated(self) -> bool:
        return all(is_gated(m) for m in self.modules)


def is_gated(layer: Module) -> bool:
    """Whether a layer of torch's, or rather ours, was asked to be gated."""
    gated = layer.args.get("gated", Const(False))
    return not (isinstance(gated, Const) and not gated.value)


def torch_layers(uses: Uses) -> Iterator[TorchLayers]:
    """Every use of torch's transformer layers that has a feed-forward of torch's own."""
    plain: dict[ast.Call, TorchLayers] = {}
    subclasses: dict[ast.ClassDef, TorchLayers] = {}
    for module in uses.machine.modules:
        if module.torch_name not in (*LAYERS, STACK) or module.frame is None:
            continue
        if isinstance(module.call, ast.ClassDef) and module.cls is not None and module.torch_name == STACK:
            if _has_torchs_parts(module, module.cls):  # a model that is torch's whole transformer itself
                made = TorchLayers([], module.call, module.frame, module.cls)
                subclasses.setdefault(module.cls.node, made).modules.append(module)
        elif not isinstance(module.call, ast.Call):
            continue
        elif module.cls is not None:
            if _has_torchs_parts(module, module.cls):
                made = TorchLayers([], module.call, module.frame, module.cls)
                subclasses.setdefault(module.cls.node, made).modules.append(module)
        elif module.torch_name != STACK or not _brings_its_own_layers(module):
            plain.setdefault(module.call, TorchLayers([], module.call, module.frame)).modules.append(module)
    yield from plain.values()
    yield from subclasses.values()


def _has_torchs_parts(module: Module, cls: Class) -> bool:
    """Whether an instance of a subclass has a feed-forward that torch's constructor made."""
    if cls.torch_base() in LAYERS:
        return all(name in module.attributes for name in PARTS)
    stacks = [module.attributes.get(name) for name in ("encoder", "decoder")]
    is_made = any(isinstance(part, Module) and part.call is module.call for part in stacks)
    return cls.torch_base() == STACK and is_made


def _brings_its_own_layers(stack: Module) -> bool:
    return all(not is_none(stack.args.get(f"custom_{part}", Const(None))) for part in ("encoder", "decoder"))


def _reached_parts(source: SourceFile) -> Iterator[ast.Attribute]:
    """`layer.linear1` for any layer but `self`, unless it is only to fill a weight."""
    for node in every_node(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in ("linear1", "linear2"):
            parent = source.parents.get(node)
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            fills = isinstance(parent, ast.Attribute) and parent.attr in ("weight", "bias")
            if not of_self and not fills:
                yield node


def _names(activation: Value) -> Iterator[str]:
    """What an activation that is handed to a layer of torch's is called; `chosen by name` where that is open."""
    if isinstance(activation, Const) and isinstance(activation.value, str):
        yield activation.value
    elif isinstance(activation, External):
        yield function_operation(activation.dotted) or CHOSEN
    elif isinstance(activation, Module) and activation.cls is None:
        operation = MODULE_OPS.get(activation.torch_name.rpartition(".")[2], CHOSEN)
        is_exact = operation != "gelu" or not activation.args
        yield operation if is_exact else "gelu (tanh)"
    else:
        yield CHOSEN


class TorchEdits:
    """Makes torch's layers gated ones of ours."""

    def __init__(
        self,
        uses: Uses,
        found: Sequence[FeedForward],
        sources: Sequence[SourceFile],
        reference: Reference,
        wishes: Wishes,
    ) -> None:
        self.uses = uses
        self.reference = reference
        self.wishes = wishes
        self.reaching = [node for source in sources for node in _reached_parts(source)]
        self.by_layer: dict[int, list[FeedForward]] = defaultdict(list)
        for made in found:
            layer = made.first.module.owner
            if layer is not None:
                self.by_layer[id(layer)].append(made)

    def edits(self, layers: TorchLayers) -> list[Edit]:
        """The edits for one call or class; raises Refused where there is no safe one."""
        for syntax in self.reaching:
            raise Refused(f"line {syntax.lineno} of the project's code reaches for `{syntax.attr}` of some layer")
        for layer in layers.modules:
            self._check_activation(layer)
            self._check_parts(layer)
        added = self._added(layers)
        return self._subclass(layers, added) if layers.cls is not None else self._plain(layers, added)

    def _added(self, layers: TorchLayers) -> dict[str, str]:
        """The arguments that make a layer gated."""
        added = {"gated": "True"}
        if self.wishes.keep_hidden:
            added["keep_hidden"] = "True"
        if not self.wishes.keep_weights:
            return added
        if layers.cls is not None or layers.modules[0].torch_name == STACK:
            raise Refused(f"the weights of {layers.name} as a whole are not carried over", "use its layers one by one")
        names: set[str] = set()
        for layer in layers.modules:
            if not is_const(layer.args.get("bias", Const(True)), True):
                raise Refused("its projections may have no bias, and the unit gate needs one")
            found = {name for option in alternatives(layer.args.get("activation", Const("relu")))
                     for name in _names(option)}  # fmt: skip
            names |= found
        if self.wishes.keep_activation:
            raise Refused("the gated layers of torch's kind know no other gate than SiLU", "--keep-weights bridges it")
        return {**added, "beta": str(self.wishes.gate_for(names).beta)}

    def _plain(self, layers: TorchLayers, added: Mapping[str, str]) -> list[Edit]:
        wanted = layers.modules[0].torch_name
        assert isinstance(layers.call, ast.Call)
        called = self.uses.values(layers.call.func)
        if not called or not all(isinstance(v, External) and v.dotted == wanted for v in called):
            raise Refused(f"nn.{layers.name} is not called by its name here", f"write the call of nn.{layers.name} out")
        return [
            *self._renamed(layers, layers.call.func, layers.frame),
            *self._arguments(layers.call, layers.frame, added),
        ]

    def _renamed(self, layers: TorchLayers, place: ast.expr, frame: Frame) -> list[Edit]:
        if any(m.args.keys() & OURS for m in layers.modules):
            return []  # ours already, for another reason
        text, imports = self.reference(layers.name, place, frame)
        if isinstance(place, ast.Name) and place.id == text:
            return list(imports)
        return [Replace(frame.path, place, text), *imports]

    @staticmethod
    def _arguments(call: ast.Call, frame: Frame, added: Mapping[str, str]) -> list[Edit]:
        made: list[Edit] = [
            Delete(frame.path, keyword)
            for keyword in call.keywords
            if keyword.arg == "activation" and isinstance(keyword.value, ast.Constant)
        ]
        return made + [AddArgument(frame.path, call, value, name) for name, value in added.items()]

    def _subclass(self, layers: TorchLayers, added: Mapping[str, str]) -> list[Edit]:
        cls = layers.cls
        assert cls is not None
        what = f"{cls.name}, a subclass of nn.{layers.name},"
        if "_ff_block" in cls.members:
            raise Refused(f"{what} has a feed-forward of its own", "gate it by hand, and size its linear layers there")
        if cls.torch_base() in LAYERS and any(unreached_reads(self.uses, cls, name) for name in PARTS):
            raise Refused(f"{what} uses its parts in code that the project does not reach")
        if sum(isinstance(c, Class) for c in cls.mro) > 1:
            raise Refused(f"{what} has further base classes of the project")
        bases = [b for b in cls.node.bases if self._is_torchs(b, layers)]
        if len(bases) != 1:
            raise Refused(f"{what} does not name its base class")
        home = cls.scope.frame
        found = self._renamed(layers, bases[0], home)
        if "__init__" in cls.members:
            return found + self._arguments(self._super_call(cls, what), home, added)
        calls = {m.call: m.frame for m in layers.modules}
        for call, frame in calls.items():
            if not isinstance(call, ast.Call) or frame is None:
                raise Refused(f"{what} is constructed out of sight")
            if not all(isinstance(v, Class) and v.node is cls.node for v in self.uses.values(call.func)):
                raise Refused(f"{what} is not called by its name")
            found += self._arguments(call, frame, added)
        return found

    def _is_torchs(self, place: ast.expr, layers: TorchLayers) -> bool:
        wanted = layers.modules[0].torch_name
        return any(isinstance(v, External) and v.dotted == wanted for v in self.uses.values(place))

    @staticmethod
    def _super_call(cls: Class, what: str) -> ast.Call:
        calls = [
            node
            for node in walk(cls.members["__init__"])
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

    def _check_activation(self, layer: Module) -> None:
        """Only ReLU, GELU and what a configuration chooses between them are plain for sure."""
        given = layer.args.get("activation", Const("relu"))
        for option in alternatives(given):
            if not self._is_plain(option):
                raise Refused("the activation that is handed to torch's layer is not ReLU or GELU for sure")

    @staticmethod
    def _is_plain(value: Value) -> bool:
        if isinstance(value, Const):
            return value.value in RELU_FAMILY
        if isinstance(value, External):
            return function_operation(value.dotted) in RELU_FAMILY
        if isinstance(value, Module):
            return value.cls is None and MODULE_OPS.get(value.torch_name.rpartition(".")[2]) in RELU_FAMILY
        return isinstance(value, Node) and value.op in ("config", "input", "attr", "getitem", "unknown", "opaque")

    def _check_parts(self, layer: Module) -> None:
        """Nobody but the layer itself may use the parts of its feed-forward."""
        if layer.torch_name == STACK:
            return
        own = self.by_layer[id(layer)]
        used = {id(p.value) for made in own for p in (made.first, made.second)}
        for made in own:
            if made.gated or not all(self._is_layers_own(n) for n in made.nodes if n.op in RELU_FAMILY):
                raise Refused("its feed-forward is not computed by the layer's own parts alone")
            self.uses.check_weights(made)
        for name in ("linear1", "linear2"):
            part = layer.attributes.get(name)
            if not isinstance(part, Module) or part.call is not layer.call or part.cls is not None:
                raise Refused(f"`{name}` of torch's layer is replaced by another")
            if self.uses.size_reads.get(id(part)):
                raise Refused(f"the width of `{name}` of torch's layer is read elsewhere")
            if any(id(v) not in used for v in self.uses.results.get(id(part), ())):
                raise Refused(f"`{name}` of torch's layer is called outside of its feed-forward")
        if self._is_read_elsewhere(layer):
            raise Refused("the activation of torch's layer is read outside of its feed-forward")

    def _is_layers_own(self, node: Node) -> bool:
        """Whether an activation is `self.activation(…)` or lies in torch's `_ff_block`."""
        func = node.node.func if isinstance(node.node, ast.Call) else None
        return node.module is None and isinstance(func, ast.Attribute) and func.attr in ("activation", "_ff_block")

    def _is_read_elsewhere(self, layer: Module) -> bool:
        """Whether the layer's activation is read other than to call it."""
        found: list[Value] = []
        for syntax, frame in self.uses.machine.reads[id(layer.attributes["activation"])]:
            parent = frame.scope.source.parents.get(syntax)
            is_called = isinstance(parent, ast.Call) and parent.func is syntax
            if isinstance(syntax, ast.Attribute) and syntax.attr == "activation" and not is_called:
                found.extend(self.uses.values(syntax.value, frame))
        return any(value is layer for value in found)
