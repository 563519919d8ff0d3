"""Which activations happened within which, and what was made in them: an index of a finished execution."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cached_property
from heapq import merge

from modernizer.graph.machine import Machine
from modernizer.graph.values import Frame, Node, Value, flatten


class Activations:
    """Answers in the size of what happened in an activation, not in that of the program."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._inner: defaultdict[int, list[Frame]] = defaultdict(list)
        self._made: defaultdict[int, list[Node]] = defaultdict(list)
        self._read: defaultdict[int, dict[ast.AST, None]] = defaultdict(dict)
        self._first: dict[ast.AST, int] = {}  # when an expression was first evaluated, among all
        self._ends: dict[int, int] = {}
        self._operands: dict[int, tuple[int, ...]] = {}
        for frame in machine.frames:
            if frame.caller is not None:
                self._inner[id(frame.caller)].append(frame)
        for node in machine.nodes:
            self._made[id(node.frame)].append(node)
        for number, (syntax, found) in enumerate(machine.at.items()):
            self._first[syntax] = number
            for frame, _ in found:
                self._read[id(frame)][syntax] = None

    def operands(self, node: Node) -> tuple[int, ...]:
        """The ids of what a datum was made of, containers opened, constants included."""
        found = self._operands.get(id(node))
        if found is None:
            found = self._operands[id(node)] = tuple(id(leaf) for value in node.inputs for leaf in flatten(value))
        return found

    @cached_property
    def kept(self) -> dict[int, list[str]]:
        """The attributes of modules as which a datum is kept, by its id, containers opened."""
        found: defaultdict[int, list[str]] = defaultdict(list)
        for module in self._machine.modules:
            for name, value in module.attributes.items():
                for leaf in flatten(value):
                    found[id(leaf)].append(name)
        return dict(found)

    def end(self, frame: Frame) -> int:
        """One more than the order of the last datum made in the outermost activation around this one."""
        *_, outermost = frame.outward()
        found = self._ends.get(id(outermost))
        if found is None:
            last = max((made[-1].order for f in self.within(outermost) if (made := self._made[id(f)])), default=-1)
            found = self._ends[id(outermost)] = last + 1
        return found

    def within(self, frame: Frame) -> Iterator[Frame]:
        """The activation itself, and every one that happened during it."""
        todo = [frame]
        while todo:
            current = todo.pop()
            yield current
            todo += self._inner[id(current)]

    def nodes(self, frame: Frame, inside: Collection[int] | None = None) -> Iterator[Node]:
        """The data made during an activation, in order; only those made while one of the expressions or statements of
        its own code `inside` (by id) was evaluated, if any are given."""
        own = self._made[id(frame)]
        inner = self._inner[id(frame)]
        if inside is not None:
            own = [n for n in own if id(n.node) in inside]
            inner = [f for f in inner if id(f.call) in inside]
        parts = [own, *(self._made[id(f)] for within in inner for f in self.within(within))]
        return merge(*parts, key=lambda node: node.order)

    def evaluations(self, frame: Frame, inside: Collection[int]) -> Iterator[tuple[ast.AST, Frame, Value]]:
        """What every expression gave while code `inside` (by id) of an activation was executed, the code itself and
        what it called, expression by expression."""
        own = [s for s in self._read[id(frame)] if id(s) in inside]
        frames = {id(f) for called in self._inner[id(frame)] if id(called.call) in inside for f in self.within(called)}
        found = dict.fromkeys(own) | dict.fromkeys(syntax for f in frames for syntax in self._read[f])
        for syntax in sorted(found, key=self._first.__getitem__):
            for active, value in self._machine.at[syntax]:
                if id(active) in frames or (active is frame and id(syntax) in inside):
                    yield syntax, active, value
