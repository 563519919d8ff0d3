"""The rule sdpa: programs are rewritten, run before and after in float64, and compared with their gradients."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import PROGRAMS, Program

from codemods.sdpa import Sdpa
from modernizer.pipeline import upgrade
from modernizer.report import Report, Status

HEADER = """
import math
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
"""

MODEL = """
class Attention(nn.Module):
    def __init__(self, dim=12, heads=3, v_width=5, p=0.0):
        super().__init__()
        self.heads, self.width, self.v_width = heads, dim // heads, v_width
        self.scale = self.width ** -0.5
        self.temperature = nn.Parameter(torch.ones(1) * 1.7)
        self.to_q, self.to_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_v, self.out = nn.Linear(dim, heads * v_width), nn.Linear(heads * v_width, dim)
        self.bias = nn.Parameter(torch.randn(heads, 6, 6))
        self.drop, self.p = nn.Dropout(p), p
        self.softmax = nn.Softmax(dim=-1)
        self.register_buffer("tril", torch.tril(torch.ones(9, 9)))

    def split(self, x, width):
        return x.view(x.size(0), -1, self.heads, width).transpose(1, 2)

    def merge(self, x):
        return self.out(x.transpose(1, 2).reshape(x.size(0), -1, self.heads * self.v_width))

    def forward(self, x, mask=None, other=None):
        B, T, C = x.shape
        q, k, v = self.split(self.to_q(x), self.width), self.split(self.to_k(x), self.width), self.split(self.to_v(x), self.v_width)
BODY

