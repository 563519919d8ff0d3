"""Decoders with generation loops in the styles met in the wild, put together from parts."""

from __future__ import annotations

import textwrap

HEADER = """
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

"""

# -- attention: what stands in `forward`, for a class with q, k, v, out, drop, heads, a mask `tril` and a qkv

ATTENTION = """
class Attention(nn.Module):
    def __init__(self, dim=16, heads=2, window=12):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.1)
        self.w_q = nn.Parameter(torch.randn(heads, self.width, dim) / 4)
        self.w_k = nn.Parameter(torch.randn(heads, self.width, dim) / 4)
        self.w_v = nn.Parameter(torch.randn(heads, self.width, dim) / 4)
        self.register_buffer("tril", torch.tril(torch.ones(window, window)))
        self.register_buffer("bias", torch.tril(torch.ones(window, window)).view(1, 1, window, window))

    def split(self, x):
        return x.view(x.size(0), x.size(1), self.heads, self.width).transpose(1, 2)

    def forward(self, x, mask=None):
BODY
"""

PLAIN = """
B, T, C = x.shape
q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
weights = self.drop(F.softmax(scores, dim=-1))
return self.out((weights @ v).transpose(1, 2).reshape(B, T, C))
"""

BODIES = {
    "plain": PLAIN,
    "fused, four axes of mask": """
B, T, C = x.size()
q, k, v = self.qkv(x).split(C, dim=2)
k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
att = F.softmax(att, dim=-1)
y = self.drop(att) @ v
y = y.transpose(1, 2).contiguous().view(B, T, C)
return self.out(y)
""",
    "chunks, mask made on the way": """
batch, steps, _ = x.shape
q, k, v = self.qkv(x).chunk(3, dim=-1)
q, k, v = self.split(q), self.split(k), self.split(v)
scores = torch.matmul(q, k.transpose(2, 3)) * self.width ** -0.5
ahead = torch.triu(torch.ones(steps, steps, device=x.device), diagonal=1).bool()
scores = scores.masked_fill(ahead, -1e9)
out = torch.matmul(self.drop(scores.softmax(-1)), v)
return self.out(out.permute(0, 2, 1, 3).flatten(2))
""",
    "einsum with bare weights": """
q = torch.einsum("ntc,hdc->nhtd", x, self.w_q)
k = torch.einsum("ntc,hdc->nhtd", x, self.w_k)
v = torch.einsum("ntc,hdc->nhtd", x, self.w_v)
scores = torch.einsum("nhtd,nhsd->nhts", q, k) / math.sqrt(self.width)
length = x.shape[1]
ahead = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
share = self.drop(torch.softmax(scores.masked_fill(ahead, float("-inf")), dim=-1))
return self.out(torch.einsum("nhts,nhsd->nthd", share, v).flatten(2))
""",
    "time before heads in an einsum": """
n, t, c = x.shape
q, k, v = self.qkv(x).view(n, t, 3, self.heads, self.width).unbind(2)
scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.width ** 0.5
scores = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
share = torch.softmax(scores, dim=-1)
return self.out(torch.einsum("bhqk,bkhd->bqhd", share, v).reshape(n, t, c))
""",
    "the value comes after the softmax": """
B, T, C = x.shape
k = self.split(self.k(x))
q = self.split(self.q(x))
wei = q @ k.transpose(-2, -1) * self.width ** -0.5
wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
wei = F.softmax(wei, dim=-1)
v = self.v(x)  # [B, T, C]
v = self.split(v)
return self.out((self.drop(wei) @ v).transpose(1, 2).reshape(B, T, C))
""",
    "the key is transposed where it is made": """
B, T, C = x.shape
q = self.split(self.q(x))
k = self.k(x).view(B, T, self.heads, self.width).permute(0, 2, 3, 1)
v = self.split(self.v(x))
scores = torch.matmul(q, k) / math.sqrt(self.width)
scores = scores.masked_fill(self.tril[:T, :T] == 0, -1e4)
return self.out(torch.matmul(F.softmax(scores, -1), v).transpose(1, 2).contiguous().view(B, T, C))
""",
    "an additive mask": """
B, T, C = x.shape
q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
scores = scores + torch.full((T, T), float("-inf"), device=x.device, dtype=x.dtype).triu(diagonal=1)
return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
""",
    "one call": """
B, T, C = x.shape
q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
return self.out(out.transpose(1, 2).reshape(B, T, C))
""",
    "one call or written out": """
B, T, C = x.shape
q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
if hasattr(F, "scaled_dot_product_attention") and self.heads > 1:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True)
else:
    scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
    scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
    out = scores.softmax(-1) @ v
return self.out(out.transpose(1, 2).reshape(B, T, C))
""",
    "one call with a mask": """
B, T, C = x.shape
q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
out = F.scaled_dot_product_attention(q, k, v, self.tril[:T, :T].bool(), scale=self.width ** -0.5)
return self.out(out.transpose(1, 2).reshape(B, T, C))
""",
    "heads folded into the batch": """
B, T, C = x.shape
q, k, v = (self.split(h(x)).reshape(B * self.heads, T, self.width) for h in (self.q, self.k, self.v))
scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(self.width)
scores = scores.masked_fill(self.tril[:T, :T].unsqueeze(0) == 0, float("-inf"))
mixed = torch.bmm(F.softmax(scores, dim=-1), v)
return self.out(mixed.view(B, self.heads, T, self.width).transpose(1, 2).reshape(B, T, C))
""",
}

