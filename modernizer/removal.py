"""Takes expressions out of a program together with everything that only served them, to a fixpoint.

Local variables, attributes, buffers, initialisations, entries of name lists, helper functions, classes and imports go
when nothing that stays reads them. What cannot be told apart from something that is read stays.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from modernizer.edit import Delete, Edit, Replace
from modernizer.graph import Graph
from modernizer.graph.values import Class, Module, Node, Object
from modernizer.source import Location
from modernizer.syntax import children, mentions, names_below, parents, walk

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
# Methods that change their receiver, so that a call of one is more than its value.
CHANGING = frozenset("append extend insert remove pop update add setdefault clear write".split())
SIDE_EFFECTS = frozenset("print open input next exec eval setattr".split())


@dataclass(frozen=True)
class Local:
    """A variable of a function, or of a file where `function` is its module node."""

    function: ast.AST
    name: str


@dataclass(frozen=True)
class Attribute:
    """An attribute of the instances of some classes."""

    owners: frozenset[ast.ClassDef]
    name: str


Entity = Local | Attribute


class Removal:
    """A set of expressions and statements that go, growing until nothing is left that only served them."""

    def __init__(self, graph: Graph, named: Collection[Path] | None = None) -> None:
        self.graph = graph
        self.project = graph.project
        self.named = graph.project.named if named is None else named  # what may be edited
        self.dropped: dict[ast.AST, None] = {}
        self.replaced: dict[ast.AST, tuple[str, tuple[ast.expr, ...]]] = {}
        self.mentions: list[Location] = []  # where a string still names something that is gone
        self.kept_readers: dict[ast.AST, list[Location]] = {}
        self.gone_attributes: list[Attribute] = []
        self._changes = 0
        self._unpacked: dict[ast.Assign, list[tuple[ast.expr, ast.expr]]] = {}  # what is left of `a, b = …`
        self._touched: tuple[int, set[ast.AST]] = (-1, set())  # at which change, and what is around all that has gone

    # -- what goes

    def drop(self, node: ast.AST) -> None:
        """Takes out a statement, or one element of a list, call or import."""
        self._changes += node not in self.dropped
        self.dropped[node] = None

    def replace(self, node: ast.expr | ast.stmt, code: str, holes: Sequence[ast.expr] = ()) -> None:
        """Puts `code` where `node` stands; `x = x` that comes of it goes altogether."""
        parent = self.parent(node)
        if (
            code == "$0"
            and isinstance(parent, ast.Assign)
            and len(parent.targets) == 1
            and isinstance(parent.targets[0], ast.Name)
            and isinstance(holes[0], ast.Name)
            and holes[0].id == parent.targets[0].id
        ):
            self.drop(parent)
            return
        self._changes += self.replaced.get(node) != (code, tuple(holes))
        self.replaced[node] = (code, tuple(holes))

    def is_gone(self, node: ast.AST) -> bool:
        """Whether a node is inside something that goes."""
        current: ast.AST | None = node
        holes: set[ast.AST] = set()
        while current is not None:
            if current in self.dropped:
                return True
            if current in self.replaced and not holes & set(self.replaced[current][1]):
                return True
            holes.add(current)
            current = self.parent(current)
        return False

    def edits(self) -> list[Edit]:
        """The edits that make all of it so, none inside another that would swallow it."""
        made: list[Edit] = []
        for node in self.dropped:
            above = self.parent(node)
            if above is None or not self.is_gone(above):
                made.append(Delete(self.path(node), node))
        for node, (code, holes) in self.replaced.items():
            above = self.parent(node)
            if node not in self.dropped and (above is None or not self.is_gone_around(node)):
                assert isinstance(node, ast.expr | ast.stmt)
                made.append(Replace(self.path(node), node, code, holes))
        return made

    def is_gone_around(self, node: ast.AST) -> bool:
        """Whether something above a node goes and takes the node with it."""
        current, below = self.parent(node), {node}
        while current is not None:
            if current in self.dropped:
                return True
            if current in self.replaced and not below & set(self.replaced[current][1]):
                return True
            below.add(current)
            current = self.parent(current)
        return False

    # -- where things are

    @cached_property
    def _trees(self) -> dict[Path, ast.Module]:
        files = self.project.files()
        return {file.path: file.tree for file in files}

    @cached_property
    def _parents(self) -> dict[ast.AST, ast.AST]:
        return _parents_in(tuple(self._trees.values()))

    @cached_property
    def _paths(self) -> dict[ast.AST, Path]:
        return {tree: path for path, tree in self._trees.items()}

    def parent(self, node: ast.AST) -> ast.AST | None:
        return self._parents.get(node)

    def path(self, node: ast.AST) -> Path:
        """The file a node is in."""
        current = node
        while (above := self.parent(current)) is not None:
            current = above
        return self._paths[current]

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        current = self.parent(node)
        while current is not None:
            yield current
            current = self.parent(current)

    def statement(self, node: ast.AST) -> ast.stmt:
        """The innermost statement around a node."""
        current: ast.AST | None = node
        while current is not None and not isinstance(current, ast.stmt):
            current = self.parent(current)
        assert current is not None
        return current

    def function(self, node: ast.AST) -> ast.AST:
        """The function whose variables the names at a node are, or the module; comprehensions count as part of it."""
        for above in self.above(node):
            if isinstance(above, FunctionNode | ast.Module):
                return above
        return node

    def class_around(self, node: ast.AST) -> ast.ClassDef | None:
        return next((a for a in self.above(node) if isinstance(a, ast.ClassDef)), None)

    def location(self, node: ast.AST) -> Location:
        source = self.project.source(self.path(node))
        assert source is not None
        return source.location(node)

    def knows(self, node: ast.AST) -> bool:
        """Whether a node is part of a file as it stands (some are made up while a program is executed)."""
        return node in self._parents

    def unread_parameters(self, function: ast.AST) -> list[str]:
        """The parameters of a function that were read by what has gone, and are by nothing that stays."""
        if not isinstance(function, ast.FunctionDef) or function not in self._around_gone() or self.is_gone(function):
            return []
        named = names_below(function)
        names = {a.arg: named.get(a.arg, []) for a in _parameters(function)}
        return [
            name
            for name, loads in names.items()
            if loads
            and all(self.is_gone(n) or self._asks_for_nothing(n) for n in loads)
            and any(self.is_gone(n) for n in loads)
        ]

    def _around_gone(self) -> set[ast.AST]:
        """Everything that something which has gone is inside of."""
        change, found = self._touched
        if change != self._changes:
            found = set()
            for node in [*self.dropped, *self.replaced]:
                for above in self.above(node):
                    if above in found:
                        break
                    found.add(above)
            self._touched = self._changes, found
        return found

    def _asks_for_nothing(self, node: ast.Name) -> bool:
        """`x if pos is None else x + pos`, of which both sides have become one."""
        test = self.parent(node)
        choice = self.parent(test) if isinstance(test, ast.Compare) else None
        if not isinstance(choice, ast.IfExp) or choice.test is not test:
            return False
        return ast.unparse(self._left_of(choice.body)) == ast.unparse(self._left_of(choice.orelse))

    def _left_of(self, node: ast.expr) -> ast.expr:
        """What stays of an expression."""
        code, holes = self.replaced.get(node, ("", ()))
        return holes[0] if code == "$0" else node

    # -- to the fixpoint

    def settle(self) -> None:
        """Lets go of everything that only served what has gone."""
        tried: set[tuple[Entity | tuple[Path, str], int]] = set()
        while True:
            size = self._changes
            for entity in self._read_by_gone():
                if (entity, self._changes) not in tried:
                    tried.add((entity, self._changes))
                    self._try(entity)
            self._fold_empty()
            if self._changes == size:
                self._drop_definitions()
                if self._changes == size:
                    return

    def _gone_nodes(self) -> Iterator[ast.AST]:
        for node in list(self.dropped):
            yield from walk(node)
        for node, (_, holes) in list(self.replaced.items()):
            yield from _outside(node, set(holes))

    def _read_by_gone(self) -> list[Entity]:
        found: dict[Entity, None] = {}
        for node in list(self._gone_nodes()):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
                owner = self._binder(node)
                if owner is not None:
                    found[Local(owner, node.id)] = None
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owners = self._owners(node)
                if owners:
                    found[Attribute(owners, node.attr)] = None
        return list(found)

    def _binder(self, name: ast.Name) -> ast.AST | None:
        """The function of which a name is a variable (not a parameter alone), None where it is global."""
        for above in self.above(name):
            if isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef):
                if any(isinstance(n.ctx, ast.Store) for n in names_below(above).get(name.id, ())):
                    return above
                if name.id in {a.arg for a in walk(above.args) if isinstance(a, ast.arg)}:
                    return None
        return None

    def _owners(self, node: ast.Attribute) -> frozenset[ast.ClassDef]:
        """The classes of the modules of which an attribute that holds a module, a parameter or a tensor is read."""
        found: set[ast.ClassDef] = set()
        for _, receiver in self.graph.machine.at.get(node.value, ()):
            if not isinstance(receiver, Object) or receiver.cls is None:
                continue
            held = receiver.attributes.get(node.attr)
            if isinstance(held, Module) or (
                isinstance(held, Node) and held.op not in ("config", "input", "unknown", "attr")
            ):
                found |= {c.node for c in receiver.cls.mro if isinstance(c, Class)}
        return frozenset(found)

    def _try(self, entity: Entity) -> None:
        """Drops the statements that make an entity, if nothing that stays reads it."""
        before = self._changes
        if isinstance(entity, Local) and self._is_written(entity.name):
            return
        serving = self._serving({entity})
        if serving is None:
            return
        for statement in serving:
            self.drop(statement)
        if isinstance(entity, Attribute) and self._changes > before:
            self.gone_attributes.append(entity)
            self._drop_mentions(entity.name)

    def _is_written(self, name: str, path: Path | None = None) -> bool:
        """Whether what is put in the place of an expression names this, in any file or in one."""
        word = re.compile(rf"\b{re.escape(name)}\b")
        return any(
            word.search(code) and (path is None or self.path(node) == path) for node, (code, _) in self.replaced.items()
        )

    def _serving(self, entities: set[Entity], depth: int = 0) -> list[ast.stmt] | None:
        """The outermost statements that only make these entities; None where one of them is read elsewhere."""
        statements: dict[ast.stmt, None] = {}
        for entity in list(entities):
            for node in self.uses(entity):
                if self.is_gone(node) and not self._is_kept_target(node):
                    continue
                serving = self._outermost(node, entities)
                if serving is not None:
                    statements[serving] = None
                elif isinstance(getattr(node, "ctx", None), ast.Store) and self._unpack_less(node, entities):
                    continue
                elif isinstance(getattr(node, "ctx", None), ast.Store) and isinstance(entity, Local):
                    continue  # one of several targets: it stays, unread
                elif depth == 0 and (wider := self._with_companions(node, entities)) is not None:
                    return wider
                else:
                    self.kept_readers.setdefault(node, []).append(self.location(node))
                    return None
        return [s for s in statements if not any(a in statements for a in self.above(s))]

    def _is_kept_target(self, node: ast.AST) -> bool:
        """Whether a node is a target that is left of `a, b = …`."""
        kept = next(
            (self._unpacked[a] for a in self.above(node) if isinstance(a, ast.Assign) and a in self._unpacked), []
        )
        return any(node is part for target, _ in kept for part in walk(target))

    def _unpack_less(self, node: ast.AST, entities: set[Entity]) -> bool:
        """`a, b = f(x), g(x)` without one of its parts."""
        statement = self.statement(node)
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return False
        if statement in self.replaced and statement not in self._unpacked:
            return False
        target, value = statement.targets[0], statement.value
        if not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple) or len(target.elts) != len(value.elts):
            return False
        if any(isinstance(e, ast.Starred) for e in [*target.elts, *value.elts]):
            return False
        pairs = self._unpacked.get(statement, list(zip(target.elts, value.elts, strict=True)))
        kept = [(t, v) for t, v in pairs if not self._is_target(t, entities)]
        gone = [v for t, v in pairs if self._is_target(t, entities)]
        if not gone or not all(is_pure(v) for v in gone) or any(self._entity(v, entities) for _, v in kept):
            return False
        self._unpacked[statement] = kept
        if kept:
            names = ", ".join(ast.unparse(t) for t, _ in kept)
            code = f"{names} = {', '.join(f'${i}' for i in range(len(kept)))}\n"
            self.replace(statement, code, [v for _, v in kept])
        else:
            del self.replaced[statement]
            self.drop(statement)
        return True

    def _with_companions(self, node: ast.AST, entities: set[Entity]) -> list[ast.stmt] | None:
        """A variable assigned from an entity and used for nothing else goes with it (`angle` in a loop that fills
        a table)."""
        statement = self.statement(node)
        names = _assigned_names(statement)
        loop = next((a for a in self.above(statement) if isinstance(a, ast.For)), None)
        if loop is None and not names:
            return None
        function = self.function(node)
        inside = loop if loop is not None else statement
        extra = {Local(function, n) for s in walk(inside) if isinstance(s, ast.stmt) for n in _assigned_names(s)}
        extra = {e for e in extra if isinstance(e, Local)}
        if not extra or extra <= entities:
            return None
        return self._serving(entities | extra, depth=1)

    def _outermost(self, node: ast.AST, entities: set[Entity]) -> ast.stmt | None:
        """The largest statement around a node that does nothing but make these entities, None where there is none."""
        found: ast.stmt | None = None
        statement: ast.AST | None = self.statement(node)
        while isinstance(statement, ast.stmt) and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            if self._serves(statement, entities):
                found = statement
            elif found is not None:
                break
            above = self.parent(statement)
            statement = above if isinstance(above, ast.stmt) else None
        return found

    def _serves(self, statement: ast.stmt, entities: set[Entity]) -> bool:
        """Whether all that a statement does is to make, fill or check these entities."""
        if isinstance(statement, ast.Assign) and statement in self._unpacked:
            return all(self._is_target(target, entities) for target, _ in self._unpacked[statement])
        if self.is_gone(statement) or isinstance(statement, ast.Pass):
            return True
        match statement:
            case ast.Assign():
                return all(self._is_target(t, entities) for t in statement.targets) and is_pure(statement.value)
            case ast.AnnAssign():
                return self._is_target(statement.target, entities) and (not statement.value or is_pure(statement.value))
            case ast.AugAssign():
                return self._is_target(statement.target, entities) and is_pure(statement.value)
            case ast.Expr():
                return self._fills(statement.value, entities)
            case ast.If():
                inner = [*statement.body, *statement.orelse]
                return is_pure(statement.test) and all(self._serves(s, entities) for s in inner)
            case ast.For():
                return all(self._serves(s, entities) for s in [*statement.body, *statement.orelse])
            case ast.With():
                return all(self._serves(s, entities) for s in statement.body)
            case ast.Assert():
                return any(self._entity(n, entities) for n in walk(statement.test) if isinstance(n, ast.expr))
            case ast.Delete():
                return all(self._is_target(t, entities) for t in statement.targets)
        return False

    def _is_target(self, target: ast.expr, entities: set[Entity]) -> bool:
        if isinstance(target, ast.Tuple | ast.List):
            return all(self._is_target(t, entities) for t in target.elts)
        return self._entity(target, entities)

    def _entity(self, node: ast.expr, entities: set[Entity]) -> bool:
        """Whether an expression is one of the entities or reaches into one: `pe`, `pe[:, 0::2]`, `self.pos.weight`."""
        current: ast.expr = node
        while True:
            if any(self._is(current, entity) for entity in entities):
                return True
            if isinstance(current, ast.Attribute | ast.Subscript | ast.Starred):
                current = current.value
            elif isinstance(current, ast.Call) and isinstance(current.func, ast.Attribute):
                current = current.func.value
            else:
                return False

    def _is(self, node: ast.expr, entity: Entity) -> bool:
        if isinstance(entity, Local):
            return isinstance(node, ast.Name) and node.id == entity.name and self._inside(node, entity.function)
        if not (isinstance(node, ast.Attribute) and node.attr == entity.name):
            return False
        return self._belongs(node, entity)

    def _inside(self, node: ast.AST, function: ast.AST) -> bool:
        return any(a is function for a in self.above(node))

    def _belongs(self, node: ast.Attribute, entity: Attribute) -> bool:
        """Whether `x.name` may be the attribute meant: not where `x` is known to be something else."""
        seen = [v for _, v in self.graph.machine.at.get(node.value, ())]
        if seen:
            return any(not isinstance(v, Object) or v.cls is None or self._is_owner(v.cls, entity) for v in seen)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            around = self.class_around(node)
            return around is None or around in entity.owners or self._derives(around, entity)
        return True

    def _is_owner(self, cls: Class, entity: Attribute) -> bool:
        return any(isinstance(c, Class) and c.node in entity.owners for c in cls.mro)

    def _derives(self, node: ast.ClassDef, entity: Attribute) -> bool:
        names = {owner.name for owner in entity.owners}
        bases = {b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in node.bases}
        return bool(names & bases)

    def _fills(self, node: ast.expr, entities: set[Entity]) -> bool:
        """`nn.init.normal_(table)`, `table.fill_(0)`, `self.register_buffer("pe", pe)`, `trunc_normal_(self.pos)`."""
        if isinstance(node, ast.Constant):
            return False
        if not isinstance(node, ast.Call):
            return self._entity(node, entities)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("register_buffer", "register_parameter") and node.args:
            key = node.args[0]
            return isinstance(key, ast.Constant) and self._registers(node, str(key.value), entities)
        changes = name.endswith("_") and not name.endswith("__")
        if changes and isinstance(node.func, ast.Attribute) and self._entity(node.func.value, entities):
            return True
        return changes and bool(node.args) and self._entity(node.args[0], entities)

    def _registers(self, node: ast.Call, name: str, entities: set[Entity]) -> bool:
        around = self.class_around(node)
        return any(
            isinstance(e, Attribute) and e.name == name and around is not None
            and (around in e.owners or self._derives(around, e))
            for e in entities
        )  # fmt: skip

    def uses(self, entity: Entity) -> list[ast.AST]:
        """Every place that names an entity."""
        if isinstance(entity, Local):
            return list(names_below(entity.function).get(entity.name, ()))
        found: list[ast.AST] = []
        for tree in self._trees.values():
            named = mentions(tree)
            found += [n for n in named.attributes.get(entity.name, ()) if self._belongs(n, entity)]
            found += [n for n in named.by_key.get(entity.name, ()) if self._names_attribute(n, entity)]
        return found

    def _names_attribute(self, node: ast.Call, entity: Attribute) -> bool:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return not name.startswith("register_") or self._registers(node, entity.name, {entity})

    # -- what is left over

    def _fold_empty(self) -> None:
        """A block of which nothing is left goes as a whole, if its test does nothing."""
        for node in list(self.dropped):
            above = self.parent(node)
            if isinstance(above, ast.If) and above not in self.dropped and is_pure(above.test):
                if all(s in self.dropped or isinstance(s, ast.Pass) for s in [*above.body, *above.orelse]):
                    self.drop(above)
            elif isinstance(above, ast.For | ast.With) and above not in self.dropped:
                is_empty = all(s in self.dropped or isinstance(s, ast.Pass) for s in above.body)
                if is_empty and (isinstance(above, ast.With) or (is_pure(above.iter) and not above.orelse)):
                    self.drop(above)

    def _drop_mentions(self, name: str) -> None:
        """Takes the name of a parameter out of lists such as those without weight decay."""
        for tree in self._trees.values():
            strings = mentions(tree).strings
            for node in [n for text in strings if name in text.split(".") for n in strings[text]]:
                if self.is_gone(node):
                    continue
                above = self.parent(node)
                if isinstance(above, ast.Call) and self._is_listed(above, node):
                    self.drop(self.statement(node))
                elif isinstance(above, ast.Set | ast.List) or (isinstance(above, ast.Dict) and node in above.keys):
                    self.drop(node)
                elif not isinstance(above, ast.Expr):
                    self.mentions.append(self.location(node))

    def _is_listed(self, call: ast.Call, node: ast.Constant) -> bool:
        """`no_decay.add("pos_emb")`"""
        name = getattr(call.func, "attr", "")
        return name in ("add", "append") and call.args == [node] and isinstance(self.parent(call), ast.Expr)

    # -- definitions and imports

    def _drop_definitions(self) -> None:
        for name, path in self._globals_read_by_gone():
            self._drop_global(path, name)
        for name in self._methods_read_by_gone():
            self._drop_method(name)

    def _globals_read_by_gone(self) -> list[tuple[str, Path]]:
        found: dict[tuple[str, Path], None] = {}
        for node in list(self._gone_nodes()):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and self._binder(node) is None:
                found[(node.id, self.path(node))] = None
            elif isinstance(node, ast.alias):
                statement = self.parent(node)
                if isinstance(statement, ast.ImportFrom):
                    target = self.project.find_module(self.path(node), statement.module or "", statement.level)
                    if target is not None:
                        found[(node.name, target)] = None
        return list(found)

    def _drop_global(self, path: Path, name: str) -> None:
        tree = self._trees.get(path)
        if tree is None or path not in self.named:
            return
        for binding in mentions(tree).bindings.get(name, ()):
            if binding in self.dropped or (isinstance(binding, ast.Assign) and not is_pure(binding.value)):
                continue
            if not self._is_read(path, name, self.statement(binding)):
                self.drop(binding)

    def _is_read(self, path: Path, name: str, definition: ast.stmt) -> bool:
        """Whether anything that stays names a global of a file: in the file, or by importing it from there."""
        if path.name == "__init__.py" and not isinstance(definition, ast.ClassDef | ast.FunctionDef):
            return True
        if self._is_written(name, path):
            return True
        named = mentions(self._trees[path])
        if any(not self.is_gone(n) and not self._inside(n, definition) for n in named.loads.get(name, ())):
            return True
        if any(not self.is_gone(n) for n in named.strings.get(name, ())):  # `__all__`
            return True
        return self._is_imported(path, name) or self._is_named_elsewhere(path, name)

    def _is_imported(self, path: Path, name: str) -> bool:
        for other, tree in self._trees.items():
            for statement in mentions(tree).imports:
                imports = [a for a in statement.names if a.name in (name, "*") and not self.is_gone(a)]
                if imports and self.project.find_module(other, statement.module or "", statement.level) == path:
                    return True
            for node in mentions(tree).attributes.get(name, ()) if other != path else ():
                if isinstance(node.value, ast.Name | ast.Attribute) and _last_name(node.value) == path.stem:
                    return True
        return False

    def _is_named_elsewhere(self, path: Path, name: str) -> bool:
        """Whether a file that was not read both names something and names the file it is in."""
        word, module = re.compile(rf"\b{re.escape(name)}\b"), re.compile(rf"\b{re.escape(path.stem)}\b")
        return any(
            word.search(text) and (module.search(text) or path.name == "__init__.py") for text in self._unread_texts()
        )

    def _unread_texts(self) -> Iterator[str]:
        return (text for path, text in self.project.texts_around().items() if path not in self._trees)

    def _methods_read_by_gone(self) -> set[str]:
        return {
            node.attr for node in self._gone_nodes()
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        }  # fmt: skip

    def _drop_method(self, name: str) -> None:
        """A method that no file names any more."""
        if any(re.search(rf"\b{re.escape(name)}\b", text) for text in self._unread_texts()):
            return
        definitions: list[ast.FunctionDef] = []
        for path, tree in self._trees.items():
            named = mentions(tree)
            found = [n for n in named.methods.get(name, ()) if isinstance(self.parent(n), ast.ClassDef)]
            if found and path not in self.named:
                return
            definitions += found
            if any(not self.is_gone(n) for n in named.strings.get(name, ())):
                return
        for tree in self._trees.values():
            for node in mentions(tree).attributes.get(name, ()):
                if not self.is_gone(node) and not any(self._inside(node, d) for d in definitions):
                    return
        if len(definitions) == 1 and definitions[0] not in self.dropped and not name.startswith("__"):
            self.drop(definitions[0])


@lru_cache(maxsize=8)  # every upgrade of a program is planned on the same trees
def _parents_in(trees: tuple[ast.Module, ...]) -> dict[ast.AST, ast.AST]:
    return {child: node for tree in trees for child, node in parents(tree).items()}


def _parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """The parameters that are handed in by name or place, `*args` and `**kwargs` left out."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _last_name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def _outside(node: ast.AST, holes: set[ast.expr]) -> Iterator[ast.AST]:
    todo: list[ast.AST] = [node]
    while todo:
        current = todo.pop()
        if current in holes:
            continue
        yield current
        todo.extend(children(current))


def _assigned_names(statement: ast.stmt) -> list[str]:
    """The plain names a statement binds."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign | ast.For):
        targets = [statement.target]
    return [n.id for t in targets for n in walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def is_pure(node: ast.expr) -> bool:
    """Whether evaluating an expression does nothing but make its value."""
    for part in walk(node):
        if isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
        if isinstance(part, ast.Call):
            name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
            if name in SIDE_EFFECTS or (isinstance(part.func, ast.Attribute) and name in CHANGING):
                return False
    return True
