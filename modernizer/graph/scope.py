"""The names of one file: what each is bound to at module level, resolved when it is first looked up."""

from __future__ import annotations

import ast
import builtins
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from modernizer.graph.values import Class, Const, External, Frame, Function, Node, Package, Value
from modernizer.project import Project
from modernizer.source import SourceFile
from modernizer.syntax import walk
from modernizer.vendoring import is_vendored

Binding = ast.stmt | ast.alias

# Components that are torch's class with more keywords: the keywords say what is asked of it, not the class.
DROP_INS = frozenset({"TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer", "MultiheadAttention"})


def canonical(dotted: str) -> str:
    """One name for an object of torch, whichever of its modules it was imported from."""
    parts = dotted.split(".")
    if parts[:2] == ["apex", "normalization"] and parts[-1] in FUSED:
        return "torch.nn." + FUSED[parts[-1]]
    if parts[:3] == ["torch", "nn", "modules"] and (len(parts) > 4 or parts[-1][:1].isupper()):
        return "torch.nn." + parts[-1]
    if parts[:3] == ["torch", "nn", "parameter"]:
        return "torch.nn." + parts[-1]
    if parts[:2] == ["modernizer", "components"] and parts[-1] in DROP_INS:
        return "torch.nn." + parts[-1]
    return dotted


# Kernels of apex that compute what torch's modules of the same arguments and parameters do.
FUSED = {"FusedLayerNorm": "LayerNorm", "FusedRMSNorm": "RMSNorm"}
NUMBERS = {"inf": math.inf, "Inf": math.inf, "infty": math.inf, "pi": math.pi, "e": math.e, "nan": math.nan}


def external(dotted: str) -> Value:
    """An object from outside: the numbers that math, numpy and torch name are constants."""
    package, _, name = dotted.rpartition(".")
    if package in ("math", "numpy", "torch") and name in NUMBERS:
        return Const(NUMBERS[name])
    return External(canonical(dotted))


class Scopes:
    """The module scopes of a project, one a file."""

    def __init__(self, project: Project, evaluate: Callable[[Frame, ast.expr], Value]) -> None:
        self.project = project
        self.evaluate = evaluate
        self._scopes: dict[Path, Scope | None] = {}

    def get(self, path: Path) -> Scope | None:
        """The scope of a file; None where it cannot be parsed or is a folder without `__init__`."""
        if path not in self._scopes:
            source = self.project.source(path) if path.is_file() else None
            self._scopes[path] = Scope(self, source) if source else None
        return self._scopes[path]

    def module(self, importer: Path, module: str, level: int = 0) -> Value:
        """What `import module` gives: a Package of the project, or an External."""
        path = self.project.find_module(importer, module, level)
        if path is None:
            return External(canonical(module))
        scope = self.get(path)
        if scope is not None and is_vendored(scope.source):
            return External("modernizer.components")
        return Package(scope, path)

    def member(self, package: Value, name: str) -> Value | None:
        """What `package.name` gives."""
        if isinstance(package, External):
            return external(f"{package.dotted}.{name}")
        assert isinstance(package, Package)
        found = package.scope.lookup(name) if package.scope else None
        if found is not None:
            return found
        folder = package.path if package.path.is_dir() else package.path.parent
        if package.path.is_dir() or package.path.name == "__init__.py":
            for path in (folder / f"{name}.py", folder / name / "__init__.py", folder / name):
                if path.exists():
                    return Package(self.get(path), path)
        return None


