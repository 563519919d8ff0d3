"""Position-wise projections: linear layers however they are spelled, and where their widths are stated."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from modernizer.graph import Graph
from modernizer.graph.machine import Machine
from modernizer.graph.query import IDENTITY, VIEWS, is_const, origin, strip_views
from modernizer.graph.values import Class, Const, Frame, Many, Module, Node, Value

LINEAR = ("in_features", "out_features")
CONVOLUTION = ("in_channels", "out_channels")
FILLED = frozenset("empty zeros ones rand randn Tensor FloatTensor full".split())  # what makes a tensor of given sizes


@dataclass(eq=False)
class Projection:
    """One call of a linear layer: `source` goes in, `value` comes out.

    `kind` is `linear`, `conv` (kernel 1, features on axis 1), `wide conv` (a larger kernel: not position-wise) or
    `own` (a class of the project that multiplies by its own weight). `inputs` and `outputs` name the constructor's
    parameters that say the widths, '' where none does.
    """

    module: Module
    value: Node
    source: Value
    kind: str
    frame: Frame  # where the module is called
    call: ast.AST | None  # the call, in that frame
    inputs: str
    outputs: str

    @property
    def axis(self) -> int:
        """The axis of features."""
        return 1 if "conv" in self.kind else -1


class Projections:
    """All projections of a program, by their results."""

    def __init__(self, graph: Graph) -> None:
        self.machine: Machine = graph.machine
        self.by_value: dict[int, Projection] = {}
        self.constructions = {
            id(f.receiver): f for f in self.machine.frames if f.function is not None and f.function.name == "__init__"
        }
        for node in self.machine.nodes:
            made = self._of_torch(node)
            if made is not None:
                self.by_value[id(node)] = made
        for frame in self.machine.frames:
            made = self._of_class(frame)
            if made is not None:
                self.by_value[id(made.value)] = made

    def __iter__(self) -> Iterator[Projection]:
        yield from self.by_value.values()

    def at(self, value: Value) -> Projection | None:
        """The projection whose result a value is."""
        return self.by_value.get(id(value))

    def parameter(self, module: Module, value: Value | None) -> str:
        """The parameter of a module's own constructor that was given `value`, '' where there is none."""
        frame = self.constructions.get(id(origin(module)))
        return next((n for n, v in frame.arguments.items() if v is value), "") if frame and value is not None else ""

    def given(self, module: Module, parameter: str) -> Value | None:
        """What a module's constructor was given for a parameter."""
        frame = self.constructions.get(id(origin(module)))
        return frame.arguments.get(parameter) if frame else module.args.get(parameter)

    def _of_torch(self, node: Node) -> Projection | None:
        module = node.module
        if module is None or not node.args or _overrides(module, "forward"):
            return None
        if node.op == "linear":
            kind, names = "linear", LINEAR
        elif node.op in ("conv1d", "conv2d"):
            kind, names = "conv" if _is_pointwise(module) else "wide conv", CONVOLUTION
        else:
            return None
        if _overrides(module, "__init__"):  # a subclass may call the widths something else
            inputs, outputs = (module.args.get(name) for name in names)
            names = self.parameter(module, inputs), self.parameter(module, outputs)
        return Projection(module, node, node.args[0], kind, node.frame, node.node, *names)

    def _of_class(self, frame: Frame) -> Projection | None:
        """`x @ W + b` in the forward of a class, as in GPT-2's Conv1D, whose weight is [in, out]."""
        module = frame.receiver
        if not isinstance(module, Module) or frame.function is None or frame.function.name != "forward":
            return None
        if frame.caller is None or not isinstance(frame.result, Node):
            return None
        product = _without_bias(strip_views(frame.result), module)
        if product is None:
            return None
        source, weight, is_transposed = product
        given = next((v for v in frame.arguments.values() if v is not module), None)
        if given is None or strip_views(source) is not strip_views(given):
            return None
        names = [self.parameter(module, size) for size in _sizes(weight)]
        if len(names) != 2:
            return None
        inputs, outputs = names[::-1] if is_transposed else names
        return Projection(module, frame.result, given, "own", frame.caller, frame.call, inputs, outputs)


def _overrides(module: Module, method: str) -> bool:
    return module.cls is not None and any(isinstance(c, Class) and method in c.members for c in module.cls.mro)


def _is_pointwise(module: Module) -> bool:
    def given(name: str, default: int) -> bool:
        value = module.args.get(name, Const(default))
        sizes = value.items if isinstance(value, Many) else [value]
        return all(is_const(size, default) for size in sizes)

    return (
        given("kernel_size", 1)
        and given("stride", 1)
        and given("padding", 0)
        and given("groups", 1)
        and ("kernel_size" in module.args)
    )


def _without_bias(value: Value, module: Module) -> tuple[Value, Node, bool] | None:
    """The input, the weight and whether the weight is [out, in], of `x @ W`, `x @ W + b`, `addmm(b, x, W)` …"""
    if not isinstance(value, Node):
        return None
    if value.op == "add" and len(value.args) == 2:
        for product, bias in (value.args, value.args[::-1]):
            if _is_weight(bias, module):
                return _without_bias(strip_views(product), module)
        return None
    source: Value | None = None
    weight: Value | None = None
    if value.op == "addmm" and len(value.args) == 3 and not value.kwargs and _is_weight(value.args[0], module):
        source, weight = value.args[1:]
    elif value.op in ("matmul", "linear") and len(value.args) >= 2:
        source, weight = value.args[:2]
    transposed = value.op == "linear"
    if isinstance(weight, Node) and weight.op in ("t", "mT") and weight.args:
        weight, transposed = weight.args[0], not transposed
    if source is None or not isinstance(weight, Node) or not _is_weight(weight, module):
        return None
    return source, weight, transposed


def _is_weight(value: Value, module: Module) -> bool:
    return isinstance(value, Node) and value.op == "parameter" and any(value is v for v in module.attributes.values())


def _sizes(weight: Node) -> list[Value]:
    """The sizes with which a weight's tensor was made, none where that is not known."""
    value: Value = weight
    while isinstance(value, Node) and value.op not in FILLED:
        nodes = [a for a in value.args if isinstance(a, Node)]
        if len(nodes) != 1 or value.op in VIEWS - IDENTITY:
            return []
        value = nodes[0]
    if not isinstance(value, Node):
        return []
    sizes = value.args
    return list(sizes[0].items if len(sizes) == 1 and isinstance(sizes[0], Many) else sizes)


def own_parameters(projection: Projection) -> tuple[str, str, int] | None:
    """The names of weight and bias of a projection of the `own` kind, and the weight's axis of outputs.

    None for one of torch's, and where they are no attributes of the module or there is no bias.
    """
    module, result = projection.module, strip_views(projection.value)
    product = _without_bias(result, module) if projection.kind == "own" else None
    if product is None or not isinstance(result, Node) or result.op not in ("add", "addmm"):
        return None
    _, weight, is_transposed = product
    names = {id(value): name for name, value in module.attributes.items()}
    bias = next((a for a in result.args if a is not weight and _is_weight(a, module)), None)
    if id(weight) not in names or bias is None:
        return None
    return names[id(weight)], names[id(bias)], 0 if is_transposed else 1


def torch_layer_of(module: Module) -> Module | None:
    """The torch transformer layer of which a module is a part that torch's constructor made."""
    owner = module.owner
    if owner is None or owner.call is not module.call or module.cls is not None:
        return None
    names = ("torch.nn.TransformerEncoderLayer", "torch.nn.TransformerDecoderLayer")
    return owner if owner.torch_name in names else None
