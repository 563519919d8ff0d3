"""ALiBi: positions leave the stream, scores are lowered with distance instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codemods._bias import bias
from codemods._relative import Kind, plan, review
from modernizer.model_map import ModelMap
from modernizer.rule import Effect, Plan, Rule, Upgrade

ALIBI = Kind("ALiBi", "alibi", "a bias of the scores by distance", bias)


class Alibi(Rule):
    """Takes additive positions out of the stream and lowers the scores of every self-attention they reach."""

    name = "alibi"
    summary = "additive positions become a bias on attention scores"
    effect = Effect.FUNCTION

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        return plan(model, ALIBI)

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        return review(before, after, ALIBI, upgrades)
