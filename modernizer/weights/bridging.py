"""The bridge from absolute positions to rotary ones or ALiBi: the old fade out while the new fade in, step by step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = "modernizer positions"
CLOSE = 1e-9  # of the largest value, in float64
MOST = 4  # streams that start with positions


class BridgeError(Exception):
    """Why there is no bridge. `str()` of it is a sentence for the user."""


@dataclass(frozen=True)
class Place:
    """Where the old model added positions: to what the module `name` gives, `table` is `[time, features]`.

    `time_axis` is the axis of time there, 0 or 1.
    """

    name: str
    table: Tensor
    time_axis: int


def save_places(path: Path, places: Sequence[Place]) -> None:
    """Writes the file that `bridge` reads."""
    parts = [{"module": p.name, "table": p.table.cpu(), "time_axis": p.time_axis} for p in places]
    torch.save({"format": FORMAT, "places": parts}, path)


def load_places(path: Path) -> list[Place]:
    """The places in a file. Raises BridgeError where it holds none."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if found["format"] != FORMAT:
            raise KeyError(FORMAT)
        return [Place(str(p["module"]), p["table"], int(p["time_axis"])) for p in found["places"]]
    except FileNotFoundError as error:
        raise BridgeError(f"{path}: no such file; `modernize calibrate` writes it beside the checkpoint") from error
    except Exception as error:
        raise BridgeError(f"{path}: holds no positions ({type(error).__name__})") from error


class Bridge:
    """Call it once for each training step; after `steps` of them nothing of it is left in the model.

    At first the model computes with the old positions alone. After step t the new ones act with the strength t / steps
    (angles of rotary positions, slopes of ALiBi) and the old ones with the rest. The code of the model, its parameters
    and its state dict do not change.

    Args:
        model: the upgraded model, with calibrated weights.
        places: where and what the old positions were: the file that `modernize calibrate` left, or the places in it.
        steps: how many calls it takes.

    Raises:
        BridgeError: the model has no module of that name, or no positions of ours.
    """

    def __init__(self, model: nn.Module, places: Path | str | Sequence[Place], steps: int = 50) -> None:
        if steps < 1:
            raise BridgeError(f"a bridge takes at least one step, not {steps}")
        self.places = load_places(Path(places)) if isinstance(places, str | Path) else list(places)
        self.steps, self.taken = steps, 0
        inner = _unwrapped(model)
        self.positions = [(module, _strength(module)) for module in inner.modules() if _is_ours(module)]
        if not self.positions:
            raise BridgeError("the model has neither rotary positions nor ALiBi of modernizer's")
        self.handles = []
        for place in self.places:
            try:
                module = inner.get_submodule(place.name)
            except AttributeError as error:
                raise BridgeError(
                    f"the model has no module `{place.name}`, which the positions were added to"
                ) from error
            self.handles.append(module.register_forward_hook(self._adding(place)))
        self._set(0.0)

    @property
    def strength(self) -> float:
        """How far it is: 0 with the old positions alone, 1 with the new ones."""
        return min(1.0, self.taken / self.steps)

    def __call__(self) -> float:
        """One step further; returns the strength of the new positions."""
        if self.taken < self.steps:
            self.taken += 1
            self._set(self.strength)
        return self.strength

    def jump(self) -> None:
        """Goes to the end at once."""
        self.taken = self.steps
        self._set(1.0)

    def _set(self, strength: float) -> None:
        for module, whole in self.positions:
            _set_strength(module, whole * strength)
        if strength >= 1.0:
            for handle in self.handles:
                handle.remove()

    def _adding(self, place: Place) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(module: nn.Module, given: Any, made: Tensor) -> Tensor:
            length = made.shape[place.time_axis]
            if length > len(place.table):
                raise BridgeError(
                    f"a sequence of {length} steps, while the old positions are known for {len(place.table)}: calibrate"
                    " with longer rows (--length), or train on shorter ones until the bridge is done"
                )
            table = place.table[:length].to(made) * (1.0 - self.strength)
            return made + (table if place.time_axis == 1 else table.unsqueeze(1))

        return add


def bridge(model: nn.Module, places: Path | str | Sequence[Place], steps: int = 50) -> Bridge:
    """A bridge over `steps` training steps: call what comes back once after each; see `Bridge`."""
    return Bridge(model, places, steps)


