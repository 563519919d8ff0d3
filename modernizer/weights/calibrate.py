"""Converts the weights of a post-norm model to those of its pre-norm form, by least squares on data, one sum at a time.

A pre-norm layer reads another stream than its post-norm twin. Each reader takes up the matrix that best makes the new
input the old one; each writer writes what leads best to the old state. Nothing is trained; the result is close, not
equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modernizer.weights.capture import around_modules, writer_run
from modernizer.weights.least_squares import Line, Ridge
from modernizer.weights.stream import End, NoConversion, Stage, Streams, find_streams
from modernizer.weights.trace import Weights

Call = Callable[[nn.Module, Any], object]  # how a model is called with a batch
Progress = Callable[[int, int, str], None]  # what is done, of how many, and what comes next


@dataclass(frozen=True)
class Ridges:
    """How hard a solution is pulled towards what is there: the identity of a reader, the weight of a writer.

    Relative to the mean square of what is read. The writer's matters on few tokens.
    """

    reader: float = 1e-2
    writer: float = 1.0


@dataclass
class Conversion:
    """The converted weights, and how they came about.

    `scales` are the skip scales by the names of the norms of their branches; they have been divided out of the writers,
    so that the model is a plain one. `notes` say where less than the whole form was possible.
    """

    state: dict[str, Tensor]
    tokens: int
    scales: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def call_plainly(model: nn.Module, batch: Any) -> object:
    """A tuple are arguments, a dict are arguments by name, and anything else is the one argument."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def convert(
    old: nn.Module,
    new: nn.Module,
    batches: Sequence[Any] | Iterable[Any],
    *,
    call: Call = call_plainly,
    ridges: Ridges = Ridges(),
    progress: Progress | None = None,
    start: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> Conversion:
    """Calibrates `new`, the pre-norm form of `old` that has its weights: it is changed, and left in eval mode.

    Args:
        old: the trained post-norm model.
        new: the same with pre-norm sums and a norm at the end of each stream, on the same device; loaded with the
            weights of the old one as far as they have the same names.
        batches: what the models are called with, on their device. They are gone through several times for each sum, so
            an iterator must begin anew each time it is asked.
        call: how a model is called with a batch; a loss is not needed.
        ridges: see `Ridges`.
        progress: is told how far it is.
        start: what `save` was given, to go on from there.
        save: is given all that is needed to go on, after each sum.

    Raises:
        NoConversion: something stands in the way; the models' weights are then of no use.
    """
    old.eval(), new.eval()
    for name, parameter in old.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise NoConversion(f"`{name}` of the old model is not finite throughout")
    first = next(iter(batches), None)
    if first is None:
        raise NoConversion("there is no data")
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one kernel shows nothing of what is inside
    try:
        streams = find_streams(old, new, lambda model: call(model, first))
        return _Calibration(old, new, batches, call, ridges, streams).run(progress, start, save)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _Calibration:
    def __init__(
        self, old: nn.Module, new: nn.Module, batches: Iterable[Any], call: Call, ridges: Ridges, streams: Streams
    ) -> None:
        self.old, self.new = old, new
        self.batches, self.call, self.ridges = batches, call, ridges
        self.steps = streams.steps
        self.parameters = dict(new.named_parameters(remove_duplicate=False))
        self.scales: list[float] = []  # of each step: how much larger than in the new model the calibrated stream is
        self.skips: dict[str, float] = {}
        self.notes: list[str] = []
        self.tokens = 0
        self.affine = {step.norm: self._affine(step) for step in self.steps}
        self._check_parameters()

    def run(
        self,
        progress: Progress | None,
        start: dict[str, Any] | None,
        save: Callable[[dict[str, Any]], None] | None,
    ) -> Conversion:
        if start is not None:
            self._restore(start)
        else:
            self._plain_norms()
        for number in range(len(self.scales), len(self.steps)):
            step = self.steps[number]
            if progress is not None:
                progress(number, len(self.steps), step.norm)
            try:
                self.scales.append(self._stage(step) if isinstance(step, Stage) else self._end(step))
            except ValueError as error:
                raise NoConversion(f"`{step.norm}`: {error}; more data may help") from error
            if save is not None:
                save(self._saved())
        if progress is not None:
            progress(len(self.steps), len(self.steps), "")
        state = {name: value.detach().clone() for name, value in self.new.state_dict().items()}
        bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad:
            raise NoConversion(f"`{bad[0]}` is too large for {str(state[bad[0]].dtype).removeprefix('torch.')}")
        return Conversion(state, self.tokens, self.skips, self.notes)

    # -- to go on after an interruption

    def _saved(self) -> dict[str, Any]:
        done = {"scales": self.scales, "skips": self.skips, "notes": self.notes, "tokens": self.tokens}
        return {"state": self.new.state_dict(), "steps": [step.norm for step in self.steps], **done}

    def _restore(self, start: dict[str, Any]) -> None:
        if start["steps"] != [step.norm for step in self.steps]:
            raise NoConversion("what was begun belongs to another model")
        self.new.load_state_dict(start["state"])
        self.scales, self.skips = list(start["scales"]), dict(start["skips"])
        self.notes, self.tokens = list(start["notes"]), int(start["tokens"])

    # -- norms

    def _affine(self, step: Stage | End) -> tuple[str, str]:
        """The names of a norm's gain and shift, '' where it has none."""
        width = (step.readers[0].size[0],) if step.readers else ()
        return affine_names(self.new.get_submodule(step.norm), step.norm, width)

    def _check_parameters(self) -> None:
        """What stands in the way is said before any work is done."""
        names = [name for pair in self.affine.values() for name in pair if name]
        ids = [id(self.parameters[name]) for name in names]
        if len(set(ids)) < len(ids):
            raise NoConversion("several norms share their parameters")
        for step in self.steps:
            is_free = not isinstance(step, End) or step.is_free
            bare = next((w for w in step.readers if not w.bias), None)
            if is_free and bare is not None and not self.affine[step.norm][1]:
                raise NoConversion(f"neither `{bare.name}` nor the norm before it, `{step.norm}`, has a bias")
            if not is_free and not all(self.affine[step.norm]):
                raise NoConversion(f"`{step.norm}` cannot be adjusted, and no weight behind it can")

    @torch.no_grad()
    def _plain_norms(self) -> None:
        """From here on readers say what the gain and shift of the norms said."""
        for gain, shift in self.affine.values():
            if gain:
                self.parameters[gain].fill_(1.0)
            if shift:
                self.parameters[shift].fill_(0.0)

    # -- one sum

    def _stage(self, stage: Stage) -> float:
        device = next(iter(self.parameters.values())).device
        width = stage.writer.size[1]
        scale = self.scales[stage.before] if stage.before >= 0 else 1.0
        is_start = stage.before < 0 and not stage.source
        reader, skip = Ridge(width, width, device), Line(width, device)
        for stream, normed, old in self._streams(stage, scale, is_start):
            reader.add(normed, old)
            skip.add(stream, old)
        self.tokens = reader.count
        self._take_up(stage, reader)
        gain, shift = (torch.ones(width), torch.zeros(width)) if is_start else skip.solve(common=True)
        factor = float(gain[0])
        if not factor > 1e-4:
            raise ValueError(f"the old stream does not go on in the new one (a factor of {factor:.2g})")
        self.skips[stage.norm] = factor
        self._write(stage, scale, factor, shift.to(device))
        return scale * factor

    def _streams(self, stage: Stage, scale: float, is_start: bool) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """For each batch the new stream, its norm, and what the old model read in its place; `[tokens, features]`."""
        for batch in self.batches:
            seen = around_modules(self.new, partial(self.call, self.new, batch), [stage.norm], [stage.norm])
            stream, normed = _rows(seen["in", stage.norm]) * scale, _rows(seen["out", stage.norm])
            yield stream, normed, stream if is_start else self._old(batch, output=stage.source)

    def _old(self, batch: Any, *, input: str = "", output: str = "") -> Tensor:
        inputs, outputs = [input] if input else [], [output] if output else []
        seen = around_modules(self.old, partial(self.call, self.old, batch), inputs, outputs)
        return _rows(next(iter(seen.values())))

    @torch.no_grad()
    def _take_up(self, step: Stage | End, ridge: Ridge) -> None:
        """Gives the readers of a norm the matrix and constant that make its output the old input."""
        width = len(ridge.gram) - 1
        identity = torch.eye(width + 1, width, dtype=torch.float64, device=ridge.gram.device)
        solved = ridge.solve(identity, self.ridges.reader)
        matrix, constant = solved[:-1], solved[-1]
        in_norm = any(not weights.bias for weights in step.readers)
        if in_norm:  # what a reader without bias cannot take, its norm can: (z + t) M = z M + c
            self.parameters[self.affine[step.norm][1]].copy_(torch.linalg.solve(matrix.T, constant))
        for weights in step.readers:
            old = weights.matrix(self.parameters)
            shift = weights.shift(self.parameters)
            if shift is not None and not in_norm:
                shift.copy_(shift.double() + constant @ old.double())
            old.copy_(matrix @ old.double())

    @torch.no_grad()
    def _write(self, stage: Stage, scale: float, factor: float, shift: Tensor) -> None:
        """Gives the writer what leads from the new stream to the old state."""
        weights, bias = stage.writer.matrix(self.parameters), stage.writer.shift(self.parameters)
        assert bias is not None
        ridge = Ridge(*stage.writer.size, weights.device)
        for batch in self.batches:
            stream, read = writer_run(self.new, partial(self.call, self.new, batch), stage.norm, stage.writer)
            wanted = self._old(batch, input=stage.target).double() - factor * scale * _rows(stream).double()
            ridge.add(read, wanted)
        prior = torch.cat([weights.double(), (bias.double() + shift)[None]])
        solved = ridge.solve(prior, self.ridges.writer) / (
            scale * factor
        )  # as the stream of the model is that of the recipe by its scale
        weights.copy_(solved[:-1])
        bias.copy_(solved[-1])

    # -- the end of a stream

    def _end(self, end: End) -> float:
        device = next(iter(self.parameters.values())).device
        ridge: Ridge | None = None
        line: Line | None = None
        for batch in self.batches:
            seen = around_modules(self.new, partial(self.call, self.new, batch), [], [end.norm])
            normed = _rows(seen["out", end.norm])
            old = self._old(batch, output=end.source)
            if end.is_free:
                ridge = ridge or Ridge(normed.shape[1], old.shape[1], device)
                ridge.add(normed, old)
            else:
                line = line or Line(normed.shape[1], device)
                line.add(normed, old)
        if ridge is not None:
            self._take_up(end, ridge)
        elif line is not None:
            gain, shift = line.solve()
            names = self.affine[end.norm]
            with torch.no_grad():
                for name, value in zip(names, (gain, shift), strict=True):
                    self.parameters[name].copy_(value.view_as(self.parameters[name]))
            self.notes.append(f"{end.norm} was fitted feature by feature: {end.why_not or 'no weight reads it'}")
        return self.scales[end.before]


