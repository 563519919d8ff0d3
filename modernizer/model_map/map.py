"""The model map: the roles that parts of a program play. Each recogniser is a file of its own, run when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from modernizer.graph import Graph, execute
from modernizer.project import Project
from modernizer.source import Location

if TYPE_CHECKING:
    from modernizer.model_map.attention import AttentionSite
    from modernizer.model_map.feed_forward import FeedForwards
    from modernizer.model_map.norm import Norms
    from modernizer.model_map.position import PositionSite
    from modernizer.model_map.residual import Residuals
    from modernizer.model_map.stack import Stacks


T = TypeVar("T")


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
        self._derived: dict[Callable[[ModelMap], Any], Any] = {}

    def derived(self, make: Callable[[ModelMap], T]) -> T:
        """What rules work out from the map for themselves, computed once for all who ask."""
        if make not in self._derived:
            self._derived[make] = make(self)
        found: T = self._derived[make]
        return found

    @property
    def project(self) -> Project:
        return self.graph.project

    @cached_property
    def attentions(self) -> Sequence[AttentionSite]:
        """Every attention, hand-written, SDPA's or torch's, by the place of its score product."""
        from modernizer.model_map import attention

        return attention.find_attentions(self.graph)

    @cached_property
    def feed_forwards(self) -> FeedForwards:
        """Everything of the form projection, activation, projection; `counts` where it is a transformer's."""
        from modernizer.model_map import feed_forward

        return feed_forward.find_feed_forwards(self.graph, self.attentions)

    @cached_property
    def norms(self) -> Norms:
        """Every norm, torch's or written out, each time it runs."""
        from modernizer.model_map import norm

        return norm.Norms(self.graph)

    @cached_property
    def residuals(self) -> Residuals:
        """Every residual sum, with the side of it on which its norm stands."""
        from modernizer.model_map import residual

        return residual.Residuals(self.graph, self.norms)

    @cached_property
    def stacks(self) -> Stacks:
        """The residual sums in the order in which the stream meets them, stack by stack."""
        from modernizer.model_map import stack

        return stack.Stacks(self.graph, self.residuals, self.norms)

    @cached_property
    def positions(self) -> Sequence[PositionSite]:
        """Every place that adds something made of positions alone to a stream."""
        from modernizer.model_map import position

        return position.find_positions(self.graph)

    @cached_property
    def roles(self) -> Sequence[Role]:
        """Every recognised part, in the order of files and lines."""
        from modernizer.model_map import attention, feed_forward, position, stack

        found = [
            *attention.roles(self.attentions),
            *feed_forward.roles(self.feed_forwards),
            *position.roles(self.positions),
            *stack.roles(self.stacks),
        ]
        return sorted(found, key=lambda role: (str(role.location.path), role.location.line, role.location.column))


def read_model(project: Project) -> ModelMap:
    """Executes the project symbolically and reads off what its parts are."""
    return ModelMap(execute(project))
