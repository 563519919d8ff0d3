"""Small post-norm models in the forms met in the wild, each with what its pre-norm twin computes.

`model(ids)` gives [batch, time, vocab]. `parts(model)` names what the twin is made of: the stream at the start, the
(norm, sublayer) pairs in order, and what comes behind the final norm.
"""

PRELUDE = """
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

D, HEADS, FF, VOCAB, LAYERS = 16, 2, 32, 11, 3


class Attention(nn.Module):
    def __init__(self, d, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, q, k, v, mask=None):
        def split(x):
            return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

        q, k, v = split(self.q(q)), split(self.k(k)), split(self.v(v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        x = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
        return self.o(x.view(x.size(0), x.size(1), -1))


class FeedForward(nn.Module):
    def __init__(self, d, hidden, dropout=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def causal(x):
    return torch.ones(x.size(1), x.size(1)).tril()
"""

MODEL = """

class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        mask = causal(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def build():
    return Model(VOCAB, D, HEADS, FF, LAYERS)
"""

BLOCK = """

class Block(nn.Module):
    def __init__(self, d, heads, hidden, dropout=0.1):
        super().__init__()
        self.attn = Attention(d, heads)
        self.ff = FeedForward(d, hidden)
        self.ln1 = nn.LayerNorm(d)
        self.ln2 = nn.LayerNorm(d)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask):
"""

PARTS = """

def parts(model):
    mask = lambda x: causal(x)
    pairs = []
    for b in model.layers:
        pairs.append((b.ln1, lambda n, b=b: b.attn(n, n, n, causal(n))))
        pairs.append((b.ln2, lambda n, b=b: b.ff(n)))
    return model.embed, pairs, model.head
"""


def block(forward: str) -> str:
    """A program whose block's `forward` reads so."""
    lines = "".join(f"        {line}\n" for line in forward.strip("\n").splitlines())
    return PRELUDE + BLOCK + lines + MODEL + PARTS


FORMS = {
    "inline": block(
        "x = self.ln1(x + self.drop(self.attn(x, x, x, mask)))\nreturn self.ln2(x + self.drop(self.ff(x)))"
    ),
    "branch first": block("x = self.ln1(self.attn(x, x, x, mask) + x)\nx = self.ln2(self.ff(x) + x)\nreturn x"),
    "separate statements": block(
        "x = x + self.attn(x, x, x, mask)\nx = self.ln1(x)\nx = x + self.ff(x)\nx = self.ln2(x)\nreturn x"
    ),
    "augmented": block("x += self.attn(x, x, x, mask)\nx = self.ln1(x)\nx += self.ff(x)\nreturn self.ln2(x)"),
    "kept under another name": block(
        "_x = x\nx = self.attn(x, x, x, mask)\nx = self.ln1(x + _x)\n_x = x\nx = self.ff(x)\nreturn self.ln2(x + _x)"
    ),
    "names for everything": block(
        "a = self.attn(x, x, x, mask)\nb = self.drop(a)\nc = x + b\nd = self.ln1(c)\n"
        "e = self.ff(d)\nf = d + self.drop(e)\ng = self.ln2(f)\nreturn g"
    ),
    "chained assignment": block(
        "y = x = self.ln1(x + self.attn(x, x, x, mask))\nx = self.ff(x)\nx = self.ln2(x + y)\nreturn x"
    ),
    "chained norm statement": block(
        "x = x + self.attn(x, x, x, mask)\ny = x = self.ln1(x)\ny = self.ff(y)\nx = x + y\nx = self.ln2(x)\nreturn x"
    ),
    "query, key and value named": block(
        "q = k = v = x\nx = self.ln1(x + self.attn(q, k, v, mask))\nreturn self.ln2(x + self.ff(x))"
    ),
    "torch.add": block(
        "x = self.ln1(torch.add(x, self.attn(x, x, x, mask)))\nreturn self.ln2(torch.add(self.ff(x), x))"
    ),
    "open branch": block(
        "if mask is not None:\n    a = self.attn(x, x, x, mask)\nelse:\n    a = self.attn(x, x, x)\n"
        "x = self.ln1(x + a)\nreturn self.ln2(x + self.ff(x))"
    ),
    "norm then dropout": block(
        "x = self.drop(self.ln1(x + self.attn(x, x, x, mask)))\nx = self.drop(self.ln2(x + self.ff(x)))\nreturn x"
    ),
    "one expression": block(
        "h = x + self.attn(x, x, x, mask=mask)\nh = self.ln1(h)\nreturn self.ln2(torch.add(h, self.ff(h)))"
    ),
    "time first": block(
        "x = x.transpose(0, 1)\nx = x.transpose(0, 1)\nx = self.ln1(x + self.attn(x, x, x, mask))\n"
        "return self.ln2(x + self.ff(x))"
    ),
}

