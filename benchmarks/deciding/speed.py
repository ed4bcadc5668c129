"""How long a search and a replay take on a large trace, and what memory they need beyond it.

Each measurement is a process of its own: the peak of a process is the one figure of memory that
nothing before it has touched.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["measure", "summarise"]

EXITS, CLASSES, BUDGET = 12, 10, 0.5
MILLION = 1_000_000


def measure(sizes: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for each number of samples: seconds, and gigabytes beyond the trace."""
    rows = []
    for size in sizes:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "benchmarks.deciding.speed", str(size)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        say(f"speed: {rows[-1]}")
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest trace, and by how much time grew faster than N log N (1 is just as fast)."""
    first, last = rows[0], rows[-1]
    most = last["samples"] * math.log(last["samples"])
    wanted = most / (first["samples"] * math.log(first["samples"]))
    out = {"growth_over_n_log_n": last["search_seconds"] / first["search_seconds"] / wanted}
    if last["samples"] == MILLION:
        out["seconds_1e6x12"] = last["search_seconds"]
        out["gigabytes_1e6x12"] = last["search_gigabytes"]
        out["replay_seconds_1e6x12"] = last["replay_seconds"]
    return out


def _child(size: int) -> dict[str, Any]:
    import torch

    from offramp.decide import Trace, calibrate, replay

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    logits = torch.empty(EXITS, size, CLASSES)
    for k in range(EXITS):
        logits[k].normal_(generator=generator)
        logits[k][torch.arange(size), labels] += 1 + 0.4 * k
    heads = torch.full((EXITS,), 0.02)
    heads[-1] = 0
    trace = Trace(logits, labels, torch.ones(EXITS), heads)
    del logits
    calibrate(trace.subset(torch.arange(min(size, 4096))), max_cost=BUDGET)  # what is made once
    before = _resident()
    _forget_peak()
    begin = time.perf_counter()
    policy = calibrate(trace, max_cost=BUDGET)
    searched = time.perf_counter() - begin
    peak = _peak()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        decided = replay(trace, policy)
        times.append(time.perf_counter() - begin)
    return {
        "samples": size,
        "exits": EXITS,
        "classes": CLASSES,
        "search_seconds": searched,
        "search_gigabytes": (peak - before) / 1e9,
        "replay_seconds": sorted(times)[1],
        "cost": float(decided.cost.mean()) / trace.full_cost,
    }


def _forget_peak() -> None:
    """Let the peak of this process start anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}: memory is measured on Linux alone.")


if __name__ == "__main__":
    print(json.dumps(_child(int(sys.argv[1]))))
