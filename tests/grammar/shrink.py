"""Finds the simplest program that still fails in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .checks import Before, Outcome, outcome
from .choices import Choice, fitted
from .compose import compose


def simplest(choice: Choice, fails: Callable[[Choice], bool]) -> Choice:
    """Sets one dimension after the other back to its simplest value while it still fails, until none can be."""
    while True:
        start = choice
        for name in start.differing():
            tried = fitted(replace(choice, **{name: getattr(Choice(), name)}))
            if len(tried.differing()) < len(choice.differing()) and fails(tried):
                choice = tried
        if choice == start:
            return choice


def simplest_failure(choice: Choice, failure: Outcome) -> Choice:
    """The simplest choice with a failure of the same kind."""

    def fails(tried: Choice) -> bool:
        return outcome(Before(compose(tried)), failure.rules).kind == failure.kind

    return simplest(choice, fails)
