"""`fuseqkv`: programs run before and after in float64, their weights carried there and back by the recorded map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fuseqkv_programs import BOTH, BOTH_CALLS, FORMS, MODERN, REFUSED, UNEQUAL, own
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modernizer.cli import main
from modernizer.pipeline import upgrade
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.weights import MapError, WeightMap
from modernizer.weights.apply import carry
from modernizer.weights.optimizer import in_order


def apply(path: Path) -> Report:
    report = upgrade([path], select(["fuseqkv"]), {})
    assert not report.problems, report.problems
    return report


def statuses(report: Report) -> set[Status]:
    return {site.status for site in report.sites}


def rewritten(folder: Path, text: str) -> tuple[str, WeightMap]:
    """The new text and the map; everything seen must be done, and a second run must leave the file alone."""
    path = folder / "program.py"
    path.write_text(text)
    report = apply(path)
    assert statuses(report) == {Status.DONE}, [site.message for site in report.sites]
    new = path.read_text()
    again = apply(path)
    assert path.read_text() == new and Status.DONE not in statuses(again)
    assert report.weights is not None
    return new, report.weights


def load(text: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(text, "program.py", "exec"), scope)
    return scope


def built(scope: dict[str, Any], state: Mapping[str, Tensor] | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = scope["Net"]().double()
    assert isinstance(net, nn.Module)
    if state is not None:
        net.load_state_dict(state)
    return net


def gradients(net: nn.Module, output: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    (
        output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    ).sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


class Products(TorchDispatchMode):
    """Counts the matrix products that linear layers make."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("addmm", "mm", "bmm")
        return func(*args, **(kwargs or {}))


def products(net: nn.Module, scope: dict[str, Any]) -> int:
    with Products() as seen, torch.no_grad():
        scope["run"](net)
    return seen.count


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def check_equal(folder: Path, text: str) -> str:
    """The rewritten program does what the old one did, with the old weights and what the map makes of gradients."""
    new, weights = rewritten(folder, text)
    old_scope, new_scope = load(text), load(new)
    old = built(old_scope)
    state = {name: value.clone() for name, value in old.state_dict().items()}
    carried = carry(weights, state)
    net = built(new_scope, carried.state)
    assert carried.gone and carried.made
    assert in_order(carried.state) == list(net.state_dict())  # by which the state of an optimizer goes
    with pytest.raises(RuntimeError):
        built(new_scope, state)
    assert same(state, carry(weights.inverted(), carried.state).state)
    before, after = old_scope["run"](old), new_scope["run"](net)
    assert before.shape == after.shape and (before - after).abs().max() <= 1e-12
    wanted, found = carry(weights, gradients(old, before)).state, gradients(net, after)
    assert wanted.keys() == found.keys()
    assert all((wanted[name] - found[name]).abs().max() <= 1e-12 for name in wanted)
    assert products(net, new_scope) < products(old, old_scope)
    return new


@pytest.mark.parametrize("form", FORMS)
def test_forms_do_what_they_did_in_fewer_products_and_the_weights_go_there_and_back(form: str, tmp_path: Path):
    check_equal(tmp_path, FORMS[form])


def test_each_part_is_filled_as_its_layer_was(tmp_path: Path):
    text = FORMS["initialised by name with widths of its own"]
    new, _ = rewritten(tmp_path, text)
    layer = built(load(new)).get_submodule("layers.0.to_qkv")
    assert isinstance(layer.weight, Tensor)
    query, key, value = layer.weight.split([12, 12, 6])
    assert (value == 0.25).all()
    assert 0.05 < query.std() < 0.15 and key.abs().max() <= 12**-0.5


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_joined_safely_keeps_every_byte_and_says_why(form: str, tmp_path: Path):
    text, reason = REFUSED[form]
    path = tmp_path / "program.py"
    path.write_text(text)
    report = apply(path)
    assert path.read_text() == text
    assert Status.REFUSED in statuses(report) and Status.DONE not in statuses(report)
    assert any(reason in site.message for site in report.sites), [site.message for site in report.sites]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("form", MODERN)
