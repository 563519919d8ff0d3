"""A model that is also run by a method of its own which nothing in the files calls, or only on one of two decoders."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from codemods.alibi import Alibi
from codemods.prenorm import Prenorm
from codemods.rope import Rope
from modernizer import pipeline
from modernizer.rule import Rule

PROGRAM = """
import math

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -1e9)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(dim, heads), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.narrow(torch.relu(self.wide(x))))


class Places(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 64, dim))

    def forward(self, x):
        return self.table[:, : x.size(1)]


class Decoder(nn.Module):
    def __init__(self, words=11, dim=16, heads=2):
        super().__init__()
        self.tokens, self.places = nn.Embedding(words, dim), Places(dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(2)])
        self.head = nn.Linear(dim, words)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def complete(self, ids, steps):
        for _ in range(steps):
            x = self.tokens(ids) + self.places(ids)
            for block in self.blocks:
                x = block(x)
            ids = torch.cat([ids, self.head(x[:, -1:]).argmax(-1)], dim=1)
        return ids
@more

class Model(nn.Module):
    def __init__(self, decoder=None):
        super().__init__()
        @made

    def forward(self, ids):
        return self.decoder(ids)
@method
"""
CALL = "\n    def sample(self, ids, steps):\n        return self.decoder.complete(ids, steps)\n"
COUNT = "\n    def depth(self):\n        return len(self.blocks), [block.norm1 for block in self.blocks], self.places.table.shape\n"
CHECKPOINT = "from torch import nn\nfrom torch.utils.checkpoint import checkpoint\n"
PART = """    def part(self, start, size):
        def run(x):
            for block in self.blocks[slice(start, start + size)]:
                x = block(x)
            return x

        return run

    def complete"""
EITHER = "self.decoder = decoder if decoder is not None else Decoder()"


def program(made: str, method: str = "", more: str = "") -> str:
    return PROGRAM.replace("@made", made).replace("@method", method).replace("@more", more)


def upgraded(tmp_path: Path, text: str, rule: Rule) -> tuple[str, pipeline.Report]:
    (tmp_path / "model.py").write_text(text)
    report = pipeline.upgrade([tmp_path / "model.py"], [rule], {})
    return (tmp_path / "model.py").read_text(), report


@pytest.mark.parametrize("rule", [Rope(), Alibi(), Prenorm()], ids=lambda rule: rule.name)
def test_a_method_that_nothing_calls_is_not_left_behind(rule: Rule, tmp_path: Path) -> None:
    text = program("self.decoder = Decoder()")
    after, report = upgraded(tmp_path, text, rule)
    assert after == text
    assert any("could not be followed" in site.message for site in report.sites)


@pytest.mark.parametrize("rule", [Rope(), Alibi(), Prenorm()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("made", ["self.decoder = Decoder()", EITHER], ids=["made", "given_or_made"])
def test_a_method_that_is_called_on_a_part_is_upgraded_too(made: str, rule: Rule, tmp_path: Path) -> None:
    after, _ = upgraded(tmp_path, program(made, CALL), rule)
    module = types.ModuleType("model")
    exec(compile(after, "model.py", "exec"), module.__dict__)
    torch.manual_seed(0)
    model = module.Model().eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    if rule.name == "prenorm":
        assert after.count("self.final_norm(x)") == 2
    else:
        assert "Places" not in after
    sampled = model.sample(ids, 3)
    for step in range(3):  # the loop runs what `forward` runs
        assert model(sampled[:, : 5 + step])[0, -1].argmax() == sampled[0, 5 + step]


@pytest.mark.parametrize("rule", [Rope(), Alibi()], ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    "kept",
    ["self.places = nn.Parameter(torch.randn(1, 64, dim))", 'self.register_buffer("places", torch.arange(64)[:, None] '
     "* torch.linspace(0.1, 1, dim))"],
    ids=["parameter", "buffer"],
)  # fmt: skip
def test_a_table_that_an_unfollowed_method_adds_too_stays(kept: str, rule: Rule, tmp_path: Path) -> None:
    rows = "self.places[:, : ids.size(1)]" if "Parameter" in kept else "self.places[: ids.size(1)]"
    text = program("self.decoder = Decoder()").replace(", self.places = nn.Embedding(words, dim), Places(dim)",
                                                       " = nn.Embedding(words, dim)\n        " + kept)  # fmt: skip
    text = text.replace("self.places(ids)", rows)
    after, report = upgraded(tmp_path, text, rule)
    assert after == text
    assert any(site.status.value == "refused" for site in report.sites), report.sites


def test_layers_that_are_run_in_parts_of_unknown_size_are_seen(tmp_path: Path) -> None:
    by_parts = (
        program("self.decoder = Decoder()", CALL)
        .replace(
            "        x = self.tokens(ids) + self.places(ids)\n        for block in self.blocks:\n            x = block(x)\n",
            "        x = self.tokens(ids) + self.places(ids)\n"
            "        if size is not None:\n"
            "            for start in range(0, len(self.blocks), size):\n"
            "                x = checkpoint(self.part(start, size), x, use_reentrant=False)\n"
            "        else:\n"
            "            for block in self.blocks:\n"
            "                x = block(x)\n",
        )
        .replace(
            "def forward(self, ids):\n        x = self.tokens",
            "def forward(self, ids, size=None):\n        x = self.tokens",
        )
        .replace("    def complete", PART)
        .replace("from torch import nn\n", CHECKPOINT)
    )
    after, report = upgraded(tmp_path, by_parts, Prenorm())
    assert after == by_parts
    assert any("could not be followed" in site.message for site in report.sites)


@pytest.mark.parametrize("rule", [Rope(), Prenorm()], ids=lambda rule: rule.name)
def test_code_that_only_asks_for_parts_does_not_matter(rule: Rule, tmp_path: Path) -> None:
    text = program(EITHER, CALL, COUNT)
    after, _ = upgraded(tmp_path, text, rule)
    if rule.name == "prenorm":
        assert after.count("self.final_norm(x)") == 2
    else:
        assert "rotary" in after
