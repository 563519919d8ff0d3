"""The roles that `modernize map` shows of the shipped programs."""

from __future__ import annotations

import pytest
from programs import program

from modernizer.model_map import read_model
from modernizer.project import Project

ROLES = {
    "latent_drift_trajectory": {"self-attention", "feed-forward", "norm", "position", "residual", "stack"},
    "translator": {"attention", "feed-forward", "norm", "position", "residual", "stack"},
    "char_gpt": {"self-attention", "feed-forward", "norm", "position", "residual", "stack"},
    "modern_llama": {"self-attention", "gated feed-forward", "norm", "residual", "stack"},
}


@pytest.mark.parametrize("name", ROLES)
def test_every_part_has_a_role_with_evidence(name: str) -> None:
    roles = read_model(Project.open(program(name).targets)).roles
    assert {role.kind for role in roles} == ROLES[name]
    assert all(role.evidence and role.evidence[0].sentence for role in roles)
