"""The shipped programs through the whole pipeline: every rule alone and the usual four together, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import PROGRAMS, Program, program

from modernizer.pipeline import upgrade
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.weights.apply import carry

RULES = ("rope", "alibi", "prenorm", "swiglu", "sdpa", "fuseqkv")
FOUR = ("rope", "prenorm", "swiglu", "sdpa")


def applied(target: Program, *rules: str) -> Report:
    report = upgrade(target.targets, select(rules), {})
    assert not report.problems
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Behaviour:
    """What a program does: its output, how a later token moves it, and which parameters a loss reaches."""

    def __init__(self, source: Program, state: dict[str, torch.Tensor] | None = None) -> None:
        with source.case() as case:
            self.case = case
            self.model = case.build()
            if state is not None:  # what has another shape now, or is gone, is new
                own = self.model.state_dict()
                known = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
                self.model.load_state_dict(known, strict=False)
            self.output = case.call(self.model, case.inputs())
            self.leak = self._leak(case)
            self.dead = self._dead(case)

    def _leak(self, case: Any) -> float:
        inputs = case.inputs()
        tokens = inputs[case.causal_input]
        changed = tokens.clone()
        changed.narrow(case.time_dim, -1, 1).copy_(tokens.narrow(case.time_dim, -1, 1) % 7 + 1)
        others = tuple(changed if i == case.causal_input else value for i, value in enumerate(inputs))
        moved = (self.output - case.call(self.model, others)).detach().abs()
        return float(moved.narrow(case.time_dim, 0, moved.shape[case.time_dim] - 1).max())

    def _dead(self, case: Any) -> set[str]:
        self.model.zero_grad(set_to_none=True)
        output = case.call(self.model, case.inputs())
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        named = self.model.named_parameters()
        return {name for name, p in named if p.grad is None or not p.grad.abs().max() > 0}

    def calls(self, operation: str) -> int:
        """How often a function of torch.nn.functional is called in one pass."""
        original, count = getattr(F, operation), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(*args, **kwargs)

        setattr(F, operation, counted)
        try:
            self.case.call(self.model, self.case.inputs())
        finally:
            setattr(F, operation, original)
        return count

    def modules(self, word: str) -> int:
        return sum(word in type(m).__name__.lower() for m in self.model.modules())


def check_works(before: Behaviour, after: Behaviour) -> None:
    """What must hold after any rewrite."""
    assert after.output.shape == before.output.shape
    assert torch.isfinite(after.output).all()
    assert after.dead <= before.dead
    assert (after.leak == 0) == (before.leak == 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("original", PROGRAMS, ids=lambda p: p.name)
def test_each_rule_does_what_is_expected_of_it(tmp_path: Path, original: Program, rule: str) -> None:
    target, old = original.copy(tmp_path), contents(original.folder)
    report = applied(target, rule)
    statuses = {site.status for site in report.sites}
    with original.case() as case:
        expected = case.EXPECTED[rule]
    if expected != "apply":
        assert contents(target.folder) == old
        assert statuses <= {Status.MODERN}
        return
    assert Status.DONE in statuses and Status.REFUSED not in statuses
    before = Behaviour(original)
    state = before.model.state_dict()
    after = Behaviour(target, carry(report.weights, state).state if report.weights else state)
    check_works(before, after)
    check_rule(rule, before, after)
    done = contents(target.folder)
    applied(target, rule)
    assert contents(target.folder) == done


def check_rule(rule: str, before: Behaviour, after: Behaviour) -> None:
    """The rule's own property."""
    if rule in ("rope", "alibi"):
        assert after.modules("rotary" if rule == "rope" else "alibi") > 0
    elif rule == "swiglu":
        assert after.calls("silu") >= before.calls("silu") + 1
        old, new = (sum(p.numel() for p in b.model.parameters()) for b in (before, after))
        assert abs(new - old) < 0.15 * old  # these models are tiny: the width is rounded up to a multiple of 8
    elif rule == "fuseqkv":
        assert torch.allclose(after.output, before.output, rtol=0, atol=1e-5)
        layers = [sum(1 for _ in b.model.parameters()) for b in (before, after)]
        assert layers[1] < layers[0]
    elif rule == "sdpa":
        assert after.calls("scaled_dot_product_attention") > before.calls("scaled_dot_product_attention")
        assert torch.allclose(after.output, before.output, rtol=0, atol=1e-5)
    else:
        assert set(before.model.state_dict()) <= set(after.model.state_dict())


@pytest.mark.parametrize("order", [("sdpa", "fuseqkv"), ("fuseqkv", "sdpa")], ids=",".join)
@pytest.mark.parametrize("original", PROGRAMS, ids=lambda p: p.name)
def test_the_exact_rules_together_keep_what_a_model_puts_out(
    tmp_path: Path, original: Program, order: tuple[str, ...]
) -> None:
    target = original.copy(tmp_path)
    report = applied(target, *order)
    assert Status.REFUSED not in {site.status for site in report.sites}
    before = Behaviour(original)
    state = before.model.state_dict()
    after = Behaviour(target, carry(report.weights, state).state if report.weights else state)
    check_works(before, after)
    assert torch.allclose(after.output, before.output, rtol=0, atol=1e-5)
    done = contents(target.folder)
    applied(target, *order)
    assert contents(target.folder) == done


@pytest.mark.parametrize("order", [FOUR, FOUR[::-1], (*FOUR, "fuseqkv")], ids=",".join)
@pytest.mark.parametrize("original", PROGRAMS, ids=lambda p: p.name)
def test_the_four_together_in_any_order(tmp_path: Path, original: Program, order: tuple[str, ...]) -> None:
    target = original.copy(tmp_path)
    report = applied(target, *order)
    assert Status.REFUSED not in {site.status for site in report.sites}
    before = Behaviour(original)
    check_works(before, Behaviour(target))
    done = contents(target.folder)
    applied(target, *order)
    assert contents(target.folder) == done


def test_line_endings_encoding_and_other_files_stay(tmp_path: Path) -> None:
    target = program("char_gpt").copy(tmp_path)
    others = {name: data for name, data in contents(target.folder).items() if name != "char_gpt.py"}
    applied(target, *FOUR)
    data = (target.folder / "char_gpt.py").read_bytes()
    assert data.count(b"\n") == data.count(b"\r\n") > 100
    assert {name: data for name, data in contents(target.folder).items() if name != "char_gpt.py"} == others
    latin = program("torch_layers_lm").copy(tmp_path)
    applied(latin, *FOUR)
    next(latin.folder.glob("torch*.py")).read_bytes().decode("latin-1")


def test_the_attention_free_part_keeps_its_positions(tmp_path: Path) -> None:
    original = program("latent_drift_trajectory")
    target = original.copy(tmp_path)
    report = applied(target, *FOUR)
    assert [site.rule for site in report.sites if site.status is Status.MODERN] == ["prenorm"]
    before = Behaviour(original)
    after = Behaviour(target, {k: v for k, v in before.model.state_dict().items() if k.startswith("predictor.")})
    assert torch.equal(after.case.predict(after.model, ()), before.case.predict(before.model, ()))
