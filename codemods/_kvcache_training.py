"""How a generation loop asks whether dropout is on: by the module that holds all dropout on the way."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from codemods._anchors import Code
from codemods._kvcache_loops import Generation
from codemods._survey import Cannot
from modernizer.graph.values import Frame, Module, Node, Object
from modernizer.syntax import below, block_of, names_below, outward

_DEEPEST = 4  # attributes from a variable of the loop to the module


def training_test(code: Code, generation: Generation, drops: Sequence[Node]) -> str | None:
    """An expression that is true while dropout acts, None where the function itself switches it off; raises Cannot."""
    holder = _common_holder(drops)
    named = list(_named(code, generation))
    while holder is not None:
        chain = _path(named, holder)
        if chain is not None:
            if _is_switched_off(code, generation, holder):
                return None
            handed = [i for i, (_, inner) in enumerate(chain) if i and not _is_made_by(inner, chain[i - 1][1])]
            first = next(i for i, (_, inner) in enumerate(chain) if isinstance(inner, Module))
            return f"{chain[max(first, *handed, 0)][0]}.training"
        holder = holder.owner
    raise Cannot("whether dropout is on cannot be asked for in this function", generation.location)


def _common_holder(drops: Sequence[Node]) -> Module | None:
    """The innermost module that holds every dropout."""
    chains = [list(_outward(_module_of(d))) for d in drops]
    shared = set.intersection(*({id(m) for m in chain} for chain in chains))
    return next((m for m in chains[0] if id(m) in shared), None)


def _module_of(drop: Node) -> Module | None:
    if drop.module is not None:
        return drop.module.owner or drop.module
    return next((f.receiver for f in drop.frame.outward() if isinstance(f.receiver, Module)), None)


def _outward(module: Module | None) -> Iterator[Module]:
    seen: set[int] = set()
    while module is not None and id(module) not in seen:
        seen.add(id(module))
        yield module
        module = module.owner


def _named(code: Code, generation: Generation) -> Iterator[tuple[str, Object]]:
    """The variables that the loop reads and does not set, and that hold modules or what holds them."""
    for name, found in names_below(generation.loop).items():
        if all(isinstance(n.ctx, ast.Load) for n in found):
            value = code.value(found[0], generation.frame)
            if isinstance(value, Object):
                yield name, value


def _path(named: Sequence[tuple[str, Object]], wanted: Module) -> list[tuple[str, Object]] | None:
    """The shortest way to a module: the expressions from a variable on, with what they are."""
    level = [[pair] for pair in named]
    seen: set[int] = set()
    for _ in range(_DEEPEST):
        for chain in level:
            if chain[-1][1] is wanted:
                return chain
        seen |= {id(chain[-1][1]) for chain in level}
        level = [
            [*chain, (f"{chain[-1][0]}.{name}", inner)]
            for chain in level
            for name, inner in chain[-1][1].attributes.items()
            if isinstance(inner, Object) and name.isidentifier() and id(inner) not in seen
        ]
    return None


def _is_made_by(module: Object, holder: Object) -> bool:
    """Whether an object was put together in the constructor of another, and not handed in: then `train` and `eval` of
    the one are that of the other."""
    frames = module.frame.outward() if module.frame is not None else ()
    return isinstance(holder, Module) and any(f.receiver is holder for f in frames)


def _is_switched_off(code: Code, generation: Generation, holder: Module) -> bool:
    """Whether the function calls `eval()` on the module or on what holds it before the loop, and never `train`."""
    frame = generation.frame
    assert frame.function is not None
    before = list(_before(frame, generation))
    around = {id(m) for m in _outward(holder)}
    calls = [n for n in below(frame.function.node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    methods = [(c, c.func.attr, code.value(c.func.value, frame)) for c in calls if isinstance(c.func, ast.Attribute)]
    if any(name == "train" and isinstance(receiver, Module) for _, name, receiver in methods):
        return False
    return any(
        name == "eval" and id(receiver) in around and code.statement(c) in before for c, name, receiver in methods
    )


def _before(frame: Frame, generation: Generation) -> Iterator[ast.stmt]:
    """The statements before the loop in its own block and in those around it."""
    tree = frame.scope.source.tree
    for outer in outward(tree, generation.loop):
        if isinstance(outer, ast.FunctionDef | ast.Lambda):
            return
        if isinstance(outer, ast.stmt):
            block = block_of(tree, outer)
            yield from block[: block.index(outer)]
