"""Programs with layer norms in the styles met in the wild, for the tests of `rmsnorm`.

Each defines `Net` and `run(net)`. `OWN` names the classes that write the formula out: class -> (weight, bias, eps).
"""

from __future__ import annotations

HEAD = """
import copy
import math
import torch
import torch.nn as nn
import torch.nn.functional as F
from functools import partial

OWN = {}
"""

ATTENTION = """
class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (p.view(b, t, self.heads, c // self.heads).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)
        scores = scores.masked_fill(torch.ones(t, t).tril() == 0, float("-inf"))
        y = scores.softmax(dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, c))
"""

BLOCK = """
class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = NORM1
        self.attention = Attention(dim)
        self.norm2 = NORM2
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))
"""

NET = """
class Net(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        self.layers = nn.ModuleList([Block(dim) for _ in range(2)])
        self.final = NORM3
        self.head = nn.Linear(dim, 11)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x))


def run(net):
    return net(torch.arange(12).view(2, 6) % 11)
"""


def own(norm1: str, norm2: str = "", norm3: str = "", more: str = "", block: str = BLOCK, net: str = NET) -> str:
    """A small language model whose norms are made by these expressions."""
    text = HEAD + more + ATTENTION + block + net
    return text.replace("NORM1", norm1).replace("NORM2", norm2 or norm1).replace("NORM3", norm3 or norm2 or norm1)


STD = """
class Normalisation(nn.Module):
    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.a_2 = nn.Parameter(torch.ones(features))
        self.b_2 = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


OWN["Normalisation"] = ("a_2", "b_2", "eps")
"""

VARIANCE = """
class Settings:
    width = 8


class Norm(nn.Module):
    \"\"\"As in the paper.\"\"\"

    def __init__(self, settings, variance_epsilon=1e-12):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(settings.width))
        self.beta = nn.Parameter(torch.zeros(settings.width))
        self.variance_epsilon = variance_epsilon

    def forward(self, x):
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.variance_epsilon)
        return self.gamma * x + self.beta


OWN["Norm"] = ("gamma", "beta", "variance_epsilon")
"""

OPTIONAL = """
class LayerNorm(nn.Module):
    def __init__(self, size, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, inputs):
        return F.layer_norm(inputs, self.weight.shape, self.weight, self.bias, 1e-5)


OWN["LayerNorm"] = ("weight", "bias", 1e-5)
"""

RSQRT = """
class Scaled(nn.Module):
    def __init__(self, dim, eps=1e-3):
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.empty(dim))
        self.b = nn.Parameter(torch.empty(dim))
        self.reset()

    def reset(self):
        nn.init.ones_(self.g)
        nn.init.zeros_(self.b)

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, unbiased=False, keepdim=True)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.g + self.b


OWN["Scaled"] = ("g", "b", "eps")
"""

WRAPPED = """
class Wide(nn.LayerNorm):
    def forward(self, x):
        kind = x.dtype
        y = super().forward(x.to(self.weight.dtype))
        return y.to(kind)
"""

WRAPPED_WITH_CONSTRUCTOR = """
class Wide(nn.LayerNorm):
    def __init__(self, size, eps=1e-6):
        super().__init__(size, eps)
"""

HANDED_BLOCK = BLOCK.replace("def __init__(self, dim):", "def __init__(self, dim, norm_layer=nn.LayerNorm):")
HANDED_NET = NET.replace("def __init__(self, dim=8):", "def __init__(self, dim=8, norm_layer=None):").replace(
    "        self.embedding",
    "        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)\n        self.embedding",
)
DEFAULT_NET = NET.replace("dim=8):", "dim=8, norm_layer=nn.LayerNorm):").replace(
    "Block(dim)", "Block(dim, norm_layer=norm_layer)"
)
GIVEN_NET = HANDED_NET.replace("Block(dim)", "Block(dim, norm_layer=norm_layer)")

