"""Stacks: the residual sums that follow each other along one stream, and where the stream leaves them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from modernizer.graph import Graph
from modernizer.graph.query import class_of, inputs, is_torch, location, users
from modernizer.graph.values import Frame, Module, Node, Value, flatten
from modernizer.model_map.map import Evidence, Role
from modernizer.model_map.norm import SIZES, Norm, Norms, made_of
from modernizer.model_map.residual import LAYOUT, Residual, Residuals, path
from modernizer.source import Location
from modernizer.syntax import loops_around

# What the stream may pass between two sums and still be the stream: copies, other layouts, masking, and something
# added that is not made of it, such as positions.
PASSED = LAYOUT | frozenset({"merge", "mul", "masked_fill", "add"})

_Place = tuple[str, Frame, ast.AST, tuple[ast.AST, ...]]
LOOP, SEQUENTIAL, PLAIN = "loop", "sequential", "plain"


@dataclass(eq=False)
class Stack:
    """One run of the stream through a stack of layers.

    `kind` says how the layers follow each other: in a `loop`, in a `sequential` call, or written out (`plain`).
    `node` is that loop or call, evaluated in `frame`; for `plain`, `frame` is the innermost activation with all sums.
    """

    kind: str
    frame: Frame
    node: ast.AST | None
    residuals: list[Residual]
    flow: Flow

    @property
    def attends(self) -> bool:
        return any(r.attends for r in self.residuals)

    @cached_property
    def ends(self) -> list[Residual]:
        """The sums behind which none of this stack's follows."""
        inside = {id(r) for r in self.residuals}
        return [r for r in self.residuals if not any(id(s) in inside for s in self.flow.after(r))]

    @cached_property
    def inner(self) -> list[Residual]:
        return [r for r in self.residuals if r not in self.ends]

    def final_norms(self) -> list[Norm]:
        """The norms that everything behind the stack goes through; empty where something does not."""
        found = [self.flow.only_norm(end.out) for end in self.ends]
        norms = [norm for norm in found if norm is not None]
        return norms if len(norms) == len(found) else []


class Flow:
    """How the stream goes on behind each sum."""

    def __init__(self, residuals: Residuals, norms: Norms) -> None:
        self.residuals = residuals
        self.norms = norms
        self._streams: defaultdict[int, list[Residual]] = defaultdict(list)
        for r in residuals.all:
            self._streams[id(r.stream)].append(r)
        self._carried: dict[int, dict[int, Node]] = {}

    @cached_property
    def _summed(self) -> set[int]:
        """All data in which a residual sum has a part: what adds these joins streams."""
        found: set[int] = set()
        for node in self.residuals.graph.machine.nodes:
            made = node.op not in SIZES and any(id(i) in found for i in inputs(node))
            if made or id(node) in self.residuals.by_sum:
                found.add(id(node))
        return found

    def carried(self, r: Residual) -> dict[int, Node]:
        """The stream behind a sum and everything that is still it: copies, other layouts, masked, merged."""
        return self.carried_from(r.out)

    def carried_from(self, start: Node) -> dict[int, Node]:
        """As `carried`, for a stream that comes out of any datum."""
        if id(start) not in self._carried:
            found, todo = {id(start): start}, [start]
            while todo:
                node = todo.pop()
                for user in users(node):
                    if id(user) not in found and self._passes(user, start, found):
                        found[id(user)] = user
                        todo.append(user)
            self._carried[id(start)] = found
        return self._carried[id(start)]

    def _passes(self, user: Node, stream: Node, found: dict[int, Node]) -> bool:
        if user.op not in PASSED or not user.args or self.norms.around(user) is not None:
            return False
        if user.op in ("mul", "masked_fill", "add"):
            others = [a for a in user.args if id(a) not in found]
            if len(others) != len(user.args) - 1 or any(made_of(a, stream) for a in others):
                return False
            return user.op != "add" or not any(id(leaf) in self._summed for a in others for leaf in flatten(a))
        return user.op == "merge" or id(user.args[0]) in found

    def after(self, r: Residual) -> list[Residual]:
        """The sums that continue the stream behind `r`."""
        return [s for node in self.carried(r).values() for s in self._streams[id(node)] if s is not r]

    def uses(self, r: Residual, but: Container[int] = ()) -> list[Node]:
        """What reads the stream behind a sum, apart from its size, and otherwise than through the data of these ids."""
        return self.uses_from(r.out, but)

    def uses_from(self, start: Node, but: Container[int] = ()) -> list[Node]:
        """As `uses`, for a stream that comes out of any datum."""
        carried = self.carried_from(start)
        found = {
            id(user): user
            for key, node in carried.items()
            if key not in but
            for user in users(node)
            if id(user) not in carried and user.op not in SIZES
        }
        return list(found.values())

    def only_norm(self, start: Node) -> Norm | None:
        """The one norm that everything made of a stream goes through."""
        uses = self.uses_from(start)
        found = {id(n): n for n in map(self.norms.around, uses)}
        return next(iter(found.values())) if len(found) == 1 else None


