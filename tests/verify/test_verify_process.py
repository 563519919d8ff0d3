"""The whole of `verify`: child processes, limits, and what is said when a program cannot be run."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import program
from toy_source import write

from modernizer.rule import Effect
from modernizer.verify import Check, VerifyError, VerifyReport, verify
from modernizer.verify.loading import Subject
from modernizer.verify.request import Request, locate, split_model
from modernizer.verify.runner import explain

INPUTS = "torch.randint(1, 32, (3, 9))"


def run(before: Path, after: Path, timeout: float = 60, memory_mb: int = 4096, **more: object) -> VerifyReport:
    rules = more.get("rules", ())
    assert isinstance(rules, tuple)
    return verify(
        before,
        after,
        "Toy()",
        INPUTS,
        effect=Effect.FUNCTION,
        rules=rules,
        timeout=timeout,
        memory_mb=memory_mb,
    )


def test_rewritten_file_is_verified(tmp_path: Path) -> None:
    old, new = write(tmp_path, "old"), write(tmp_path, "some-new model", positions="rotary")
    report = run(old, new, rules=("rope",))
    assert report.passed, str(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.py", "some-new model.py"]  # nothing left behind


def test_folder_with_several_files_is_verified(tmp_path: Path) -> None:
    original = program("translator")
    changed = original.copy(tmp_path)
    source = changed.folder / "seq2seq" / "mixing.py"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("self.per_head ** -0.5", "(1 / self.per_head) ** 0.5"), encoding="utf-8")
    report = verify(
        original.folder,
        changed.folder,
        "case:build()",
        "inputs()",
        call="call(model, inputs)",
        effect=Effect.EXACT,
        seeds=1,
    )
    assert report.passed, str(report)


def test_endless_loop_is_stopped(tmp_path: Path) -> None:
    start = time.monotonic()
    report = run(write(tmp_path, "old", fault="loop"), write(tmp_path, "new"), timeout=5)
    assert report.checks == (Check("before runs", False, "gave no answer in 5 s and was stopped"),)
    assert time.monotonic() - start < 20


def test_memory_hog_is_stopped(tmp_path: Path) -> None:
    report = run(write(tmp_path, "old"), write(tmp_path, "new", fault="hog"), memory_mb=1000)
    assert not report.passed
    assert report.checks[0].name == "after runs" and "more than 1000 MB" in report.checks[0].detail


def test_process_that_ends_by_itself_is_told(tmp_path: Path) -> None:
    report = run(write(tmp_path, "old", fault="gone"), write(tmp_path, "new"))
    assert report.checks == (Check("before runs", False, "ended without an answer (exit code 7)"),)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("crash", r"ValueError: no data here \(new\.py:\d+\)"), ("exit", r"leaves the process \(SystemExit 3\).*")],
)
def test_crash_at_import_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str) -> None:
    target, _ = locate(write(tmp_path, "new", fault=fault), "Toy()")
    settings = {"side": "before", "model": "Toy()", "inputs": INPUTS, "call": None, "effect": "exact", "rules": ()}
    limits = {"seeds": 1, "budget": None, "memory_mb": 1}
    request = Request(target=target, record="", result="", **settings, **limits)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises((ValueError, SystemExit)) as caught:
        Subject.load(request)
    sys.modules.pop("new", None)
    assert re.fullmatch(said, explain(caught.value, request))


def test_engine_side_imports_no_torch() -> None:
    code = "import modernizer.verify, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_torch_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VerifyError, match=r'pip install "modernizer\[torch\]"'):
        run(write(tmp_path, "old"), write(tmp_path, "new"))


def test_missing_path_folder_without_module_and_missing_module(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="no such file or folder"):
        locate(tmp_path / "nothing.py", "Toy()")
    with pytest.raises(VerifyError, match="say which module"):
        locate(tmp_path, "Toy()")
    with pytest.raises(VerifyError, match="no module models"):
        locate(tmp_path, "models:Toy()")


def test_file_of_a_package_is_imported_with_its_package(tmp_path: Path) -> None:
    package = tmp_path / "outer" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    target, expression = locate(write(package, "model"), "Toy()")
    assert (target.root, target.module, target.file) == (str(tmp_path), "outer.inner.model", None)
    assert expression == "Toy()"


def test_link_stands_for_itself(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    link = tmp_path / "copy" / "model.py"
    link.symlink_to(write(tmp_path, "original"))
    target, _ = locate(link, "Toy()")
    assert (target.root, target.module) == (str(tmp_path / "copy"), "model")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.b:Model(x=1)", ("a.b", "Model(x=1)")),
        ("Model({1: 2})", (None, "Model({1: 2})")),
        ("lambda: 3", (None, "lambda: 3")),
        ("m : build()", ("m", "build()")),
    ],
)
def test_module_is_split_from_expression(text: str, parts: tuple[str | None, str]) -> None:
    assert split_model(text) == parts


def test_report_reads_well_and_travels_as_json() -> None:
    report = VerifyReport((Check("finite output", True, "every value"), Check("causality", False, "axis 1")), ("n",))
    assert not report.passed and [c.name for c in report.failures] == ["causality"]
    assert str(report).splitlines() == [
        "not verified: 1 of 2 checks failed",
        "  ok      finite output  every value",
        "  FAILED  causality      axis 1",
        "  note    n",
    ]
    assert VerifyReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert not VerifyReport(()).passed
