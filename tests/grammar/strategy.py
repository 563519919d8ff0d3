"""Hypothesis strategies over the grammar."""

from __future__ import annotations

from hypothesis import strategies as st

from .choices import DIMENSIONS, Choice, fitted
from .compose import Program, compose


def choices() -> st.SearchStrategy[Choice]:
    """Any combination; what does not go together is made to. Shrinks to the simplest value of every dimension."""
    values = {name: st.sampled_from(options) for name, options in DIMENSIONS.items()}
    return st.builds(Choice, **values).map(fitted)


def programs() -> st.SearchStrategy[Program]:
    """Whole legacy programs."""
    return choices().map(compose)