FORMS["wrapper with lambda"] = (
    PRELUDE
    + """

def clones(module, n):
    return nn.ModuleList([copy.deepcopy(module) for _ in range(n)])


class Residual(nn.Module):
    def __init__(self, d, dropout):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(d), nn.Dropout(dropout)

    def forward(self, x, sublayer):
        return self.norm(x + self.drop(sublayer(x)))


class Block(nn.Module):
    def __init__(self, d, attn, ff, dropout):
        super().__init__()
        self.attn, self.ff = attn, ff
        self.wrap = clones(Residual(d, dropout), 2)

    def forward(self, x, mask):
        x = self.wrap[0](x, lambda y: self.attn(y, y, y, mask))
        return self.wrap[1](x, self.ff)


class Encoder(nn.Module):
    def __init__(self, layer, n):
        super().__init__()
        self.layers = clones(layer, n)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Model(nn.Module):
    def __init__(self, embed, encoder, head):
        super().__init__()
        self.embed, self.encoder, self.head = embed, encoder, head

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.encoder(x, causal(x)))


def make_model(vocab, d, heads, hidden, n, dropout=0.1):
    c = copy.deepcopy
    attn, ff = Attention(d, heads), FeedForward(d, hidden)
    return Model(nn.Embedding(vocab, d), Encoder(Block(d, c(attn), c(ff), dropout), n), nn.Linear(d, vocab))


def build():
    return make_model(VOCAB, D, HEADS, FF, LAYERS)


def parts(model):
    pairs = []
    for b in model.encoder.layers:
        pairs.append((b.wrap[0].norm, lambda n, b=b: b.attn(n, n, n, causal(n))))
        pairs.append((b.wrap[1].norm, b.ff))
    return model.embed, pairs, model.head
"""
)

WRAPPED = """

class Block(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn = AddNorm(d, Attention(d, heads))
        self.ff = AddNorm(d, FeedForward(d, hidden))

    def forward(self, x, mask):
        x = self.attn(x, x, x, mask)
        return self.ff(x)
"""
WRAPPED_PARTS = """

def parts(model):
    pairs = []
    for b in model.layers:
        pairs.append((b.attn.norm, lambda n, b=b: b.attn.inner(n, n, n, causal(n))))
        pairs.append((b.ff.norm, b.ff.inner))
    return model.embed, pairs, model.head
"""
FORMS["wrapper with star arguments"] = (
    PRELUDE
    + """

class AddNorm(nn.Module):
    def __init__(self, d, inner):
        super().__init__()
        self.inner, self.norm, self.drop = inner, nn.LayerNorm(d), nn.Dropout(0.1)

    def forward(self, x, *args):
        return self.norm(x + self.drop(self.inner(x, *args)))
"""
    + WRAPPED
    + MODEL
    + WRAPPED_PARTS
)

FORMS["add-and-norm module"] = (
    PRELUDE
    + """

class AddAndNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)

    def forward(self, a, b):
        return self.norm(a + b)


class Block(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn, self.ff = Attention(d, heads), FeedForward(d, hidden)
        self.add1, self.add2 = AddAndNorm(d), AddAndNorm(d)

    def forward(self, x, mask):
        x = self.add1(x, self.attn(x, x, x, mask))
        x = self.add2(self.ff(x), x)
        return x
"""
    + MODEL
    + """

def parts(model):
    pairs = []
    for b in model.layers:
        pairs.append((b.add1.norm, lambda n, b=b: b.attn(n, n, n, causal(n))))
        pairs.append((b.add2.norm, b.ff))
    return model.embed, pairs, model.head
"""
)

FORMS["output classes"] = (
    PRELUDE
    + """

class Output(nn.Module):
    def __init__(self, d_in, d):
        super().__init__()
        self.dense, self.drop = nn.Linear(d_in, d), nn.Dropout(0.1)
        self.LayerNorm = nn.LayerNorm(d, eps=1e-12)

    def forward(self, hidden, residual):
        hidden = self.drop(self.dense(hidden))
        return self.LayerNorm(hidden + residual)


class SelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.self, self.output = Attention(d, heads), Output(d, d)

    def forward(self, x, mask):
        context = self.self(x, x, x, mask)
        return self.output(context, x)


class Block(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attention = SelfAttention(d, heads)
        self.first = nn.Linear(d, hidden)
        self.output = Output(hidden, d)

    def forward(self, x, mask):
        x = self.attention(x, mask)
        return self.output(F.gelu(self.first(x)), x)
"""
    + MODEL
    + """

def parts(model):
    pairs = []
    for b in model.layers:
        a = b.attention
        pairs.append((a.output.LayerNorm, lambda n, a=a: a.output.dense(a.self(n, n, n, causal(n)))))
        pairs.append((b.output.LayerNorm, lambda n, b=b: b.output.dense(F.gelu(b.first(n)))))
    return model.embed, pairs, model.head
"""
)

