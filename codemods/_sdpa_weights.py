"""Who reads scores or weights besides the product with the value, and under which condition they are wanted.

Weights that a function returns are wanted where a caller reads them: it gets a parameter, `need_weights=True`, and
callers that drop the weights pass False. Weights that are only kept on a module are wanted where its new flag is set.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._sdpa_events import Decline, entered, stable_test
from codemods._sdpa_trace import Trace
from modernizer.edit import AddArgument, AddParameter, Edit, Insert, Replace
from modernizer.graph.truth import truth_of
from modernizer.graph.values import Frame, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.source import SourceFile
from modernizer.syntax import Function as FunctionNode
from modernizer.syntax import free_name, function_of, names_in, outward, parents, statement_of, walk

ALWAYS = "always"
# What is done to weights that are kept to be looked at.
SHOWN = frozenset("detach clone cpu data contiguous squeeze numpy mean sum float view".split())


@dataclass
class Demand:
    """Under which condition the weights are wanted ('' for never), and the edits that make it known."""

    condition: str = ""
    edits: list[Edit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)  # variables that are None where the weights are not wanted
    dropped: dict[ast.stmt, list[str]] = field(default_factory=dict)  # statements of the region about weights only
    nothing: set[ast.expr] = field(default_factory=set)  # reads in the value product's own statement: None

    @property
    def keeps_original(self) -> bool:
        return bool(self.condition)


@dataclass(frozen=True)
class Guard:
    """A test around a read of the weights, and the side of it on which the read stands."""

    condition: str
    test: ast.expr
    side: bool


def demand_for(model: ModelMap, trace: Trace, contexts: Sequence[Attention]) -> Demand:
    """Who wants the weights. Raises Decline where somebody always does."""
    assert trace.function is not None
    for node in walk(trace.function):
        is_gone = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del) and node.id in trace.names
        if is_gone and isinstance(node, ast.Name) and node not in trace.consumed:
            raise Decline(f"a variable that holds scores or weights is deleted at line {node.lineno}")
        if isinstance(node, ast.Name) and node.id in trace.fill_names and node not in trace.consumed:
            raise Decline(f"`{node.id}` has the shape of the scores and is read at line {node.lineno}")
    reads = extra_reads(trace, trace.names)
    if not reads and not trace.stored and not trace.escapes:
        return Demand()
    if not isinstance(trace.function, ast.FunctionDef):
        raise Decline("the weights are read elsewhere in a lambda")
    return _Analysis(model, trace, contexts).demand(reads)


def extra_reads(trace: Trace, names: set[str]) -> list[ast.Name]:
    """Reads of variables that hold scores or weights, other than on the way to the value."""
    assert trace.function is not None
    chain = {id(v) for n in trace.consumed if isinstance(n, ast.Name) for v in trace.values(n)}
    chain |= {id(v) for v in trace.values(trace.product)}
    chain |= {id(v) for s in trace.changes for v in trace.values(getattr(s, "value", trace.product))}
    start = trace.source.span(trace.product)
    found = []
    for node in walk(trace.function):
        if not isinstance(node, ast.Name) or node.id not in names or not isinstance(node.ctx, ast.Load):
            continue
        if node in trace.consumed or trace.source.span(node) < start:
            continue
        values = trace.values(node)
        if not values or any(id(v) in chain or _is_merge_of(v, chain) for v in values):
            found.append(node)
    return found


def _is_merge_of(value: Value, chain: set[int]) -> bool:
    return getattr(value, "op", "") == "merge" and any(id(v) in chain for v in value.inputs)


class _Analysis:
    """The way of the weights through the functions that hand them on."""

    def __init__(self, model: ModelMap, trace: Trace, contexts: Sequence[Attention]) -> None:
        self.model = model
        self.machine = model.graph.machine
        self.trace = trace
        self.contexts = contexts
        self.slots: dict[ast.FunctionDef, set[int]] = {}
        self.frames: dict[ast.FunctionDef, list[Frame]] = defaultdict(list)
        for frame in self.machine.frames:
            if frame.function is not None and isinstance(frame.function.node, ast.FunctionDef):
                self.frames[frame.function.node].append(frame)
        self.wanted: dict[ast.Call, set[str]] = defaultdict(set)
        self.homes: dict[ast.AST, SourceFile] = {}
        self.flags: dict[ast.ClassDef, str] = {}
        self.attributes: list[str] = []
        self.parameter = ""
        self.guards: list[Guard] = []
        self.through: set[ast.Call] = set()  # calls in wrappers that hand their keywords on
        self.wrapped: list[ast.stmt] = []  # further statements that compute something of the weights

    def demand(self, reads: Sequence[ast.Name]) -> Demand:
        function = self.trace.function
        assert isinstance(function, ast.FunctionDef)
        self.homes[function] = self.trace.source
        made = Demand()
        conditions: list[str] = []
        for statement, attribute in self.trace.stored:
            conditions.append(self._store(statement, attribute, made))
        for branch, condition in self.trace.escapes:
            conditions.append(condition)
            made.dropped[branch] = self._other_side(branch)
        for read in reads:
            conditions += self._read(read, made)
        self._close()
        if self.slots:
            self._name_parameter()
            conditions = [self.parameter if c == "#" else c for c in conditions]
        if ALWAYS in conditions or not conditions:
            raise Decline("the weights are read on every path")
        self.guards += [Guard(condition, branch.test, True) for branch, condition in self.trace.escapes]
        open_ways = [c.frame for c in self.contexts if not self._surely_guarded(c.frame)]
        if not open_ways:
            raise Decline("every call takes a branch that reads the scores or weights for something else")
        if all(self._by_default(frame, conditions) for frame in open_ways):
            raise Decline(
                "the weights are returned to whoever calls the model",
                "add an argument that says whether they are wanted, false by default",
            )
        made.condition = " or ".join(dict.fromkeys(conditions))
        made.edits += [self._only_if(statement, made.condition) for statement in self.wrapped]
        made.edits += self._edits()
        made.notes += self._notes()
        return made

    def _surely_guarded(self, frame: Frame) -> bool:
        """Whether the code itself decides that a call takes a branch in which the weights are read."""
        return any(
            there is frame and truth_of(value) is guard.side
            for guard in self.guards
            for there, value in self.machine.at.get(guard.test, ())
        )

    # -- in the function itself

    def _read(self, read: ast.Name, made: Demand) -> list[str]:
        source, function = self.trace.source, self.trace.function
        assert isinstance(function, ast.FunctionDef)
        statement = statement_of(source.tree, read)
        inside = self._region_statement(statement)
        found = _guarding(source, function, read)
        if found is not None:
            self.guards.append(found)
            guard = found.condition
            if inside is not None and inside is not self.trace.region[-1]:
                if isinstance(inside, ast.Assign) and isinstance(inside.value, ast.IfExp):
                    made.dropped[inside] = [f"{ast.unparse(inside.targets[0])} = None"]
                elif not isinstance(inside, ast.If) or inside.orelse:
                    raise Decline(f"weights are read at line {read.lineno} between the two products")
                else:
                    made.dropped[inside] = []
            return [guard]
        if isinstance(statement, ast.Return):
            self._return(function, source, read, statement)
            if inside is not None:
                made.nothing.add(read)
            elif read.id not in made.unset:
                made.unset.append(read.id)
            return ["#"]
        attribute = _stored_in(statement, read)
        if attribute is not None:
            condition = self._flag(attribute, source, self.contexts[0].frame)
            if inside is not None:
                made.dropped[statement] = []
            elif isinstance(statement, ast.Assign) and statement.value is read:
                made.unset += [read.id] if read.id not in made.unset else []
            else:
                self.wrapped.append(statement)
            return [condition]
        return self._derived(read, statement, inside, made)

    def _store(self, statement: ast.Assign, attribute: ast.Attribute, made: Demand) -> str:
        """`self.weights = weights` between the two products."""
        source, function = self.trace.source, self.trace.function
        assert isinstance(function, ast.FunctionDef)
        found = _guarding(source, function, statement)
        inside = self._region_statement(statement)
        if found is None:
            return self._flag(attribute, source, self.contexts[0].frame)
        if (
            not isinstance(inside, ast.If)
            or inside.orelse
            or any(s not in self.trace.kept_weights for s in inside.body)
        ):
            raise Decline(f"weights are stored at line {statement.lineno} between the two products")
        made.dropped[inside] = []
        self.guards.append(found)
        return found.condition

    def _other_side(self, branch: ast.If) -> list[str]:
        """What runs where the branch's test is false."""
        lines: list[str] = []
        for statement in branch.orelse:
            code = self.trace.source.code(statement)
            if isinstance(statement, ast.If | ast.For | ast.While | ast.With | ast.Try) or "\n" in code:
                code = ast.unparse(statement)
            lines += code.splitlines()
        return lines

    def _region_statement(self, statement: ast.stmt) -> ast.stmt | None:
        above = outward(self.trace.source.tree, statement)
        return next((s for s in above if isinstance(s, ast.stmt) and s in self.trace.region), None)

    def _derived(self, read: ast.Name, statement: ast.stmt, inside: ast.stmt | None, made: Demand) -> list[str]:
        """`mean = weights.mean(1)`: wanted where `mean` is."""
        function = self.trace.function
        assert isinstance(function, ast.FunctionDef)
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if len(targets) != 1 or not isinstance(targets[0], ast.Name) or statement is self.trace.region[-1]:
            raise Decline(
                f"the weights are used for something else at line {read.lineno}",
                "scaled_dot_product_attention does not give the weights",
            )
        name = targets[0].id
        stores = [n for n in walk(function) if isinstance(n, ast.Name) and n.id == name
                  and not isinstance(n.ctx, ast.Load)]  # fmt: skip
        uses = [n for n in walk(function) if isinstance(n, ast.Name) and n.id == name
                and isinstance(n.ctx, ast.Load)]  # fmt: skip
        if len(stores) != 1:
            raise Decline(f"the weights are used for something else at line {read.lineno}")
        conditions: list[str] = []
        inner = Demand()
        for use in uses:
            conditions += self._read(use, inner)
        if inner.nothing or inner.edits or not conditions:
            raise Decline(f"the weights are used for something else at line {read.lineno}")
        made.dropped.update(inner.dropped)
        if inside is not None:
            made.dropped[statement] = [f"{name} = None"] if inner.unset else []
        else:
            self.wrapped.append(statement)
        return conditions

    def _only_if(self, statement: ast.stmt, condition: str) -> Edit:
        """What a statement behind the products computes of the weights, only where it is wanted."""
        path, code = self.trace.source.path, self.trace.source.code(statement)
        assert isinstance(statement, ast.Assign)
        if isinstance(statement.targets[0], ast.Attribute):
            if "\n" in code:
                code = ast.unparse(statement)
            return Replace(path, statement, f"if {condition}:\n    {code}\n")
        return Replace(path, statement.value, f"$0 if {condition} else None", (statement.value,))

    # -- returned weights

    def _return(self, function: ast.FunctionDef, source: SourceFile, read: ast.expr, statement: ast.Return) -> None:
        slot = _slot(statement, read)
        if slot is None:
            raise Decline(f"the weights are returned inside something else at line {statement.lineno}")
        self.homes[function] = source
        self.slots.setdefault(function, set()).add(slot)

    def _close(self) -> None:
        """Follows returned weights through the callers until nobody hands them on."""
        done: set[tuple[ast.FunctionDef, int]] = set()
        while True:
            todo = [(f, s) for f, slots in self.slots.items() for s in slots if (f, s) not in done]
            if not todo:
                return
            for function, slot in todo:
                done.add((function, slot))
                for frame in self.frames[function]:
                    self._caller(function, slot, frame)

    def _caller(self, function: ast.FunctionDef, slot: int, frame: Frame) -> None:
        call, caller = frame.call, frame.caller
        if not isinstance(call, ast.Call) or caller is None or caller.function is None:
            return  # an entry: whoever calls it is outside
        source = caller.scope.source
        if not self._calls(call):
            self._through(call, slot, function, caller)
            return
        self.homes[call] = source
        outer = function_of(source.tree, call)
        if outer is None:
            self.wanted[call].add(ALWAYS)
            return
        self.wanted[call] |= self._use(call, slot, outer, source, caller)

    def _through(self, call: ast.Call, slot: int, function: ast.FunctionDef, caller: Frame) -> None:
        """`self.sublayer(*args, **kwargs)` in a wrapper that drops the weights: whoever calls the wrapper says so."""
        source, outer, outward_call = caller.scope.source, caller.function, caller.call
        assert outer is not None
        wrapper = outer.node
        rest = wrapper.args.kwarg.arg if wrapper.args.kwarg else ""
        hands_on = any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == rest for k in call.keywords)
        around = caller.caller
        if (
            not hands_on
            or not isinstance(wrapper, ast.FunctionDef)
            or not isinstance(outward_call, ast.Call)
            or around is None
            or self._use(call, slot, wrapper, source, caller)
            or not self._always_ends_in(outward_call, call, function)
        ):
            raise Decline("the weights are returned through a call that cannot be given a further argument")
        self.through.add(call)
        self.homes[outward_call] = around.scope.source
        self.wanted[outward_call] |= set()

    def _always_ends_in(self, outward_call: ast.Call, call: ast.Call, function: ast.FunctionDef) -> bool:
        """Whether a call of a wrapper runs the function every time, and never something else in its place."""
        values = [value for _, value in self.machine.at.get(outward_call.func, ())]
        wrapped = [f for f in self.machine.frames if f.call is outward_call and f.function is not None]
        return (
            bool(wrapped)
            and {entered(v) for v in values} == {f.function.node for f in wrapped if f.function is not None}
            and all(any(g.caller is f and g.call is call for g in self.frames[function]) for f in wrapped)
        )

    def _calls(self, call: ast.Call) -> bool:
        """Whether a call can only be one of the functions that take the new parameter."""
        values = [value for _, value in self.machine.at.get(call.func, ())]
        return bool(values) and all(any(entered(value) is known for known in self.slots) for value in values)

    def _use(self, call: ast.Call, slot: int, outer: FunctionNode, source: SourceFile, caller: Frame) -> set[str]:
        parent = parents(source.tree).get(call)
        if isinstance(parent, ast.Subscript) and parent.value is call:
            index = parent.slice
            if isinstance(index, ast.Constant) and isinstance(index.value, int) and index.value >= 0:
                return {ALWAYS} if index.value == slot else set()
            return {ALWAYS}
        if isinstance(parent, ast.Expr):
            return set()
        if isinstance(parent, ast.Return):
            return self._passed_on(outer, slot, source)
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1:
            return self._assigned(parent.targets[0], slot, outer, source, caller, parent)
        return {ALWAYS}

    def _passed_on(self, outer: FunctionNode, slot: int, source: SourceFile) -> set[str]:
        if not isinstance(outer, ast.FunctionDef):
            return {ALWAYS}
        self.homes[outer] = source
        self.slots.setdefault(outer, set()).add(slot)
        return {"#"}

    def _assigned(
        self, target: ast.expr, slot: int, outer: FunctionNode, source: SourceFile, caller: Frame, statement: ast.Assign
    ) -> set[str]:
        if isinstance(target, ast.Name):
            return self._whole(target, slot, outer, source, caller)
        if not isinstance(target, ast.Tuple | ast.List):
            return {ALWAYS}
        star = next((i for i, e in enumerate(target.elts) if isinstance(e, ast.Starred)), None)
        part = target.elts[slot if star is None or slot < star else star]
        if isinstance(part, ast.Starred):
            part = part.value
        if isinstance(part, ast.Attribute):
            return {self._flag(part, source, caller)}
        if not isinstance(part, ast.Name) or not isinstance(outer, ast.FunctionDef):
            return {ALWAYS} if not isinstance(part, ast.Name) else set()
        return self._uses_of(part.id, outer, source, caller, statement, set())

    def _whole(self, target: ast.Name, slot: int, outer: FunctionNode, source: SourceFile, caller: Frame) -> set[str]:
        """`result = attention(...)`: every read takes one item out of it, or only asks what it is."""
        above = parents(source.tree)
        values = {id(v) for f, v in self.machine.at.get(target, ()) if f is caller}
        for node in walk(outer):
            if not (isinstance(node, ast.Name) and node.id == target.id and isinstance(node.ctx, ast.Load)):
                continue
            seen = [v for f, v in self.machine.at.get(node, ()) if f is caller]
            if seen and not any(id(v) in values or any(id(p) in values for p in v.inputs) for v in seen):
                continue  # bound again in between
            parent = above.get(node)
            if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance":
                continue
            index = parent.slice if isinstance(parent, ast.Subscript) and parent.value is node else None
            if not (isinstance(index, ast.Constant) and isinstance(index.value, int) and index.value >= 0):
                return {ALWAYS}
            if index.value == slot:
                return {ALWAYS}
        return set()

    def _uses_of(
        self, name: str, outer: ast.FunctionDef, source: SourceFile, caller: Frame, statement: ast.stmt, seen: set[str]
    ) -> set[str]:
        """What the reads of a variable that holds weights ask for."""
        found: set[str] = set()
        if name in seen:
            return found
        for node in walk(outer):
            if not (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)):
                continue
            if not self._sees(node, outer, source, statement, name) or _is_appended_to(source, node):
                continue
            found |= self._one_use(node, outer, source, caller, seen | {name})
        return found

    def _sees(self, node: ast.Name, outer: ast.FunctionDef, source: SourceFile, statement: ast.stmt, name: str) -> bool:
        """Whether a read may get what the statement bound: not where it comes before it outside a loop."""
        loops = any(isinstance(n, ast.For | ast.While) for n in outward(source.tree, statement) if n is not outer)
        return loops or source.span(node) > source.span(statement)

    def _one_use(
        self, node: ast.Name, outer: ast.FunctionDef, source: SourceFile, caller: Frame, seen: set[str]
    ) -> set[str]:
        guard = _guard(source, outer, node)
        if guard is not None:
            return {guard}
        statement = statement_of(source.tree, node)
        if isinstance(statement, ast.Return):
            slot = _slot(statement, node)
            return {ALWAYS} if slot is None else self._passed_on(outer, slot, source)
        attribute = _stored_in(statement, node)
        if attribute is not None:
            return {self._flag(attribute, source, caller)}
        collected = _collected_in(source, statement, node)
        if collected:
            return self._uses_of(collected, outer, source, caller, statement, seen)
        return {ALWAYS}

    # -- weights kept on a module

    def _flag(self, attribute: ast.Attribute, source: SourceFile, frame: Frame) -> str:
        owner = next((n for n in outward(source.tree, attribute) if isinstance(n, ast.ClassDef)), None)
        if not (isinstance(attribute.value, ast.Name) and attribute.value.id == "self" and owner is not None):
            raise Decline(f"the weights are stored in `{ast.unparse(attribute)}`")
        self._check_unread(attribute)
        if owner not in self.flags:
            used = {n.attr for n in walk(owner) if isinstance(n, ast.Attribute)} | names_in(owner)
            self.flags[owner] = free_name("keep_weights", used)
            self.homes[owner] = source
        self.attributes.append(f"{owner.name}.{attribute.attr}")
        return f"self.{self.flags[owner]}"

    def _check_unread(self, attribute: ast.Attribute) -> None:
        stored = {id(v) for _, v in self.machine.at.get(attribute, ())}
        for source in self._sources():
            above = parents(source.tree)
            for node in walk(source.tree):
                if isinstance(node, ast.Constant) and node.value == attribute.attr and _is_looked_up(above, node):
                    raise Decline(f"the stored weights may be read at {source.path.name}:{node.lineno}")
                if not (
                    isinstance(node, ast.Attribute) and node.attr == attribute.attr and isinstance(node.ctx, ast.Load)
                ):
                    continue
                values = [v for _, v in self.machine.at.get(node, ())]
                parent = above.get(node)
                is_called = isinstance(parent, ast.Call) and parent.func is node
                is_part = isinstance(parent, ast.Attribute)
                if any(id(v) in stored for v in values) or not (values or is_called or is_part):
                    raise Decline(
                        f"the stored weights are read at {source.path.name}:{node.lineno}",
                        "store them only where an option of the module asks for it",
                    )

    def _sources(self) -> Iterator[SourceFile]:
        seen = set()
        for path in [*self.model.project.named, *{f.path for f in self.machine.frames}]:
            source = self.model.project.source(path)
            if source is not None and path not in seen:
                seen.add(path)
                yield source

    # -- the edits

    def _name_parameter(self) -> None:
        taken: set[str] = set()
        for function in self.slots:
            taken |= names_in(function)
        self.parameter = free_name("need_weights", taken)
        for conditions in self.wanted.values():
            if "#" in conditions:
                conditions.discard("#")
                conditions.add(self.parameter)

    def _by_default(self, frame: Frame, conditions: Sequence[str]) -> bool:
        """Whether the weights are wanted in a context as long as nobody asks for anything."""
        if ALWAYS in conditions:
            return True
        if not self.parameter or self.parameter not in conditions:
            return False
        call = frame.call
        wrapper = frame.caller
        if call in self.through and wrapper is not None:
            frame, call = wrapper, wrapper.call
        if not isinstance(call, ast.Call) or call not in self.wanted or frame.caller is None:
            return True
        return self._by_default(self._home_frame(frame.caller), sorted(self.wanted[call]))

    def _home_frame(self, frame: Frame) -> Frame:
        """The frame of the function whose parameter decides: a lambda's or comprehension's outer one."""
        while (
            frame.function is not None and frame.function.node not in self.slots and frame.function.closure is not None
        ):
            frame = frame.function.closure
        return frame

    def _edits(self) -> Iterator[Edit]:
        for function in self.slots:
            yield AddParameter(self.homes[function].path, function, f"{self.parameter}=True")
        for call, conditions in self.wanted.items():
            if ALWAYS not in conditions:
                code = " or ".join(sorted(conditions)) or "False"
                yield AddArgument(self.homes[call].path, call, code, self.parameter)
        for owner, flag in self.flags.items():
            yield from _flag_edit(owner, flag, self.homes[owner])

    def _notes(self) -> Iterator[str]:
        if self.slots:
            yield (
                f"the weights are computed where a caller asks for them: `{self.parameter}=False` takes the fused path,"
                " the default returns them as before"
            )
        for owner, flag in self.flags.items():
            kept = ", ".join(sorted({a for a in self.attributes if a.startswith(owner.name + ".")}))
            yield f"`{kept}` is filled only while `{owner.name}.{flag}` is true: nothing here reads it"


