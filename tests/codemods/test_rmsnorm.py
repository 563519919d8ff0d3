"""`rmsnorm`: rewritten programs are run beside the old ones, whose norms an oracle computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rmsnorm_programs import ATTENTION, BLOCK, FORMS, HEAD, NET, REFUSED, UNTOUCHED, WRITTEN_OUT, own
from torch import Tensor, nn

from modernizer.pipeline import check, upgrade
from modernizer.registry import select
from modernizer.report import Report, Status


def apply(path: Path, *rules: str) -> Report:
    report = upgrade([path], select(rules or ["rmsnorm"]), {})
    assert not report.problems, report.problems
    return report


def statuses(report: Report) -> set[Status]:
    return {site.status for site in report.sites}


def rewritten(folder: Path, text: str, *rules: str) -> str:
    """The new text; everything seen must be done, and a second run must leave the file alone."""
    path = folder / "program.py"
    path.write_text(text)
    report = apply(path, *rules)
    assert Status.DONE in statuses(report) and Status.REFUSED not in statuses(report), report.sites
    new = path.read_text()
    again = apply(path, *rules)
    assert path.read_text() == new and statuses(again) == {Status.MODERN}
    return new


def by_size(x: Tensor, weight: Tensor | None, eps: float, count: int = 1) -> Tensor:
    """RMSNorm over the last `count` axes, by its definition."""
    axes = tuple(range(-count, 0))
    scaled = x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    return scaled if weight is None else scaled * weight


class Oracle(nn.Module):
    """Constructed like `nn.LayerNorm`, computes an RMSNorm."""

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True, **_: Any
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.count, self.eps = len(shape), eps
        self.weight = nn.Parameter(torch.ones(shape)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(shape)) if elementwise_affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        return by_size(x, self.weight, self.eps, self.count)


def function(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    assert bias is None
    return by_size(x, weight, eps, len(shape))


@contextmanager
def norms_by_size() -> Iterator[None]:
    torchs = mock.patch.object(nn.modules.transformer, "LayerNorm", Oracle)
    named = mock.patch.object(nn, "LayerNorm", Oracle)
    with torchs, named, mock.patch.object(nn.functional, "layer_norm", function):
        yield


def load(text: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "program"}
    exec(compile(text, "program.py", "exec"), scope)
    return scope


def moved(net: nn.Module) -> nn.Module:
    """In float64, every parameter away from where it starts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def replaced_forward(module: nn.Module, weight: str, eps: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: by_size(x, getattr(module, weight), eps if isinstance(eps, float) else getattr(module, eps))


def old_and_new(old_text: str, new_text: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Both models with the same weights and what they put out, the norms of the old one computed by the oracle."""
    with norms_by_size():
        scope = load(old_text)
        old = moved(scope["Net"]())
        names: dict[str, str] = {}
        for name, module in old.named_modules():
            if type(module).__name__ in scope["OWN"]:
                weight, bias, eps = scope["OWN"][type(module).__name__]
                names[f"{name}.{weight}"] = f"{name}.weight"
                names[f"{name}.{bias}"] = ""
                module.forward = replaced_forward(module, weight, eps)  # type: ignore[method-assign]
            elif isinstance(module, Oracle):
                names[f"{name}.bias"] = ""
        before = scope["run"](old)
    after_scope = load(new_text)
    new = after_scope["Net"]().double()
    state = {names.get(name, name): value for name, value in old.state_dict().items() if names.get(name, name)}
    new.load_state_dict(state)
    return old, new, before, after_scope["run"](new)


def check_equal(old_text: str, new_text: str) -> None:
    old, new, before, after = old_and_new(old_text, new_text)
    assert torch.allclose(before, after, atol=1e-12, rtol=0)
    weights = torch.randn_like(before)
    for output in (before, after):
        (output * weights).sum().backward()
    gradients = dict(old.named_parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in new.parameters())
    for name, parameter in new.named_parameters():
        if name in gradients:
            wanted = gradients[name].grad
            assert wanted is not None and parameter.grad is not None
            assert torch.allclose(wanted, parameter.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", FORMS | WRITTEN_OUT)
def test_every_norm_is_one_of_size_alone_and_nothing_else_changes(form: str, tmp_path: Path):
    text = (FORMS | WRITTEN_OUT)[form]
    new = rewritten(tmp_path, text)
    check_equal(text, new)
    assert not any(type(m) is nn.LayerNorm for m in load(new)["Net"]().modules())


def test_classes_written_out_go_with_what_only_they_needed(tmp_path: Path):
    new = rewritten(
        tmp_path,
        WRITTEN_OUT["the variance, of a configuration"].replace(
            'OWN["Norm"] = ("gamma", "beta", "variance_epsilon")', ""
        ),
    )
    assert "class Norm" not in new and "nn.RMSNorm(Settings.width, eps=1e-12)" in new


def test_an_import_that_nothing_needs_any_more_goes(tmp_path: Path):
    assert "LayerNorm" not in rewritten(tmp_path, FORMS["imported by name"])


def test_lists_of_classes_know_the_new_one(tmp_path: Path):
    scope = load(rewritten(tmp_path, FORMS["initialised and grouped by class"]))
    decay, rest = scope["Net"]().groups()
    assert "final.weight" in rest and "head.weight" in decay


def test_a_question_for_the_class_that_fills_weights_alone_knows_the_new_one(tmp_path: Path):
    text = FORMS["initialised and grouped by class"].replace("            nn.init.zeros_(module.bias)\n", "")
    text = text.replace("nn.init.ones_(module.weight)", "nn.init.constant_(module.weight, 0.25)")
    net = load(rewritten(tmp_path, text))["Net"]()
    assert bool((net.final.weight == 0.25).all())


def test_the_report_says_what_of_the_formula_is_gone(tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(WRITTEN_OUT["the deviation, unbiased"])
    (site,) = [s for s in apply(path).sites if s.status is Status.DONE]
    assert any("unbiased" in note and "eps" in note for note in site.notes)
    assert any("`a_2` is `weight` now" in note for note in site.notes)


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_told_is_refused_and_nothing_is_written(form: str, tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(REFUSED[form])
    load(REFUSED[form])["Net"]()  # it is a program that runs
    report = apply(path)
    assert statuses(report) == {Status.REFUSED}, report.sites
    assert path.read_text() == REFUSED[form]


@pytest.mark.parametrize("form", UNTOUCHED)
def test_programs_that_do_not_attend_are_no_sites(form: str, tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(UNTOUCHED[form])
    assert not apply(path).sites and path.read_text() == UNTOUCHED[form]


def test_a_refused_norm_leaves_the_others_to_be_done(tmp_path: Path):
    text = own("nn.LayerNorm(dim)", net=NET + "\n\ndef penalty(net):\n    return net.final.bias.sum()\n")
    path = tmp_path / "program.py"
    path.write_text(text)
    assert statuses(apply(path)) == {Status.DONE, Status.REFUSED}
    assert path.read_text().count("nn.LayerNorm") == 1


def test_norms_in_a_file_that_was_not_named_stay_and_it_is_named(tmp_path: Path):
    (tmp_path / "parts.py").write_text(
        HEAD + ATTENTION + BLOCK.replace("NORM1", "nn.LayerNorm(dim)").replace("NORM2", "nn.LayerNorm(dim)")
    )
    model = tmp_path / "model.py"
    model.write_text("from parts import *\n" + NET.replace("NORM3", "nn.LayerNorm(dim)"))
    old = (tmp_path / "parts.py").read_text()
    report = apply(model)
    assert (tmp_path / "parts.py").read_text() == old
    assert any("parts.py" in site.message for site in report.sites if site.status is Status.REFUSED)


def test_check_finds_what_apply_does(tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(FORMS["by name"])
    (site,) = check([path], select(["rmsnorm"]), {}).sites
    assert site.status is Status.LEGACY and "3 layer norms" in site.message


TORCH_LAYERS = (
    HEAD
    + """
class Net(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        MADE

    def forward(self, tokens):
        x = self.embedding(tokens)
        return CALLED


def run(net):
    return net.eval()(torch.arange(12).view(2, 6) % 11)
"""
)
LAYER = "nn.TransformerEncoderLayer(dim, 2, 16, 0.0, batch_first=True, ARGS)"
STACKS = {
    "encoder": (f"self.encoder = nn.TransformerEncoder({LAYER}, 2, nn.LayerNorm(dim), enable_nested_tensor=False)", "self.encoder(x)"),
    "decoder": (f"self.decoder = nn.TransformerDecoder({LAYER.replace('Encoder', 'Decoder')}, 2)", "self.decoder(x, x)"),
    "transformer": ("self.whole = nn.Transformer(dim, 2, 1, 1, 16, 0.0, batch_first=True, ARGS)", "self.whole(x, x)"),
}  # fmt: skip


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_torchs_layers_become_ours_with_rms_norms(stack: str, first: bool, tmp_path: Path):
    made, called = STACKS[stack]
    text = TORCH_LAYERS.replace("MADE", made.replace("ARGS", f"norm_first={first}")).replace("CALLED", called)
    new = rewritten(tmp_path, text)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        check_equal(text, new)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
