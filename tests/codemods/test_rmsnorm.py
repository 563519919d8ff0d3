"""`rmsnorm`: rewritten programs are run beside the old ones, whose norms an oracle computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from rmsnorm_programs import (
    ATTENTION,
    BLOCK,
    EXACT,
    FORMS,
    HEAD,
    NET,
    NOT_EXACT,
    REFUSED,
    UNTOUCHED,
    WRITTEN_OUT,
    own,
)
from torch import Tensor, nn

from modernizer.cli import main
from modernizer.pipeline import check, upgrade
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.rule import Effect
from modernizer.weights import MapError, WeightMap
from modernizer.weights.apply import carry


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


@pytest.mark.parametrize("form", ["by name", "post-norm"])
def test_code_that_goes_by_the_name_of_the_class_is_named(form: str, tmp_path: Path):
    path = tmp_path / "program.py"
    path.write_text(
        FORMS[form]
        + "\n\ndef fill(m):\n    if type(m).__name__.find('LayerNorm') != -1:\n        m.weight.data.fill_(2)\n"
    )
    (site,) = [s for s in apply(path).sites if s.status is Status.DONE]
    assert any("by the name of their class" in note for note in site.notes)


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


# -- the outputs stay


def upgraded(folder: Path, text: str) -> tuple[str, WeightMap | None, Report]:
    path = folder / "program.py"
    path.write_text(text)
    report = apply(path)
    new = path.read_text()
    assert Status.DONE in statuses(report), report.sites
    assert Status.DONE not in statuses(apply(path)) and path.read_text() == new
    return new, report.weights, report


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def with_state(scope: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    net = scope["Net"]().double().eval()
    assert isinstance(net, nn.Module)
    net.load_state_dict(dict(state))
    return net


def gap(first: Tensor, second: Tensor) -> float:
    return float(((first - second).abs().max() / first.abs().max()).detach())


@pytest.mark.parametrize("form", EXACT)
def test_a_pre_norm_model_keeps_its_outputs_with_the_weights_carried_over(form: str, tmp_path: Path):
    new_text, weights, report = upgraded(tmp_path, EXACT[form])
    assert weights is not None and {s.effect for s in report.sites if s.status is Status.DONE} == {Effect.EXACT}
    old_scope, new_scope = load(EXACT[form]), load(new_text)
    state = state_of(moved(old_scope["Net"]()))
    old = with_state(old_scope, state)
    new = with_state(new_scope, carry(weights, state).state)
    assert not any(isinstance(m, nn.LayerNorm) for m in new.modules())
    assert gap(old_scope["run"](old), new_scope["run"](new)) <= 1e-12
    back = carry(weights.inverted(), state_of(new), state).state
    assert back.keys() == state.keys()
    assert gap(old_scope["run"](old), old_scope["run"](with_state(old_scope, back))) <= 1e-11


@pytest.mark.parametrize("form", ["by name", "heads without biases", "two streams", "layers of the program's own"])
def test_gradients_are_those_of_the_old_model_through_the_map(form: str, tmp_path: Path):
    """A step in the old weights changes the loss as the step that the map makes of it changes that of the new ones."""
    new_text, weights, _ = upgraded(tmp_path, EXACT[form])
    assert weights is not None
    old_scope, new_scope = load(EXACT[form]), load(new_text)
    state = state_of(moved(old_scope["Net"]()))
    torch.manual_seed(1)
    step = {name: 1e-4 * torch.randn_like(value) for name, value in state.items()}
    ahead, behind = ({n: v + sign * step[n] for n, v in state.items()} for sign in (1, -1))
    first, second = carry(weights, ahead).state, carry(weights, behind).state
    moves = {name: (first[name] - second[name]) / 2 for name in first}
    slopes = []
    pairs = (
        (with_state(old_scope, state), old_scope, step),
        (with_state(new_scope, carry(weights, state).state), new_scope, moves),
    )
    for net, scope, along in pairs:
        output = scope["run"](net)
        (
            output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
        ).sum().backward()
        slopes.append(
            sum(float((p.grad * along[name]).sum()) for name, p in net.named_parameters() if p.grad is not None)
        )
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)


@pytest.mark.parametrize("form", NOT_EXACT)
def test_where_outputs_cannot_be_kept_the_effect_says_so_and_why(form: str, tmp_path: Path):
    new_text, weights, report = upgraded(tmp_path, NOT_EXACT[form])
    (site,) = [s for s in report.sites if s.status is Status.DONE]
    assert weights is None and site.effect is Effect.PARAMETERS
    assert any(note.startswith("not exact: ") and len(note) > 25 for note in site.notes)
    scope = load(new_text)
    assert torch.isfinite(scope["run"](scope["Net"]().double())).all()


def test_migrate_carries_a_checkpoint_over_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = EXACT["heads without biases"]
    (tmp_path / "program.py").write_text(text)
    run = CliRunner()
    done = run.invoke(main, ["apply", "--rule", "rmsnorm", "program.py"])
    assert done.exit_code == 0 and "exact:" in done.output and "--reverse" in done.output, done.output
    scope, new_scope = load(text), load((tmp_path / "program.py").read_text())
    state = state_of(moved(scope["Net"]()))
    torch.save(state, "old.pt")
    assert run.invoke(main, ["migrate", "old.pt", "-o", "new.pt"]).exit_code == 0
    new = with_state(new_scope, torch.load("new.pt"))
    assert gap(scope["run"](with_state(scope, state)), new_scope["run"](new)) <= 1e-12
    assert run.invoke(main, ["migrate", "new.pt", "-o", "back.pt", "--reverse"]).exit_code == 0
    assert gap(scope["run"](with_state(scope, torch.load("back.pt"))), new_scope["run"](new)) <= 1e-11


def test_a_bias_that_was_trained_since_has_no_way_back(tmp_path: Path):
    _, weights, _ = upgraded(tmp_path, EXACT["heads without biases"])
    assert weights is not None
    state = state_of(moved(load(EXACT["heads without biases"])["Net"]()))
    new = carry(weights, state).state
    name = "layers.0.attention.heads.0.key.bias"
    new[name] = new[name] + torch.randn(new[name].shape)
    other = "layers.0.attention.heads.1.value.bias"
    new[other] = new[other] + torch.randn(new[other].shape)
    with pytest.raises(MapError, match="trained since"):
        carry(weights.inverted(), new)


def test_layers_that_are_not_all_alike_are_not_carried_over(tmp_path: Path):
    _, weights, _ = upgraded(tmp_path, EXACT["by name"])
    assert weights is not None
    state = state_of(moved(load(EXACT["by name"])["Net"]()))
    state["layers.2.gate.weight"] = torch.ones(2, 2)
    with pytest.raises(MapError, match="not all alike"):
        carry(weights, state)


@pytest.mark.parametrize("rules", ["rmsnorm,fuseqkv", "fuseqkv,rmsnorm"])
def test_with_fused_projections_the_outputs_stay_too(rules: str, tmp_path: Path):
    text = own("nn.LayerNorm(dim)").replace(
        "self.qkv = nn.Linear(dim, 3 * dim)",
        "self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)",
    ).replace(
        "q, k, v = (p.view(b, t, self.heads, c // self.heads).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))",
        "q = self.q(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)\n"
        "        k = self.k(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)\n"
        "        v = self.v(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)",
    ).replace("self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)",
              "self.q = nn.Linear(dim, dim)\n        self.k = nn.Linear(dim, dim)\n        self.v = nn.Linear(dim, dim)")  # fmt: skip
    path = tmp_path / "program.py"
    path.write_text(text)
    report = apply(path, *rules.split(","))
    assert report.weights is not None and {s.effect for s in report.sites if s.status is Status.DONE} == {Effect.EXACT}
    old_scope, new_scope = load(text), load(path.read_text())
    state = state_of(moved(old_scope["Net"]()))
    new = with_state(new_scope, carry(report.weights, state).state)
    assert gap(old_scope["run"](with_state(old_scope, state)), new_scope["run"](new)) <= 1e-12
