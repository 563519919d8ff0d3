"""The model map: the roles that parts of a program play. Each recogniser is a file of its own, run when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from modernizer.graph import Graph, execute
from modernizer.project import Project
from modernizer.source import Location

if TYPE_CHECKING:
    from modernizer.model_map.attention import AttentionSite


@dataclass(frozen=True)
class Evidence:
    """A fact and the place in the code that shows it."""

    location: Location
    sentence: str


@dataclass(frozen=True)
class Role:
    """One part of a model: what it is (`attention`, `feed-forward`, `norm` …), in which class, and why."""

    kind: str
    location: Location
    owner: str
    evidence: Sequence[Evidence] = field(default=())


class ModelMap:
    """Everything the rules ask about a program. The recognisers' results are computed once, when first needed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @property
    def project(self) -> Project:
        return self.graph.project

    @cached_property
    def attentions(self) -> Sequence[AttentionSite]:
        """Every attention, hand-written, SDPA's or torch's, by the place of its score product."""
        from modernizer.model_map import attention

        return attention.find_attentions(self.graph)

    @property
    def roles(self) -> Sequence[Role]:
        """Every recognised part, in the order of files and lines."""
        return ()


def read_model(project: Project) -> ModelMap:
    """Executes the project symbolically and reads off what its parts are."""
    return ModelMap(execute(project))
