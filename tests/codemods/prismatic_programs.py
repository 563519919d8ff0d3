"""Programs for `prismatic`: further forms in which blocks make and call their attention, and what must be refused."""

from __future__ import annotations

import relay_programs as relay
from relay_programs import HEAD, changed

PLAIN = relay.program(mask="buffer")
CALL = "        x = x + self.drop(self.attention(self.norm(x)))\n"
MADE = "        self.attention = Attention(dim, heads)\n"
WRITTEN = relay.program(mixed="written out", mask="buffer")
PROJECTED = "for p in (self.q, self.k, self.v))"

FORMS = {
    "called by keywords": changed(
        PLAIN,
        ("    def forward(self, x):\n        batch", "    def forward(self, x, scale=1.0):\n        batch"),
        (CALL, "        x = x + self.attention(scale=1.0, x=self.norm(x))\n"),
    ),
    "forward called in a lambda": changed(
        PLAIN, (CALL, "        run = lambda read: self.attention.forward(read)\n        x = x + run(self.norm(x))\n")
    ),
    "query, key and value are given": changed(
        PLAIN,
        ("    def forward(self, x):\n        batch, time, width = x.shape\n",
         "    def forward(self, query, key, value):\n        x, (batch, time, width) = query, query.shape\n"),
        ("(p(x).view(batch, time, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))",
         "(p(t).view(batch, -1, self.heads, self.width).transpose(1, 2) for p, t in"
         " ((self.q, query), (self.k, key), (self.v, value)))"),
        (CALL, "        read = self.norm(x)\n        x = x + self.attention(read, read, value=read)\n"),
    ),
    "norm and sum around a function": changed(
        PLAIN,
        ("class Block(nn.Module):", """\
class PreNorm(nn.Module):
    def __init__(self, dim, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x):
        return x + self.fn(self.norm(x))


class Block(nn.Module):"""),
        (MADE, "        self.attention = PreNorm(dim, Attention(dim, heads))\n"),
        (CALL, "        x = self.attention(x)\n"),
    ),
    "handed to what adds and norms": changed(
        PLAIN,
        ("class Block(nn.Module):", """\
class Connection(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(0.1)

    def forward(self, x, sublayer):
        return x + self.drop(sublayer(self.norm(x)))


class Block(nn.Module):"""),
        (MADE, MADE + "        self.around = Connection(dim)\n"),
        (CALL, "        x = self.around(x, self.attention)\n"),
    ),
    "heads folded into the batch": changed(
        WRITTEN,
        ("        q, k, v = (p(x).view(batch, time, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))\n",
         "        q, k, v = (p(x).view(batch, time, self.heads, -1) for p in (self.q, self.k, self.v))\n"
         "        q, k, v = (t.permute(2, 0, 1, 3).reshape(self.heads * batch, -1, self.width) for t in (q, k, v))\n"),
        ("        scores = q @ k.transpose(-2, -1) / ", "        scores = torch.bmm(q, k.transpose(1, 2)) / "),
        ("        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))\n",
         "        mixed = mixed.view(self.heads, batch, -1, self.width).permute(1, 2, 0, 3)\n"
         "        return self.out(mixed.reshape(batch, time, width))\n"),
    ),
    "in a list of lists": changed(
        PLAIN,
        (MADE, "        self.parts = nn.ModuleList([nn.ModuleList([Attention(dim, heads), nn.LayerNorm(dim)])])\n"),
        (CALL, "        for attention, norm in self.parts:\n            x = x + attention(norm(x))\n"),
    ),
    "in a sequence": changed(
        PLAIN,
        (MADE, "        self.attention = nn.Sequential(nn.LayerNorm(dim), Attention(dim, heads), nn.Dropout(0.1))\n"),
    ),
    "copied for every layer": changed(
        PLAIN,
        ("import math\n", "import copy\nimport math\n"),
        ("def __init__(self, dim, heads):\n        super().__init__()\n        self.attention = Attention(dim, heads)",
         "def __init__(self, dim, attention):\n        super().__init__()\n        self.attention = copy.deepcopy(attention)"),
        ("nn.ModuleList([Block(dim, heads) for _ in range(depth)])",
         "nn.ModuleList([Block(dim, attention) for _ in range(depth)])"),
        ("        self.embed = nn.Embedding(words, dim)\n",
         "        self.embed = nn.Embedding(words, dim)\n        attention = Attention(dim, heads)\n"),
    ),
    "one for all, copied in every place": changed(
        PLAIN,
        ("import math\n", "from copy import deepcopy\nimport math\n"),
        ("    def forward(self, x):\n        batch, time, width = x.shape\n",
         "    def forward(self, x, memory=None):\n        batch, time, width = x.shape\n"
         "        memory = x if memory is None else memory\n"),
        ("(p(x).view(batch, time, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))",
         "(p(t).view(batch, -1, self.heads, self.width).transpose(1, 2) for p, t in"
         " ((self.q, x), (self.k, memory), (self.v, memory)))"),
        ("    def __init__(self, dim, heads):\n        super().__init__()\n" + MADE,
         "    def __init__(self, dim, attention, cross):\n        super().__init__()\n"
         "        self.attention, self.cross = attention, cross\n"),
        (CALL, CALL + "        x = x + self.cross(self.norm(x), memory)\n"),
        ("    def forward(self, x):\n        x = x", "    def forward(self, x, memory):\n        x = x"),
        ("            x = block(x)\n", "            x = block(x, memory)\n"),
        ("    def forward(self, ids):\n        x = self.embed(ids)\n",
         "    def forward(self, ids):\n        x, memory = self.embed(ids), self.other(ids.flip(1))\n"),
        ("        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])\n",
         "        c, attention = deepcopy, Attention(dim, heads)\n"
         "        block = Block(dim, c(attention), c(attention))\n"
         "        self.blocks = nn.ModuleList([deepcopy(block) for _ in range(depth)])\n"),
        ("        self.head = nn.Linear(dim, words)\n",
         "        self.head, self.other = nn.Linear(dim, words), nn.Embedding(words, dim)\n"),
    ),
    "adds what it reads, and shows its weights": changed(
        WRITTEN,
        ("        mixed = scores.softmax(dim=-1) @ v\n",
         "        weights = scores.softmax(dim=-1)\n        mixed = weights @ v\n"),
        ("        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))\n",
         "        mixed = self.out(mixed.transpose(1, 2).contiguous().view(x.shape[0], x.shape[1], -1))\n"
         "        mixed += x\n        return self.after(mixed), weights\n"),
        ("        self.out = nn.Linear(dim, dim)\n",
         "        self.out, self.after = nn.Linear(dim, dim), nn.LayerNorm(dim)\n"),
        (CALL, "        x, seen = self.attention(x)\n"),
    ),
    "settings of it are read": changed(
        PLAIN, (CALL, "        x = x + self.attention(self.norm(x)) * (self.attention.width ** -0.5)\n")
    ),
    "its weights are set by hand": changed(
        PLAIN, (MADE, MADE + "        nn.init.normal_(self.attention.out.weight, std=0.3)\n")
    ),
    "the name is taken": changed(
        PLAIN, ("class Block(nn.Module):", "class Prismatic:\n    pass\n\n\nclass Block(nn.Module):")
    ),
    "two kinds of attention, one between sequences": changed(
        PLAIN,
        ("    def forward(self, x):\n        batch, time, width = x.shape\n",
         "    def forward(self, x, memory=None):\n        batch, time, width = x.shape\n"
         "        memory = x if memory is None else memory\n"),
        ("(p(x).view(batch, time, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))",
         "(p(t).view(batch, -1, self.heads, self.width).transpose(1, 2) for p, t in"
         " ((self.q, x), (self.k, memory), (self.v, memory)))"),
        (MADE, MADE + "        self.cross = Attention(dim, heads)\n"),
        (CALL, CALL + "        x = x + self.cross(self.norm(x), memory)\n"),
        ("    def forward(self, x):\n        x = x", "    def forward(self, x, memory):\n        x = x"),
        ("            x = block(x)\n", "            x = block(x, memory)\n"),
        ("    def forward(self, ids):\n        x = self.embed(ids)\n",
         "    def forward(self, ids):\n        x, memory = self.embed(ids), self.other(ids.flip(1))\n"),
        ("        self.head = nn.Linear(dim, words)\n",
         "        self.head, self.other = nn.Linear(dim, words), nn.Embedding(words, dim)\n"),
    ),
    "heads are modules": changed(
        HEAD + '''\
class Head(nn.Module):
    def __init__(self, dim, width):
        super().__init__()
        self.key, self.query = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)
        self.value = nn.Linear(dim, width, bias=False)
        self.register_buffer("seen", torch.tril(torch.ones(32, 32)))

    def forward(self, x):
        batch, time, width = x.shape
        key, query = self.key(x), self.query(x)
        scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5
        scores = scores.masked_fill(self.seen[:time, :time] == 0, float("-inf"))
        return scores.softmax(dim=-1) @ self.value(x)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = nn.ModuleList([Head(dim, dim // heads) for _ in range(heads)])
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out(torch.cat([head(x) for head in self.heads], dim=-1))
''' + PLAIN[PLAIN.index("\n\nclass Block") :],
    ),
    "numbers that are learned": changed(
        WRITTEN,
        (" / math.sqrt(self.width)\n", " * self.scale.exp()\n"),
        ("        self.register_buffer", "        self.scale = nn.Parameter(torch.tensor(-1.0))\n        self.register_buffer"),
    ),
}  # fmt: skip

