"""prenorm on programs in the forms met in the wild: what they compute afterwards, and which are left alone."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prenorm_more import LEFT, MORE
from prenorm_programs import FORMS
from prenorm_runs import RUNS, RUNS_LEFT
from prenorm_torch_layers import TORCH, TORCH_LEFT, TORCH_MODERN
from prenorm_traps import GOOD, REFUSED, UNTOUCHED

from modernizer import pipeline
from modernizer.registry import select
from modernizer.report import Report, Status
from tests.programs import program

IDS = torch.tensor([[1, 5, 2, 7, 3, 3, 9], [4, 4, 8, 0, 6, 10, 2]])


def apply(*paths: Path) -> Report:
    report = pipeline.upgrade(list(paths), select(["prenorm"]), {})
    assert not report.problems, report.problems
    return report


def statuses(report: Report) -> set[Status]:
    return {site.status for site in report.sites}


def upgraded(tmp_path: Path, text: str) -> str:
    """The program after the rule, which must have done all there was and find nothing more."""
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path)
    assert statuses(report) == {Status.DONE}, [site.message for site in report.sites]
    result = path.read_text()
    assert statuses(apply(path)) <= {Status.MODERN}
    assert path.read_text() == result
    return result


def load(text: str) -> Any:
    module = types.ModuleType("program")
    exec(compile(text, "program", "exec"), module.__dict__)
    return module


def build(module: Any) -> torch.nn.Module:
    """The model with all weights moved, so that no two norms are alike."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors need post-norm
        model: torch.nn.Module = module.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def new_modules(before: torch.nn.Module, after: torch.nn.Module) -> list[str]:
    """The modules whose weights only the upgraded model has; it must have all others under their old names."""
    old, new = set(before.state_dict()), set(after.state_dict())
    assert old <= new
    return sorted({name.rpartition(".")[0] for name in new - old})


def twin(module: Any, model: torch.nn.Module, finals: list[str]) -> torch.Tensor | None:
    """What the pre-norm form of a program computes, written without the program's own blocks."""
    if hasattr(module, "twin"):
        expected: torch.Tensor = module.twin(model, IDS)
        return expected
    if not hasattr(module, "parts"):
        return None
    (final,) = finals
    start, pairs, head = module.parts(model)
    x = start(IDS)
    for norm, sublayer in pairs:
        x = x + sublayer(norm(x))
    result: torch.Tensor = head(model.get_submodule(final)(x))
    return result


def assert_gradients(model: torch.nn.Module, output: torch.Tensor) -> None:
    torch.autograd.backward(output.square().sum())
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("text", [*FORMS.values(), *MORE.values(), *RUNS.values()], ids=[*FORMS, *MORE, *RUNS])
def test_form_becomes_its_prenorm_twin(text: str, tmp_path: Path) -> None:
    result = upgraded(tmp_path, text)
    module = load(result)
    model = build(module)
    finals = new_modules(build(load(text)), model)
    output = model(IDS)
    expected = twin(module, model, finals)
    if expected is not None:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert_gradients(model, output)


@pytest.mark.parametrize("text", TORCH.values(), ids=TORCH)
def test_layers_of_torch_are_prenorm_and_end_in_a_norm(text: str, tmp_path: Path) -> None:
    module = load(upgraded(tmp_path, text))
    model = build(module)
    layers = [m for m in model.modules() if hasattr(m, "norm_first")]
    assert layers and all(layer.norm_first for layer in layers)
    new_modules(build(load(text)), model)
    with torch.no_grad():
        model.get_submodule("embed").weight.mul_(100)  # type: ignore[operator]
    assert model(IDS).std() < 20, "the stack does not end in a norm"
    assert_gradients(model, model(IDS))


ALL_REFUSED = {**REFUSED, **LEFT, **RUNS_LEFT, **{f"torch: {name}": text for name, text in TORCH_LEFT.items()}}


@pytest.mark.parametrize("text", ALL_REFUSED.values(), ids=ALL_REFUSED)
def test_refused_with_a_reason_and_untouched(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path)
    assert Status.REFUSED in statuses(report) and Status.DONE not in statuses(report)
    assert not any("ours to fix" in site.message for site in report.sites)
    assert path.read_text() == text


@pytest.mark.parametrize("text", [*UNTOUCHED.values(), *TORCH_MODERN.values()], ids=[*UNTOUCHED, *TORCH_MODERN])
def test_nothing_to_do(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(text)
    assert statuses(apply(path)) <= {Status.MODERN}
    assert path.read_text() == text


def test_layer_in_a_file_that_was_not_named_is_refused(tmp_path: Path) -> None:
    head, _, tail = GOOD.partition("\n\nclass Model")
    (tmp_path / "blocks.py").write_text(head)
    model = tmp_path / "model.py"
    model.write_text("from blocks import *\n\n\nclass Model" + tail)
    assert statuses(apply(model)) == {Status.REFUSED}
    assert statuses(apply(tmp_path)) == {Status.DONE}


@pytest.mark.parametrize("name", ["char_gpt", "bert_encoder", "translator", "torch_layers_lm"])
def test_whole_program(name: str, tmp_path: Path) -> None:
    original = program(name)
    copy = original.copy(tmp_path)
    assert statuses(apply(*copy.targets)) == {Status.DONE}
    assert statuses(apply(*copy.targets)) == {Status.MODERN}
    with original.case() as case:
        before, inputs = case.build(), case.inputs()
        shape = case.call(before, inputs).shape
    with copy.case() as case:
        after = case.build()
        output = case.call(after, inputs)
        assert_large_embeddings_do_not_show(lambda: case.call(after, inputs), after)
    assert output.shape == shape and output.isfinite().all()
    assert len(new_modules(before, after)) == (2 if name == "translator" else 1)
    assert_gradients(after, output)


def assert_large_embeddings_do_not_show(call: Callable[[], torch.Tensor], model: torch.nn.Module) -> None:
    """A stack that ends in a norm puts out the same scale however large its stream is."""
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    with torch.no_grad():
        small = call().std()
        for table in tables:
            table.mul_(100)
        large = call().std()
        for table in tables:
            table.div_(100)
    assert large < 25 * small


def test_program_that_only_says_it_is_postnorm_stays(tmp_path: Path) -> None:
    copy = program("latent_drift_trajectory").copy(tmp_path)
    texts = [path.read_bytes() for path in copy.targets]
    assert statuses(apply(*copy.targets)) == {Status.MODERN}
    assert [path.read_bytes() for path in copy.targets] == texts