INITIALISED = NET.replace(
    "        self.head = nn.Linear(dim, 11)\n",
    """        self.head = nn.Linear(dim, 11)
        self.apply(self.fill)

    def fill(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
            nn.init.ones_(module.weight)

    def groups(self):
        decay, rest = set(), set()
        plain = (nn.LayerNorm, nn.Embedding)
        for name, module in self.named_modules():
            for part, _ in module.named_parameters(recurse=False):
                whole = f"{name}.{part}"
                if part == "bias":
                    rest.add(whole)
                elif isinstance(module, nn.Linear):
                    decay.add(whole)
                elif isinstance(module, plain):
                    rest.add(whole)
        assert decay | rest == {name for name, _ in self.named_parameters()}
        return decay, rest
""",
)

STRICT = (
    INITIALISED.replace(
        "            nn.init.ones_(module.weight)\n",
        "            nn.init.ones_(module.weight)\n"
        "        elif not isinstance(module, (nn.Embedding, nn.ModuleList, nn.Sequential, nn.GELU, Attention, Block, Net)):\n"
        "            raise TypeError(type(module))\n",
    )
    .replace("elif not isinstance(module, (nn.Emb", "elif isinstance(module, (nn.Emb")
    .replace("            raise TypeError", "            pass\n        else:\n            raise TypeError")
)
ALIKE = INITIALISED.replace(
    "            nn.init.zeros_(module.bias)\n            nn.init.ones_(module.weight)",
    "            for part in (module.weight, module.bias):\n                nn.init.ones_(part)",
)
UNEVEN = INITIALISED.replace("nn.init.ones_(module.weight)", "nn.init.normal_(module.weight, 1.0, 0.02)")

DENIED = INITIALISED.replace(
    """        elif isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
            nn.init.ones_(module.weight)
""",
    """        if not isinstance(module, (nn.Embedding, nn.LayerNorm)) and hasattr(module, "weight"):
            module.bias.data.zero_()
""",
)

POST = BLOCK.replace("x = x + self.attention(self.norm1(x))", "x = self.norm1(x + self.attention(x))").replace(
    "return x + self.mlp(self.norm2(x))", "return self.norm2(x + self.mlp(x))"
)

CALLED = (
    BLOCK.replace("        self.norm1 = NORM1\n", "        self.dim = dim\n")
    .replace("self.norm1(x)", "F.layer_norm(x, (self.dim,))")
    .replace("        self.norm2 = NORM2\n", "")
    .replace("self.norm2(x)", "F.layer_norm(x, (x.size(-1),), None, None, 1e-6)")
)

FILLED = BLOCK.replace(
    "        self.attention", "        nn.init.constant_(self.norm1.bias, 0)\n        self.attention"
)

FORMS = {
    "by name": own("nn.LayerNorm(dim)", "nn.LayerNorm(dim, 1e-6)", "nn.LayerNorm(dim, eps=1e-3)"),
    "post-norm": own("nn.LayerNorm(dim)", block=POST),
    "imported by name": own("LayerNorm(dim)", more="from torch.nn import LayerNorm\n"),
    "every argument": own(
        "nn.LayerNorm([dim], 1e-6, True, False)", "nn.LayerNorm(normalized_shape=dim, bias=True)",
        "nn.LayerNorm(dim, elementwise_affine=False)",
    ),
    "in lists": own(
        "nn.ModuleDict({'norm': nn.LayerNorm(dim)})", "nn.Sequential(nn.LayerNorm(dim), nn.Dropout(0.0))",
        "copy.deepcopy(self.layers[0].norm2)", block=BLOCK.replace("self.norm1(x)", "self.norm1['norm'](x)"),
    ),
    "handed in, and made with a default": own(
        "norm_layer(dim)", block=HANDED_BLOCK, net=HANDED_NET
    ),
    "handed in all the way": own("norm_layer(dim)", block=HANDED_BLOCK, net=GIVEN_NET),
    "handed in by a default of the model": own("norm_layer(dim)", block=HANDED_BLOCK, net=DEFAULT_NET),
    "a class made from torch's": own("Wide(dim)", more=WRAPPED),
    "a class made from torch's with a constructor": own("Wide(dim)", more=WRAPPED_WITH_CONSTRUCTOR),
    "initialised and grouped by class": own("nn.LayerNorm(dim)", net=INITIALISED),
    "an initialiser that refuses what it does not know": own("nn.LayerNorm(dim)", net=STRICT),
    "an initialiser of its own": own("nn.LayerNorm(dim)", net=UNEVEN),
    "an initialiser that asks for anything else": own("nn.LayerNorm(dim)", net=DENIED),
    "its bias filled by hand": own("nn.LayerNorm(dim)", block=FILLED),
    "a function": own("", norm3="nn.Identity()", block=CALLED),
}  # fmt: skip

