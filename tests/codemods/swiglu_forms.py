"""The forms in which a feed-forward is written, as whole programs for the tests of `swiglu`."""

from __future__ import annotations

HEAD = """\
import copy
import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
"""

MODEL = """

class Attention(nn.Module):
    def __init__(self, d, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(torch.triu(torch.ones(t, t), 1).bool(), float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attention = Attention(d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.ff = FF

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Net(nn.Module):
    def __init__(self, vocab=11, d=16, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList([Block(d) for _ in range(layers)])
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""


def program(code: str, made: str = "FeedForward(d, 4 * d)", after: str = "") -> str:
    """A model whose blocks have the feed-forward that `made` constructs, with the definitions in `code`."""
    return f"{HEAD}\n\n{code.strip()}\n{MODEL.replace('FF', made)}{after}"


TWO_LINEARS = """
class FeedForward(nn.Module):
    def __init__(self, d, hidden, dropout=0.1):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)
        self.drop = nn.Dropout(dropout)
        BODY

    def forward(self, x):
        return self.fc2(self.drop(CALL))
"""


def two_linears(call: str, body: str = "pass") -> str:
    """A class of two Linears whose activation is `call` and whose constructor ends in `body`."""
    return TWO_LINEARS.replace("BODY", body).replace("CALL", call)


GELU = """
class GELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor):
        return x * torch.sigmoid(1.702 * x)
"""

CONV1D = """
class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        weight = torch.empty(nx, nf)
        nn.init.normal_(weight, std=0.02)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size = x.size()[:-1] + (self.nf,)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(*size)
"""

TABLE = """
class Activations(OrderedDict):
    def __getitem__(self, key):
        return super().__getitem__(key)()


ACT2FN = Activations({"gelu": nn.GELU, "relu": nn.ReLU})


class FeedForward(nn.Module):
    def __init__(self, d, hidden, act):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        if isinstance(act, str):
            self.act = ACT2FN[act]
        else:
            self.act = act
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))
"""


def with_setting(text: str, default: str) -> str:
    """The same model, whose constructor takes `act` and hands it down to the feed-forwards."""
    return (
        text.replace("layers=2)", f"layers=2, act={default})")
        .replace("[Block(d) for", "[Block(d, act) for")
        .replace("def __init__(self, d):", "def __init__(self, d, act):")
    )


FORMS = {
    "table of classes by an open name": with_setting(program(TABLE, "FeedForward(d, 4 * d, act)"), "'gelu'"),
    "function of torch by an open name": with_setting(
        program(two_linears("self.act(self.fc1(x))", "self.act = getattr(F, dropout)"), "FeedForward(d, 4 * d, act)")
        .replace("self.drop = nn.Dropout(dropout)", "self.drop = nn.Dropout(0.1)"),
        "'relu'",
    ),
    "class of torch by an open name": with_setting(
        program(two_linears("self.act(self.fc1(x))", "self.act = getattr(nn, dropout)()"), "FeedForward(d, 4 * d, act)")
        .replace("self.drop = nn.Dropout(dropout)", "self.drop = nn.Dropout(0.1)"),
        "'ReLU'",
    ),
    "table with a class among functions": with_setting(
        program(
            GELU + 'ACTIVATIONS = {"relu": nn.ReLU, "gelu": gelu}\n'
            + two_linears("self.act(self.fc1(x))", "self.act = ACTIVATIONS[dropout]"),
            "FeedForward(d, 4 * d, act)",
        )
        .replace("self.drop = nn.Dropout(dropout)", "self.drop = nn.Dropout(0.1)"),
        "'gelu'",
    ),
    "instance as a default": with_setting(
        program(two_linears("self.act(self.fc1(x))", "self.act = dropout"), "FeedForward(d, 4 * d, act)")
        .replace("self.drop = nn.Dropout(dropout)", "self.drop = nn.Dropout(0.1)"),
        "nn.GELU()",
    ),
    "relu function": program(two_linears("F.relu(self.fc1(x))")),
    "torch.relu": program(two_linears("torch.relu(self.fc1(x))")),
    "relu method": program(two_linears("self.fc1(x).relu()")),
    "relu module": program(two_linears("self.act(self.fc1(x))", "self.act = nn.ReLU(inplace=True)")),
    "gelu with tanh": program(two_linears('F.gelu(self.fc1(x), approximate="tanh")')),
    "leaky relu": program(two_linears("F.leaky_relu(self.fc1(x), 0.1)")),
    "elu": program(two_linears("self.act(self.fc1(x))", "self.act = nn.ELU()")),
    "own gelu class": program(GELU + two_linears("self.act(self.fc1(x))", "self.act = GELU()")),
    "own gelu function": program(GELU + two_linears("gelu(self.fc1(x))")),
    "own gelu as attribute": program(GELU + two_linears("self.act(self.fc1(x))", "self.act = gelu")),
    "quick gelu": program(GELU + two_linears("self.act(self.fc1(x))", "self.act = QuickGELU()")),
    "function attribute": program(two_linears("self.act(self.fc1(x))", "self.act = F.gelu")),
    "activation chosen by a flag": program(
        two_linears("self.act(self.fc1(x))", "self.act = F.relu if dropout > 0 else F.gelu")
    ),
    "activation by its name": program(
        two_linears("self.act(self.fc1(x))", 'self.act = getattr(F, "relu")')
    ),
    "table of functions": program(
        GELU + 'ACT2FN = {"gelu": gelu, "relu": F.relu}\n'
        + two_linears('ACT2FN["gelu"](self.fc1(x))')
    ),
    "table of modules": program(
        'ACT2FN = nn.ModuleDict({"gelu": nn.GELU(), "relu": nn.ReLU()})\n'
        + two_linears("self.act(self.fc1(x))", 'self.act = ACT2FN["relu"]')
    ),
    "table of classes": program(
        'ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}\n'
        + two_linears("self.act(self.fc1(x))", 'self.act = ACTIVATIONS["relu"]()')
    ),
    "factory of activations": program(
        "def get_activation(name):\n    if name == 'relu':\n        return nn.ReLU()\n"
        "    elif name == 'gelu':\n        return nn.GELU()\n    raise ValueError(name)\n\n\n"
        + two_linears("self.act(self.fc1(x))", "self.act = get_activation('relu' if dropout else 'gelu')")
    ),
    "if and elif": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden, activation="gelu"):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)
        if activation == "gelu":
            self.act = nn.GELU()
        elif activation == "relu":
            self.act = nn.ReLU()
        else:
            raise ValueError(activation)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)
""",
        "FeedForward(d, 4 * d, kind)",
    ).replace("def __init__(self, d):", "def __init__(self, d, kind='relu'):"),
    "passed activation class": program(
        """
class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))
""",
        "Mlp(d, int(d * 4.0), act_layer=nn.ReLU)",
    ),
    "passed activation module": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden, activation=nn.ReLU()):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d, hidden), activation, nn.Linear(hidden, d))

    def forward(self, x):
        return self.net(x)
