"""How long `modernize check` takes, start-up included, on a model file of 2,000 lines. Exits 1 above half a second."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINES = 2000
LIMIT = 0.5  # seconds
RUNS = 5
PROGRAM = Path(__file__).parents[1] / "fixtures" / "char_gpt" / "char_gpt.py"


def main() -> int:
    """Prints the fastest of several runs, which is the one least disturbed by others."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.py"
        file.write_text(long_program(PROGRAM.read_text(), LINES))
        lines = file.read_text().count("\n")
        fastest = min(seconds_to_check(file) for _ in range(RUNS))
    print(f"modernize check, {lines:,} lines: {fastest:.2f} s (limit {LIMIT} s)")
    return int(fastest > LIMIT)


def long_program(text: str, lines: int) -> str:
    """The program over and over until it has that many lines, its classes and functions renamed in each copy."""
    names = re.findall(r"^(?:class|def) (\w+)", text, re.MULTILINE)
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    copies: list[str] = []
    while sum(copy.count("\n") for copy in copies) < lines:
        number = len(copies)
        copies.append(pattern.sub(lambda match, number=number: f"{match[1]}{number or ''}", text))
    return "\n".join(copies)


def seconds_to_check(file: Path) -> float:
    """One run in a process of its own."""
    command = [str(Path(sys.executable).with_name("modernize")), "check", str(file)]
    # An installed package is compiled; a shell that forbids byte code would measure the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode == 2:
        sys.exit(done.stdout + done.stderr)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
