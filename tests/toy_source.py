"""A toy transformer of which one switch after the other can be turned, written to a file: a rewrite, or a fault."""

from __future__ import annotations

from pathlib import Path

SOURCE = """
import math
import os
import time

import torch
import torch.nn.functional as F
from torch import nn

POSITIONS = "sine"      # sine, rotary, alibi, none
NORM = "post"           # post, pre, pre-without-final, swapped
GATED = "no"            # no, yes, wide
FUSED = "no"            # no, yes
MASK = "causal"         # causal, leak, none
FACTOR = 1.0            # on the scores
FAULT = "none"


class Sine(nn.Module):
    def forward(self, x):
        t = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        c = torch.arange(x.shape[2])[None]
        return x + torch.sin(t / 100 ** ((c - c % 2) / x.shape[2]) + math.pi / 2 * (c % 2))


class RotaryEmbedding(nn.Module):
    def forward(self, x):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class ALiBi(nn.Module):
    def forward(self, scores):
        t = torch.arange(scores.shape[-1])
        slopes = torch.tensor([0.5, 0.25])[:, None, None]
        return scores - slopes * (t[:, None] - t).abs()


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.place = {"rotary": RotaryEmbedding, "alibi": ALiBi}.get(POSITIONS, nn.Identity)()

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = (lin(x).view(n, t, 2, c // 2).transpose(1, 2) for lin in (self.q, self.k, self.v))
        if POSITIONS == "rotary":
            q, k = self.place(q), self.place(k)
        seen = torch.ones(t, t).tril(diagonal=1 if MASK == "leak" else 0).bool()
        if MASK == "none":
            seen = torch.ones(t, t).bool()
        if FUSED == "yes":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(c // 2) * FACTOR
            if POSITIONS == "alibi":
                scores = self.place(scores)
            y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, t, c))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        if GATED == "no":
            self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        else:
            hidden = hidden if GATED == "wide" else 8 * math.ceil(2 * hidden / 3 / 8)
            self.up, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        if GATED == "no":
            return self.down(torch.relu(self.up(x)))
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attention, self.norm1 = Attention(dim), nn.LayerNorm(dim)
        self.ff, self.norm2 = FeedForward(dim, 48), nn.LayerNorm(dim)
        self.drop = nn.Dropout(0.1)
        if FAULT == "dead parameter":
            self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        first, second = (self.norm2, self.norm1) if NORM == "swapped" else (self.norm1, self.norm2)
        if NORM.startswith("pre"):
            x = x + self.drop(self.attention(first(x)))
            return x + self.drop(self.ff(second(x)))
        x = first(x + self.drop(self.attention(x)))
        if FAULT == "dropped parameter":
            return second(x + self.drop(torch.relu(x)))
        return second(x + self.drop(self.ff(x)))


class Toy(nn.Module):
    def __init__(self, vocab=32, dim=16, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.positions = Sine() if POSITIONS == "sine" else nn.Identity()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.final_norm = nn.LayerNorm(dim) if NORM == "pre" else nn.Identity()
        self.head = nn.Linear(dim, vocab)
        self.spare = nn.Linear(dim, dim)  # not reached by forward

    def forward(self, ids):
        if FAULT == "wait":
            while True:
                time.sleep(0.01)
        if FAULT == "loop":
            while True:
                pass
        if FAULT == "hog":
            torch.ones(2_000, 1_000_000)
        if FAULT == "training" and self.training:
            self.no_such_thing()
        x = self.positions(self.embedding(ids))
        for block in self.blocks:
            x = block(x)
        x = self.head(self.final_norm(x))
        if FAULT == "nan":
            x = x / (x - x)
        if FAULT == "random":
            x = x + torch.rand_like(x)
        if FAULT == "shape":
            x = x[:, 1:]
        if FAULT == "batch":
            x = x + x.mean(0)
        return x.half() if FAULT == "dtype" else x


if FAULT == "crash":
    raise ValueError("no data here")
if FAULT == "exit":
    raise SystemExit(3)
if FAULT == "gone":
    os._exit(7)
"""


def write(folder: Path, name: str, **switches: object) -> Path:
    """`folder/name.py` with switches turned: `write(folder, "after", positions="rotary", norm="pre")`."""
    lines = SOURCE.lstrip().splitlines()
    for switch, value in switches.items():
        number = next(i for i, line in enumerate(lines) if line.startswith(f"{switch.upper()} = "))
        lines[number] = f"{switch.upper()} = {value!r}"
    path = folder / f"{name}.py"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