"""
    ),
    "sequential in the block": program(
        "", "nn.Sequential(nn.Linear(d, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, d))"
    ),
    "norm first in the sequential": program(
        """
def FeedForward(d, hidden, dropout=0.0):
    return nn.Sequential(
        nn.LayerNorm(d),
        nn.Linear(d, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, d),
        nn.Dropout(dropout),
    )
"""
    ),
    "ordered dict": program(
        "",
        'nn.Sequential(OrderedDict([("c_fc", nn.Linear(d, d * 4)), ("gelu", nn.GELU()),'
        ' ("c_proj", nn.Linear(d * 4, d))]))',
    ),
    "list of layers": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        layers = []
        layers.append(nn.Linear(d, hidden))
        layers += [nn.ReLU(), nn.Linear(hidden, d)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)
"""
    ),
    "loop over layers": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, d)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""
    ),
    "wrapper of positional parts": program(
        """
class Chain(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.f = nn.Sequential(*parts)

    def forward(self, x):
        return self.f(x)
""",
        "Chain(nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))",
    ),
    "convolutions": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.conv1 = nn.Conv1d(d, hidden, 1)
        self.conv2 = nn.Conv1d(hidden, d, kernel_size=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.conv2(self.drop(F.relu(self.conv1(x.transpose(1, 2))))).transpose(1, 2)
"""
    ),
    "convolutions with a module": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(d, hidden, 1, bias=False), nn.ReLU(), nn.Conv1d(hidden, d, 1, bias=False))

    def forward(self, x):
        return self.net(x.permute(0, 2, 1)).permute(0, 2, 1)
"""
    ),
    "transposed weights": program(
        GELU + CONV1D
        + """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.c_fc = Conv1D(hidden, d)
        self.c_proj = Conv1D(d, hidden)
        self.act = gelu

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))
"""
    ),
    "dict of parts and a lambda": program(
        GELU
        + """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.mlp = nn.ModuleDict(dict(
            c_fc=nn.Linear(d, hidden),
            c_proj=nn.Linear(hidden, d),
            act=GELU(),
            dropout=nn.Dropout(0.1),
        ))
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x):
        return self.mlpf(x)
"""
    ),
    "subclass of Linear": program(
        """
class Linear(nn.Linear):
    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1 = Linear(d, hidden)
        self.fc2 = Linear(hidden, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))
"""
    ),
    "blocks as attributes with numbers": program(two_linears("F.relu(self.fc1(x))")).replace(
        "self.blocks = nn.ModuleList([Block(d) for _ in range(layers)])",
        "self.layers = layers\n        for i in range(layers):\n            self.__setattr__('block_%d' % i, Block(d))",
    ).replace(
        "for block in self.blocks:\n            x = block(x)",
        "for i in range(self.layers):\n            x = self.__getattr__('block_%d' % i)(x)",
    ),
    "layers reset by a method nobody calls": program(
        two_linears("F.relu(self.fc1(x))").replace(
            "    def forward",
            "    def reset_parameters(self):\n        self.fc1.reset_parameters()\n"
            "        self.fc2.reset_parameters()\n\n    def forward",
        )
    ),
    "factory of projections": program(
        """
def linear(n_in, n_out, bias=True):
    layer = nn.Linear(n_in, n_out, bias)
    nn.init.xavier_uniform_(layer.weight)
    return layer


class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1 = linear(d, hidden)
        self.fc2 = linear(hidden, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))
""",
        after="",
    ).replace("self.head = nn.Linear(d, vocab)", "self.head = linear(d, vocab)"),
    "wrapper of Linear": program(
        """
class Dense(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x):
        return self.linear(x)


class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1 = Dense(d, hidden)
        self.fc2 = Dense(hidden, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))
"""
    ).replace("self.head = nn.Linear(d, vocab)", "self.head = Dense(d, vocab)"),
    "configuration": program(
        """
class Config:
    d_inner = 48


class FeedForward(nn.Module):
    def __init__(self, d, cfg):
        super().__init__()
        self.intermediate = nn.Linear(d, cfg.d_inner)
        self.output = nn.Linear(cfg.d_inner, d)

    def forward(self, x):
        hidden_states = self.intermediate(x)
        hidden_states = F.gelu(hidden_states)
        return self.output(hidden_states)
""",
        "FeedForward(d, Config())",
    ),
    "copied template": program(
        two_linears("F.relu(self.fc1(x))") + "\n\nTEMPLATE = 1\n", "FeedForward(d, 4 * d)"
    ).replace("[Block(d) for _ in range(layers)]", "[copy.deepcopy(b) for b in [Block(d)] * layers]"),
    "different sizes": program(two_linears("F.relu(self.fc1(x))"), "FeedForward(d, 4 * d)").replace(
        "[Block(d) for _ in range(layers)]", "[Block(d), Block2(d)]"
    )
    + """

class Block2(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attention = Attention(d)
        self.ff = FeedForward(d, 20, dropout=0.5)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.ff(x)
""",
    "shared activation": program(
        """
RELU = nn.ReLU()


class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.act = RELU

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))
"""
    ).replace("return self.head(x)", "return self.head(RELU(x) + x)"),
    "activation used twice": program(two_linears("self.act(self.fc1(x))", "self.act = nn.ReLU()")).replace(
        "return self.fc2(self.drop(self.act(self.fc1(x))))",
        "y = self.fc2(self.drop(self.act(self.fc1(x))))\n        return y + 0.1 * self.act(x)",
    ),
    "function used twice": program(two_linears("self.act(self.fc1(x))", "self.act = F.relu")).replace(
        "return self.fc2(self.drop(self.act(self.fc1(x))))",
        "y = self.fc2(self.drop(self.act(self.fc1(x))))\n        return y + 0.1 * self.act(x)",
    ),
    "formula in place": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        h = self.fc1(x)
        h = h * torch.sigmoid(1.702 * h)
        return self.fc2(h)
