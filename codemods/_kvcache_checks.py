"""What has to hold in a loop besides the types of what is made of the sequence."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

from codemods._anchors import Code
from codemods._kvcache_attention import Update, module_of
from codemods._kvcache_axes import FED, GROWN, LAST, NEW, Loose, Tensor, constant, integers, speaks_of
from codemods._kvcache_loops import Generation
from codemods._kvcache_time import Timeline
from codemods._survey import Cannot, place
from modernizer.graph.query import is_const, is_none, location
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Many, Node, Value, flatten
from modernizer.model_map.attention import Attention
from modernizer.model_map.position import NOISE
from modernizer.syntax import below, mentions, outward

_FREE_OPAQUE = ("torch.", "numpy.", "math.", "builtins.")


def check(code: Code, generation: Generation, line: Timeline, updates: Sequence[Update]) -> None:
    """Raises Cannot where a cache would change what the loop puts out, although all types are known."""
    _check_layers(code, generation, updates)
    _check_results(generation, line)
    _check_kept(code, line)
    _check_branches(code, generation, line, updates)
    _check_counting(code, generation, line)
    _check_counted(code, generation)
    _check_turns(generation, line)
    counted = generation.is_cropped or bool(line.repair.causal)
    if counted and not generation.adds_one and not all(_is_one_step(v, generation.time_axis) for v in generation.added):
        raise Cannot("how many steps each turn adds cannot be told", generation.location)


def _check_layers(code: Code, generation: Generation, updates: Sequence[Update]) -> None:
    """Every layer attends once a turn, and every turn runs the same ones."""
    by_scores = {id(a): module_of(code, f) for u in updates for f, a in u.frames}
    turns = [[by_scores[id(a)] for a in turn if id(a) in by_scores] for turn in generation.turns]
    for turn, attentions in zip(turns, generation.turns, strict=True):
        if any(
            a is b and not _exclude(code, x, y)
            for (a, x), (b, y) in combinations(zip(turn, attentions, strict=False), 2)
        ):
            raise Cannot("one layer attends several times in a turn: its keys could not be told apart",
                         place(attentions[0]))  # fmt: skip
    if any([id(m) for m in turn] != [id(m) for m in turns[0]] for turn in turns):
        raise Cannot("not every turn runs the same layers", generation.location)


def _exclude(code: Code, one: Attention, other: Attention) -> bool:
    """Whether of two attentions only one happens: they stand in different branches."""
    if one.frame is not other.frame or one.scores.node is None or other.scores.node is None:
        return False
    tree = one.frame.scope.source.tree
    around = [list(outward(tree, node)) for node in (one.scores.node, other.scores.node)]
    for outer in around[0]:
        if isinstance(outer, ast.If) and outer in around[1]:
            arms = [set(map(id, outer.body)), set(map(id, outer.orelse))]
            places = [[any(id(n) in arm for n in chain) for arm in arms] for chain in around]
            if places in ([[True, False], [False, True]], [[False, True], [True, False]]):
                return True
    return False


def _check_results(generation: Generation, line: Timeline) -> None:
    frame = generation.frame
    results = [v for _, v in frame.returns] + frame.yields + ([frame.result] if frame.result is not None else [])
    for value in results:
        for leaf in flatten(value):
            known = line.type_of(leaf)
            if known is not None and speaks_of(known, NEW + LAST):
                raise Cannot("the loop hands out what the model gave for all steps", generation.location)


def _check_kept(code: Code, line: Timeline) -> None:
    """Nothing that a cache makes shorter may be kept on a module for somebody to read."""
    kept = code.graph.activations.kept
    names = [name for i, known in line.types.items() if i in kept and speaks_of(known, NEW + LAST) for name in kept[i]]
    for name in dict.fromkeys(names):
        for file in code.graph.project.files():
            for read in mentions(file.tree).attributes.get(name, ()):
                if isinstance(read.ctx, ast.Load):
                    raise Cannot(f"`{name}` keeps what the model gave for all steps", file.location(read))


# -- what code decides by the sequence


def _evaluations(code: Code, generation: Generation, kind: type[ast.AST]) -> Iterator[tuple[ast.AST, Frame, Value]]:
    """What the expressions of one kind gave in the loop."""
    inside = set(map(id, below(generation.loop)))
    for node, frame, value in code.graph.activations.evaluations(generation.frame, inside):
        if isinstance(node, kind):
            yield node, frame, value


def _check_branches(code: Code, generation: Generation, line: Timeline, updates: Sequence[Update]) -> None:
    """Nothing but an exception may depend on the sequence, except for what the loop itself does with the last step."""
    tops = {id(_top(frame, generation)) for update in updates for frame, _ in update.frames}
    for node, frame, value in _evaluations(code, generation, ast.expr):
        known = [k for leaf in flatten(value) if (k := line.type_of(leaf)) is not None]
        above = frame.scope.source.parents.get(node)
        if not known or not isinstance(above, ast.If | ast.While | ast.IfExp) or above.test is not node:
            continue
        within = frame is not generation.frame
        inside = within and any(speaks_of(k, FED + GROWN) for k in known)
        if within and any(isinstance(k, Loose) for k in known):
            inside = inside or id(_top(frame, generation)) in tops
        if (inside or any(speaks_of(k, NEW + LAST) for k in known)) and not _only_raises(above):
            raise Cannot("the model decides by the sequence or its length", location(node, frame))


def _check_counted(code: Code, generation: Generation) -> None:
    """Two turns of the loop were followed: what later ones do must not be decided by how many there have been."""
    values: defaultdict[ast.AST, list[Value]] = defaultdict(list)
    frames: dict[ast.AST, Frame] = {}
    for node, frame, value in _evaluations(code, generation, ast.expr):
        values[node].append(value)
        frames[node] = frame
    runs = sum(r.frame is generation.frame for r in code.graph.machine.repeats[generation.loop])
    for node, found in values.items():
        if not _differ_by_turn(found, 2 * runs):
            continue
        test, choice = _test_around(frames[node].scope.source.tree, node)
        if choice is not None and test in values and not _only_leaves(choice):
            raise Cannot("the loop does something else after some turns", location(test or node, frames[node]))


def _differ_by_turn(values: Sequence[Value], turns: int) -> bool:
    """Whether an expression gave other constants in the second turn than in the first. `turns` were made in all."""
    if len(values) % turns:
        return any(_differ(values[0], v) for v in values)
    size = len(values) // turns
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    return any(_differ(a, b) for one, other in zip(parts[::2], parts[1::2], strict=True)
               for a, b in zip(one, other, strict=True))  # fmt: skip


def _differ(a: Value, b: Value) -> bool:
    return isinstance(a, Const) and isinstance(b, Const) and (type(a.value) is not type(b.value) or a.value != b.value)


def _test_around(tree: ast.Module, node: ast.AST) -> tuple[ast.AST | None, ast.AST | None]:
    """The test of which an expression is a part, and what it decides."""
    inner: ast.AST | None = None
    for outer in outward(tree, node):
        if isinstance(outer, ast.If | ast.While | ast.IfExp) and outer.test is inner:
            return inner, outer
        if isinstance(outer, ast.BoolOp) and inner is not outer.values[-1]:
            return inner, outer
        if isinstance(outer, ast.comprehension) and inner in outer.ifs:
            return inner, outer
        if isinstance(outer, ast.stmt):
            return None, None
        inner = outer
    return None, None


def _only_leaves(choice: ast.AST) -> bool:
    """Whether a branch at most ends the loop, or says something."""
    if isinstance(choice, ast.While):
        return True  # another turn or none
    if not isinstance(choice, ast.If):
        return False
    return all(
        isinstance(s, ast.Break | ast.Return | ast.Raise | ast.Pass)
        or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) and getattr(s.value.func, "id", "") == "print")
        for s in (*choice.body, *choice.orelse)
    )


def _top(frame: Frame, generation: Generation) -> Frame:
    """The activation, called from the loop itself, in which another one happens."""
    return next((f for f in frame.outward() if f.caller is generation.frame), frame)


def _only_raises(branch: ast.AST) -> bool:
    if not isinstance(branch, ast.If):
        return False
    return all(isinstance(s, ast.Raise) for s in branch.body) and not branch.orelse


def _check_counting(code: Code, generation: Generation, line: Timeline) -> None:
    """No Python loop or list may be as long as the sequence: what becomes of it cannot be followed."""
    for node, frame, _ in _evaluations(code, generation, ast.Call):
        assert isinstance(node, ast.Call)
        is_range = any(
            getattr(v, "dotted", "") == "builtins.range" for _, v in code.graph.machine.at.get(node.func, ())
        )
        if is_range:
            _refuse_lengths(code, line, node.args, frame, node)
    for node, frame, value in _evaluations(code, generation, ast.BinOp):
        assert isinstance(node, ast.BinOp)
        if isinstance(value, Many) and isinstance(node.op, ast.Mult):
            _refuse_lengths(code, line, [node.left, node.right], frame, node)


def _refuse_lengths(code: Code, line: Timeline, parts: Sequence[ast.expr], frame: Frame, node: ast.AST) -> None:
    for part in parts:
        for active, value in code.graph.machine.at.get(part, ()):
            known = line.type_of(value) if active is frame else None
            if known is not None and not isinstance(known, Tensor):
                raise Cannot("a Python loop or list is as long as the sequence", location(node, frame))


# -- whether every turn does the same


def _check_turns(generation: Generation, line: Timeline) -> None:
    """The second turn must make of the longer sequence what the first made of the shorter one, by the same means."""
    sequences = set(map(id, (*generation.grown, *generation.moved)))
    bounds = [generation.start, *generation.ends]
    first, second = (
        [n for n in line.between(a, b) if id(n) not in sequences and _counts(line, n)] for a, b in pairwise(bounds[:3])
    )
    while second and first and second[0].node is not first[0].node:  # what stands behind the join
        second.pop(0)
    if len(first) != len(second):
        raise Cannot("the first turn of the loop does something else than the others", generation.location)
    pairs: dict[int, Value] = {id(one): other for one, other in generation.pairs}
    if not pairs:
        pairs[id(generation.grown[0])] = generation.grown[1]
    pairs |= {id(one): other for one, other, _ in generation.lengths}
    for a, b in zip(first, second, strict=True):
        if a.op != b.op or a.node is not b.node:
            raise Cannot("the first turn of the loop does something else than the others", generation.location)
        pairs[id(a)] = b
        for left, right in zip(_parts(line, a), _parts(line, b), strict=True):
            if not _alike(line, pairs, left, right):
                where = location(a.node, a.frame) if a.node is not None else generation.location
                raise Cannot("something else than the sequence changes from turn to turn", where)


def _counts(line: Timeline, node: Node) -> bool:
    known = line.type_of(node)
    return known is not None and not isinstance(known, Loose)


def _parts(line: Timeline, node: Node) -> list[Value]:
    """The operands of a datum, and what decides between them."""
    found = [leaf for v in node.inputs for leaf in flatten(v)]
    if node.op == "merge":
        found += [v for test in line.tests(node) if (v := line.value_at(test, node)) is not None]
    return found


def _alike(line: Timeline, pairs: dict[int, Value], a: Value, b: Value, depth: int = 0) -> bool:
    """Whether a value of the first turn and one of the second are the same, or one of the sequence's pairs."""
    known = line.type_of(a)
    if known is not None and not isinstance(known, Loose):
        return pairs.get(id(a)) is b
    if a is b:
        return True
    if isinstance(a, Const) and isinstance(b, Const):
        return type(a.value) is type(b.value) and a.value == b.value
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and getattr(a, "dotted", 0) == getattr(b, "dotted", 1)
    if a.op != b.op or a.node is not b.node or depth > 50:
        return False
    if a.op in NOISE or (a.op == "opaque" and not a.name.startswith(_FREE_OPAQUE)):
        return False
    left, right = ([leaf for v in n.inputs for leaf in flatten(v)] for n in (a, b))
    return len(left) == len(right) and all(
        _alike(line, pairs, x, y, depth + 1) for x, y in zip(left, right, strict=True)
    )


