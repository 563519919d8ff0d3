"""What is recognised as positions added to a stream, and what is not."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from modernizer.model_map import read_model
from modernizer.model_map.position import PositionSite
from modernizer.project import Project

HEAD = "import math\nimport numpy as np\nimport torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n\n"


def positions(folder: Path, init: str, forward: str, args: str = "ids") -> list[PositionSite]:
    text = HEAD + "class Model(nn.Module):\n    def __init__(self, n, d):\n        super().__init__()\n"
    text += "        self.tokens = nn.Embedding(n, d)\n" + "".join(f"        {line}\n" for line in init.splitlines())
    text += f"    def forward(self, {args}):\n        x = self.tokens(ids)\n"
    text += "".join(f"        {line}\n" for line in forward.splitlines()) + "        return x\n"
    path = folder / "m.py"
    path.write_text(text)
    return list(read_model(Project.open([path])).positions)


LEARNED = "self.places = nn.Embedding(n, d)"
FOUND = {
    "looked_up": (LEARNED, "x = x + self.places(torch.arange(ids.size(1), device=ids.device))", "learned"),
    "one_for_padding": (
        LEARNED,
        "n = torch.arange(ids.size(1)).repeat(len(ids), 1) + 1\nn.masked_fill_(ids.eq(0), 0)\nx = x + self.places(n)",
        "learned",
    ),
    "whole_table": (LEARNED, "x = x + self.places.weight.unsqueeze(0).repeat(ids.size(0), 1, 1)", "learned"),
    "rows_of_a_table": (LEARNED, "x = x + self.places.weight[: ids.size(1)]", "learned"),
    "into_another_tensor": (
        LEARNED,
        "n = ids.new(ids.size(1)).long()\nx = x + self.places(torch.arange(ids.size(1), out=n))",
        "learned",
    ),
    "in_place": (LEARNED, "x += self.places(torch.arange(ids.shape[1]))[None]", "learned"),
    "other_order": (LEARNED, "x = self.places(torch.arange(ids.shape[1]).expand_as(ids)) + x", "learned"),
    "parameter": ("self.places = nn.Parameter(torch.zeros(1, n, d))", "x = x + self.places[:, :x.size(1)]", "learned"),
    "whole_parameter": ("self.places = nn.Parameter(torch.randn(n, d) * 0.02)", "x = x + self.places", "learned"),
    "by_padding": (LEARNED, "x = x + self.places(torch.cumsum(ids.ne(0).int(), 1))", "learned"),
    "masked": (LEARNED, "x = x + self.places(torch.arange(ids.size(1)) * (ids != 0))", "learned"),
    "wave": (
        "self.d = d",
        "t = torch.arange(x.size(1))[:, None] * torch.arange(x.size(2))\nx = x + torch.sin(t / 100)",
        "sinusoid",
    ),
    "buffer": (
        "t = torch.arange(n)[:, None] / 100 ** (torch.arange(d) / d)\nself.register_buffer('pe', t.cos())",
        "x = x * math.sqrt(4) + self.pe[:x.size(1)]",
        "sinusoid",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_positions_are_found(tmp_path: Path, name: str) -> None:
    init, forward, kind = FOUND[name]
    sites = positions(tmp_path, init, forward)
    assert [p.kind for site in sites for p in site.contexts] == [kind]


NOT_FOUND = {
    "a_bias": ("self.bias = nn.Parameter(torch.zeros(d))", "x = x + self.bias", "ids"),
    "kinds_from_the_caller": (LEARNED, "x = x + self.places(kinds)", "ids, kinds"),
    "segments_by_place": (LEARNED, "x = x + self.places((torch.arange(ids.size(1)) > 3).long())", "ids"),
    "segments": (LEARNED, "x = x + self.places(torch.cumsum(ids == 3, 1))", "ids"),
    "noise": ("self.d = d", "x = x + torch.randn(x.shape)", "ids"),
    "a_row_of_an_embedding": (LEARNED, "x = x + self.places.weight[1]", "ids"),
    "a_row_for_all": (LEARNED, "x = x + self.places.weight[1].expand_as(x)", "ids"),
    "a_row_looked_up": (LEARNED, "x = x + self.places.weight.select(0, 1)", "ids"),
    "a_row_of_a_parameter": ("self.rows = nn.Parameter(torch.zeros(n, d))", "x = x + self.rows[1]", "ids"),
    "a_mean_of_rows": (LEARNED, "x = x + self.places.weight.mean(0)", "ids"),
    "a_sum_of_rows": (
        "self.rows = nn.Parameter(torch.zeros(n, d))",
        "x = x + self.rows.sum(dim=0, keepdim=True)",
        "ids",
    ),
    "a_class_token": ("self.cls = nn.Parameter(torch.zeros(1, 1, d))", "x = x + self.cls", "ids"),
    "a_causal_mask": (
        "self.q = nn.Linear(d, d)",
        "s = self.q(x) @ x.transpose(1, 2)\ns = s + torch.full((9, 9), -1e9).triu(1)\nx = s.softmax(-1) @ x",
        "ids",
    ),
    "a_bias_of_scores": (
        "self.q = nn.Linear(d, d)\nself.far = nn.Parameter(torch.randn(n, n))",
        "s = self.q(x) @ x.transpose(1, 2) / 4\ns = s + self.far[:x.size(1), :x.size(1)]\nx = s.softmax(-1) @ x",
        "ids",
    ),
    "a_step_of_diffusion": (
        "self.d = d",
        "w = torch.exp(torch.arange(8.0))\nx = x + torch.sin(step[:, None] * w)[:, None]",
        "ids, step",
    ),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_other_sums_are_no_positions(tmp_path: Path, name: str) -> None:
    init, forward, args = NOT_FOUND[name]
    assert not positions(tmp_path, init, forward, args)


def test_an_optional_argument_that_replaces_positions_is_named(tmp_path: Path) -> None:
    forward = "if where is None:\n    where = torch.arange(ids.size(1))\nx = x + self.places(where)"
    (site,) = positions(tmp_path, LEARNED, forward, "ids, where=None")
    assert [given.name for given in site.contexts[0].given] == ["where"]


def test_a_start_token_is_content_and_sums_with_it_are_residual(tmp_path: Path) -> None:
    forward = """
        start = self.tokens(torch.full((1, 4), 2))
        start = start + self.places(torch.arange(4))
        x = x + start
        """
    [site] = positions(tmp_path, LEARNED, textwrap.dedent(forward).strip())
    assert isinstance(site.node, ast.BinOp)
    assert ast.unparse(site.node) == "start + self.places(torch.arange(4))"