class Model(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.attention = Attention(p=p)

    def forward(self, x, mask=None, other=None):
        return self.attention(x, mask, other)
"""


def program(body: str) -> str:
    return HEADER + MODEL.replace("BODY", textwrap.indent(textwrap.dedent(body).strip("\n"), " " * 8))


def run_rule(tmp_path: Path, code: str) -> tuple[str, Report]:
    path = tmp_path / "program.py"
    path.write_text(code)
    report = upgrade([path], [Sdpa()], {})
    assert not report.problems, report.problems
    new = path.read_text()
    again = upgrade([path], [Sdpa()], {})
    assert path.read_text() == new, "a second run changes the file again"
    assert not [s for s in again.sites if s.status is Status.DONE]
    return new, report


def load(code: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(code, "program.py", "exec"), scope)
    return scope


def measure(code: str, *inputs: torch.Tensor | None, train: bool = False) -> list[torch.Tensor]:
    """Output and the gradients of input and parameters, in float64."""
    torch.manual_seed(0)
    model = load(code)["Model"]().double().train(train)
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    out = model(x, *inputs)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = [x, *(p for p in model.parameters())]
    grads = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    return [out, *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True))]


def assert_same(old: str, new: str, *inputs: torch.Tensor | None) -> None:
    for train in (False, True):
        for a, b in zip(measure(old, *inputs, train=train), measure(new, *inputs, train=train), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def is_upgraded(new: str) -> bool:
    return "scaled_dot_product_attention(" in new or "masked_attention(" in new


PADDING = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])[:, None, None, :]  # nothing to attend to in the second
CAUSAL = torch.ones(6, 6).tril()[None, None]
FORMS = {
    "plain": ("return self.merge(F.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.width), dim=-1) @ v)", []),
    "no scale": ("return self.merge(torch.softmax(q @ k.mT, -1) @ v)", []),
    "scale of the whole width": (
        "s = torch.matmul(q, k.permute(0, 1, 3, 2)) * (C ** -0.5)\nreturn self.merge(self.softmax(s).matmul(v))", [],
    ),
    "scale on both": (
        "q = q * self.width ** -0.25\nk = k * self.width ** -0.25\nreturn self.merge((q @ k.transpose(2, 3)).softmax(3) @ v)",
        [],
    ),
    "learned temperature": (
        "s = (q @ k.transpose(-2, -1)) / self.temperature\nreturn self.merge(self.drop(s.softmax(-1)) @ v)", [],
    ),
    "scale inside the query": ("return self.merge(F.softmax((q / self.width ** 0.5) @ k.transpose(-1, -2), -1) @ v)", []),
    "two scales": ("s = (q * self.scale) @ k.transpose(-2, -1) * 0.5 / 3\nreturn self.merge(s.softmax(dim=-1) @ v)", []),
    "mask equal zero": (
        """
        scores = torch.matmul(q, k.transpose(-2, -1)) / np.sqrt(self.width)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        attn = self.drop(F.softmax(scores, dim=-1))
        out = torch.matmul(attn, v)
        return self.merge(out)
        """,
        [None, PADDING, CAUSAL],
    ),
    "mask in place": (
        """
        scores = torch.matmul(q, k.transpose(-2, -1))
        scores.div_(math.sqrt(self.width))
        if mask is not None:
            scores.masked_fill_(mask.eq(0), -1e20)
        return self.merge(torch.matmul(F.dropout(F.softmax(scores, dim=-1), p=self.p, training=self.training), v))
        """,
        [None, PADDING, CAUSAL],
    ),
    "mask true blocks": (
        "s = (q @ k.mT * self.scale).masked_fill(mask, float('-inf'))\nreturn self.merge(s.softmax(-1) @ v)", [CAUSAL == 0],
    ),
    "mask true blocks, finite": (
        "s = (q @ k.mT * self.scale).masked_fill(mask, torch.finfo(q.dtype).min)\nreturn self.merge(s.softmax(-1) @ v)",
        [CAUSAL == 0, PADDING == 0],
    ),
    "mask inverted": (
        "s = (q @ k.mT * self.scale).masked_fill(~mask, -np.inf)\nreturn self.merge(s.softmax(-1) @ v)", [CAUSAL == 1],
    ),
    "where": (
        "s = q @ k.mT * self.scale\ns = torch.where(mask > 0, s, torch.tensor(-1e9, dtype=s.dtype))\n"
        "return self.merge(s.softmax(-1) @ v)",
        [CAUSAL, PADDING],
    ),
    "causal buffer": (
        """
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.tril[:T, :T] == 0, float('-inf'))
        att = F.softmax(att, dim=-1)
        att = self.drop(att)
        y = att @ v
        return self.merge(y)
        """,
        [None],
    ),
    "causal and padding": (
        """
        s = q @ k.transpose(-2, -1) * self.scale
        s = s.masked_fill(self.tril[:T, :T] == 0, -1e9)
        if mask is not None:
            s = s.masked_fill(mask == 0, -1e9)
        return self.merge(F.softmax(s, dim=-1) @ v)
        """,
        [None, PADDING],
    ),
    "two optional masks": (
        """
        s = q @ k.transpose(-2, -1) * self.scale
        if mask is not None:
            s = s.masked_fill(mask == 0, -1e9)
        if other is not None:
            s = s.masked_fill(other == 0, -1e9)
        return self.merge(F.softmax(s, dim=-1) @ v)
        """,
        [None, PADDING],
    ),
    "mask or causal": (
        """
        s = q @ k.transpose(-2, -1) * self.scale
        if mask is not None:
            s = s.masked_fill(mask == 0, float("-inf"))
        else:
            s = s.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.merge(F.softmax(s, dim=-1) @ v)
        """,
        [None, CAUSAL],
    ),
    "additive": (
        "s = q @ k.mT / math.sqrt(self.width) + (1.0 - mask) * -10000.0\nreturn self.merge(s.softmax(-1) @ v)", [CAUSAL],
    ),
    "additive, of any type": (
        "s = q @ k.mT * self.scale\nif mask is not None:\n    s = s + mask\nreturn self.merge(s.softmax(-1) @ v)",
        [None, CAUSAL, CAUSAL == 0, PADDING, torch.zeros(6, 6).masked_fill(CAUSAL[0, 0] == 0, float("-inf"))],
    ),
    "additive before the scale": (
        "s = (q @ k.mT + self.bias) / math.sqrt(self.width)\nreturn self.merge(s.softmax(-1) @ v)", [None],
    ),
    "subtracted": (
        "s = q @ k.mT * self.scale\ns -= 10000.0 * (1.0 - mask)\nreturn self.merge(s.softmax(-1) @ v)", [CAUSAL],
    ),
    "learned bias and mask": (
        """
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
        s = s + self.bias.unsqueeze(0)
        s = s.masked_fill(mask == 0, -1e9)
        return self.merge(torch.einsum("bhqk,bhkd->bhqd", s.softmax(-1), v))
        """,
        [CAUSAL, PADDING],
    ),
    "gpt-2": (
        """
        w = torch.matmul(q, k.mT)
        if self.scale:
            w = w / math.sqrt(v.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        b = self.tril[ns - nd:ns, :ns]
        w = w * b - 1e10 * (1 - b)
        w = nn.Softmax(dim=-1)(w)
        return self.merge(torch.matmul(w, v))
        """,
        [None],
    ),
    "conditional expression": (
        "s = q @ k.mT * self.scale\ns = s.masked_fill(mask == 0, -1e9) if mask is not None else s\n"
        "return self.merge(s.softmax(-1) @ v)",
        [None, CAUSAL, PADDING],
    ),
    "zeroed afterwards": (
        """
        s = q @ k.mT * self.scale
        if mask is not None:
            s = s.masked_fill(mask == 0, -1e9)
            attn = F.softmax(s, dim=-1).masked_fill(mask == 0, 0.0)
        else:
            attn = F.softmax(s, dim=-1)
        return self.merge(attn @ v)
        """,
        None,
    ),
    "zeroed afterwards, straight": (
        "s = (q @ k.mT * self.scale).masked_fill(mask == 0, -1e9)\n"
        "return self.merge(F.softmax(s, dim=-1).masked_fill(mask == 0, 0) @ v)",
        [CAUSAL, PADDING],
    ),
    "dropout on the output": ("return self.merge(self.drop(F.softmax(q @ k.mT * self.scale, -1) @ v))", [None]),
    "heads in the batch": (
        """
        q, k, v = (t.reshape(B * self.heads, T, -1) for t in (q, k, v))
        s = torch.bmm(q, k.transpose(1, 2)) * self.scale
        s = s.masked_fill(mask.expand(B, self.heads, T, T).reshape(-1, T, T) == 0, -1e9)
        x = torch.bmm(F.softmax(s, dim=2), v)
        return self.merge(x.view(B, self.heads, T, -1))
        """,
        [CAUSAL, PADDING],
    ),
    "einsum, heads last but one": (
        """
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        a = torch.einsum("bqhd,bkhd->bhqk", q, k).div(self.width ** 0.5)
        a = self.drop(torch.softmax(a, dim=-1))
        x = torch.einsum("bhqk,bkhd->bqhd", a, v)
        return self.out(x.reshape(B, T, -1))
        """,
        [None],
    ),
    "einsum, other letters and order": (
        """
        a = torch.einsum("nhsd,nhtd->nhts", k, q) * self.scale
        a = a.softmax(dim=3)
        y = torch.einsum("zhij,zhjc->zihc", a, v).flatten(2)
        return self.out(y)
        """,
        [None],
    ),
    "einsum with heads at the end": (
        """
        q, k, v = (t.permute(0, 2, 3, 1) for t in (q, k, v))
        a = torch.einsum("ltdh,lsdh->lhts", q, k) * self.scale
        y = torch.einsum("lhts,lsdh->lthd", a.softmax(-1), v)
        return self.out(y.reshape(B, T, -1))
        """,
        [None],
    ),
    "key transposed before": (
        """
        k = k.permute(0, 1, 3, 2)
        w = torch.matmul(q, k)
        w = w / math.sqrt(self.width)
        return self.merge(torch.matmul(F.softmax(w, dim=-1), v))
        """,
        [None],
    ),
    "key transposed under a new name": (
        "k_t = k.transpose(2, 3)\nreturn self.merge(F.softmax((q @ k_t) * self.scale, dim=-1) @ v)", [None],
    ),
    "names bound again in between": (
        """
        s = q @ k.mT * self.scale
        q = v + 1
        k = None
        s = s.masked_fill(mask == 0, -1e9)
        mask = None
        return self.merge(s.softmax(-1) @ (v + q))
        """,
        [CAUSAL, PADDING],
    ),
    "merged without transposing back": (
        "x = F.softmax(q @ k.mT * self.scale, dim=-1) @ v\nreturn self.out(x.reshape(B, T, -1))", [None],
    ),
    "shape check": (
        """
        s = q @ k.mT * self.scale
        if s.size() != (B, self.heads, T, T):
            raise ValueError("size")
        assert s.shape[-1] == T
        s = s + mask.to(s.dtype)
        return self.merge(torch.matmul(s.softmax(-1), v))
        """,
        [CAUSAL],
    ),
    "made like the scores": (
        "s = q @ k.mT * self.scale\ns += (mask == 0).type_as(s) * s.new_tensor(-1e4)\nreturn self.merge(s.softmax(-1) @ v)",
        [CAUSAL, PADDING],
    ),
    "expand_as": (
        "s = q @ k.mT * self.scale\ns = s.masked_fill((mask == 0).expand_as(s), -1e9)\nreturn self.merge(s.softmax(-1) @ v)",
        [CAUSAL, PADDING],
    ),
    "one line": (
        "return self.merge(self.drop(((q @ k.mT) / math.sqrt(q.shape[-1])).masked_fill(mask == 0, -1e9).softmax(-1)) @ v)",
        [CAUSAL, PADDING],
    ),
    "baddbmm": (
        """
        q, k, v = (t.reshape(B * self.heads, T, -1) for t in (q, k, v))
        s = torch.baddbmm(torch.zeros(B * self.heads, T, T, dtype=q.dtype), q, k.transpose(1, 2), beta=0, alpha=self.scale)
        return self.merge(torch.bmm(s.softmax(-1), v).view(B, self.heads, T, -1))
        """,
        [None],
    ),
    "lambda": (
        "f = lambda a, b, c: F.softmax(a @ b.transpose(-2, -1) * self.scale, dim=-1) @ c\nreturn self.merge(f(q, k, v))",
        [None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, (_, inputs) in FORMS.items() if inputs is not None])
def test_form_is_rewritten_exactly(tmp_path: Path, name: str) -> None:
    body, inputs = FORMS[name]
    old = program(body)
    new, report = run_rule(tmp_path, old)
    assert is_upgraded(new), [s.message for s in report.sites]
    assert "softmax(" not in new.replace("self.softmax =", "").replace("nn.Softmax", "")
    for mask in inputs or [None]:
        assert_same(old, new, mask)


REFUSED = {
    "softmax over the queries": ("return self.merge(F.softmax(q @ k.mT * self.scale, dim=2) @ v)", "axis"),
    "softmax over the heads": ("return self.merge(F.softmax(q @ k.mT * self.scale, dim=1) @ v)", "axis"),
    "softmax without a dim": ("return self.merge(F.softmax(q @ k.mT * self.scale) @ v)", "axis"),
    "a fill that masks nothing": (
        "s = (q @ k.mT).masked_fill(mask == 0, -1e-9)\nreturn self.merge(s.softmax(-1) @ v)", "does not mask",
    ),
    "multiplied by a mask": ("s = q @ k.mT * mask\nreturn self.merge(s.softmax(-1) @ v)", "not known to be a number"),
    "mask arithmetic with an unknown mask": (
        "s = q @ k.mT * mask - 1e10 * (1 - mask)\nreturn self.merge(s.softmax(-1) @ v)", "not known to be a number",
    ),
    "talking heads": (
        "a = F.softmax(q @ k.mT, dim=-1)\na = self.talk(a)\nreturn self.merge(a @ v)", "conv2d",
    ),
    "renormalised": (
        "a = F.softmax(q @ k.mT, dim=-1)\na = a / a.sum(-1, keepdim=True)\nreturn self.merge(a @ v)", "combined",
    ),
    "multiplied afterwards": ("a = F.softmax(q @ k.mT, dim=-1) * mask\nreturn self.merge(a @ v)", "changed between"),
    "capped": ("s = torch.clamp(q @ k.mT, -5, 5)\nreturn self.merge(s.softmax(-1) @ v)", "clamp"),
    "weights used": (
        "a = F.softmax(q @ k.mT, dim=-1)\nx = self.merge(a @ v)\nreturn x + a.mean()", "inside something else",
    ),
    "weights always returned": ("a = F.softmax(q @ k.mT, dim=-1)\nreturn self.merge(a @ v), a", "returned"),
    "dropout before the softmax": ("s = self.drop(q @ k.mT)\nreturn self.merge(s.softmax(-1) @ v)", "before the softmax"),
    "added after the mask": (
        "s = (q @ k.mT).masked_fill(mask == 0, -1e9) + self.bias\nreturn self.merge(s.softmax(-1) @ v)", "after they are",
    ),
    "two fills": (
        "s = (q @ k.mT).masked_fill(mask == 0, -1e9).masked_fill(other == 0, float('-inf'))\n"
        "return self.merge(s.softmax(-1) @ v)",
        "different fills",
    ),
    "element by element": (
        "s = q @ k.mT\nfor i in range(T):\n    s[:, :, i, i + 1:] = -1e9\nreturn self.merge(s.softmax(-1) @ v)", "loop|element",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_what_was_seen(tmp_path: Path, name: str) -> None:
    body, reason = REFUSED[name]
    old = program(body).replace("self.softmax =", "self.talk = nn.Conv2d(3, 3, 1)\n        self.softmax =", 1)
    new, report = run_rule(tmp_path, old)
    assert new == old
    [site] = report.sites
    assert site.status is Status.REFUSED
    assert re.search(reason, site.message), site.message


def fixture_output(program: Program) -> torch.Tensor:
    with program.case() as case:
        return case.call(case.build().double(), tuple(
            t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in case.inputs()
        ))  # fmt: skip


@pytest.mark.parametrize("fixture", PROGRAMS, ids=lambda p: p.name)
def test_fixture_is_rewritten_exactly_or_left_alone(tmp_path: Path, fixture: Program) -> None:
    copy = fixture.copy(tmp_path)
    texts = {path: path.read_bytes() for path in copy.folder.rglob("*.py")}
    report = upgrade(copy.targets, [Sdpa()], {})
    assert not report.problems
    with fixture.case() as case:
        expected = case.EXPECTED["sdpa"]
    if expected != "apply":
        assert {path: path.read_bytes() for path in texts} == texts
        return
    assert {site.status for site in report.sites} <= {Status.DONE, Status.MODERN}
    assert Status.DONE in {site.status for site in report.sites}
    torch.testing.assert_close(fixture_output(copy), fixture_output(fixture), rtol=0, atol=1e-12)


OPTIONS = """
class Attention(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        scores = torch.bmm(self.q(x), self.k(x).transpose(1, 2)) / self.temperature
        return torch.bmm(F.softmax(scores, dim=2), self.v(x))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(np.power(config["attention"]["width"] // config["attention"]["heads"], 0.5))

    def forward(self, x):
        return self.attention(x)
"""


def test_an_option_within_options_is_a_number(tmp_path: Path) -> None:
    old = HEADER + OPTIONS
    new, report = run_rule(tmp_path, old)
    assert is_upgraded(new), [s.message for s in report.sites]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    results = []
    for code in (old, new):
        torch.manual_seed(0)
        results.append(load(code)["Model"]({"attention": {"width": 12, "heads": 3}}).double()(x))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


LAYER = """
class MultiHead(nn.Module):
    def __init__(self, heads=3, dim=12):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.drop = nn.Dropout(0.0)

    def forward(self, x, memory, mask=None, head_mask=None, flag=False):
        B = x.size(0)
        q, k, v = (f(t).view(B, -1, self.heads, self.width).transpose(1, 2)
                   for f, t in ((self.q, x), (self.k, memory), (self.v, memory)))
        weights = torch.matmul(q, k.transpose(-1, -2)) / self.width ** 0.5
        if mask is not None:
            weights = weights.masked_fill(mask == 0, -1e9)
        weights = self.drop(F.softmax(weights, dim=-1))
        if head_mask is not None:
            weights = weights * head_mask
        out = self.o(torch.matmul(weights, v).transpose(1, 2).reshape(B, -1, self.heads * self.width))
        RETURN


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MultiHead()

    def forward(self, x, memory, mask=None):
        CALL


class Model(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(2)])

    def forward(self, x, mask=None, with_weights=False):
        kept = []
        for layer in self.layers:
            FOLD
        END
"""


def layered(
    returned: str,
    call: str = "return x + self.attention(x, memory, mask)",
    fold: str = "x = layer(x, x, mask)",
    end: str = "return x",
) -> str:
    indent = "\n" + " " * 8
    texts = {"RETURN": returned, "CALL": call, "FOLD": fold, "END": end}
    code = LAYER
    for name, text in texts.items():
        inner = indent + "    " if name == "FOLD" else indent
        code = code.replace(name, text.replace("\n", inner))
    return HEADER + code


SOFTMAX = "weights = self.drop(F.softmax(weights, dim=-1))"
CHOSEN = "weights = F.softmax(weights, dim=-1)\n        shown = weights if flag else None\n        weights = self.drop(weights)"

WEIGHTS = {
    "dropped by the caller": layered("return out, weights", "y, _ = self.attention(x, memory, mask)\nreturn x + y"),
    "never taken": layered("return out, weights", "return x + self.attention(x, memory, mask)[0]"),
    "a name for both": layered("return out, weights", "both = self.attention(x, memory, mask)\nreturn x + both[0]"),
    "inside a lambda": layered(
        "return out, weights", "f = lambda t: self.attention(t, memory, mask)[0]\nreturn x + f(x)"
    ),
    "asked for by a flag": layered("if flag:\n    return out, weights\nreturn out"),
    "one tuple or another": layered(
        "return (out, weights) if flag else (out,)", "return x + self.attention(x, memory, mask)[0]"
    ),
    "kept": layered("self.seen = weights\nreturn out"),
    "a copy kept": layered("self.seen = weights.detach().mean(1)\nreturn out"),
    "kept by the caller": layered(
        "return out, weights", "y, self.seen = self.attention(x, memory, mask)\nreturn x + y"
    ),
    "chosen by a flag between the products": layered(
        "return out, shown", "y, _ = self.attention(x, memory, mask)\nreturn x + y"
    ).replace(SOFTMAX, CHOSEN),
    "their mean returned": layered(
        "mean = weights.mean(1)\nreturn out, mean", "y, _ = self.attention(x, memory, mask)\nreturn x + y"
    ),
    "handed up, asked for by a flag": layered(
        "return out, weights",
        "y, w = self.attention(x, memory, mask)\nreturn x + y, w",
        "x, w = layer(x, x, mask)\nif with_weights:\n    kept.append(w)",
        "return (x, kept) if with_weights else x",
    ),
    "collected and dropped": layered(
        "return out, weights",
        "y, w = self.attention(x, memory, mask)\nreturn x + y, w",
        "x, w = layer(x, x, mask)\nkept.append(w)",
    ),
}


def recorded(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of SDPA from here on."""
    seen: list[dict[str, Any]] = []
    real = F.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs)
        return real(*args, **kwargs)

    patch.setattr(F, "scaled_dot_product_attention", record)
    return seen


def calls(code: str, monkeypatch: pytest.MonkeyPatch, **further: object) -> tuple[int, Any, Any]:
    """How often the model calls SDPA, what it returns, and the model."""
    torch.manual_seed(0)
    model = load(code)["Model"]().double().eval()
    with monkeypatch.context() as patch:
        seen = recorded(patch)
        result = model(torch.randn(2, 6, 12, dtype=torch.float64), CAUSAL, **further)
    return len(seen), result, model


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_computed_only_where_they_are_asked_for(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = WEIGHTS[name]
    new, report = run_rule(tmp_path, old)
    assert is_upgraded(new), [s.message for s in report.sites]
    for mask in (None, PADDING, CAUSAL):
        assert_same(old, new, mask)
    assert calls(new, monkeypatch)[0] == 2


def test_weights_that_a_flag_asks_for_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = WEIGHTS["handed up, asked for by a flag"]
    new, _ = run_rule(tmp_path, old)
    count, (out, kept), _ = calls(new, monkeypatch, with_weights=True)
    _, (old_out, old_kept), _ = calls(old, monkeypatch, with_weights=True)
    assert count == 0
    torch.testing.assert_close([out, *kept], [old_out, *old_kept], rtol=0, atol=0)


def test_weights_chosen_between_the_products_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = WEIGHTS["chosen by a flag between the products"]
    new, _ = run_rule(tmp_path, old)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    for flag in (False, True):
        before, after = (calls(code, monkeypatch)[2].layers[0].attention(x, x, flag=flag) for code in (old, new))
        assert (after[1] is None) == (not flag)
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-12)
        if flag:
            torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dropped by the caller", "never taken", "asked for by a flag", "a name for both"])
def test_a_direct_call_gives_what_it_gave(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new, _ = run_rule(tmp_path, WEIGHTS[name])
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    further = {"flag": True} if "flag" in name else {}
    for given in ({}, {"head_mask": torch.tensor([0.0, 2.0, 1.0])[:, None, None]}):
        results = [
            calls(code, monkeypatch)[2].layers[0].attention(x, x, **given, **further) for code in (WEIGHTS[name], new)
        ]
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_kept_weights_come_back_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = WEIGHTS["kept"]
    new, report = run_rule(tmp_path, old)
    assert any("keep_weights" in note for site in report.sites for note in site.notes)
    model, before = calls(new, monkeypatch)[2], calls(old, monkeypatch)[2]
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    for layer in model.layers:
        layer.attention.keep_weights = True
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=0)
    torch.testing.assert_close(model.layers[0].attention.seen, before.layers[0].attention.seen, rtol=0, atol=0)


WANTED = {
    "returned by the model": layered(
        "return out, weights",
        "y, w = self.attention(x, memory, mask)\nreturn x + y, w",
        "x, w = layer(x, x, mask)\nkept.append(w)",
        "return x, kept",
    ),
    "read from the module": layered("self.seen = weights\nreturn out", end="return x + self.layers[0].attention.seen.sum()"),
    "a flag that is always set": layered(
        "if self.width is not None:\n    out = out + weights.mean()\nreturn out"
    ),
    "a flag that every caller sets": layered(
        "return out, shown", "y, w = self.attention(x, memory, mask, flag=True)\nreturn x + y * w.mean()"
    ).replace(SOFTMAX, CHOSEN),
    "a choice between the weights and others": layered(
        "return out", "return x + self.attention(x, memory, mask, flag=True)"
    ).replace(SOFTMAX, CHOSEN.replace("shown = weights if flag else None", "weights = weights if flag else mask")),
    "a loss of them": layered("self.loss = (weights * weights.log()).sum()\nreturn out"),
    "in a dict": layered(
        "return {'out': out, 'weights': weights}", "return x + self.attention(x, memory, mask)['out']"
    ),
    "used by the caller": layered(
        "return out, weights", "y, w = self.attention(x, memory, mask)\nreturn x + y * w.mean()"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_weights_that_are_always_wanted_are_left(tmp_path: Path, name: str) -> None:
    new, report = run_rule(tmp_path, WANTED[name])
    assert new == WANTED[name]
    assert {site.status for site in report.sites} == {Status.REFUSED}


def test_dropout_acts_on_the_weights_in_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = {
        "module": "return self.merge(self.drop(F.softmax(q @ k.mT, -1)) @ v)",
        "function": "return self.merge(F.dropout(F.softmax(q @ k.mT, -1), self.p, self.training) @ v)",
        "optional": "a = F.softmax(q @ k.mT, -1)\nif self.p:\n    a = self.drop(a)\nreturn self.merge(a @ v)",
    }
    for number, body in enumerate(forms.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        new, _ = run_rule(folder, program(body))
        for train, expected in ((True, 0.25), (False, 0.0)):
            with monkeypatch.context() as patch:
                seen = recorded(patch)
                load(new)["Model"](p=0.25).train(train)(torch.randn(2, 6, 12))
            assert [call["dropout_p"] for call in seen] == [expected]


LEFT_ALONE = {
    "a branch with SDPA": (
        "if self.p:\n    return self.merge(F.scaled_dot_product_attention(q, k, v))\n"
        "return self.merge(F.softmax(q @ k.mT * self.scale, -1) @ v)"
    ),
    "SDPA": "return self.merge(F.scaled_dot_product_attention(q, k, v))",
    "a gate": "return self.merge(F.softmax(v, -1) * v)",
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_modern_or_no_attention_is_not_touched(tmp_path: Path, name: str) -> None:
    old = program(LEFT_ALONE[name])
    new, report = run_rule(tmp_path, old)
    assert new == old
    assert {site.status for site in report.sites} <= {Status.MODERN}
