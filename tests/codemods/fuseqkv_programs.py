"""Legacy programs for `fuseqkv`: each has a class `Net` and a function `run(net)` that returns one tensor."""

from __future__ import annotations

HEAD = """
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def data(*sizes):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

"""

SELF = """
class Attention(nn.Module):
    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        LAYERS
        self.out = nn.Linear(dim, dim)

    def split(self, x):
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(self, x):
        CALLS
        weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.width), dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def run(net):
    return net(data(2, 5, 12))
"""

LAYERS = """
self.to_q = nn.Linear(dim, dim)
self.to_k = nn.Linear(dim, dim)
self.to_v = nn.Linear(dim, dim)
"""
CALLS = """
q = self.split(self.to_q(x))
k = self.split(self.to_k(x))
v = self.split(self.to_v(x))
"""


def own(layers: str = LAYERS, calls: str = CALLS, program: str = SELF) -> str:
    """A program whose attention has these layers and makes these calls."""

    def filled(text: str, mark: str, code: str) -> str:
        indented = "\n".join(f"        {line}" if line else "" for line in code.strip("\n").splitlines())
        return text.replace(f"        {mark}", indented)

    return HEAD + filled(filled(program, "LAYERS", layers), "CALLS", calls)


BOTH = """
class Attention(nn.Module):
    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.heads = heads
        LAYERS
        self.out = nn.Linear(dim, dim)

    def forward(self, query, key, value, mask=None):
        b, width = query.size(0), query.size(-1) // self.heads
        CALLS
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(width)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return self.out(torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous().view(b, -1, self.heads * width))


class Block(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.own, self.cross = Attention(dim), Attention(dim)

    def forward(self, x, memory, mask):
        x = x + self.own(x, x, x, mask)
        return x + self.cross(x, memory, memory)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x, memory):
        mask = torch.tril(torch.ones(x.size(1), x.size(1)))
        for block in self.blocks:
            x = block(x, memory, mask)
        return x


def run(net):
    return net(data(2, 5, 12), data(2, 7, 12))
"""
BOTH_CALLS = """
q = self.to_q(query).view(b, -1, self.heads, width).transpose(1, 2)
k = self.to_k(key).view(b, -1, self.heads, width).transpose(1, 2)
v = self.to_v(value).view(b, -1, self.heads, width).transpose(1, 2)
"""

CROSS = """
class Cross(nn.Module):
    def __init__(self, dim=8, memory_dim=10, heads=2):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(memory_dim, dim)
        self.v = nn.Linear(memory_dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, memory):
        b, t, c = x.shape
        q = self.q(x).reshape(b, t, self.heads, -1).transpose(1, 2)
        k = self.k(memory).reshape(b, memory.shape[1], self.heads, -1).transpose(1, 2)
        v = self.v(memory).reshape(b, memory.shape[1], self.heads, -1).transpose(1, 2)
        w = torch.softmax(q @ k.transpose(2, 3) / (c // self.heads) ** 0.5, -1)
        return self.out((w @ v).transpose(1, 2).reshape(b, t, c))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross = Cross()

    def forward(self, x, memory):
        return x + self.cross(x, memory)


def run(net):
    return net(data(2, 5, 8), data(2, 7, 10))
"""

HEADS = """
class Head(nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.key = nn.Linear(dim, width, bias=False)
        self.query = nn.Linear(dim, width, bias=False)
        self.value = nn.Linear(dim, width, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(9, 9)))

    def forward(self, x):
        T = x.shape[1]
        k = self.key(x)
        q = self.query(x)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        weights = weights.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        weights = F.softmax(weights, dim=-1)
        v = self.value(x)
        return weights @ v


class Net(nn.Module):
    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.heads = nn.ModuleList([Head(dim // heads, dim) for _ in range(heads)])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


def run(net):
    return net(data(2, 5, 12))
"""

OVERRIDING = """

class Wide(Attention):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(12, 12, bias=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Wide()

    def forward(self, x):
        return self.second(self.first(x))
"""

