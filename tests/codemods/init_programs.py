"""Programs for the rule `init`: what writes to their streams is listed by hand, as names in the state dict."""

from __future__ import annotations

HEAD = """\
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.drop = nn.Dropout(0.1)

    def forward(self, x, memory):
        scores = self.q(x) @ self.k(memory).transpose(-2, -1) * x.size(-1) ** -0.5
        return self.drop(self.o(scores.softmax(-1) @ self.v(memory)))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h)
        return x + self.ff(self.norm2(x))
"""

NET = """\


class Net(nn.Module):
    def __init__(self, words=50, dim=8, depth=3):
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.layers = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, words)
{setup}
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
"""


def net(setup: str = "", head: str = HEAD, tail: str = "", old: str = "", new: str = "") -> str:
    """A model with further lines in its constructor; something of it may be replaced."""
    lines = "".join(f"        {line}\n" for line in setup.splitlines())
    text = head + NET.replace("{setup}\n", f"{lines}\n") + tail
    assert old in text
    return text.replace(old, new) if old else text


def layers(count: int, *names: str, at: str = "layers") -> list[str]:
    return [f"{at}.{i}.{name}" for i in range(count) for name in names]


PLAIN = layers(3, "attention.o.weight", "ff.2.weight")
INIT = """\


def fill(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.5)
"""
RAW = (
    HEAD.replace(
        "return self.drop(self.o(scores.softmax(-1) @ self.v(memory)))",
        "return torch.einsum('btc,cd->btd', scores.softmax(-1) @ self.v(memory), self.w_o)",
    )
    .replace("self.drop = ", "self.w_o = nn.Parameter(torch.randn(dim, dim))\n        self.drop = ")
    .replace(
        "self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))", "self.v = (nn.Linear(dim, dim) for _ in range(3))"
    )
)
OWN = HEAD.replace("class Attention", """\
class Conv1D(nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.w = nn.Parameter(torch.randn(inputs, outputs))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.w + self.b


class Attention""").replace("nn.Linear(2 * dim, dim))", "Conv1D(dim, 2 * dim))")  # fmt: skip
WRAPPER = (
    HEAD.replace(
        "        x = x + self.attention(h, h)\n        return x + self.ff(self.norm2(x))\n",
        "        return self.add[1](self.add[0](x, lambda y: self.attention(h, h)), lambda y: self.ff(self.norm2(y)))\n",
    )
    .replace("        self.ff = ", "        self.add = nn.ModuleList([Add(), Add()])\n        self.ff = ")
    .replace(
        "class Block",
        "class Add(nn.Module):\n    def forward(self, x, sublayer):\n        return x + sublayer(x)\n\n\nclass Block",
    )
)
FACTORY = """\


def make():
    model = Net()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    return model
"""
DROP_PATH = """\
class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        kept = 1 - self.p + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
        return x.div(1 - self.p) * kept.floor()


class Attention"""

