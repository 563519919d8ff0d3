"""`modernize calibrate`: a trained checkpoint goes through an upgrade rule by rule, and every step is measured."""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.report import Report
from modernizer.rounds import in_order
from modernizer.rule import Options, Rule
from modernizer.weights import checkpoint as files
from modernizer.weights.apply import carry
from modernizer.weights.batches import Batches, Data, DataError, check_rows, of_iterable, read_data, split
from modernizer.weights.bridging import BridgeError, Place, at_start, find_places, save_places
from modernizer.weights.calibrate import NoConversion, Ridges, call_plainly, convert
from modernizer.weights.maps import MapError, WeightMap
from modernizer.weights.objective import Objective, choose, main_output, measure
from modernizer.weights.programs import Program, ProgramError, changed_files, copy_program

EXACT, CALIBRATED, BRIDGED, TRAINING = "exact", "calibrated", "bridged", "needs training"
ROUNDING = 1e-10  # of the largest output, in float64: what remains of an exact change
LEAST = 2  # tokens for each feature of the widest stream, below which no one should trust a fit
# These go last: everything else is calibrated with the old positions in place. What each puts into a model:
POSITIONS = {"rope": "RotaryEmbedding", "alibi": "ALiBi"}
CALIBRATION = "prenorm"

Told = Callable[[int, int, str], None]


class Unfit(Exception):
    """Why nothing can be calibrated. `str()` of it is a sentence for the user."""


@dataclass(frozen=True)
class Request:
    """What is asked for. `data` is a path or an expression in the model's module that gives batches."""

    before: Path
    after: Path
    model: str
    checkpoint: Path
    data: str
    output: Path
    rules: Sequence[Rule]
    options: Options = field(default_factory=dict)
    call: str | None = None
    loss: str | None = None
    length: int = 256
    tokens: int = 65_536
    held_out: int = 32_768
    device: str | None = None  # a GPU, if there is one
    ridges: Ridges = field(default_factory=Ridges)


@dataclass(frozen=True)
class Step:
    """What one rule did to the model. `change` is that of the loss, `difference` the largest of the outputs."""

    rule: str
    kind: str
    change: float
    difference: float
    notes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """All steps, what was measured, and how much of the data."""

    objective: Objective
    steps: list[Step]
    before: float
    after: float
    tokens: int
    held_out: int
    notes: list[str] = field(default_factory=list)


def keep_trained(request: Request, told: Told | None = None) -> Outcome:
    """Writes the checkpoint that the rewritten model loads, and says what each rule cost.

    The rules are applied to a copy of the old program one after the other; the last version must compute what the new
    program does. Nothing is written unless all of it succeeds; an interrupted run goes on where it was.

    Raises:
        Unfit: something does not fit; it is named.
    """
    try:
        return _Run(request, told).outcome()
    except (NoConversion, DataError, ProgramError, MapError, files.CheckpointError) as error:
        raise Unfit(str(error)) from error


