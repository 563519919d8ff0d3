"""`finish`: beta goes out of every form that `swiglu --keep-weights` writes, and the exported weights compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import swiglu_forms as forms
import swiglu_traps as traps
import torch
from test_swiglu import build, ids
from test_swiglu_weights import NOT_SILU

from modernizer import pipeline
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.weights.apply import carry


def apply(path: Path, rule: str, **options: bool) -> Report:
    report = pipeline.upgrade([path], select([rule]), options)
    assert not report.problems
    return report


@pytest.mark.parametrize("name", [name for name in forms.FORMS if name not in NOT_SILU])
def test_form_without_beta_computes_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(forms.FORMS[name])
    apply(path, "swiglu", keep_weights=True)
    bridged = path.read_text()
    report = apply(path, "finish")
    assert [site.status for site in report.sites] == [Status.DONE], [site.message for site in report.sites]
    final = path.read_text()
    assert "beta" in bridged and "beta" not in final and "partial(swiglu" not in final
    before, after = build(bridged).double(), build(final).double()
    assert report.weights is not None
    after.load_state_dict(carry(report.weights, before.state_dict()).state)
    torch.testing.assert_close(after(ids()), before(ids()), rtol=0, atol=1e-12)
    with torch.no_grad():
        before.load_state_dict(carry(report.weights.inverted(), after.state_dict()).state)
    torch.testing.assert_close(after(ids()), before(ids()), rtol=0, atol=1e-12)
    assert apply(path, "finish").sites == [] and path.read_text() == final


def test_layers_of_torch_are_finished_too(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(traps.LAYERS["activation by name"])
    apply(path, "swiglu", keep_weights=True)
    bridged = path.read_text()
    report = apply(path, "finish")
    before, after = build(bridged).double(), build(path.read_text()).double()
    assert "beta" not in path.read_text() and report.weights is not None
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        after.load_state_dict(carry(report.weights, before.state_dict()).state)
        torch.testing.assert_close(after(ids()), before(ids()), rtol=0, atol=1e-12)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("beta=8.0", "beta=float(8)", "not written as a number"),
        ("x + self.ff(self.norm2(x))", "x + self.ff(self.norm2(x)) + swiglu(x, beta=3.0).sum()", "no feed-forward"),
    ],
)
def test_refused_with_the_reason(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(forms.FORMS["relu function"])
    apply(path, "swiglu", keep_weights=True)
    text = traps.changed(path.read_text(), old, new)
    path.write_text(text)
    report = apply(path, "finish")
    assert [site.status for site in report.sites] == [Status.REFUSED] and said in report.sites[0].message
    assert path.read_text() == text


def test_program_without_a_bridge_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    for text in (
        forms.FORMS["relu function"],
        forms.FORMS["relu function"].replace("F.relu(", "torch.add(1, beta=2, x="),
    ):
        path.write_text(text)
        assert apply(path, "finish").sites == [] and path.read_text() == text
