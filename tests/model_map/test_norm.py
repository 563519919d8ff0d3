"""Norms are known by what they compute: formulas that are one, and formulas that only look like one."""

from __future__ import annotations

from pathlib import Path

import pytest

from modernizer.model_map import read_model
from modernizer.model_map.norm import Norm
from modernizer.project import Project

MODEL = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class Norm(nn.Module):
    def __init__(self, d, eps=1e-6):
        super().__init__()
        self.g, self.b, self.eps, self.d = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d)), eps, d
        self.inner = nn.LayerNorm(d, eps=1e-8)

    def forward(self, x):
        {body}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = Norm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.norm(x))
"""


def norms(folder: Path, body: str) -> list[Norm]:
    path = folder / "model.py"
    path.write_text(MODEL.format(body=body.replace("\n", "\n        ")))
    return read_model(Project([path])).norms.all


@pytest.mark.parametrize(
    ("body", "kind", "eps"),
    [
        ("return self.g * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + self.eps) + self.b", "layer", 1e-6),
        ("m = x.mean(-1, True)\nv = ((x-m) ** 2).mean(-1, True)\nreturn (x-m) * (v + 1e-5) ** -0.5", "layer", 1e-5),
        ("v, m = torch.var_mean(x, -1, keepdim=True)\nreturn (x - m) / torch.sqrt(v + self.eps)", "layer", 1e-6),
        ("return self.g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)", "rms", 1e-6),
        ("h = x.float()\nh = h * torch.rsqrt((h * h).mean(-1, True) + 1e-6)\nreturn h.to(x.dtype)", "rms", 1e-6),
        ("return F.layer_norm(x, (self.d,), self.g, self.b, 1e-7)", "layer", 1e-7),
        ("return self.inner(x)", "layer", 1e-8),
        ("return self.inner(x.transpose(1, 2)).transpose(1, 2)", "layer", 1e-8),
    ],
)  # fmt: skip
def test_norm_in_any_form(tmp_path: Path, body: str, kind: str, eps: float) -> None:
    (norm,) = norms(tmp_path, body)
    assert (norm.kind, norm.eps) == (kind, eps)
    assert norm.module is not None and norm.module.name == "norm"
    assert norm.call is not None and norm.argument is not None


@pytest.mark.parametrize(
    "body",
    [
        "return x - x.mean(-1, keepdim=True)",
        "return x / x.std(-1, keepdim=True)",
        "return (x - x.mean(-1, keepdim=True)) / 2.0",
        "return x * torch.sigmoid(x)",
        "y = x.roll(1)\nreturn (x - x.mean(-1, True)) / y.std(-1, True)",
        "return (x - x.mean(-1, True)) * x.std(-1, True)",
        "return x + x.std(-1, True)",
    ],
)
def test_what_is_no_norm(tmp_path: Path, body: str) -> None:
    assert norms(tmp_path, body) == []