def test_one_projection_is_modern(form: str, tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(MODERN[form])
    assert statuses(apply(path)) == {Status.MODERN}
    assert path.read_text() == MODERN[form]


@pytest.mark.parametrize("form", UNEQUAL)
def test_parts_whose_lengths_the_code_leaves_open_come_back_by_the_shapes_of_another_checkpoint(
    form: str, tmp_path: Path
):
    new, weights = rewritten(tmp_path, UNEQUAL[form])
    old_scope, new_scope = load(UNEQUAL[form]), load(new)
    old = built(old_scope)
    carried = carry(weights, old.state_dict())
    net = built(new_scope, carried.state)
    assert (old_scope["run"](old) - new_scope["run"](net)).abs().max() <= 1e-12
    with pytest.raises(MapError, match=r"layers\.0\.\w+qkv"):
        carry(weights.inverted(), carried.state)
    other = {name: torch.zeros_like(value) for name, value in old.state_dict().items()}
    assert same(old.state_dict(), carry(weights.inverted(), carried.state, other).state)


def test_a_checkpoint_on_disk_is_carried_by_the_map_that_was_recorded_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = own(calls=BOTH_CALLS, program=BOTH)
    old_scope = load(text)
    old = built(old_scope)
    torch.save(old.state_dict(), "old.pt")
    new_scope = load(rewritten(tmp_path, text)[0])
    for arguments in (["old.pt", "-o", "new.pt"], ["new.pt", "-o", "back.pt", "--reverse"]):
        result = CliRunner().invoke(main, ["migrate", *arguments])
        assert result.exit_code == 0, result.output
    assert same(old.state_dict(), torch.load("back.pt"))
    net = built(new_scope, torch.load("new.pt"))
    assert (old_scope["run"](old) - new_scope["run"](net)).abs().max() <= 1e-12


def test_a_trained_step_of_both_leads_to_the_same_weights(tmp_path: Path):
    text = FORMS["self and cross"]
    new, weights = rewritten(tmp_path, text)
    old_scope, new_scope = load(text), load(new)
    old = built(old_scope)
    net = built(new_scope, carry(weights, old.state_dict()).state)
    for scope, model in ((old_scope, old), (new_scope, net)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            scope["run"](model).square().mean().backward()
            optimizer.step()
    wanted, found = carry(weights, old.state_dict()).state, net.state_dict()
    assert all((wanted[name] - found[name]).abs().max() <= 1e-12 for name in found)


ORDERS = st.permutations(["q", "k", "v"])
STYLES = (
    "{n} = self.split(self.to_{n}(x))",
    "{n} = self.to_{n}(x)\n{n} = self.split({n})",
    "{n} = self.to_{n}(input=x).view(x.shape[0], -1, self.heads, self.width).transpose(1, 2)",
    "{n} = self.to_{n}(x).reshape(*x.shape[:-1], self.heads, -1).permute(0, 2, 1, 3)",
    "{n} = self.to_{n}(x).mul_(0.5)\n{n} = self.split({n})",
)


@settings(max_examples=12, deadline=None)
@given(made=ORDERS, called=ORDERS, styles=st.tuples(*[st.sampled_from(STYLES)] * 3), bias=st.booleans())
def test_any_order_of_layers_and_calls(made: list[str], called: list[str], styles: tuple[str, ...], bias: bool):
    layers = "\n".join(f"self.to_{n} = nn.Linear(dim, out_features=dim, bias={bias})" for n in made)
    calls = "\n".join(style.format(n=n) for n, style in zip(called, styles, strict=True))
    with TemporaryDirectory() as folder:
        check_equal(Path(folder), own(layers, calls))


def test_files_that_were_not_part_of_it_are_named_and_no_more_than_can_be_read(tmp_path: Path):
    for number in range(5):
        (tmp_path / f"loader_{number}.py").write_text('NAME = "layers.0.to_q.weight"\n')
    path = tmp_path / "program.py"
    path.write_text(FORMS["plain"])
    (site,) = apply(path).sites
    assert [note for note in site.notes if "loader_0.py:1 names `to_q.weight`" in note]
    assert "2 more files name parameters like these" in site.notes
