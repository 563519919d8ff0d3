"""How a file looks: comments, line endings, tabs, spacing. None of it changes what the program does."""

from __future__ import annotations

import re

REMARKS = ("# see the paper, section 3", "# TODO: clean up", "# pre-norm as usual", "# [batch, time, dim] - größer")


def noisy(text: str, noise: str, old_super: str) -> str:
    """Source text in one person's manner of writing."""
    if old_super == "old":
        text = _old_super(text)
    return {
        "plain": lambda t: t,
        "comments": _commented,
        "crlf": lambda t: t.replace("\n", "\r\n"),
        "tabs": lambda t: re.sub(r"^( {4})+", lambda m: "\t" * (len(m[0]) // 4), t, flags=re.MULTILINE),
        "spacing": _spaced,
    }[noise](text)


def _old_super(text: str) -> str:
    name, lines = "", []
    for line in text.split("\n"):
        found = re.match(r"\s*class (\w+)", line)
        name = found[1] if found else name
        lines.append(line.replace("super().__init__()", f"super({name}, self).__init__()"))
    return "\n".join(lines)


def _commented(text: str) -> str:
    lines: list[str] = []
    for number, line in enumerate(text.split("\n")):
        depth = len(line) - len(line.lstrip())
        if line.startswith("class "):
            lines += [line, f'    """{re.split("[(:]", line[6:])[0]}, one part of the model."""', ""]
        elif line.lstrip().startswith("return ") and number % 2:
            lines += [" " * depth + REMARKS[number % len(REMARKS)], line]
        elif re.match(r"\s+x = .*\)$", line):
            lines.append(f"{line}  {REMARKS[number % len(REMARKS)]}")
        else:
            lines.append(line)
    return "\n".join(lines)


def _spaced(text: str) -> str:
    lines = []
    for number, line in enumerate(text.split("\n")):
        if '"' not in line and "'" not in line and number % 3 == 0:
            line = re.sub(r"(?<=[\w\])]), (?=[\w\[(])", ",", line)
            line = re.sub(r"^(\s+[\w.]+) = ", r"\1=", line)
        if number % 5 == 0 and line.strip():
            line += "  "
        lines.append(line)
        if number % 7 == 0 and not line.strip():
            lines.append("")
    return "\n".join(lines)
