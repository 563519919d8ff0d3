"""From a choice to a program: its files, how it is built and called, and what is true of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .choices import Choice, fitted
from .facts import Facts, expected
from .parts.files import files
from .parts.models import model
from .parts.naming import classes, renamed
from .parts.noise import noisy
from .parts.text import Sizes, Unit

VOCAB, TIME, BATCH = 17, 6, 2


@dataclass(frozen=True)
class Program:
    """A legacy program. `setup` imports and builds `model`, `call` gives its output from the tensors `inputs` names."""

    choice: Choice
    files: Mapping[str, str]
    setup: str
    call: str
    inputs: tuple[str, ...]
    causal_input: str
    time_dim: int | None
    facts: Facts
    expected: Mapping[str, str]

    def write(self, folder: Path) -> list[Path]:
        """Writes the files byte for byte; returns what a rule is pointed at."""
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        return [folder / "net"] if self.choice.files == "package" else [folder / name for name in self.files]

    def __repr__(self) -> str:
        """The choice and the text: what a failing test has to show."""
        shown = "\n".join(f"# --- {name}\n{text}" for name, text in self.files.items())
        return f"Program({self.choice.differing()})\n{shown}"


def compose(choice: Choice) -> Program:
    """The program of a choice, after those of its parts that do not go together were changed to ones that do."""
    choice = fitted(choice)
    sizes = Sizes(choice.sizes)
    made = model(choice, sizes)
    names = classes(choice.naming, choice.order)
    units = [_finished(unit, choice) for unit in made.units]
    texts = files(units, choice.files, dict(names))
    top = names.get("TransformerModel", "TransformerModel")
    home = "net" if choice.files == "package" else "model"
    wanted = f"{top}, Config" if sizes.style == "config" else top
    config = "" if choice.files != "flat" or sizes.style != "config" else "from config import Config\n"
    setup = f"{config}from {home} import {top if config else wanted}\nmodel = {sizes.build(top)}"
    inputs = ("src", "tgt") if choice.has_cross else ("ids",)
    inputs += ("features",) if choice.architecture == "shared_positions" else ()
    return Program(
        choice,
        {name: noisy(text, choice.noise, choice.super) for name, text in texts.items()},
        setup,
        f"model({', '.join(inputs)})",
        inputs,
        "tgt" if choice.has_cross else "ids",
        1 if choice.output == "tokens" else None,
        Facts.of(choice, names.get(made.block_name, made.block_name)),
        expected(choice),
    )


def _finished(unit: Unit, choice: Choice) -> Unit:
    return Unit(unit.names, unit.home, renamed(unit.text, choice.naming, choice.order))