class Stacks:
    """All stacks of a program."""

    def __init__(self, graph: Graph, residuals: Residuals, norms: Norms) -> None:
        self.graph = graph
        self.flow = Flow(residuals, norms)
        self.all: list[Stack] = []
        for component in self._components(residuals.all):
            self.all += self._split(component)

    def goes_on(self, stack: Stack) -> bool:
        """Whether a layer written out is followed by others of its list, behind something that is no sum (a pooling).

        The layers are the same code, called in one method; a generation loop embeds what it puts out.
        """
        if stack.kind != PLAIN or len(stack.ends) != 1:
            return False
        return any(self._follows(other, stack) for other in self.all if other is not stack)

    def _follows(self, other: Stack, stack: Stack) -> bool:
        first, end = other.residuals[0], stack.ends[0]
        if other.kind != PLAIN or first.sum.node is not stack.residuals[0].sum.node:
            return False
        if other.frame.caller is not stack.frame.caller:
            return False
        if other.frame.call is stack.frame.call and _weights(other) & _weights(stack):
            return False
        way = path(end.out, first.stream)
        return id(first.stream) in way and not any(node.op == "embedding" for node in way.values())

    def _components(self, all_: Sequence[Residual]) -> list[list[Residual]]:
        """The sums that hang together along a stream, in the order of their evaluation."""
        group = {id(r): {id(r)} for r in all_}
        for r in all_:
            for s in self.flow.after(r):
                if group[id(r)] is not group[id(s)]:
                    joined = group[id(r)] | group[id(s)]
                    for member in joined:
                        group[member] = joined
        found: dict[int, list[Residual]] = {}
        for r in all_:
            found.setdefault(id(group[id(r)]), []).append(r)
        return list(found.values())

    def _split(self, component: Sequence[Residual]) -> list[Stack]:
        """One stack for each loop or Sequential that repeats a sum; what is left is written out."""
        counts: defaultdict[object, int] = defaultdict(int)
        places = {id(r): list(self._places(r)) for r in component}
        for r in component:
            for kind, frame, node, way in places[id(r)]:
                counts[kind, id(frame), node, way] += 1
        groups: dict[object, Stack] = {}
        last: object = None
        for r in component:
            repeated = [p for p in places[id(r)] if p[0] == SEQUENTIAL or counts[p[0], id(p[1]), p[2], p[3]] > 1]
            kind, frame, around = self._place(r, repeated)
            key: object = (kind, id(frame), around)
            if not repeated:
                key = last if _is_plain(last) else (PLAIN, id(r))
            if key not in groups:
                groups[key] = Stack(kind, frame, around, [], self.flow)
            groups[key].residuals.append(r)
            last = key
        for stack in groups.values():
            if stack.kind == PLAIN:
                stack.frame = common_frame(stack.residuals)
        return list(groups.values())

    def _place(self, r: Residual, repeated: Sequence[_Place]) -> tuple[str, Frame, ast.AST | None]:
        return repeated[0][:3] if repeated else (PLAIN, r.frame, None)

    def _places(self, r: Residual) -> Iterator[_Place]:
        """The loops and Sequential calls around a sum, innermost first, each with the way of calls to the sum."""
        way: tuple[ast.AST, ...] = ()
        frame: Frame | None = r.frame
        node = r.sum.node
        while frame is not None and node is not None:
            way = (node, *way)
            if isinstance(node, ast.Call) and self._is_sequential(node, frame):
                yield SEQUENTIAL, frame, node, way
            if frame.function is not None:
                for loop in loops_around(frame.scope.source.tree, node):
                    yield LOOP, frame, loop, way
            node, frame = frame.call, frame.caller

    def _is_sequential(self, node: ast.Call, frame: Frame) -> bool:
        callees = [v for f, v in self.graph.machine.at.get(node.func, []) if f is frame]
        return any(is_torch(v, "Sequential") and _holds_layers(v) for v in callees)


