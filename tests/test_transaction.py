"""The whole-tree write: what it keeps, what it refuses, and that a killed run leaves all old or all new."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from modernizer import transaction
from modernizer.transaction import JOURNAL, Change, TransactionError, recover, write_all


def change(path: Path, new: bytes = b"new\n") -> Change:
    return Change(path, path.read_bytes() if path.exists() else None, new)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_bytes(b"old a\n")
    (tmp_path / "sub" / "b.py").write_bytes(b"old b\r\n")
    return tmp_path


def whole_change(folder: Path) -> list[Change]:
    """Two files replaced in different folders, one created, and one in a folder that is not there yet."""
    return [
        change(folder / "a.py", b"new a\n"),
        change(folder / "sub" / "b.py", b"new b\n"),
        change(folder / "sub" / "c.py", b"new c\n"),
        change(folder / ".new" / "deep" / "d.json", b"{}\n"),
    ]


forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

NEW = {"a.py": b"new a\n", "sub/b.py": b"new b\n", "sub/c.py": b"new c\n", ".new/deep/d.json": b"{}\n"}


def test_writes_every_file_and_leaves_nothing_else(folder: Path) -> None:
    write_all(whole_change(folder))
    assert tree(folder) == NEW


def test_no_changes_touch_nothing(folder: Path) -> None:
    before = tree(folder)
    write_all([])
    assert tree(folder) == before


def test_file_mode_is_kept(folder: Path) -> None:
    (folder / "a.py").chmod(0o751)
    write_all([change(folder / "a.py")])
    assert stat.S_IMODE((folder / "a.py").stat().st_mode) == 0o751


def test_link_stays_and_its_target_is_written(folder: Path) -> None:
    link = folder / "link.py"
    link.symlink_to(folder / "a.py")
    write_all([change(link)])
    assert link.is_symlink()
    assert (folder / "a.py").read_bytes() == b"new\n"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "sub" / "b.py").chmod(0o444), "b.py: is read-only"),
        (lambda folder: (folder / "sub").chmod(0o555), "sub: is a read-only folder"),
        (lambda folder: (folder / "sub" / "b.py").write_bytes(b"newer"), "b.py: changed on disk"),
        (lambda folder: (folder / "sub" / "b.py").unlink(), "b.py: No such file"),
        (lambda folder: (folder / "sub" / "c.py").write_bytes(b"mine"), "c.py: is in the way"),
        (lambda folder: (folder / ".new").write_bytes(b"mine"), "nothing was written: .*Not a directory"),
    ],
    ids=[
        "read-only file",
        "read-only folder",
        "changed meanwhile",
        "gone meanwhile",
        "new file exists",
        "file instead of a folder",
    ],
)
def test_obstacle_is_named_and_nothing_is_written(folder: Path, spoil: Callable[[Path], Any], says: str) -> None:
    changes = whole_change(folder)
    spoil(folder)
    before = tree(folder)
    with pytest.raises(TransactionError, match=says):
        write_all(changes)
    assert tree(folder) == before
    (folder / "sub").chmod(0o755)


def test_failing_rename_is_undone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace, calls = tree(folder), os.replace, []

    def fail_third(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_third)
    with pytest.raises(TransactionError, match=r"nothing was written: .*Input/output error"):
        write_all(whole_change(folder))
    assert tree(folder) == before
    assert not (folder / ".new").exists()


def test_interrupt_from_the_keyboard_is_undone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(folder)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transaction, "_sync_folders", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_all(whole_change(folder))
    assert tree(folder) == before


def test_file_system_without_hard_links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write_all(whole_change(folder))
    assert tree(folder) == NEW


def killed_at(line: int, action: Callable[[], object]) -> bool:
    """Runs `action` in a child that dies without a word before the given line of transaction.py that it executes."""
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename != transaction.__file__:
                return None
            left -= event == "line"
            if left < 0:
                os._exit(9)
            return trace

        sys.settrace(trace)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def restore(folder: Path, state: dict[str, bytes]) -> None:
    shutil.rmtree(folder / ".new", ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    for name, data in state.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def every_killed_state(folder: Path, action: Callable[[], object]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Kills `action` before each of its lines in turn; yields the tree it left and brings the tree back afterwards."""
    start, line = tree(folder), 0
    while killed_at(line, action):
        yield line, tree(folder)
        restore(folder, start)
        line += 1


