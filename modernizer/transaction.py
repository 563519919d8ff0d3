"""Writes all files of a run or none, also when the process is killed half-way.

The steps: a journal that names every file, the new texts beside the old ones, a hard link to every old one, the word
`commit` in the journal, one rename a file, the journal's removal. At the next start an interrupted run is undone where
it had not come to `commit`, and finished where it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

JOURNAL = ".modernizer-journal"
PATIENCE = 5.0  # seconds to wait for another run in the same folder or one above: writing takes far less


class TransactionError(Exception):
    """Nothing could be written, or an interrupted run cannot be settled. `str()` of it is a sentence for the user."""


@dataclass(frozen=True)
class Change:
    """New bytes for one file. `old` is what was read from it, None where the file is to be created, and its folder
    with it where there is none.
    """

    path: Path
    old: bytes | None
    new: bytes


@dataclass(frozen=True)
class _Entry:
    """One line of the journal: the target and its two companions, all in the same folder."""

    target: Path
    old_digest: str | None

    @property
    def fresh(self) -> Path:
        return self.target.with_name(f".{self.target.name}.modernizer-new")

    @property
    def backup(self) -> Path:
        return self.target.with_name(f".{self.target.name}.modernizer-old")


def write_all(changes: Sequence[Change]) -> None:
    """Writes every change or, raising TransactionError, none. Links are followed and file modes kept."""
    if not changes:
        return
    changes = [Change(change.path.resolve(), change.old, change.new) for change in changes]
    for change in changes:
        _check(change)
    entries = [_Entry(change.path, _digest(change.old)) for change in changes]
    journal = _journal_folder([entry.target for entry in entries]) / JOURNAL
    try:
        with _folders(changes), _locked(journal, os.O_CREAT | os.O_EXCL) as descriptor:
            _write(changes, entries, journal, descriptor)
    except OSError as error:
        raise TransactionError(f"nothing was written: {error}") from error


def _write(changes: Sequence[Change], entries: Sequence[_Entry], journal: Path, descriptor: int) -> None:
    committed = False
    try:
        _append(descriptor, json.dumps([[str(entry.target), entry.old_digest] for entry in entries]) + "\n")
        _sync_folder(journal.parent)
        for change, entry in zip(changes, entries, strict=True):
            _prepare(change, entry)
        _append(descriptor, "commit\n")
        committed = True
        for entry in entries:
            entry.fresh.replace(entry.target)
        _sync_folders(entries)
    except BaseException:  # Ctrl-C as well: the tree is whole again before anybody hears of it
        if committed:
            _append(descriptor, "undo\n")
            _undo(entries)
        _drop_companions(entries)
        journal.unlink()
        raise
    _drop_companions(entries)
    journal.unlink()


def recover(paths: Iterable[Path]) -> list[Path]:
    """Settles every interrupted run that wrote above or below `paths`; returns the files that it had in hand."""
    settled: list[Path] = []
    for journal in sorted({found for path in paths for found in _journals(path.resolve())}):
        try:
            with _locked(journal):
                settled += _settle(journal)
        except FileNotFoundError:
            continue  # the run that wrote it has just ended by itself
        except OSError as error:
            raise TransactionError(f"{journal}: an interrupted run left this and cannot be settled: {error}") from error
    return settled


def _check(change: Change) -> None:
    path = change.path
    if change.old is None:
        if path.exists():
            raise TransactionError(f"{path}: is in the way of a file that is to be created; nothing was written")
    else:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TransactionError(f"{path}: {error.strerror}; nothing was written") from error
        if data != change.old:
            raise TransactionError(f"{path}: changed on disk since it was read; nothing was written")
        if not _is_writable(path):
            raise TransactionError(f"{path}: is read-only; nothing was written")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not _is_writable(folder):
        raise TransactionError(f"{folder}: is a read-only folder; nothing was written")


@contextlib.contextmanager
def _folders(changes: Sequence[Change]) -> Iterator[None]:
    """Makes the folders of files that are to be created; those it made go again where the write fails."""
    made: list[Path] = []
    try:
        for change in changes:
            missing = [f for f in (change.path.parent, *change.path.parent.parents) if not f.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # somebody has put something into it
                folder.rmdir()
        raise


def _is_writable(path: Path) -> bool:
    # The mode is looked at too, because everything is writable to root, who would not expect it of a 0444 file.
    return os.access(path, os.W_OK) and bool(stat.S_IMODE(path.stat().st_mode) & 0o222)


def _journal_folder(targets: Sequence[Path]) -> Path:
    """The common folder, where a later run on any of the targets looks; the first one's where that is out of reach."""
    common = Path(os.path.commonpath([target.parent for target in targets]))
    return common if _is_writable(common) else targets[0].parent


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _locked(journal: Path, flags: int = 0) -> Iterator[int]:
    """The open journal, taken for this process, so that nobody settles a run that is still going on."""
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | flags, 0o644)
    try:
        _lock(journal, descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(journal: Path, descriptor: int) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if time.monotonic() > give_up:
                raise TransactionError(f"{journal.parent}: another run is writing here") from error
            time.sleep(0.05)


def _append(descriptor: int, line: str) -> None:
    data = line.encode()
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _prepare(change: Change, entry: _Entry) -> None:
    """Puts the new bytes, with the old file's mode and owner, and a second name of the old file beside the target."""
    with entry.fresh.open("wb") as file:
        if change.old is not None:
            _copy_rights(entry.target, file.fileno())
        file.write(change.new)
        file.flush()
        os.fsync(file.fileno())
    if change.old is not None:
        _keep(entry)


def _keep(entry: _Entry) -> None:
    entry.backup.unlink(missing_ok=True)
    try:
        os.link(entry.target, entry.backup)
    except OSError:  # a file system without hard links
        shutil.copy2(entry.target, entry.backup)


def _copy_rights(source: Path, descriptor: int) -> None:
    if sys.platform == "win32":
        return
    status = source.stat()
    with contextlib.suppress(PermissionError):  # only root can give files away, and a group need not be ours
        os.fchown(descriptor, status.st_uid, status.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def _sync_folders(entries: Iterable[_Entry]) -> None:
    for folder in {entry.target.parent for entry in entries}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _undo(entries: Iterable[_Entry]) -> None:
    """Brings the old files back after `commit`. A target without a backup is one that the run created."""
    for entry in entries:
        if entry.backup.exists():
            entry.backup.replace(entry.target)
        elif entry.old_digest is None and not entry.fresh.exists():
            entry.target.unlink(missing_ok=True)


def _drop_companions(entries: Iterable[_Entry]) -> None:
    for entry in entries:
        entry.fresh.unlink(missing_ok=True)
        entry.backup.unlink(missing_ok=True)


def _journals(path: Path) -> Iterator[Path]:
    """Journals in the folders above `path` and, where it is a folder, below it."""
    for folder in [path, *path.parents]:
        if (folder / JOURNAL).is_file():
            yield folder / JOURNAL
    if path.is_dir():
        for root, _, files in os.walk(path):
            if JOURNAL in files:
                yield Path(root) / JOURNAL


def _settle(journal: Path) -> list[Path]:
    header, *marks = journal.read_text(encoding="utf-8", errors="replace").split("\n")
    entries = [_Entry(Path(target), digest) for target, digest in json.loads(header)] if marks else []
    if "undo" in marks:
        _undo(entries)
    elif "commit" in marks:
        _finish(journal, entries)
    _drop_companions(entries)
    journal.unlink()
    return [entry.target for entry in entries]


def _finish(journal: Path, entries: Sequence[_Entry]) -> None:
    waiting = [entry for entry in entries if entry.fresh.exists()]
    for entry in waiting:
        now = _digest(entry.target.read_bytes()) if entry.target.exists() else None
        if now != entry.old_digest:
            raise TransactionError(
                f"{entry.target}: was changed after a run that was interrupted there; its text from that run is"
                f" {entry.fresh.name}. Take what you want of it, then remove {journal}"
            )
    for entry in waiting:
        entry.fresh.replace(entry.target)
    _sync_folders(entries)
