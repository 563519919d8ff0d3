"""How programs are drawn from the grammar: by Hypothesis, or by a random number generator for long runs."""

from __future__ import annotations

from random import Random

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


def random_choice(random: Random) -> Choice:
    """Any combination, every value of a dimension as likely as any other."""
    return fitted(Choice(**{name: random.choice(options) for name, options in DIMENSIONS.items()}))
