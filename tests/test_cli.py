"""The command line: exit codes, what is printed where, and messages for wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_rules import Crash, Rename, fake_map, write

import modernizer
import modernizer.verify
from modernizer import model_map, registry
from modernizer.cli import main
from modernizer.model_map import Evidence, Role
from modernizer.project import Project
from modernizer.rule import Effect, Option, Rule
from modernizer.source import Location
from modernizer.verify import Check, VerifyError, VerifyReport


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapping[str, Rule]:
    rules: dict[str, Rule] = {"rename": Rename(), "crash": Crash()}
    monkeypatch.setattr(model_map, "read_model", fake_map)
    monkeypatch.setattr(registry, "all_rules", lambda: rules)
    monkeypatch.chdir(tmp_path)
    return rules


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class TestApply:
    def test_one_line_a_site_with_promise_and_notes(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\ny = hopeless\nz = new\n")
        result = run("apply", "--rule", "rename", "a.py")
        assert result.stdout.splitlines() == [
            "done: a.py:1:5 rename: old becomes new",
            "    exact: same outputs and same gradients on shared parameters",
            "    note: look at it again",
            "refused: a.py:2:5 rename: there is no hope (rewrite it)",
            "modern: a.py:3:5 rename: new already",
            "1 done, 1 refused, 1 modern; 1 file written",
        ]
        assert result.exit_code == 1

    def test_all_done_is_zero(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\n")
        assert run("apply", "--rule", "rename", "a.py").exit_code == 0

    def test_nothing_found(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = 1\n")
        result = run("apply", "--rule", "rename", "a.py")
        assert result.stdout == "nothing to modernize here; nothing written\n"
        assert result.exit_code == 0

    def test_diff_is_alone_on_stdout_and_nothing_is_written(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\n")
        result = run("apply", "--rule", "rename", "--diff", "a.py")
        assert result.stdout == "--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-x = old\n+x = new\n"
        assert "planned: a.py:1:5 rename: old becomes new" in result.stderr
        assert "1 file would change, nothing written" in result.stderr
        assert (tmp_path / "a.py").read_text() == "x = old\n"
        assert result.exit_code == 1

    def test_diff_is_taken_by_git(self, tmp_path: Path) -> None:
        write(tmp_path, a="a = 1\r\nx = old\r\nb = 2\r\nlast = old")
        patch = run("apply", "--rule", "rename", "--diff", "a.py").stdout_bytes
        subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], input=patch, cwd=tmp_path, check=True)
        assert (tmp_path / "a.py").read_bytes() == b"a = 1\r\nx = new\r\nb = 2\r\nlast = new"

    def test_json(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\n", b="def f(:\n")
        result = run("apply", "--rule", "rename", "--format", "json", ".")
        assert json.loads(result.stdout) == {
            "schema": 1,
            "modernizer": modernizer.__version__,
            "command": "apply",
            "exit_code": 2,
            "written": True,
            "changed": ["a.py"],
            "weight_map": None,
            "sites": [
                {
                    "status": "done",
                    "rule": "rename",
                    "effect": "exact",
                    "path": "a.py",
                    "line": 1,
                    "column": 5,
                    "message": "old becomes new",
                    "hint": "",
                    "notes": ["look at it again"],
                }
            ],
            "errors": [{"path": "b.py", "rule": None, "message": "syntax error at line 1: invalid syntax"}],
            "verification": None,
            "diff": None,
        }
        assert result.exit_code == 2

    def test_rule_option_reaches_the_rule(self, tmp_path: Path, fakes: Mapping[str, Rule]) -> None:
        write(tmp_path, a="x = old\n")
        run("apply", "--rule", "rename", "--keep-hidden", "a.py")
        rule = fakes["rename"]
        assert isinstance(rule, Rename)
        assert rule.options_seen == {"keep_hidden": True}

    def test_options_with_values_reach_the_rule(
        self, tmp_path: Path, fakes: Mapping[str, Rule], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rule = fakes["rename"]
        assert isinstance(rule, Rename)
        options = (Option("count", "how many", 2), Option("way", "which way", "left", ("left", "right")))
        monkeypatch.setattr(type(rule), "options", options)
        monkeypatch.setattr(rule, "objection", lambda given: "count: not none" if not given["count"] else "")
        write(tmp_path, a="x = old\n")
        assert "[default: 2]" in run("apply", "--help").stdout and "[left|right]" in run("check", "--help").stdout
        assert "option: --way (left, right) which way" in run("explain", "rename").stdout
        for wrong in (["--count", "two"], ["--way", "up"], ["--count", "0"]):
            failed = run("apply", "--rule", "rename", *wrong, "a.py")
            assert failed.exit_code == 2 and wrong[0].strip("-") in failed.stderr
        assert run("check", "--rule", "rename", "--count", "0", "a.py").exit_code == 2
        run("apply", "--rule", "rename", "--count", "3", "a.py")
        assert rule.options_seen == {"count": 3, "way": "left"}

    def test_paths_with_brackets_and_long_lines_stay_as_they_are(self, tmp_path: Path) -> None:
        folder = tmp_path / "[bold]a folder with a name that is longer than any terminal is wide[/bold]" / ("x" * 80)
        folder.mkdir(parents=True)
        (path,) = write(folder, a="x = old\n")
        line = run("apply", "--rule", "rename", path).stdout.splitlines()[0]
        assert line == f"done: {path.relative_to(tmp_path)}:1:5 rename: old becomes new"

    def test_failing_rule_is_named_and_the_others_are_done(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\n", b="y = bomb\n")
        result = run("apply", "--rule", "crash,rename", ".")
        assert "done: a.py:1:5 rename" in result.stdout
        assert "error: b.py: crash: ZeroDivisionError: a bomb went off" in result.stderr
        assert "Traceback" not in result.output
        assert result.exit_code == 2

    def test_traceback_on_request(self, tmp_path: Path) -> None:
        write(tmp_path, b="y = bomb\n")
        assert "Traceback" in run("--traceback", "apply", "--rule", "crash", "b.py").stderr

    def test_vendor_writes_the_components_beside_the_code(self, tmp_path: Path, fakes: dict[str, Rule]) -> None:
        from modernizer.edit import AddImport

        fakes["rename"] = Rename(
            new="SwiGLU",
            also=lambda source, node: [AddImport(source.path, "modernizer.components", "SwiGLU", "SwiGLU")],
        )
        write(tmp_path, a="x = old\n")
        result = run("apply", "--rule", "rename", "--vendor", "a.py")
        assert "2 files written" in result.stdout
        assert "from modernizer_components import SwiGLU" in (tmp_path / "a.py").read_text()
        assert "class SwiGLU" in (tmp_path / "modernizer_components.py").read_text()
        again = run("apply", "--rule", "rename", "--vendor", ".")
        assert again.exit_code == 0
        assert "nothing written" in again.stdout


class TestApplyVerify:
    ARGUMENTS = ("apply", "--rule", "rename", "--verify", "--model", "Model()", "--input", "x", "a.py")

    def answer(self, monkeypatch: pytest.MonkeyPatch, passed: bool) -> list[Any]:
        calls: list[Any] = []

        def fake(before: Path, after: Path, model: str, inputs: str, **how: Any) -> VerifyReport:
            calls.append(((before / "").read_text(), after.read_text(), model, inputs, how["effect"], how["rules"]))
            return VerifyReport((Check("outputs", passed, "measured"),))

        monkeypatch.setattr(modernizer.verify, "verify", fake)
        return calls

    def test_passed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.answer(monkeypatch, True)
        write(tmp_path, a="x = old\n")
        result = run(*self.ARGUMENTS)
        assert calls == [("x = old\n", "x = new\n", "Model()", "x", Effect.EXACT, ["rename"])]
        assert (tmp_path / "a.py").read_text() == "x = new\n"
        assert "verified: 1 check passed" in result.stdout
        assert result.exit_code == 0

    def test_failed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer(monkeypatch, False)
        write(tmp_path, a="x = old\n")
        result = run(*self.ARGUMENTS)
        assert (tmp_path / "a.py").read_text() == "x = old\n"
        assert "not verified: 1 of 1 check failed" in result.stderr
        assert result.exit_code == 1

    def test_without_a_model(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\n")
        result = run("apply", "--rule", "rename", "--verify", "a.py")
        assert "--verify needs --model and --input" in result.stderr
        assert result.exit_code == 2

    def test_model_without_verify(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\n")
        assert run("apply", "--rule", "rename", "--model", "Model()", "a.py").exit_code == 2


class TestCheck:
    def test_findings(self, tmp_path: Path) -> None:
        write(tmp_path, a="x = old\ny = hopeless\nz = new\n")
        result = run("check", "a.py")
        assert result.stdout.splitlines() == [
            "legacy: a.py:1:5 rename: old becomes new",
            "refused: a.py:2:5 rename: there is no hope (rewrite it)",
            "1 legacy, 1 refused, 1 modern",
        ]
        assert result.exit_code == 1

    def test_clean(self, tmp_path: Path) -> None:
        write(tmp_path, a="z = new\n")
        assert run("check", "a.py").exit_code == 0

    def test_json_lists_what_is_modern_too(self, tmp_path: Path) -> None:
        write(tmp_path, a="z = new\n")
        data = json.loads(run("check", "--format", "json", "a.py").stdout)
        assert [site["status"] for site in data["sites"]] == ["modern"]


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["apply", "a.py"], "Missing option '--rule'"),
            (["apply", "--rule", "renam", "a.py"], "did you mean rename?"),
            (["check", "--rule", "renam", "a.py"], "did you mean rename?"),
            (["explain", "renam"], "did you mean rename?"),
            (["apply", "--rule", ",", "a.py"], "names with a comma between them"),
            (["apply", "--rule", "rename"], "Missing argument 'PATH...'"),
            (["check", "--keep-hiden", "a.py"], "--keep-hidden"),
            (["chek"], "No such command"),
            (["apply", "--rule", "rename", "gone.py"], "error: gone.py: no such file or folder"),
            (["check", "folder"], "error: folder: no Python files in this folder"),
            (["map", "gone.py"], "error: gone.py: no such file or folder"),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_wrong_usage_is_two_and_says_what_to_do(self, tmp_path: Path, arguments: Sequence[str], says: str) -> None:
        write(tmp_path, a="x = old\n")
        (tmp_path / "folder").mkdir()
        result = run(*arguments)
        assert says in result.stderr
        assert result.exit_code == 2
        assert (tmp_path / "a.py").read_text() == "x = old\n"

    def test_read_only_file(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        path.chmod(0o444)
        result = run("apply", "--rule", "rename", "a.py")
        assert "is read-only; nothing was written" in result.stderr
        assert result.exit_code == 2

    def test_what_nobody_expected_is_two_without_a_traceback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> Mapping[str, Rule]:
            raise LookupError("the unexpected")

        monkeypatch.setattr(registry, "all_rules", fail)
        result = run("rules")
        assert "error: LookupError: the unexpected (this is ours to fix" in result.stderr
        assert result.exit_code == 2

    def test_version(self) -> None:
        assert run("--version").output == f"modernize, version {modernizer.__version__}\n"


def test_rules_are_listed_with_their_effect() -> None:
    lines = run("rules").stdout.splitlines()
    assert lines == ["rename  exact       renames things", "crash   function    fails"]


def test_rules_on_request_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in registry.all_rules().values():
        monkeypatch.setattr(type(rule), "on_request", True)
    assert "(only where it is named)" in run("rules").stdout
    assert "looked for only where it is named" in run("explain", "rename").stdout


def test_explain_shows_what_the_rule_itself_says() -> None:
    text = run("explain", "rename").stdout
    assert "rename: renames things" in text
    assert "effect: exact (same outputs and same gradients on shared parameters)" in text
    assert "option: --keep-hidden" in text


def test_map_is_a_tree_by_file_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = write(tmp_path, a="x = 1\n", b="y = 1\n")

    def with_roles(project: Project) -> Any:
        evidence = [Evidence(Location(path, 3, 1), "softmax of a product"), Evidence(Location(other, 9, 1), "a mask")]
        roles = [
            Role("attention", Location(path, 3, 5), "Block", evidence),
            Role("norm", Location(path, 4, 5), "Block", []),
        ]
        return SimpleNamespace(project=project, roles=roles)

    monkeypatch.setattr(model_map, "read_model", with_roles)
    result = run("map", "a.py")
    assert result.stdout.splitlines() == [
        "a.py",
        "    Block",
        "        attention at 3:5",
        "            3: softmax of a product",
        "            b.py:9: a mask",
        "        norm at 4:5",
    ]
    assert result.exit_code == 0


class TestVerify:
    ARGUMENTS = ("verify", "--before", "a.py", "--after", "b.py", "--model", "Model()", "--input", "x")

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def fake(before: Path, after: Path, model: str, inputs: str, **how: Any) -> VerifyReport:
            calls.append(how)
            return VerifyReport((Check("outputs", model == "Model()", "measured"),))

        monkeypatch.setattr(modernizer.verify, "verify", fake)
        write(tmp_path, a="x = old\n", b="x = new\n")
        return calls

    def test_effect_follows_from_the_rules(self, calls: list[dict[str, Any]]) -> None:
        result = run(*self.ARGUMENTS, "--rule", "crash,rename")
        assert (calls[0]["effect"], calls[0]["rules"]) == (Effect.FUNCTION, ["crash", "rename"])
        assert "verified: 1 check passed" in result.stdout
        assert result.exit_code == 0

    def test_effect_follows_from_what_changed(self, calls: list[dict[str, Any]]) -> None:
        run(*self.ARGUMENTS)
        assert (calls[0]["effect"], calls[0]["rules"]) == (Effect.EXACT, [])

    def test_effect_follows_from_what_a_rule_on_request_has_made(
        self, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(registry.all_rules()["rename"]), "on_request", True)
        monkeypatch.setattr(type(registry.all_rules()["rename"]), "effect", Effect.PARAMETERS)
        run(*self.ARGUMENTS)
        assert calls[0]["effect"] is Effect.PARAMETERS

    def test_effect_given(self, calls: list[dict[str, Any]]) -> None:
        run(*self.ARGUMENTS, "--effect", "parameters")
        assert calls[0]["effect"] is Effect.PARAMETERS

    def test_failed_check_is_one(self, calls: list[dict[str, Any]]) -> None:
        assert run(*self.ARGUMENTS, "--model", "Other()").exit_code == 1

    def test_json(self, calls: list[dict[str, Any]]) -> None:
        data = json.loads(run(*self.ARGUMENTS, "--format", "json").stdout)
        assert (data["effect"], data["passed"], len(data["checks"])) == ("exact", True, 1)

    def test_what_cannot_run_is_two(self, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> VerifyReport:
            raise VerifyError("torch is not here")

        monkeypatch.setattr(modernizer.verify, "verify", fail)
        result = run(*self.ARGUMENTS)
        assert "torch is not here" in result.stderr
        assert result.exit_code == 2


def test_check_imports_neither_torch_nor_libcst_nor_rich(tmp_path: Path) -> None:
    write(tmp_path, a="import torch.nn as nn\nclass A(nn.Module):\n    def forward(self, x):\n        return x\n")
    code = (
        "import sys\nfrom modernizer.cli import main\n"
        "try:\n    main(['check', 'a.py'])\nexcept SystemExit as end:\n    print(end.code)\n"
        "print([name for name in ('torch', 'libcst', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "[]"]
