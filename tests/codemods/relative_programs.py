"""Small transformers that tell positions and attend in the ways met in the wild: what `rope` and `alibi` rewrite.

Every program has `build()`, which gives a model in eval mode from tokens `[batch, time]` to `[batch, time, words]`.
"""

from __future__ import annotations

import textwrap

HEAD = """\
import copy
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

WORDS, DIM, HEADS, LENGTH = 23, 16, 4, 32


"""

ATTENTION = """\
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        b, t, c = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(b, t, self.heads, -1).transpose(1, 2)
        v = self.v(x).view(b, t, self.heads, -1).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask, -1e9)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


"""

BLOCK = """\
class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, mask=None):
        x = x + self.attention(self.norm1(x), mask)
        return x + self.ff(self.norm2(x))


"""

MODEL = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, DIM)
@init
        self.blocks = nn.ModuleList([Block(DIM, HEADS) for _ in range(2)])
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, ids):
@embed
        for block in self.blocks:
            x = block(x)
        return self.head(x)


"""

BUILD = """\
def build():
    torch.manual_seed(0)
    return Model().eval()
"""


def filled(template: str, **parts: str) -> str:
    for name, part in parts.items():
        template = template.replace(f"@{name}", textwrap.indent(textwrap.dedent(part).strip("\n"), " " * 8))
    return template


def by_position(init: str, embed: str, classes: str = "") -> str:
    """A program that differs in how positions are told."""
    return HEAD + textwrap.dedent(classes) + "\n\n" + ATTENTION + BLOCK + filled(MODEL, init=init, embed=embed) + BUILD


def by_attention(classes: str, block: str = BLOCK) -> str:
    """A program that differs in how it attends: `classes` define `Attention`."""
    init, embed = POSITIONS["learned"]
    return HEAD + textwrap.dedent(classes) + "\n\n" + block + filled(MODEL, init=init, embed=embed) + BUILD


SINUSOID = """
class PositionalEncoding(nn.Module):
    def __init__(self, dim, dropout=0.1, max_len=LENGTH):
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        pe = torch.zeros(max_len, dim)
        position = torch.arange(0, max_len, dtype=torch.float).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
        pe[:, 0::2] = torch.sin(position * div_term)
        pe[:, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, x):
        x = x * math.sqrt(x.size(-1)) + self.pe[:, :x.size(1)]
        return self.dropout(x)
