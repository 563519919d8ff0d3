"""What the axes of a tensor stand for while a sequence grows: batch, time in several lengths, or anything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from modernizer.graph.query import same_size
from modernizer.graph.values import Const, Many, Node, Value

BATCH, OTHER = "B", "."
# Times: the whole sequence as the loop holds it, as it is fed (cropped to a window), what of it is new, its last step.
GROWN, FED, NEW, LAST = "G", "F", "N", "L"
TIMES = frozenset({GROWN, FED, NEW, LAST})


class Stops(Exception):
    """Why nothing is known about the axes of a datum."""


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis. `size` is the value that says how long it is, where the code does; `parts` are the axes it joins."""

    letter: str
    size: Value | None = None
    parts: tuple[Axis, ...] = ()

    @property
    def is_time(self) -> bool:
        return self.letter in TIMES

    @property
    def has_time(self) -> bool:
        return self.is_time or any(part.has_time for part in self.parts)

    @property
    def atoms(self) -> tuple[Axis, ...]:
        return tuple(atom for part in self.parts for atom in part.atoms) if self.parts else (self,)

    def is_like(self, other: Axis) -> bool:
        mine, theirs = self.atoms, other.atoms
        return len(mine) == len(theirs) and all(a.letter == b.letter for a, b in zip(mine, theirs, strict=True))


class Unknown(Value):
    """A size of which only is known that it is itself."""