def affine_names(norm: nn.Module, name: str, width: tuple[int, ...]) -> tuple[str, str]:
    """The full names of the gain and the shift of a norm, '' for one that it does not have.

    Told by what they do, for norms that are written by hand call them as they like.

    Raises:
        NoConversion: a parameter of it is neither.
    """
    own = dict(norm.named_parameters())
    if not own:
        return "", ""
    width = width or (next(iter(own.values())).numel(),)
    trial = copy.deepcopy(norm).double().cpu()
    x = torch.randn(8, *width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {"gain": "", "shift": ""}
    with torch.no_grad():
        for key in own:
            parameter = trial.get_parameter(key)
            kept = parameter.clone()
            usual = trial(x)
            parameter.zero_()
            without = trial(x)
            parameter.copy_(kept)
            if bool(((without - without[:1]).abs() < 1e-9).all()):
                kind = "gain"
            elif bool(((usual - without - kept.flatten()).abs() < 1e-9).all()):
                kind = "shift"
            else:
                kind = ""
            if parameter.numel() != width[-1] or not kind or found[kind]:
                raise NoConversion(f"`{name}.{key}` is neither the gain nor the shift of the norm")
            found[kind] = f"{name}.{key}"
    return found["gain"], found["shift"]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


__all__ = ["Conversion", "NoConversion", "Ridges", "Weights", "call_plainly", "convert"]
