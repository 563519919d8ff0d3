"""What the tests of `rope` and `alibi` share: apply a rule, load the result, look at what the model does."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import torch

from modernizer import pipeline
from modernizer.report import Report
from modernizer.rule import Rule

_numbers = itertools.count()


def rewritten(folder: Path, text: str, rule: Rule) -> tuple[str, Report]:
    """The program after the rule, which must find nothing more to do in it."""
    path = folder / "program.py"
    path.write_text(text)
    report = pipeline.upgrade([path], [rule], {})
    assert not report.problems, report.problems
    after = path.read_text()
    again = pipeline.upgrade([path], [rule], {})
    assert path.read_text() == after and not again.changes
    return after, report


def loaded(folder: Path, text: str) -> ModuleType:
    path = folder / f"loaded_{next(_numbers)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokens() -> torch.Tensor:
    return torch.randint(1, 23, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def spread_over_time(model: torch.nn.Module) -> float:
    """How much the output differs from step to step where all tokens are one."""
    out = model(torch.full((2, 9), 5))
    return (out - out[:, :1]).abs().max().item()


@torch.no_grad()
def feels_order(model: torch.nn.Module) -> float:
    """How much the last step's output moves when earlier tokens change places."""
    ids, order = tokens(), torch.tensor([3, 1, 2, 0, 4, 5, 6, 7, 8])
    return (model(ids)[:, 8] - model(ids[:, order])[:, 8]).abs().max().item()


def without_gradient(model: torch.nn.Module) -> list[str]:
    out = model(tokens())
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def check_relative(folder: Path, before: str, after: str) -> None:
    """The rewritten model has no absolute positions, still feels order, keeps shape and all other parameters."""
    old, new = loaded(folder, before).build(), loaded(folder, after).build()
    assert spread_over_time(old) > 1e-2 and spread_over_time(new) < 1e-5
    assert feels_order(new) > 1e-3
    assert old(tokens()).shape == new(tokens()).shape
    assert set(without_gradient(new)) <= set(without_gradient(old))
    kept = {name: p.shape for name, p in new.named_parameters()}
    assert kept.items() <= {name: p.shape for name, p in old.named_parameters()}.items()
    assert not new.state_dict().keys() - old.state_dict().keys()


@torch.no_grad()
def check_shared(folder: Path, before: str, after: str) -> None:
    """The stream forgets its positions, the part without attention keeps its own; both are scaled as they were."""
    old, new = loaded(folder, before).build(), loaded(folder, after).build()
    new.load_state_dict(old.state_dict())
    words = old.tokens(torch.full((2, 9), 5))
    assert torch.equal(old.guess(words.clone()), new.guess(words.clone()))
    for model, is_old in ((old, True), (new, False)):
        out = model.stream(words.clone())
        assert ((out - out[:, :1]).abs().max().item() > 1e-2) == is_old
    seen: list[torch.Tensor] = []
    for model in (old, new):
        handle = model.block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.stream(words.clone())
        handle.remove()
    table = old.position.pe[:, : words.size(1)]
    torch.testing.assert_close(seen[0] - table, seen[1])
    assert feels_order(new) > 1e-3


def example_of(page: Path) -> tuple[str, str]:
    """The fenced blocks `before` and `after` of a rule's page."""
    text = page.read_text()
    blocks = [re.search(rf"```python {name}\n(.*?)```", text, re.DOTALL) for name in ("before", "after")]
    assert all(blocks)
    return blocks[0][1], blocks[1][1]  # type: ignore[index]