WRITTEN_OUT = {
    "the deviation, unbiased": own("Normalisation(dim)", more=STD),
    "the variance, of a configuration": own("Norm(Settings)", more=VARIANCE),
    "with a bias on request": own("LayerNorm(dim, bias=True)", "LayerNorm(dim, bias=False)", more=OPTIONAL),
    "one over the root": own("Scaled(dim)", "Scaled(dim, eps=1e-5)", more=RSQRT),
}

CHANNELS = """
class Channels(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(dim, 1))
        self.b = nn.Parameter(torch.zeros(dim, 1))

    def forward(self, x):
        var = torch.var(x, dim=1, unbiased=False, keepdim=True)
        mean = torch.mean(x, dim=1, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.g + self.b
"""

CONDITIONED = STD.replace("def forward(self, x):", "def forward(self, x, level=0.5):").replace(
    "return self.a_2 *", "return (1 + level * self.a_2) *"
)

HALVED = STD.replace("nn.Parameter(torch.ones(features))", "nn.Parameter(0.5 * torch.ones(features))")
TWICE = STD.replace("return self.a_2", "return 2.0 * self.a_2")

READ = (
    NET
    + """

def penalty(net):
    return net.final.bias.abs().sum()
"""
)

LOADED = (
    NET
    + """

def load(net, arrays):
    for layer, array in zip(net.layers, arrays):
        layer.norm1.weight.data.copy_(array["scale"])
        layer.norm1.bias.data.copy_(array["bias"])
"""
)

FROM_TENSORFLOW = (
    NET
    + """

def load(net, arrays):
    for name, array in arrays.items():
        pointer = net
        for part in name.split("/"):
            if part == "gamma":
                pointer = getattr(pointer, "weight")
            elif part == "beta":
                pointer = getattr(pointer, "bias")
            else:
                pointer = getattr(pointer, part)
        pointer.data.copy_(array)
"""
)

REFUSED = {
    "its bias is read": own("nn.LayerNorm(dim)", net=READ, norm2="nn.Identity()", norm3="nn.LayerNorm(dim)").replace(
        "self.norm1 = nn.LayerNorm(dim)", "self.norm1 = nn.Identity()"
    ),
    "a loader by names": own("nn.LayerNorm(dim)", "nn.Identity()", net=LOADED),
    "a loader of gamma and beta": own("nn.LayerNorm(dim)", net=FROM_TENSORFLOW),
    "an initialiser that treats both alike": own("nn.LayerNorm(dim)", net=ALIKE),
    "over another axis": own(
        "Channels(dim)", "nn.Identity()", more=CHANNELS,
        block=BLOCK.replace("self.norm1(x)", "self.norm1(x.transpose(1, 2)).transpose(1, 2)"),
    ),
    "conditioned": own("Normalisation(dim)", "nn.Identity()", more=CONDITIONED),
    "another start": own("Normalisation(dim)", more=HALVED),
    "another factor": own("Normalisation(dim)", more=TWICE),
    "a table": own(
        "NORMS[kind](dim)", "nn.Identity()", more="NORMS = {'layer': nn.LayerNorm, 'none': nn.Identity}\n",
        block=BLOCK.replace("def __init__(self, dim):", "def __init__(self, dim, kind='layer'):"),
    ),
    "arguments that are not written out": own("nn.LayerNorm(*sizes)", "nn.Identity()", block=BLOCK.replace(
        "super().__init__()", "super().__init__()\n        sizes = [dim]"
    )),
    "a function with a bias": own("", "nn.Identity()", block=BLOCK.replace(
        "        self.norm1 = NORM1\n",
        "        self.g = nn.Parameter(torch.ones(dim))\n        self.b = nn.Parameter(torch.zeros(dim))\n",
    ).replace("self.norm1(x)", "F.layer_norm(x, (x.size(-1),), self.g, self.b)")),
}  # fmt: skip

