"""Feed-forwards and their activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..choices import Choice
from .norms import norm
from .text import Sizes, Unit, indented, module


@dataclass(frozen=True)
class Activation:
    """`init` are lines for the owner, `call` applies it, `instance` makes a module where it is one."""

    call: Callable[[str], str]
    init: list[str] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    instance: str = ""


@dataclass(frozen=True)
class FeedForwardPart:
    """Lines for the owner's `__init__`, the expression that applies it, and the classes it needs."""

    init: list[str]
    call: Callable[[str], str]
    units: list[Unit]


def _applied(value: str) -> Callable[[str], str]:
    return lambda x: f"{value}({x})"


_GELU_CLASS = (
    "class GELU(nn.Module):\n"
    "    def forward(self, x):\n"
    "        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))"
)
_QUICK_GELU = "class QuickGELU(nn.Module):\n    def forward(self, x):\n        return x * torch.sigmoid(1.702 * x)"
_GELU_FUNCTION = "def gelu(x):\n    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))"
_TABLE = 'ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}'


def activation(kind: str) -> Activation:
    own = _applied("self.activation")
    home = "feed_forward"
    if kind in ("relu", "gelu"):
        return Activation(_applied(f"F.{kind}"))
    if kind == "own_function":
        return Activation(_applied("gelu"), units=[Unit(("gelu",), home, _GELU_FUNCTION)])
    if kind == "table":
        return Activation(own, ['self.activation = ACTIVATIONS["gelu"]'], [Unit(("ACTIVATIONS",), home, _TABLE)])
    if kind == "option":
        return Activation(own, ['self.activation = F.gelu if activation == "gelu" else F.relu'])
    if kind == "lambda":
        return Activation(own, ["self.activation = lambda h: torch.relu(h)"])
    instance, units = {
        "relu_module": ("nn.ReLU()", []),
        "gelu_module": ("nn.GELU()", []),
        "own_class": ("GELU()", [Unit(("GELU",), home, _GELU_CLASS)]),
        "quick_gelu": ("QuickGELU()", [Unit(("QuickGELU",), home, _QUICK_GELU)]),
    }[kind]
    return Activation(own, [f"self.activation = {instance}"], units, instance)


def feed_forward(choice: Choice, sizes: Sizes) -> FeedForwardPart:
    """A feed-forward as the owner holds it: an attribute `ff`, or two projections of its own."""
    used = activation(choice.activation)
    form = choice.feed_forward
    if form == "sequential_in_block":
        init = [
            "self.ff = nn.Sequential(",
            *indented(
                [
                    "nn.Linear(d_model, d_ff),",
                    f"{used.instance},",
                    "nn.Dropout(dropout),",
                    "nn.Linear(d_ff, d_model),",
                ]
            ),
            ")",
        ]
        return FeedForwardPart(init, _applied("self.ff"), used.units)
    if form == "in_layer":
        init = ["self.linear1 = nn.Linear(d_model, d_ff)", "self.linear2 = nn.Linear(d_ff, d_model)"]
        chosen = 'self.activation = {"relu": F.relu, "gelu": F.gelu}["gelu"]'
        init += [chosen] if choice.activation == "option" else used.init
        return FeedForwardPart(init, lambda x: f"self.linear2({used.call(f'self.linear1({x})')})", used.units)
    units = _class(choice, sizes, used)
    return FeedForwardPart([f"self.ff = {sizes.make('FeedForward', PARAMS)}"], _applied("self.ff"), units)


PARAMS = ["d_model", "d_ff", "dropout"]


def _class(choice: Choice, sizes: Sizes, used: Activation) -> list[Unit]:
    init, forward, units = _BODIES[choice.feed_forward](used)
    if choice.container == "clones" and choice.feed_forward == "module_dict":  # a copied lambda would call the original
        init, forward = init[:-2], ["m = self.mlp", "return m.dropout(m.c_proj(m.act(m.c_fc(x))))"]
    more = 'activation="relu"' if choice.activation == "option" else ""
    if choice.residual in ("post_inside", "pre_inside"):
        init, forward = _with_residual(choice, init, forward)
    made = module("FeedForward", "feed_forward", sizes, PARAMS, init, "x", forward, more)
    return [*used.units, *units, made]