BLOCK = """
class Block(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.attention = Attention(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim), nn.Dropout(0.1))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))

"""

MODEL = """
class Model(nn.Module):
    def __init__(self, words=23, dim=16, window=12, depth=2):
        super().__init__()
        self.window = window
        self.tokens, self.places = nn.Embedding(words, dim), nn.Embedding(window, dim)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, words)

    def forward(self, idx):
        B, T = idx.shape
        x = self.tokens(idx) + self.places(torch.arange(T, device=idx.device))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

GENERATE
"""

CROPPED = """
    def generate(self, idx, count, sample=False):
        for _ in range(count):
            window = idx[:, -self.window:]
            logits = self(window)[:, -1, :]
            if sample:
                new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            else:
                new = logits.argmax(-1, keepdim=True)
            idx = torch.cat((idx, new), dim=1)
        return idx
"""


def program(body: str = PLAIN, block: str = BLOCK, model: str = MODEL, generate: str = CROPPED) -> str:
    """A whole program, with `Model()` and its method `generate`."""
    attention = ATTENTION.replace("BODY", textwrap.indent(body.strip("\n"), " " * 8))
    return HEADER.lstrip("\n") + attention + "\n" + block + model.replace("GENERATE\n", generate.lstrip("\n"))


def changed(text: str, *pairs: tuple[str, str]) -> str:
    """A text with some lines replaced; each must be there."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


MASKED = """
B, T, C = x.shape
q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
scores = scores.masked_fill(mask == 0, float("-inf"))
weights = self.drop(F.softmax(scores, dim=-1))
return self.out((weights @ v).transpose(1, 2).reshape(B, T, C))
"""
PASSING = changed(BLOCK, ("def forward(self, x):", "def forward(self, x, mask):"),
                  ("self.attention(self.norm1(x))", "self.attention(self.norm1(x), mask)"))  # fmt: skip

HEADS = """
class Head(nn.Module):
    def __init__(self, dim, width, window=12):
        super().__init__()
        self.key = nn.Linear(dim, width, bias=False)
        self.query = nn.Linear(dim, width, bias=False)
        self.value = nn.Linear(dim, width, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(window, window)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        B, T, C = x.shape
        k = self.key(x)
        q = self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = self.dropout(F.softmax(wei, dim=-1))
        v = self.value(x)  # what is mixed
        return wei @ v


class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = nn.ModuleList([Head(dim, dim // heads) for _ in range(heads)])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))


"""

APART = """
def attention(query, key, value, mask=None, dropout=None):
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = F.softmax(scores, dim=-1)
    if dropout is not None:
        p_attn = dropout(p_attn)
    return torch.matmul(p_attn, value), p_attn


class Attention(nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.d_k, self.h = dim // heads, heads
        self.linears = nn.ModuleList([nn.Linear(dim, dim) for _ in range(4)])
        self.dropout = nn.Dropout(p=0.1)

    def forward(self, query, key, value, mask=None):
        nbatches = query.size(0)
        query, key, value = [
            l(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for l, x in zip(self.linears, (query, key, value))
        ]
        x, weights = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        return self.linears[-1](x)


"""

OWN_MODULE = """
class Weighing(nn.Module):
    def __init__(self, temperature, drop=0.1):
        super().__init__()
        self.temperature, self.dropout = temperature, nn.Dropout(drop)

    def forward(self, q, k, v, mask=None):
        attn = torch.matmul(q / self.temperature, k.transpose(2, 3))
        if mask is not None:
            attn = attn.masked_fill(mask == 0, -1e9)
        attn = self.dropout(F.softmax(attn, dim=-1))
        output = torch.matmul(attn, v)
        return output, attn


class Attention(nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.n_head, self.d_k = heads, dim // heads
        self.w_qs, self.w_ks = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.w_vs, self.fc = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.attention = Weighing(self.d_k ** 0.5)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, q, k, v, mask=None):
        d_k, n_head = self.d_k, self.n_head
        sz_b, len_q, len_k, len_v = q.size(0), q.size(1), k.size(1), v.size(1)
        residual = q
        q = self.w_qs(q).view(sz_b, len_q, n_head, d_k)
        k = self.w_ks(k).view(sz_b, len_k, n_head, d_k)
        v = self.w_vs(v).view(sz_b, len_v, n_head, d_k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if mask is not None:
            mask = mask.unsqueeze(1)
        q, attn = self.attention(q, k, v, mask=mask)
        q = q.transpose(1, 2).contiguous().view(sz_b, len_q, -1)
        q = self.fc(q)
        q += residual
        return self.layer_norm(q)


"""

WITH_MASK = changed(
    MODEL,
    (
        "        x = self.drop(x)\n",
        "        x = self.drop(x)\n        mask = torch.tril(torch.ones(T, T, device=x.device))\n",
    ),
    ("block(x)", "block(x, mask)"),
)
SELF = changed(PASSING, ("self.attention(self.norm1(x), mask)", "self.attention(*(3 * [self.norm1(x)]), mask)"))
SELF = changed(PASSING, ("        x = x + self.attention(self.norm1(x), mask)\n",
                         "        y = self.norm1(x)\n        x = x + self.attention(y, y, y, mask)\n"))  # fmt: skip
SEQUENTIAL = changed(
    MODEL,
    ("nn.ModuleList([Block(dim) for _ in range(depth)])", "nn.Sequential(*[Block(dim) for _ in range(depth)])"),
    ("        for block in self.blocks:\n            x = block(x)\n", "        x = self.blocks(x)  # all of them\n"),
)
PLACES = """
class Places(nn.Module):
    def __init__(self, dim, longest=64):
        super().__init__()
        table = torch.zeros(longest, dim)
        place = torch.arange(longest).float().unsqueeze(1)
        rate = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
        table[:, 0::2] = torch.sin(place * rate)
        table[:, 1::2] = torch.cos(place * rate)
        self.register_buffer("table", table.unsqueeze(0))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.table[:, :x.size(1)]
        return self.dropout(x)


"""
SINUSOID = changed(
    MODEL,
    ("nn.Embedding(window, dim)", "Places(dim)"),
    ("self.tokens(idx) + self.places(torch.arange(T, device=idx.device))", "self.places(self.tokens(idx) * 4.0)"),
)
PADDED = changed(
    MODEL,
    (
        "        x = self.drop(x)\n",
        "        x = self.drop(x)\n        keep = (idx != 22).unsqueeze(1).unsqueeze(2)\n"
        "        ahead = torch.tril(torch.ones((T, T), device=x.device)).bool()\n        mask = keep & ahead\n",
    ),
    ("block(x)", "block(x, mask)"),
)
CONDITIONAL = changed(
    CROPPED, ("idx[:, -self.window:]", "idx if idx.size(1) <= self.window else idx[:, -self.window:]")
)
INLINE = changed(CROPPED, ("            window = idx[:, -self.window:]\n", ""),
                 ("self(window)", "self.forward(idx[:, -self.window:])"))  # fmt: skip
GROWING = changed(CROPPED, ("            window = idx[:, -self.window:]\n", ""), ("self(window)", "self(idx)"))
WHILE = """
    @torch.no_grad()
    def generate(self, idx, count, sample=False):
        self.eval()
        end = idx.size(1) + count
        while idx.size(1) < end:
            out = self(idx)
            scores = out[:, -1] / 0.9
            if sample:
                top, _ = torch.topk(scores, 5)
                scores[scores < top[:, [-1]]] = -float("Inf")
                new = torch.multinomial(torch.softmax(scores, -1), 1)
            else:
                _, new = torch.topk(scores, k=1, dim=-1)
            idx = torch.cat([idx, new], dim=-1)
            if (new == 100).all():
                break
        return idx
"""
LAST = changed(
    MODEL,
    ("    def forward(self, idx):", "    def forward(self, idx, targets=None):"),
    ("        return self.head(self.norm(x))\n", """        x = self.norm(x)
        if targets is not None:
            logits = self.head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits, loss = self.head(x[:, [-1], :]), None
        return logits, loss
"""),
    ("        B, T = idx.shape\n", "        B, T = idx.shape\n        if T > self.window:\n"
     "            raise ValueError(f'{T} tokens, but only {self.window} places')\n"),
)  # fmt: skip
PAIRED = changed(CROPPED, ("self(window)[:, -1, :]", "self(window)[0][:, -1]"))

FORMS = {f"attention: {name}": program(body) for name, body in BODIES.items()} | {
    "one module a head": HEADER + HEADS.lstrip("\n") + BLOCK.lstrip("\n") + MODEL.replace("GENERATE\n", CROPPED),
    "a mask from the model": program(MASKED, PASSING, WITH_MASK),
    "attention is a function": HEADER + APART + SELF + WITH_MASK.replace("GENERATE\n", CROPPED),
    "attention is a module without weights": (
        HEADER + OWN_MODULE + SELF
        + changed(WITH_MASK, ("torch.ones(T, T,", "torch.ones(1, T, T,")).replace("GENERATE\n", CROPPED)
    ),
    "a Sequential": program(model=SEQUENTIAL),
    "sinusoids in a module": program(model=PLACES + SINUSOID),
    "a padding mask": program(MASKED, PASSING, PADDED),
    "cropped by a condition": program(generate=CONDITIONAL),
    "cropped in the call": program(generate=INLINE),
    "not cropped": program(model=PLACES + SINUSOID, body=BODIES["chunks, mask made on the way"], generate=GROWING),
    "a while loop": program(model=PLACES + SINUSOID, body=BODIES["chunks, mask made on the way"], generate=WHILE),
    "logits of the last step alone": program(model=LAST, generate=PAIRED),
}  # fmt: skip

# -- loops outside of the model

FREE = """

def generate(model, idx, count, sample=False):
    for _ in range(count):
        logits = model(idx[:, -model.window:])[:, -1, :]
        if sample:
            new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
        else:
            new = logits.argmax(-1, keepdim=True)
        idx = torch.cat((idx, new), dim=1)
    return idx
"""
EVALUATING = changed(FREE, ("    for _", "    model.eval()\n    for _"))
WRITER = """

class Writer:
    def __init__(self, model, temperature=0.9):
        self.model, self.temperature = model, temperature

    def step(self, idx):
        return self.model(idx)[:, -1] / self.temperature

    @torch.no_grad()
    def write(self, idx, count, sample):
        for turn in range(count):
            logits = self.step(idx[:, -12:])
            new = torch.multinomial(F.softmax(logits, dim=-1), 1) if sample else logits.argmax(-1).unsqueeze(1)
            idx = torch.cat([idx, new], 1)
        return idx


def generate(model, idx, count, sample=False):
    return Writer(model).write(idx, count, sample)
"""

# -- encoder and decoder

TRANSLATOR = """
class EncoderLayer(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.attention = Attention(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed = nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, dim))

    def forward(self, x, mask):
        x = self.norm1(x + self.attention(x, x, x, mask))
        return self.norm2(x + self.feed(x))


class DecoderLayer(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.own, self.cross = Attention(dim), Attention(dim)
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(3)])
        self.feed = nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, dim))

    def forward(self, x, memory, source_mask, mask):
        x = self.norms[0](x + self.own(x, x, x, mask))
        x = self.norms[1](x + self.cross(x, memory, memory, source_mask))
        return self.norms[2](x + self.feed(x))


class Model(nn.Module):
    def __init__(self, words=23, dim=16, depth=2):
        super().__init__()
        self.source, self.target = nn.Embedding(words, dim), nn.Embedding(words, dim)
        self.places = Places(dim)
        self.encoder = nn.ModuleList([EncoderLayer(dim) for _ in range(depth)])
        self.decoder = nn.ModuleList([DecoderLayer(dim) for _ in range(depth)])
        self.head = nn.Linear(dim, words)

    def encode(self, source, mask):
        x = self.places(self.source(source) * 4.0)
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def decode(self, memory, source_mask, target, mask):
        x = self.places(self.target(target) * 4.0)
        for layer in self.decoder:
            x = layer(x, memory, source_mask, mask)
        return x

    def forward(self, source):
        mask = (source != 22).unsqueeze(-2)
        memory = self.encode(source, mask)
        return self.head(self.decode(memory, mask, source, ahead(source.size(1)) & mask))

"""
AHEAD = """
def ahead(size):
    blocked = torch.triu(torch.ones(1, size, size), diagonal=1).type(torch.uint8)
    return blocked == 0


"""
GREEDY = """
def generate(model, source, count, sample=False):
    mask = (source != 22).unsqueeze(-2)
    memory = model.encode(source, mask)
    ys = torch.zeros(source.size(0), 1).fill_(1).type_as(source.data)
    for i in range(count):
        out = model.decode(memory, mask, ys, ahead(ys.size(1)))
        scores = model.head(out[:, -1])
        if sample:
            word = torch.multinomial(scores.softmax(1), 1)
        else:
            _, best = torch.max(scores, dim=1)
            word = best.data.unsqueeze(1)
        ys = torch.cat([ys, word.type_as(source.data)], dim=1)
    return ys
"""
LISTED = """
def generate(model, sources, count, sample=False):
    found = []
    for row in sources:
        source = torch.tensor([row.tolist()])
        mask = (source != 22).unsqueeze(1)
        memory = model.encode(source, mask)
        tokens = [1]
        while len(tokens) <= count:
            target = torch.tensor([tokens], dtype=torch.long)
            seen = (target == 99).unsqueeze(1).expand(target.size(0), target.size(1), target.size(1))
            seen = seen | torch.triu(torch.ones(target.size(1), target.size(1)), diagonal=1).bool().unsqueeze(0)
            out = model.head(model.decode(memory, mask, target, ~seen))
            scores = out[0, target.size(-1) - 1, :]
            word = torch.multinomial(scores.softmax(0), 1)[0] if sample else torch.argmax(scores)
            tokens.append(word)
            if word == 99:
                break
        found.append(torch.tensor(tokens))
    return torch.stack(found)
"""
SPREAD = changed(APART, ("-1e9", 'float("-inf")'), ("mask == 0", "mask.unsqueeze(1) == 0"))
TRANSLATING = HEADER + SPREAD + PLACES.replace("\n\n\n", "\n", 1) + AHEAD.lstrip("\n") + TRANSLATOR.lstrip("\n")

FORMS |= {
    "a function": program(generate="") + FREE,
    "a function that evaluates": program(generate="") + EVALUATING,
    "an object that holds the model": program(generate="") + WRITER,
    "a translator": TRANSLATING + GREEDY,
    "a translator with a list": TRANSLATING + LISTED,
}

# -- buffers and beams

BUFFER = """
    def generate(self, idx, count, sample=False):
        rows, first = idx.shape
        tokens = torch.full((rows, first + count), 21, dtype=torch.long)
        tokens[:, :first] = idx
        for step in range(first, first + count):
            logits = self(tokens[:, :step])[:, -1]
            new = torch.multinomial(logits.softmax(-1), 1).squeeze(1) if sample else logits.argmax(-1)
            tokens[:, step] = new
        return tokens
"""
AHEAD_OF_STEP = """
    @torch.inference_mode()
    def generate(self, idx, count, sample=False):
        tokens = torch.zeros(idx.size(0), count + 1, dtype=torch.long)
        tokens[:, 0] = idx[:, 0]
        for step in range(count):
            logits = self(tokens[:, : step + 1])[:, step]
            tokens[:, step + 1] = torch.multinomial(logits.softmax(-1), 1)[:, 0] if sample else logits.argmax(-1)
        return tokens
"""
BEAMS = """
def grow(beams, scores, out, step, sample):
    width = beams.size(0)
    best, words = out[:, -1].log_softmax(-1).topk(width)
    best = best + scores.unsqueeze(1)
    if sample:
        picked = torch.multinomial(best.view(-1).softmax(0), width)
        scores = best.view(-1)[picked]
    else:
        scores, picked = best.view(-1).topk(width)
    rows = picked // width
    beams[:, :step] = beams[rows, :step]
    beams[:, step] = words.view(-1)[picked]
    return beams, scores


def generate(model, sources, count, sample=False, width=3):
    found = []
    for source in sources.split(1):
        mask = (source != 22).unsqueeze(-2)
        memory = model.encode(source, mask).repeat(width, 1, 1)
        beams = torch.ones(width, count + 1, dtype=torch.long)
        beams[:, 1] = torch.arange(width) + 2
        scores = torch.zeros(width)
        for step in range(2, count + 1):
            out = model.head(model.decode(memory, mask, beams[:, :step], ahead(step)))
            beams, scores = grow(beams, scores, out, step, sample)
        found.append(beams.view(-1))
    return torch.stack(found)
"""
_FREE_OF_WINDOW = {"body": BODIES["chunks, mask made on the way"], "model": PLACES + SINUSOID}
FORMS |= {
    "a buffer": program(**_FREE_OF_WINDOW, generate=BUFFER),
    "a buffer, one step ahead": program(**_FREE_OF_WINDOW, generate=AHEAD_OF_STEP),
    "beams": TRANSLATING + BEAMS,
}
BEAMS_BY_CAT = """
    @torch.no_grad()
    def generate(self, idx, count, sample=False, width=3):
        idx = idx[:1].repeat(width, 1)
        scores = torch.linspace(0, -0.5, width)
        for _ in range(count):
            every = self(idx)[:, -1].log_softmax(-1)
            total = (scores.unsqueeze(1) + every).view(-1)
            picked = torch.multinomial((total / 4).softmax(0), width) if sample else total.topk(width).indices
            scores = total[picked]
            rows, new = picked // every.size(-1), picked % every.size(-1)
            idx = torch.cat([idx[rows], new.unsqueeze(1)], dim=1)
        return idx
"""
BEAMS_SELECTED = changed(
    BEAMS_BY_CAT, ("            idx = torch.cat([idx[rows], new.unsqueeze(1)], dim=1)\n",
                   "            idx = idx.index_select(0, rows)\n            idx = torch.cat([idx, new.unsqueeze(1)], dim=1)\n")
)  # fmt: skip
ROWS_THAT_END = """
    def generate(self, idx, count, sample=False):
        done = []
        for _ in range(count):
            logits = self(idx)[:, -1]
            new = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
            idx = torch.cat([idx, new], dim=1)
            alive = new[:, 0] % 7 != 3
            done.append(idx[~alive].flatten())
            idx = idx[alive]
        return torch.cat([*done, idx.flatten()]).unsqueeze(0)
"""
ROW = """
    def generate(self, idx, count, sample=False):
        found = []
        for row in idx:
            tokens = row.clone()
            for _ in range(count):
                fed = tokens[-self.window:]
                logits = self(fed[None, :])[0, -1, :]
                new = torch.multinomial(F.softmax(logits, dim=-1), 1)[0] if sample else logits.argmax(-1)
                tokens = torch.cat([tokens, new[None]], dim=0)
            found.append(tokens)
        return torch.stack(found)
"""
FORMS |= {
    "beams, joined": program(**_FREE_OF_WINDOW, generate=BEAMS_BY_CAT),
    "beams, selected and joined": program(**_FREE_OF_WINDOW, generate=BEAMS_SELECTED),
    "rows that end": program(**_FREE_OF_WINDOW, generate=ROWS_THAT_END),
    "a single row": program(generate=ROW),
    "a single row, unsqueezed": program(
        generate=changed(ROW, ("fed[None, :]", "fed.unsqueeze(0)"), ("new[None]", "new.view(1)"))
    ),
}
