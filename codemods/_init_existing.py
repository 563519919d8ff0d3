"""What fills weights in a program already: before the end of a constructor, behind it, or with an eye to depth."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from codemods._survey import Cannot
from modernizer.graph.values import Class, External, Module
from modernizer.model_map import ModelMap
from modernizer.source import SourceFile
from modernizer.syntax import below, every_node, function_of, mentions

FILLERS = frozenset(
    "normal_ trunc_normal_ uniform_ xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_ orthogonal_ eye_"
    " sparse_ dirac_ xavier_uniform xavier_normal kaiming_uniform kaiming_normal orthogonal".split()
)
LOADERS = frozenset("load_state_dict from_pretrained load_from_checkpoint load_weights".split())


@dataclass(frozen=True)
class Host:
    """Where a model stands whole, with its weights filled: `own` names it there, code goes `where` of `anchor`."""

    source: SourceFile
    function: ast.FunctionDef
    own: str
    anchor: ast.stmt
    where: str = "after"


def find_host(model: ModelMap, root: Module) -> Host:
    """The end of the model's constructor, or of the function that makes it where that fills weights; raises Cannot."""
    assert root.cls is not None
    for base in root.cls.mro:
        if isinstance(base, External) and base.dotted.split(".")[0] in ("transformers", "timm", "fairseq"):
            raise Cannot(f"its base class {base.dotted} fills weights itself")
    early = model.derived(constructor_functions)
    late = [call for call in model.derived(_fillers) if function_of(call[0].tree, call[1]) not in early]
    if not late:
        return _constructor(model, root, early)
    host = maker(model, root)
    known = grown(model, early | {host.function}) if host is not None else early
    for source, call in late:
        if function_of(source.tree, call) not in known:
            raise Cannot("weights are filled again behind the constructor, which would undo it", source.location(call),
                         "fill them in the constructor")  # fmt: skip
    assert host is not None
    _check_loads(model, known)
    return host


def _constructor(model: ModelMap, root: Module, early: set[ast.AST]) -> Host:
    cls = root.cls
    assert cls is not None
    init = cls.members.get("__init__")
    if not isinstance(init, ast.FunctionDef) or not init.args.args:
        raise Cannot(f"{cls.name}, which holds the layers, has no constructor of its own")
    if any(isinstance(n, ast.Return) for n in below(init)):
        raise Cannot(f"the constructor of {cls.name} may return before its end", cls.scope.source.location(init))
    _check_loads(model, early)
    return Host(cls.scope.source, init, init.args.args[0].arg, init.body[-1])


def maker(model: ModelMap, root: Module) -> Host | None:
    """The one function that makes instances of a model, and returns what it has made."""
    makers = list(_makers(model, root))
    if len(makers) != 1 or makers[0] is None:
        return None
    source, function, name = makers[0]
    last = function.body[-1]
    if [n for n in below(function) if isinstance(n, ast.Return)] != [last] or not isinstance(last, ast.Return):
        return None
    if not isinstance(last.value, ast.Name) or last.value.id != name:
        return None
    return Host(source, function, name, last, "before")


def _makers(model: ModelMap, root: Module) -> Iterator[tuple[SourceFile, ast.FunctionDef, str] | None]:
    """Where the program makes instances of a model's class: the function, and the variable; None for anything else."""
    assert root.cls is not None
    for source in model.project.files():
        scope = model.graph.machine.scopes.get(source.path)
        for name in mentions(source.tree).loads.get(root.cls.name, ()):
            call = source.parents.get(name)
            known = scope.lookup(name.id) if scope is not None else None
            if not isinstance(call, ast.Call) or call.func is not name:
                continue
            if not isinstance(known, Class) or known.node is not root.cls.node:
                continue
            statement, function = source.parents.get(call), function_of(source.tree, call)
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            if isinstance(function, ast.FunctionDef) and len(targets) == 1 and isinstance(targets[0], ast.Name):
                yield source, function, targets[0].id
            else:
                yield None


def _check_loads(model: ModelMap, functions: set[ast.AST]) -> None:
    for source, call in model.derived(_loads):
        if function_of(source.tree, call) in functions:
            raise Cannot("weights are loaded where the model is made", source.location(call))


def _loads(model: ModelMap) -> list[tuple[SourceFile, ast.Call]]:
    """The calls that read weights from elsewhere; tables of embeddings that are there do not count."""
    found: list[tuple[SourceFile, ast.Call]] = []
    for source, call in model.derived(_calls):
        is_load = _name(call) in LOADERS or (_name(call) == "load" and ast.unparse(call.func) == "torch.load")
        if is_load and not ast.unparse(call.func).endswith("Embedding.from_pretrained"):
            found.append((source, call))
    return found


