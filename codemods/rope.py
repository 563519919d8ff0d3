"""Rotary positions: positions leave the stream, queries and keys are rotated instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codemods._relative import Kind, plan, review
from codemods._rotation import rotate
from modernizer.model_map import ModelMap
from modernizer.rule import Effect, Plan, Rule, Upgrade

ROTARY = Kind("RotaryEmbedding", "rotary", "rotations of query and key", rotate)


class Rope(Rule):
    """Takes additive positions out of the stream and rotates query and key of every self-attention they reach."""

    name = "rope"
    summary = "additive positions become rotary ones"
    effect = Effect.FUNCTION

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        return plan(model, ROTARY)

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        return review(before, after, ROTARY, upgrades)
