"""Applies rules to a program and judges what the result does, never what the rule says about itself."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from modernizer import pipeline
from modernizer.registry import select
from modernizer.report import Report, Status

from .compose import Program
from .facts import APPLY, KEEP, RULES
from .labels import NOTHING, measured_order, order_effect
from .running import FunctionCounter, Recording, Subject, float64, gradients, load, record
from .untouched import rewritten_without_need

TOGETHER = ("rope", "prenorm", "swiglu", "sdpa")
RUNS: Sequence[tuple[str, ...]] = (*((rule,) for rule in RULES), TOGETHER)
FAILURES = ("missed", "broken", "crashed")
EXACT = 1e-10
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk that need not be waited for


@dataclass(frozen=True)
class Outcome:
    """What became of one program under some rules: upgraded, kept, refused, missed, broken or crashed."""

    rules: tuple[str, ...]
    verdict: str
    symptom: str = ""
    reasons: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def failed(self) -> bool:
        return self.verdict in FAILURES

    @property
    def kind(self) -> tuple[str, str, str]:
        """Failures of one kind are taken for one bug."""
        general = re.sub(r"\[[^\]]*\]|[\d.]+(e[-+]?\d+)?|'[^']*'", "#", self.symptom)
        return ",".join(self.rules), self.verdict, general[:80]


class Before:
    """A program as it was written, measured once however many rules are tried."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @cached_property
    def recording(self) -> Recording:
        return record(self._subject())

    @cached_property
    def exact(self) -> Exact:
        with float64():
            subject = self._subject()
            shake(subject)
            return Exact.of(subject)

    def _subject(self) -> Subject:
        with tempfile.TemporaryDirectory(dir=FAST) as folder:
            self.program.write(Path(folder))
            return load(self.program, Path(folder))


@dataclass(frozen=True)
class Exact:
    """Weights, outputs and gradients in double precision."""

    state: dict[str, Tensor]
    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, subject: Subject) -> Exact:
        state = {name: value.clone() for name, value in subject.model.state_dict().items()}
        with torch.no_grad():
            outputs = subject.outputs()
        return cls(state, outputs, gradients(subject))


