"""Programs for the rule `checkpointing`: one block, and the ways in which a stack of them is run."""

from __future__ import annotations

HEAD = """\
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
"""

BLOCK = """\


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, mask=None):
        scores = self.q(x) @ self.k(x).transpose(-2, -1) * x.size(-1) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        self.weights = F.dropout(scores.softmax(-1), 0.2, self.training)
        return self.o(self.weights @ self.v(x))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(0.3))

    def forward(self, x, mask=None{parameter}):
        {first}
        x = x + self.attention(self.norm1(x), mask)
        {last}
        return x + self.ff(self.norm2(x)){result}
"""

STACK = """\


class Stack({bases}):
    def __init__(self, dim, depth):
        super().__init__()
        {made}
{setup}
    def forward(self, x, mask=None{more}):
{body}


class Net(nn.Module):
    def __init__(self, words=11, dim=8, depth=3):
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.stack = Stack(dim, depth)
        self.head = nn.Linear(dim, words)

    def forward(self, ids):
        return self.head(self.stack(self.embed(ids)))
"""

LIST = "self.layers = nn.ModuleList([Block(dim) for _ in range(depth)])"
LOOP = "for layer in self.layers:\n    x = layer(x, mask)\nreturn x"


def program(
    body: str = LOOP, made: str = LIST, *, parameter: str = "", first: str = "pass", last: str = "pass",
    result: str = "", more: str = "", block: str = BLOCK, setup: str = "", bases: str = "nn.Module", tail: str = "",
) -> str:  # fmt: skip
    """A model whose stack is made by `made` and run by `body`."""
    made_block = block.replace("{parameter}", parameter).replace("{result}", result)
    made_block = made_block.replace("{first}", first).replace("{last}", last)
    lines = "\n".join(f"        {line}" if line else "" for line in body.split("\n"))
    stack = STACK.format(made=made, body=lines, more=more, setup=setup, bases=bases)
    return HEAD + made_block + stack + tail


SEQUENTIAL = "self.layers = nn.Sequential(*[Block(dim) for _ in range(depth)])"
LISTS = """\
self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(depth)])
        self.attentions = nn.ModuleList([Attention(dim) for _ in range(depth)])
        self.ffs = nn.ModuleList([nn.Sequential(nn.Linear(dim, 8), nn.ReLU(), nn.Linear(8, dim)) for _ in range(depth)])
        self.drop = nn.Dropout(0.2)"""
CALL_LINES = """\
for layer in self.layers:
    x = layer(
        x,
        mask=mask,  # of the caller
    )  # the stream
return x"""

FORMS = {
    "a loop": program(),
    "a loop on one line": program("for layer in self.layers: x = layer(x, mask)\nreturn x"),
    "a call over several lines": program(CALL_LINES),
    "places": program("for i in range(len(self.layers)):\n    x = self.layers[i](x, mask)\nreturn x"),
    "outputs that are collected": program(
        "found = []\nfor i, layer in enumerate(self.layers):\n    x, seen = layer(x, mask)\n    found.append(seen)\n"
        "return x + sum(found)",
        result=", x",
    ),
    "a residual around the layer": program("for layer in self.layers:\n    x = x + 0.5 * layer(x, mask)\nreturn x"),
    "the method": program("for layer in self.layers:\n    x = layer.forward(x, mask)\nreturn x"),
    "an else branch": program(
        "for i, layer in enumerate(self.layers):\n    if i == 0 and mask is not None:\n        x = layer(x, mask)\n"
        "    else:\n        x = layer(x)\nreturn x"
    ),
    "a Sequential": program("x = self.layers(x)\nreturn x", SEQUENTIAL),
    "a Sequential into another name": program("y = self.layers(x * 2)\nreturn y + x", SEQUENTIAL),
    "a Sequential in an expression": program("return torch.tanh(self.layers(x)) * 2", SEQUENTIAL),
    "sublayers of several lists": program(
        "for norm, attention, ff in zip(self.norms, self.attentions, self.ffs):\n"
        "    x = x + self.drop(attention(norm(x), mask))\n    x = ff(x) + x\nreturn x",
        LISTS,
    ),
    "one layer again and again": program("for _ in range(3):\n    x = self.layer(x)\nreturn x", "self.layer = Block(dim)"),
    "torch's layers": program(
        "for layer in self.layers:\n    x = layer(x, src_mask=mask)\nreturn x",
        "self.layers = nn.ModuleList([nn.TransformerEncoderLayer(dim, 2, 16, batch_first=True) for _ in range(depth)])",
    ),
    "a cache that is handed in": program(
        "for layer in self.layers:\n    x = layer(x, mask, cache)\nreturn x", parameter=", cache=None", more=", cache=None",
        first="if cache is not None:\n            cache[id(self)] = x",
    ),
    "a cache with a method": program(
        "for layer in self.layers:\n    x = layer(x, mask, cache=cache)\nreturn x", parameter=", cache=None",
        more=", cache=None", first="if cache is not None:\n            cache.append(x.detach())",
    ),
    "lists of the layer's own": program(first="parts = []\n        parts.append(x)\n        x = parts[0]"),
    "in place on what the layer made": program(
        first="scale = torch.ones(1, dtype=x.dtype)\n        scale += 1\n        scale[0] = 3\n        x = x * scale.mul_(0.5)"
    ),
    "a mask that is changed where it is given": program(first="if mask is not None:\n            mask[:, 0] = 1"),
    "an heir": program(
        tail="\n\nclass Deep(Stack):\n    def __init__(self, dim):\n        super().__init__(dim, 5)\n        self.n = 5\n"
    ),
    "tabs": program().replace("    ", "\t"),
}  # fmt: skip

