"""What the benchmarks share: clocks, memory of this process, and tables."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[Row]) -> str:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(shown(row.get(head, "")) for head in heads) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(device: torch.device, run: Callable[[], object], repeats: int = 10) -> float:
    """The median of several runs, after two to warm up."""
    return side_by_side(device, {"": run}, repeats)[""]


def side_by_side(
    device: torch.device, runs: dict[str, Callable[[], object]], repeats: int = 10, calls: int = 1
) -> dict[str, float]:
    """Median milliseconds a call of each, taken in turns, so that a slow spell of the machine meets all of them."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            wait(device)
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}


def resident(field: str) -> int:
    """Kilobytes of this process by the name Linux gives them: VmRSS now, VmHWM at the highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_highest() -> None:
    """Start VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5")