class _Run:
    def __init__(self, request: Request, told: Told | None) -> None:
        self.request, self.told = request, told
        self.device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.before = Program.find(request.before, request.model)
        self.after = Program.find(request.after, request.model)
        self.checkpoint = files.read(request.checkpoint)
        self.notes: list[str] = []
        self.places: list[Place] = []
        self.forward = self._forward()

    def outcome(self) -> Outcome:
        self.target = self.after.build().to(self.device)  # what is wrong with it is said before any work is done
        self.rules = _rules_in_order(self.request.rules, self.target)
        old = self.before.build().to(self.device)
        self._load(old, self._without_prefix(self.checkpoint.state), str(self.request.checkpoint))
        data = self._data()
        used, measured = split(data, self.request.tokens, self.request.held_out, self.device)
        self._check(old, used, measured)
        first = next(iter(measured))
        objective = self._objective(old, first)
        with tempfile.TemporaryDirectory(prefix="modernizer-calibrate-") as folder:
            steps, new = self._steps(Path(folder), old, used, measured, objective)
        self._write(self._in_after(new, first))
        losses = [measure(objective, old, old, self.forward, measured)]
        with at_start(new, self.places) if self.places else nullcontext():
            losses.append(measure(objective, new, old, self.forward, measured))
        if self.places:
            beside = self.request.output.with_suffix(".positions.pt")
            save_places(beside, self.places)
            self.notes.append(f"the old positions are in {beside.name}: bridge(model, {beside.name!r}, steps=50)")
        return Outcome(objective, steps, losses[0], losses[1], used.tokens, measured.tokens, self.notes)

    # -- what comes in

    def _forward(self) -> Callable[[nn.Module, Any], object]:
        call = self.request.call
        if call is None:
            return call_plainly
        code = compile(call, "<call>", "eval")
        with self.before.imported() as names:
            scope = dict(names)
        return lambda model, batch: eval(code, {**scope, "model": model, "inputs": batch, "batch": batch})

    def _data(self) -> Data:
        source = self.request.data
        if Path(source).exists() or Path(source).suffix in (".npy", ".npz", ".pt", ".pth"):
            return read_data(Path(source), self.request.length)
        try:
            with self.before.imported() as scope:
                return of_iterable(eval(source, scope), source)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{source}: neither a file nor an expression that gives batches ({error})") from error

    def _check(self, old: nn.Module, used: Batches, measured: Batches) -> None:
        """Names what is wrong with the data before any work is done."""
        known = _vocabularies(old, self.forward, used, self.device)
        for batches in (used, measured):
            check_rows(batches, known)
        try:
            with torch.no_grad():
                output = main_output(self.forward(old, next(iter(used))))
        except Exception as error:
            shapes = ", ".join(str(list(part.shape)) for part in used.data.parts)
            raise Unfit(
                f"{used.data.source}: the old model cannot be called with rows of it (of shape {shapes}):"
                f" {type(error).__name__}: {' '.join(str(error).split())[:300]}; --length and --call may help"
            ) from error
        if not bool(output.isfinite().all()):
            raise Unfit("the old model's outputs on this data are not finite")
        widest = max((p.shape[0] for p in old.parameters() if p.dim() == 1), default=0)
        if used.tokens < LEAST * widest:
            raise Unfit(f"{used.data.source}: {used.tokens} tokens are too few for {widest} features; give more")

    def _objective(self, old: nn.Module, batch: Any) -> Objective:
        if self.request.loss is None:
            return choose(old, self.forward, batch)
        code = compile(self.request.loss, "<loss>", "eval")
        with self.before.imported() as names:
            scope = dict(names)

        def loss(output: Tensor, other: Tensor, batch: Any) -> Tensor:
            found: Tensor = eval(code, {**scope, "output": output, "old": other, "batch": batch})
            return found

        return Objective("yours", "by --loss", loss)

    def _without_prefix(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Wrappers of a model leave their mark on every name."""
        self.prefix = ""
        names = dict(state)
        for mark in ("module.", "_orig_mod.", "module."):
            if names and all(name.startswith(mark) for name in names):
                names = {name.removeprefix(mark): value for name, value in names.items()}
                self.prefix += mark
        return names

    @staticmethod
    def _load(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise Unfit(f"{source} does not fit the model: {' '.join(str(error).split())[:600]}") from error

    # -- the rules, one by one

    def _steps(
        self, folder: Path, old: nn.Module, used: Batches, measured: Batches, objective: Objective
    ) -> tuple[list[Step], nn.Module]:
        program, model = copy_program(self.before, folder / "0"), old
        named = changed_files(self.before, self.after)
        steps: list[Step] = []
        loss = measure(objective, old, old, self.forward, measured)
        for number, rule in enumerate(self.rules, 1):
            paths = [program.root / file for file in named if (program.root / file).is_file()]
            report = pipeline.upgrade(paths, [rule], self.request.options, write=False)
            if not report.changes:
                self.notes.append(f"{rule.name}: nothing to do without the rules before it")
                continue
            program = copy_program(program, folder / str(number), report.changes)
            new = program.build().to(self.device)
            notes = self._carry(rule, report, model, new)
            if rule.name in POSITIONS and (places := self._bridged(rule, model, new, next(iter(measured)))):
                with at_start(new, places):
                    start = measure(objective, new, old, self.forward, measured)
                    difference = _difference(model, new, self.forward, next(iter(measured)))
                at_once = measure(objective, new, old, self.forward, measured) - start
                said = f"{at_once:+.4f} if they are switched at once"
                steps.append(Step(rule.name, BRIDGED, start - loss, difference, (said,)))
                self.places += places
                model, loss = new, start
                continue
            if rule.name == CALIBRATION:
                notes += self._convert(model, new, used, measured, objective, old, loss)
            carried = report.weights if rule.name != CALIBRATION and not notes else None
            difference = _difference(model, new, self.forward, next(iter(measured)), carried)
            now = measure(objective, new, old, self.forward, measured)
            is_kept = rule.name == CALIBRATION or (report.weights is not None and not notes)
            kind = EXACT if difference <= ROUNDING and not notes else CALIBRATED if is_kept else TRAINING
            steps.append(Step(rule.name, kind, now - loss, difference, tuple(notes)))
            model, loss = new, now
        return steps, model

    def _bridged(self, rule: Rule, old: nn.Module, new: nn.Module, batch: Any) -> list[Place]:
        """Where the old positions were added, so that they may fade out."""
        if self.places:
            return []  # one bridge at a time
        try:
            return find_places(old, new, self.forward, batch)
        except BridgeError as error:
            self.notes.append(f"{rule.name}: no bridge: {error}")
            return []

    def _carry(self, rule: Rule, report: Report, old: nn.Module, new: nn.Module) -> list[str]:
        """Loads the new model with all that can be carried over; says what cannot."""
        state: Mapping[str, Any] = old.state_dict()
        wanted = new.state_dict()
        if report.weights is not None:
            try:
                state = carry(report.weights, state).state
            except MapError:
                if _shapes(state) != _shapes(wanted):
                    raise
                report.weights = None  # the rule has changed other models of the program alone
        fits = {n: v for n, v in state.items() if n in wanted and v.shape == wanted[n].shape}
        lost = [n for n in state if n not in fits]
        fresh = [n for n in wanted if n not in fits]
        new.load_state_dict({**wanted, **fits})
        if rule.name == CALIBRATION:
            return []  # its final norms are new and are calibrated
        notes = [f"{len(fresh)} tensors are new, such as {fresh[0]}"] if fresh else []
        return notes + ([f"{len(lost)} tensors have no place any more, such as {lost[0]}"] if lost else [])

    def _convert(
        self,
        model: nn.Module,
        new: nn.Module,
        used: Batches,
        measured: Batches,
        objective: Objective,
        old: nn.Module,
        loss: float,
    ) -> list[str]:
        naive = measure(objective, new, old, self.forward, measured) - loss
        with self._partial(model, used) as (start, save):
            made = convert(
                model, new, used, call=self.forward, ridges=self.request.ridges,
                progress=self.told, start=start, save=save,
            )  # fmt: skip
        self.notes.append(f"{CALIBRATION}: {made.tokens:,} tokens; {naive:+.4f} without the calibration")
        self.notes += [f"{CALIBRATION}: {note}" for note in made.notes]
        return []

    @contextmanager
    def _partial(
        self, model: nn.Module, used: Batches
    ) -> Iterator[tuple[dict[str, Any] | None, Callable[[dict[str, Any]], None]]]:
        """What an interrupted run left, if it was this one, and a way to leave something."""
        file = self.request.output.with_name(f".{self.request.output.name}.modernizer-partial")
        key = _fingerprint(model, used, self.request)
        start: dict[str, Any] | None = None
        if file.is_file():
            try:
                found = torch.load(file, map_location=self.device, weights_only=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a damaged pickle may raise anything; nothing but time is lost with it
                self.notes.append(f"{file.name}, of an interrupted run, cannot be read ({error}): started anew")
            else:
                start = found["start"] if isinstance(found, dict) and found.get("key") == key else None

        def save(state: dict[str, Any]) -> None:
            beside = file.with_name(f"{file.name}-new")
            torch.save({"key": key, "start": state}, beside)
            beside.replace(file)

        try:
            yield start, save
        except KeyboardInterrupt:
            raise
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        file.unlink(missing_ok=True)

    # -- what goes out

    def _in_after(self, new: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The weights in the new program's own model, which must compute the same with them."""
        target = self.target
        state = new.state_dict()
        self._load(target, state, f"what the rules make of {self.before.path}")
        difference = _difference(new, target, self.forward, batch)
        if difference > ROUNDING:
            raise Unfit(
                f"{self.after.path} computes something else than what the rules make of {self.before.path}: its outputs"
                f" differ by {difference:.2g}; were other rules or options used, or was it changed by hand?"
            )
        return {name: value.detach().cpu() for name, value in target.state_dict().items()}

    def _write(self, state: dict[str, Tensor]) -> None:
        named = {self.prefix + name: value for name, value in state.items()}
        whole = self.checkpoint
        if self.request.output.suffix == files.SAFE:
            whole = files.Checkpoint(named, named, metadata=whole.metadata)
        elif whole.others:
            self.notes.append(f"kept as it was: {', '.join(whole.others)}; the state of an optimizer does not fit now")
        files.write(self.request.output, whole, named)


def _rules_in_order(rules: Sequence[Rule], target: nn.Module) -> list[Rule]:
    """Positions last. Two rules find the same old ones: of these the one that the new model is by."""
    classes = {cls.__name__ for module in target.modules() for cls in type(module).__mro__}
    found = [rule for rule in rules if rule.name in POSITIONS]
    made = [rule for rule in found if POSITIONS[rule.name] in classes]
    left_out = [rule for rule in found if rule not in made] if made else []
    ordered = in_order([rule for rule in rules if rule not in left_out])
    return sorted(ordered, key=lambda rule: rule.name in POSITIONS)


def _difference(
    old: nn.Module,
    new: nn.Module,
    forward: Callable[[nn.Module, Any], object],
    batch: Any,
    carried: WeightMap | None = None,
) -> float:
    """The largest difference of outputs in float64, of the largest output.

    With a weight map the new model's weights are made by it anew, in float64: what it costs to round them to the type
    that they are stored in does not count.
    """
    outputs = []
    precise = [copy.deepcopy(model).double() for model in (old, new)]
    if carried is not None:
        precise[1].load_state_dict(carry(carried, precise[0].state_dict()).state, strict=False)
    with torch.no_grad():
        for model in precise:
            outputs.append(main_output(forward(model, _few(batch))).double())
    if outputs[0].shape != outputs[1].shape:
        return math.inf
    largest = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp_min(1e-30))
    return largest if math.isfinite(largest) else math.inf


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _few(batch: Any) -> Any:
    """Two rows of a batch, in float64 where they are real numbers."""
    if isinstance(batch, Tensor):
        return batch[:2].double() if batch.is_floating_point() else batch[:2]
    if isinstance(batch, dict):
        return {name: _few(part) for name, part in batch.items()}
    return tuple(_few(part) for part in batch)


