"""Where a feed-forward's activation is written, and what puts a gated one in its place."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from codemods._swiglu_branches import is_unconditional, stores, unreached_reads
from codemods._swiglu_gate import Gate
from codemods._swiglu_places import Refused, Uses
from modernizer.edit import Edit, Replace
from modernizer.graph.query import IDENTITY, alternatives, ancestors, base, origin
from modernizer.graph.values import Class, External, Frame, Function, Method, Module, Node, Partial, Value
from modernizer.model_map.feed_forward import FeedForward
from modernizer.syntax import mentions, walk

Reference = Callable[[str, ast.AST, Frame], tuple[str, Sequence[Edit]]]  # the text for a component at a place


@dataclass(eq=False)
class ActivationSite:
    """The call in which an activation happens, and what is called: modules, or functions where there are none."""

    call: ast.expr
    frame: Frame
    modules: list[Module] = field(default_factory=list)
    is_formula: bool = False  # no call of its own: arithmetic in the feed-forward's own code


def find_activations(made: FeedForward) -> list[ActivationSite]:
    """Where the activation of a feed-forward is written, one place for each branch that has its own.

    Raises Refused where it takes several steps.
    """
    around = {id(f) for end in (made.first.frame, made.second.frame) for f in end.outward()}
    sites: dict[ast.expr, ActivationSite] = {}
    place_of: dict[int, ast.expr] = {}
    steps = _steps(made)
    helpers: set[int] = set()
    for node in steps:
        syntax, frame, entered = node.node, node.frame, None
        while id(frame) not in around:
            entered, syntax = frame, frame.call
            helpers.add(id(frame))
            if frame.caller is None:
                raise Refused("its activation is computed out of sight")
            frame = frame.caller
        if not isinstance(syntax, ast.expr):
            raise Refused("its activation is computed out of sight")
        place_of[id(node)] = syntax
        site = sites.setdefault(syntax, ActivationSite(syntax, frame))
        called = entered.receiver if entered is not None and _is_forward(entered) else node.module
        if isinstance(called, Module) and called not in site.modules and (entered is None or _is_forward(entered)):
            site.modules.append(called)
        site.is_formula = site.is_formula or (entered is None and not isinstance(syntax, ast.Call))
    if any(n.op == "dropout" and any(id(f) in helpers for f in n.frame.outward()) for n in made.nodes):
        raise Refused("its activation and a dropout are one function", "apply the dropout outside of it")
    top = base(made.activated)
    options = [base(option) for option in alternatives(top)]
    if len(sites) == 1 or all(len(_places(option, place_of)) == 1 for option in options):
        return list(sites.values())
    if isinstance(top, Node) and isinstance(top.node, ast.expr) and all(s in walk(top.node) for s in sites):
        return [ActivationSite(top.node, top.frame, is_formula=True)]
    raise Refused("its activation is computed in several steps", "put it into one function")


def _places(option: Value, place_of: dict[int, ast.expr]) -> set[ast.expr]:
    """Where the steps are written that lead to one of the alternatives."""
    return {place_of[i] for i in ancestors(option) if i in place_of}


def _is_forward(frame: Frame) -> bool:
    return frame.function is not None and frame.function.name in ("forward", "__call__")


def _steps(made: FeedForward) -> list[Node]:
    """The operations of the activation, without those on constants alone."""
    depends = {id(made.first.value)}
    found: list[Node] = []
    for node in sorted(made.nodes, key=lambda n: n.order):
        if any(id(a) in depends for a in node.inputs):
            depends.add(id(node))
            if node.op not in IDENTITY and node.op != "merge":
                found.append(node)
    return found


class ActivationEdits:
    """Puts gated activations in the place of plain ones."""

    def __init__(self, uses: Uses, sites: Sequence[ActivationSite], reference: Reference) -> None:
        self.uses = uses
        self.reference = reference
        self.calls = {site.call for site in sites}
        self.callees = {site.call.func for site in sites if isinstance(site.call, ast.Call)}

    def edits(self, site: ActivationSite, made: FeedForward, gate: Gate) -> list[Edit]:
        """The edits for one feed-forward; raises Refused where there is no safe one."""
        if site.is_formula:
            return self._in_formula(site, made, gate)
        assert isinstance(site.call, ast.Call)
        if not self._is_explicit(site):
            return self._constructors(site, gate) or self._element(site, gate)
        if not self._is_assigned_once(site):
            return self._called(site, made, gate)
        found: list[Edit] = []
        if len({origin(m).call for m in site.modules}) == 1:
            found = self._constructors(site, gate)
        return found or self._assigned(site, gate) or self._called(site, made, gate)

    def _is_assigned_once(self, site: ActivationSite) -> bool:
        """Whether the attribute that is called gets its value in one statement, and all its uses are known."""
        assert isinstance(site.call, ast.Call)
        func = site.call.func
        if not isinstance(func, ast.Attribute):
            return True
        owners = [v for v in self.uses.values(func.value, site.frame) if isinstance(v, Module) and v.cls is not None]
        return all(
            stores(v.cls, func.attr) <= 1 and not unreached_reads(self.uses, v.cls, func.attr)
            for v in owners
            if v.cls is not None
        )

    def _is_explicit(self, site: ActivationSite) -> bool:
        """Whether the call names the activation, rather than a container that it is in."""
        assert isinstance(site.call, ast.Call)
        for value in self.uses.values(site.call.func, site.frame):
            for option in alternatives(value):
                if isinstance(option, Module):
                    return any(option is m for m in site.modules)
                if isinstance(option, External | Function | Method | Partial | Class):
                    return True
                return isinstance(option, Node)  # a method of the datum
        return False

    # -- a module: where it is made

    def _constructors(self, site: ActivationSite, gate: Gate) -> list[Edit]:
        calls: dict[ast.Call, Frame] = {}
        for module in site.modules:
            made = origin(module)
            if not isinstance(made.call, ast.Call) or made.frame is None or not self._is_made_for_this(made):
                return []
            calls[made.call] = made.frame
        return [edit for call, frame in calls.items() for edit in self._module(call, frame, gate)]

    def _is_made_for_this(self, module: Module) -> bool:
        """Whether every module that a constructor call makes is applied in feed-forwards only."""
        frame = module.frame
        if frame is None or frame.function is None or module.call is None:
            return False  # a module-level instance or table belongs to everybody
        if not is_unconditional(module.call, frame.scope.source.parents):
            return False
        if frame.function.name != "__init__" and not self._makes_projections(frame):
            return False
        values = self.uses.values(module.call, frame)
        if not any(option is module for v in values for option in alternatives(v)):
            return False
        results = [v for m in self.uses.modules_at[module.call] for v in self.uses.results.get(id(m), ())]
        return all(id(v) in self.uses.activated for v in results)

    def _makes_projections(self, frame: Frame) -> bool:
        """Whether a function is the one that puts a feed-forward together, not a helper that looks an activation up."""
        return any(
            origin(m).frame is frame and any(id(v) in self.uses.roles for v in self.uses.results.get(id(m), ()))
            for m in self.uses.machine.modules
        )

    def _module(self, place: ast.expr, frame: Frame, gate: Gate) -> list[Edit]:
        text, imports = self.reference(gate.module, place, frame)
        return [Replace(frame.path, place, f"{text}({', '.join(gate.arguments)})"), *imports]

    def _element(self, site: ActivationSite, gate: Gate) -> list[Edit]:
        """An element of a container that comes from elsewhere: an argument, a table of activations, a factory."""
        assert isinstance(site.call, ast.Call)
        found: dict[ast.expr, Frame] = {}
        for container in self._containers(site):
            if isinstance(container.call, ast.Call) and container.frame is not None:
                for part in walk(container.call):
                    if (
                        part is not container.call
                        and isinstance(part, ast.expr)
                        and any(
                            option is m
                            for v in self.uses.values(part, container.frame)
                            for option in alternatives(v)
                            for m in map(origin, site.modules)
                        )
                    ):
                        found.setdefault(part, container.frame)
                        break
        if len(found) != 1:
            raise Refused("its activation is made where others are made too", "make one for the feed-forward alone")
        ((part, frame),) = found.items()
        return self._module(part, frame, gate)

    def _containers(self, site: ActivationSite) -> Iterator[Module]:
        assert isinstance(site.call, ast.Call)
        todo = [o for v in self.uses.values(site.call.func, site.frame) for o in alternatives(v)]
        wanted = {id(m) for m in site.modules}
        seen: set[int] = set()
        while todo:
            value = todo.pop()
            if not isinstance(value, Module) or id(value) in seen:
                continue
            seen.add(id(value))
            children = value.children.items if value.children else list(value.attributes.values())
            options = [o for child in children for o in alternatives(child)]
            if value.children and any(id(o) in wanted for o in options):
                yield origin(value)
            todo.extend(options)

    # -- an attribute: where it is assigned

    def _assigned(self, site: ActivationSite, gate: Gate) -> list[Edit]:
        assert isinstance(site.call, ast.Call)
        func = site.call.func
        if not isinstance(func, ast.Attribute):
            return []
        statements: dict[ast.stmt, Frame] = {}
        for called in self.uses.values(func):
            for target, frame in self._targets(called, func.attr):
                parent = frame.scope.source.parents.get(target)
                if not isinstance(parent, ast.Assign) or len(parent.targets) != 1:
                    return []
                statements[parent] = frame
        if len(statements) != 1:
            return []
        ((statement, frame),) = statements.items()
        assert isinstance(statement, ast.Assign)
        inside = set(walk(statement.value))
        given = self.uses.values(statement.targets[0])
        for value in given:
            for read, _ in self.uses.machine.reads[id(value)]:
                is_read = isinstance(read, ast.Attribute) and isinstance(read.ctx, ast.Load) and read.attr == func.attr
                if is_read and read not in inside and read not in self.callees:
                    return []
        if gate.axis == -1 and all(isinstance(o, External | Function) for v in given for o in alternatives(v)):
            return self._function(statement.value, frame, gate)
        return self._module(statement.value, frame, gate)

    def _function(self, place: ast.expr, frame: Frame, gate: Gate) -> list[Edit]:
        text, imports = self.reference(gate.function, place, frame)
        if gate.keywords:
            partial, more = self.reference("functools.partial", place, frame)
            text, imports = f"{partial}({', '.join([text, *gate.keywords])})", [*imports, *more]
        return [Replace(frame.path, place, text), *imports]

    def _targets(self, value: Value, attribute: str) -> Iterator[tuple[ast.Attribute, Frame]]:
        for file in self.uses.machine.project.files():
            for syntax in mentions(file.tree).attributes.get(attribute, ()):
                if isinstance(syntax.ctx, ast.Store):
                    yield from ((syntax, f) for f, bound in self.uses.machine.at.get(syntax, ()) if bound is value)

    # -- a call: where it stands

    def _called(self, site: ActivationSite, made: FeedForward, gate: Gate) -> list[Edit]:
        assert isinstance(site.call, ast.Call)
        call, frame = site.call, site.frame
        if not self._is_in_feed_forwards(call):
            raise Refused("its activation is applied to something else at the same place")
        inside = {id(made.first.value), *map(id, made.nodes)}
        operands = [call.func.value] if isinstance(call.func, ast.Attribute) else []
        operands += [*call.args, *(k.value for k in call.keywords)]
        read = [
            p for p in operands if any(id(o) in inside for v in self.uses.values(p, frame) for o in alternatives(v))
        ]
        if len(read) != 1:
            raise Refused("the operand of its activation cannot be told")
        text, imports = self.reference(gate.function, call, frame)
        rest = "".join(f", {given}" for given in gate.arguments)
        parent = frame.scope.source.parents.get(call)
        if isinstance(parent, ast.Expr):
            if not isinstance(read[0], ast.Name):
                raise Refused("its activation works in place", "assign its result")
            return [Replace(frame.path, parent, f"{read[0].id} = {text}({read[0].id}{rest})\n"), *imports]
        return [Replace(frame.path, call, f"{text}($0{rest})", (read[0],)), *imports]

    def _is_in_feed_forwards(self, call: ast.expr) -> bool:
        """Whether everything that an expression was ever evaluated to lies in feed-forwards that are changed."""
        options = [option for value in self.uses.values(call) for option in alternatives(value)]
        return all(id(option) in self.uses.activated for option in options)

    def _in_formula(self, site: ActivationSite, made: FeedForward, gate: Gate) -> list[Edit]:
        if not self._is_in_feed_forwards(site.call):
            raise Refused("its activation is applied to something else at the same place")
        for part in walk(site.call):
            if isinstance(part, ast.Name) and any(
                base(v) is made.first.value for v in self.uses.values(part, site.frame)
            ):
                text, imports = self.reference(gate.function, site.call, site.frame)
                code = f"{text}({', '.join(['$0', *gate.arguments])})"
                return [Replace(site.frame.path, site.call, code, (part,)), *imports]
        raise Refused("its activation is a formula in several steps", "put it into one function")
