"""Where the balance loss belongs: at the one loss that the model itself computes and returns."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from codemods._prismatic_places import Holder, is_below
from modernizer.edit import Edit, Replace
from modernizer.graph.query import ancestors, is_torch, location
from modernizer.graph.values import Module, Node, flatten
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.syntax import mentions

COMPONENT = "modernizer.components.prismatic_loss"
WEIGHT = 0.03
_LOSSES = frozenset(
    "cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy"
    " binary_cross_entropy_with_logits kl_div".split()
)
_CLASSES = (
    "CrossEntropyLoss", "NLLLoss", "MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss", "BCEWithLogitsLoss",
    "KLDivLoss",
)  # fmt: skip


def balanced(model: ModelMap, holders: Sequence[Holder]) -> tuple[list[Edit], str]:
    """The edits that add the balance loss, none where no single loss is the place for it; and what to say of it."""
    for source in model.project.files():
        if mentions(source.tree).loads["prismatic_loss"] or mentions(source.tree).attributes["prismatic_loss"]:
            return [], "the balance loss is added to the loss already"
    losses = [n for n in model.graph.machine.nodes if n.op in _LOSSES or is_torch(n.module, *_CLASSES)]
    calls = {n.node for n in losses}
    told = (
        f"add {WEIGHT} * modernizer.components.prismatic_loss(model) to the training loss: without it one expert may"
        " end up with everything"
    )
    if len(calls) != 1 or not all(_is_the_models(model, n, holders) for n in losses):
        return [], told
    (call,) = calls
    frame = losses[0].frame
    if not isinstance(call, ast.Call) or any(k.arg in ("reduction", "reduce", "size_average") for k in call.keywords):
        return [], told
    source, function = frame.scope.source, frame.function
    if source.path not in model.project.named or function is None or not isinstance(function.node, ast.FunctionDef):
        return [], told
    text, added = Imports(source).reference(COMPONENT, function.node)
    name = function.node.args.args[0].arg
    edits: list[Edit] = [Replace(source.path, call, f"$0 + {WEIGHT} * {text}({name})", (call,))]
    where = location(call, frame)
    said = f"the balance loss is added to the loss at {where.path.name}:{where.line}, {WEIGHT} times, in training alone"
    return [*edits, *([added] if added is not None else [])], said


def _is_the_models(model: ModelMap, loss: Node, holders: Sequence[Holder]) -> bool:
    """Whether a model that holds every wrapped attention computes a mean loss in `forward` and returns it."""
    frame = loss.frame
    root = frame.receiver
    if not isinstance(root, Module) or root not in model.graph.roots or frame.function is None:
        return False
    if frame.function.name != "forward" or not frame.function.node.args.args or frame.result is None:
        return False
    reductions = [loss.kwargs.get("reduction"), loss.module.args.get("reduction") if loss.module is not None else None]
    if any(r is not None for r in reductions):
        return False
    if not all(is_below(m, root) for holder in holders for m in holder.modules):
        return False
    return any(id(loss) in ancestors(leaf) for leaf in flatten(frame.result))


__all__ = ["balanced"]
