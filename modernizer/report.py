"""What a run has to say: sites, problems and changed files, as lines for people and as one JSON object for programs."""

from __future__ import annotations

import difflib
import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modernizer import __version__
from modernizer.rule import Effect, Plan, Rule, Upgrade
from modernizer.source import Location, SourceFile

if TYPE_CHECKING:
    from modernizer.model_map import Role
    from modernizer.verify import VerifyReport
    from modernizer.weights import WeightMap

SCHEMA = 1  # of the JSON object; a change that could break its readers raises it


class Status(enum.Enum):
    """What became of a site. Its value starts the site's line."""

    DONE = "done"  # rewritten
    PLANNED = "planned"  # would be rewritten by the same run without --diff
    LEGACY = "legacy"  # `check` found that it can be rewritten
    REFUSED = "refused"  # there is work, but no safe way to do it
    MODERN = "modern"  # nothing to do

    @property
    def is_made(self) -> bool:
        return self in (Status.DONE, Status.PLANNED)


@dataclass(frozen=True)
class Site:
    """One place in the user's code and what one rule makes of it."""

    status: Status
    rule: str
    effect: Effect
    location: Location
    message: str
    hint: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Something that went wrong: unusable input, or an error of ours. The rest of the run went on without it."""

    message: str
    path: Path | None = None
    rule: str | None = None
    trace: str = field(default="", compare=False)


@dataclass(frozen=True)
class FileChange:
    """One file before and after; `source` is None where the file is new."""

    path: Path
    source: SourceFile | None
    text: str


class Objection(Exception):
    """The changes of a run must not be written. `str()` of it says why."""


@dataclass
class Report:
    """The result of one run of `apply` or `check`. `written` says whether the changes are on disk.

    `weights` is how a checkpoint is carried over, None where every old one still loads; `weight_map` the file with it.
    """

    command: str
    sites: list[Site] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    changes: list[FileChange] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    written: bool = False
    verification: VerifyReport | None = None
    weights: WeightMap | None = None
    weight_map: Path | None = None

    @property
    def exit_code(self) -> int:
        """0 nothing left to do or all done, 1 findings or refusals remain, 2 something went wrong."""
        if self.problems:
            return 2
        remaining = {Status.PLANNED, Status.LEGACY, Status.REFUSED}
        return int(any(site.status in remaining for site in self.sites))


def shown(path: Path) -> str:
    """A path as a user would type it: relative where it lies below the working directory."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def place(location: Location) -> str:
    """`path:line:column`, with the path as a user would type it."""
    return f"{shown(location.path)}:{location.line}:{location.column}"


def upgrade_site(status: Status, rule: Rule, upgrade: Upgrade) -> Site:
    """The site of an upgrade that is, can be or would be made."""
    effect = upgrade.effect or rule.effect
    return Site(status, rule.name, effect, upgrade.location, upgrade.summary, notes=upgrade.notes)


def refused_site(rule: Rule, location: Location, reason: str, hint: str = "") -> Site:
    """The site of something that a rule does not touch although there is work."""
    return Site(Status.REFUSED, rule.name, rule.effect, location, reason, hint)


def plan_sites(rule: Rule, plan: Plan) -> list[Site]:
    """The refusals of a plan, and what it found modern."""
    return [refused_site(rule, refusal.location, refusal.reason, refusal.hint) for refusal in plan.refusals] + [
        Site(Status.MODERN, rule.name, rule.effect, modern.location, modern.reason) for modern in plan.modern
    ]


def site_lines(site: Site) -> Iterator[str]:
    """The line of a site, and one for its promise and each note where it is or can be done."""
    hint = f" ({site.hint})" if site.hint else ""
    yield f"{site.status.value}: {place(site.location)} {site.rule}: {site.message}{hint}"
    if site.status.is_made:
        yield f"    {site.effect.value}: {site.effect.promise}"
        yield from (f"    note: {note}" for note in site.notes)


def problem_line(problem: Problem) -> str:
    """The line of a problem: the file, the rule, what is wrong."""
    named = [shown(problem.path) if problem.path else "", problem.rule or ""]
    return ": ".join(["error", *filter(None, named), problem.message])


def summary_line(report: Report) -> str:
    """How many sites of each kind there are, and what was written."""
    counts = Counter(site.status for site in report.sites)
    said = [f"{counts[status]} {status.value}" for status in Status if counts[status]]
    if report.problems:
        said.append(_plural(len(report.problems), "error"))
    found = ", ".join(said) or "nothing to modernize here"
    if report.command != "apply":
        return found
    files = _plural(len(report.changes), "file")
    if not report.changes:
        return f"{found}; nothing written"
    return f"{found}; {files} written" if report.written else f"{found}; {files} would change, nothing written"


def as_json(report: Report) -> dict[str, Any]:
    """The report as data; README.md documents the schema."""
    return {
        "schema": SCHEMA,
        "modernizer": __version__,
        "command": report.command,
        "exit_code": report.exit_code,
        "written": report.written,
        "changed": [shown(change.path) for change in report.changes],
        "weight_map": shown(report.weight_map) if report.weight_map else None,
        "sites": [_site_json(site) for site in report.sites],
        "errors": [
            {"path": shown(problem.path) if problem.path else None, "rule": problem.rule, "message": problem.message}
            for problem in report.problems
        ],
        "verification": report.verification.to_json() if report.verification else None,
    }


def _site_json(site: Site) -> dict[str, Any]:
    return {
        "status": site.status.value,
        "rule": site.rule,
        "effect": site.effect.value,
        "path": shown(site.location.path),
        "line": site.location.line,
        "column": site.location.column,
        "message": site.message,
        "hint": site.hint,
        "notes": list(site.notes),
    }


def role_lines(roles: Iterable[Role]) -> Iterator[tuple[int, str]]:
    """A tree of the roles by file and class, each line with its depth: file, class, role, evidence."""
    path: Path | None = None
    owner = ""
    for role in sorted(roles, key=lambda role: (str(role.location.path), role.owner)):
        if role.location.path != path:
            path, owner = role.location.path, ""
            yield 0, shown(path)
        if role.owner != owner:
            owner = role.owner
            yield 1, owner
        yield 2, f"{role.kind} at {role.location.line}:{role.location.column}"
        for evidence in role.evidence:
            where = evidence.location
            line = f"{where.line}" if where.path == path else f"{shown(where.path)}:{where.line}"
            yield 3, f"{line}: {evidence.sentence}"


def diff_lines(change: FileChange) -> Iterator[str]:
    """A unified diff that `git apply` and `patch -p1` take. Lines keep their endings."""
    name = shown(change.path).lstrip("/")
    old = _lines(change.source.text) if change.source else []
    header = f"a/{name}" if change.source else "/dev/null"
    for line in difflib.unified_diff(old, _lines(change.text), header, f"b/{name}"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _lines(text: str) -> list[str]:
    """Lines as diff tools see them: only a line feed ends one."""
    lines = text.split("\n")
    return [f"{line}\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])


def line_in(line: int, old: Sequence[str], new: Sequence[str]) -> int:
    """Where a 1-based line of one text has gone in a later version of it."""
    for tag, start, end, new_start, new_end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if start <= line - 1 < end:
            offset = line - 1 - start
            return new_start + 1 + (offset if tag == "equal" else min(offset, max(0, new_end - new_start - 1)))
    return line


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
