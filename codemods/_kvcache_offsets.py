"""Positions that a layer counts among its new steps: with a cache they begin where the cache ends."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from codemods._anchors import Code
from codemods._kvcache_attention import Update
from codemods._kvcache_axes import NEW, Number
from codemods._kvcache_loops import Generation
from codemods._kvcache_thread import Thread
from codemods._kvcache_time import Timeline
from codemods._survey import Cannot
from modernizer.edit import AddArgument, AddParameter, Edit, Replace
from modernizer.graph.query import location
from modernizer.graph.values import Frame
from modernizer.syntax import below, free_name, names_in


@dataclass(eq=False)
class Offsets:
    """What has to count on, and how it is told by attention, which asks the cache.

    `places` are expressions with their activations, each one of the repairs of a timeline.
    """

    code: Code
    generation: Generation
    line: Timeline
    updates: Sequence[Update]
    places: Mapping[ast.AST, Sequence[Frame]]
    thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self.tops = {id(f): u for u in self.updates for f, _ in u.frames}
        self.thread = Thread(self.code, self.generation, frozenset(self.tops))

    def check(self) -> None:
        """Raises Cannot where a place cannot be told how much there was before."""
        reached: set[int] = set()
        for place, frames in self.places.items():
            for frame in frames:
                top = self._top(place, frame)
                self.thread.follow(frame)
                reached.add(id(top))
            self._check_alike(place, frames)
        if self.thread.sequentials:
            call, frame = next(iter(self.thread.sequentials.items()))
            raise Cannot("positions are counted within a Sequential", location(call, frame))
        self.thread.check()
        for function in {u.function for u in self.updates}:
            mine = [u for u in self.updates if u.function is function]
            if len({u.self_name for u in mine}) > 1 and any(id(f) in reached for u in mine for f, _ in u.frames):
                raise Cannot("several layers attend in one function that counts positions",
                             location(function, mine[0].frame))  # fmt: skip

    def _top(self, place: ast.AST, frame: Frame) -> Frame:
        """The activation of the function that asks the cache around another."""
        for outer in frame.outward():
            if id(outer) in self.tops:
                return outer
        raise Cannot("positions or masks are made for what is new outside of attention: they would start over",
                     location(place, frame))  # fmt: skip

    def _check_alike(self, place: ast.AST, frames: Sequence[Frame]) -> None:
        """Whoever is told where to begin counts what is new."""
        known = set(map(id, frames))
        for active, _ in self.code.graph.machine.at.get(place, ()):
            if id(active) not in known and any(id(f) in self.tops for f in active.outward()):
                raise Cannot("positions are counted for what is new and for something else", location(place, active))

    # -- the edits

    def lines(self, cache: str) -> Iterator[tuple[ast.stmt, str]]:
        """The statements that ask the cache, each before one of attention."""
        name = self._past()
        for function, update in self._functions():
            yield self._first(function), f"{name} = 0 if {cache} is None else {cache}.length_of({update.self_name})"

    def edits(self) -> Iterator[Edit]:
        """Parameters, arguments and what is counted."""
        tree, offset = self.code.tree, self._offset()
        for function in self.thread.functions:
            yield AddParameter(tree.path(function), function, f"{offset}=0")
        for call, frame in self.thread.calls.items():
            yield AddArgument(tree.path(call), call, self._name_in(frame), offset)
        for place, frames in self.places.items():
            yield from self._edits(place, frames[0])

    def _edits(self, place: ast.AST, frame: Frame) -> Iterator[Edit]:
        path, name, repair = frame.path, self._name_in(frame), self.line.repair
        if place in repair.rows:
            assert isinstance(place, ast.expr)
            yield Replace(path, place, f"$0[..., {name}:, :]", (place,))
        elif place in repair.causal:
            assert isinstance(place, ast.Call)
            given = next(iter([k.value for k in place.keywords if k.arg == "is_causal"] + place.args[5:6]))
            is_plain = isinstance(given, ast.Constant)
            yield Replace(
                path, given, f"{name} == 0" if is_plain else f"$0 and {name} == 0", () if is_plain else (given,)
            )
        elif place in repair.tables:
            assert isinstance(place, ast.Subscript) and isinstance(place.slice, ast.Tuple)
            rows, columns = place.slice.elts[-2:]
            assert isinstance(rows, ast.Slice) and isinstance(columns, ast.Slice)
            yield Replace(path, rows, f"{name} : {name} + {_length(rows, frame)}")
            yield Replace(path, columns, f": {name} + {_length(columns, frame)}")
        elif place in repair.lengths:
            assert isinstance(place, ast.Call)
            for argument in lengths(self.code, self.line, place, frame):
                yield Replace(path, argument, f"{name} + $0", (argument,))
        elif isinstance(place, ast.Call) and self._is_rotary(place):
            yield AddArgument(path, place, name, "offset")
        elif isinstance(place, ast.Call):
            yield Replace(path, place, f"$0 + {name}", (place,))
        else:
            assert isinstance(place, ast.Slice)
            yield Replace(path, place, f"{name} : {name} + {_length(place, frame)}")

    def _is_rotary(self, call: ast.Call) -> bool:
        found = [v for _, v in self.code.graph.machine.at.get(call.func, ())]
        return any(getattr(v, "torch_name", "") == "modernizer.components.RotaryEmbedding" for v in found)

    def _functions(self) -> Iterator[tuple[ast.FunctionDef, Update]]:
        """The functions that ask the cache for what they count."""
        found: dict[ast.FunctionDef, Update] = {}
        for place, frames in self.places.items():
            for frame in frames:
                update = self.tops[id(self._top(place, frame))]
                found.setdefault(update.function, update)
        yield from found.items()

    def _first(self, function: ast.FunctionDef) -> ast.stmt:
        """The first statement of a function's own in which a place is, the way to one, or the cache is updated."""
        updated = [u.statement for u in self.updates if u.function is function]
        wanted = set(map(id, (*self.places, *self.thread.calls, *updated)))
        return next(s for s in function.body if any(id(n) in wanted for n in below(s)))

    def _name_in(self, frame: Frame) -> str:
        """How an activation calls what was before: its own variable, its parameter, or that of the function around."""
        while id(frame) not in self.tops and frame.function is not None and frame.function.closure is not None:
            if frame.function.owner is not None:
                break
            frame = frame.function.closure
        return self._past() if id(frame) in self.tops else self._offset()

    def _past(self) -> str:
        return free_name("past", {n for u in self.updates for n in names_in(u.function)})

    def _offset(self) -> str:
        return free_name("offset", {n for f in self.thread.functions for n in names_in(f)})


def _length(part: ast.Slice, frame: Frame) -> str:
    """The code of the end of `:T`, as the operand of a sum."""
    assert part.upper is not None
    code = frame.scope.source.code(part.upper)
    return code if isinstance(part.upper, ast.Name | ast.Attribute | ast.Call | ast.Subscript) else f"({code})"


def lengths(code: Code, line: Timeline, call: ast.Call, frame: Frame) -> list[ast.expr]:
    """The arguments of `ones(1, T, T)` that say how many steps are new."""
    arguments = list(call.args)
    if len(arguments) == 1 and isinstance(arguments[0], ast.Tuple | ast.List):
        arguments = list(arguments[0].elts)
    known = [(a, v) for a in arguments if (v := code.value(a, frame)) is not None]
    return [a for a, v in known if isinstance(k := line.type_of(v), Number) and k.letters == NEW]
