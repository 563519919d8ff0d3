"""Settings of a Prismatic module from a dictionary or a YAML file, with the sources' own keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from modernizer.components.prismatic.router import ROUTINGS

__all__ = ["PrismaticSettings"]

MERGES = ("outputs", "weights")
GATES = ("soft", "hard")


@dataclass(frozen=True)
class PrismaticSettings:
    """What a Prismatic module is asked for; wrong values raise ValueError or TypeError when it is made.

    The sources' keys are ``num_experts``, ``architectures``, ``gradient_scale``, ``sparsity`` and ``dropout``; their
    defaults are the sources' too. What the others mean is said at ``Prismatic``.
    """

    num_experts: int = 2
    architectures: tuple[str, ...] = ()
    merge: str = "outputs"
    routing: str = "prefix"
    gate: str = "soft"
    rank: int | None = 8
    noise: float = 1.0
    dropout: float = 0.0
    gradient_scale: float = 0.3
    sparsity: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "architectures", _architectures(self.architectures))
        _integer("num_experts", self.num_experts)
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {self.num_experts}")
        if len(set(self.architectures)) > self.num_experts:
            raise ValueError(
                f"num_experts={self.num_experts} experts cannot be of {len(set(self.architectures))} architectures"
            )
        _one_of("merge", self.merge, MERGES)
        _one_of("routing", self.routing, ROUTINGS)
        _one_of("gate", self.gate, GATES)
        if self.rank is not None:
            _integer("rank", self.rank)
            if self.rank < 1:
                raise ValueError(f"rank must be at least 1, or None for experts of their own, not {self.rank}")
        _number("noise", self.noise, 0, float("inf"))
        _number("gradient_scale", self.gradient_scale, 0, float("inf"))
        _number("dropout", self.dropout, 0, 1)
        _number("sparsity", self.sparsity, 0, 0.5)
        if self.dropout == 1:
            raise ValueError("dropout=1 would drop every expert")
        if self.sparsity == 0:
            raise ValueError("sparsity must be above 0: it is the share of the weights that is scaled")
        self._check_merge()

    def _check_merge(self) -> None:
        if self.merge == "outputs":
            if self.gate == "hard":
                raise ValueError('gate="hard" chooses an operation for merged weights: it needs merge="weights"')
            return
        if self.routing == "prefix":
            raise ValueError(
                'merge="weights" makes one set of weights a sequence, but routing="prefix" decides at every position: '
                'use merge="outputs", or routing="sequence" where the model is not causal'
            )
        if len(set(self.architectures)) > 1 and self.gate == "soft":
            raise ValueError('merge="weights" cannot mix architectures: use gate="hard", or merge="outputs"')

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrismaticSettings:
        """Settings from a mapping, such as a part of a configuration; unknown keys raise ValueError."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, source: str | Path) -> PrismaticSettings:
        """Settings from a YAML file (a Path) or from YAML text; at its top, or below the key ``prismatic``.

        Raises:
            ImportError: PyYAML is not installed.
        """
        try:
            import yaml
        except ImportError as error:
            raise ImportError("reading YAML needs PyYAML: pip install pyyaml") from error
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        values = yaml.safe_load(text)
        if isinstance(values, Mapping) and isinstance(values.get("prismatic"), Mapping):
            values = values["prismatic"]
        if not isinstance(values, Mapping):
            raise ValueError("the YAML holds no mapping of settings")
        return cls.from_dict(values)


def _architectures(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise TypeError(f'architectures is a list such as ["rope", "alibi"], not {value!r}')
    if not all(isinstance(name, str) and name for name in value):
        raise TypeError(f"architectures holds names, not {value!r}")
    return tuple(value)


def _integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {value!r}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}, not {value}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
