"""The bridge from old positions to new ones: exact at its start, gone at its end, whatever the positions were."""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.registry import select
from modernizer.vendoring import vendor
from modernizer.weights import bridge
from modernizer.weights.bridging import Bridge, BridgeError, find_places, load_places, save_places

PROGRAM = """
import math

import torch
import torch.nn as nn


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(d, d)
        self.k = nn.Linear(d, d)
        self.v = nn.Linear(d, d)
        self.o = nn.Linear(d, d)

    def split(self, x):
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(torch.ones(x.size(1), x.size(1)).triu(1).bool(), float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.attn = Attention(d, heads)
        self.norm1 = nn.LayerNorm(d)

    def forward(self, x):
        return x + self.attn(self.norm1(x))


class Model(nn.Module):
    def __init__(self, vocab=13, d=16, heads=2, layers=2, longest=24):
        super().__init__()
        self.d = d
        self.embed = nn.Embedding(vocab, d)
        MADE
        self.drop = nn.Dropout(0.1)
        self.layers = nn.ModuleList([Block(d, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        ADDED
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build():
    return Model()
"""
SINUSOID = """angles = torch.arange(longest)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        table = torch.zeros(longest, d)
        table[:, 0::2] = torch.sin(angles)
        table[:, 1::2] = torch.cos(angles)
        self.register_buffer("table", table)"""
FORMS = {
    "learned": ("self.pos = nn.Embedding(longest, d)", "x = self.embed(ids) + self.pos(torch.arange(ids.size(1)))"),
    "parameter": (
        "self.pos = nn.Parameter(torch.randn(1, longest, d))",
        "x = self.drop(self.embed(ids) + self.pos[:, : ids.size(1)])",
    ),
    "sinusoid beside a scaled embedding": (
        SINUSOID,
        "x = self.embed(ids) * math.sqrt(self.d)\n        x = self.drop(x + self.table[: ids.size(1)])",
    ),
    "a norm behind the sum": (
        "self.pos = nn.Embedding(longest, d)\n        self.first = nn.LayerNorm(d)",
        "x = self.first(self.embed(ids) + self.pos(torch.arange(ids.size(1))))",
    ),
}
IDS = torch.arange(30).view(2, 15) % 13


def program(name: str) -> str:
    made, added = FORMS[name]
    return PROGRAM.replace("MADE", made).replace("ADDED", added)


def load(text: str, folder: Path) -> nn.Module:
    module = types.ModuleType("program")
    if (folder / "modernizer_components.py").exists():
        parts = types.ModuleType("modernizer_components")
        exec((folder / "modernizer_components.py").read_text(), parts.__dict__)
        text = text.replace("from modernizer_components import", "from modernizer.components import")
        module.__dict__["parts"] = parts
    exec(compile(text, "program", "exec"), module.__dict__)
    if "parts" in module.__dict__:
        module.__dict__["RotaryEmbedding"] = module.__dict__["parts"].RotaryEmbedding
    torch.manual_seed(0)
    model: nn.Module = module.build().eval()
    return model


def pair(name: str, rule: str, folder: Path, vendored: bool = False) -> tuple[nn.Module, nn.Module]:
    path = folder / "model.py"
    path.write_text(program(name))
    report = pipeline.upgrade([path], select([rule]), {}, steps=[vendor] if vendored else [])
    assert report.written, [site.message for site in report.sites]
    old, new = load(program(name), folder / "nothing"), load(path.read_text(), folder)
    new.load_state_dict(old.state_dict(), strict=False)
    return old, new


def call(model: nn.Module, batch: Any) -> object:
    return model(batch)


def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids)
    return found


@pytest.mark.parametrize("rule", ["rope", "alibi"])
@pytest.mark.parametrize("name", FORMS)
def test_starts_as_the_old_model_and_ends_as_the_new_one(name: str, rule: str, tmp_path: Path) -> None:
    old, new = (model.double() for model in pair(name, rule, tmp_path))
    wanted, end, state = output(old), output(new), {k: v.clone() for k, v in new.state_dict().items()}
    places = find_places(old, new, call, IDS)
    assert torch.equal(output(new), end), "the search has left a trace"
    step = Bridge(new, places, steps=5)
    torch.testing.assert_close(output(new), wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(output(new, IDS[:, :7]), output(old, IDS[:, :7]), rtol=0, atol=1e-9)
    ways = [output(new)] + [output(new) for _ in range(5) if step() > 0]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(ways))
    assert step.strength == 1.0 and torch.equal(output(new), end)
    assert new.state_dict().keys() == state.keys()
    assert all(torch.equal(new.state_dict()[k], v) for k, v in state.items())
    assert not any(module._forward_hooks for module in new.modules())


def test_file_keeps_the_places(tmp_path: Path) -> None:
    old, new = pair("learned", "rope", tmp_path)
    places = find_places(old, new, call, IDS)
    save_places(tmp_path / "x.positions.pt", places)
    (place,) = load_places(tmp_path / "x.positions.pt")
    assert place.name == "embed" and torch.equal(place.table, places[0].table)
    step = bridge(new, tmp_path / "x.positions.pt", steps=2)
    torch.testing.assert_close(output(new), output(old), rtol=0, atol=1e-5)
    step.jump()
    assert step() == 1.0


def test_gradients_flow_and_training_drops_out_as_before(tmp_path: Path) -> None:
    old, new = pair("parameter", "rope", tmp_path)
    step = Bridge(new, find_places(old, new, call, IDS), steps=3)
    for model in (old, new):
        model.train()
    torch.manual_seed(5)
    wanted = old(IDS)
    torch.manual_seed(5)
    found = new(IDS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    step()
    new(IDS).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in new.parameters())


def test_components_that_lie_beside_the_code_count_too(tmp_path: Path) -> None:
    old, new = pair("learned", "rope", tmp_path, vendored=True)
    Bridge(new, find_places(old, new, call, IDS))
    torch.testing.assert_close(output(new), output(old), rtol=0, atol=1e-5)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    old, new = pair("learned", "rope", tmp_path)
    places = find_places(old, new, call, IDS)
    step = Bridge(new, places)
    with pytest.raises(BridgeError, match=r"of 20 steps.*known for 15"):
        new(torch.zeros(1, 20, dtype=torch.long))
    step.jump()
    new(torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(BridgeError, match="at least one step"):
        Bridge(new, places, steps=0)
    with pytest.raises(BridgeError, match="neither rotary"):
        Bridge(old, places)
    with pytest.raises(BridgeError, match="no module `embed`"):
        Bridge(new.get_submodule("layers"), places)
    with pytest.raises(BridgeError, match="no such file"):
        Bridge(new, tmp_path / "none.pt")
    torch.save({"a": 1}, tmp_path / "bad.pt")
    with pytest.raises(BridgeError, match="holds no positions"):
        Bridge(new, tmp_path / "bad.pt")
    with torch.no_grad():
        old.get_parameter("layers.0.attn.q.weight").add_(0.1)
        old.get_parameter("layers.0.norm1.weight").add_(0.1)
    with pytest.raises(BridgeError, match="not by a table"):
        find_places(old, new, call, IDS)
