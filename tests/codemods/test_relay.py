"""`relay` on whole programs: with its relays taken out a rewritten model is the old one; the rest keeps every byte."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import relay_programs as programs
import relay_traps as traps
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modernizer import pipeline
from modernizer.components import HybridRelay
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.vendoring import vendor


def build(text: str) -> nn.Module:
    scope: dict[str, Any] = {"__name__": "program"}
    torch.manual_seed(0)
    exec(compile(text, "program", "exec"), scope)
    made = scope["Net"]().eval()
    assert isinstance(made, nn.Module)
    return made


def ids() -> torch.Tensor:
    return torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(3))


def apply(path: Path, **options: bool) -> Report:
    report = pipeline.upgrade([path], select(["relay"]), options)
    assert not report.problems
    return report


def rewritten(folder: Path, text: str, **options: bool) -> str:
    """The text after the rule, which must have done all that it saw, and do nothing when it runs again."""
    path = folder / "model.py"
    path.write_text(text)
    report = apply(path, **options)
    assert [site.status for site in report.sites] == [Status.DONE], [site.message for site in report.sites]
    new = path.read_text()
    again = apply(path, **options)
    assert [site.status for site in again.sites] == [Status.MODERN], [site.message for site in again.sites]
    assert path.read_text() == new
    return new


def relays(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, HybridRelay)]


def without_relays(model: nn.Module) -> nn.Module:
    for name in relays(model):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Identity())
    return model


def assert_relayed(old: str, new: str, *, causal: bool) -> None:
    before, after = build(old), build(new)
    missing = after.load_state_dict(before.state_dict(), strict=False)
    names = relays(after)
    assert len(names) == 2 and not missing.unexpected_keys
    assert all(any(key.startswith(f"{name}.") for name in names) for key in missing.missing_keys)
    assert all(after.get_submodule(name).causal is causal for name in names)
    output = after(ids())
    assert output.shape == before(ids()).shape and not torch.equal(output, before(ids()))
    (output * torch.randn_like(output)).sum().backward()
    of_relays = [(n, p) for n, p in after.named_parameters() if any(n.startswith(f"{name}.") for name in names)]
    assert [
        n for n, p in of_relays if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().max() > 0
    ] == []
    if causal:
        other = ids()
        other[:, 4:] = (other[:, 4:] + 1) % 11
        torch.testing.assert_close(after(ids())[:, :4], after(other)[:, :4], rtol=0, atol=1e-6)
        torch.testing.assert_close(after(ids()[:, :1]), after(ids())[:, :1], rtol=0, atol=1e-5)
    torch.testing.assert_close(without_relays(after)(ids()), before(ids()), rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(programs.HEADS)),
    st.sampled_from(sorted(programs.MIXED)),
    st.sampled_from(sorted(programs.MASKS)),
    st.sampled_from(sorted(programs.SUMS)),
)
def test_any_combination_of_parts_gets_relays(heads: str, mixed: str, mask: str, total: str) -> None:
    text = programs.program(heads, mixed, mask, total)
    with tempfile.TemporaryDirectory() as folder:
        new = rewritten(Path(folder), text, causal=mask != "none")
    assert_relayed(text, new, causal=mask != "none")


@pytest.mark.parametrize("name", programs.FORMS)
def test_form_gets_relays(name: str, tmp_path: Path) -> None:
    text = programs.FORMS[name]
    assert_relayed(text, rewritten(tmp_path, text), causal=False)


@pytest.mark.parametrize("name", traps.REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    text, reason, options = traps.REFUSED[name]
    build(text)(ids())
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path, **dict.fromkeys(options, True))
    assert path.read_text() == text
    assert {site.status for site in report.sites} == {Status.REFUSED}
    assert any(reason in site.message for site in report.sites), [site.message for site in report.sites]


@pytest.mark.parametrize("name", traps.UNTOUCHED)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_do(name: str, causal: bool, tmp_path: Path) -> None:
    build(traps.UNTOUCHED[name])(ids())
    path = tmp_path / "model.py"
    path.write_text(traps.UNTOUCHED[name])
    assert apply(path, causal=causal).sites == []
    assert path.read_text() == traps.UNTOUCHED[name]


def test_only_the_lines_of_the_relay_change(tmp_path: Path) -> None:
    old = programs.PLAIN.splitlines()
    new = rewritten(tmp_path, programs.PLAIN).splitlines()
    assert [line for line in new if line not in old] == [
        "from modernizer.components import HybridRelay",
        "        self.relay = HybridRelay(dim)",
        "        x = self.relay(x + self.drop(self.attention(self.norm(x))))",
    ]
    assert [line for line in old if line not in new] == ["        x = x + self.drop(self.attention(self.norm(x)))"]


def test_one_sequence_alone_runs_where_torchs_attention_takes_it(tmp_path: Path) -> None:
    text = programs.FORMS["torch's attention"]
    one = ids()[0]
    assert build(rewritten(tmp_path, text))(one).shape == build(text)(one).shape


def test_a_class_in_a_file_that_was_not_named_is_refused(tmp_path: Path) -> None:
    parts, _, net = programs.PLAIN.partition("class Net(nn.Module):")
    (tmp_path / "parts.py").write_text(parts)
    main = tmp_path / "model.py"
    main.write_text("import torch.nn as nn\nfrom parts import Block\n\n\nclass Net(nn.Module):" + net)
    (site,) = apply(main).sites
    assert site.status is Status.REFUSED and "not named" in site.message
    assert (tmp_path / "parts.py").read_text() == parts


def test_a_vendored_relay_is_one_too(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.PLAIN)
    report = pipeline.upgrade([path], select(["relay"]), {}, steps=[vendor])
    assert [site.status for site in report.sites] == [Status.DONE]
    assert "from modernizer_components import HybridRelay" in path.read_text()
    assert [site.status for site in apply(path).sites] == [Status.MODERN]


def test_looked_for_only_by_name() -> None:
    assert "relay" not in {rule.name for rule in select([])}
    assert [rule.name for rule in select(["relay"])] == ["relay"]
