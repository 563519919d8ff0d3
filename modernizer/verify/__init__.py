"""Runs a model before and after a rewrite, in child processes, and says what was proved.

    report = verify(Path("old.py"), Path("new.py"), "Model(vocab=32)", "torch.randint(32, (2, 16))",
                    effect=Effect.FUNCTION, rules=["rope"])
    print(report)

This side never imports torch nor the program; `runner` does both, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modernizer.rule import Effect
from modernizer.verify.process import Child
from modernizer.verify.report import Check, VerifyReport
from modernizer.verify.request import Request, Target, VerifyError, locate
from modernizer.weights import WeightMap

__all__ = ["Check", "VerifyError", "VerifyReport", "verify"]


def verify(
    before: Path,
    after: Path,
    model: str,
    inputs: str,
    *,
    effect: Effect,
    call: str | None = None,
    rules: Sequence[str] = (),
    timeout: float = 120,
    memory_mb: int = 4096,
    seeds: int = 3,
    budget: float | None = 2.0,
    weights: WeightMap | None = None,
) -> VerifyReport:
    """Builds and calls the model of both programs and compares what `effect` promises.

    before, after: a file each, or a folder each; in a folder `model` starts with the module, 'package.module:Model()'.
    model:     an expression for the model, evaluated in its module's namespace, where torch, nn and F are known too
    inputs:    an expression for what it is called with: a tensor, a tuple of arguments or a dict of keywords
    call:      an expression of `model` and `inputs` (as given above), where calling the model is not enough
    rules:     the rules that changed something; rope, alibi, prenorm, swiglu and sdpa have properties of their own
    timeout:   seconds that each of the two processes may take
    memory_mb: how much memory each may ask for, beyond what torch itself takes
    seeds:     how many sets of weights are tried where outputs must be equal
    budget:    percent by which swiglu may change the number of parameters; None where the old width was kept
    weights:   how the weights of the one become those of the other; None where they load as they are

    A program that crashes, hangs or takes too much memory is a failed check. Raises VerifyError where nothing can be
    run: torch is not installed, or a path or module is not there.
    """
    if importlib.util.find_spec("torch") is None:
        raise VerifyError('verify runs the model and needs torch: pip install "modernizer[torch]"')
    sides = {"before": locate(before, model), "after": locate(after, model)}
    with tempfile.TemporaryDirectory(prefix="modernizer-verify-") as folder:
        scratch = Path(folder)

        def start(side: str, target: Target, expression: str) -> Child:
            request = Request(
                side=side,
                target=target,
                model=expression,
                inputs=inputs,
                call=call,
                effect=effect.value,
                rules=tuple(rules),
                seeds=seeds,
                budget=budget,
                memory_mb=memory_mb,
                record=str(scratch / "before.pt"),
                result=str(scratch / f"{side}.json"),
                weights=weights.to_json() if weights is not None else "",
            )
            return Child(request, scratch, timeout)

        children: dict[str, Child] = {}
        try:
            children.update((side, start(side, *where)) for side, where in sides.items())
            return _report(children, timeout)
        finally:
            for child in children.values():
                child.stop()


def _report(children: Mapping[str, Child], timeout: float) -> VerifyReport:
    """The last child's report, or the first failure to run."""
    answer: dict[str, Any] = {}
    for side, child in children.items():
        answer = child.answer(timeout)
        if "error" in answer:
            return VerifyReport((Check(f"{side} runs", False, answer["error"]),))
    return VerifyReport.from_json(answer["report"])
