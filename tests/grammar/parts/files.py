"""Spreads definitions over files, with the imports that each needs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .text import Unit

STANDARD = {
    r"\bcopy\.": "import copy",
    r"\bmath\.": "import math",
    r"@dataclass": "from dataclasses import dataclass",
    r"\bnp\.": "import numpy as np",
    r"\btorch\.": "import torch",
    r"\bnn\.": "import torch.nn as nn",
    r"\bF\.": "import torch.nn.functional as F",
}
ORDER = ("config", "common", "position", "attention", "feed_forward", "layers", "model")
FILE_NAMES = {"common": "common", "position": "embedding", "feed_forward": "feedforward"}


def distinct(units: Sequence[Unit]) -> list[Unit]:
    """Every definition once, in the order in which files are read."""
    once = list({unit.text: unit for unit in units}.values())
    return sorted(once, key=lambda unit: ORDER.index(unit.home))


def files(units: Sequence[Unit], layout: str, name_of: dict[str, str]) -> dict[str, str]:
    """Path -> text. `name_of` says what a unit's names have become in its text."""
    units = distinct(units)
    if layout == "one":
        return {"model.py": _file(units, [])}
    homes = [home for home in ORDER if any(unit.home == home for unit in units)]
    where = {name_of.get(n, n): u.home for u in units for n in u.names}
    folder, dot = ("net/", ".") if layout == "package" else ("", "")
    made = {}
    for home in homes:
        own = [unit for unit in units if unit.home == home]
        text = "\n".join(unit.text for unit in own)
        needed: dict[str, list[str]] = {}
        for name, at in where.items():
            if at != home and re.search(rf"(?<![\w.]){name}\b", text):
                needed.setdefault(at, []).append(name)
        lines = [f"from {dot}{_file_name(at)} import {', '.join(sorted(needed[at]))}" for at in homes if at in needed]
        made[f"{folder}{_file_name(home)}.py"] = _file(own, lines)
    if layout == "package":
        top = name_of.get("TransformerModel", "TransformerModel")
        config = "from .config import Config\n" if "Config" in where else ""
        made["net/__init__.py"] = f"{config}from .model import {top}\n"
    return made


def _file_name(home: str) -> str:
    return FILE_NAMES.get(home, home)


def _file(units: Sequence[Unit], imports: Sequence[str]) -> str:
    body = "\n\n\n".join(unit.text for unit in units)
    standard = [line for pattern, line in STANDARD.items() if re.search(pattern, body)]
    groups = [standard, list(imports)]
    head = "\n\n".join("\n".join(group) for group in groups if group)
    return f"{head}\n\n\n{body}\n" if head else f"{body}\n"
