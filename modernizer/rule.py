"""What a rule is: a name, a declared effect and a planner that reads the model map and never edits."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from modernizer.edit import Edit
from modernizer.source import Location

if TYPE_CHECKING:
    from modernizer.model_map import ModelMap
    from modernizer.weights import WeightMap


class Effect(enum.Enum):
    """What a rewrite promises about the rewritten model; commands and docs all read it here."""

    EXACT = "exact"
    FUNCTION = "function"
    PARAMETERS = "parameters"

    @property
    def promise(self) -> str:
        return {
            Effect.EXACT: "same outputs and same gradients on shared parameters",
            Effect.FUNCTION: "same parameters, another function: shapes, causality and gradient flow hold",
            Effect.PARAMETERS: "new or resized parameters; shapes, causality, gradient flow hold; budget reported",
        }[self]


Options = Mapping[str, Any]  # the values that were given, by name; one that was not may be missing


@dataclass(frozen=True)
class Option:
    """An option of a rule: `--keep-hidden` on the command line is `keep_hidden` here.

    A switch, or where `default` is a number or text an option with a value of that type; of text one of `choices`, if
    there are any.
    """

    name: str
    help: str
    default: bool | int | str = False
    choices: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Upgrade:
    """One whole change: all its edits are made, over all its files, or none is."""

    location: Location
    summary: str  # what is legacy here and what becomes of it, in one sentence
    edits: tuple[Edit, ...]
    notes: tuple[str, ...] = ()  # what the user should know or do afterwards
    weights: WeightMap | None = None  # how a trained checkpoint becomes one of the rewritten model
    effect: Effect | None = None  # what it promises, where that is more than its rule does


@dataclass(frozen=True)
class Refusal:
    """A site where there is work, but no safe way to do it."""

    location: Location
    reason: str  # what was seen
    hint: str = ""  # what the user could change to make it possible


@dataclass(frozen=True)
class Modern:
    """A site of the rule's kind with nothing to do."""

    location: Location
    reason: str


@dataclass
class Plan:
    """Everything one rule has to say about one model map."""

    upgrades: list[Upgrade] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    modern: list[Modern] = field(default_factory=list)


class Rule:
    """Base class of all rules. One rule is one file in `codemods/`; its page lies beside it as Markdown.

    The registry finds every subclass; `name` is also the file's name and the option value.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    effect: ClassVar[Effect]
    after: ClassVar[Sequence[str]] = ()  # rules that run before this one when both are asked for
    options: ClassVar[Sequence[Option]] = ()
    on_request: ClassVar[bool] = False  # no upgrade of something legacy: looked for only where the rule is named

    def objection(self, options: Options) -> str:
        """Why these options make no sense, alone or together, in a sentence for the user; '' where they do."""
        return ""

    def plan(self, model: ModelMap, options: Options) -> Plan:
        """What to change, what to refuse and what is modern already. Reads only."""
        raise NotImplementedError

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        """Looks at the rewritten model: why it is not what this rule promised, or '' where it is."""
        raise NotImplementedError
