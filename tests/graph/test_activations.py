"""What the index says happened within an activation, against a search through everything that was executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from modernizer.graph import Graph, execute
from modernizer.graph.values import Frame, Node, flatten
from modernizer.project import Project

FIXTURES = Path(__file__).parents[2] / "fixtures"
FILES = sorted(FIXTURES.rglob("*.py"))


def graph_of(file: Path) -> Graph:
    return execute(Project.open([file]))


def frames_around(frame: Frame) -> list[Frame]:
    return list(frame.outward())


def syntax_in(node: Node, frame: Frame) -> ast.AST | None:
    """The syntax of an activation's own code during which a datum was made."""
    inner: Frame | None = None
    for active in node.frame.outward():
        if active is frame:
            return node.node if inner is None else inner.call
        inner = active
    return None


def bodies(frame: Frame) -> Iterator[set[int]]:
    """The code of each statement of a function, by id."""
    function = frame.function.node if frame.function else None
    for statement in function.body if isinstance(function, ast.FunctionDef) else []:
        yield {id(n) for n in ast.walk(statement)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_index_finds_what_a_search_finds(file: Path) -> None:
    graph = graph_of(file)
    machine, index = graph.machine, graph.activations
    for frame in machine.frames[:: max(len(machine.frames) // 12, 1)]:
        inside = [f for f in machine.frames if frame in frames_around(f)]
        assert sorted(map(id, index.within(frame))) == sorted(map(id, inside))
        made = [n for n in machine.nodes if frame in frames_around(n.frame)]
        assert list(index.nodes(frame)) == made
        outermost = frames_around(frame)[-1]
        assert index.end(frame) == max((n.order + 1 for n in machine.nodes if outermost in frames_around(n.frame)),
                                       default=0)  # fmt: skip
        for code in bodies(frame):
            assert list(index.nodes(frame, code)) == [n for n in made if id(syntax_in(n, frame)) in code]
            found = [
                (syntax, active, value) for syntax, seen in machine.at.items() for active, value in seen
                if (id(syntax) in code if active is frame else _called_in(active, frame, code))
            ]  # fmt: skip
            assert list(index.evaluations(frame, code)) == found


def _called_in(active: Frame, frame: Frame, code: set[int]) -> bool:
    return any(f.caller is frame and id(f.call) in code for f in active.outward())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_operands_and_what_is_kept(file: Path) -> None:
    graph = graph_of(file)
    for node in graph.machine.nodes:
        assert graph.activations.operands(node) == tuple(id(leaf) for v in node.inputs for leaf in flatten(v))
    kept = graph.activations.kept
    for module in graph.machine.modules:
        for name, value in module.attributes.items():
            assert all(name in kept[id(leaf)] for leaf in flatten(value))