def _flag_edit(owner: ast.ClassDef, flag: str, source: SourceFile) -> Iterator[Edit]:
    code = f"{flag} = False  # True: forward keeps the attention weights\n"
    first = owner.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    yield Insert(source.path, first, code, where="after" if is_docstring else "before")


def _slot(statement: ast.Return, read: ast.AST) -> int | None:
    """Which item of the returned tuple a read is, the only one where it is returned by itself."""
    if isinstance(statement.value, ast.Tuple) and read in statement.value.elts:
        return statement.value.elts.index(read)
    return None


def _stored_in(statement: ast.stmt, read: ast.AST) -> ast.Attribute | None:
    """The attribute that a statement puts weights, a copy or their mean into. Anything else may be a loss."""
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        return None
    target, value = statement.targets[0], statement.value
    while value is not read:
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in SHOWN:
            value = value.func.value
        elif isinstance(value, ast.Attribute) and value.attr in SHOWN:
            value = value.value
        else:
            return None
    return target if isinstance(target, ast.Attribute) else None


def _is_appended_to(source: SourceFile, node: ast.AST) -> bool:
    parent = parents(source.tree).get(node)
    return isinstance(parent, ast.Attribute) and parent.attr in ("append", "extend")


def _collected_in(source: SourceFile, statement: ast.stmt, read: ast.AST) -> str:
    """The list that a statement appends a variable to, '' where it does something else."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        call = statement.value
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("append", "extend") and read in call.args:
            return call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    if (
        (
            isinstance(statement, ast.AugAssign)
            and isinstance(statement.op, ast.Add)
            and isinstance(statement.target, ast.Name)
        )
        and isinstance(statement.value, ast.List | ast.Tuple)
        and read in statement.value.elts
    ):
        return statement.target.id
    return ""


def _guard(source: SourceFile, function: ast.FunctionDef, read: ast.AST) -> str | None:
    """The condition under which a read happens, if it is known before and stays the same: `return_weights`."""
    found = _guarding(source, function, read)
    return found.condition if found is not None else None


def _guarding(source: SourceFile, function: ast.FunctionDef, read: ast.AST) -> Guard | None:
    """The outermost test around a read that is known before and stays the same."""
    inner: ast.AST = read
    found: Guard | None = None
    for node in outward(source.tree, read):
        if node is function:
            break
        if isinstance(node, ast.If | ast.IfExp) and inner is not node.test:
            body = node.body if isinstance(node.body, list) else [node.body]
            text = stable_test(source, function, node.test)
            if text is not None:
                side = inner in body
                found = Guard(text if side else f"not {_wrapped(node.test, text)}", node.test, side)
        inner = node
    return found


def _wrapped(test: ast.expr, text: str) -> str:
    return text if isinstance(test, ast.Name | ast.Attribute) else f"({text})"


def _is_looked_up(above: dict[ast.AST, ast.AST], node: ast.AST) -> bool:
    parent = above.get(node)
    return (
        isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in ("getattr", "hasattr")
    )