"""
    ),
    "clamp": program(two_linears("self.fc1(x).clamp(min=0)")),
    "in place": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        h = self.fc1(x)
        F.relu_(h)
        return self.fc2(h)
"""
    ),
    "two modules": program(
        """
class Intermediate(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.dense = nn.Linear(d, hidden)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self.dense(x))


class Output(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.dense = nn.Linear(hidden, d)

    def forward(self, x):
        return self.dense(x)
""",
        "nn.Sequential(Intermediate(d, 40), Output(d, 40))",
    ),
    "helper method": program(
        """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def act(self, x):
        return F.relu(x)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))
"""
    ),
    "residual in the class": program(
        two_linears("F.relu(self.fc1(x))").replace("return self.fc2", "return x + self.fc2")
    ).replace("return x + self.ff(self.norm2(x))", "return self.norm2(self.ff(x))"),
    "layers in the block": program("", "None").replace(
        "self.ff = None", "self.linear1 = nn.Linear(d, 4 * d)\n        self.linear2 = nn.Linear(4 * d, d)"
    ).replace("x + self.ff(self.norm2(x))", "x + self.linear2(F.relu(self.linear1(self.norm2(x))))"),
    "numbers": program("", "nn.Sequential(nn.Linear(d, 100), nn.ReLU(), nn.Linear(100, d))"),
    "initialised by hand": program(
        two_linears(
            "F.relu(self.fc1(x))",
            "for layer in (self.fc1, self.fc2):\n            layer.weight.data.normal_(std=0.02)\n"
            "            layer.bias.data.zero_()",
        )
    ),
}  # fmt: skip

PICK = """
def pick(name):
    if name == "relu":
        return F.relu
    if name == "glu":
        return F.glu
    raise ValueError(name)
"""

FORMS["a choice with a gate that would not fit"] = program(
    PICK
    + """

class FeedForward(nn.Module):
    def __init__(self, d, hidden, activation="relu"):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.activation = pick(activation)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))
""",
    "FeedForward(d, 4 * d, mode)",
).replace(
    "def __init__(self, d):\n        super().__init__()\n        self.attention",
    'def __init__(self, d, mode="relu"):\n        super().__init__()\n        self.attention',
)