FORMS["residual and norm inside the sublayers"] = (
    PRELUDE
    + """

class SelfAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.inner, self.norm = Attention(d, heads), nn.LayerNorm(d, eps=1e-6)

    def forward(self, q, k, v, mask=None):
        residual = q
        q = self.inner(q, k, v, mask)
        q += residual
        q = self.norm(q)
        return q, None


class PositionwiseFeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.norm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, x):
        residual = x
        x = self.w_2(F.relu(self.w_1(x)))
        x += residual
        return self.norm(x)


class Block(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn, self.ff = SelfAttention(d, heads), PositionwiseFeedForward(d, hidden)

    def forward(self, x, mask):
        x, _ = self.attn(x, x, x, mask=mask)
        return self.ff(x)
"""
    + MODEL
    + """

def parts(model):
    pairs = []
    for b in model.layers:
        pairs.append((b.attn.norm, lambda n, b=b: b.attn.inner(n, n, n, causal(n))))
        pairs.append((b.ff.norm, lambda n, b=b: b.ff.w_2(F.relu(b.ff.w_1(n)))))
    return model.embed, pairs, model.head
"""
)

HAND_WRITTEN = {
    "unbiased deviation": (
        "m, s = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)\n"
        "        return self.g * (x - m) / (s + self.eps) + self.b"
    ),
    "variance under the root": (
        "u = x.mean(-1, keepdim=True)\n        s = (x - u).pow(2).mean(-1, keepdim=True)\n"
        "        x = (x - u) / torch.sqrt(s + self.eps)\n        return self.g * x + self.b"
    ),
    "biased variance": (
        "m = x.mean(-1, keepdim=True)\n        v = x.var(-1, unbiased=False, keepdim=True)\n"
        "        return (x - m) * torch.rsqrt(v + self.eps) * self.g + self.b"
    ),
    "root mean square": "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.g + self.b",
    "F.layer_norm": "return F.layer_norm(x, self.g.shape, self.g, self.b, self.eps)",
}
for name, formula in HAND_WRITTEN.items():
    FORMS[f"hand-written norm: {name}"] = (
        PRELUDE
        + f"""

class Norm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.g, self.b, self.eps = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        {formula}
"""
        + BLOCK.replace("nn.LayerNorm(d)", "Norm(d)")
        + "        x = self.ln1(x + self.attn(x, x, x, mask))\n        return self.ln2(x + self.ff(x))\n"
        + MODEL
        + PARTS
    )

FORMS["one norm for every sublayer"] = (
    PRELUDE
    + BLOCK.replace("        self.ln2 = nn.LayerNorm(d)\n", "")
    + "        x = self.ln1(x + self.attn(x, x, x, mask))\n        return self.ln1(x + self.ff(x))\n"
    + MODEL
    + PARTS.replace("b.ln2", "b.ln1")
)

INLINE = "        x = self.ln1(x + self.attn(x, x, x, mask))\n        return self.ln2(x + self.ff(x))\n"
FORMS["Sequential of blocks"] = (
    PRELUDE
    + BLOCK.replace("x, mask", "x")
    + "        mask = causal(x)\n"
    + INLINE
    + """

class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, d), nn.Linear(d, vocab)
        blocks = [Block(d, heads, hidden) for _ in range(n)]
        self.layers = nn.Sequential(*blocks)

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids)))


def build():
    return Model(VOCAB, D, HEADS, FF, LAYERS)
"""
    + PARTS
)

FORMS["no block class, lists indexed"] = (
    PRELUDE
    + """

class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed, self.head, self.n = nn.Embedding(vocab, d), nn.Linear(d, vocab), n
        self.attns, self.ffs = nn.ModuleList(), nn.ModuleList()
        self.norms1, self.norms2 = nn.ModuleList(), nn.ModuleList()
        for _ in range(n):
            self.attns.append(Attention(d, heads))
            self.ffs.append(FeedForward(d, hidden))
            self.norms1.append(nn.LayerNorm(d))
            self.norms2.append(nn.LayerNorm(d))

    def forward(self, ids):
        x = self.embed(ids)
        mask = causal(x)
        for i in range(self.n):
            x = self.norms1[i](x + self.attns[i](x, x, x, mask))
            x = self.norms2[i](x + self.ffs[i](x))
        return self.head(x)


def build():
    return Model(VOCAB, D, HEADS, FF, LAYERS)


def parts(model):
    pairs = []
    for i in range(model.n):
        pairs.append((model.norms1[i], lambda n, i=i: model.attns[i](n, n, n, causal(n))))
        pairs.append((model.norms2[i], model.ffs[i]))
    return model.embed, pairs, model.head
"""
)
FORMS["no block class, lists zipped"] = (
    FORMS["no block class, lists indexed"]
    .replace(
        "for i in range(self.n):", "for norm1, attn, norm2, ff in zip(self.norms1, self.attns, self.norms2, self.ffs):"
    )
    .replace("self.norms1[i](x + self.attns[i](x, x, x, mask))", "norm1(x + attn(x, x, x, mask))")
    .replace("self.norms2[i](x + self.ffs[i](x))", "norm2(x + ff(x))")
)

