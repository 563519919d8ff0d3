"""The flow around the rules: order, rounds, refusals by the engine, failures, and what is written."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_rules import Crash, Rename, fake_map, write

from modernizer import model_map, pipeline
from modernizer.edit import Edit, Insert, Replace
from modernizer.project import Project
from modernizer.report import FileChange, Objection, Report, Site, Status, diff_lines
from modernizer.rounds import in_order
from modernizer.rule import Upgrade
from modernizer.source import SourceFile
from modernizer.transaction import JOURNAL
from modernizer.weights import Concat, Group, WeightMap, compose


@pytest.fixture(autouse=True)
def bare_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_map, "read_model", fake_map, raising=False)


def of(report: Report, status: Status) -> list[Site]:
    return [site for site in report.sites if site.status is status]


def places(sites: Sequence[Site]) -> list[tuple[str, int, int]]:
    return [(site.location.path.name, site.location.line, site.location.column) for site in sites]


class TestApply:
    def test_rewrites_in_place_and_says_so(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\ny = hopeless\nz = new\n")
        report = pipeline.upgrade([path], [Rename()], {})
        assert path.read_text() == "x = new\ny = hopeless\nz = new\n"
        assert places(of(report, Status.DONE)) == [("a.py", 1, 5)]
        assert places(of(report, Status.REFUSED)) == [("a.py", 2, 5)]
        assert places(of(report, Status.MODERN)) == [("a.py", 3, 5)]
        assert report.written
        assert report.exit_code == 1

    def test_everything_done_is_success(self, tmp_path: Path) -> None:
        report = pipeline.upgrade(write(tmp_path, a="x = old\n"), [Rename()], {})
        assert report.exit_code == 0

    def test_second_run_changes_nothing(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        pipeline.upgrade([path], [Rename()], {})
        before = path.stat().st_mtime_ns, path.stat().st_ino
        report = pipeline.upgrade([path], [Rename()], {})
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
        assert not report.changes
        assert report.exit_code == 0

    def test_without_write_nothing_is_written(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        report = pipeline.upgrade([path], [Rename()], {}, write=False)
        assert path.read_text() == "x = old\n"
        assert places(of(report, Status.PLANNED)) == [("a.py", 1, 5)]
        assert [change.text for change in report.changes] == ["x = new\n"]
        assert report.exit_code == 1

    def test_folder_means_every_file_below_it(self, tmp_path: Path) -> None:
        (tmp_path / "deep" / "er").mkdir(parents=True)
        paths = write(tmp_path, a="x = old\n") + write(tmp_path / "deep" / "er", b="y = old\n")
        pipeline.upgrade([tmp_path], [Rename()], {})
        assert [path.read_text() for path in paths] == ["x = new\n", "y = new\n"]

    def test_bytes_outside_the_edits_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "a.py"
        path.write_bytes("# -*- coding: latin-1 -*-\r\ns = 'é'  \r\nx = old".encode("latin-1"))
        pipeline.upgrade([path], [Rename()], {})
        assert path.read_bytes() == "# -*- coding: latin-1 -*-\r\ns = 'é'  \r\nx = new".encode("latin-1")

    def test_text_without_a_form_in_the_encoding_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.py"
        path.write_bytes(b"# -*- coding: ascii -*-\nx = old\n")
        report = pipeline.upgrade([path], [Rename(new="ñew")], {})
        (site,) = of(report, Status.REFUSED)
        assert "no form in the file's encoding, ascii" in site.message
        assert path.read_bytes() == b"# -*- coding: ascii -*-\nx = old\n"

    def test_options_reach_the_rule(self, tmp_path: Path) -> None:
        rule = Rename()
        pipeline.upgrade(write(tmp_path, a="x = old\n"), [rule], {"keep_hidden": True})
        assert rule.options_seen == {"keep_hidden": True}

    def test_file_that_changed_meanwhile_is_not_overwritten(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")

        def edited_by_hand(upgrades: Sequence[Upgrade]) -> str:
            path.write_text("mine\n")
            return ""

        report = pipeline.upgrade([path], [Rename(review=edited_by_hand)], {})
        assert path.read_text() == "mine\n"
        assert report.exit_code == 2
        assert "changed on disk" in report.problems[0].message
        assert not of(report, Status.DONE)

    def test_interrupted_run_is_settled_first(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        (tmp_path / JOURNAL).write_text(f'[["{path}", "0"]]\n')
        report = pipeline.upgrade([path], [Rename()], {})
        assert report.written
        assert "settled an interrupted run" in report.remarks[0]

    def test_step_may_amend_the_changes_and_add_a_file(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")

        def step(report: Report) -> None:
            report.changes.append(FileChange(tmp_path / "b.py", None, "made = True\n"))

        pipeline.upgrade([path], [Rename()], {}, steps=[step])
        assert (tmp_path / "b.py").read_text() == "made = True\n"

    def test_step_may_object(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")

        def step(report: Report) -> None:
            raise Objection("the outputs differ")

        report = pipeline.upgrade([path], [Rename()], {}, steps=[step])
        assert path.read_text() == "x = old\n"
        assert report.remarks == ["the outputs differ"]
        assert report.exit_code == 1


class TestRounds:
    def test_after_decides_the_order(self) -> None:
        first, second, third = Rename("c"), Rename("b", after=["c", "not asked for"]), Rename("a", after=["b"])
        assert in_order([third, second, first]) == [first, second, third]

    def test_rules_without_a_say_keep_the_order_given(self) -> None:
        rules = [Rename("b"), Rename("a"), Rename("c")]
        assert in_order(rules) == rules

    def test_later_rule_sees_what_the_earlier_made(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        report = pipeline.upgrade([path], [Rename("one"), Rename("two", "new", "newer")], {})
        assert path.read_text() == "x = newer\n"
        assert [site.rule for site in of(report, Status.DONE)] == ["one", "two"]

    def test_earlier_rule_gets_another_look(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        pipeline.upgrade([path], [Rename("one", "new", "newer"), Rename("two")], {})
        assert path.read_text() == "x = newer\n"

    def test_unchanged_project_is_not_planned_twice(self, tmp_path: Path) -> None:
        rule = Rename()
        pipeline.upgrade(write(tmp_path, a="x = hopeless\n"), [rule], {})
        assert rule.plans == 1

    def test_rule_that_never_stops_is_left_out_and_the_others_done(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\ny = more\n")
        restless = Rename("restless", "more", "more + more")
        report = pipeline.upgrade([path], [restless, Rename()], {})
        assert path.read_text() == "x = new\ny = more\n"
        assert report.exit_code == 2
        assert report.problems[0].rule == "restless"
        assert "keeps changing its own output" in report.problems[0].message

    def test_lines_are_those_of_the_written_file(self, tmp_path: Path) -> None:
        def insert(source: SourceFile, node: ast.Name) -> list[Edit]:
            return [Insert(source.path, source.tree.body[0], "one = 1\ntwo = 2\n", "before")]

        (path,) = write(tmp_path, a="a = 1\nb = hopeless\nx = old\n")
        report = pipeline.upgrade([path], [Rename(also=insert)], {})
        assert path.read_text() == "one = 1\ntwo = 2\na = 1\nb = hopeless\nx = new\n"
        assert places(report.sites) == [("a.py", 4, 5), ("a.py", 5, 5)]


class TestEngineRefuses:
    def test_change_in_a_file_that_was_not_named(self, tmp_path: Path) -> None:
        path, other = write(tmp_path, a="x = old\ny = old\n", b="z = 1\n")
        tree = SourceFile.read(other)

        def elsewhere(source: SourceFile, node: ast.Name) -> list[Edit]:
            return [Replace(other, tree.tree.body[0], "z = 2")] if node.lineno == 1 else []

        report = pipeline.upgrade([path], [Rename(also=elsewhere)], {})
        assert path.read_text() == "x = old\ny = new\n"
        assert other.read_text() == "z = 1\n"
        (site,) = of(report, Status.REFUSED)
        assert "needs a change in" in site.message and "b.py, which was not named" in site.message
        assert "b.py" in site.hint

    def test_review_that_objects_to_all_keeps_the_file(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        report = pipeline.upgrade([path], [Rename(review=lambda upgrades: "no rotary was found")], {})
        assert path.read_text() == "x = old\n"
        (site,) = of(report, Status.REFUSED)
        assert site.message == "old becomes new: no rotary was found (this is ours to fix)"
        assert report.exit_code == 1

    def test_review_that_objects_to_one_keeps_the_others(self, tmp_path: Path) -> None:
        def no_second_line(upgrades: Sequence[Upgrade]) -> str:
            return "line 2" if any(upgrade.location.line == 2 for upgrade in upgrades) else ""

        (path,) = write(tmp_path, a="x = old\ny = old\nz = old\n")
        report = pipeline.upgrade([path], [Rename(review=no_second_line)], {})
        assert path.read_text() == "x = new\ny = old\nz = new\n"
        assert places(of(report, Status.DONE)) == [("a.py", 1, 5), ("a.py", 3, 5)]
        assert places(of(report, Status.REFUSED)) == [("a.py", 2, 5)]

    def test_upgrades_in_each_others_way_are_made_one_after_the_other(self, tmp_path: Path) -> None:
        def first_target(source: SourceFile, node: ast.Name) -> list[Edit]:
            statement = source.tree.body[0]
            assert isinstance(statement, ast.Assign)
            return [Replace(source.path, statement.targets[0], f"x{node.lineno}")]

        (path,) = write(tmp_path, a="x = old\ny = old\n")
        report = pipeline.upgrade([path], [Rename(also=first_target)], {})
        assert path.read_text() == "x2 = new\ny = new\n"
        assert places(of(report, Status.DONE)) == [("a.py", 1, 5), ("a.py", 2, 5)]
        assert not of(report, Status.REFUSED)

    def test_upgrade_whose_own_edits_conflict(self, tmp_path: Path) -> None:
        rule = Rename(also=lambda source, node: [Replace(source.path, node, "other")])
        (path,) = write(tmp_path, a="x = old\n")
        report = pipeline.upgrade([path], [rule], {})
        assert path.read_text() == "x = old\n"
        assert "(this is ours to fix)" in of(report, Status.REFUSED)[0].message

    def test_identical_edits_of_two_upgrades_are_made_once(self, tmp_path: Path) -> None:
        def insert(source: SourceFile, node: ast.Name) -> list[Edit]:
            return [Insert(source.path, source.tree.body[0], "one = 1\n", "before")]

        (path,) = write(tmp_path, a="x = old\ny = old\n")
        pipeline.upgrade([path], [Rename(also=insert)], {})
        assert path.read_text() == "one = 1\nx = new\ny = new\n"

    def test_result_that_is_no_python(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\n")
        report = pipeline.upgrade([path], [Rename(new="1 +")], {})
        assert path.read_text() == "x = old\n"
        assert len(of(report, Status.REFUSED)) == 1

    def test_edits_that_change_nothing(self, tmp_path: Path) -> None:
        report = pipeline.upgrade(write(tmp_path, a="x = old\n"), [Rename(new="old")], {})
        assert "change nothing" in of(report, Status.REFUSED)[0].message


class TestFailures:
    def test_crashing_rule_is_named_with_its_file_and_the_others_are_done(self, tmp_path: Path) -> None:
        good, bad = write(tmp_path, a="x = old\ny = calm\n", b="z = bomb\nw = old\n")
        report = pipeline.upgrade([good, bad], [Crash(), Rename()], {})
        assert (good.read_text(), bad.read_text()) == ("x = new\ny = calm\n", "z = bomb\nw = new\n")
        assert [(problem.path, problem.rule) for problem in report.problems] == [(bad, "crash")]
        assert "ZeroDivisionError: a bomb went off" in report.problems[0].message
        assert places(of(report, Status.MODERN)) == [("a.py", 2, 5)]
        assert report.exit_code == 2

    def test_crashing_review_refuses_and_is_reported(self, tmp_path: Path) -> None:
        def fail(upgrades: Sequence[Upgrade]) -> str:
            raise KeyError("role")

        (path,) = write(tmp_path, a="x = old\n")
        report = pipeline.upgrade([path], [Rename(review=fail)], {})
        assert path.read_text() == "x = old\n"
        assert len(of(report, Status.REFUSED)) == 1
        assert report.exit_code == 2

    def test_file_whose_analysis_fails_is_named_and_the_others_are_done(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good, bad = write(tmp_path, a="x = old\n", b="y = old\n")

        def fail_on_b(project: Project) -> Any:
            if bad in project.named:
                raise RecursionError("too deep")
            return fake_map(project)

        monkeypatch.setattr(model_map, "read_model", fail_on_b)
        report = pipeline.upgrade([tmp_path], [Rename()], {})
        assert (good.read_text(), bad.read_text()) == ("x = new\n", "y = old\n")
        assert [problem.path for problem in report.problems] == [bad]
        assert report.exit_code == 2

    @pytest.mark.parametrize(
        ("name", "data", "says"),
        [
            ("syntax.py", b"def f(:\n", "syntax error at line 1"),
            ("latin.py", b"x = '\xe9'\n", "not readable as text"),
            ("odd.py", b"# coding: nonsense\n", "unknown encoding"),
            ("nul.py", b"x = 1\0\n", "null"),
            ("text.txt", b"hello", "not a Python file"),
            ("absent.py", None, "no such file or folder"),
            ("folder.py/readme.md", b"", "no Python files in this folder"),
        ],
    )
    def test_unusable_input_is_named_and_the_others_are_done(
        self, tmp_path: Path, name: str, data: bytes | None, says: str
    ) -> None:
        (good,) = write(tmp_path, a="x = old\n")
        bad = tmp_path / name
        if data is not None:
            bad.parent.mkdir(exist_ok=True)
            bad.write_bytes(data)
        named = bad.parent if "/" in name else bad
        report = pipeline.upgrade([named, good], [Rename()], {})
        assert good.read_text() == "x = new\n"
        assert data is None or bad.read_bytes() == data
        assert [problem.path for problem in report.problems] == [named]
        assert says in report.problems[0].message
        assert report.exit_code == 2

    def test_only_unusable_input(self, tmp_path: Path) -> None:
        report = pipeline.upgrade([tmp_path], [Rename()], {})
        assert report.exit_code == 2
        assert "no Python files" in report.problems[0].message

    def test_empty_file_is_nothing_to_do(self, tmp_path: Path) -> None:
        report = pipeline.upgrade(write(tmp_path, a=""), [Rename()], {})
        assert report.exit_code == 0
        assert "empty file" in report.remarks[0]


class TestCheck:
    def test_finds_what_every_rule_would_do_and_touches_nothing(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, a="x = old\ny = hopeless\nz = new\n")
        report = pipeline.check([path], [Rename("two", "new", "newer"), Rename()], {})
        assert [(site.rule, site.status) for site in report.sites] == [
            ("rename", Status.LEGACY),
            ("rename", Status.REFUSED),
            ("two", Status.REFUSED),
            ("rename", Status.MODERN),
            ("two", Status.LEGACY),
        ]
        assert path.read_text() == "x = old\ny = hopeless\nz = new\n"
        assert report.exit_code == 1

    def test_nothing_found_is_success(self, tmp_path: Path) -> None:
        assert pipeline.check(write(tmp_path, a="x = 1\n"), [Rename()], {}).exit_code == 0

    def test_change_outside_what_was_named_is_a_refusal_here_too(self, tmp_path: Path) -> None:
        path, other = write(tmp_path, a="x = old\n", b="z = 1\n")
        node = SourceFile.read(other).tree.body[0]
        assert isinstance(node, ast.stmt)
        rule = Rename(also=lambda *_: [Replace(other, node, "z = 2")])
        assert len(of(pipeline.check([path], [rule], {}), Status.REFUSED)) == 1


def test_diff_says_where_the_last_line_has_no_end(tmp_path: Path) -> None:
    (path,) = write(tmp_path, a="a = 1\r\nx = old")
    (change,) = pipeline.upgrade([path], [Rename()], {}, write=False).changes
    assert "".join(diff_lines(change)).split("\n", 2)[2] == (
        "@@ -1,2 +1,2 @@\n a = 1\r\n-x = old\n\\ No newline at end of file\n+x = new\n\\ No newline at end of file\n"
    )


class TestWeightMaps:
    JOINED = WeightMap.of(Group("Net", (Concat(("a", "b"), "ab"),)))
    MOVED = WeightMap.of(Group("Net", (Concat(("ab",), "c"),)))

    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def recorded(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.glob(".modernizer/weights/*"))

    def test_is_written_with_the_files_and_numbered(self, tmp_path: Path) -> None:
        for number, name in enumerate(["first", "second"], start=1):
            paths = write(tmp_path, **{name: "x = old\n"})
            report = pipeline.upgrade(paths, [Rename(weights=self.JOINED)], {})
            assert report.weight_map == tmp_path / ".modernizer" / "weights" / f"000{number}-rename.json"
            assert [change.path for change in report.changes] == paths
            assert report.weight_map.read_text() == self.JOINED.to_json(["rename"])
        assert self.recorded(tmp_path) == ["0001-rename.json", "0002-rename.json"]

    def test_a_run_that_finds_nothing_leaves_none(self, tmp_path: Path) -> None:
        rule = Rename(weights=self.JOINED)
        paths = write(tmp_path, a="x = old\n")
        pipeline.upgrade(paths, [rule], {})
        pipeline.upgrade(paths, [rule], {})
        assert self.recorded(tmp_path) == ["0001-rename.json"]

    @pytest.mark.parametrize(
        ("rule", "written"),
        [
            (Rename(), True),
            (Rename(weights=JOINED, review=lambda upgrades: "not what was promised"), True),
            (Rename(weights=JOINED), False),
        ],
        ids=["no map", "upgrade dropped", "not written"],
    )
    def test_there_is_none(self, tmp_path: Path, rule: Rename, written: bool) -> None:
        report = pipeline.upgrade(self.paths(tmp_path), [rule], {}, write=written)
        assert self.recorded(tmp_path) == []
        assert report.weight_map is None

    def paths(self, folder: Path) -> list[Path]:
        return write(folder, a="x = old\n")

    def test_those_of_several_rules_are_one_in_their_order(self, tmp_path: Path) -> None:
        rules = [Rename(weights=self.JOINED), Rename("more", "new", "newer", ("rename",), weights=self.MOVED)]
        report = pipeline.upgrade(self.paths(tmp_path), rules, {})
        assert report.weights == compose([self.JOINED, self.MOVED])
        assert self.recorded(tmp_path) == ["0001-rename+more.json"]

    def test_what_several_upgrades_of_one_run_say_alike_is_said_once(self, tmp_path: Path) -> None:
        report = pipeline.upgrade(write(tmp_path, a="x = old\ny = old\n"), [Rename(weights=self.JOINED)], {})
        assert report.weights == self.JOINED

    @pytest.mark.parametrize(("marker", "home"), [("", "a/b"), ("pyproject.toml", "a")])
    def test_files_elsewhere_keep_it_in_their_project(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str, home: str
    ) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        if marker:
            (tmp_path / "a" / marker).touch()
        monkeypatch.chdir(tmp_path / "elsewhere")
        pipeline.upgrade(self.paths(tmp_path / "a" / "b"), [Rename(weights=self.JOINED)], {})
        assert self.recorded(tmp_path / home) == ["0001-rename.json"]
        assert self.recorded(tmp_path / "elsewhere") == []

    def test_a_rule_that_is_left_out_leaves_none(self, tmp_path: Path) -> None:
        restless = Rename("restless", "old", "old + old", weights=self.JOINED)
        report = pipeline.upgrade(self.paths(tmp_path), [restless], {})
        assert report.exit_code == 2
        assert self.recorded(tmp_path) == []
