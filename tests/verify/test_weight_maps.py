"""Rewrites that join or fold parameters: verified with the old weights carried over by the map."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from modernizer.cli import main

MODEL = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        h = self.norm1(x)
        scores = self.q(h) @ self.k(h).transpose(-2, -1)
        x = x + self.out(F.softmax(scores, dim=-1) @ self.v(h))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        self.layers = nn.ModuleList([Block(dim) for _ in range(2)])
        self.final = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 11)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x))
"""
HOW = ["--model", "Net()", "--input", "torch.arange(12).view(2, 6) % 11"]


@pytest.mark.parametrize("rules", ["fuseqkv", "rmsnorm", "rmsnorm,fuseqkv"])
def test_exact_rewrites_with_a_map_pass(rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    done = CliRunner().invoke(main, ["apply", "--rule", rules, "--verify", *HOW, "model.py"])
    assert done.exit_code == 0, done.output
    assert "carried over by the weight map" in done.output and "FAILED" not in done.output
    assert Path("model.py").read_text() != MODEL


def test_two_programs_are_compared_by_a_map_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    Path("old.py").write_text(MODEL)
    Path("new.py").write_text(MODEL)
    assert run.invoke(main, ["apply", "--rule", "rmsnorm", "new.py"]).exit_code == 0
    (map_file,) = Path(".modernizer/weights").iterdir()
    command = ["verify", "--before", "old.py", "--after", "new.py", "--effect", "exact", *HOW]
    assert run.invoke(main, [*command, "--map", str(map_file)]).exit_code == 0
    without = run.invoke(main, command)
    assert without.exit_code == 1 and "weights load" in without.output
    assert run.invoke(main, [*command, "--map", os.devnull]).exit_code == 2


def test_a_map_that_says_something_wrong_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    Path("old.py").write_text(MODEL)
    Path("new.py").write_text(MODEL)
    assert run.invoke(main, ["apply", "--rule", "rmsnorm", "new.py"]).exit_code == 0
    (map_file,) = Path(".modernizer/weights").iterdir()
    text = map_file.read_text()
    assert '"old": "embedding.weight"' in text
    wrong = text.replace('"old": "embedding.weight"', '"old": "head.weight"').replace(
        '"new": "embedding.weight"', '"new": "head.weight"'
    )
    map_file.write_text(wrong)
    command = ["verify", "--before", "old.py", "--after", "new.py", "--effect", "exact", "--map", str(map_file), *HOW]
    done = run.invoke(main, command)
    assert done.exit_code == 1 and "FAILED  outputs equal" in done.output
