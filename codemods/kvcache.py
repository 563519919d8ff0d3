"""The rule `kvcache`: a generation loop keeps the keys and values of the past instead of computing them again."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from codemods._anchors import Code
from codemods._kvcache_attention import (
    Update,
    check_axes,
    new_length,
    past_length,
    time_axis,
    update_lines,
    updates_for,
)
from codemods._kvcache_axes import BATCH, FED, NEW, Loose, Number, Tensor
from codemods._kvcache_checks import check
from codemods._kvcache_cut import Cut, cuts, timeline
from codemods._kvcache_growth import find_generations
from codemods._kvcache_loops import Generation, Pick
from codemods._kvcache_memory import COMPONENT as ONCE
from codemods._kvcache_memory import Memory, find_memory
from codemods._kvcache_offsets import Offsets, lengths
from codemods._kvcache_runs import with_outer_loops
from codemods._kvcache_thread import Thread, sequential_code
from codemods._kvcache_time import Change, Timeline
from codemods._kvcache_training import training_test
from codemods._survey import Cannot, place
from modernizer.edit import Delete, Edit, Insert, Replace
from modernizer.graph.query import ancestors, location
from modernizer.graph.values import Frame, Node
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.removal import Removal
from modernizer.rule import Effect, Modern, Plan, Refusal, Rule, Upgrade
from modernizer.source import SourceFile
from modernizer.syntax import below, block_of, free_name, names_in

COMPONENT = "modernizer.components.KVCache"


class KVCacheRule(Rule):
    """Finds loops in which a sequence grows by what a causal model makes of it, proves that what is past never
    changes, and hands a cache through model, stack, block and attention."""

    name = "kvcache"
    summary = "generation keeps the keys and values of the past and computes only what is new"
    effect = Effect.EXACT
    after = ("rope", "alibi", "prenorm", "swiglu")

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        made = Plan()
        model = with_outer_loops(model)
        by_loop: defaultdict[ast.AST, list[Generation]] = defaultdict(list)
        for generation in find_generations(model):
            if generation.frame.path in model.project.named:
                by_loop[generation.loop].append(generation)
        for found in by_loop.values():
            _plan_loop(model, found, made)
        return made

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        old, new = ([g for g in find_generations(with_outer_loops(m)) if g.rereads] for m in (before, after))
        if len(old) != len(new):
            return f"there were {len(old)} generation loops and are {len(new)}"
        cached = [sum(map(_is_cached, turn)) for g in new for turn in g.turns[:1]]
        if sum(map(bool, cached)) < len(upgrades):
            return "not every loop that was to use a cache does"
        for generation in new:
            turn = generation.turns[0]
            if any(map(_is_cached, turn)) and not all(map(_is_cached, turn)):
                return f"only some of the attentions of the loop at {generation.location} use the cache"
        return ""


def _plan_loop(model: ModelMap, found: Sequence[Generation], made: Plan) -> None:
    first = found[0]
    if all(_is_cached(a) for g in found for turn in g.turns for a in turn) or not all(g.rereads for g in found):
        made.modern.append(Modern(first.location, "this loop feeds its model only what is new"))
        return
    try:
        for generation in found:
            if generation.problem:
                raise Cannot(generation.problem, first.location)
        upgrades = [Builder(model, generation).upgrade() for generation in found]
        if len({frozenset(map(_text_of, upgrade.edits)) for upgrade in upgrades}) > 1:
            raise Cannot("this loop runs in several ways, which ask for different changes", first.location)
        made.upgrades.append(upgrades[0])
    except Cannot as cannot:
        made.refusals.append(Refusal(first.location, _reason(cannot, first), cannot.hint))


def _text_of(edit: Edit) -> tuple[object, ...]:
    """An edit as a value: equal where it does the same to the same code."""
    found = [getattr(edit, field.name) for field in fields(edit)]
    parts = [part for value in found for part in (value if isinstance(value, tuple) else (value,))]
    return type(edit), *(part if isinstance(part, str | Path | None) else id(part) for part in parts)


def _reason(cannot: Cannot, generation: Generation) -> str:
    if cannot.at is None or cannot.at == generation.location:
        return cannot.reason
    return f"{cannot.reason} (at {cannot.at.path.name}:{cannot.at.line})"


def _is_cached(attention: Attention) -> bool:
    """Whether the keys come out of a cache."""
    return any(_updates_a_cache(n) for n in ancestors(attention.key).values())


def _updates_a_cache(node: Node) -> bool:
    return node.op == "opaque" and node.name == "update" and any(
        getattr(v, "torch_name", "") == COMPONENT for v in node.args
    )  # fmt: skip


class Builder:
    """Proves and plans one loop."""

    def __init__(self, model: ModelMap, generation: Generation) -> None:
        self.model, self.generation = model, generation
        self.code = Code(model.graph, Removal(model.graph, frozenset(model.project.named)))
        self.machine = model.graph.machine
        self.start = generation.start
        self.before: defaultdict[ast.stmt, list[str]] = defaultdict(list)
        self.updates: Sequence[Update] = ()
        self.edits: list[Edit] = []

    def upgrade(self) -> Upgrade:
        """The upgrade; raises Cannot."""
        generation = self.generation
        attentions = [a for turn in generation.turns for a in turn]
        updates = updates_for(self.code, attentions)
        for update in updates:
            check_axes(update)
        if len({time_axis(u) for u in updates}) > 1:
            raise Cannot("attentions hold time on different axes", place(attentions[0]))
        grown = [change for update in updates for change in self._grown(update)]
        cut, line = self._proven(updates, grown)
        self._check_products(line, attentions)
        check(self.code, generation, line, updates)
        self._check_rows(line, updates)
        thread = Thread(self.code, generation)
        for update in updates:
            for frame, _ in update.frames:
                thread.follow(frame)
        for frame in cut.frames:
            thread.follow(frame)
        for pick in generation.picks:
            thread.follow(pick.node.frame)
        thread.check()
        thread.check_reach([f for u in updates for f, _ in u.frames], [u.function for u in updates])
        self.updates = updates
        offsets = Offsets(self.code, generation, line, updates, self._elsewhere(line))
        offsets.check()
        memory = find_memory(self.model, self.code, generation, line, [s for u in updates for s in u.moved])
        self._edit(updates, cut, line, thread, offsets)
        if memory is not None:
            self._keep(memory, thread.name())
        layers = len({id(f.receiver) for u in updates for f, a in u.frames if a in generation.turns[0]})
        return Upgrade(generation.location, _summary(layers), tuple(self.edits))

    # -- the proof

    def _grown(self, update: Update) -> list[Change]:
        """From the update on, keys and values are those of the whole sequence."""
        made: list[Change] = []
        inside = set(map(id, below(update.statement)))
        for frame, _ in update.frames:
            within = self.model.graph.activations
            first = next(within.nodes(frame, inside)).order
            last = max(n.order for n in within.nodes(frame))
            for part in (update.key, update.value):
                value = self.code.value(part.expr, frame)
                assert value is not None
                made.append(Change(value, first, last, NEW, FED))
        return made

    def _proven(self, updates: Sequence[Update], grown: Sequence[Change]) -> tuple[Cut, Timeline]:
        first = [f for u in updates for f, a in u.frames if a in self.generation.turns[0]]
        problem: Cannot | None = None
        for cut in cuts(self.code, self.generation, first, self.start):
            try:
                end = self.model.graph.activations.end(self.generation.frame)
                return cut, timeline(self.code, self.generation, self.start, end, [*cut.changes, *grown])
            except Cannot as cannot:
                problem = problem or cannot
        raise problem or self._uncuttable()

    def _uncuttable(self) -> Cannot:
        """Why nothing that reaches attention can be cut."""
        first = self.generation.turns[0][0]
        line = timeline(self.code, self.generation, self.start, first.scores.order, ())
        known = line.type_of(first.query)
        if isinstance(known, Loose):
            return Cannot(known.reason, place(first))
        return Cannot("nothing was found that could be cut to what is new", self.generation.location)

    def _check_products(self, line: Timeline, attentions: Sequence[Attention]) -> None:
        wanted = {id(a.scores) for a in attentions}
        for product in line.products:
            known = line.type_of(product)
            if id(product) not in wanted and getattr(known, "has", lambda _: False)(NEW):
                raise Cannot("a product of steps with steps that is no attention", place(product))
        for attention in attentions:
            if attention.form == "sdpa" and attention.scores in line.attended:
                continue
            known = line.type_of(attention.scores)
            letters = getattr(known, "letters", "")
            if not letters.endswith(NEW + FED):
                raise Cannot("queries or keys of this attention cannot be followed", place(attention))

    def _check_rows(self, line: Timeline, updates: Sequence[Update]) -> None:
        """Where rows are picked anew, keys and values must have the batch in front."""
        for update in updates if self.generation.picks else ():
            for frame, attention in update.frames:
                for part in (update.key, update.value):
                    value = self.code.value(part.expr, frame)
                    known = line.type_of(value) if value is not None else None
                    if not isinstance(known, Tensor) or known.axes[0].letter != BATCH:
                        raise Cannot("keys and values do not have the batch in front, whose rows are picked anew",
                                     place(attention))  # fmt: skip

    def _elsewhere(self, line: Timeline) -> dict[ast.AST, Sequence[Frame]]:
        """What counts on the length of what it is given, and does not stand where attention has asked the cache."""
        repair = line.repair
        functions = {id(n) for u in self.updates for n in below(u.function)}
        statements = {id(n) for u in self.updates for n in below(u.statement)}
        masks = {id(n) for u in self.updates for n in self._repairs(u, line)}
        return {
            **repair.counts,
            **{
                node: frames
                for node, frames in (*repair.tables.items(), *repair.lengths.items())
                if id(node) not in masks
            },
            **{node: frames for node, frames in repair.rows.items() if id(node) not in functions},
            **{node: frames for node, frames in repair.causal.items() if id(node) not in statements},
        }

    # -- the edits

    def _edit(self, updates: Sequence[Update], cut: Cut, line: Timeline, thread: Thread, offsets: Offsets) -> None:
        name = thread.name()
        self.edits += thread.edits(name)
        for statement, code in offsets.lines(name):
            self.before[statement].append(code)
        self.edits += offsets.edits()
        self._loop(thread, line, name, time_axis(updates[0]))
        self.before[cut.statement] += cut.lines(name)
        for call, frame in thread.sequentials.items():
            self._open(call, frame, name)
        for update in {u.statement: u for u in updates}.values():
            self._attend(update, line, name)
        for pick in {p.node.node: p for p in self.generation.picks}.values():
            self._pick(pick, name)
        for node, frame in line.repair.lasts.items():
            self._take_last(node, frame, line)
        for statement, lines in self.before.items():
            code = "".join(f"{text}\n" for text in lines)
            self.edits.append(Insert(self.code.tree.path(statement), statement, code, "before"))

    def _keep(self, memory: Memory, cache: str) -> None:
        """Makes what computes keys and values of an encoder's output once, before the loop."""
        frame = self.generation.frame
        assert frame.function is not None
        name = memory.name({cache})
        reference, new = Imports(frame.scope.source).reference(ONCE, frame.function.node)
        self.edits += [new] if new is not None else []
        self.edits.append(Insert(frame.path, self.generation.loop, f"{name} = {reference}()\n", "before"))
        self.edits += memory.edits(name)

    def _loop(self, thread: Thread, line: Timeline, name: str, axis: int) -> None:
        """Makes the cache before the loop, and empties it where the window slides."""
        generation = self.generation
        frame = generation.frame
        path, function = frame.path, frame.function
        assert function is not None and isinstance(function.node, ast.FunctionDef)
        reference, new = Imports(frame.scope.source).reference(COMPONENT, function.node)
        self.edits += [new] if new is not None else []
        made = f"{reference}({'' if axis == -2 else f'seq_dim={axis}'})"
        training = training_test(self.code, generation, line.drops) if line.drops else None
        if training is not None:
            made = f"None if {training} else {made}"
        self.edits.append(Insert(path, generation.loop, f"{name} = {made}\n", "before"))
        if not generation.is_cropped:
            return
        inside = set(map(id, below(generation.loop)))
        first = min((c for c in thread.calls if id(c) in inside), key=lambda c: (c.lineno, c.col_offset))
        fed = self._fed(first)
        test = f"{fed}.size({generation.time_axis}) <= {name}.length"
        self.before[self.code.statement(first)] += [
            f"if {name} is not None and {test}:" if training is not None else f"if {test}:",
            f"    {name}.reset()  # the window slides: every step has moved",
        ]

    def _fed(self, call: ast.Call) -> str:
        """What is fed, as the call has it."""
        windows = {id(w) for w in self.generation.windows()}
        for argument in [*call.args, *(k.value for k in call.keywords)]:
            for part in below(argument):  # itself, or what stands within `x[None, :]`
                found = [v for f, v in self.machine.at.get(part, ()) if f is self.generation.frame]
                if any(id(v) in windows for v in found):
                    return self.generation.frame.scope.source.code(part)
        raise Cannot("what is fed to the model is no argument of its call", self.generation.location)

    def _open(self, call: ast.Call, frame: Frame, name: str) -> None:
        """A Sequential becomes a loop over its layers."""
        statement = self.code.statement(call)
        assert frame.function is not None
        code = sequential_code(self.code, call, statement, name, names_in(frame.function.node))
        if code is None:
            raise Cannot("the layers' result is used where no loop can stand", location(call, frame),
                         "give it a name: `x = self.layers(x)`")  # fmt: skip
        path = self.code.tree.path(call)
        holes = (call.args[0],) if "$0" in code else ()
        source = frame.scope.source
        rest = source.text[source.span(statement)[1] : source.line_end(statement.end_lineno or 1)].strip()
        if rest.startswith("#"):
            code = code.replace(":\n", f":  {rest}\n", 1)
        self.edits.append(Replace(path, statement, code, holes))

    def _pick(self, pick: Pick, name: str) -> None:
        """What the cache holds follows the rows of the sequence."""
        assert pick.node.node is not None
        statement = self.code.statement(pick.node.node)
        stored = {n.id for n in below(statement) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        if not isinstance(pick.index, ast.Name) or pick.index.id in stored:
            raise Cannot("the rows that are picked have no name", location(pick.index, pick.node.frame))
        code = f"if {name} is not None:\n    {name}.reorder({pick.index.id})\n"
        self.edits.append(Insert(pick.node.frame.path, statement, code))

    def _take_last(self, node: ast.AST, frame: Frame, line: Timeline) -> None:
        """`x[:, T - 1]` of something that a cache makes shorter is its last step."""
        assert isinstance(node, ast.Subscript)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        at = self.machine.at
        found = [p for p in parts if any(isinstance(line.type_of(v), Number) for f, v in at.get(p, ()) if f is frame)]
        if len(found) != 1:
            raise Cannot("which index is that of the last step cannot be told", location(node, frame))
        self.edits.append(Replace(frame.path, found[0], "-1"))

    def _attend(self, update: Update, line: Timeline, name: str) -> None:
        path = update.frame.path
        source = update.frame.scope.source
        lines: list[str] = []
        for statement in update.moved:
            end = source.span(statement)[1]
            rest = source.text[end : source.line_end(statement.end_lineno or 1)].rstrip("\r\n")
            comment = f"  {rest.strip()}" if rest.strip().startswith("#") else ""
            lines += _comments_above(source, statement)
            lines += f"{source.code(statement)}{comment}".splitlines()
            self.edits.append(Delete(path, statement))
        lines += update_lines(update, name)
        repairs = self._repairs(update, line)
        if repairs:
            total = free_name("total", names_in(update.function))
            lines.append(f"{total} = {past_length(update)}")
            for node in repairs:
                self._repair(update, node, total, line)
        self.before[update.statement] += lines
        for call in line.repair.causal:
            if id(call) in set(map(id, below(update.statement))):
                assert isinstance(call, ast.Call)
                self._see_all(call, update)
        for node in line.repair.rows:
            if id(node) in set(map(id, below(update.function))):
                assert isinstance(node, ast.expr)
                code = f"$0[..., -{new_length(update)} :, :]"
                self.edits.append(Replace(path, node, code, (node,)))

    def _see_all(self, call: ast.Call, update: Update) -> None:
        """`is_causal=True` would count the new steps from the first key on: one new step sees everything."""
        if update.query is None:
            raise Cannot("the query has no name at the product", place(update.frames[0][1]))
        given = [k.value for k in call.keywords if k.arg == "is_causal"] + call.args[5:6]
        assert isinstance(update.query.expr, ast.Name)
        test = f"{update.query.expr.id}.size({update.query.time}) == {past_length(update)}"
        is_plain = isinstance(given[0], ast.Constant)
        self.edits.append(Replace(update.frame.path, given[0], test if is_plain else f"$0 and {test}",
                                  () if is_plain else (given[0],)))  # fmt: skip

    def _repairs(self, update: Update, line: Timeline) -> list[ast.AST]:
        inside = set(map(id, below(update.function)))
        tree = update.frame.scope.source.tree
        mine = {id(n) for s in block_of(tree, update.statement) for n in below(s)}
        others = {id(n) for u in self.updates if u is not update and u.function is update.function
                  for s in block_of(tree, u.statement) for n in below(s)}  # fmt: skip
        inside -= others - mine  # another branch asks the cache itself
        start = (update.statement.lineno, update.statement.col_offset)
        return [
            n for n in (*line.repair.tables, *line.repair.lengths)
            if id(n) in inside and (getattr(n, "lineno", 0), getattr(n, "col_offset", 0)) >= start
        ]  # fmt: skip

    def _repair(self, update: Update, node: ast.AST, total: str, line: Timeline) -> None:
        path = update.frame.path
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            rows, columns = (p for p in parts[-2:])
            assert isinstance(rows, ast.Slice) and isinstance(columns, ast.Slice)
            assert rows.upper is not None
            length = update.frame.scope.source.code(rows.upper)
            self.edits.append(Replace(path, rows, f"{total} - {length} : {total}"))
            self.edits.append(Replace(path, columns, f":{total}"))
            return
        assert isinstance(node, ast.Call)
        for argument in lengths(self.code, line, node, update.frame):
            self.edits.append(Replace(path, argument, total))


def _comments_above(source: SourceFile, statement: ast.stmt) -> list[str]:
    """The comments directly above a statement."""
    above = source.text[: source.span(statement)[0]].splitlines()[:-1]
    found: list[str] = []
    while above and above[-1].strip().startswith("#"):
        found.insert(0, above.pop().strip())
    return found


def _summary(layers: int) -> str:
    return (
        "a generation loop that computes its whole sequence again at each step keeps keys and values of"
        f" {layers} attention{'s' if layers > 1 else ''} in a cache"
    )
