"""The whole programs under `fixtures/`, found, copied and run by the tests.

Each folder holds a legacy program and a `case.py` that knows how to build and call it:

    PATHS                     the files or folders a rule is pointed at, relative to the folder
    EXPECTED                  rule -> "apply" (work to do), "hard" (a refusal is fine), "modern" or "absent" (no work)
    causal, causal_input      whether later tokens leave earlier outputs alone; the number of the input that is meant
    time_dim                  the time axis of the output and of that input
    build()                   the model, small, seeded, in eval mode
    inputs()                  a tuple of tensors
    call(model, inputs)       one output tensor
    generate(model, inputs)   where the program has a generation loop: the tokens it puts out, greedily

and further functions of a model and its inputs where a program has more to check.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "fixtures"


@dataclass(frozen=True)
class Program:
    """One program: its name and the folder it lies in (the original's or a copy's)."""

    name: str
    folder: Path

    def copy(self, parent: Path) -> Program:
        """The same program in `parent/name`, for a test that rewrites it."""
        target = parent / self.name
        shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns("__pycache__"))
        return Program(self.name, target)

    @property
    def targets(self) -> list[Path]:
        """What a rule is pointed at."""
        with self.case() as case:
            return [self.folder / path for path in case.PATHS]

    @contextmanager
    def case(self) -> Iterator[Any]:
        """The imported `case` module. Everything imported from the folder is forgotten afterwards.

        Objects made inside stay usable; another copy of the program can then be imported under the same names.
        """
        old_path, old_modules = list(sys.path), dict(sys.modules)
        sys.path.insert(0, str(self.folder))
        sys.dont_write_bytecode, old_flag = True, sys.dont_write_bytecode
        importlib.invalidate_caches()
        try:
            yield importlib.import_module("case")
        finally:
            sys.path[:], sys.dont_write_bytecode = old_path, old_flag
            for name in [n for n, m in sys.modules.items() if n not in old_modules and self._owns(m)]:
                del sys.modules[name]

    def _owns(self, module: Any) -> bool:
        file = getattr(module, "__file__", None)
        return file is not None and Path(file).is_relative_to(self.folder)


PROGRAMS = [Program(path.parent.name, path.parent) for path in sorted(FIXTURES.glob("*/case.py"))]


def program(name: str) -> Program:
    """The program in `fixtures/name`."""
    return next(p for p in PROGRAMS if p.name == name)
