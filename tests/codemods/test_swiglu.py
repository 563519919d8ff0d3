"""`swiglu` on whole programs: what it rewrites runs and is gated, what it must not touch keeps every byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import swiglu_forms as forms
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modernizer import pipeline
from modernizer.registry import select
from modernizer.report import Report, Status

OLD = ("relu", "relu_", "gelu", "erf", "tanh", "sigmoid", "elu", "leaky_relu", "clamp")


class Operations(TorchDispatchMode):
    """Counts what runs underneath."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def build(text: str, name: str = "Net") -> nn.Module:
    scope: dict[str, Any] = {"__name__": "program"}
    torch.manual_seed(0)
    exec(compile(text, "program", "exec"), scope)
    made = scope[name]().eval()
    assert isinstance(made, nn.Module)
    return made


def ids() -> torch.Tensor:
    return torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(3))


def operations(model: nn.Module) -> Counter[str]:
    with Operations() as counted, torch.no_grad():
        model(ids())
    return counted.seen


def apply(path: Path, **options: bool) -> Report:
    report = pipeline.upgrade([path], select(["swiglu"]), options)
    assert not report.problems
    return report


def statuses(report: Report) -> list[Status]:
    return [site.status for site in report.sites]


def rewritten(folder: Path, text: str, **options: bool) -> str:
    """The text after the rule, which must have done everything it saw, and find nothing when it runs again."""
    path = folder / "model.py"
    path.write_text(text)
    report = apply(path, **options)
    assert set(statuses(report)) == {Status.DONE}, [site.reason for site in report.sites]
    new = path.read_text()
    apply(path, **options)
    assert path.read_text() == new
    return new


def refused(folder: Path, text: str) -> str:
    """The reason for which the rule refused the only site it saw, and left every byte alone."""
    path = folder / "model.py"
    path.write_text(text)
    report = apply(path)
    assert path.read_text() == text
    assert set(statuses(report)) == {Status.REFUSED}
    return report.sites[0].reason


def untouched(folder: Path, text: str) -> list[Status]:
    path = folder / "model.py"
    path.write_text(text)
    report = apply(path)
    assert path.read_text() == text
    return statuses(report)


def assert_gated(before: nn.Module, after: nn.Module) -> None:
    """Two calls of a feed-forward became gated ones, and everything still works."""
    old, new = operations(before), operations(after)
    assert new["silu"] - old["silu"] == 2
    assert sum(old[op] for op in OLD) - sum(new[op] for op in OLD) >= 2
    output = after(ids())
    assert output.shape == before(ids()).shape
    (output * torch.randn_like(output)).sum().backward()
    assert [n for n, p in after.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    changed = ids()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    torch.testing.assert_close(after(ids())[:, :-1], after(changed)[:, :-1])


@pytest.mark.parametrize("name", forms.FORMS)
def test_form_becomes_gated(name: str, tmp_path: Path) -> None:
    text = forms.FORMS[name]
    before, after = build(text), build(rewritten(tmp_path, text))
    assert_gated(before, after)
    assert list(before.state_dict()) == list(after.state_dict())
