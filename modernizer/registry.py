"""Finds the rules: every module of the package `codemods`, and the entry points of the group `modernizer.rules`."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import codemods
from modernizer.rule import Option, Rule

GROUP = "modernizer.rules"


class RegistryError(Exception):
    """The rules cannot be loaded, or there is none of a name. `str()` of it is a sentence for the user."""


@functools.cache
def all_rules() -> Mapping[str, Rule]:
    """Every rule by name, sorted. Raises RegistryError where two share a name or one cannot be imported."""
    rules: dict[str, Rule] = {}
    for rule in [*_shipped(), *_installed()]:
        if rule.name in rules:
            first, second = (type(one).__module__ for one in (rules[rule.name], rule))
            raise RegistryError(f"two rules are called {rule.name}: one in {first}, one in {second}")
        rules[rule.name] = rule
    return dict(sorted(rules.items()))


def select(names: Sequence[str]) -> list[Rule]:
    """The rules of these names in the order given; for no name at all, all but those that only run on request."""
    rules = all_rules()
    for name in names:
        if name not in rules:
            close = difflib.get_close_matches(name, rules, n=1)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(rules) or 'none'}"
            raise RegistryError(f"no rule is called {name!r}: {meant}")
    return (
        [rules[name] for name in dict.fromkeys(names)]
        if names
        else [rule for rule in rules.values() if not rule.on_request]
    )


def all_options() -> list[Option]:
    """The switches of all rules, each once."""
    return list({option.name: option for rule in all_rules().values() for option in rule.options}.values())


def page(rule: Rule) -> str:
    """The Markdown page beside the rule's module, '' where it has none."""
    module = sys.modules[type(rule).__module__]
    file = Path(module.__file__).with_suffix(".md") if module.__file__ else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""


def _shipped() -> Iterator[Rule]:
    for info in pkgutil.iter_modules(codemods.__path__, "codemods."):
        name = info.name.rpartition(".")[2]
        if name.startswith("_"):
            continue  # helpers that rules share
        rules = _rules_of(importlib.import_module(info.name))
        if [rule.name for rule in rules] != [name]:
            raise RegistryError(f"{info.name}: a rule's file holds one rule, called as the file, but here {rules}")
        yield from rules


def _installed() -> Iterator[Rule]:
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            loaded = point.load()
        except Exception as error:
            raise RegistryError(f"rule {point.name} of {point.value} cannot be loaded: {error}") from error
        yield from _rules_of(loaded) if isinstance(loaded, ModuleType) else _instances([loaded])


def _rules_of(module: ModuleType) -> list[Rule]:
    return list(
        _instances(item for item in vars(module).values() if getattr(item, "__module__", "") == module.__name__)
    )


def _instances(classes: Iterable[object]) -> Iterator[Rule]:
    for item in classes:
        if isinstance(item, type) and issubclass(item, Rule) and hasattr(item, "name"):
            yield item()