@forks
def test_killed_before_any_line_the_tree_is_all_old_or_all_new(folder: Path) -> None:
    old, changes, seen = tree(folder), whole_change(folder), set()
    for line, _ in every_killed_state(folder, lambda: write_all(changes)):
        recover([folder / "sub" / "b.py"])
        assert tree(folder) in (old, NEW), f"killed before line {line}"
        seen.add(tree(folder) == NEW)
    assert seen == {True, False}
    assert tree(folder) == NEW


@forks
def test_killed_while_undoing_the_tree_is_all_old_or_all_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, changes, replace = tree(folder), whole_change(folder), os.replace

    def write_with_a_failing_rename() -> None:
        targets: list[Path] = []

        def fail_third(source: Path, target: Path) -> None:
            targets.append(target)
            if len(targets) == 3:
                raise OSError(5, "Input/output error")
            replace(source, target)

        with monkeypatch.context() as patch, contextlib.suppress(TransactionError):
            patch.setattr(os, "replace", fail_third)
            write_all(changes)

    for line, _ in every_killed_state(folder, write_with_a_failing_rename):
        recover([folder])
        assert tree(folder) in (old, NEW), f"killed before line {line}"
    assert tree(folder) == old


@forks
@pytest.mark.parametrize("marks", ["", "commit\n"], ids=["before commit", "after commit"])
def test_killed_while_recovering_the_next_recovery_settles_it(folder: Path, marks: str) -> None:
    old, changes = tree(folder), whole_change(folder)
    half = next(
        state
        for _, state in every_killed_state(folder, lambda: write_all(changes))
        if state.get(JOURNAL, b"").decode().partition("\n")[2] == marks and ".b.py.modernizer-old" in str(state)
    )
    restore(folder, half)
    for line, _ in every_killed_state(folder, lambda: recover([folder])):
        recover([folder])
        assert tree(folder) == (NEW if marks else old), f"killed before line {line}"


def test_torn_journal_line_means_nothing_was_touched(folder: Path) -> None:
    before = tree(folder)
    (folder / JOURNAL).write_text('[["/somewhere/a.py", "12')
    recover([folder / "sub"])
    assert tree(folder) == before


def test_journal_is_found_above_and_below(folder: Path) -> None:
    for place in (folder, folder / "sub"):
        (place / JOURNAL).write_text("")
        recover([folder / "sub" / "b.py"] if place == folder else [folder])
        assert not (place / JOURNAL).exists()


def test_recovery_does_not_overwrite_what_was_edited_since(folder: Path) -> None:
    target = folder / "a.py"
    entry = transaction._Entry(target, transaction._digest(b"old a\n"))
    entry.fresh.write_bytes(b"new a\n")
    (folder / JOURNAL).write_text(f'[["{target}", "{entry.old_digest}"]]\ncommit\n')
    target.write_bytes(b"edited by hand\n")
    with pytest.raises(TransactionError, match="changed after a run that was interrupted"):
        recover([folder])
    assert target.read_bytes() == b"edited by hand\n"


def test_a_run_that_is_still_going_on_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "PATIENCE", 0.1)
    journal = folder / JOURNAL
    with transaction._locked(journal, os.O_CREAT), pytest.raises(TransactionError, match="another run is writing"):
        recover([folder])
    assert journal.exists()


def test_a_run_waits_for_another_that_is_about_to_end(folder: Path) -> None:
    journal, held = folder / JOURNAL, threading.Event()

    def other() -> None:
        with transaction._locked(journal, os.O_CREAT):
            held.set()
            time.sleep(0.3)
            journal.unlink()

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    assert recover([folder]) == []
    thread.join()


def test_journal_falls_back_to_the_first_file_where_the_common_folder_is_read_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.py").write_bytes(b"old\n")
    tmp_path.chmod(0o555)
    write_all([change(tmp_path / name / "m.py") for name in ("one", "two")])
    tmp_path.chmod(0o755)
    assert tree(tmp_path) == {"one/m.py": b"new\n", "two/m.py": b"new\n"}
