"""The value graph: what every expression of a program evaluates to, found by executing it symbolically."""

from modernizer.graph.roots import Graph, Run, execute

__all__ = ["Graph", "Run", "execute"]
