"""Programs for `relay`: a small model whose attention, mask, sum and norms are put together from parts."""

from __future__ import annotations

HEAD = """\
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

"""

# How query, key and value are made: [batch, heads, time, width] in the end.
HEADS = {
    "view": """
        batch, time, width = x.shape
        q, k, v = (p(x).view(batch, time, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
""",
    "size minus one": """
        shape = x.size()[:-1] + (self.heads, self.width)
        q, k, v = self.q(x).view(*shape), self.k(x).view(shape), self.v(x).view(*x.shape[:-1], self.heads, self.width)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.transpose(-2, -3)
""",
    "permuted at once": """
        batch, time, width = x.shape
        fused = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        qkv = self.qkv(x).reshape(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
""",
    "unbound": """
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, self.width).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
""",
    "chunk and rearrange": """
        batch, time, width = x.shape
        q, k, v = map(lambda t: rearrange(t, "b n (h d) -> b h n d", h=self.heads), self.qkv(x).chunk(3, dim=-1))
""",
    "unflatten": """
        batch, time, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (t.unflatten(-1, (self.heads, self.width)).transpose(1, 2) for t in (q, k, v))
""",
}
HEADS["permuted at once"] = HEADS["permuted at once"].replace(
    "        fused = torch.cat([self.q.weight, self.k.weight, self.v.weight])\n", ""
)
# The rest of the attention, for each kind of mask.
MIXED = {
    "written out": """\
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
{masked}        mixed = scores.softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
""",
    "sdpa": """\
        mixed = F.scaled_dot_product_attention(q, k, v{argument})
        mixed = mixed.permute(0, 2, 1, 3).contiguous()
        return self.out(mixed.view(mixed.size()[:-2] + (self.heads * self.width,)))
""",
}
EINSUM = """\
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(self.width)
{masked}        mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))
"""
MIXED["einsum"] = EINSUM
MASKS = {
    "none": ("", ""),
    "buffer": (
        "        scores = scores.masked_fill(self.seen[: x.shape[1], : x.shape[1]] == 0, float('-inf'))\n",
        ", attn_mask=self.seen[: x.shape[1], : x.shape[1]]",
    ),
    "made in place": (
        "        blocked = torch.full((x.shape[1], x.shape[1]), float('-inf'), device=x.device).triu(1)\n"
        "        scores = scores + blocked\n",
        ", is_causal=True",
    ),
}
ATTENTION = """\
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.register_buffer("seen", torch.tril(torch.ones(32, 32)).bool(), persistent=False)

    def forward(self, x):
"""
# torch's own, in its place.
TORCH = """\
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]
"""
# How the block continues the stream.
SUMS = {
    "expression": """
        x = x + self.drop(self.attention(self.norm(x)))
        return x + self.ff(self.norm2(x))
""",
    "branch first": """
        read = self.norm(x)
        x = self.attention(read) + x
        return self.ff(self.norm2(x)) + x
""",
    "in place": """
        h = x
        x = self.attention(self.norm(x))
        x += h
        return x + self.ff(self.norm2(x))
""",
    "scaled": """
        h = x
        x = self.attention(self.norm(x))
        x = h + self.scale * x
        return x + self.ff(self.norm2(x))
""",
    "post-norm": """
        x = self.norm(x + self.drop(self.attention(x)))
        return self.norm2(x + self.ff(x))
""",
}
BLOCK = """

class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention = Attention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(0.5 * torch.ones(dim))

    def forward(self, x):
{sum}

class Net(nn.Module):
    def __init__(self, dim=24, heads=4, depth=2, words=11):
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, words)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
"""


def program(heads: str = "view", mixed: str = "sdpa", mask: str = "none", total: str = "expression") -> str:
    """A model of two blocks, put together from the parts of these names."""
    masked, argument = MASKS[mask]
    body = MIXED[mixed].replace("{masked}", masked).replace("{argument}", argument)
    return HEAD + ATTENTION + HEADS[heads].lstrip("\n") + body + BLOCK.replace("{sum}", SUMS[total].lstrip("\n"))


def changed(text: str, *changes: tuple[str, str]) -> str:
    """The text with each first part replaced by the second; each has to be there once."""
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


