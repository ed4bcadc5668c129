"""Peak memory of the runner beside that of the backbone alone, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.running.bare import bare_file
from benchmarks.subjects import EXITS, NEVER, SMALL, Subject
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.run.artifact import export

__all__ = ["measure_memory"]

Row = dict[str, Any]

# Both children import the same, and load and run another artifact first, so that the code of the
# libraries is in memory. They count from there, in MB: what loading takes at the most, and what the
# network takes at the most while it runs: weights, inputs and activations.
CHILD = """
import ctypes, gc, json, sys
from pathlib import Path
import numpy as np
import offramp
from offramp.run.artifact import load
from offramp.run.engines import OnnxRuntime
import onnxruntime, onnx

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))

def begin():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

kind, path, rows = sys.argv[1], Path(sys.argv[2]), np.load(sys.argv[3])
inputs = [rows[name] for name in rows.files]
first = load(path.parent / "small.offramp", OnnxRuntime(threads=1))
first(np.zeros((64, 32), np.float32))
del first
begin()
before = resident("VmRSS")
if kind == "bare":
    session = OnnxRuntime(threads=1).session(path.read_bytes())
    call = lambda: session(inputs)
else:
    runner = load(path, OnnxRuntime(threads=1))
    batch = dict(zip(rows.files, inputs)) if len(inputs) > 1 else inputs[0]
    call = lambda: runner(batch)
loading = resident("VmHWM") - before
begin()
for _ in range(3):
    call()
print(json.dumps({"loading": loading, "running": resident("VmHWM") - before}))
"""


def measure_memory(subject: Subject, model: MultiExitModel, batch: int) -> Row:
    """Nobody leaves, so that every stage runs on the whole batch."""
    import numpy as np

    example = subject.rows(4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.onnx").write_bytes(bare_file(model, example).SerializeToString())
        policy = Policy("confidence", [NEVER] * EXITS)
        export(model, policy, example, folder / "all.offramp")
        export(SMALL.model(None), policy, SMALL.rows(4), folder / "small.offramp")
        x = subject.rows(batch)
        named = x if isinstance(x, dict) else {"x": x}
        np.savez(folder / "rows.npz", **{k: named[k].numpy() for k in sorted(named)})
        bare = _peak("bare", folder / "bare.onnx", folder)
        runner = _peak("runner", folder / "all.offramp", folder)
    return {
        "network": subject.name,
        "batch": batch,
        **{f"bare_{key}_mb": value for key, value in bare.items()},
        **{f"runner_{key}_mb": value for key, value in runner.items()},
        "ratio": runner["running"] / bare["running"],
        "ratio_loading": runner["loading"] / bare["loading"],
    }


def _peak(kind: str, path: Path, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, kind, str(path), str(folder / "rows.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The measuring process failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
