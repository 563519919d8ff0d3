"""`swiglu` on whole programs: what it rewrites runs and is gated, what it must not touch keeps every byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import swiglu_forms as forms
import swiglu_traps as traps
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modernizer import pipeline
from modernizer.model_map import read_model
from modernizer.project import Project
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
    assert set(statuses(report)) == {Status.DONE}, [site.message for site in report.sites]
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
    return report.sites[0].message


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


@pytest.mark.parametrize("name", traps.LAYERS)
def test_layer_of_torch_becomes_ours(name: str, tmp_path: Path) -> None:
    text = traps.LAYERS[name]
    before, after = build(text), build(rewritten(tmp_path, text))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_gated(before, after)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", traps.REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    text, reason = traps.REFUSED[name]
    build(text)(ids())
    assert reason in refused(tmp_path, text)


@pytest.mark.parametrize("name", traps.UNTOUCHED)
def test_look_alike_is_left_alone(name: str, tmp_path: Path) -> None:
    build(traps.UNTOUCHED[name])(ids())
    assert untouched(tmp_path, traps.UNTOUCHED[name]) == []


@pytest.mark.parametrize("name", traps.GATED)
def test_gated_is_modern(name: str, tmp_path: Path) -> None:
    build(traps.GATED[name])(ids())
    assert set(untouched(tmp_path, traps.GATED[name])) == {Status.MODERN}


def test_heads_and_query_networks_beside_a_feed_forward_stay(tmp_path: Path) -> None:
    text = traps.changed(
        forms.FORMS["relu function"],
        "self.head = nn.Linear(d, vocab)",
        "self.head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, vocab))",
        "for _ in range(4))",
        "for _ in range(4))\n        self.q = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))",
    )
    before, after = build(text), build(rewritten(tmp_path, text))
    old, new = operations(before), operations(after)
    assert old["relu"] - new["relu"] == new["silu"] == 2


def test_parameter_count_stays_close(tmp_path: Path) -> None:
    wide = forms.FORMS["relu function"].replace("d=16", "d=192")
    before, after = build(wide), build(rewritten(tmp_path, wide))
    assert isinstance(before.blocks, nn.ModuleList) and isinstance(after.blocks, nn.ModuleList)
    old, new = (sum(p.numel() for p in model.blocks.parameters()) for model in (before, after))
    assert abs(new - old) / old < 0.01


def test_literal_width_is_computed(tmp_path: Path) -> None:
    new = rewritten(tmp_path, forms.FORMS["numbers"].replace("100", "2048"))
    assert "nn.Linear(d, 2 * 1368), GatedSiLU(), nn.Linear(1368, d)" in new


def test_hidden_width_can_be_kept(tmp_path: Path) -> None:
    text = forms.FORMS["relu module"]
    new = rewritten(tmp_path, text, keep_hidden=True)
    assert "self.fc1 = nn.Linear(d, 2 * hidden)" in new
    assert "self.fc2 = nn.Linear(hidden, d)" in new
    assert_gated(build(text), build(new))


def test_hidden_width_of_torchs_layer_can_be_kept(tmp_path: Path) -> None:
    new = rewritten(tmp_path, traps.LAYERS["activation by name"], keep_hidden=True)
    assert "TransformerEncoderLayer(d, 2, batch_first=True, gated=True, keep_hidden=True)" in new


def test_both_branches_of_forward_are_changed(tmp_path: Path) -> None:
    text, _ = traps.REFUSED["activation in an unreached branch"]
    text = traps.changed(
        text,
        "layers=2)", "layers=2, kind='relu')",
        "[Block(d) for", "[Block(d, kind) for",
        "def __init__(self, d):", "def __init__(self, d, kind):",
        "FeedForward(d, 4 * d)", "FeedForward(d, 4 * d, kind)",
    )  # fmt: skip
    new = rewritten(tmp_path, text)
    assert new.count("x = swiglu(x)") == 2
    assert_gated(build(text), build(new))


def test_name_that_is_taken_is_not_shadowed(tmp_path: Path) -> None:
    text = forms.FORMS["relu function"].replace(
        "class FeedForward", "def swiglu(x):\n    return x\n\n\nclass FeedForward"
    )
    new = rewritten(tmp_path, text)
    assert "swiglu as modern_swiglu" in new
    assert_gated(build(text), build(new))


def test_feed_forward_without_residual_between_attentions_counts(tmp_path: Path) -> None:
    text = traps.changed(forms.FORMS["relu function"], "return x + self.ff(", "return self.ff(")
    assert_gated(build(text), build(rewritten(tmp_path, text)))


def test_what_shares_code_is_refused_together(tmp_path: Path) -> None:
    text = forms.FORMS["factory of projections"].replace(
        "self.fc1 = linear(d, hidden)", "self.fc1 = linear(d, hidden)\n        self.width = self.fc1.out_features"
    )
    assert "read elsewhere" in refused(tmp_path, text)


def test_note_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(forms.FORMS["relu function"])
    (site,) = apply(tmp_path / "model.py").sites
    assert any("2/3" in note for note in site.notes)
    assert any("train" in note for note in site.notes)


def test_review_rejects_half_a_rewrite(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(forms.FORMS["relu function"])
    (rule,) = select(["swiglu"])
    before = read_model(Project.open([path]))
    (upgrade,) = rule.plan(before, {}).upgrades
    gated = path.read_text().replace("F.relu(self.fc1(x))", "F.silu(self.fc1(x)) * self.fc1(x)")
    assert "should have become gated" in rule.review(before, before, [upgrade])
    after = read_model(
        Project([path], {path: gated.replace("nn.LayerNorm(d), nn.LayerNorm(d)", "nn.Identity(), nn.Identity()")})
    )
    assert "outside of the feed-forwards" in rule.review(before, after, [upgrade])
    assert rule.review(before, read_model(Project([path], {path: gated})), [upgrade])  # another projection is run
