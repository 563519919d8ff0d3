"""The child process: imports torch and one program, measures it, and on the second side compares it with the first.

usage: python -m modernizer.verify.runner REQUEST.json
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modernizer.verify.request import Request


def main(argv: list[str]) -> int:
    """Writes the answer beside the request; 0 where there is one, good or bad."""
    request = Request.from_json(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        answer = work(request)
    except BaseException as error:  # a program may leave by SystemExit, and a limit comes as MemoryError
        if isinstance(error, KeyboardInterrupt):
            raise
        answer = {"error": explain(error, request)}
    write_answer(Path(request.result), answer)
    # Threads or exit handlers that the program has started must not keep the answer waiting.
    sys.stderr.flush()
    os._exit(0)


def work(request: Request) -> dict[str, Any]:
    """Measures one side; on the second, the report."""
    import torch

    limit(request.memory_mb)
    # The fast path of torch's own layers runs no Python that could be watched, and treats padding in its own way.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_num_threads(1)

    from modernizer.verify.judge import judge
    from modernizer.verify.loading import Subject
    from modernizer.verify.recording import Recorder, Recording

    before = Recording.read(wait_for(Path(request.record))) if request.side == "after" else None
    recording = Recorder(Subject.load(request), request, before).run()
    if before is None:
        recording.write(Path(request.record))
        return {"done": True}
    return {"report": judge(before, recording, request).to_json()}


def wait_for(path: Path) -> Path:
    """`path` once it is there. Both sides start together, so that torch is imported at the same time."""
    parent = os.getppid()
    while not path.exists():
        if os.getppid() != parent:  # nobody is left to want the answer
            raise SystemExit("the parent process has ended")
        time.sleep(0.01)
    return path


def limit(memory_mb: int) -> None:
    """Takes away memory beyond what is in use now, and processor time beyond what was allowed."""
    try:
        import resource
    except ImportError:  # not on this system; the time limit still holds
        return
    seconds = int(os.environ.get("MODERNIZER_CPU_SECONDS", "0"))
    if seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        size = pages * os.sysconf("SC_PAGE_SIZE") + memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def explain(error: BaseException, request: Request) -> str:
    """One sentence for what went wrong, with the place in the user's own files where there is one."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        what = f"ran out of memory: more than {request.memory_mb} MB"
    elif isinstance(error, SystemExit):
        what = f"leaves the process (SystemExit {text})" if text else "leaves the process (SystemExit)"
    else:
        what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(request.target.root + os.sep)]
    return f"{what} ({Path(own[-1].filename).relative_to(request.target.root)}:{own[-1].lineno})" if own else what


def write_answer(path: Path, answer: Mapping[str, Any]) -> None:
    """All of the answer or none of it."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(answer), encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
