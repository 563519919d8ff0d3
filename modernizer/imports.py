"""By which text an object can be named in a file: through an import that is there, or one that has to be added."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping

from modernizer.edit import AddImport
from modernizer.source import SourceFile
from modernizer.syntax import children, every_node, walk

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

# Modules that `import torch` loads with it, so that `torch.nn.functional` needs no import of its own.
_LOADED_WITH_TORCH = frozenset({"torch", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.optim"})

# How a module is usually imported, best first: module, name, alias.
_IDIOMS: dict[str, list[tuple[str, str | None, str]]] = {
    "math": [("math", None, "math")],
    "torch": [("torch", None, "torch")],
    "torch.nn": [("torch", "nn", "nn")],
    "torch.nn.functional": [
        ("torch.nn.functional", None, "F"),
        ("torch.nn", "functional", "functional"),
        ("torch.nn.functional", None, "nn_functional"),
    ],
}


class Imports:
    """What the imports at the top level of `source` bind. Those in functions, `if` and `try` do not count."""

    def __init__(self, source: SourceFile) -> None:
        self.source = source
        bound = _bound(source.tree)
        self._targets, self._loaded, self._star = bound.targets, bound.loaded, bound.star
        self._rebound = _module_names(source.tree)
        self._taken = self._rebound | self._targets.keys() | _global_reads(source.tree)

    def reference(self, dotted: str, within: Function | None = None) -> tuple[str, AddImport | None]:
        """The text for `dotted` at the top level or, if given, in the function `within`; and the import it needs."""
        hidden = self._local_names(within)
        forms = [form for form in self._forms(dotted) if form.partition(".")[0] not in hidden]
        if forms:
            return min(forms, key=lambda form: (form.count("."), len(form))), None
        return self._with_import(dotted, hidden | self._taken)

    def spells(self, expression: ast.expr, dotted: str, within: Function | None = None) -> bool:
        """Whether an expression, in the function `within` if given, surely is `dotted` by the imports."""
        text = ast.unparse(expression)
        return text.partition(".")[0] not in self._local_names(within) and text in self._forms(dotted)

    def _forms(self, dotted: str) -> Iterator[str]:
        """Every way to write `dotted` by the imports that are there."""
        for name, targets in self._targets.items():
            if len(targets) > 1 or name in self._rebound:
                continue
            target = next(iter(targets))
            rest = dotted.removeprefix(target)
            if rest == "":
                yield name
            elif rest.startswith(".") and dotted != rest and self._reaches(target, dotted):
                yield name + rest
        module, _, name = dotted.rpartition(".")
        is_public = not name.startswith("_")
        if self._star == module and is_public and name not in self._rebound and name not in self._targets:
            yield name

    def _reaches(self, target: str, dotted: str) -> bool:
        """Whether the modules on the way from `target` to `dotted` are loaded for sure."""
        module = dotted.rpartition(".")[0]
        return module == target or module in self._loaded

    def _with_import(self, dotted: str, taken: set[str]) -> tuple[str, AddImport]:
        module, _, name = dotted.rpartition(".")
        for import_module, import_name, alias in _IDIOMS.get(module, []):
            if alias not in taken:
                return f"{alias}.{name}", AddImport(self.source.path, import_module, import_name, alias)
        alias = next(alias for alias in _aliases(name) if alias not in taken)
        if not module:
            return alias, AddImport(self.source.path, name, None, alias)
        return alias, AddImport(self.source.path, module, name, alias)

    def _local_names(self, within: Function | None) -> set[str]:
        """The names that mean something local in `within`, in a function in it, or in one around it."""
        return set(_names_around(self.source.tree).get(within, ())) if within is not None else set()


class _Bound:
    """What the import statements at the top level of a file bind."""

    def __init__(self, tree: ast.Module) -> None:
        self.targets: defaultdict[str, set[str]] = defaultdict(set)  # name: the dotted objects it is bound to
        self.loaded = set(_LOADED_WITH_TORCH)
        self.star = ""
        for statement in tree.body:
            self._read(statement)

    def _read(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Import():
                for alias in statement.names:
                    self.loaded.update(_prefixes(alias.name))
                    if alias.asname:
                        self.targets[alias.asname].add(alias.name)
                    else:
                        root = alias.name.partition(".")[0]
                        self.targets[root].add(root)
            case ast.ImportFrom(level=0, module=str(module)):
                for alias in statement.names:
                    if alias.name == "*":
                        self.star = module  # a later one hides an earlier one
                    else:
                        self.targets[alias.asname or alias.name].add(f"{module}.{alias.name}")
            case ast.ImportFrom():
                for alias in statement.names:
                    self.targets[alias.asname or alias.name].add("." * statement.level + alias.name)


@functools.lru_cache(maxsize=64)
def _bound(tree: ast.Module) -> _Bound:
    return _Bound(tree)


def _prefixes(dotted: str) -> list[str]:
    parts = dotted.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _aliases(name: str) -> Iterator[str]:
    yield name
    modern = f"Modern{name}" if name[:1].isupper() else f"modern_{name}"
    yield modern
    number = 2
    while True:
        yield f"{modern}{number}"
        number += 1


@functools.lru_cache(maxsize=64)  # many references are asked of one file
def _names_around(tree: ast.Module) -> Mapping[Function, frozenset[str]]:
    """For each function of a file the names bound in it, in the functions in it and in those around it."""
    names: dict[Function, frozenset[str]] = {}
    inside: dict[Function, set[str]] = {}

    def collect(node: ast.AST, found: set[str]) -> None:
        own: set[str] = set() if isinstance(node, Function) else found
        own.update(_own_bindings(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        for child in children(node):
            collect(child, own)
        if isinstance(node, Function):
            inside[node] = own
            found |= own

    def spread(node: ast.AST, outer: frozenset[str]) -> None:
        if isinstance(node, Function):
            outer = outer | inside[node]
            names[node] = outer
        for child in children(node):
            spread(child, outer)

    collect(tree, set())
    spread(tree, frozenset())
    return names


@functools.lru_cache(maxsize=64)
def _module_names(tree: ast.Module) -> frozenset[str]:
    """The names the module binds otherwise than by imports at its top level."""
    names = {name for node in every_node(tree) if isinstance(node, ast.Global) for name in node.names}
    for statement in tree.body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            names.update(_bound_by(statement))
    return frozenset(names)


def _bound_by(node: ast.AST) -> Iterator[str]:
    """The names `node` binds in the scope it stands in."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
            return
        case ast.Lambda():
            return
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            yield from (part.target.id for part in walk(node) if isinstance(part, ast.NamedExpr))
            return
    yield from _own_bindings(node)
    for child in children(node):
        yield from _bound_by(child)


def _own_bindings(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name
        case ast.arg(arg=name):
            yield name
        case ast.alias(name=name, asname=asname):
            yield asname or name.partition(".")[0]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.MatchMapping(rest=str(name)):
            yield name


@functools.lru_cache(maxsize=64)
def _global_reads(tree: ast.Module) -> frozenset[str]:
    """The names that are read and bound in no function: they may be builtins or come from a star import."""
    around = _names_around(tree)
    local = frozenset().union(*(names for node, names in around.items() if not isinstance(node, ast.Lambda)))
    return frozenset({node.id for node in every_node(tree) if isinstance(node, ast.Name)} - local)
