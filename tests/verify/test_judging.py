"""Recording and judging, without child processes: right rewrites pass, planted faults are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_source import write

from modernizer.rule import Effect
from modernizer.verify import VerifyReport
from modernizer.verify.judge import judge
from modernizer.verify.loading import Subject
from modernizer.verify.recording import Recorder, Recording
from modernizer.verify.request import Request, locate


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the child processes: more threads only get in each other's way on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MODEL, INPUTS = "Toy(layers=LAYERS)", "torch.randint(1, 32, (3, 9))"


def compare(
    folder: Path,
    effect: Effect,
    *rules: str,
    was: dict[str, object] | None = None,
    layers: int = 2,
    inputs: str = INPUTS,
    call: str | None = None,
    budget: float | None = 2.0,
    **now: object,
) -> VerifyReport:
    """The report on a toy whose switches went from `was` to `now`."""
    request = Request(
        side="before",
        target=locate(write(folder, "old", **(was or {})), "")[0],
        model=MODEL.replace("LAYERS", str(layers)),
        inputs=inputs,
        call=call,
        effect=effect.value,
        rules=rules,
        seeds=2,
        budget=budget,
        memory_mb=0,
        record="",
        result="",
    )
    before = record(request, None)
    before.write(folder / "before.pt")  # through a file, as between processes
    second = replace(request, side="after", target=locate(write(folder, "new", **{**(was or {}), **now}), "")[0])
    return judge(before, record(second, Recording.read(folder / "before.pt")), second)


def record(request: Request, before: Recording | None) -> Recording:
    scope: dict[str, object] = {"torch": torch}
    exec(compile(Path(str(request.target.file)).read_text(encoding="utf-8"), "toy", "exec"), scope)
    torch.manual_seed(5)
    subject = Subject(eval(request.model, scope).eval(), eval(request.inputs, scope), request.call, scope)
    return Recorder(subject, request, before).run()


def failed(report: VerifyReport) -> set[str]:
    return {check.name for check in report.failures}


def test_equal_programs_pass(tmp_path: Path) -> None:
    report = compare(tmp_path, Effect.EXACT)
    assert report.passed, str(report)
    assert {"outputs equal", "gradients equal", "own precision", "causality"} <= {c.name for c in report.checks}


def test_sdpa_by_hand_passes_as_exact(tmp_path: Path) -> None:
    report = compare(tmp_path, Effect.EXACT, "sdpa", fused="yes")
    assert report.passed, str(report)


@pytest.mark.parametrize("mask", ["causal", "none"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("rule", "positions"), [("rope", "rotary"), ("alibi", "alibi")])
def test_positions_by_hand_pass(tmp_path: Path, rule: str, positions: str, layers: int, mask: str) -> None:
    report = compare(tmp_path, Effect.FUNCTION, rule, was={"mask": mask}, layers=layers, positions=positions)
    assert report.passed, str(report)
    assert {"positions gone", "order seen"} <= {check.name for check in report.checks}


def test_prenorm_by_hand_passes(tmp_path: Path) -> None:
    report = compare(tmp_path, Effect.PARAMETERS, "prenorm", norm="pre")
    assert report.passed, str(report)
    assert "final norm" in {check.name for check in report.checks}


def test_swiglu_by_hand_passes(tmp_path: Path) -> None:
    report = compare(tmp_path, Effect.PARAMETERS, "swiglu", gated="yes")
    assert report.passed, str(report)


def test_all_rules_together_pass(tmp_path: Path) -> None:
    rules = ("rope", "prenorm", "swiglu", "sdpa")
    report = compare(tmp_path, Effect.PARAMETERS, *rules, positions="rotary", norm="pre", gated="yes", fused="yes")
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("name", "effect", "now"),
    [
        ("outputs equal", Effect.EXACT, {"factor": 1.0001}),
        ("own precision", Effect.EXACT, {"factor": 1.0001}),
        ("gradients equal", Effect.EXACT, {"factor": 1.0001}),
        ("outputs equal", Effect.EXACT, {"norm": "swapped"}),  # all gains are 1 in a fresh model
        ("weights load", Effect.EXACT, {"norm": "pre"}),
        ("causality", Effect.FUNCTION, {"mask": "leak"}),
        ("causality", Effect.FUNCTION, {"mask": "none"}),
        ("causality", Effect.FUNCTION, {"fault": "batch"}),
        ("gradient flow", Effect.FUNCTION, {"fault": "dropped parameter"}),
        ("gradient flow", Effect.PARAMETERS, {"fault": "dead parameter"}),
        ("finite output", Effect.FUNCTION, {"fault": "nan"}),
        ("output shape", Effect.FUNCTION, {"fault": "shape"}),
        ("output shape", Effect.FUNCTION, {"fault": "dtype"}),
        ("repeatable", Effect.FUNCTION, {"fault": "random"}),
        ("training step", Effect.FUNCTION, {"fault": "training"}),
    ],
)
def test_fault_is_named(tmp_path: Path, name: str, effect: Effect, now: dict[str, Any]) -> None:
    assert name in failed(compare(tmp_path, effect, **now))


@pytest.mark.parametrize(
    ("name", "rule", "now"),
    [
        ("positions gone", "rope", {}),
        ("rotary runs", "rope", {"positions": "none"}),
        ("alibi runs", "alibi", {"positions": "rotary"}),
        ("pre-norm blocks", "prenorm", {}),
        ("pre-norm blocks", "prenorm", {"norm": "swapped"}),
        ("final norm", "prenorm", {"norm": "pre-without-final"}),
        ("silu gates", "swiglu", {}),
        ("parameter budget", "swiglu", {"gated": "wide"}),
        ("fused attention", "sdpa", {}),
    ],
)
def test_broken_promise_of_a_rule_is_named(tmp_path: Path, name: str, rule: str, now: dict[str, Any]) -> None:
    assert name in failed(compare(tmp_path, Effect.PARAMETERS, rule, **now))


def test_positions_removed_and_nothing_put_in_their_place(tmp_path: Path) -> None:
    report = compare(tmp_path, Effect.FUNCTION, "rope", was={"mask": "none"}, positions="none")
    assert "order seen" in failed(report)


def test_kept_hidden_width_has_no_budget(tmp_path: Path) -> None:
    assert compare(tmp_path, Effect.PARAMETERS, "swiglu", budget=None, gated="wide").passed


def test_part_that_did_not_run_before_need_not_get_gradients(tmp_path: Path) -> None:
    report = compare(tmp_path, Effect.FUNCTION)
    (flow,) = (check for check in report.checks if check.name == "gradient flow")
    assert flow.passed and "spare" not in flow.detail


def test_output_of_ids_is_compared_but_has_no_gradient(tmp_path: Path) -> None:
    call = "model(inputs).argmax(-1)"
    same = compare(tmp_path, Effect.EXACT, call=call)
    assert same.passed, str(same)
    assert any(note.startswith("gradient flow: not measured") for note in same.notes)
    assert "outputs equal" in failed(compare(tmp_path, Effect.EXACT, call=call, factor=-1.0))


def test_inputs_by_keyword_and_in_a_tuple(tmp_path: Path) -> None:
    assert compare(tmp_path, Effect.FUNCTION, inputs="{'ids': torch.randint(1, 32, (3, 9))}").passed
    assert "causality" in failed(
        compare(tmp_path, Effect.FUNCTION, inputs="(torch.randint(1, 32, (3, 9)),)", mask="leak")
    )


def test_unmeasurable_is_a_note_and_no_check(tmp_path: Path) -> None:
    report = compare(tmp_path, Effect.FUNCTION, was={"mask": "none", "positions": "none"})
    assert report.passed
    report = compare(tmp_path, Effect.FUNCTION, "rope", was={"positions": "none"}, positions="rotary")
    assert any(note.startswith("positions gone: not measured") for note in report.notes)