def _holds_layers(value: Value) -> bool:
    children = value.children if isinstance(value, Module) else None
    return children is not None and sum(1 for c in children.items if isinstance(c, Module) and c.cls is not None) > 1


KINDS = {"pre": "pre-norm", "post": "post-norm", "none": "without norm", "both": "pre- or post-norm, by a flag"}


def roles(stacks: Stacks) -> list[Role]:
    """Each stack that attends, each of its sums and their norms, as entries of the map."""
    found: dict[tuple[str, Location], Role] = {}
    for stack in stacks.all:
        if not stack.attends:
            continue
        start = _site(stack.node if stack.node is not None else stack.residuals[0].sum.node, stack)
        evidence = [Evidence(start, _sentence(stack))]
        for norm in stack.final_norms():
            if norm.call is not None:
                evidence.append(Evidence(location(norm.call, norm.frame), "what comes out of it is normed here"))
        _enter(found, Role("stack", start, owner_name(stack.frame), evidence))
        for r in stack.residuals:
            if r.sum.node is None:
                continue
            place = location(r.sum.node, r.frame)
            order = KINDS.get(r.kind, r.kind)
            said = Evidence(place, f"the stream is continued by what was made of it: {order}")
            _enter(found, Role("residual", place, owner_name(r.frame), [said]))
            for norm in (*r.entry_norms, *([r.norm] if r.norm else [])):
                if norm.call is not None:
                    where = location(norm.call, norm.frame)
                    said = Evidence(where, f"a {norm.kind} norm, eps {norm.eps if norm.eps is not None else 'open'}")
                    _enter(found, Role("norm", where, owner_name(norm.frame), [said]))
    return list(found.values())


def _enter(found: dict[tuple[str, Location], Role], role: Role) -> None:
    found.setdefault((role.kind, role.location), role)


def _site(node: ast.AST | None, stack: Stack) -> Location:
    first = stack.residuals[0]
    if stack.node is not None:
        return location(stack.node, stack.frame)
    return location(node or ast.Pass(), first.frame)


def _sentence(stack: Stack) -> str:
    how = {LOOP: "run in this loop", SEQUENTIAL: "run by this call", PLAIN: "written out from here on"}[stack.kind]
    return f"layers of {len({r.sum.node for r in stack.residuals})} residual sums, {how}"


def owner_name(frame: Frame) -> str:
    """The class whose code an activation executes, '' outside of classes."""
    cls = class_of(frame)
    return cls.name if cls else ""


def _weights(stack: Stack) -> set[int]:
    norms = [norm for r in stack.residuals for norm in (r.norm, *r.entry_norms) if norm is not None]
    return {id(norm.module) for norm in norms}


def _is_plain(key: object) -> bool:
    return isinstance(key, tuple) and key[0] == PLAIN


def common_frame(residuals: Sequence[Residual]) -> Frame:
    """The innermost activation in which all these sums, and the norms behind them, are evaluated."""
    frames = [f for r in residuals for f in (r.frame, *([r.norm.frame] if r.norm else []))]
    return next(f for f in frames[0].outward() if all(f in list(g.outward()) for g in frames))
