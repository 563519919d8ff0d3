"""`checkpointing` on whole programs: off they are the old ones bit for bit, on they give the same with layers run twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpointing_programs as programs
import pytest
import torch
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.registry import select
from modernizer.report import Report, Status
from tests.programs import PROGRAMS, Program


def load(text: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(text, "program", "exec"), scope)
    return scope


def build(text: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    made = load(text)["Net"](**arguments).double().train()
    assert isinstance(made, nn.Module)
    return made


def ids() -> Tensor:
    return torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(3))


def step(model: nn.Module) -> list[Tensor]:
    """The output and all gradients of one training step, always with the same random numbers; and the next one."""
    model.zero_grad()
    torch.manual_seed(1)
    output = model(ids())
    after = torch.rand(())
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return [output.detach(), after, *gradients]


def apply(path: Path, *rules: str) -> Report:
    report = pipeline.upgrade([path], select(rules or ["checkpointing"]), {})
    assert not report.problems
    return report


def rewritten(folder: Path, text: str) -> str:
    """The text after the rule, which must have done all that it saw, and do nothing when it runs again."""
    path = folder / "model.py"
    path.write_text(text)
    report = apply(path)
    assert [site.status for site in report.sites] == [Status.DONE], [site.message for site in report.sites]
    new = path.read_text()
    assert {site.status for site in apply(path).sites} == {Status.MODERN}
    assert path.read_text() == new
    return new


def runs_of_attention(model: nn.Module) -> list[int]:
    """Counts how often a softmax's dropout or a torch layer ran: filled while the model does."""
    count = [0]
    for module in model.modules():
        if type(module).__name__ in ("Attention", "TransformerEncoderLayer"):
            module.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


@pytest.mark.parametrize("name", programs.FORMS)
def test_form_is_exact_off_and_on(name: str, tmp_path: Path) -> None:
    text = programs.FORMS[name]
    new = rewritten(tmp_path, text)
    before, off, on = build(text), build(new), build(new, gradient_checkpointing=True)
    assert set(before.state_dict()) == set(off.state_dict())
    count = [runs_of_attention(model) for model in (before, off, on)]
    wanted = step(before)
    for model in (off, on):
        found = step(model)
        assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    once = count[0][0]
    assert once > 0 and count[1][0] == once
    assert count[2][0] == 2 * once
    on.eval()
    before.eval()
    count[2][0] = 0
    assert torch.equal(before(ids()), on(ids())) and count[2][0] == once


@pytest.mark.parametrize("name", programs.REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    text, reason = programs.REFUSED[name]
    load(text)
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path)
    assert path.read_text() == text
    assert {site.status for site in report.sites} == {Status.REFUSED}
    assert any(reason in site.message for site in report.sites), [site.message for site in report.sites]


@pytest.mark.parametrize("name", programs.MODERN)
def test_what_is_checkpointed_already_is_modern(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.MODERN[name])
    assert {site.status for site in apply(path).sites} == {Status.MODERN}
    assert path.read_text() == programs.MODERN[name]


@pytest.mark.parametrize("name", programs.ABSENT)
def test_nothing_to_do(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.ABSENT[name])
    assert apply(path).sites == []
    assert path.read_text() == programs.ABSENT[name]


def test_check_looks_for_it_only_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.FORMS["a loop"])
    named = {site.rule for site in pipeline.check([path], select([]), {}).sites}
    assert named and "checkpointing" not in named


def test_a_layer_that_writes_to_its_cache_runs_once_there(tmp_path: Path) -> None:
    new = rewritten(tmp_path, programs.FORMS["a cache with a method"])
    assert "self.training and cache is None:" in new
    net = build(new, gradient_checkpointing=True)
    cache: list[Tensor] = []
    net.stack(net.embed(ids()), cache=cache).sum().backward()  # type: ignore[operator]
    assert len(cache) == 3


def test_only_lines_of_the_flag_and_the_loop_change(tmp_path: Path) -> None:
    old = programs.FORMS["a call over several lines"].splitlines()
    new = rewritten(tmp_path, programs.FORMS["a call over several lines"]).splitlines()
    assert [line for line in new if line not in old and line.strip() not in {o.strip() for o in old}] == [
        "from torch.utils.checkpoint import checkpoint",
        "    def __init__(self, dim, depth, gradient_checkpointing=False):",
        "        self.gradient_checkpointing = gradient_checkpointing",
        "            if self.gradient_checkpointing and self.training:  # the stream",
        "                x = checkpoint(layer, x, mask=mask, use_reentrant=False)",
        "            else:",
        "                )",
        "    def __init__(self, words=11, dim=8, depth=3, gradient_checkpointing=False):",
        "        self.stack = Stack(dim, depth, gradient_checkpointing=gradient_checkpointing)",
    ]


def test_a_stack_in_a_file_that_was_not_named_is_refused(tmp_path: Path) -> None:
    parts, _, net = programs.FORMS["a loop"].partition("class Net(nn.Module):")
    (tmp_path / "parts.py").write_text(parts)
    main = tmp_path / "model.py"
    main.write_text("import torch.nn as nn\nfrom parts import Stack\n\n\nclass Net(nn.Module):" + net)
    (site,) = apply(main).sites
    assert site.status is Status.REFUSED and "not named" in site.message
    assert (tmp_path / "parts.py").read_text() == parts
    report = pipeline.upgrade([tmp_path], select(["checkpointing"]), {})
    assert [s.status for s in report.sites] == [Status.DONE]
    assert "Stack(dim, depth, gradient_checkpointing=gradient_checkpointing)" in main.read_text()


@pytest.mark.parametrize("others", [("rope", "prenorm", "swiglu", "sdpa"), ("kvcache",)])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_shipped_programs_stay_what_they_are(program: Program, others: tuple[str, ...], tmp_path: Path) -> None:
    """Together with other rules, the output is theirs; with every flag on, training gives the same gradients."""
    plain = program.copy(tmp_path / "plain")
    pipeline.upgrade(plain.targets, select(others), {})
    both = program.copy(tmp_path / "both")
    report = pipeline.upgrade(both.targets, select([*others, "checkpointing"]), {})
    assert not report.problems
    done = [s for s in report.sites if s.rule == "checkpointing" and s.status is Status.DONE]
    found = []
    for copy in (plain, both):
        with copy.case() as case:
            model = case.build()
            found.append(case.call(model, case.inputs()))
            if copy is both:
                flagged = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
                assert bool(flagged) == bool(done)
                _assert_same_training(case, model, flagged)
    assert torch.equal(*found)


def _assert_same_training(case: Any, model: nn.Module, flagged: list[nn.Module]) -> None:
    gradients = []
    model.train()
    for is_on in (False, True):
        for module in flagged:
            module.gradient_checkpointing = is_on
        model.zero_grad()
        torch.manual_seed(0)
        case.call(model, case.inputs()).sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for off, on in zip(*gradients, strict=True):
        assert (off is None) == (on is None) and (off is None or torch.equal(off, on))
