"""`swiglu --keep-weights` on whole programs: the trained weights are carried over, and the model computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import swiglu_forms as forms
import swiglu_traps as traps
import torch
import torch.nn.functional as F
from test_swiglu import build, ids
from torch import nn

from modernizer import pipeline
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.weights.apply import carry

# Why a form cannot keep its weights; all others can.
NO_MAP = {
    "table of classes by an open name": "decided when it is built",
    "function of torch by an open name": "decided when it is built",
    "class of torch by an open name": "decided when it is built",
    "convolutions with a module": "has no bias",
}
NOT_EXACT = {"leaky relu": "no gate is known", **NO_MAP}
NOT_SILU = {"leaky relu": "SiLU cannot", "elu": "SiLU cannot", **NO_MAP}


def upgrade(folder: Path, text: str, **options: bool) -> tuple[Report, str]:
    path = folder / "model.py"
    path.write_text(text)
    report = pipeline.upgrade([path], select(["swiglu"]), options)
    assert not report.problems
    return report, path.read_text()


def carried(folder: Path, text: str, **options: bool) -> tuple[nn.Module, nn.Module]:
    """The model before, and the rewritten one with its weights, which must be all there are."""
    report, new = upgrade(folder, text, **options)
    assert {site.status for site in report.sites} == {Status.DONE}, [site.message for site in report.sites]
    assert report.weights is not None and report.weight_map is not None
    before, after = build(text).double(), build(new).double()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    after.load_state_dict(carry(report.weights, before.state_dict()).state)
    again, unchanged = upgrade(folder, new, **options)
    assert unchanged == new and {site.status for site in again.sites} <= {Status.MODERN}
    back = carry(report.weights.inverted(), after.state_dict()).state
    assert all(torch.equal(back[name], value) for name, value in before.state_dict().items())
    return before, after


def assert_same_function(before: nn.Module, after: nn.Module) -> None:
    """The same outputs and the same gradients on the weights that both have."""
    expected, found = before(ids()), after(ids())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for output in (expected, found):
        (output * weights).sum().backward()
    new = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        gradient = new[name].grad
        assert gradient is not None and parameter.grad is not None
        for axis, length in enumerate(parameter.shape):
            gradient = gradient.narrow(axis, 0, length)
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in forms.FORMS if name not in NOT_EXACT])
def test_activation_that_is_kept_is_exact(name: str, tmp_path: Path) -> None:
    assert_same_function(*carried(tmp_path, forms.FORMS[name], keep_activation=True))


@pytest.mark.parametrize("name", [name for name in forms.FORMS if name not in NOT_SILU])
def test_silu_with_beta_is_close(name: str, tmp_path: Path) -> None:
    before, after = carried(tmp_path, forms.FORMS[name], keep_weights=True)
    expected, found = before(ids()), after(ids())
    assert (found - expected).norm() < 0.1 * (expected - expected.mean()).norm()


@pytest.mark.parametrize("name", NOT_EXACT)
def test_no_exact_gate_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    report, new = upgrade(tmp_path, forms.FORMS[name], keep_activation=True)
    assert new == forms.FORMS[name]
    assert [site.status for site in report.sites] == [Status.REFUSED] and NOT_EXACT[name] in report.sites[0].message


@pytest.mark.parametrize("name", NOT_SILU)
def test_no_silu_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    report, new = upgrade(tmp_path, forms.FORMS[name], keep_weights=True)
    assert new == forms.FORMS[name]
    assert [site.status for site in report.sites] == [Status.REFUSED] and NOT_SILU[name] in report.sites[0].message


def test_beta_is_written_out_where_it_is_used(tmp_path: Path) -> None:
    _, new = upgrade(tmp_path, forms.FORMS["relu function"], keep_weights=True)
    assert "self.fc2(self.drop(swiglu(self.fc1(x), beta=8.0)))" in new
    assert "self.fc1 = nn.Linear(d, 2 * hidden)" in new and "self.fc2 = nn.Linear(hidden, d)" in new
    _, new = upgrade(tmp_path, forms.FORMS["relu module"], keep_weights=True)
    assert "self.act = GatedSiLU(beta=8.0)" in new
    _, new = upgrade(tmp_path, forms.FORMS["own gelu class"], keep_activation=True)
    assert 'self.act = Gated("gelu_tanh")' in new


def test_carried_layer_is_the_formula(tmp_path: Path) -> None:
    before, after = carried(tmp_path, forms.FORMS["relu function"], keep_weights=True)
    old, new = before.get_submodule("blocks.1.ff"), after.get_submodule("blocks.1.ff")
    x = torch.randn(3, 16, dtype=torch.float64)
    hidden = F.linear(x, old.fc1.weight, old.fc1.bias)
    silu = hidden / (1 + torch.exp(-8 * hidden))
    torch.testing.assert_close(new(x), F.linear(silu, old.fc2.weight, old.fc2.bias), rtol=0, atol=1e-12)


def test_gate_that_was_trained_has_no_way_back(tmp_path: Path) -> None:
    report, new = upgrade(tmp_path, forms.FORMS["relu function"], keep_weights=True)
    assert report.weights is not None
    state = build(new).state_dict()
    with pytest.raises(Exception, match="was trained"):
        carry(report.weights.inverted(), state)


def test_names_that_another_part_has_are_told_apart_or_refused(tmp_path: Path) -> None:
    """A head with layers called like those of the feed-forwards keeps its weights."""
    text = forms.FORMS["relu function"]
    head = """

class Head(nn.Module):
    def __init__(self, d, vocab):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, d), nn.Linear(d, vocab)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))
"""
    text = traps.changed(text, "self.head = nn.Linear(d, vocab)", "self.head = Head(d, vocab)") + head
    before, after = carried(tmp_path, text, keep_activation=True)
    assert_same_function(before, after)
    clash = traps.changed(text, "self.head = Head", "self.ff = Head", "self.head(x)", "self.ff(x)")
    report, new = upgrade(tmp_path, clash, keep_weights=True)
    assert new == clash and "could not tell" in report.sites[0].message


def test_layer_of_torch_keeps_its_weights(tmp_path: Path) -> None:
    name = "activation by name"
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        before, after = carried(tmp_path, traps.LAYERS[name], keep_weights=True)
        expected, found = before(ids()), after(ids())
        assert 0 < (found - expected).norm() < 0.1 * (expected - expected.mean()).norm()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    report, new = upgrade(tmp_path, traps.LAYERS[name], keep_activation=True)
    assert new == traps.LAYERS[name] and "no other gate" in report.sites[0].message
    another = traps.changed(
        traps.LAYERS[name], "self.head = nn.Linear", "self.linear1 = nn.Linear(d, d)\n        self.head = nn.Linear"
    )
    report, new = upgrade(tmp_path, another, keep_weights=True)
    assert new == another and "could not tell" in report.sites[0].message