BARE = """
class Attention(nn.Module):
    def __init__(self, dim=12, heads=3, width=4, v_width=4):
        super().__init__()

        def weights(*shape):
            return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))

        LAYERS
        self.w_o = weights(heads * v_width, dim)

    def forward(self, x, memory=None):
        CALLS
        weights = F.softmax(torch.einsum("nhtd,nhsd->nhts", q, k) / math.sqrt(q.shape[-1]), dim=-1)
        return torch.einsum("nhts,nhsd->nthd", weights, v).flatten(2) @ self.w_o


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x)
        return x


def run(net):
    return net(data(2, 5, 12))
"""
BARE_LAYERS = """
self.w_q = weights(heads, width, dim)
self.w_k = weights(heads, width, dim)
self.w_v = weights(heads, width, dim)
"""
BARE_CALLS = """
q = torch.einsum("ntc,hdc->nhtd", x, self.w_q)
k = torch.einsum("nsc,hdc->nhsd", x, self.w_k)
v = torch.einsum("nsc,hdc->nhsd", x, self.w_v)
"""
WIDE = BARE_LAYERS.replace("self.w_v = weights(heads, width", "self.w_v = weights(heads, v_width")
FLAT = """
self.wq = nn.Parameter(torch.randn(dim, dim) * 0.1)
self.wk = nn.Parameter(torch.randn(dim, dim) * 0.1)
self.wv = nn.Parameter(torch.randn(dim, dim) * 0.1)
self.heads = heads
"""
FLAT_CALLS = """
b, t, c = x.shape
q = (x @ self.wq).view(b, t, self.heads, -1).transpose(1, 2)
k = torch.matmul(x, self.wk).view(b, t, self.heads, -1).transpose(1, 2)
v = (x @ self.wv).view(b, t, self.heads, -1).transpose(1, 2)
"""

LISTED = BOTH.replace("        self.out = nn.Linear(dim, dim)\n", "").replace("self.out(", "self.layers[-1](")
COPIES = """

def copies(layer, count):
    return nn.ModuleList([copy.deepcopy(layer) for _ in range(count)])

"""
FOUR = "self.layers = copies(nn.Linear(dim, dim), 4)"
LOOP = """
q, k, v = [layer(x).view(b, -1, self.heads, width).transpose(1, 2)
           for layer, x in zip(self.layers, (query, key, value))]
"""
THREE = "self.layers = nn.ModuleList([nn.Linear(dim, dim, bias=False) for _ in range(3)])"


def listed(layers: str, calls: str, program: str = LISTED) -> str:
    return own(layers, calls, "import copy\n" + COPIES + program)


FORMS = {
    "a list of four copies": listed(FOUR, LOOP),
    "a list of three": listed(THREE, LOOP, BOTH),
    "a list by its places": listed(
        FOUR,
        "q = self.layers[0](query).view(b, -1, self.heads, width).transpose(1, 2)\n"
        "k = self.layers[1](key).view(b, -1, self.heads, width).transpose(1, 2)\n"
        "v = self.layers[-2](value).view(b, -1, self.heads, width).transpose(1, 2)"),
    "a list gone through with its inputs": listed(
        FOUR,
        "q, k, v = (layer(x).view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)\n"
        "           for x, layer in zip([query, key, value], self.layers))"),
    "a list of one input": listed(
        THREE, "q, k, v = (f(y).reshape(b, -1, self.heads, width).transpose(1, 2)\n"
               "           for f, y in zip(self.layers, (query, query, query)))",
        BOTH.replace("self.cross(x, memory, memory)", "self.cross(memory, memory, memory).mean()")),
    "a list in any order": listed(FOUR, LOOP.replace("q, k, v =", "v, q, k =").replace("query, key, value", "value, query, key")),
    "a list whose products change in place": listed(FOUR, LOOP.replace("layer(x)", "layer(x).mul_(2)")),
    "plain": own(),
    "no bias": own(LAYERS.replace("dim, dim)", "dim, dim, bias=False)")),
    "one line": own(LAYERS, "q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))"),
    "bare results": own(calls="q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)\n"
                              "q, k, v = (self.split(part) for part in (q, k, v))"),
    "a value of another width": own(LAYERS.replace("self.to_v = nn.Linear(dim, dim)",
                                                   "self.to_v = nn.Linear(dim, 2 * dim)"),
                                    program=SELF.replace("self.out = nn.Linear(dim, dim)",
                                                         "self.out = nn.Linear(2 * dim, dim)")),
    "widths in numbers": own("self.to_q = nn.Linear(12, 12)\nself.to_k = nn.Linear(12, 12)\nself.to_v = nn.Linear(12, 6)",
                             program=SELF.replace("nn.Linear(dim, dim)", "nn.Linear(6, dim)")),
    "scaled in place": own(calls="q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)\n"
                                 "q *= 0.5\nq, k, v = self.split(q), self.split(k), self.split(v)"),
    "viewed across the heads": own(calls="q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)\n"
                                         "b, t, c = x.shape\n"
                                         "q = q.view(b * t * self.heads, -1).view(b, t, self.heads, -1).transpose(1, 2)\n"
                                         "k, v = self.split(k), self.split(v)"),
    "self and cross": own(calls=BOTH_CALLS, program=BOTH),
    "cross with widths of its own": HEAD + CROSS,
    "one module a head": HEAD + HEADS,
    "initialised by name": own(
        LAYERS + "nn.init.xavier_uniform_(self.to_k.weight)\nself.to_v.weight.data.normal_(0, 0.1)\n"
        "if self.to_q.bias is not None:\n    nn.init.zeros_(self.to_q.bias)\n"),
    "initialised by name with widths of its own": own(
        "self.to_q = nn.Linear(12, 12)\nself.to_k = nn.Linear(12, 12)\nself.to_v = nn.Linear(12, 6)\n"
        "nn.init.constant_(self.to_v.weight, 0.25)\ntorch.nn.init.normal_(self.to_q.weight, std=0.1)",
        program=SELF.replace("nn.Linear(dim, dim)", "nn.Linear(6, dim)")),
    "parameters": own(BARE_LAYERS, BARE_CALLS, BARE),
    "parameters whose sizes are read": own(
        BARE_LAYERS, BARE_CALLS + "q = q * (self.w_q.shape[1] + self.w_k.size(0) + self.w_v.size(-1))", BARE),
    "parameters that come first": own(
        BARE_LAYERS,
        "q, k, v = (torch.einsum('hdc,ntc->nthd', self.w_q, x), torch.einsum('hdc,ntc->nthd', self.w_k, x),\n"
        "           torch.einsum('hdc,ntc->nthd', self.w_v, x))\n"
        "q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)", BARE),
    "parameters of keys and values": own(BARE_LAYERS, BARE_CALLS.replace("nsc,hdc->nhsd\", x", "nsc,hdc->nhsd\", memory"), BARE),
    "flat parameters": own(FLAT, FLAT_CALLS.replace("torch.matmul(x, self.wk)", "(x @ self.wk)"), BARE),
    "a subclass with another query": own() + OVERRIDING,
}  # fmt: skip