def free(size: Value | None = None) -> Axis:
    """An axis that is neither batch nor time."""
    return Axis(OTHER, Unknown() if size is None else size)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of which every entry depends on the tokens up to its own place in time alone, and not on the length.

    `is_weights` where its last two axes are times and everything after the diagonal is zero: attention weights.
    """

    axes: tuple[Axis, ...]
    is_weights: bool = False

    @property
    def letters(self) -> str:
        return "".join(a.letter for a in self.axes)

    @property
    def times(self) -> list[int]:
        """The numbers of its axes of time."""
        return [i for i, axis in enumerate(self.axes) if axis.has_time]

    def has(self, letter: str) -> bool:
        return any(atom.letter == letter for axis in self.axes for atom in axis.atoms)


@dataclass(frozen=True, eq=False)
class Number:
    """The size of an axis of time or of the batch: the product of `letters` and `sizes`, plus `more`."""

    letters: str
    sizes: tuple[Value, ...] = ()
    more: int = 0


@dataclass(frozen=True, eq=False)
class Sizes:
    """The shape of a tensor, or a part of it."""

    entries: tuple[Number | Value, ...]


@dataclass(frozen=True, eq=False)
class Loose:
    """The same with and without a cache, but perhaps made of anything: what the loop makes of the last step."""

    reason: str


@dataclass(frozen=True, eq=False)
class Bounds:
    """A slice one of whose ends has to do with the sequence; it is read where it is used."""

    ends: tuple[Number | Tensor | Sizes | Loose | Told, ...]


@dataclass(frozen=True, eq=False)
class Told:
    """The outcome of a comparison of lengths."""

    letters: str


Known = Tensor | Number | Sizes | Loose | Bounds | Told


def speaks_of(known: Known, letters: str) -> bool:
    """Whether a fact mentions an axis of one of these kinds."""
    if isinstance(known, Tensor):
        return any(known.has(letter) for letter in letters)
    if isinstance(known, Number | Told):
        return any(letter in known.letters for letter in letters)
    if isinstance(known, Sizes):
        return any(speaks_of(e, letters) for e in known.entries if isinstance(e, Number))
    if isinstance(known, Bounds):
        return any(speaks_of(end, letters) for end in known.ends)
    return False


def is_of_batch(known: Known) -> bool:
    """Whether a fact has to do with the size of the batch alone, and neither with what the sequence holds nor how long
    it is."""
    if isinstance(known, Tensor):
        return not any(axis.has_time for axis in known.axes)
    if isinstance(known, Number | Told):
        return set(known.letters) <= {BATCH}
    if isinstance(known, Sizes):
        return all(is_of_batch(e) for e in known.entries if isinstance(e, Number))
    if isinstance(known, Bounds):
        return all(map(is_of_batch, known.ends))
    return False


# -- sizes


@dataclass(frozen=True, eq=False)
class Entry:
    """One size in a view: a time, the batch, a product of these, free, or open (-1)."""

    letters: str = ""  # times and batch among its factors
    sizes: tuple[Value, ...] = ()
    is_open: bool = False

    @property
    def times(self) -> str:
        return "".join(c for c in self.letters if c in TIMES)


def reshaped(axes: Sequence[Axis], entries: Sequence[Entry], origins: Mapping[int, Value]) -> tuple[Axis, ...]:
    """The axes after a view to these sizes; raises Stops where rows of different times might be mixed.

    The elements keep their order, so it suffices that what lies between two axes of time has the same size before
    and after. One such stretch may be unknown: the number of elements is the same. `origins` says for a value what
    size it was read from.
    """
    atoms = [atom for axis in axes for atom in axis.atoms]
    wanted = [a.letter for a in atoms if a.is_time]
    entries = _opened(atoms, list(entries), wanted, origins)
    found = [c for e in entries for c in e.times]
    if found != wanted:
        raise Stops("a view to another shape in which time cannot be followed")
    before, after = _stretches(atoms), _entry_stretches(entries)
    unknown = [k for k, (a, b) in enumerate(zip(before, after, strict=True)) if not _equal(a, b, origins)]
    if len(unknown) > 1:
        raise Stops("a view to sizes that cannot be compared with those before")
    made: list[Axis] = []
    for entry in entries:
        earlier = sum(axis.has_time for axis in made)
        whole = not entry.times and len(after[earlier]) == 1 and [a.letter for a in before[earlier]] == [BATCH]
        made.append(Axis(BATCH) if whole else _axis(entry))
    return tuple(made)


def _opened(
    atoms: Sequence[Axis], entries: list[Entry], wanted: Sequence[str], origins: Mapping[int, Value]
) -> list[Entry]:
    """The entries with -1 read as what it must be: an axis of time, or the batch and time joined."""
    found = [c for e in entries for c in e.times]
    place = next((i for i, e in enumerate(entries) if e.is_open), None)
    if place is None or len(found) == len(wanted):
        return entries
    missing = len(wanted) - len(found)
    earlier = sum(len(e.times) for e in entries[:place])
    lost = "".join(wanted[earlier : earlier + missing])
    index = [i for i, a in enumerate(atoms) if a.is_time][earlier]
    leading = list(atoms[:index])
    ahead = list(entries[:place])
    if missing == 1 and earlier == 0 and not ahead and [a.letter for a in leading] == [BATCH]:
        rest = list(atoms[index + 1 :])
        if not any(a.is_time for a in rest) and _equal(rest, entries[place + 1 :], origins):
            return [Entry(BATCH + lost), *entries[place + 1 :]]
        raise Stops("a view that joins batch and time with something else")
    return [*entries[:place], Entry(lost), *entries[place + 1 :]]


def _stretches(atoms: Sequence[Axis]) -> list[list[Axis]]:
    found: list[list[Axis]] = [[]]
    for atom in atoms:
        if atom.is_time:
            found.append([])
        else:
            found[-1].append(atom)
    return found


def _entry_stretches(entries: Sequence[Entry]) -> list[list[Entry]]:
    found: list[list[Entry]] = [[]]
    for entry in entries:
        if not entry.times:
            found[-1].append(entry)
            continue
        rest = "".join(c for c in entry.letters if c not in TIMES)
        if entry.sizes or entry.letters != rest + entry.times:
            raise Stops("a view that joins time with something else")
        if rest:
            found[-1].append(Entry(rest))
        found.append([])
    return found


def _equal(atoms: Sequence[Axis], entries: Sequence[Entry], origins: Mapping[int, Value]) -> bool:
    """Whether two stretches surely have the same number of elements."""
    if any(e.is_open for e in entries) or any(a.size is None for a in atoms if a.letter != BATCH):
        return False
    if sum(a.letter == BATCH for a in atoms) != sum(e.letters.count(BATCH) for e in entries):
        return False
    mine = [a.size for a in atoms if a.letter != BATCH and a.size is not None]
    theirs = [size for e in entries for size in e.sizes]
    return equal_products(mine, theirs, origins)


def equal_products(a: Sequence[Value], b: Sequence[Value], origins: Mapping[int, Value]) -> bool:
    """Whether two products of sizes are surely equal, quotients such as `width // heads` taken as exact."""
    up, down = _factors(a, origins)
    other_up, other_down = _factors(b, origins)
    left, right = [*up, *other_down], [*other_up, *down]
    number = 1.0
    for side, power in ((left, 1), (right, -1)):
        for fixed in [v for v in side if isinstance(v, Const)]:
            if not isinstance(fixed.value, int) or fixed.value <= 0:
                return False
            number *= float(fixed.value) ** power
            side.remove(fixed)
    for value in list(left):
        match = next((v for v in right if same_size(value, v)), None)
        if match is None:
            return False
        left.remove(value)
        right.remove(match)
    return not left and not right and abs(number - 1) < 1e-9


def _factors(values: Sequence[Value], origins: Mapping[int, Value]) -> tuple[list[Value], list[Value]]:
    up: list[Value] = []
    down: list[Value] = []
    todo = [(value, True) for value in values]
    while todo:
        value, over = todo.pop()
        value = origins.get(id(value), value)
        if isinstance(value, Node) and value.op == "mul" and len(value.args) == 2:
            todo += [(part, over) for part in value.args]
        elif isinstance(value, Node) and value.op in ("floordiv", "div") and len(value.args) == 2:
            todo += [(value.args[0], over), (value.args[1], not over)]
        elif isinstance(value, Node) and value.op == "int" and len(value.args) == 1:
            todo.append((value.args[0], over))
        else:
            (up if over else down).append(value)
    return up, down


def _axis(entry: Entry) -> Axis:
    if entry.letters in TIMES:
        return Axis(entry.letters)
    if entry.times:
        return Axis(entry.letters, None, tuple(Axis(c) for c in entry.letters))
    if entry.letters == BATCH and not entry.sizes:
        return Axis(BATCH)
    return free(entry.sizes[0] if len(entry.sizes) == 1 and not entry.letters else None)


# -- numbers


def constant(value: Value | None) -> int | None:
    """The integer a value is, None where it is none."""
    if isinstance(value, Const) and isinstance(value.value, int) and not isinstance(value.value, bool):
        return value.value
    return None


def integers(values: Sequence[Value]) -> list[int] | None:
    """The integers that positional arguments are, one list of them opened."""
    if len(values) == 1 and isinstance(values[0], Many):
        values = values[0].items
    found = [constant(v) for v in values]
    return None if any(f is None for f in found) else [f for f in found if f is not None]


def placed(axis: int | None, rank: int) -> int:
    """A dimension counted from the left; raises Stops where it is not known."""
    if axis is None or not -rank <= axis < rank:
        raise Stops("an axis that cannot be told")
    return axis % rank


def merged(a: Sequence[Axis], b: Sequence[Axis]) -> Iterator[tuple[int, Axis, Axis]]:
    """Pairs of axes that broadcasting aligns, with their number from the right (negative)."""
    missing = free(Const(1))
    for place in range(-max(len(a), len(b)), 0):
        yield place, a[place] if -place <= len(a) else missing, b[place] if -place <= len(b) else missing


# -- what operations share

COMPARISONS = frozenset("eq ne noteq lt le gt ge lte gte".split())
LISTS = frozenset("split chunk tensor_split unbind max min topk sort median".split())


def without(known: Tensor, place: int, *instead: Axis) -> tuple[Axis, ...]:
    """The axes with others instead of one."""
    return (*known.axes[:place], *instead, *known.axes[place + 1 :])


def size_of(axis: Axis) -> Number | Value:
    """How long an axis is: a number that speaks of time or batch, or the value its code has for it."""
    if axis.letter == ".":
        return axis.size if axis.size is not None else Const(None)
    return Number(axis.letter)


def entry_of(value: Number | Value) -> Entry:
    """A size as a view is given it; raises Stops where it is one more or less."""
    if not isinstance(value, Number):
        return Entry(sizes=(value,))
    if value.more:
        raise Stops("a size that is not the sequence's length, but some more or less")
    return Entry(value.letters, value.sizes)


def is_window(start: Value) -> bool:
    """Whether a slice from here takes the last so many steps, however long the sequence is: `[-width:]`."""
    if isinstance(start, Const):
        return isinstance(start.value, int) and start.value < 0
    return isinstance(start, Node) and start.op == "neg"
