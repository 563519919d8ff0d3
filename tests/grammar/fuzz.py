"""Writes many legacy programs, applies the rules to each and says what became of them.

usage: python -m tests.grammar.fuzz --count N [--seed S] [--rule R ...] [--jobs N] [--out FOLDER]

Prints a table, the reasons of refusals, and for every kind of failure a minimal program, written to a folder.
Exit code 1 where a program was missed, broken or crashed.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from .checks import RUNS, Before, Outcome, outcome
from .choices import Choice
from .compose import compose
from .shrink import simplest_failure
from .strategy import random_choice

LIMIT = 60  # seconds for one program under one set of rules
VERDICTS = ("upgraded", "kept", "refused", "missed", "broken", "crashed")
Kind = tuple[str, str, str]


@dataclass
class Tally:
    """What became of all programs so far."""

    verdicts: dict[tuple[str, ...], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reasons: dict[tuple[str, ...], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: Counter[Kind] = field(default_factory=Counter)
    examples: dict[Kind, tuple[Choice, Outcome]] = field(default_factory=dict)

    def add(self, choice: Choice, made: Outcome) -> None:
        self.verdicts[made.rules][made.verdict] += 1
        if made.verdict == "refused":
            self.reasons[made.rules].update({_general(reason) for reason in made.reasons})
        if made.failed:
            self.failures[made.kind] += 1
            known = self.examples.setdefault(made.kind, (choice, made))
            if len(choice.differing()) < len(known[0].differing()):
                self.examples[made.kind] = choice, made


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    runs = [tuple(rule.split(",")) for rule in options.rule] or list(RUNS)
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}, {options.count} programs", flush=True)
    tally, start = Tally(), time.monotonic()
    with multiprocessing.get_context("fork").Pool(options.jobs, initializer=ready) as pool:
        work = ((seed, number, runs) for number in range(options.count))
        for number, (choice, made) in enumerate(pool.imap_unordered(_one, work, chunksize=2), 1):
            for item in made:
                tally.add(choice, item)
            if number % 250 == 0:
                print(f"{number} programs, {sum(tally.failures.values())} failures", file=sys.stderr, flush=True)
        _print_tally(tally, runs)
        print(f"{time.monotonic() - start:.0f} s")
        if tally.failures:
            folder = Path(options.out or tempfile.mkdtemp(prefix="fuzz-"))
            print(f"minimal programs in {folder}:", flush=True)
            minimal = pool.imap(_minimal, [tally.examples[kind] for kind, _ in tally.failures.most_common()])
            for (kind, count), (choice, failure) in zip(tally.failures.most_common(), minimal, strict=True):
                print(f"  {_written(folder, count, kind, choice, failure)}", flush=True)
    return 1 if tally.failures else 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--rule", action="append", default=[], help="one, or several with commas between them")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", help="the folder for minimal programs")
    return parser.parse_args(argv)


def ready() -> None:
    """What a process needs that runs many small models."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    gc.set_threshold(200_000, 20, 20)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _one(work: tuple[int, int, Sequence[tuple[str, ...]]]) -> tuple[Choice, list[Outcome]]:
    seed, number, runs = work
    choice = random_choice(Random(f"{seed}:{number}"))
    before = Before(compose(choice))
    return choice, [_guarded(before, rules) for rules in runs]


def _guarded(before: Before, rules: tuple[str, ...]) -> Outcome:
    try:
        with limited(LIMIT):
            return outcome(before, rules)
    except Exception as error:
        return Outcome(rules, "crashed", f"{type(error).__name__}: {error}")


def _minimal(example: tuple[Choice, Outcome]) -> tuple[Choice, Outcome]:
    choice, failure = example
    try:
        choice = simplest_failure(choice, failure)
    except Exception as error:  # the failure is told all the same
        print(f"not shrunk: {error}", file=sys.stderr)
    return choice, _guarded(Before(compose(choice)), failure.rules)


def _general(reason: str) -> str:
    return re.sub(r"`[^`]*`|[\w./]+\.py(:\d+)*|\d+", "_", reason)[:110]


def _print_tally(tally: Tally, runs: Sequence[tuple[str, ...]]) -> None:
    print(f"\n{'rule':28}" + "".join(f"{verdict:>10}" for verdict in VERDICTS) + f"{'whole':>10}")
    for rules in runs:
        found = tally.verdicts[rules]
        due = sum(found.values()) - found["kept"]
        share = f"{found['upgraded'] / due:10.1%}" if due else f"{'-':>10}"
        print(f"{','.join(rules):28}" + "".join(f"{found[verdict]:10}" for verdict in VERDICTS) + share)
    for rules in runs:
        for reason, count in tally.reasons[rules].most_common(12):
            print(f"refused {count:5}  {','.join(rules)}: {reason}")
    for (rules_named, verdict, symptom), count in tally.failures.most_common():
        print(f"{verdict} {count:5}  {rules_named}: {symptom}")


def _written(folder: Path, count: int, kind: Kind, choice: Choice, failure: Outcome) -> Path:
    """Writes a program before and after, and what is wrong with it."""
    program = compose(choice)
    name = "-".join(value for value in choice.differing().values()) or "simplest"
    place = folder / kind[0].replace(",", "+") / re.sub(r"[^\w.-]", "", f"{kind[1]}-{name}")[:80]
    for side, files in (("before", program.files), ("after", failure.files)):
        for path, text in files.items():
            target = place / side / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text.encode())
    lines = [
        f"{failure.verdict}: {failure.symptom}",
        f"rules: {kind[0]}; seen in {count} programs",
        f"differs from the simplest in: {choice.differing()}",
        f"build and call:\n{program.setup}\n{program.call}",
        *(f"refused: {reason}" for reason in failure.reasons),
    ]
    (place / "note.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
