"""`rmsnorm` on programs of the grammar: where it says that outputs stay they do, to 1e-10, with all weights moved."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from modernizer import pipeline
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.rule import Effect
from modernizer.weights.apply import carry

from .checks import shake
from .choices import Choice, fitted
from .compose import Program, compose
from .fuzz import ready
from .running import float64, load
from .strategy import random_choice

LIMIT = 1e-10
COUNT = 24
# What a program needs to have a chance of it; all other dimensions are drawn freely.
FITTING = {
    "norm": ("torch", "variance"),
    "embedding_norm": ("no",),
    "final_norm": ("yes",),
    "residual": ("pre_inline", "pre_temporary", "pre_inside", "pre_connection", "pre_star"),
    "attention": ("matmul", "key_transposed", "bmm", "heads", "function", "core_module", "torch_attention"),
    "feed_forward": ("two_linears", "sequential_in_block", "holds_sequential", "in_layer", "module_dict", "gated"),
    "position": ("none", "learned", "sine_adds", "sine_returns", "sliced_parameter", "with_tokens"),
}


@pytest.fixture(autouse=True)
def small_models() -> Iterator[None]:
    threads, collects = torch.get_num_threads(), gc.get_threshold()
    ready()
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(True)
    gc.set_threshold(*collects)


def drawn(random: Random) -> Choice:
    choice = random_choice(random)
    changes = {name: random.choice(values) for name, values in FITTING.items() if getattr(choice, name) not in values}
    return fitted(replace(choice, **changes))


def effects(report: Report) -> set[Effect]:
    return {site.effect for site in report.sites if site.status is Status.DONE}


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-9)) for a, b in pairs)


def checked(program: Program, rules: list[str]) -> bool:
    """Whether the outputs are said to stay; they must then."""
    with tempfile.TemporaryDirectory() as name, float64(), torch.no_grad():
        folder = Path(name)
        paths = program.write(folder)
        old = load(program, folder)
        shake(old)
        state = {key: value.clone() for key, value in old.model.state_dict().items()}
        before = old.outputs()
        report = pipeline.upgrade(paths, select(rules), {})
        assert not report.problems
        if effects(report) != {Effect.EXACT} or report.weights is None:
            return False
        new = load(program, folder)
        new.model.load_state_dict(carry(report.weights, state).state)
        assert difference(before, new.outputs()) <= LIMIT
        return True


@pytest.mark.parametrize("rules", ["rmsnorm", "fuseqkv,rmsnorm"])
def test_where_outputs_are_said_to_stay_they_do(rules: str) -> None:
    kept = [checked(compose(drawn(Random(f"{rules} {number}"))), rules.split(",")) for number in range(COUNT)]
    assert sum(kept) >= COUNT // 6  # enough of them are proved that this says something
