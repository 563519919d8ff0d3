"""The weight maps that `apply` leaves beside a program: where they lie, in which order, and what the next is called."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from modernizer.weights.maps import MapError, WeightMap, compose

FOLDER = Path(".modernizer", "weights")
MARKERS = (".git", ".hg", "pyproject.toml", "setup.py", "setup.cfg")  # what the folder of a whole project holds

_NAME = re.compile(r"(\d{4,})-.*\.json")


def recorded(start: Path) -> list[Path]:
    """The maps recorded in `start` or the nearest folder above that has any, in the order of the upgrades."""
    for folder in (start, *start.parents):
        found = dict(_maps(folder))
        if found:
            return [found[number] for number in sorted(found)]
    return []


def load_maps(paths: Sequence[Path]) -> WeightMap:
    """The maps in these files as one, in their order. Raises MapError, which names the file."""
    maps: list[WeightMap] = []
    for path in paths:
        try:
            maps.append(WeightMap.from_json(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, MapError) as error:
            raise MapError(f"{path}: {error}") from error
    return compose(maps)


def next_map(home: Path, rules: Iterable[str]) -> Path:
    """The file for the map of an upgrade by `rules`: `.modernizer/weights/0001-fuseqkv.json` in `home`, then 0002 …"""
    number = max((number for number, _ in _maps(home)), default=0) + 1
    return home / FOLDER / f"{number:04}-{'+'.join(rules)}.json"


def home_of(paths: Sequence[Path], working: Path) -> Path:
    """The folder in which the map of these files is recorded.

    The working folder where all lie below it, else the nearest folder above all that a project's marker names, else
    the one that holds them all.
    """
    if all(path.is_relative_to(working) for path in paths):
        return working
    common = Path(os.path.commonpath([path.parent for path in paths]))
    marked = (folder for folder in (common, *common.parents) if any((folder / name).exists() for name in MARKERS))
    return next(marked, common)


def _maps(home: Path) -> Iterator[tuple[int, Path]]:
    folder = home / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            yield int(match[1]), path