# The text, the reason and the options.
REFUSED: dict[str, tuple[str, str, dict[str, object]]] = {
    "torch's attention": (HEAD + relay.TORCH + PLAIN[PLAIN.index("\n\nclass Block") :], "one matrix of its own", {}),
    "one call for both kinds": (
        changed(
            FORMS["two kinds of attention, one between sequences"],
            (MADE + "        self.cross = Attention(dim, heads)\n",
             "        self.attention, self.cross = [Attention(dim, heads) for _ in range(2)]\n"),
        ),
        "also attends to another sequence", {},
    ),
    "copied for another use": (
        changed(
            FORMS["one for all, copied in every place"],
            ("        block = Block(dim, c(attention), c(attention))\n", "        block = Block(dim, attention, c(attention))\n"),
        ),
        "copied for other uses", {},
    ),
    "written out in the block": (
        changed(
            HEAD + PLAIN[PLAIN.index("class Block") :],
            (MADE, "        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)\n"),
            (CALL, """\
        batch, time, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.view(batch, time, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, dim))
"""),
        ),
        "class that does more", {},
    ),
    "keys of earlier calls": (
        changed(
            PLAIN,
            ("    def forward(self, x):\n        batch, time, width = x.shape\n",
             "    def forward(self, x, past=None):\n        batch, time, width = x.shape\n"),
            ("        mixed = F.scaled",
             "        if past is not None:\n            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)\n"
             "        mixed = F.scaled"),
            (CALL, "        x = x + self.attention(self.norm(x), past)\n"),
            ("    def forward(self, x):\n        x = x", "    def forward(self, x, past):\n        x = x"),
            ("            x = block(x)\n", "            x = block(x, past)\n"),
            ("    def forward(self, ids):\n", "    def forward(self, ids, past=None):\n"),
        ),
        "joined with others", {},
    ),
    "an attribute is set from outside": (
        changed(PLAIN, (MADE, MADE + "        self.attention.heads = heads\n")), "is set from outside", {},
    ),
    "looked at for its class": (
        changed(PLAIN, (CALL, CALL + "        assert isinstance(self.attention, Attention)\n")), "isinstance", {},
    ),
    "another method is called": (
        changed(
            PLAIN,
            ("    def forward(self, x):\n        batch", "    def first(self, x):\n        return self.out(x)\n\n"
             "    def forward(self, x):\n        batch"),
            (CALL, CALL + "        x = x + self.attention.first(x)\n"),
        ),
        "its method first is called from outside", {},
    ),
    "weights are read by themselves": (
        changed(PLAIN, (f"(p(x).view(batch, time, self.heads, -1).transpose(1, 2) {PROJECTED}",
                        "(F.linear(x, p.weight, p.bias).view(batch, time, self.heads, -1).transpose(1, 2) "
                        + PROJECTED)),
        "plain nn.Linear layers", {},
    ),
    "a layer is given another form": (
        changed(
            PLAIN,
            ("        self.out = nn.Linear(dim, dim)\n",
             "        self.out = nn.Linear(dim, dim)\n        nn.utils.parametrizations.weight_norm(self.out)\n"),
        ),
        "which may change it", {},
    ),
    "weights are called by name": (
        changed(PLAIN, ("class Block(nn.Module):", 'NAMES = ["blocks.0.attention.q.weight"]\n\n\nclass Block(nn.Module):')),
        "called by their names", {},
    ),
    "parameters are sorted by name": (
        PLAIN + """
    def groups(self):
        found = {name for name, _ in self.named_parameters() if name.endswith("weight")}
        assert found
        return found
""",
        "sorts its parameters by name", {},
    ),
    "the mask hides what comes later": (PLAIN, "a causal mask", {"routing": "sequence"}),
    "the mask is the caller's": (
        changed(
            PLAIN,
            ("    def forward(self, x):\n        batch", "    def forward(self, x, seen):\n        batch"),
            (", attn_mask=self.seen[: x.shape[1], : x.shape[1]]", ", attn_mask=seen"),
            (CALL, "        x = x + self.attention(self.norm(x), seen)\n"),
            ("    def forward(self, x):\n        x = x", "    def forward(self, x, seen):\n        x = x"),
            ("            x = block(x)\n", "            x = block(x, seen)\n"),
            ("    def forward(self, ids):\n", "    def forward(self, ids, seen=None):\n"),
        ),
        "has a mask", {"routing": "sequence"},
    ),
    "time comes first": (
        changed(
            PLAIN,
            ("        batch, time, width = x.shape\n", "        time, batch, width = x.shape\n"),
            ("(p(x).view(batch, time, self.heads, -1).transpose(1, 2) " + PROJECTED,
             "(p(x).view(time, batch * self.heads, -1).transpose(0, 1) " + PROJECTED),
            (", attn_mask=self.seen[: x.shape[1], : x.shape[1]]", ""),
            ("        mixed = mixed.permute(0, 2, 1, 3).contiguous()\n", ""),
            ("        return self.out(mixed.view(mixed.size()[:-2] + (self.heads * self.width,)))\n",
             "        return self.out(mixed.transpose(0, 1).contiguous().view(time, batch, width))\n"),
        ),
        "cannot be told", {},
    ),
    "a layer that mixes time": (
        changed(
            PLAIN,
            ("        self.out = nn.Linear(dim, dim)\n", "        self.out, self.along = nn.Linear(dim, dim), nn.Linear(6, 6)\n"),
            ("        return self.out(mixed.view", "        mixed = self.along(mixed.transpose(1, -1)).transpose(1, -1)\n"
             "        return self.out(mixed.reshape"),
        ),
        "gets something else", {},
    ),
    "only some of it can be mixed": (
        FORMS["adds what it reads, and shows its weights"], "more than one value", {"architectures": "none,rope"},
    ),
    "relative positions are there": (
        changed(
            WRITTEN,
            ("        scores = q @ k", "        q, k = self.rotary(q), self.rotary(k)\n        scores = q @ k"),
            ("        self.register_buffer", "        self.rotary = RotaryEmbedding()\n        self.register_buffer"),
            ("import torch.nn as nn\n", "import torch.nn as nn\nfrom modernizer.components import RotaryEmbedding\n"),
        ),
        "relative positions already", {"architectures": "none,alibi"},
    ),
    "it chooses by itself": (
        changed(PLAIN, ("    def forward(self, x):\n        batch", "    def forward(self, x, pos_type=None):\n        batch")),
        "knows a pos_type already", {"architectures": "none,rope"},
    ),
}  # fmt: skip