TWO_CLASSES = (
    own().replace("class Net", "class Mixer(Attention):\n    pass\n\n\nclass Net")
    + """

class Other(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Attention(), Other(), Mixer()

    def forward(self, x):
        return self.third(self.second(self.first(x)))
"""
)
FORMS["two classes of the same names"] = TWO_CLASSES

UNEQUAL = {
    "a value of another width": FORMS.pop("a value of another width"),
    "parameters of fewer heads": own(BARE_LAYERS.replace("w_v = weights(heads", "w_v = weights(1"), BARE_CALLS, BARE),
    "parameters of another width": own(
        WIDE, BARE_CALLS.replace("self.w_q)", "self.w_q) / self.w_v.shape[1]"), BARE.replace("v_width=4", "v_width=5")
    ),
}

REFUSED = {
    "filled from another of them": (own(LAYERS + "self.to_k.weight.data.copy_(self.to_q.weight.data)\n"), "not only called"),
    "filled by a function of the program": (
        own(LAYERS + "fill(self.to_k)\n") + "\n\ndef fill(layer):\n    nn.init.zeros_(layer.weight)\n", "not only called",
    ),
    "resized": (own(LAYERS + "self.to_k.weight.data.resize_(3, 4)\n"), "not only called"),
    "returned by a filler": (own(LAYERS + "self.other = nn.init.zeros_(self.to_k.weight)\n"), "not only called"),
    "hooked by name": (own(LAYERS + "self.to_v.register_forward_hook(print)\n"), "not only called"),
    "tied": (own(LAYERS + "self.to_k.weight = self.to_q.weight\n"), "not only called"),
    "named in a list": (own() + '\nNO_DECAY = ["to_q", "bias"]\n', "a string names the layer"),
    "named in a pattern": (own() + '\nPATTERN = "layers.0.to_q.weight"\n', "a string names the layer"),
    "biases that differ": (
        own("self.to_q = nn.Linear(dim, dim)\nself.to_k = nn.Linear(dim, dim, bias=False)\nself.to_v = nn.Linear(dim, dim)"),
        "do not agree on a bias",
    ),
    "made in a branch": (
        own("if heads > 1:\n    self.to_q = nn.Linear(dim, dim)\nelse:\n    self.to_q = nn.Linear(dim, dim)\n"
            "self.to_k = nn.Linear(dim, dim)\nself.to_v = nn.Linear(dim, dim)"),
        "different branches",
    ),
    "called in a branch": (
        own(calls=CALLS.replace("v = self.split(self.to_v(x))",
                                "if self.heads > 1:\n    v = self.split(self.to_v(x))\nelse:\n    v = self.split(self.to_v(x))")),
        "called more than once",
    ),
    "the input changes between": (
        own(calls=CALLS.replace("k = self.split", "x = x + 1\nk = self.split")), "`x` changes",
    ),
    "the input changes in place between": (
        own(calls="x = x * 1.0\n" + CALLS.replace("k = self.split", "x.mul_(2)\nk = self.split")), "changed in place",
    ),
    "two classes of one checkpoint name": (
        own() + "\n\nclass Other(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.to_q, self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)\n",
        "could not tell",
    ),
    "a dictionary of modules by the same names": (
        own() + "\n\nOTHERS = nn.ModuleDict({'to_q': nn.Linear(4, 4), 'to_k': nn.Linear(4, 4), 'to_v': nn.Linear(4, 4)})\n",
        "a string names the layer",
    ),
    "parameters that are filled elsewhere": (
        own(BARE_LAYERS + "nn.init.normal_(self.w_q)\n", BARE_CALLS, BARE), "not only multiplied",
    ),
    "empty parameters": (
        own(FLAT.replace("randn", "empty"), FLAT_CALLS.replace("torch.matmul(x, self.wk)", "(x @ self.wk)"), BARE),
        "made empty",
    ),
    "products of different kinds": (
        own(BARE_LAYERS, BARE_CALLS.replace("nsc,hdc->nhsd\", x, self.w_k", "nsc,dhc->nhsd\", x, self.w_k.transpose(0, 1)"), BARE),
        "",
    ),
    "parameters of other heads": (
        own(BARE_LAYERS.replace("w_v = weights(heads, width", "w_v = weights(1, 2 * width"), BARE_CALLS, BARE), "differ in more than their outputs",
    ),
    "frozen parameters": (
        own(FLAT.replace(" * 0.1)", " * 0.1, requires_grad=False)"), FLAT_CALLS, BARE), "",
    ),
    "parameters of unknown shape": (
        own(FLAT.replace("torch.randn(dim, dim) * 0.1", "torch.eye(dim) @ torch.randn(dim, dim)"),
            FLAT_CALLS.replace("torch.matmul(x, self.wk)", "(x @ self.wk)"), BARE),
        "cannot be told",
    ),
    "a list that is counted": (listed(FOUR, LOOP + "v = v * len(self.layers)"), "not understood"),
    "a list that is initialised": (
        listed(FOUR + "\nfor layer in self.layers:\n    nn.init.zeros_(layer.bias)", LOOP), "not only read layer by layer",
    ),
    "a list of five": (listed(FOUR.replace("4", "5"), LOOP), ""),
    "a list of unknown length": (listed(FOUR.replace("4", "heads + 1"), LOOP), ""),
    "a list that another class has too": (
        listed(FOUR, LOOP) + "\n\nclass Other(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layers = copies(nn.Linear(4, 4), 4)\n",
        "could not tell",
    ),
    "a list of widths that differ": (
        listed("self.layers = nn.ModuleList([nn.Linear(dim, d) for d in (dim, dim, dim, dim)])", LOOP), "not alike",
    ),
    "a list with a tied layer": (
        listed(FOUR + "\nself.layers[0].weight = self.layers[1].weight", LOOP), "not only called",
    ),
    "a list whose layer is hooked": (
        listed(FOUR + "\nself.layers[1].register_forward_hook(print)", LOOP), "not only called",
    ),
    "compiled": (own() + "\n\ndef compiled(net):\n    return torch.jit.script(net)\n", "TorchScript"),
    "known by the exact class": (
        own(calls=BOTH_CALLS, program=BOTH) + "\n\ndef init(m):\n    if type(m) == nn.Linear:\n        m.bias.data.zero_()\n",
        "exact class",
    ),
    "a memory that may be missing": (
        own(calls="q = self.to_q(query).view(b, -1, self.heads, width).transpose(1, 2)\n"
                  "if key is None:\n    return self.out(query)\n" + "\n".join(BOTH_CALLS.strip().splitlines()[1:]), program=BOTH),
        "may end",
    ),
    "reached by a name that is made up": (
        own(calls='q, k, v = (self.split(getattr(self, "to_" + n)(x)) for n in "qkv")'), "",
    ),
    "convolutions": (
        own(LAYERS.replace("nn.Linear(dim, dim)", "nn.Conv1d(dim, dim, 1)"),
            "q, k, v = (self.split(f(x.transpose(1, 2)).transpose(1, 2)) for f in (self.to_q, self.to_k, self.to_v))"),
        "",
    ),
}  # fmt: skip

MODERN = {
    "fused": own("self.qkv = nn.Linear(dim, 3 * dim)", "q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, -1))"),
    "torch's module": HEAD + """
class Net(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 3, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x)[0]
""",
}  # fmt: skip