def shake(subject: Subject) -> None:
    """Weights without zeros and ones, so that nothing hides behind an initialisation."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * 0.1)


Judge = Callable[[Before, Subject, Recording], str]


def outcomes(program: Program, runs: Sequence[tuple[str, ...]] = RUNS) -> Iterator[Outcome]:
    """What becomes of a program under each set of rules, each time from its original text."""
    before = Before(program)
    for rules in runs:
        yield outcome(before, rules)


def outcome(before: Before, rules: tuple[str, ...]) -> Outcome:
    """Writes the program, applies the rules, runs the result, applies them again."""
    program = before.program
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        folder = Path(name)
        paths = program.write(folder)
        report = pipeline.upgrade(paths, select(rules), {})
        files = _snapshot(folder)
        refused = [site for site in report.sites if site.status is Status.REFUSED]
        reasons = tuple(dict.fromkeys(f"{site.rule}: {site.message}" for site in refused))
        if report.problems:
            return Outcome(rules, "crashed", _problem(report), reasons, files)
        verdict, symptom = _verdict(before, rules, folder, files, {site.rule for site in refused})
        if files != program.files and verdict in ("upgraded", "refused"):
            again = pipeline.upgrade(paths, select(rules), {})
            if again.problems:
                verdict, symptom = "crashed", f"second run: {_problem(again)}"
            elif _snapshot(folder) != files:
                verdict, symptom = "broken", "a second run changes the files again"
        return Outcome(rules, verdict, symptom, reasons, files)


def _snapshot(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().decode() for path in files}


def _problem(report: Report) -> str:
    problem = report.problems[0]
    return f"{problem.rule or 'engine'}: {problem.message}"


def _verdict(
    before: Before, rules: tuple[str, ...], folder: Path, files: dict[str, str], declined: set[str]
) -> tuple[str, str]:
    program = before.program
    wanted = [program.expected[rule] for rule in rules]
    due = [rule for rule, want in zip(rules, wanted, strict=True) if want != KEEP]
    if files == program.files:
        if not due:
            return "kept", ""
        return ("refused", "") if declined else ("missed", f"{', '.join(due)}: nothing was done and nothing was said")
    if not due:
        return "broken", "edited a program that needs nothing"
    why = _wrong(before, [rule for rule in due if rule not in declined], rules, folder, files)
    if why:
        return "broken", why
    return ("refused", "") if declined & set(due) else ("upgraded", "")


def _wrong(before: Before, done: Sequence[str], rules: tuple[str, ...], folder: Path, files: dict[str, str]) -> str:
    """Why the rewritten program is wrong, or ''."""
    program = before.program
    try:
        after = load(program, folder)
        recording = record(after)
    except Exception as error:
        return f"the program fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    judged = _basics(before.recording, recording, program) or next(
        filter(None, (_PROPERTIES[rule](before, after, recording) for rule in done)), ""
    )
    if not judged and set(rules) == {"sdpa"}:
        judged = _exactness(before, folder)
    if not judged and set(done) & {"rope", "alibi"}:
        judged = _order_seen(program, folder)
    if not judged and "prenorm" in done:
        judged = _norms_left(program, folder)
    return judged or rewritten_without_need(program.files, files)


def _basics(was: Recording, now: Recording, program: Program) -> str:
    if [o.shape for o in was.outputs] != [o.shape for o in now.outputs]:
        return f"outputs of shapes {[tuple(o.shape) for o in was.outputs]} are {[tuple(o.shape) for o in now.outputs]}"
    if not all(torch.isfinite(output).all() for output in now.outputs):
        return "outputs are not finite"
    if dead := sorted(set(now.dead) - set(was.dead)):
        return f"no gradient reaches {dead[:3]}"
    if now.broken:
        return f"non-finite gradients at {now.broken[:3]}"
    if now.training and not was.training:
        return now.training
    if program.facts.causal and now.prefix_change > 1e-5:
        return f"no longer causal: a later token moves an earlier output by {now.prefix_change:.1e}"
    if was.other_spread and was.other_spread > 1e-4 and now.other_spread < 0.05 * was.other_spread:
        return "positions are gone from the part that has no attention"
    return ""


def _positions(word: str) -> Judge:
    def judge(before: Before, after: Subject, now: Recording) -> str:
        if not any(word in name.lower() for name in now.modules):
            return f"no {word} module"
        was = before.recording.position_spread
        if was and was > 1e-4 and now.position_spread > 0.05 * was:
            return f"absolute positions still reach the output: {was:.1e} before, {now.position_spread:.1e} after"
        return ""

    return judge


def _prenorm(before: Before, after: Subject, now: Recording) -> str:
    was, facts = before.recording, before.program.facts
    has_blocks = any(type(m).__name__ == facts.block_class for m in after.model.modules())
    # Where no block is a module, the ends that are seen are those of whole parts, which the final norm keeps.
    most = was.standardised - 1 if has_blocks else was.standardised
    if facts.norm != "rms" and was.standardised > 1 and now.standardised > min(most, 4):
        return f"modules that end in a norm: {was.standardised} before, {now.standardised} after"
    if was.scale_response and now.scale_response and was.scale_response < 5 and now.scale_response > 25:
        return f"no final norm: larger embeddings give outputs {now.scale_response:.0f} times larger"
    return ""


def _swiglu(before: Before, after: Subject, now: Recording) -> str:
    was = before.recording
    old = ("relu", "relu_", "gelu", "gelu_", "erf", "tanh", "sigmoid", "elu", "leaky_relu")
    gained = sum(now.operators[op] - was.operators[op] for op in ("silu", "silu_"))
    lost = sum(was.operators[op] - now.operators[op] for op in old)
    wanted = before.program.facts.feed_forwards
    return "" if gained == wanted <= lost else f"silu +{gained}, relu or gelu -{lost}, {wanted} feed-forwards"


def _sdpa(before: Before, after: Subject, now: Recording) -> str:
    facts, name = before.program.facts, "scaled_dot_product_attention"
    calls = now.functions[name]
    wanted = facts.self_attentions + facts.cross_attentions
    if calls < 1:
        return f"{name} is never called"
    left = now.functions["softmax"]
    if left and before.program.expected["sdpa"] == APPLY:
        return f"{left} of {wanted} attentions still take their own softmax"
    counter = FunctionCounter()
    after.model.train()
    with torch.no_grad(), counter:
        after.outputs()
    after.model.eval()
    if counter.dropouts and (max(counter.dropouts) > 0) != facts.drops_weights:
        return f"dropout of weights in training is {counter.dropouts}, before it was {facts.drops_weights}"
    counter = FunctionCounter()
    with torch.no_grad(), counter:
        after.outputs()
    return "dropout acts outside training" if any(counter.dropouts) else ""


_PROPERTIES: dict[str, Judge] = {
    "rope": _positions("rotary"),
    "alibi": _positions("alibi"),
    "prenorm": _prenorm,
    "swiglu": _swiglu,
    "sdpa": _sdpa,
}


def _exactness(before: Before, folder: Path) -> str:
    """The old weights fit, and give the old outputs and gradients."""
    was = before.exact
    with float64():
        after = load(before.program, folder)
        loaded = after.model.load_state_dict(was.state, strict=False)
        if loaded.missing_keys or loaded.unexpected_keys:
            return f"weights do not load: missing {loaded.missing_keys[:3]}, unexpected {loaded.unexpected_keys[:3]}"
        now = Exact.of(after)
    for old, new in zip(was.outputs, now.outputs, strict=True):
        gap = float((old - new).abs().max())
        if not gap <= EXACT * max(1.0, float(old.abs().max())):
            return f"outputs move by {gap:.1e}"
    for name, old in was.gradients.items():
        gap = float((old - now.gradients[name]).abs().max()) if name in now.gradients else float("inf")
        if not gap <= EXACT * max(1.0, float(old.abs().max())):
            return f"the gradient of {name} moves by {gap:.1e}"
    return ""


def _order_seen(program: Program, folder: Path) -> str:
    """Without absolute positions and with nothing in their place a model no longer notices the order of its input."""
    with float64():
        effect = order_effect(load(program, folder))
    return "" if effect > NOTHING else "reordering the input makes no difference any more"


def _norms_left(program: Program, folder: Path) -> str:
    """Built in double precision as well as run in it: masks made on the way have the type that is the default then."""
    with float64():
        order = measured_order(load(program, folder), program.facts)
    return f"the order of norms is still {order}" if order not in ("", "pre") else ""