LOSS = changed(
    PLAIN,
    ("    def forward(self, ids):\n        x = self.embed(ids)\n",
     "    def forward(self, ids, targets=None):\n        x = self.embed(ids)\n"),
    ("        return self.head(self.norm(x))\n",
     "        logits, loss = self.head(self.norm(x)), None\n        if targets is not None:\n"
     "            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())\n        return logits, loss\n"),
)  # fmt: skip
SUMMED_LOSS = changed(LOSS, ("targets.flatten())", 'targets.flatten(), reduction="sum")'))
TWO_LOSSES = changed(
    LOSS,
    (
        "        return logits, loss\n",
        "            loss = loss + F.mse_loss(logits, logits * 0)\n        return logits, loss\n",
    ),
)

SORTED = (
    PLAIN
    + """
    def groups(self):
        decay, others = set(), set()
        for home, module in self.named_modules():
            for name, parameter in module.named_parameters():
                full = f"{home}.{name}" if home else name
                if name.endswith("bias"):
                    others.add(full)
                elif name.endswith("weight") and isinstance(module, (nn.Linear,)):
                    decay.add(full)
                elif name.endswith("weight") and isinstance(module, (nn.LayerNorm, nn.Embedding)):
                    others.add(full)
                elif name.endswith("scale"):
                    others.add(full)
        known = {name for name, _ in self.named_parameters()}
        assert not decay & others
        assert not known - (decay | others), f"not sorted: {known - (decay | others)}"
        return decay, others
"""
)