# name: (text, groups of what writes to one stream, embeddings)
FORMS = {
    "a list": (net(), [PLAIN], ["embed.weight"]),
    "an initialiser of the model's own": (net("self.apply(fill)", HEAD + INIT), [PLAIN], ["embed.weight"]),
    "a method as initialiser": (
        net("self.apply(self.fill)", tail="\n    def fill(self, module):\n        if isinstance(module, nn.Linear):\n"
            "            module.weight.data.normal_(0, 0.3)\n"),
        [PLAIN], ["embed.weight"],
    ),
    "filled by name": (
        net("for name, p in self.named_parameters():\n    if p.dim() > 1:\n        nn.init.xavier_uniform_(p)"),
        [PLAIN], ["embed.weight"],
    ),
    "a tied head": (net("self.head.weight = self.embed.weight"), [PLAIN], ["embed.weight", "head.weight"]),
    "a Sequential": (
        net(old="nn.ModuleList([Block(dim) for _ in range(depth)])", new="nn.Sequential(*[Block(dim) for _ in range(depth)])"),
        [PLAIN], ["embed.weight"],
    ),
    "copies": (
        net(old="[Block(dim) for _ in range(depth)]", new="[copy.deepcopy(Block(dim)) for _ in range(depth)]"),
        [PLAIN], ["embed.weight"],
    ),
    "a weight without a module": (net(head=RAW), [layers(3, "attention.w_o", "ff.2.weight")], ["embed.weight"]),
    "a linear layer of its own class": (net(head=OWN), [layers(3, "attention.o.weight", "ff.2.w")], ["embed.weight"]),
    "one class for all sums": (net(head=WRAPPER), [PLAIN], ["embed.weight"]),
    "paths that are dropped": (
        net(head=HEAD.replace("class Attention", DROP_PATH).replace("self.drop = nn.Dropout(0.1)", "self.drop = DropPath(0.1)")),
        [PLAIN], ["embed.weight"],
    ),
    "torch's attention": (
        net(head=HEAD.replace("self.attention = Attention(dim)", "self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)")
            .replace("self.attention(h, h)", "self.attention(h, h, h)[0]")),
        [layers(3, "attention.out_proj.weight", "ff.2.weight")], ["embed.weight"],
    ),
    "torch's layers": (
        net(old="Block(dim) for _", new="nn.TransformerEncoderLayer(dim, 2, 16, batch_first=True) for _"),
        [layers(3, "self_attn.out_proj.weight", "linear2.weight")], ["embed.weight"],
    ),
    "torch's stack": (
        net(old="self.layers = nn.ModuleList([Block(dim) for _ in range(depth)])",
            new="self.stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(dim, 2, 16, batch_first=True), depth)")
        .replace("for layer in self.layers:\n            x = layer(x)", "x = self.stack(x)"),
        [layers(3, "self_attn.out_proj.weight", "linear2.weight", at="stack.layers")], ["embed.weight"],
    ),
    "sublayers in lists of their own": (
        net("self.ffs = nn.ModuleList([nn.Sequential(nn.Linear(dim, 8), nn.ReLU(), nn.Linear(8, dim)) for _ in range(depth)])",
            old="[Block(dim) for _ in range(depth)]", new="[Attention(dim) for _ in range(depth)]")
        .replace("for layer in self.layers:\n            x = layer(x)",
                 "for layer, ff in zip(self.layers, self.ffs):\n            x = x + layer(x, x)\n            x = x + ff(x)"),
        [[*layers(3, "o.weight"), *layers(3, "2.weight", at="ffs")]], ["embed.weight"],
    ),
    "two stacks": (
        net("self.more = nn.ModuleList([Block(dim) for _ in range(2)])")
        .replace("        return self.head(x)", "        y = torch.tanh(self.head.weight.sum() * x)\n"
                 "        for layer in self.more:\n            y = layer(y)\n        return self.head(x + y)"),
        [PLAIN, layers(2, "attention.o.weight", "ff.2.weight", at="more")], ["embed.weight"],
    ),
    "made and filled by a function": (net(tail=FACTORY), [PLAIN], ["embed.weight"]),
    "a table that is set": (
        net("self.embed.weight.data = torch.ones(words, dim)"), [PLAIN], [],
    ),
    "positions of values that are there": (
        net("self.places = nn.Embedding.from_pretrained(torch.eye(6, dim))",
            old="x = self.embed(ids)", new="x = self.embed(ids) + self.places(torch.arange(ids.size(1)))"),
        [PLAIN], ["embed.weight"],
    ),
}  # fmt: skip

