"""The main job from end to end: a copy of a shipped legacy program is upgraded, run before and after, and verified."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "fixtures" / "latent_drift_trajectory"
RULES = "rope,prenorm,swiglu,sdpa"
RUN = """
import case, torch
model = case.build()
output = case.call(model, case.inputs())
output = output if torch.is_tensor(output) else output[0]
print(f"output {tuple(output.shape)}, finite: {bool(output.isfinite().all())},",
      f"{sum(p.numel() for p in model.parameters()):,} parameters")
"""


def main() -> int:
    """Prints every step; the exit code is that of the verification."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("before", "after"):
            shutil.copytree(PROGRAM, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        target = f"after/{PROGRAM.name}.py"

        planned = modernize(folder, "apply", "--rule", RULES, "--diff", "--format", "json", target)
        print(planned["diff"])
        applied = modernize(folder, "apply", "--rule", RULES, "--format", "json", target)
        for site in applied["sites"]:
            print(f"{site['status']}: {site['path']}:{site['line']} {site['rule']}: {site['message']}")

        for name in ("before", "after"):
            print(f"\n{name}: ", end="", flush=True)
            subprocess.run([sys.executable, "-c", RUN], cwd=folder / name, check=True)

        made = sorted({site["rule"] for site in applied["sites"] if site["status"] == "done"})
        sides = ["--before", "before", "--after", "after", "--rule", ",".join(made)]
        command = [*sides, "--model", "case:build()", "--input", "inputs()", "--call", "call(model, inputs)"]
        print(f"\n$ modernize verify {shlex.join(command)}", flush=True)
        return subprocess.run([tool(), "verify", *command], cwd=folder).returncode


def modernize(folder: Path, *arguments: str) -> dict:
    """Runs the command in `folder` and returns the JSON object that it prints."""
    print(f"$ modernize {shlex.join(arguments)}", flush=True)
    done = subprocess.run([tool(), *arguments], cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:
        sys.exit(f"modernize failed:\n{done.stdout}")
    return json.loads(done.stdout)


def tool() -> str:
    """The `modernize` script of the environment that runs this file."""
    return str(Path(sys.executable).with_name("modernize"))


if __name__ == "__main__":
    sys.exit(main())