def _with_residual(choice: Choice, init: list[str], forward: list[str]) -> tuple[list[str], list[str]]:
    init = [*init, f"self.layer_norm = {norm(choice.norm)}"]
    value = forward[-1].removeprefix("return ")
    if choice.order == "post":
        forward = ["residual = x", *forward[:-1], f"x = {value}", "x += residual", "return self.layer_norm(x)"]
    else:
        forward = ["residual = x", "x = self.layer_norm(x)", *forward[:-1], f"x = {value}", "x += residual", "return x"]
    return init, forward


Body = tuple[list[str], list[str], list[Unit]]


def _two_linears(used: Activation) -> Body:
    init = [
        "self.w_1 = nn.Linear(d_model, d_ff)",
        "self.w_2 = nn.Linear(d_ff, d_model)",
        "self.dropout = nn.Dropout(dropout)",
        *used.init,
    ]
    return init, [f"return self.w_2(self.dropout({used.call('self.w_1(x)')}))"], []


def _holds_sequential(used: Activation) -> Body:
    init = [
        "self.net = nn.Sequential(",
        *indented(
            ["nn.Linear(d_model, d_ff),", f"{used.instance},", "nn.Linear(d_ff, d_model),", "nn.Dropout(dropout),"]
        ),
        ")",
    ]
    return init, ["return self.net(x)"], []


def _conv1d(used: Activation) -> Body:
    init = [
        "self.conv1 = nn.Conv1d(d_model, d_ff, kernel_size=1)",
        "self.conv2 = nn.Conv1d(d_ff, d_model, 1)",
        "self.dropout = nn.Dropout(dropout)",
        *used.init,
    ]
    forward = [
        f"h = {used.call('self.conv1(x.transpose(1, 2))')}",
        "h = self.conv2(h).transpose(1, 2)",
        "return self.dropout(h)",
    ]
    return init, forward, []


_GPT2_CONV = (
    "class Conv1D(nn.Module):\n"
    "    def __init__(self, nf, nx):\n"
    "        super().__init__()\n"
    "        self.nf = nf\n"
    "        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)\n"
    "        self.bias = nn.Parameter(torch.zeros(nf))\n"
    "\n"
    "    def forward(self, x):\n"
    "        size_out = x.size()[:-1] + (self.nf,)\n"
    "        x = torch.addmm(self.bias, x.contiguous().view(-1, x.size(-1)), self.weight)\n"
    "        return x.view(*size_out)"
)


def _gpt2_conv(used: Activation) -> Body:
    init = [
        "self.c_fc = Conv1D(d_ff, d_model)",
        "self.c_proj = Conv1D(d_model, d_ff)",
        "self.dropout = nn.Dropout(dropout)",
        *used.init,
    ]
    forward = [f"h = {used.call('self.c_fc(x)')}", "h2 = self.c_proj(h)", "return self.dropout(h2)"]
    return init, forward, [Unit(("Conv1D",), "feed_forward", _GPT2_CONV)]


def _module_dict(used: Activation) -> Body:
    init = [
        "self.mlp = nn.ModuleDict(dict(",
        *indented(
            [
                "c_fc=nn.Linear(d_model, d_ff),",
                "c_proj=nn.Linear(d_ff, d_model),",
                f"act={used.instance},",
                "dropout=nn.Dropout(dropout),",
            ]
        ),
        "))",
        "m = self.mlp",
        "self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))",
    ]
    return init, ["return self.mlpf(x)"], []


def _gated(used: Activation) -> Body:
    init = [
        "self.w_1 = nn.Linear(d_model, d_ff, bias=False)",
        "self.w_2 = nn.Linear(d_ff, d_model, bias=False)",
        "self.w_3 = nn.Linear(d_model, d_ff, bias=False)",
        "self.dropout = nn.Dropout(dropout)",
    ]
    return init, ["return self.dropout(self.w_2(F.silu(self.w_1(x)) * self.w_3(x)))"], []


_BODIES: dict[str, Callable[[Activation], Body]] = {
    "two_linears": _two_linears,
    "holds_sequential": _holds_sequential,
    "conv1d": _conv1d,
    "gpt2_conv": _gpt2_conv,
    "module_dict": _module_dict,
    "gated": _gated,
}