TRAIN = "\n\ndef train():\n    model = Net()\n    model.apply(fill)\n    print(model)\n"
REFUSED = {
    "filled by a script": (net(head=HEAD + INIT, tail=TRAIN), "filled again behind the constructor"),
    "no projection": (
        net(head=HEAD.replace("self.drop(self.o(scores.softmax(-1) @ self.v(memory)))", "scores.softmax(-1) @ memory")),
        "does not end in a projection",
    ),
    "a learned scale": (
        net(head=HEAD.replace("self.drop = ", "self.scale = nn.Parameter(torch.ones(dim) * 1e-4)\n        self.drop = ")
            .replace("return self.drop(", "return self.scale * (")),
        "learned scale of its own",
    ),
    "one layer again and again": (
        net(old="self.layers = nn.ModuleList([Block(dim) for _ in range(depth)])", new="self.layer = Block(dim)")
        .replace("for layer in self.layers:\n            x = layer(x)", "for _ in range(4):\n            x = self.layer(x)"),
        "one layer runs several times",
    ),
    "a projection in some models": (
        net(head=HEAD.replace("self.drop = ", "self.last = nn.Linear(dim, dim) if dim > 4 else nn.Identity()\n        self.drop = ")
            .replace("return self.drop(", "return self.last(")),
        "depends on how the model is made",
    ),
    "weights that are loaded": (
        net("self.load_state_dict(torch.load('old.pt'))", tail="").replace("self.load_state_dict", "if words < 0: self.load_state_dict"),
        "weights are loaded where the model is made",
    ),
    "an early end": (net("if depth < 9:\n    return\nself.x = 1"), "may return before its end"),
    "heirs": (
        net(tail="\n\nclass More(Net):\n    def __init__(self):\n        super().__init__()\n        self.extra = nn.Linear(2, 2)\n"),
        "goes on building Net, which is a model of its own",
    ),
    "made and filled by a function, and made elsewhere": (
        net(tail=FACTORY + "\n\ndef other():\n    return Net(9)\n"), "filled again behind the constructor"),
}  # fmt: skip

SCALED = "for name, p in self.named_parameters():\n    if name.endswith('o.weight'):\n        nn.init.normal_(p, std=0.02 / {})"
MODERN = {
    "scaled by depth": net(SCALED.format("math.sqrt(2 * depth)")),
    "scaled by a power": net(SCALED.format("(2 * depth) ** 0.5")),
    "scaled layer by layer": net("for i, layer in enumerate(self.layers):\n    layer.attention.o.weight.data.div_(math.sqrt(2 * i + 2))"),
}  # fmt: skip
NOT_DEPTH = net("for p in self.parameters():\n    nn.init.normal_(p, std=1 / math.sqrt(dim))")


APART = HEAD.replace(
    "self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))",
    "self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))\n        self.o = nn.Linear(dim, dim)",
)
MAGNETO = {
    "layers of their own": net(head=APART),
    "an initialiser of the model's own": net("self.apply(fill)", APART + INIT),
    "copies": net(
        head=APART, old="[Block(dim) for _ in range(depth)]", new="[copy.deepcopy(Block(dim)) for _ in range(depth)]"
    ),
    "made and filled by a function": net(head=APART, tail=FACTORY),
}
NOT_MAGNETO = {
    "made in one line": (net(), "made in one line with other layers"),
    "post-norm": (
        net(head=APART.replace("x = x + self.attention(h, h)", "x = self.norm1(x + self.attention(x, x))")
            .replace("return x + self.ff(self.norm2(x))", "return self.norm2(x + self.ff(x))").replace("h = self.norm1(x)", "pass")),
        "for pre-norm models",
    ),
    "query, key and value in one": (
        net(head=APART.replace("self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))", "self.qkv = nn.Linear(dim, 3 * dim)")
            .replace("scores = self.q(x) @ self.k(memory).transpose", "q, k, v = self.qkv(x).chunk(3, -1)\n        scores = q @ k.transpose")
            .replace("@ self.v(memory)", "@ v")),
        "not projected by layers of their own",
    ),
    "two stacks": (FORMS["two stacks"][0].replace(HEAD, APART), "encoder and decoder"),
    "another model of the same layers": (
        net(head=APART, tail=NET.replace("{setup}\n", "\n").replace("class Net", "class Other")), "is made of the same layers"),
    "torch's layers": (FORMS["torch's layers"][0], "MAGNETO is for pre-norm models"),
    "torch's stack": (FORMS["torch's stack"][0], "the layers of this stack are torch's own"),
    "a linear layer of its own class": (FORMS["a linear layer of its own class"][0], "no plain nn.Linear|one line"),
}  # fmt: skip