FORMS["one class, one layer"] = (
    PRELUDE
    + """

class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.attn, self.ff = Attention(d, heads), FeedForward(d, hidden)
        self.ln1 = nn.LayerNorm(d)
        self.ln2 = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.ln1(x + self.attn(x, x, x, causal(x)))
        x = self.ln2(x + self.ff(x))
        return self.head(x)


def build():
    return Model(VOCAB, D, HEADS, FF)


def parts(model):
    attend = lambda n: model.attn(n, n, n, causal(n))
    return model.embed, [(model.ln1, attend), (model.ln2, model.ff)], model.head
"""
)

FORMS["layers written out"] = (
    PRELUDE
    + BLOCK
    + INLINE
    + """

class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.one, self.two = Block(d, heads, hidden), Block(d, heads, hidden)
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        mask = causal(x)
        x = self.one(x, mask)
        return self.head(self.two(x, mask))


def build():
    return Model(VOCAB, D, HEADS, FF)
"""
    + PARTS.replace("model.layers", "(model.one, model.two)")
)

FORMS["generation loop of its own"] = block(
    "x = self.ln1(x + self.attn(x, x, x, mask))\nreturn self.ln2(x + self.ff(x))"
).replace(
    "\n\ndef build",
    """
    @torch.no_grad()
    def generate(self, ids, steps):
        for _ in range(steps):
            h = self.embed(ids)
            for block in self.layers:
                h = block(h, causal(h))
            ids = torch.cat([ids, self.head(h)[:, -1:].argmax(-1)], 1)
        return ids


def build""",
)

FORMS["norm before the stack"] = (
    block("x = self.ln1(x + self.attn(x, x, x, mask))\nreturn self.ln2(x + self.ff(x))")
    .replace("        self.head =", "        self.norm = nn.LayerNorm(d)\n        self.head =")
    .replace("x = self.embed(ids)", "x = self.norm(self.embed(ids))")
    .replace("return model.embed,", "return lambda ids: model.norm(model.embed(ids)),")
)

FORMS["sizes from a config"] = (
    block("x = self.ln1(x + self.attn(x, x, x, mask))\nreturn self.ln2(x + self.ff(x))")
    .replace("Block(d, heads, hidden) for", "Block(cfg) for")
    .replace("def __init__(self, vocab, d, heads, hidden, n):", "def __init__(self, cfg):")
    .replace("range(n)", "range(cfg.n)")
    .replace("nn.Embedding(vocab, d)", "nn.Embedding(cfg.vocab, cfg.d)")
    .replace("nn.Linear(d, vocab)", "nn.Linear(cfg.d, cfg.vocab)")
    .replace("def __init__(self, d, heads, hidden, dropout=0.1):", "def __init__(self, config, dropout=0.1):")
    .replace(
        "self.attn = Attention(d, heads)",
        "d, heads, hidden = config.d, config.heads, config.hidden\n        self.attn = Attention(d, heads)",
    )
    .replace(
        "return Model(VOCAB, D, HEADS, FF, LAYERS)",
        "from types import SimpleNamespace\n"
        "\n"
        "    return Model(SimpleNamespace(vocab=VOCAB, d=D, heads=HEADS, hidden=FF, n=LAYERS))",
    )
)

FORMS["positions in every block"] = (
    block("x = x + self.pos[: x.size(1)]\nx = self.ln1(x + self.attn(x, x, x, mask))\nreturn self.ln2(x + self.ff(x))")
    .replace("nn.Dropout(dropout)", "nn.Dropout(dropout)\n        self.pos = nn.Parameter(torch.zeros(32, d))")
    .split("\n\n\ndef parts")[0]
    + """

def twin(model, ids):
    x = model.embed(ids)
    for b in model.layers:
        x = x + b.pos[: x.size(1)]
        n = b.ln1(x)
        x = x + b.attn(n, n, n, causal(n))
        x = x + b.ff(b.ln2(x))
    return model.head(model.final_norm(x))
"""
)