CONVOLUTIONS = """
import torch
import torch.nn as nn


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)
"""

RECURRENT = """
import torch.nn as nn


class Net(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.cells = nn.LSTM(dim, dim, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(x + self.cells(x)[0])
"""

UNTOUCHED = {"convolutions": CONVOLUTIONS, "recurrent": RECURRENT}

# -- pre-norm models whose outputs stay, and such in which something stands in the way

HEADS = """
class Head(nn.Module):
    def __init__(self, dim, size):
        super().__init__()
        self.key = nn.Linear(dim, size, bias=False)
        self.query = nn.Linear(dim, size, bias=False)
        self.value = nn.Linear(dim, size, bias=False)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(-2, -1) * k.size(-1) ** -0.5
        return F.softmax(scores, dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = nn.ModuleList([Head(dim, dim // heads) for _ in range(heads)])
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))
"""

TABLED = NET.replace(
    "        self.layers", "        self.positions = nn.Embedding(6, dim)\n        self.layers"
).replace(
    "x = self.embedding(tokens)",
    "x = self.embedding(tokens) * math.sqrt(8) + self.positions(torch.arange(tokens.size(1)))",
)
LEARNED = NET.replace(
    "        self.layers", "        self.positions = nn.Parameter(torch.randn(1, 6, dim))\n        self.layers"
).replace("x = self.embedding(tokens)", "x = self.embedding(tokens) + self.positions[:, :tokens.size(1)]")
BUFFERED = NET.replace(
    "        self.layers",
    """        table = torch.zeros(6, dim)
        place = torch.arange(6).unsqueeze(1).float()
        rate = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
        table[:, 0::2] = torch.sin(place * rate)
        table[:, 1::2] = torch.cos(place * rate)
        self.register_buffer("table", table.unsqueeze(0))
        self.layers""",
).replace("x = self.embedding(tokens)", "x = self.embedding(tokens) + self.table[:, :tokens.size(1)]")

CONV1D = """
class Conv1D(nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.outputs = outputs

    def forward(self, x):
        size = x.size()[:-1] + (self.outputs,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*size)
"""
GPT2 = (
    own("nn.LayerNorm(dim)", more=CONV1D)
    .replace("self.qkv = nn.Linear(dim, 3 * dim)", "self.qkv = Conv1D(3 * dim, dim)")
    .replace("self.out = nn.Linear(dim, dim)", "self.out = Conv1D(dim, dim)")
)

SEQ2SEQ = (
    HEAD
    + """
class Encode(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim, 1e-6)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim, bias=False))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Decode(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim, bias=False)
        self.own = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim, bias=False), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, memory):
        h = self.norm1(x)
        x = x + self.own(h, h, h, need_weights=False)[0]
        x = x + self.cross(self.norm2(x), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norm3(x))


class Net(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        self.encoder = nn.ModuleList(Encode(dim) for _ in range(2))
        self.decoder = nn.ModuleList(Decode(dim) for _ in range(2))
        self.norm, self.final = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 11, bias=False)

    def forward(self, source, target):
        memory = self.embedding(source).transpose(0, 1).transpose(0, 1)
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.norm(memory)
        x = self.embedding(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(self.final(x))


def run(net):
    return net(torch.arange(12).view(2, 6) % 11, torch.arange(8).view(2, 4) % 7)
"""
)

