"""What an encoder made stays from turn to turn: the keys and values that attention to it projects are computed once."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._anchors import Code
from codemods._kvcache_loops import Generation, is_below
from codemods._kvcache_thread import Thread
from codemods._kvcache_time import Timeline
from codemods._survey import Cannot
from modernizer.edit import Edit, Replace
from modernizer.graph.values import Frame, Node
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.syntax import below, free_name, names_in

COMPONENT = "modernizer.components.ComputedOnce"


@dataclass(eq=False)
class Memory:
    """The calls of linear layers that project the same tensor in every turn, with their activations."""

    code: Code
    thread: Thread
    places: defaultdict[ast.Call, list[Frame]] = field(default_factory=lambda: defaultdict(list))

    def name(self, taken: set[str]) -> str:
        """A name that is free everywhere on the way, and not among others."""
        functions: list[ast.AST] = list(self.thread.functions)
        assert self.thread.generation.frame.function is not None
        functions.append(self.thread.generation.frame.function.node)
        return free_name("once", taken | {n for f in functions for n in names_in(f)})

    def edits(self, name: str) -> Iterator[Edit]:
        """Parameters, arguments and the calls themselves."""
        yield from self.thread.edits(name)
        for call, frames in self.places.items():
            source = frames[0].scope.source
            asked = f"{name}({source.code(call.func)}, {source.code(call.args[0])})"
            is_here = frames[0] is self.thread.generation.frame
            code = asked if is_here else f"$0 if {name} is None else {asked}"
            yield Replace(frames[0].path, call, code, () if is_here else (call,))


def find_memory(
    model: ModelMap, code: Code, generation: Generation, line: Timeline, untouched: Sequence[ast.stmt]
) -> Memory | None:
    """What can be computed once, None where nothing can: the loop is right without. `untouched` is code that moves."""
    made = Memory(code, Thread(code, generation))
    moving = {id(n) for statement in untouched for n in below(statement)}
    for projection in _projections(model, generation, line):
        call = projection.node
        if not _is_plain_call(call) or id(call) in moving:
            return None
        assert isinstance(call, ast.Call)
        made.places[call].append(projection.frame)
        try:
            made.thread.follow(projection.frame)
        except Cannot:
            return None
    try:
        made.thread.check()
    except Cannot:
        return None
    return made if made.places and not made.thread.sequentials else None


def _projections(model: ModelMap, generation: Generation, line: Timeline) -> Iterator[Node]:
    """The linear layers of both turns whose input was there before the loop began."""
    own = {id(a) for turn in generation.turns for a in turn}
    contexts = [
        c for site in model.attentions for c in site.contexts
        if id(c) not in own and generation.start <= c.scores.order < generation.ends[1]
        and is_below(c.frame, generation.frame)
    ]  # fmt: skip
    turns = [[c for c in contexts if (c.scores.order < generation.ends[0]) == first] for first in (True, False)]
    found = [list(_of_memory(turn, generation, line)) for turn in turns]
    keys = [[(id(n.module), id(n.args[0]), id(n.node)) for n in nodes] for nodes in found]
    if keys[0] == keys[1]:
        yield from (node for nodes in found for node in nodes)


def _of_memory(contexts: Sequence[Attention], generation: Generation, line: Timeline) -> Iterator[Node]:
    seen: set[int] = set()
    for context in contexts:
        for node in (*context.key_projections, *context.value_projections):
            given = node.args[0] if node.args else None
            if id(node) in seen or node.op != "linear" or node.module is None or not isinstance(given, Node):
                continue
            if node.module.torch_name != "torch.nn.Linear" or node.module.cls is not None:
                continue
            if given.order < generation.start <= node.order and line.type_of(given) is None:
                seen.add(id(node))
                yield node


def _is_plain_call(call: ast.AST | None) -> bool:
    """`self.key(memory)`: what is called and what it is given may be written twice."""
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
        return False
    parts = [*below(call.func), *below(call.args[0])]
    return all(isinstance(p, ast.Name | ast.Attribute | ast.Subscript | ast.Constant | ast.expr_context) for p in parts)