LATE = "\n\ndef prepare(model, scale):\n    for layer in model.stack.layers:\n        layer.scale = scale\n"

REFUSED = {
    "batch norm": (
        program(
            block=BLOCK.replace("nn.LayerNorm(dim), nn.LayerNorm(dim)", "nn.LayerNorm(dim), nn.BatchNorm1d(6)")
        ),
        "BatchNorm1d would count every batch twice",
    ),
    "in place on what is given": (program(first="x += 1"), "changes what it is given"),
    "in place on a view of it": (program(first="x.transpose(0, 1).mul_(2)"), "changes what it is given"),
    "in place in a branch that is not taken": (
        program(first="if mask is not None:\n            x += 1"), "changes what it is given"),
    "batch norm in a branch that is not taken": (
        program(block=BLOCK.replace("self.attention = ", "self.bn = nn.BatchNorm1d(6)\n        self.attention = "),
                first="if mask is not None:\n            x = self.bn(x)"),
        "count every batch twice",
    ),
    "random numbers in a branch that is not taken": (
        program(first="if mask is not None:\n            x = x * random.random()"), "that torch does not draw again"),
    "a list of the module in a branch that is not taken": (
        program(block=BLOCK.replace("self.attention = ", "self.seen = []\n        self.attention = "),
                first="if mask is not None:\n            self.seen.append(x.detach())"),
        "a layer changes",
    ),
    "a list of the module": (
        program(block=BLOCK.replace("self.attention = ", "self.seen = []\n        self.attention = "),
                first="self.seen.append(x.detach())"),
        "changes what it is given, or keeps something",
    ),
    "a list that is handed in": (
        program("found = []\nfor layer in self.layers:\n    x = layer(x, mask, found)\nreturn x", parameter=", found=None",
                first="if found is not None:\n            found.append(x.detach())"),
        "changes what it is given",
    ),
    "a counter": (
        program(block=BLOCK.replace("self.attention = ", "self.steps = 0\n        self.attention = "),
                first="self.steps += 1\n        x = x * self.steps"),
        "layers read `steps`, which is set again",
    ),
    "a running mean": (
        program(block=BLOCK.replace("self.attention = ", "self.mean = 0.0\n        self.attention = "),
                first="self.mean = 0.9 * self.mean + 0.1 * x.mean().item()"),
        "layers read `mean`, which is set again",
    ),
    "a buffer that is moved": (
        program(block=BLOCK.replace("self.attention = ", 'self.register_buffer("mean", torch.zeros(1))\n        self.attention = '),
                first="self.mean.mul_(0.9).add_(0.1 * x.mean().item())"),
        "keeps something from call to call",
    ),
    "a buffer that is made anew": (
        program(first="self.register_buffer('seen', x.detach().clone())"), "keeps something from call to call"),
    "a list behind a call": (
        program(block=BLOCK.replace("self.attention = ", "self.seen = []\n        self.attention = "),
                first="getattr(self, 'seen').append(x.detach())"),
        "a layer changes",
    ),
    "a default that is changed": (
        program(parameter=", seen=[]", first="seen.append(x.detach())"), "a layer changes what it is given"),
    "a table of the file": (
        program(first="TABLE[id(self)] = x.detach()").replace("\n\nclass Att", "\nTABLE = {}\n\n\nclass Att", 1),
        "a layer changes what it is given",
    ),
    "set from outside": (
        program(block=BLOCK.replace("self.attention = ", "self.scale = 1.0\n        self.attention = "),
                first="x = x * self.scale", tail=LATE),
        "layers read `scale`, which is set again",
    ),
    "a global": (
        program(first="global STEPS\n        STEPS = STEPS + 1").replace("\n\nclass Att", "\nSTEPS = 0\n\n\nclass Att", 1),
        "changes variables outside of it",
    ),
    "a global that others set": (
        program(first="x = x * STEPS", tail="\n\ndef step():\n    global STEPS\n    STEPS = STEPS + 1\n").replace(
            "\n\nclass Att", "\nSTEPS = 1\n\n\nclass Att", 1),
        "a global that functions set",
    ),
    "other random numbers": (program(first="x = x * random.random()"), "that torch does not draw again"),
    "a generator": (
        program(first="x = x + torch.randn(x.shape, generator=G)").replace(
            "\n\nclass Att", "\nG = torch.Generator()\n\n\nclass Att", 1),
        "that torch does not draw again",
    ),
    "a lambda": (
        program("for i, layer in enumerate(self.layers):\n    x = layer(x, mask, lambda y: y * i)\nreturn x",
                parameter=", f=None", first="x = f(x)"),
        "is handed a function",
    ),
    "changed in place afterwards": (
        program("y = x * 1\nfor layer in self.layers:\n    x = layer(x, mask, y)\n    y += 1\nreturn x",
                parameter=", y=0", first="x = x + y"),
        "is changed in place afterwards",
    ),
    "hooks": (
        program(tail="\n\ndef watch(model, keep):\n    model.stack.layers[0].register_forward_hook(keep)\n"),
        "its hooks would run twice",
    ),
    "TorchScript": (program(tail="\n\ndef export():\n    return torch.jit.script(Net())\n"), "compiled by TorchScript"),
    "an heir that skips the constructor": (
        program(tail="\n\nclass Odd(Stack):\n    def __init__(self, dim):\n        nn.Module.__init__(self)\n"
                     "        self.layers = nn.ModuleList([Block(dim)])\n"),
        "Odd does not run the constructor of Stack",
    ),
    "under a context": (
        program("with torch.autograd.profiler.emit_nvtx(False):\n    for layer in self.layers:\n        x = layer(x, mask)\n"
                "return x"),
        "would run again without it",
    ),
    "in the middle of an expression": (
        program("return F.dropout(x, 0.1) + self.layers(x)", SEQUENTIAL), "in the middle of an expression"),
    "two stacks in one statement": (
        program("return self.more(self.layers(x))", f"{SEQUENTIAL}\n        {SEQUENTIAL.replace('layers', 'more')}"),
        "two stacks run in one statement",
    ),
    "torch's stack": (
        program("return self.layers(x)",
                "self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(dim, 2, 16, batch_first=True), depth)"),
        "runs its layers itself",
    ),
}  # fmt: skip

