"""`init` on whole programs: what writes to a stream is scaled, embeddings are drawn anew, all else stays bit for bit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import init_programs as programs
import pytest
import torch
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.components import SubNormLinear
from modernizer.registry import select
from modernizer.report import Report, Status
from tests.programs import PROGRAMS, Program


def build(text: str) -> nn.Module:
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(text, "program", "exec"), scope)
    torch.manual_seed(0)
    made = scope["make" if "make" in scope else "Net"]()
    assert isinstance(made, nn.Module)
    return made


def apply(path: Path, **options: bool) -> Report:
    report = pipeline.upgrade([path], select(["init"]), options)
    assert not report.problems
    return report


def rewritten(folder: Path, text: str, **options: bool) -> str:
    """The text after the rule, which must have done all that it saw, and do nothing when it runs again."""
    path = folder / "model.py"
    path.write_text(text)
    report = apply(path, **options)
    assert [site.status for site in report.sites] == [Status.DONE], [site.message for site in report.sites]
    new = path.read_text()
    assert {site.status for site in apply(path, **options).sites} == {Status.MODERN}
    assert path.read_text() == new
    return new


@pytest.mark.parametrize("name", programs.FORMS)
def test_what_writes_is_scaled_and_nothing_else(name: str, tmp_path: Path) -> None:
    text, groups, embeddings = programs.FORMS[name]
    new = rewritten(tmp_path, text)
    before, after = build(text), build(new)
    old_state, state = before.state_dict(), after.state_dict()
    assert list(old_state) == list(state)
    scale = {weight: len(group) ** -0.5 for group in groups for weight in group}
    for key, value in state.items():
        if key in embeddings:
            assert value.std().item() == pytest.approx(0.02, rel=0.2) and not torch.equal(value, old_state[key])
        elif key in scale:
            torch.testing.assert_close(value, old_state[key] * scale[key])
        else:
            assert torch.equal(value, old_state[key]), key
    ids = torch.randint(50, (2, 6))
    after(ids).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in after.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", programs.REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    text, reason = programs.REFUSED[name]
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path)
    assert path.read_text() == text
    assert {site.status for site in report.sites} == {Status.REFUSED}
    assert any(reason in site.message for site in report.sites), [site.message for site in report.sites]


@pytest.mark.parametrize("name", programs.MODERN)
def test_what_looks_at_depth_already_is_modern(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.MODERN[name])
    assert {site.status for site in apply(path).sites} == {Status.MODERN}
    assert path.read_text() == programs.MODERN[name]


def test_a_root_of_the_width_is_no_look_at_depth(tmp_path: Path) -> None:
    rewritten(tmp_path, programs.NOT_DEPTH)


def test_nothing_to_do_without_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("import torch.nn as nn\n\n\nclass Net(nn.Module):\n    def forward(self, x):\n        return x\n")
    assert apply(path).sites == []


def test_check_looks_for_it_only_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.net())
    named = {site.rule for site in pipeline.check([path], select([]), {}).sites}
    assert named and "init" not in named


def test_a_model_whose_constructor_was_not_named_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(programs.net())
    stack = programs.net(old="class Net(nn.Module)", new="class Stack(nn.Module)")
    (tmp_path / "stack.py").write_text(stack)
    (tmp_path / "model.py").write_text(
        "import torch.nn as nn\nfrom stack import Stack\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.stack = Stack()\n\n    def forward(self, ids):\n        return self.stack(ids)\n"
    )
    apply(tmp_path / "model.py")
    assert (tmp_path / "stack.py").read_text() == stack
    assert "layer.attention.o, layer.ff[2]" in (tmp_path / "model.py").read_text()
    assert "for layer in self.stack.layers" in (tmp_path / "model.py").read_text()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_shipped_programs_are_built_and_run(program: Program, tmp_path: Path) -> None:
    """Every weight keeps its shape; each that differs is a multiple of what it was, or an embedding."""
    copy = program.copy(tmp_path / "new")
    report = pipeline.upgrade(copy.targets, select(["init"]), {})
    assert not report.problems and {s.status for s in report.sites} <= {Status.DONE, Status.MODERN}
    states: list[dict[str, Tensor]] = []
    for one in (program, copy):
        with one.case() as case:
            model = case.build()
            assert case.call(model, case.inputs()).isfinite().all()
            states.append({k: v.clone() for k, v in model.state_dict().items()})
            tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    changed = [k for k in states[0] if not torch.equal(states[0][k], states[1][k]) and k not in tables]
    for key in changed:
        ratio = states[1][key][states[0][key] != 0] / states[0][key][states[0][key] != 0]
        if key in ("head.weight",) or ratio.std() > 1e-3:  # tied to an embedding
            assert any(torch.equal(states[1][key], states[1][t]) for t in tables), key
        else:
            assert 1 / ratio.mean().item() ** 2 == pytest.approx(round(1 / ratio.mean().item() ** 2), rel=1e-3)
    assert not report.sites or report.sites[0].status is Status.MODERN or changed


@pytest.mark.parametrize("name", programs.MAGNETO)
def test_magneto_norms_what_writes_and_draws_by_depth(name: str, tmp_path: Path) -> None:
    new = rewritten(tmp_path, programs.MAGNETO[name].replace("dim=8", "dim=96"), magneto=True)
    net = build(new)
    parts = dict(net.named_modules())
    normed = {name for name, module in parts.items() if isinstance(module, SubNormLinear)}
    assert normed == {name for i in range(3) for name in (f"layers.{i}.attention.o", f"layers.{i}.ff.2")}
    for i in range(3):
        gains = {"o": 6, "v": 6, "q": math.e, "k": math.e}
        shapes = {f"layers.{i}.attention.{one}": n for one, n in gains.items()} | {
            f"layers.{i}.ff.{j}": 6 for j in (0, 2)
        }
        for key, depth in shapes.items():
            weight = net.state_dict()[f"{key}.weight"]
            wanted = math.sqrt(math.log(depth) * 2 / sum(weight.shape))
            assert weight.std().item() == pytest.approx(wanted, rel=0.05), key
    assert net.state_dict()["embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    net(torch.randint(50, (2, 6))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", programs.NOT_MAGNETO)
def test_magneto_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    text, reason = programs.NOT_MAGNETO[name]
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path, magneto=True)
    assert path.read_text() == text
    assert {site.status for site in report.sites} == {Status.REFUSED}
    assert all(re.search(reason, site.message) for site in report.sites), [site.message for site in report.sites]
