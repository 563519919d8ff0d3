"""The attention recogniser on small programs."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from modernizer.model_map import read_model
from modernizer.model_map.attention import AttentionSite
from modernizer.project import Project

HEADER = """
import math, torch
from torch import nn
import torch.nn.functional as F
"""


def sites(tmp_path: Path, code: str) -> list[AttentionSite]:
    path = tmp_path / "program.py"
    path.write_text(HEADER + textwrap.dedent(code))
    return list(read_model(Project.open([path])).attentions)


def attention(tmp_path: Path, body: str, arguments: str = "x, mask=None") -> list[AttentionSite]:
    code = """
        class Attention(nn.Module):
            def __init__(self, dim, heads):
                super().__init__()
                self.heads, self.width = heads, dim // heads
                self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
                self.drop = nn.Dropout(0.1)
                self.softmax = nn.Softmax(dim=-1)

            def split(self, x):
                return x.view(x.size(0), -1, self.heads, self.width).transpose(1, 2)

            def forward(self, ARGUMENTS):
        """
    body = textwrap.indent(textwrap.dedent(body), " " * 8)
    return sites(tmp_path, textwrap.dedent(code).replace("ARGUMENTS", arguments) + body)


def test_masked_scores_with_dropout_on_the_weights(tmp_path: Path) -> None:
    [site] = attention(
        tmp_path,
        """
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.width)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return self.drop(self.softmax(scores)) @ v
        """,
    )
    [context] = site.contexts
    assert context.kind == "self"
    assert (context.form, context.key_transposed, context.heads) == ("matmul", True, "axis")
    assert context.softmax_over_keys
    assert [(s.kind, s.conditional) for s in context.steps] == [
        ("div", False),
        ("masked_fill", True),
        ("softmax", False),
        ("dropout", False),
    ]
    assert not context.weights_users


def test_query_and_memory_are_cross_attention(tmp_path: Path) -> None:
    [site] = attention(
        tmp_path,
        """
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(mask)), self.split(self.to_v(mask))
        return torch.softmax(q @ k.mT, dim=3) @ v
        """,
    )
    assert site.kinds == {"cross"}
    assert site.contexts[0].softmax_axis == -1


@pytest.mark.parametrize("scale", ["self.width ** -0.25", "scale", "torch.sigmoid(self.gain)"])
@pytest.mark.parametrize("form", ["q, k = q * scale, k * scale", "q, k = q / scale, scale * k"])
def test_a_factor_that_query_and_key_share_is_no_common_source(tmp_path: Path, scale: str, form: str) -> None:
    """The kind is told by the data that are projected."""
    body = f"""
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(OTHER)), self.split(self.to_v(OTHER))
        scale = {scale}
        {form}
        return F.softmax(q @ k.transpose(-2, -1), dim=-1) @ v
        """
    [cross] = attention(tmp_path, body.replace("OTHER", "memory"), "x, memory, scale=1.0")
    [own] = attention(tmp_path, body.replace("OTHER", "x"), "x, memory, scale=1.0")
    assert [c.kind for c in (*cross.contexts, *own.contexts)] == ["cross", "self"]
    assert cross.contexts[0].query_source is not cross.contexts[0].key_source
    assert own.contexts[0].query_source is own.contexts[0].key_source


def test_einsum_letters_say_which_axis_is_time(tmp_path: Path) -> None:
    [site] = attention(
        tmp_path,
        """
        shape = (x.size(0), x.size(1), self.heads, self.width)
        q, k, v = self.to_q(x).view(*shape), self.to_k(x).view(*shape), self.to_v(x).view(*shape)
        a = torch.einsum("blhe,bshe->bhls", q, k).softmax(dim=-1)
        return torch.einsum("bhls,bshd->blhd", a, v)
        """,
    )
    [context] = site.contexts
    assert context.softmax_over_keys
    assert (context.query_operand.time_axis, context.query_operand.feature_axis) == (-3, -1)
    assert (context.key_operand.time_axis, context.value_operand.time_axis) == (-3, -3)


@pytest.mark.parametrize("axis", [1, 2, -2])
def test_softmax_over_another_axis_than_the_keys_is_told(tmp_path: Path, axis: int) -> None:
    [site] = attention(
        tmp_path,
        f"""
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        return F.softmax(q @ k.transpose(2, 3), dim={axis}) @ v
        """,
    )
    assert not site.contexts[0].softmax_over_keys


def test_weights_that_are_stored_or_used_elsewhere_are_found(tmp_path: Path) -> None:
    [site] = attention(
        tmp_path,
        """
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        a = F.softmax(q @ k.transpose(2, 3), dim=-1)
        return a @ v, a.mean(1)
        """,
    )
    assert [user.op for user in site.contexts[0].weights_users] == ["mean"]


@pytest.mark.parametrize(
    "body",
    [
        "return F.softmax(self.to_q(x), dim=-1)",
        "w = F.softmax(self.to_q(x), dim=1)\nreturn (w.transpose(1, 2) @ x)",
        "return F.softmax(self.to_q(x) @ self.to_k.weight, dim=-1) @ self.to_v.weight",
        "return F.softmax(torch.sigmoid(self.to_q(x) @ x.mT), dim=-1) @ x",
    ],
)
def test_a_softmax_alone_is_no_attention(tmp_path: Path, body: str) -> None:
    assert attention(tmp_path, body) == []


def test_torch_layers_and_sdpa_are_sites_too(tmp_path: Path) -> None:
    found = sites(
        tmp_path,
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.mha = nn.MultiheadAttention(8, 2)
                self.layer = nn.TransformerEncoderLayer(8, 2)

            def forward(self, x, memory):
                x = self.mha(x, memory, memory)[0]
                x = F.scaled_dot_product_attention(x, x, x)
                return self.layer(x)
        """,
    )
    assert [s.contexts[0].form for s in found] == ["mha", "sdpa", "torch_layer"]
    assert [s.kinds for s in found] == [{"cross"}, {"self"}, {"self"}]
