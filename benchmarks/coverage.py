"""Every architecture of a long list through the whole path, each compared with itself.

    python benchmarks/coverage.py --json benchmarks/results/coverage.json

Builds each network with random weights, places three exits by cost, attaches, cuts, runs and
exports it, and compares (a) all exits with the whole network where none is taken, (b) per-sample
exits at batch 5 with each sample alone, (c) the ONNX file with both, (d) time and memory of attach
and cut. One row each, written as it comes; a second run goes on where the first one stopped.

``--only NAME`` (again and again), ``--redo-failed``, ``--quick`` (a sample in under two minutes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # not every system has it
    resource = None

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.architectures import ARCHITECTURES
from benchmarks.passage import BATCH, EXITS, Row, onnx_rows, take_through, warm_up
from benchmarks.vision_packages import prepare
from benchmarks.writing import processor, versions, write_result

HERE = Path(__file__).parent
SECONDS = 240  # of the processor; of the wall, WALL times as many
WALL = 5
PACKAGES = ("torch", "timm", "torchvision", "transformers", "torch_geometric", "onnx",
            "onnxruntime", "onnxscript")  # fmt: skip
QUICK = (
    "resnet10t",
    "inception_next_atto",
    "vit_tiny_patch16_224",
    "torchvision_swin",
    "hf_bert",
    "hf_llama",
    "dense_gcn",
    "lstm",
    "mlp",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=HERE / "results" / "coverage.json")
    parser.add_argument("--only", action="append", choices=sorted(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--redo-failed", action="store_true", help="what did not pass everything")
    parser.add_argument("--quick", action="store_true", help="a sample of the list")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at once")
    given = parser.parse_args()
    names = given.only or (QUICK if given.quick else list(ARCHITECTURES))
    rows = _read(given.json)
    if not given.only:
        names = [n for n in names if n not in rows or (given.redo_failed and not _passed(rows[n]))]
    for row in _run(names, given.jobs):
        rows[row["name"]] = row
        _write(given.json, rows)
        print(_line(row), flush=True)
    _write(given.json, rows)
    print(json.dumps(_summary(rows), indent=1))


def _run(names: list[str] | tuple[str, ...], jobs: int) -> Any:
    """The rows, as they come. Each in a process of its own: one that crashes or hangs is a row."""
    prepare()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if len(names) > 1:  # imported once; the processes are forked off
        for package in ("timm", "torchvision", "transformers", "torch_geometric.nn"):
            __import__(package)
        warm_up(ARCHITECTURES["mlp"])
    context = multiprocessing.get_context("fork")
    waiting = list(names)
    running: dict[Any, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, there), daemon=True)
            process.start()
            there.close()
            running[here] = (name, process, time.monotonic() + WALL * SECONDS)
        ready = wait(list(running), timeout=1.0)
        for pipe, (name, process, end) in list(running.items()):
            if pipe not in ready and time.monotonic() < end:
                continue
            yield _collect(name, process, pipe if pipe in ready else None)
            pipe.close()
            del running[pipe]


def _child(name: str, pipe: Connection) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the process's life
    torch.set_num_threads(1)
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    pipe.send(take_through(ARCHITECTURES[name]).to_dict())
    pipe.close()


def _collect(name: str, process: Any, pipe: Any) -> dict[str, Any]:
    one = ARCHITECTURES[name]
    row = Row(one.name, one.source, one.kind)
    if pipe is None:
        row.reason = f"Not done within {WALL * SECONDS} s."
        process.kill()
    else:
        try:
            return pipe.recv()
        except EOFError:
            process.join(10)
            row.reason = f"The process ended with exit code {process.exitcode}."
            if process.exitcode == -signal.SIGXCPU:
                row.reason = f"Not done within {SECONDS} s of processor time."
    process.join(10)
    return row.to_dict()


def _passed(row: dict[str, Any]) -> bool:
    return row["equal"] and row["per_sample"] and row["onnx"]


def _line(row: dict[str, Any]) -> str:
    marks = " ".join(
        f"{key}={'yes' if row[key] else 'NO'}"
        for key in ("placed", "staged", "equal", "per_sample", "onnx")
    )
    return f"{row['name']:36} {marks} {row['seconds']:7.1f} s  {row['reason'][:200]}"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {row["name"]: row for row in rows if row["name"] in ARCHITECTURES}


def _summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "architectures": len(rows),
        "equal": sum(row["equal"] and row["per_sample"] for row in rows.values()),
        "onnx": sum(row["onnx"] for row in rows.values()),
        "placed": sum(row["placed"] for row in rows.values()),
        "staged": sum(row["staged"] for row in rows.values()),
    }


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    ordered = [rows[name] for name in ARCHITECTURES if name in rows]
    prepare()  # some packages stand apart, and their versions with them
    result = {
        "schema": 1,
        "benchmark": "coverage",
        "summary": _summary(rows),
        "conditions": {
            "exits": EXITS,
            "batch": BATCH,
            "onnx_rows": onnx_rows(),
            "onnx_mixes": ["none leave", "all leave", "mixed"],
            "threads": 1,
            "limit_cpu_seconds": SECONDS,
            "processor": processor(),
            "python": platform.python_version(),
            "versions": versions(PACKAGES),
        },
        "rows": ordered,
    }
    write_result(path, result)


if __name__ == "__main__":
    main()
