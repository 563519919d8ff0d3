"""The copy of a program on which its changes are verified, and which effect is verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_rules import Rename, write

import modernizer.verify
from modernizer.proving import Experiment, mirror, prove, weakest
from modernizer.report import FileChange, Objection, Report, Site, Status
from modernizer.rule import Effect
from modernizer.source import Location, SourceFile
from modernizer.verify import Check, VerifyReport


def test_mirror_links_everything_but_the_changes(tmp_path: Path) -> None:
    root, copy = tmp_path / "root", tmp_path / "copy"
    (root / "package" / "data").mkdir(parents=True)
    copy.mkdir()
    write(root, top="1\n")
    inner, _ = write(root / "package", inner="2\n", other="3\n")
    (root / "package" / "data" / "weights.bin").write_bytes(b"\0")
    changes = [
        FileChange(inner, SourceFile.read(inner), "two\n"),
        FileChange(root / "package" / "fresh.py", None, "new\n"),
    ]
    mirror(root, copy, changes)
    found = {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*.py")}
    assert found == {
        "top.py": "1\n",
        "package/inner.py": "two\n",
        "package/other.py": "3\n",
        "package/fresh.py": "new\n",
    }
    assert (copy / "package" / "data" / "weights.bin").read_bytes() == b"\0"
    assert not (copy / "package").is_symlink()
    assert inner.read_text() == "2\n"


@pytest.mark.parametrize(
    ("effects", "together"),
    [
        ([], Effect.EXACT),
        ([Effect.FUNCTION, Effect.EXACT], Effect.FUNCTION),
        ([Effect.PARAMETERS, Effect.FUNCTION], Effect.PARAMETERS),
    ],
)
def test_together_rewrites_promise_what_the_weakest_does(effects: list[Effect], together: Effect) -> None:
    assert weakest(effects) is together


def test_several_files_are_run_from_the_folder_that_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, Path]] = []

    def fake(before: Path, after: Path, model: str, inputs: str, **how: Any) -> VerifyReport:
        seen.append((before, after.relative_to(after.parents[1])))
        return VerifyReport((Check("outputs", False, "differ"),))

    monkeypatch.setattr(modernizer.verify, "verify", fake)
    (tmp_path / "package").mkdir()
    init, path = write(tmp_path / "package", __init__="", a="x = 1\n")
    report = Report("apply", changes=[FileChange(path, SourceFile.read(path), "x = 2\n")])
    report.sites = [Site(Status.PLANNED, Rename().name, Effect.EXACT, Location(path, 1, 1), "changes")]
    with pytest.raises(Objection, match="not verified: 1 of 1 check failed"):
        prove(report, [init, path], Experiment("a:Model()", "x"), {})
    assert seen[0][0] == tmp_path / "package"
    assert seen[0][1].name == "package"
