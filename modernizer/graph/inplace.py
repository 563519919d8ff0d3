"""In-place changes of a datum: every name and attribute that holds the old value holds the new one afterwards."""

from __future__ import annotations

from modernizer.graph.machine import Machine
from modernizer.graph.values import Frame, Node, Object


def rebind(m: Machine, frame: Frame, old: Node, new: Node) -> None:
    """Puts `new` in place of `old` in the variables of the active frames and the attributes of their receivers."""
    for active in frame.outward():
        for name, value in active.names.items():
            if value is old:
                active.names[name] = new
        if isinstance(active.receiver, Object):
            for name, value in list(active.receiver.attributes.items()):
                if value is old:
                    m.set_attribute(active.receiver, name, new)