def find_places(old: nn.Module, new: nn.Module, forward: Callable[[nn.Module, Any], object], batch: Any) -> list[Place]:
    """Where the old model adds positions that the new one, which has relative ones instead, does not.

    The two are run on `batch` in float64; with what is found the new one must compute exactly what the old one does.

    Raises:
        BridgeError: what the old model has more of is no table of positions that is added to a stream.
    """
    old, new = copy.deepcopy(old).double(), copy.deepcopy(new).double()
    places: list[Place] = []
    with torch.no_grad():
        wanted = _calls(old, forward, batch)
        for _ in range(MOST + 1):
            trial = Bridge(new, places) if places else _silenced(new)
            found = _calls(new, forward, batch)
            trial.jump()
            place = _next_place(wanted, found)
            if place is None:
                return places
            places.append(place)
    raise BridgeError("the two differ by more than positions that are added to a stream")


@dataclass(eq=False)
class _Called:
    name: str
    given: Tensor | None
    made: Tensor | None


def _calls(model: nn.Module, forward: Callable[[nn.Module, Any], object], batch: Any) -> list[_Called]:
    """Every call of a module, in the order in which they begin."""
    calls: list[_Called] = []
    active: list[_Called] = []

    def entering(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
            first = given[0] if given and isinstance(given[0], Tensor) and given[0].is_floating_point() else None
            active.append(_Called(name, None if first is None else first.clone(), None))
            calls.append(active[-1])

        return enter

    def leaving(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        called = active.pop()
        if isinstance(made, Tensor) and made.is_floating_point():
            called.made = made.clone()

    handles = [m.register_forward_pre_hook(entering(name)) for name, m in model.named_modules()]
    handles += [m.register_forward_hook(leaving) for m in model.modules()]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _next_place(wanted: Sequence[_Called], found: Sequence[_Called]) -> Place | None:
    """The first thing that the old model reads otherwise, as a table that is added; None where all is the same."""
    old = {(c.name, n): c for c, n in _numbered(wanted)}
    for number, (call, times) in enumerate(_numbered(found)):
        other = old.get((call.name, times))
        if other is None or call.given is None or other.given is None or call.given.shape != other.given.shape:
            continue
        difference = other.given - call.given
        if _is_small(difference, other.given):
            continue
        for axis in (1, 0):
            batch_axis = 1 - axis
            table = difference.select(batch_axis, 0)
            if difference.dim() == 3 and _is_small(difference - table.unsqueeze(batch_axis), other.given):
                return _hosted(found[:number], Counter(c.name for c in found), call.given, table, axis)
        raise BridgeError(f"`{call.name}` reads something else in the old model, and not by a table of positions")
    return None


def _hosted(before: Sequence[_Called], times: Mapping[str, int], stream: Tensor, table: Tensor, axis: int) -> Place:
    """The place for a table: a module whose result is the stream, or a multiple of it."""
    for call in before:
        if call.made is None or call.made.shape != stream.shape or times[call.name] > 1:
            continue
        factor = float((call.made * stream).sum() / (call.made * call.made).sum().clamp_min(1e-300))
        if abs(factor) > 1e-6 and _is_small(call.made * factor - stream, stream):
            return Place(call.name, table / factor, axis)
    raise BridgeError("no module of the new model gives what the old one added positions to")


def _numbered(calls: Sequence[_Called]) -> Iterator[tuple[_Called, int]]:
    seen: Counter[str] = Counter()
    for call in calls:
        yield call, seen[call.name]
        seen[call.name] += 1


def _is_small(difference: Tensor, beside: Tensor) -> bool:
    return bool(difference.abs().max() <= CLOSE * beside.abs().max().clamp_min(1.0))


# -- positions of ours, also where they were written beside the code


def _is_ours(module: nn.Module) -> bool:
    names = {cls.__name__ for cls in type(module).__mro__}
    return ("RotaryEmbedding" in names and hasattr(module, "scale")) or (
        "ALiBi" in names and hasattr(module, "strength")
    )


def _strength(module: nn.Module) -> float:
    value: Any = module.scale if hasattr(module, "scale") else module.strength
    return float(value)


def _set_strength(module: nn.Module, value: float) -> None:
    if hasattr(module, "scale"):
        module.scale = value  # type: ignore[assignment]
        module._tables.clear()  # type: ignore[operator,union-attr]
    else:
        module.strength = value  # type: ignore[assignment]


def _silenced(model: nn.Module) -> Bridge:
    """A bridge without old positions, at its start: the new ones have no effect."""
    return Bridge(model, [])


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers of torch's for several devices and for compiling."""
    while type(model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        model = model.module if hasattr(model, "module") else model._orig_mod  # type: ignore[assignment]
    return model


@contextmanager
def at_start(model: nn.Module, places: Sequence[Place]) -> Iterator[None]:
    """The model with its old positions alone, for as long as this lasts."""
    crossed = Bridge(model, places)
    try:
        yield
    finally:
        crossed.jump()