def _fillers(model: ModelMap) -> list[tuple[SourceFile, ast.Call]]:
    return [(s, call) for s, call in model.derived(_calls) if _name(call) in FILLERS and _is_of_parameters(call)]


def constructor_functions(model: ModelMap) -> set[ast.AST]:
    """The functions that run only while models are put together: constructors, what they call, what they apply."""
    ran: dict[ast.AST, bool] = {}
    for frame in model.graph.machine.frames:
        if frame.function is not None:
            made = any(f.function is not None and f.function.name == "__init__" for f in frame.outward())
            ran[frame.function.node] = ran.get(frame.function.node, True) and made
    early: set[ast.AST] = {node for node, inside in ran.items() if inside}
    for source in model.project.files():
        # torch's constructors call reset_parameters.
        early |= {
            n for n in every_node(source.tree)
            if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "reset_parameters") and n not in ran
        }  # fmt: skip
    return grown(model, early)


def grown(model: ModelMap, functions: set[ast.AST]) -> set[ast.AST]:
    """Functions with those that are named in these alone: `self.apply(self._init_weights)`."""
    uses: defaultdict[str, list[ast.AST | None]] = defaultdict(list)
    defined: defaultdict[str, list[ast.AST]] = defaultdict(list)
    for source in model.project.files():
        for node in every_node(source.tree):
            if isinstance(node, ast.FunctionDef):
                defined[node.name].append(node)
            word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if word and isinstance(getattr(node, "ctx", None), ast.Load):
                uses[word].append(function_of(source.tree, node))
    while True:
        named = (name for name in defined if uses[name] and all(u in functions for u in uses[name]))
        more = {d for name in named for d in defined[name]} - functions
        lambdas = {u for all_ in uses.values() for u in all_ if isinstance(u, ast.Lambda)} - functions
        more |= {u for u in lambdas if any(u in below(f) for f in functions)}
        if not more:
            return functions
        functions = functions | more


def is_depth_aware(model: ModelMap, depth_names: set[str]) -> bool:
    """Whether weights are filled or scaled by a root of how many layers there are, or of which one this is."""
    scaled, filled = model.derived(_roots)
    return scaled or bool(filled & depth_names)


def _roots(model: ModelMap) -> tuple[bool, set[str]]:
    """Whether weights are multiplied by a root of something; and what stands under roots where weights are filled."""
    scaled, filled = False, set[str]()
    for source, call in model.derived(_calls):
        if _name(call) in ("mul_", "div_"):
            scaled = scaled or any(_words(n) for n in below(call) if _is_root(n))
        elif _name(call) in FILLERS:
            around = function_of(source.tree, call) or call
            filled |= {word for n in below(around) if _is_root(n) for word in _words(n)}
    return scaled, filled


def _is_root(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _name(node) in ("sqrt", "rsqrt", "pow")
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)


def _words(node: ast.AST) -> set[str]:
    """The names in an expression, apart from those of packages and roots."""
    found = {n.id for n in below(node) if isinstance(n, ast.Name)}
    found |= {n.attr for n in below(node) if isinstance(n, ast.Attribute)}
    return found - {"math", "np", "numpy", "torch", "sqrt", "rsqrt", "pow"}


def depth_names(cls: Class) -> set[str]:
    """What the ranges of a class's constructor count to, as `n_layer` of `range(config.n_layer)`."""
    found: set[str] = set()
    for node in below(cls.members.get("__init__", cls.node)):
        if isinstance(node, ast.Call) and _name(node) in ("range", "clones"):
            found |= {a.attr if isinstance(a, ast.Attribute) else getattr(a, "id", "") for a in node.args}
    return found - {"", "self"}


def _calls(model: ModelMap) -> list[tuple[SourceFile, ast.Call]]:
    return [(s, n) for s in model.project.files() for n in every_node(s.tree) if isinstance(n, ast.Call)]


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _is_of_parameters(call: ast.Call) -> bool:
    """Whether what is filled may be a weight, and not noise: `torch.empty(3).uniform_()` is made on the spot."""
    target = call.func.value if isinstance(call.func, ast.Attribute) else None
    named = ast.unparse(target) if target is not None else ""
    if named.endswith("init") or not isinstance(call.func, ast.Attribute):
        return True
    return not isinstance(target, ast.Call)