PLAIN = program()
CAUSAL = program(mask="buffer")
WRITTEN = program(mixed="written out")
# Further models that get a relay, without a mask.
FORMS = {
    "torch's attention": HEAD + TORCH + PLAIN[PLAIN.index("\n\nclass Block") :],
    "one head, none split off": changed(
        PLAIN,
        ("        batch, time, width = x.shape\n", "        batch, time, width = x.shape\n        self.heads = 1\n"),
        ("        q, k, v = (p(x).view(batch, time, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))\n",
         "        q, k, v = self.q(x), self.k(x), self.v(x)\n"),
        ("        mixed = F.scaled_dot_product_attention(q, k, v)\n",
         "        mixed = (q @ k.transpose(1, 2) / 5).softmax(-1) @ v\n        return self.out(mixed)\n"),
        ("        mixed = mixed.permute(0, 2, 1, 3).contiguous()\n", ""),
        ("        return self.out(mixed.view(mixed.size()[:-2] + (self.heads * self.width,)))\n", ""),
    ),
    "heads that share keys": changed(
        program("unflatten"),
        (
            "        mixed = F.scaled",
            "        k, v = self.few(x).chunk(2, dim=-1)\n"
            "        k, v = (t.view(batch, time, 2, -1).transpose(1, 2) for t in (k, v))\n"
            "        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))\n        mixed = F.scaled",
        ),
        ("        self.register_buffer", "        self.few = nn.Linear(dim, 4 * (dim // heads))\n        self.register_buffer"),
    ),
    "a scale that is learned": changed(WRITTEN, (
        " / math.sqrt(self.width)\n", " * self.temperature\n"), (
        "        self.register_buffer", "        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))\n"
        "        self.register_buffer")),
    "norms of its own, width by the projection": changed(
        HEAD + PLAIN[PLAIN.index("class Block") :],
        ("class Block", """\
class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Block"""),
        ("(nn.Module):\n    def __init__(self, dim, heads):\n        super().__init__()\n"
         "        self.attention = Attention(dim, heads)\n        self.norm = nn.LayerNorm(dim)\n"
         "        self.norm2 = nn.LayerNorm(dim)\n",
         "(nn.Module):\n    def __init__(self, dim, heads):\n        super().__init__()\n"
         "        self.query, self.pair = nn.Linear(in_features=dim, out_features=dim), nn.Linear(dim, 2 * dim)\n"
         "        self.norm, self.norm2 = Norm(dim), Norm(dim)\n"),
        ("        x = x + self.drop(self.attention(self.norm(x)))\n",
         "        read = self.norm(x)\n        key, value = self.pair(read).chunk(2, -1)\n"
         "        batch, time, width = x.shape\n"
         "        mixed = (self.query(read) @ key.transpose(1, 2)).softmax(-1) @ value\n        x = x + mixed\n"),
    ),
    "width of a setting": changed(
        PLAIN,
        ("class Attention(nn.Module):", """\
class Settings:
    def __init__(self, dim):
        self.model = self
        self.dim = dim


class Attention(nn.Module):"""),
        ("class Block(nn.Module):\n    def __init__(self, dim, heads):\n",
         "class Block(nn.Module):\n    def __init__(self, settings, dim, heads):\n"),
        ("        self.norm = nn.LayerNorm(dim)\n        self.norm2",
         "        self.norm = nn.LayerNorm(normalized_shape=settings.model.dim)\n        self.norm2"),
        ("Block(dim, heads) for", "Block(Settings(dim), dim, heads) for"),
    ),
    "the name is taken": changed(
        PLAIN, ("        self.drop = nn.Dropout(0.1)\n", "        self.drop = self.relay = nn.Dropout(0.1)\n")
    ),
    "self goes by another name": changed(
        PLAIN,
        ("    def forward(self, x):\n        x = x + self.drop(self.attention(self.norm(x)))\n"
         "        return x + self.ff(self.norm2(x))\n",
         "    def forward(me, x):\n        x = x + me.drop(me.attention(me.norm(x)))\n"
         "        return x + me.ff(me.norm2(x))\n"),
    ),
}  # fmt: skip
