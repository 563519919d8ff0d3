"""The grammar tells the truth about its programs, and the rules break none of 200 of them; `make fuzz` tries more."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from .checks import RUNS, Before, outcome
from .choices import DIMENSIONS, Choice, fitted
from .compose import Program, compose
from .fuzz import ready
from .labels import untrue_labels
from .running import float64, load
from .strategy import programs, random_choice

SETTINGS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def small_models() -> Iterator[None]:
    """One thread, as torch's many are slower here; no fast path, which treats padding in its own way."""
    threads, collects = torch.get_num_threads(), gc.get_threshold()
    ready()
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(True)
    gc.set_threshold(*collects)


def labels(program: Program) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, float64():
        program.write(Path(folder))
        return untrue_labels(load(program, Path(folder)))


@pytest.mark.parametrize(
    ("dimension", "value"), [(name, value) for name, values in DIMENSIONS.items() for value in values]
)
def test_labels_are_true_of_every_idiom_on_its_own(dimension: str, value: str) -> None:
    context = {"position": "learned"} if dimension.startswith("position_") else {}
    program = compose(Choice(**{**context, dimension: value}))
    assert labels(program) == []


@pytest.mark.parametrize("batch", range(4))
def test_labels_are_true_of_combinations(batch: int) -> None:
    @seed(batch)
    @settings(SETTINGS, max_examples=75)
    @given(programs())
    def check(program: Program) -> None:
        assert labels(program) == []

    check()


@pytest.mark.parametrize("batch", range(40))
def test_rules_break_no_program(batch: int) -> None:
    for number in range(5):
        choice = random_choice(Random(f"{batch}:{number}"))
        before = Before(compose(choice))
        for rules in RUNS:
            made = outcome(before, rules)
            assert not made.failed, (choice.differing(), made)


def test_programs_shrink_to_the_simplest() -> None:
    assert fitted(Choice()) == Choice()
    assert Choice(**{name: values[0] for name, values in DIMENSIONS.items()}) == Choice()


@pytest.mark.parametrize(
    "choice",
    [
        Choice(architecture="seq2seq", residual="post_inline", attention="torch_layer", mask="additive"),
        Choice(architecture="decoder", residual="post_inline", mask="additive", causal_home="forward"),
    ],
    ids=["torch_layer", "decoder"],
)
def test_prenorm_is_judged_where_masks_are_made_on_the_way(choice: Choice) -> None:
    made = outcome(Before(compose(choice)), ("prenorm",))
    assert not made.failed, made
    assert made.verdict == "upgraded"


def test_prenorm_is_judged_where_no_block_is_a_module_and_the_embedding_ends_in_a_norm() -> None:
    choice = Choice(residual="post_inline", container="parallel", embedding_norm="yes")
    made = outcome(Before(compose(choice)), ("prenorm",))
    assert not made.failed, made
    assert made.verdict == "upgraded"