EXACT = {name: FORMS[name] for name in FORMS if name not in ("post-norm", "a function")} | {
    name: WRITTEN_OUT[name] for name in WRITTEN_OUT if "unbiased" not in name
} | {
    "heads without biases": own("nn.LayerNorm(dim)").replace(ATTENTION, HEADS),
    "a table of positions": own("nn.LayerNorm(dim)", net=TABLED),
    "a parameter of positions": own("nn.LayerNorm(dim)", net=LEARNED),
    "a buffer of positions": own("nn.LayerNorm(dim)", net=BUFFERED),
    "layers of the program's own": GPT2,
    "two streams": SEQ2SEQ,
    "only one layer": own("nn.LayerNorm(dim)").replace("for _ in range(2)", "for _ in range(1)"),
    "layers that are counted by an argument": own("nn.LayerNorm(dim)").replace("range(2)", "range(depth)").replace(
        "dim=8):", "dim=8, depth=3):"
    ),
    "a writer without a bias": own("nn.LayerNorm(dim)").replace("self.out = nn.Linear(dim, dim)", "self.out = nn.Linear(dim, dim, bias=False)"),
    "the last position alone": own("nn.LayerNorm(dim)").replace("self.head(self.final(x))", "self.head(self.final(x[:, -1]))"),
}  # fmt: skip

TIED = NET.replace(
    "        self.head = nn.Linear(dim, 11)\n",
    "        self.head = nn.Linear(dim, 11)\n        self.head.weight = self.embedding.weight\n",
)
TIED_LATER = (
    NET
    + """

def tie(net):
    net.head.weight = net.embedding.weight
"""
)
RAW = NET.replace("return self.head(self.final(x))", "return self.head(self.final(x)) + x.sum(-1, keepdim=True)")
RETURNED = NET.replace("return self.head(self.final(x))", "return self.final(x)")
UNNORMED = NET.replace("return self.head(self.final(x))", "return self.head(self.final(x)), x").replace(
    "return net(torch.arange(12).view(2, 6) % 11)", "return net(torch.arange(12).view(2, 6) % 11)[0]"
)
COLLECTED = NET.replace("            x = layer(x)\n", "            x = layer(x)\n            self.last = x\n")
SHIFTED = NET.replace("x = self.embedding(tokens)", "x = self.embedding(tokens) + 1.0")
NORMED = NET.replace("        self.layers", "        self.first = nn.LayerNorm(dim)\n        self.layers").replace(
    "x = self.embedding(tokens)", "x = self.first(self.embedding(tokens))"
)
FED = (
    NET.replace("        self.embedding = nn.Embedding(11, dim)\n", "")
    .replace("x = self.embedding(tokens)", "x = tokens")
    .replace(
        "torch.arange(12).view(2, 6) % 11", "torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).double()"
    )
)
TWICE_USED = NET.replace(
    "            x = layer(x)\n",
    "            x = layer(x)\n        side = self.layers[0].mlp[2](torch.ones(16).to(x))\n",
).replace("return self.head(self.final(x))", "return self.head(self.final(x)) + side.sum()")
BOUNDED = NET.replace("nn.Embedding(11, dim)", "nn.Embedding(11, dim, max_norm=1.0)")
OPEN_BIAS = own("nn.LayerNorm(dim)", block=BLOCK.replace("def __init__(self, dim):", "def __init__(self, dim, bias=True):").replace(
    "nn.Linear(dim, 2 * dim)", "nn.Linear(dim, 2 * dim, bias=bias)"
), net=NET.replace("def __init__(self, dim=8):", "def __init__(self, dim=8, bias=True):").replace("Block(dim)", "Block(dim, bias)"))  # fmt: skip

NOT_EXACT = {
    "post-norm": FORMS["post-norm"],
    "an unbiased deviation": WRITTEN_OUT["the deviation, unbiased"],
    "a tied head": own("nn.LayerNorm(dim)", net=TIED),
    "a head that is tied later": own("nn.LayerNorm(dim)", net=TIED_LATER),
    "a stream that is read raw": own("nn.LayerNorm(dim)", net=RAW),
    "a norm that is put out": own("nn.LayerNorm(dim)", net=RETURNED),
    "a stream that is put out": own("nn.LayerNorm(dim)", net=UNNORMED),
    "a stream that is kept": own("nn.LayerNorm(dim)", net=COLLECTED),
    "a number that is added": own("nn.LayerNorm(dim)", net=SHIFTED),
    "a stream that starts with a norm": own("nn.LayerNorm(dim)", net=NORMED),
    "features from outside": own("nn.LayerNorm(dim)", net=FED),
    "a writer that serves two ends": own("nn.LayerNorm(dim)", net=TWICE_USED),
    "an embedding of bounded norm": own("nn.LayerNorm(dim)", net=BOUNDED),
    "a bias that an argument decides on": OPEN_BIAS,
}  # fmt: skip

