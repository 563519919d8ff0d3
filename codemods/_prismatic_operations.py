"""Gives an attention class the parameter `pos_type`, by which a call chooses rotary positions, ALiBi or what it had."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from codemods._anchors import Anchor, Code
from codemods._bias import bias
from codemods._parts import Attached, Parts
from codemods._prismatic_places import Holder
from codemods._relay_checks import Refused
from codemods._rotation import rotate
from codemods._survey import Cannot, Survey
from modernizer.edit import AddParameter, Edit
from modernizer.graph.query import class_of
from modernizer.graph.values import Many
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.removal import Removal
from modernizer.syntax import names_in

OPERATIONS = ("none", "rope", "alibi")
_COMPONENTS = {"rope": ("RotaryEmbedding", "rotary"), "alibi": ("ALiBi", "alibi")}


def choosing(model: ModelMap, holder: Holder, kinds: Sequence[str]) -> list[Edit]:
    """The edits after which `forward(…, pos_type="rope")` is the operation of that name. Raises Refused."""
    forward, owner = holder.forward, holder.runs[0].owner
    if owner is None or any(r.owner is None or r.owner.node is not owner.node for r in holder.runs):
        raise Refused("the class of this attention has several forms")
    if owner.path not in model.project.named:
        raise Refused("its class is in a file that was not named")
    if "pos_type" in names_in(forward):
        raise Refused("its forward knows a pos_type already")
    if len(set(kinds)) > 1 and any(isinstance(run.result, Many) for run in holder.runs):
        raise Refused(
            "it returns more than one value, and only one can be mixed of several architectures",
            "leave --architectures out, or let it return its output alone",
        )
    contexts = [
        context
        for site in model.attentions
        for context in site.contexts
        if any(f.function is not None and f.function.node is forward for f in context.frame.outward())
    ]
    survey = model.derived(Survey)
    if any(survey.is_relative(context) for context in contexts):
        raise Refused("this attention has relative positions already", "leave --architectures out")
    removal = Removal(model.graph, frozenset(model.project.named))
    code = Code(model.graph, removal)
    edits: list[Edit] = [AddParameter(owner.path, forward, 'pos_type="none"')]
    try:
        for kind in dict.fromkeys(kinds):
            if kind in _COMPONENTS:
                edits += _one(code, forward, kind, contexts)
    except Cannot as cannot:
        raise Refused(str(cannot.reason), cannot.hint) from cannot
    return [*edits, *removal.edits()]


def _one(code: Code, forward: ast.FunctionDef, kind: str, contexts: Sequence[Attention]) -> list[Edit]:
    component, attribute = _COMPONENTS[kind]
    parts = _Chosen(code, f"modernizer.components.{component}", attribute, forward, f'pos_type == "{kind}"')
    change = rotate if kind == "rope" else bias
    return [*change(code, parts, [(context, True) for context in contexts]), *parts.edits]


class _Chosen(Parts):
    """Parts that apply where a test on `forward`'s own arguments holds."""

    def __init__(self, code: Code, component: str, attribute: str, forward: ast.FunctionDef, test: str) -> None:
        super().__init__(code, component, attribute, attribute)
        self._forward, self._test = forward, test

    def attach(self, anchor: Anchor, arguments: str = "", after: str = "") -> Attached:
        if anchor.function.node is not self._forward:
            raise Cannot("scores are computed where the operation cannot be chosen", None, "compute them in forward")
        named, owner = self.code.self_name(anchor.frame), class_of(anchor.frame)
        assert named is not None and owner is not None
        name = self._in_class(anchor, owner, list(anchor.contexts), arguments, False, after)
        return Attached(f"{named[0]}.{name}", self._test, is_chosen=True)


__all__ = ["OPERATIONS", "choosing"]
