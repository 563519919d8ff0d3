"""Everything one program does that the judge may ask about, measured once and written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modernizer.verify import dependence, flow
from modernizer.verify.loading import Subject
from modernizer.verify.request import Request
from modernizer.verify.tensors import leaves, rebuild
from modernizer.verify.weights import aliases, load_matching, load_strictly, shake, shaken, snapshot
from modernizer.weights import MapError, WeightMap
from modernizer.weights.apply import carry


@dataclass
class Recording:
    """Plain data and tensors only, so that it can be read back without running anything.

    outputs:   all output tensors for each set of weights; gradients likewise. `exact` are the same in float64
    facts:     probe -> what it found; errors: probe -> why it could not run
    """

    inputs: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, list[int]] = field(default_factory=dict)
    outputs: list[list[Tensor]] = field(default_factory=list)
    exact_outputs: list[list[Tensor]] = field(default_factory=list)
    exact_gradients: list[dict[str, Tensor]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        beside = path.with_suffix(".part")
        torch.save(asdict(self), beside)
        beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Recording:
        return cls(**torch.load(path, weights_only=True))


class Recorder:
    """Runs the probes on one subject. `before` is given on the second side: its weights and inputs are used again."""

    def __init__(self, subject: Subject, request: Request, before: Recording | None = None) -> None:
        self.subject, self.request, self.before = subject, request, before
        self.recording = Recording()
        self.map = WeightMap.from_json(request.weights) if request.weights and before is not None else None
        self.kind: torch.dtype | None = None  # the precision, where it is not the model's own
        self._adopt()
        self.base = snapshot(subject.model)

    def _adopt(self) -> None:
        recording, model = self.recording, self.subject.model
        if self.before is not None:
            given = self.before.inputs
            if len(given) == len(leaves(self.subject.inputs)):
                self.subject.inputs = rebuild(self.subject.inputs, lambda index, _: given[index])
            state: Mapping[str, Tensor] = self.before.state
            why = ""
            if self.map is not None:
                try:
                    carried = carry(self.map, state)
                    state = carried.state
                    recording.facts["moved"] = sorted(carried.moved)
                except MapError as error:  # of rules whose new weights no old model has, such as a final norm
                    why, self.map = str(error), None
            if self.request.effect == "exact":
                recording.facts["load"] = why or load_strictly(model, state)
            load_matching(model, state)
        recording.inputs = [leaf.clone() for leaf in leaves(self.subject.inputs)]
        recording.state = snapshot(model)
        recording.parameters = {name: list(p.shape) for name, p in model.named_parameters()}
        recording.facts["aliases"] = aliases(model)

    def run(self) -> Recording:
        """All probes. A first call that fails raises; a probe that fails is written down."""
        self.subject.tensors()
        for name, seed, probe in self._probes():
            self._measure(name, seed, probe)
        if self.request.effect == "exact":
            self._measure("outputs", 0, self._native_outputs)
            self._measure("float64", 0, self._double)
        return self.recording

    def _probes(self) -> list[tuple[str, int, Callable[[], Any]]]:
        """Name, set of weights (0: as built), probe. What looks at dependence uses weights without zeros and ones."""
        subject, rules = self.subject, set(self.request.rules)
        probes: list[tuple[str, int, Callable[[], Any]]] = [
            ("modules", 0, self._modules),
            ("ran", 0, lambda: flow.modules_that_run(subject)),
            ("output", 0, self._describe),
            ("repeatable", 1, self._repeatable),
            ("flow", 1, lambda: flow.gradient_flow(subject)),
            ("pairs", 1, self._pairs),
            ("dependence", 1, lambda: dependence.dependence(subject, self._pairs())),
            ("functions", 0, lambda: flow.functions_called(subject)),
            ("operators", 0, lambda: flow.operators_run(subject)),
            ("seconds", 0, self._seconds),
        ]
        if rules & {"rope", "alibi"}:
            probes.append(("order", 1, lambda: dependence.order_response(subject, self._pairs())))
            probes.append(("spread", 1, lambda: dependence.position_spread(subject)))
        if "prenorm" in rules:
            probes.append(("standardised", 0, lambda: dependence.standardised_modules(subject)))
            probes.append(("scale", 0, lambda: dependence.scale_response(subject)))
        # Last, because it moves running statistics and whatever else a model keeps.
        probes.append(("training", 1, lambda: flow.training_step(subject)))
        return probes

    def _measure(self, name: str, seed: int, probe: Callable[[], Any]) -> None:
        try:
            self._weights(seed)
            self.recording.facts[name] = probe()
        except Exception as error:
            self.recording.errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]

    def _weights(self, seed: int) -> None:
        load_matching(self.subject.model, self.base)
        if self.map is None or self.before is None:
            shake(self.subject.model, seed)
            return
        same = self.before.facts.get("aliases", {})
        old = shaken(self.before.state, self.before.parameters, same, seed, self.kind)
        load_matching(self.subject.model, carry(self.map, old).state)

    def _modules(self) -> dict[str, str]:
        return {name: type(module).__name__ for name, module in self.subject.model.named_modules()}

    def _describe(self) -> list[list[Any]]:
        return [[list(t.shape), str(t.dtype), bool(torch.isfinite(t).all())] for t in self.subject.tensors()]

    def _repeatable(self) -> bool:
        first, second = self.subject.tensors(seed=1), self.subject.tensors(seed=2)
        return len(first) == len(second) and all(map(torch.equal, first, second))

    def _pairs(self) -> list[dependence.Pair]:
        """On the second side the pairs of the first, so that both are asked the same questions."""
        if self.before is not None:
            return [(a, b, c) for a, b, c in self.before.facts.get("pairs", [])]
        return dependence.pairs(self.subject)

    def _seconds(self) -> float:
        best, stop = float("inf"), time.perf_counter() + 1.0
        for _ in range(5):
            start = time.perf_counter()
            self.subject.tensors()
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() > stop:
                break
        return best

    def _native_outputs(self) -> None:
        for seed in range(self.request.seeds):
            self._weights(seed)
            self.recording.outputs.append(self.subject.tensors())

    def _double(self) -> None:
        self.subject.cast(torch.float64)
        self.kind = torch.float64
        outputs, found = [], []
        for seed in range(self.request.seeds):
            self._weights(seed)
            outputs.append(self.subject.tensors())
            found.append(self._gradients())
        self.recording.exact_outputs, self.recording.exact_gradients = outputs, found

    def _gradients(self) -> dict[str, Tensor]:
        if "flow" in self.recording.errors:
            return {}
        return flow.gradients(self.subject)


def total(parameters: Mapping[str, list[int]]) -> int:
    """The number of values in all parameters."""
    return sum(torch.Size(shape).numel() for shape in parameters.values())
