"""torch's own layers: the order is an argument, and so is the final norm of its stacks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from codemods._prenorm_common import Impossible
from codemods._prenorm_final import torch_norm
from modernizer.edit import AddArgument, Edit, Replace
from modernizer.graph import Graph
from modernizer.graph.query import is_none, origin
from modernizer.graph.values import Class, Const, Frame, Module, Value
from modernizer.model_map.residual import FLAG, POST, PRE
from modernizer.model_map.stack import Flow
from modernizer.syntax import function_of

STACKS = ("torch.nn.TransformerEncoder", "torch.nn.TransformerDecoder")
WHOLE = "torch.nn.Transformer"
NORM_FIRST = {"TransformerEncoderLayer": 7, "TransformerDecoderLayer": 7, "Transformer": 11}


@dataclass(eq=False)
class TorchStack:
    """One place where torch's stack, or its whole transformer, is constructed: `modules` are what it made."""

    call: ast.Call
    frame: Frame
    modules: list[Module] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.modules[0].torch_name == WHOLE

    @property
    def layers(self) -> list[Value]:
        """The template layers that its instances were given; the whole transformer makes its own."""
        if self.is_whole:
            return [*self.modules]
        names = ("encoder_layer", "decoder_layer")
        return [next((m.args[n] for n in names if n in m.args), Const(None)) for m in self.modules]


def torch_stacks(graph: Graph) -> list[TorchStack]:
    """Every place that constructs one of torch's stacks."""
    found: dict[ast.AST, TorchStack] = {}
    for module in graph.machine.modules:
        is_stack = module.torch_name in STACKS or module.torch_name == WHOLE
        if is_stack and module.cls is None and isinstance(module.call, ast.Call) and module.frame is not None:
            place = found.setdefault(module.call, TorchStack(module.call, module.frame))
            place.modules.append(module)
    return list(found.values())


def is_torch_layer(module: Module | None) -> bool:
    """Whether a module is one of torch's transformer classes, or of a class made from one."""
    return module is not None and module.torch_name.rpartition(".")[2] in NORM_FIRST


def subclasses(graph: Graph) -> list[Module]:
    """One instance of each class of the program that is made from torch's layers."""
    found = {m.cls.node: m for m in graph.machine.modules if m.cls is not None and is_torch_layer(m)}
    return list(found.values())


def subclass_refusal(module: Module) -> Impossible:
    """Why a subclass of torch's layers is not upgraded."""
    cls = module.cls
    assert cls is not None
    return Impossible(
        cls.node, cls.scope.frame, f"{cls.name} is a subclass of torch's layer, whose parts and order it may depend on",
        "pass `norm_first=True` to its constructor by hand, if it heeds that, and give its stack a final norm",
    )  # fmt: skip


def runs_own_layers(layer: Value) -> bool:
    """Whether a layer given to torch's stack has a `forward` of the program: it is looked into like any other."""
    if not isinstance(layer, Module) or layer.cls is None:
        return False
    return any(isinstance(c, Class) and "forward" in c.members for c in layer.cls.mro)


def order_of(layer: Value) -> str:
    """On which side of its sums one of torch's layers has its norms."""
    if not isinstance(layer, Module):
        return FLAG
    first = layer.args.get("norm_first", Const(None) if "**" in layer.args else Const(False))
    if not isinstance(first, Const) or first.value is None:
        return FLAG
    return PRE if first.value else POST


def order_edits(graph: Graph, layer: Module) -> list[Edit]:
    """Sets `norm_first` where a layer is constructed. Raises Impossible."""
    call, frame = layer.call, layer.frame
    if frame is None or call is None:
        raise AssertionError("a layer that nobody constructed")
    if layer.cls is not None:
        raise subclass_refusal(layer)
    if not isinstance(call, ast.Call):
        raise Impossible(call, frame, "the layer is not made by calling its class directly")
    short = layer.torch_name.rpartition(".")[2]
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        raise _flagged(call, frame)
    makers = [v for _, v in graph.machine.at.get(call.func, [])]
    if not makers or any(getattr(v, "dotted", "") != layer.torch_name for v in makers):
        raise Impossible(call, frame, "the layer is not made by calling its class directly")
    given = [k.value for k in call.keywords if k.arg == "norm_first"]
    place = NORM_FIRST[short]
    given += call.args[place : place + 1]
    if not given:
        return [AddArgument(frame.path, call, "True", "norm_first")]
    if isinstance(given[0], ast.Constant):
        return [Replace(frame.path, given[0], "True")]
    raise _flagged(call, frame)


def _flagged(call: ast.AST, frame: Frame) -> Impossible:
    return Impossible(
        call, frame, "both orders are there, and an argument of the program chooses between them",
        "pass `norm_first=True` where the model is made, and give its stack a final norm",
    )  # fmt: skip


def final_norm_edits(graph: Graph, flow: Flow, stack: TorchStack) -> list[Edit]:
    """Gives torch's stack its `norm`, unless it has one or one follows. Raises Impossible."""
    if stack.is_whole:
        if any(k.arg in ("custom_encoder", "custom_decoder") for k in stack.call.keywords) or len(stack.call.args) > 7:
            raise Impossible(stack.call, stack.frame, "the transformer is given an encoder or decoder of its own")
        return []  # it always builds both final norms itself
    given = [m.args.get("norm", Const(None)) for m in stack.modules]
    if any("**" in m.args for m in stack.modules):
        raise _flagged(stack.call, stack.frame)
    if all(isinstance(v, Module) for v in given):
        return []
    if not all(is_none(v) for v in given):
        raise Impossible(
            stack.call, stack.frame, "whether this stack has a final norm depends on a test",
            "pass `norm=nn.LayerNorm(d_model)` in every case",
        )  # fmt: skip
    if _norm_follows(graph, flow, stack):
        return []
    function = function_of(stack.frame.scope.source.tree, stack.call)
    layer = stack.layers[0]
    made = None
    if isinstance(layer, Module) and isinstance(function, ast.FunctionDef) and stack.frame.function is not None:
        made = torch_norm(graph, layer, stack.modules[0].frame or stack.frame, function)
    if made is None:
        raise Impossible(
            stack.call, stack.frame, "the size of the layers cannot be said where the stack is made",
            "pass `norm=nn.LayerNorm(d_model)` to the stack",
        )  # fmt: skip
    code, imports = made
    return [*_norm_argument(stack, code), *imports]


def _norm_argument(stack: TorchStack, code: str) -> Iterator[Edit]:
    given = [k.value for k in stack.call.keywords if k.arg == "norm"] + stack.call.args[2:3]
    if given:
        yield Replace(stack.frame.path, given[0], code)
    else:
        yield AddArgument(stack.frame.path, stack.call, code, "norm")


def _norm_follows(graph: Graph, flow: Flow, stack: TorchStack) -> bool:
    calls = [
        n for n in graph.machine.nodes if n.module is not None and n.op in ("torch_encoder", "torch_decoder")
        and origin(n.module).call is stack.call
    ]  # fmt: skip
    return bool(calls) and all(flow.only_norm(node) is not None for node in calls)