# -- how much a turn adds


def _is_one_step(value: Value, axis: int) -> bool:
    """Whether what is appended surely has size 1 along time."""
    if not isinstance(value, Node):
        return False
    if value.op == "merge":
        return all(_is_one_step(option, axis) for option in value.args)
    if axis == 0 and value.op == "getitem":  # `token[None]`
        return is_none(value.args[1])
    if axis == 0 and value.op in ("view", "reshape"):
        return integers(value.args[1:]) == [1]
    if value.op == "multinomial":
        return is_const(_argument(value, 1, "num_samples"), 1) and (axis == 1 or rank(value.args[0]) == 1)
    if value.op in ("argmax", "max", "topk", "sort"):
        if value.op == "topk":
            return is_const(_argument(value, 1, "k"), 1)
        keep = _argument(value, 2, "keepdim")
        return is_const(keep, True) and value.op in ("argmax", "max")
    if value.op in ("item", "getitem") and isinstance(value.args[0], Node) and value.args[0].op in ("topk", "max"):
        return _is_one_step(value.args[0], axis)
    if value.op == "unsqueeze":
        place_ = constant(_argument(value, 1, "dim"))
        return place_ in (axis, -1) if axis == 1 else place_ == axis
    if value.op == "where":
        return all(_is_one_step(o, axis) for o in value.args[1:3])
    if value.op in ("to", "long", "int", "type", "detach", "clone", "type_as"):
        return _is_one_step(value.args[0], axis)
    if value.op == "gather":
        return _is_one_step(value.args[-1], axis)
    return False


def _argument(node: Node, index: int, name: str) -> Value:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, Const(None))