# -- names that lists and copies make harder

CLONES = """
def clones(module, count):
    return nn.ModuleList([copy.deepcopy(module) for _ in range(count)])
"""
FOUR = """
class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.layers = clones(nn.Linear(dim, dim), 4)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = [l(y).view(b, t, self.heads, c // self.heads).transpose(1, 2) for l, y in zip(self.layers, (x, x, x))]
        y = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(c // self.heads), dim=-1) @ v
        return self.layers[-1](y.transpose(1, 2).reshape(b, t, c))
"""
PLACED = """
class Places(nn.Module):
    def __init__(self, dim):
        super().__init__()
        table = torch.zeros(6, dim)
        table[:, 0::2] = torch.arange(6).unsqueeze(1).float().sin()
        table[:, 1::2] = torch.arange(6).unsqueeze(1).float().cos() + 1.0
        self.register_buffer("table", table)
        self.shift = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        return x + self.table[:x.size(1), :] + self.shift
"""
PLACED_BLOCK = (
    BLOCK.replace("        self.norm1", "        self.places = Places(dim)\n        self.norm1")
    .replace("        x = x + self.attention", "        x = self.places(x)\n        x = x + self.attention")
    .replace(
        "self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))",
        "self.mlp = nn.ModuleDict(dict(up=nn.Linear(dim, 2 * dim), down=nn.Linear(2 * dim, dim)))",
    )
    .replace("self.mlp(self.norm2(x))", "self.mlp.down(F.relu(self.mlp.up(self.norm2(x))))")
)
COPIED = NET.replace("nn.ModuleList([Block(dim) for _ in range(2)])", "clones(Block(dim), 2)")

EXACT |= {
    "a list of which three read and one writes": own("nn.LayerNorm(dim)", more=CLONES).replace(ATTENTION, FOUR),
    "copies that have tables": own("nn.LayerNorm(dim)", more=CLONES + PLACED, block=PLACED_BLOCK, net=COPIED),
}

TAPPED = (
    NET.replace(
        "        for layer in self.layers:\n            x = layer(x)\n",
        """        taps = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 5:
                taps.append(x.mean())
""",
    )
    .replace("range(2)", "range(depth)")
    .replace("dim=8):", "dim=8, depth=3):")
    .replace("return self.head(self.final(x))", "return self.head(self.final(x)) + sum(taps)")
)
MEASURED = (
    NET
    + """

def spread(net):
    return net.embedding.weight.norm()
"""
)
WRAPPED_RESULT = NET.replace("return self.head(self.final(x))", "return Result(self.head(self.final(x)), x)").replace(
    "return net(torch.arange(12).view(2, 6) % 11)", "return net(torch.arange(12).view(2, 6) % 11).scores"
)
RESULT = """
class Result:
    def __init__(self, scores, stream):
        self.scores = scores
        self.stream = stream
"""
IDLE = NET.replace("        self.head = ", "        self.spare = Block(dim)\n        self.head = ")
UNKEPT = BUFFERED.replace("table.unsqueeze(0))", "table.unsqueeze(0), persistent=False)")

NOT_EXACT |= {
    "a layer's stream that is tapped": own("nn.LayerNorm(dim)", net=TAPPED),
    "a weight that is read by code out of reach": own("nn.LayerNorm(dim)", net=MEASURED),
    "a stream within the result": own("nn.LayerNorm(dim)", more=RESULT, net=WRAPPED_RESULT),
    "a block that never runs": own("nn.LayerNorm(dim)", net=IDLE),
    "a table that no checkpoint holds": own("nn.LayerNorm(dim)", net=UNKEPT),
}