CHECKPOINTED = "for layer in self.layers:\n    x = torch.utils.checkpoint.checkpoint(layer, x, mask, use_reentrant=False)\nreturn x"
MODERN = {
    "torch's checkpoint": program(CHECKPOINTED),
    "behind a flag": program(
        "for layer in self.layers:\n    if self.training and self.ckpt:\n        x = checkpoint(layer, x, mask)\n"
        "    else:\n        x = layer(x, mask)\nreturn x",
        setup="        self.ckpt = False\n",
    ).replace("import torch\n", "import torch\nfrom torch.utils.checkpoint import checkpoint\n"),
    "another library's": program(
        made="self.layers = nn.ModuleList([checkpoint_wrapper(Block(dim)) for _ in range(depth)])"
    ).replace("import torch\n", "import torch\ncheckpoint_wrapper = nn_identity = lambda module: module\n"),
}  # fmt: skip

ABSENT = {
    "no attention": HEAD + "\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.embed = nn.Embedding(11, 8)\n"
    "        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])\n\n"
    "    def forward(self, ids):\n        x = self.embed(ids)\n        for layer in self.layers:\n"
    "            x = x + layer(x)\n        return x\n",
    "one layer": program("return self.layer(x, mask)", "self.layer = Block(dim)"),
}  # fmt: skip
