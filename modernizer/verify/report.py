"""What a verification found, as data and as a few lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was tried: its name, whether it held, and what was measured, in one sentence."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one run. `notes` say what could not be measured, and what was without being judged (timing)."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True where something was checked and everything that was checked held."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, object]:
        """The report as plain data, ready for `json.dumps`."""
        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks]
        return {"passed": self.passed, "checks": checks, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[object]]) -> VerifyReport:
        """The inverse of `to_json`."""
        checks = [entry for entry in data["checks"] if isinstance(entry, dict)]
        return cls(tuple(Check(**entry) for entry in checks), tuple(str(note) for note in data["notes"]))

    def __str__(self) -> str:
        count = len(self.checks)
        if self.passed:
            title = f"verified: {count} check{'s' if count != 1 else ''} passed"
        else:
            title = f"not verified: {len(self.failures)} of {count} check{'s' if count != 1 else ''} failed"
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"  {'ok    ' if c.passed else 'FAILED'}  {c.name:{width}}  {c.detail}" for c in self.checks]
        return "\n".join([title, *lines, *(f"  note    {note}" for note in self.notes)])
