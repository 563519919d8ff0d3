"""Pieces of source text: a unit is one top-level definition, a class is built from its two methods."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SIZES = {
    "vocab_size": "17",
    "d_model": "16",
    "n_heads": "2",
    "d_ff": "32",
    "n_layers": "2",
    "dropout": "0.1",
    "max_len": "12",
}


@dataclass(frozen=True)
class Unit:
    """A top-level definition: the names it defines, which file it would live in, its text."""

    names: tuple[str, ...]
    home: str  # "config", "common", "position", "attention", "feed_forward", "layers", "model"
    text: str


@dataclass(frozen=True)
class Sizes:
    """How hyper-parameters reach the classes: as arguments, in a config object, or as module globals."""

    style: str

    def signature(self, params: Sequence[str], more: str = "") -> str:
        names = {"arguments": list(params), "config": ["config"], "globals": []}[self.style]
        return ", ".join(["self", *names, *filter(None, [more])])

    def make(self, name: str, params: Sequence[str], more: str = "") -> str:
        """The expression that constructs a class whose `__init__` has these sizes."""
        names = {"arguments": list(params), "config": ["config"], "globals": []}[self.style]
        return f"{name}({', '.join([*names, *filter(None, [more])])})"

    def inside(self, line: str) -> str:
        """A line of `__init__`, in which the sizes are spelled as they are known there."""
        if self.style != "config":
            return line
        return re.sub(rf"(?<![\w.\"'])({'|'.join(SIZES)})\b(?!\s*=[^=])", r"config.\1", line)

    def unit(self) -> list[Unit]:
        if self.style == "globals":
            return [Unit(tuple(SIZES), "config", "\n".join(f"{name} = {value}" for name, value in SIZES.items()))]
        if self.style == "arguments":
            return []
        lines = [f"{name}: {'float' if '.' in value else 'int'} = {value}" for name, value in SIZES.items()]
        return [Unit(("Config",), "config", "\n".join(["@dataclass", "class Config:", *indented(lines)]))]

    def build(self, name: str) -> str:
        """The expression that builds the whole model from outside."""
        if self.style == "arguments":
            return f"{name}({', '.join(f'{size}={value}' for size, value in SIZES.items())})"
        return f"{name}(Config())" if self.style == "config" else f"{name}()"


def indented(lines: Sequence[str], depth: int = 1) -> list[str]:
    return [f"{'    ' * depth}{line}" if line else "" for line in lines]


def module(
    name: str,
    home: str,
    sizes: Sizes,
    params: Sequence[str],
    init: Sequence[str],
    arguments: str,
    forward: Sequence[str],
    more: str = "",
) -> Unit:
    """A module class. `init` and `forward` are the lines of its methods, `more` further constructor arguments."""
    lines = [
        f"class {name}(nn.Module):",
        *indented([f"def __init__({sizes.signature(params, more)}):"]),
        *indented(["super().__init__()", *map(sizes.inside, init)], 2),
        "",
        *indented([f"def forward(self, {arguments}):"]),
        *indented(list(forward), 2),
    ]
    return Unit((name,), home, "\n".join(lines))


CLONES = Unit(
    ("clones",),
    "common",
    "def clones(module, n):\n    return nn.ModuleList([copy.deepcopy(module) for _ in range(n)])",
)


def joined(*parts: str) -> str:
    """Arguments or parameters, those that are not empty."""
    return ", ".join(filter(None, parts))
