"""What `init --magneto` needs to know of a stack: which projections are normed, and which start how large."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from codemods._init_writers import Writers, named_lists, outermost
from codemods._survey import Cannot
from modernizer.edit import Edit, Replace
from modernizer.graph.query import is_torch, location, origin
from modernizer.graph.values import External, Module, Node
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.model_map.residual import PRE

SUB_NORM = "modernizer.components.SubNormLinear"
Lists = dict[str, list[str]]


def inner_and_plain(model: ModelMap, found: Writers) -> tuple[Lists, Lists]:
    """The lists of values and first layers of feed-forwards, and of queries and keys; raises Cannot."""
    inner: list[tuple[tuple[object, ...], Module]] = []
    plain: list[tuple[tuple[object, ...], Module]] = []
    for r, way in found.sums:
        if r.kind != PRE or r.is_partial:
            raise Cannot("MAGNETO is for pre-norm models: a norm stands elsewhere here", found.location,
                         "apply prenorm first")  # fmt: skip
        attentions = [c for site in model.attentions for c in site.contexts if id(c.scores) in r.between]
        if attentions:
            values = {m for c in attentions for m in _modules(c.value_projections)}
            others = {m for c in attentions for m in _modules((*c.query_projections, *c.key_projections))}
            if not values or not others or values & others:
                raise Cannot("query, key and value are not projected by layers of their own", found.location)
            inner += [((*way, m.call), m) for m in _stable(values)]
            plain += [((*way, m.call, m.name), m) for m in _stable(others)]
            continue
        written = {id(m) for m in found.by_sum(r)}
        behind = [f for f in model.feed_forwards if id(f.second.value) in r.between]
        forwards = [f for f in behind if id(f.second.module) in written]
        if len(forwards) != 1 or forwards[0].gated or not is_torch(forwards[0].first.module, "Linear"):
            raise Cannot("a branch is neither attention nor a plain feed-forward of two linear layers", found.location)
        inner.append(((*way, forwards[0].first.module.call), forwards[0].first.module))
    if not inner or not plain:
        raise Cannot("the layers of this stack are torch's own", found.location)
    return named_lists(inner, found), named_lists(plain, found)


def _stable(modules: Iterable[Module]) -> list[Module]:
    return sorted(modules, key=lambda m: m.name)


def _modules(nodes: Iterable[Node]) -> list[Module]:
    found: list[Module] = []
    for node in nodes:
        if not is_torch(node.module, "Linear") or node.module is None:
            raise Cannot("query, key and value are not projected by linear layers")
        found.append(node.module)
    return found


def norm_edits(model: ModelMap, found: Writers) -> list[Edit]:
    """What makes the writers of a stack norm their input; raises Cannot."""
    written = {id(origin(m)) for m in found.modules} | {id(m) for m in found.modules}
    edits: dict[ast.AST, list[Edit]] = {}
    for module in found.modules:
        call, frame = module.call, module.frame
        makers = [v for _, v in model.graph.machine.at.get(call.func, ())] if isinstance(call, ast.Call) else []
        plain = bool(makers) and all(isinstance(v, External) and v.dotted == "torch.nn.Linear" for v in makers)
        if not is_torch(module, "Linear") or not isinstance(call, ast.Call) or frame is None or not plain:
            raise Cannot("what writes to the stream is no plain nn.Linear", found.location)
        for other in (m for m in model.graph.machine.modules if m.call is call and m.owner is not None):
            whole = outermost(other)
            if id(other) not in written and whole is found.model:
                raise Cannot("what writes to the stream is made in one line with other layers", location(call, frame))
            is_another = whole.cls is None or found.model.cls is None or whole.cls.node is not found.model.cls.node
            if is_another and whole in model.graph.roots:
                raise Cannot(f"{whole.class_name} is made of the same layers", location(call, frame))
        if frame.path not in model.project.named:
            raise Cannot("what writes to the stream is made in a file that was not named", location(call, frame))
        if call not in edits:
            name, new = Imports(frame.scope.source).reference(SUB_NORM)
            edits[call] = [Replace(frame.path, call.func, name), *([new] if new is not None else [])]
    return [edit for made in edits.values() for edit in made]