"""

POSITIONS = {
    "learned": (
        "self.places = nn.Embedding(LENGTH, DIM)",
        "x = self.tokens(ids) + self.places(torch.arange(ids.size(1), device=ids.device))",
    ),
    "learned_expanded": (
        "self.places = nn.Embedding(LENGTH, DIM)\nnn.init.normal_(self.places.weight, std=0.5)",
        """
        b, t = ids.shape
        where = torch.arange(0, t, dtype=torch.long, device=ids.device).unsqueeze(0).expand(b, t)
        x = self.tokens(ids)
        x += self.places(where)
        """,
    ),
    "parameter": (
        "self.places = nn.Parameter(torch.randn(1, LENGTH, DIM))\nnn.init.trunc_normal_(self.places, std=0.5)",
        "x = self.tokens(ids)\nx = x + self.places[:, :x.size(1), :]",
    ),
    "optional": (
        "self.places = nn.Embedding(LENGTH, DIM) if LENGTH > 0 else None",
        """
        x = self.tokens(ids)
        if self.places is not None:
            where = torch.arange(x.shape[1])
            x = x + self.places(where)
        """,
    ),
    "torch_add": (
        "self.places = nn.Embedding(LENGTH, DIM)",
        "x = torch.add(self.tokens(ids), self.places(torch.arange(ids.size(1))))",
    ),
    "sum_of_list": (
        "self.places = nn.Embedding(LENGTH, DIM)\nself.kinds = nn.Embedding(2, DIM)",
        "x = sum([self.tokens(ids), self.places(torch.arange(ids.size(1))), self.kinds(ids % 2)])",
    ),
    "frozen_table": (
        """
        table = np.array([[p / np.power(10000, 2 * (i // 2) / DIM) for i in range(DIM)] for p in range(LENGTH)])
        table[:, 0::2] = np.sin(table[:, 0::2])
        table[:, 1::2] = np.cos(table[:, 1::2])
        self.places = nn.Embedding.from_pretrained(torch.from_numpy(table).float(), freeze=True)
        """,
        "x = self.tokens(ids) + self.places(torch.arange(ids.size(1)))",
    ),
    "loops": (
        """
        pe = torch.zeros(LENGTH, DIM)
        for pos in range(LENGTH):
            for i in range(0, DIM, 2):
                angle = pos / (10000 ** (i / DIM))
                pe[pos, i] = math.sin(angle)
                pe[pos, i + 1] = math.cos(angle)
        self.pe = pe
        """,
        "x = self.tokens(ids) * DIM ** 0.5\nx = x + self.pe[:ids.size(1)].to(x.device)",
    ),
    "by_padding": (
        "self.places = nn.Embedding(LENGTH + 2, DIM, padding_idx=0)",
        """
        kept = ids.ne(0).int()
        where = (torch.cumsum(kept, dim=1) * kept).long()
        x = self.tokens(ids) + self.places(where)
        """,
    ),
    "norm_after": (
        "self.places = nn.Embedding(LENGTH, DIM)\nself.norm = nn.LayerNorm(DIM)",
        "x = self.norm(self.tokens(ids) + self.places(torch.arange(ids.size(1)))[None])",
    ),
}
MODULE_POSITIONS = {
    "class_with_dropout": ("self.position = PositionalEncoding(DIM)", "x = self.position(self.tokens(ids))", SINUSOID),
    "class_that_only_adds": (
        "self.position = Places(DIM)",
        "x = self.tokens(ids)\nx = self.position(x)",
        """
        class Places(nn.Module):
            def __init__(self, dim):
                super().__init__()
                self.table = nn.Parameter(torch.randn(LENGTH, dim))

            def forward(self, x):
                return x + self.table[:x.size(1)]
        """,
    ),
    "class_that_only_adds_inside_a_call": (
        "self.position, self.drop = Places(DIM), nn.Dropout(0.1)",
        "x = self.tokens(ids)\nx = self.drop(self.position(x))",
        """
        class Places(nn.Module):
            def __init__(self, dim):
                super().__init__()
                self.table = nn.Parameter(torch.randn(LENGTH, dim))

            def forward(self, x):
                return x + self.table[:x.size(1)]
        """,
    ),
    "class_that_gives_positions": (
        "self.position = Places(DIM)",
        "x = self.tokens(ids) + self.position(ids)",
        """
        class Places(nn.Module):
            def __init__(self, dim):
                super().__init__()
                self.table = nn.Embedding(LENGTH, dim)

            def forward(self, ids):
                return self.table(torch.arange(ids.size(1), device=ids.device))
        """,
    ),
    "free_function": (
        "self.scale = DIM ** 0.5",
        "x = self.tokens(ids) * self.scale\nx = x + sinusoid(x.size(1), x.size(2)).to(x)",
        """
        def sinusoid(length, dim):
            t = torch.arange(length).float()[:, None]
            w = 1e-4 ** (torch.arange(0, dim, 2).float() / dim)
            return torch.cat([torch.sin(t * w), torch.cos(t * w)], dim=-1)
        """,
    ),
    "embeds_tokens_too": (
        "self.tokens = Embed()",
        "x = self.tokens(ids)",
        """
        class Embed(nn.Module):
            def __init__(self):
                super().__init__()
                self.words = nn.Embedding(WORDS, DIM)
                self.places = nn.Embedding(LENGTH, DIM)
                self.drop = nn.Dropout(0.1)

            def forward(self, ids):
                where = torch.arange(ids.size(1)).unsqueeze(0).repeat(ids.size(0), 1)
                return self.drop(self.words(ids) + self.places(where))
        """,
    ),
}

ATTENTIONS = {
    "plain": ATTENTION,
    "key_transposed_early": """
        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.heads, self.qkv, self.o = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

            def forward(self, x, mask=None):
                b, t, c = x.shape
                q, k, v = self.qkv(x).chunk(3, dim=-1)
                q = q.reshape(b, t, self.heads, -1).permute(0, 2, 1, 3)
                k = k.reshape(b, t, self.heads, -1).permute(0, 2, 3, 1)
                v = v.reshape(b, t, self.heads, -1).permute(0, 2, 1, 3)
                weights = torch.softmax(torch.matmul(q, k) * (c // self.heads) ** -0.5, dim=-1)
                return self.o(torch.matmul(weights, v).transpose(1, 2).reshape(b, t, c))
        """,
    "stacked_qkv": """
        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.heads, self.qkv, self.o = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

            def forward(self, x, mask=None):
                b, t, c = x.shape
                qkv = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
                q, k, v = qkv[0], qkv[1], qkv[2]
                weights = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
                return self.o((weights @ v).transpose(1, 2).reshape(b, t, c))
        """,
    "einsum_time_first": """
        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.heads = heads
                self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

            def forward(self, x, mask=None):
                b, t, c = x.shape
                q, k, v = (f(x).view(b, t, self.heads, c // self.heads) for f in (self.q, self.k, self.v))
                scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(c // self.heads)
                return torch.einsum("bhqk,bkhd->bqhd", F.softmax(scores, dim=-1), v).reshape(b, t, c)
        """,
    "raw_parameters": """
        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.w_q = nn.Parameter(torch.randn(heads, dim // heads, dim) / 4)
                self.w_k = nn.Parameter(torch.randn(heads, dim // heads, dim) / 4)
                self.w_v = nn.Parameter(torch.randn(heads, dim // heads, dim) / 4)

            def forward(self, x, mask=None):
                q = torch.einsum("ntc,hdc->nhtd", x, self.w_q)
                k = torch.einsum("ntc,hdc->nhtd", x, self.w_k)
                v = torch.einsum("ntc,hdc->nhtd", x, self.w_v)
                a = torch.einsum("nhtd,nhsd->nhts", q, k) / math.sqrt(q.size(-1))
                return torch.einsum("nhts,nhsd->nthd", a.softmax(dim=3), v).flatten(2)
        """,
    "one_module_per_head": """
        class Head(nn.Module):
            def __init__(self, dim, size):
                super().__init__()
                self.key = nn.Linear(dim, size, bias=False)
                self.query = nn.Linear(dim, size, bias=False)
                self.value = nn.Linear(dim, size, bias=False)

            def forward(self, x):
                q, k = self.query(x), self.key(x)
                weights = F.softmax(q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5, dim=-1)
                return weights @ self.value(x)


        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.heads = nn.ModuleList([Head(dim, dim // heads) for _ in range(heads)])
                self.o = nn.Linear(dim, dim)

            def forward(self, x, mask=None):
                return self.o(torch.cat([head(x) for head in self.heads], dim=-1))
        """,
    "free_function": """
        def attend(query, key, value, mask=None, dropout=None):
            scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
            if mask is not None:
                scores = scores.masked_fill(mask == 0, -1e9)
            weights = F.softmax(scores, dim=-1)
            if dropout is not None:
                weights = dropout(weights)
            return torch.matmul(weights, value), weights


        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super(Attention, self).__init__()
                self.heads = heads
                self.linears = nn.ModuleList([copy.deepcopy(nn.Linear(dim, dim)) for _ in range(4)])
                self.dropout = nn.Dropout(p=0.1)

            def forward(self, x, mask=None):
                b = x.size(0)
                query, key, value = [
                    linear(part).view(b, -1, self.heads, DIM // HEADS).transpose(1, 2)
                    for linear, part in zip(self.linears, (x, x, x))
                ]
                x, self.attn = attend(query, key, value, mask=mask, dropout=self.dropout)
                return self.linears[-1](x.transpose(1, 2).contiguous().view(b, -1, DIM))
        """,
    "no_constructor": """
        class Product(nn.Module):
            "Scaled dot products."

            def forward(self, q, k, v):
                k_t = k.transpose(2, 3)
                score = (q @ k_t) / math.sqrt(q.size(-1))
                return torch.softmax(score, dim=-1) @ v


        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.heads, self.product = heads, Product()
                self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

            def split(self, x):
                b, t, c = x.size()
                return x.view(b, t, self.heads, c // self.heads).transpose(1, 2)

            def forward(self, x, mask=None):
                out = self.product(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x)))
                return out.transpose(1, 2).contiguous().view(x.shape)
        """,
    "sdpa": """
        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.heads, self.qkv, self.o = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

            def forward(self, x, mask=None):
                b, t, c = x.shape
                q, k, v = self.qkv(x).split(c, dim=2)
                q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in (q, k, v))
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
                return self.o(y.transpose(1, 2).reshape(b, t, c))
        """,
    "torch_mha": """
        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.inner = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)

            def forward(self, x, mask=None):
                return self.inner(x, x, x, need_weights=False)[0]
        """,
}

WHOLE = {
    "torch_encoder": HEAD
    + SINUSOID
    + """

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, DIM)
        self.position = PositionalEncoding(DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, ids):
        return self.head(self.encoder(self.position(self.tokens(ids))))


"""
    + BUILD,
    "one_class_for_self_and_cross": HEAD
    + SINUSOID
    + """

class MultiHead(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, q, k, v):
        b, t, c = q.shape
        q, k, v = self.q(q), self.k(k), self.v(v)
        q, k, v = (y.view(b, -1, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 2.0, dim=-1)
        return torch.matmul(weights, v).transpose(1, 2).reshape(b, t, c)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.position, self.attention = PositionalEncoding(DIM), MultiHead(DIM, HEADS)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x):
        x = self.position(x)
        return self.norm(x + self.attention(x, x, x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = PositionalEncoding(DIM)
        self.own, self.across = MultiHead(DIM, HEADS), MultiHead(DIM, HEADS)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, y, memory):
        y = self.position(y)
        y = y + self.own(y, y, y)
        return self.norm(y + self.across(y, memory, memory))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, DIM)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, ids):
        return self.head(self.decoder(self.tokens(ids), self.encoder(self.tokens(ids))))


"""
    + BUILD,
    "copies_of_one_attention": HEAD
    + SINUSOID
    + """

class MultiHead(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.linears = nn.ModuleList([nn.Linear(dim, dim) for _ in range(4)])

    def forward(self, query, key, value):
        b = query.size(0)
        query, key, value = [
            f(y).view(b, -1, self.heads, DIM // self.heads).transpose(1, 2)
            for f, y in zip(self.linears, (query, key, value))
        ]
        weights = F.softmax(torch.matmul(query, key.transpose(-2, -1)) / 2.0, dim=-1)
        return self.linears[-1](torch.matmul(weights, value).transpose(1, 2).reshape(b, -1, DIM))


class Layer(nn.Module):
    def __init__(self, own, across=None):
        super().__init__()
        self.own, self.across = own, across
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x, memory=None):
        x = x + self.own(x, x, x)
        if self.across is not None:
            x = x + self.across(x, memory, memory)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, encoder, decoder, position):
        super().__init__()
        self.tokens, self.head = nn.Embedding(WORDS, DIM), nn.Linear(DIM, WORDS)
        self.encoder, self.decoder, self.position = encoder, decoder, position

    def forward(self, ids):
        memory = self.encoder(self.position(self.tokens(ids)))
        return self.head(self.decoder(self.position(self.tokens(ids)), memory))


def make_model():
    c = copy.deepcopy
    attention = MultiHead(DIM, HEADS)
    return Model(Layer(c(attention)), Layer(c(attention), c(attention)), PositionalEncoding(DIM))


def build():
    torch.manual_seed(0)
    return make_model().eval()
""",
    "context_or_itself": HEAD
    + """class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x, context=None):
        b, t, c = x.shape
        context = x if context is None else context
        q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)
        q, k, v = (y.view(b, -1, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        weights = F.softmax(q @ k.transpose(-1, -2) * 0.5, dim=-1)
        return (weights @ v).transpose(1, 2).reshape(b, t, c)


def pair():
    return nn.ModuleList([Attention(DIM, HEADS) for _ in range(2)])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, DIM)
        self.places = nn.Parameter(torch.randn(LENGTH, DIM))
        self.memory = nn.Linear(DIM, DIM)
        self.layers = pair()
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, ids):
        words = self.tokens(ids)
        x = words + self.places[:ids.size(1)]
        x = x + self.layers[0](x)
        x = x + self.layers[1](x, self.memory(words))
        return self.head(x)


"""
    + BUILD,
}


def programs() -> dict[str, str]:
    """All of them by name."""
    found = {f"position_{name}": by_position(*parts) for name, parts in POSITIONS.items()}
    found |= {f"position_{name}": by_position(*parts) for name, parts in MODULE_POSITIONS.items()}
    found |= {f"attention_{name}": by_attention(text) for name, text in ATTENTIONS.items()}
    return found | WHOLE