def _vocabularies(
    model: nn.Module, forward: Callable[[nn.Module, Any], object], batches: Batches, device: torch.device
) -> dict[int, tuple[str, int]]:
    """For each part of the data that an embedding reads as it is, the embedding and how many tokens it knows."""
    row = batches.data.batch(batches.rows[:1], device)
    parts = list(row.values()) if isinstance(row, dict) else [row] if isinstance(row, Tensor) else list(row)
    zeros = [torch.zeros_like(part) for part in parts]
    filled: Any = zeros[0] if isinstance(row, Tensor) else tuple(zeros)
    if isinstance(row, dict):
        filled = dict(zip(row, zeros, strict=True))
    places = {part.untyped_storage().data_ptr(): number for number, part in enumerate(zeros)}
    found: dict[int, tuple[str, int]] = {}

    def entering(name: str, size: int) -> Callable[..., None]:
        def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
            number = places.get(given[0].untyped_storage().data_ptr()) if given else None
            if number is not None:
                found.setdefault(number, (name, size))

        return enter

    handles = [
        module.register_forward_pre_hook(entering(name, module.num_embeddings))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        with torch.no_grad():
            forward(model, filled)
    except Exception:  # the program's own code may raise anything on zeros; on the data itself it has to run
        return found
    finally:
        for handle in handles:
            handle.remove()
    return found


def _fingerprint(model: nn.Module, used: Batches, request: Request) -> str:
    made = hashlib.sha256()
    for name, value in model.state_dict().items():
        made.update(name.encode())
        made.update(_bytes(value))
    for part in used.data.parts:
        made.update(str((part.shape, part.dtype)).encode())
        for rows in torch.split(used.rows, 1024):
            made.update(_bytes(part[rows]))
    made.update(repr((used.rows.tolist(), request.ridges, request.call)).encode())
    return made.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return flat
