"""What a joint projection is called: after the layers that it takes the place of, and like nothing else there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from itertools import takewhile

from modernizer.project import Project
from modernizer.syntax import every_node, free_name, mentions, walk


def joint_name(
    names: Sequence[str],
    project: Project,
    taken: Collection[str] = (),
    suffixes: Sequence[str] = (),
    wanted: str = "qkv",
) -> str:
    """`w_q`, `w_k` and `w_v` give `w_qkv`; `key` and `value` give `kv`, no names at all give `wanted`.

    A name that the program uses for anything in a class is not given, nor one that would be with one of the
    `suffixes`: whoever reads a checkpoint backwards must be able to tell the joint layers by it.
    """
    used = set(taken)
    for file in project.files():
        named = mentions(file.tree)
        used |= named.attributes.keys() | named.strings.keys() | named.methods.keys()
        used |= {part for text in named.strings if "." in text for part in text.split(".")}
        for node in every_node(file.tree):
            if isinstance(node, ast.ClassDef):
                used |= {n.id for part in node.body for n in walk(part) if isinstance(n, ast.Name)}
    used |= {name.removesuffix(suffix) for name in used for suffix in suffixes}
    return free_name(_wanted(names) if names else wanted, used)


def _wanted(names: Sequence[str]) -> str:
    prefix = _common(names)
    suffix = _common([name[len(prefix) :][::-1] for name in names])[::-1]
    cores = [name[len(prefix) : len(name) - len(suffix)] for name in names]
    letters = "qkv"[-len(names) :]
    if all(core[:1].lower() == letter for core, letter in zip(cores, letters, strict=True)):
        joined = letters.upper() if all(core[:1].isupper() for core in cores) else letters
        suffix = "" if suffix in ("s", "y", "ys") else suffix
        return f"{prefix}{joined}{suffix}"
    found = re.match(r"_*", names[0])
    return f"{found.group() if found else ''}{letters}"


def _common(names: Sequence[str]) -> str:
    """The letters with which all names begin."""
    columns = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in columns)
