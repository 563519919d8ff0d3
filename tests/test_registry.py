"""How rules are found, and what is said when one is not."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import codemods
from modernizer.registry import RegistryError, all_options, all_rules, page, select

RULE = """
from modernizer.rule import Effect, Option, Plan, Rule

class {name}(Rule):
    name = "{called}"
    summary = "does nothing"
    effect = Effect.EXACT
    options = (Option("keep_{called}", "Keeps it."),)

    def plan(self, model, options):
        return Plan()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The rules are those of this folder alone."""
    monkeypatch.setattr(codemods, "__path__", [str(tmp_path)])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    for name in [name for name in sys.modules if name.startswith("codemods.")]:
        monkeypatch.delitem(sys.modules, name)
    all_rules.cache_clear()
    yield tmp_path
    all_rules.cache_clear()
    for name in [name for name in sys.modules if name.startswith("codemods.")]:
        del sys.modules[name]


def add(folder: Path, name: str, called: str | None = None) -> None:
    (folder / f"{name}.py").write_text(RULE.format(name=name.title(), called=called or name))


class Point:
    """An entry point, as far as the registry looks at one."""

    name = "extra"
    value = "somewhere:Extra"

    def __init__(self, loaded: object) -> None:
        self.loaded = loaded

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def install(monkeypatch: pytest.MonkeyPatch, loaded: object) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point(loaded)])


def test_every_file_of_the_package_is_a_rule(folder: Path) -> None:
    add(folder, "beta")
    add(folder, "alpha")
    (folder / "_shared.py").write_text("raise SystemExit('helpers are not loaded as rules')")
    assert list(all_rules()) == ["alpha", "beta"]


def test_rule_called_otherwise_than_its_file(folder: Path) -> None:
    add(folder, "alpha", called="omega")
    with pytest.raises(RegistryError, match=r"codemods\.alpha: a rule's file holds one rule, called as the file"):
        all_rules()


def test_file_without_a_rule(folder: Path) -> None:
    (folder / "alpha.py").write_text("from modernizer.rule import Rule\n")
    with pytest.raises(RegistryError, match=r"codemods\.alpha"):
        all_rules()


def test_installed_rule_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder, "alpha")
    extra = type(all_rules()["alpha"])
    all_rules.cache_clear()
    (folder / "alpha.py").unlink()
    install(monkeypatch, extra)
    assert isinstance(all_rules()["alpha"], extra)


def test_two_rules_of_one_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder, "alpha")
    install(monkeypatch, type(all_rules()["alpha"]))
    all_rules.cache_clear()
    with pytest.raises(RegistryError, match=r"two rules are called alpha: one in codemods\.alpha"):
        all_rules()


def test_installed_rule_that_cannot_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ImportError("no module named gone"))
    with pytest.raises(RegistryError, match="rule extra of somewhere:Extra cannot be loaded: no module named gone"):
        all_rules()


def test_selection_keeps_the_order_given_and_drops_repeats(folder: Path) -> None:
    add(folder, "alpha")
    add(folder, "beta")
    assert [rule.name for rule in select(["beta", "alpha", "beta"])] == ["beta", "alpha"]


def test_no_names_select_all(folder: Path) -> None:
    add(folder, "alpha")
    assert [rule.name for rule in select([])] == ["alpha"]


@pytest.mark.parametrize(
    ("asked", "says"), [("alfa", "did you mean alpha?"), ("zzz", "there are alpha")], ids=["close", "far"]
)
def test_unknown_name(folder: Path, asked: str, says: str) -> None:
    add(folder, "alpha")
    with pytest.raises(RegistryError, match=rf"no rule is called '{asked}'.*{says.rstrip('?')}"):
        select([asked])


def test_options_of_all_rules_come_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder, "alpha")
    add(folder, "beta")
    monkeypatch.setattr(type(all_rules()["beta"]), "options", type(all_rules()["alpha"]).options)
    assert [option.name for option in all_options()] == ["keep_alpha"]


def test_page_lies_beside_the_rule(folder: Path) -> None:
    add(folder, "alpha")
    assert page(all_rules()["alpha"]) == ""
    (folder / "alpha.md").write_text("# alpha\n", encoding="utf-8")
    assert page(all_rules()["alpha"]) == "# alpha\n"


def test_a_rule_on_request_is_taken_only_by_its_name(folder: Path) -> None:
    add(folder, "usual")
    add(folder, "asked")
    path = folder / "asked.py"
    path.write_text(path.read_text().replace("    options", "    on_request = True\n    options"))
    assert [rule.name for rule in select([])] == ["usual"]
    assert [rule.name for rule in select(["asked", "usual"])] == ["asked", "usual"]