class Scope:
    """The top level of one file."""

    def __init__(self, scopes: Scopes, source: SourceFile) -> None:
        self.scopes = scopes
        self.source = source
        self.path = source.path
        self.bindings: dict[str, list[Binding]] = {}
        self.stars: list[ast.ImportFrom] = []
        self.frame = Frame(self)
        self._values: dict[str, Value | None] = {}
        self._looking: set[str] = set()
        for statement in _module_level(source.tree.body):
            self._bind(statement)

    def classes(self) -> Iterator[Class]:
        """The classes defined at the top level, in order."""
        for name, found in self.bindings.items():
            if any(isinstance(b, ast.ClassDef) for b in found):
                value = self.lookup(name)
                if isinstance(value, Class) and value.scope is self:
                    yield value

    def functions(self) -> Iterator[Function]:
        """The functions defined at the top level, in order."""
        for name, found in self.bindings.items():
            if any(isinstance(b, ast.FunctionDef) for b in found):
                value = self.lookup(name)
                if isinstance(value, Function) and value.scope is self:
                    yield value

    def lookup(self, name: str) -> Value | None:
        """The value of a module-level name or builtin, None where there is none."""
        if name not in self._values:
            if name in self._looking:
                return None  # defined in terms of itself
            self._looking.add(name)
            try:
                self._values[name] = self._resolve(name)
            finally:
                self._looking.discard(name)
        return self._values[name]

    def _resolve(self, name: str) -> Value | None:
        found = [v for v in (self._value(name, b) for b in self.bindings.get(name, [])) if v is not None]
        if found:
            definitions = [v for v in found if not isinstance(v, Const) or v.value is not None]
            if len(found) == 1 or len(definitions) == 1:
                return (definitions or found)[-1]
            if all(isinstance(v, Const | Node) for v in found):
                return Node("unknown", (), None, self.frame, name=name)
            return found[-1] if not isinstance(found[0], External) else found[0]
        for star in self.stars:
            package = self.scopes.module(self.path, star.module or "", star.level)
            if isinstance(package, Package):
                value = package.scope.lookup(name) if package.scope else None
                if value is not None and not (isinstance(value, External) and value.dotted.startswith("builtins.")):
                    return value
            elif isinstance(package, External) and _exported(package.dotted, name):
                return External(f"{package.dotted}.{name}")
        return External(f"builtins.{name}") if hasattr(builtins, name) else None

    def _bind(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                self.bindings.setdefault(alias.asname or alias.name.split(".")[0], []).append(alias)
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if alias.name == "*":
                    self.stars.append(statement)
                else:
                    self.bindings.setdefault(alias.asname or alias.name, []).append(statement)
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            self.bindings.setdefault(statement.name, []).append(statement)
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for leaf in walk(target):
                    if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store):
                        self.bindings.setdefault(leaf.id, []).append(statement)

    def _value(self, name: str, binding: Binding) -> Value | None:
        if isinstance(binding, ast.alias):
            module = binding.name if binding.asname else binding.name.split(".")[0]
            return self.scopes.module(self.path, module)
        if isinstance(binding, ast.ImportFrom):
            original = next(a.name for a in binding.names if (a.asname or a.name) == name)
            package = self.scopes.module(self.path, binding.module or "", binding.level)
            if isinstance(package, External) and binding.level:
                return External(f"{package.dotted}.{original}".lstrip("."))
            return self.scopes.member(package, original) or External(f"{binding.module or ''}.{original}")
        if isinstance(binding, ast.ClassDef):
            return self.make_class(binding, None)
        if isinstance(binding, ast.FunctionDef):
            return Function(binding, self)
        if isinstance(binding, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in binding.targets):
            return self.scopes.evaluate(self.frame, binding.value)
        if isinstance(binding, ast.AnnAssign) and binding.value is not None:
            return self.scopes.evaluate(self.frame, binding.value)
        if isinstance(binding, ast.Assign) and (part := _part_for(name, binding)) is not None:
            return self.scopes.evaluate(self.frame, part)
        return Node("unknown", (), binding, self.frame, name=name)

    def make_class(self, node: ast.ClassDef, closure: Frame | None) -> Class:
        """The class a `class` statement makes, its bases resolved."""
        cls = Class(node, self, closure=closure)
        bases: list[Class | External] = []
        for base in node.bases:
            value = self.scopes.evaluate(closure or self.frame, base)
            if isinstance(value, Class):
                bases.extend(b for b in value.mro if b not in bases)
            else:
                dotted = value.dotted if isinstance(value, External) else ast.unparse(base)
                bases.append(External(dotted))
        cls.mro = (cls, *bases)
        for statement in _module_level(node.body):
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                cls.members[statement.name] = statement
            elif isinstance(statement, ast.Assign):
                cls.members.update({t.id: statement for t in statement.targets if isinstance(t, ast.Name)})
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                cls.members[statement.target.id] = statement
        return cls


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, through `if` and `try`, but not the script part of a file."""
    for statement in body:
        if isinstance(statement, ast.If):
            if "__name__" not in ast.unparse(statement.test):
                yield from _module_level(statement.body)
                yield from _module_level(statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from _module_level(statement.body)
            for handler in statement.handlers:
                yield from _module_level(handler.body)
        elif isinstance(statement, ast.With):
            yield from _module_level(statement.body)
        else:
            yield statement


def _part_for(name: str, statement: ast.Assign) -> ast.expr | None:
    """What `a, b = 1, 2` binds a name to."""
    for target in statement.targets:
        if isinstance(target, ast.Tuple | ast.List) and isinstance(statement.value, ast.Tuple | ast.List):
            pairs = list(zip(target.elts, statement.value.elts, strict=False))
            if len(target.elts) == len(statement.value.elts) and not any(
                isinstance(p, ast.Starred) for q in pairs for p in q
            ):
                found = [v for t, v in pairs if isinstance(t, ast.Name) and t.id == name]
                return found[0] if found else None
    return None


def _exported(module: str, name: str) -> bool:
    """Whether `from module import *` is taken to bring `name`: torch's own star imports are the ones that matter."""
    if module in ("torch.nn", "torch.nn.modules"):
        return name[:1].isupper() or name in ("functional", "init", "utils", "parallel", "parameter")
    if module == "torch.nn.functional":
        return name[:1].islower() and not hasattr(builtins, name)
    if module.endswith(".nn"):  # a look-alike framework's layers
        return name[:1].isupper()
    return module in ("math", "typing", "einops") and not hasattr(builtins, name)
