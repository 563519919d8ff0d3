"""Runs one child process on somebody's program: no longer than allowed, with no more memory than allowed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from modernizer.verify.request import Request

HERE = Path(__file__).resolve().parent.parent.parent


class Child:
    """A process at work on a request, from construction on. `stop` must be called in the end."""

    def __init__(self, request: Request, scratch: Path, timeout: float) -> None:
        self._result = Path(request.result)
        self._errors = scratch / f"{request.side}.stderr"
        question = scratch / f"{request.side}.request.json"
        question.write_text(request.to_json(), encoding="utf-8")
        with self._errors.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "modernizer.verify.runner", str(question)],
                cwd=request.target.root,
                env=_environment(timeout),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )

    def answer(self, timeout: float) -> dict[str, Any]:
        """What the child says within `timeout` seconds from now, or {"error": a sentence} where it says nothing."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"gave no answer in {timeout:g} s and was stopped"}
        return _answer(self._result, code, self._errors)

    def stop(self) -> None:
        """Ends the child and whatever it has started; returns when it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)


def _environment(timeout: float) -> dict[str, str]:
    settings = {
        # Nothing is to be left in the user's folder, and one thread gives the same sums every time.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        # The comparison is made on the CPU, so the model must not find a reason to move elsewhere.
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "Agg",
        # A child that outlives this process stops by itself.
        "MODERNIZER_CPU_SECONDS": str(int(timeout) + 30),
    }
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _answer(result: Path, code: int, errors: Path) -> dict[str, Any]:
    if result.exists():
        answer = json.loads(result.read_text(encoding="utf-8"))
        if isinstance(answer, dict):
            return answer
    if code < 0:
        return {"error": f"was ended by {signal.Signals(-code).name}, for example because it used too much memory"}
    said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"error": f"ended without an answer (exit code {code}){': ' + said[-1][:300] if said else ''}"}
