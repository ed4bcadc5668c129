"""How fast the runtime is: against the ideal, the backbone alone, and earlyon.

    python benchmarks/runtime.py --data DIR --json benchmarks/results/runtime.json

Everything in one process on one thread, candidates in turn, medians; ratios are what counts.
``--data`` holds ResNet-56's weights and CIFAR-10 (JPEG); the network that races earlyon is trained
once and kept under ``--runs``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.running.ideal import (
    measure_compaction,
    measure_ideal,
    measure_overhead,
    runner_of,
)
from benchmarks.running.memory import measure_memory
from benchmarks.running.onefile import measure_file
from benchmarks.running.rival import measure_rival
from benchmarks.subjects import MIXES, SMALL, SUBJECTS
from benchmarks.writing import processor, versions, write_result
from offramp.run.engines import Engine, OnnxRuntime, OpenVINO, Torch

PACKAGES = ("torch", "onnxruntime", "onnx", "openvino", "transformers", "numpy")
ENGINES = {
    "onnxruntime": lambda: OnnxRuntime(threads=1),
    "torch": Torch,
    "openvino": lambda: OpenVINO(threads=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, help="where to write the result")
    here = [name for name in _PARTS if name != "device"]
    parser.add_argument("--only", choices=here, action="append", help="these parts")
    parser.add_argument("--network", choices=list(SUBJECTS), action="append", help="these alone")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="these alone")
    parser.add_argument("--device", help="cuda: the stages on it, and nothing else")
    parser.add_argument("--quick", action="store_true", help="a sample, in under two minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    result: dict[str, Any] = {}
    measured_on: dict[str, str] = {}
    used = versions(PACKAGES)
    parts = ["device"] if given.device else given.only or here
    if given.json and given.json.is_file() and (given.only or given.device):
        before = json.loads(given.json.read_text("utf-8"))
        result = before["parts"]
        about = before["conditions"]
        measured_on = about["processors"]
        used = about["versions"] if given.device else used  # the part has its own
    for name in parts:
        print(f"{name} ...", file=sys.stderr)
        earlier, now = result.get(name), _PARTS[name](given)
        elsewhere = name == "device" and earlier and earlier["device"] != now["device"]
        result[name] = now if elsewhere else _joined(earlier, now)
        measured_on[name] = processor()
        document = {
            "schema": 1,
            "benchmark": "runtime",
            "summary": summary(result),
            "conditions": {
                "threads": 1,
                "processors": measured_on,
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "versions": used,
                "quick": given.quick,
                "seconds": round(time.perf_counter() - begin),
                "mixes": {mix: list(shares) for mix, shares in MIXES.items()},
            },
            "parts": result,
        }
        if given.json:  # after every part: what was measured is not lost with the next one
            write_result(given.json, document)
    print(json.dumps(document["summary"], indent=1))


def _joined(before: Any, now: Any) -> Any:
    """What was measured now, and earlier rows of networks and engines that were not."""
    if isinstance(before, dict) and isinstance(now, dict):
        return {**before, **{key: _joined(before.get(key), now[key]) for key in now}}
    tables = isinstance(before, list) and isinstance(now, list) and isinstance(before[0], dict)
    if tables and "network" in before[0]:
        fresh = {_about(row) for row in now}
        rows = [*(row for row in before if _about(row) not in fresh), *now]
        return sorted(rows, key=lambda row: _ORDER.index(_about(row)))
    return now


def _about(row: dict[str, Any]) -> tuple[str, str]:
    return row["network"], row.get("engine", "onnxruntime")


_ORDER = [(network, engine) for network in (*SUBJECTS, SMALL.name) for engine in ENGINES]


# -- the parts -------------------------------------------------------------------------------------


def _networks(given: argparse.Namespace, sample: str) -> list[str]:
    return given.network or ([sample] if given.quick else list(SUBJECTS))


def _stages(given: argparse.Namespace) -> dict[str, Any]:
    """Against the ideal and against the backbone alone, on each engine."""
    subjects = _networks(given, "resnet56_cifar")
    engines = given.engine or (["onnxruntime"] if given.quick else list(ENGINES))
    batches = [1, 32] if given.quick else [1, 8, 32, 64]
    seconds = 1.5 if given.quick else 2.0
    ideal, overhead = [], []
    for name in subjects:
        subject = SUBJECTS[name]
        model = subject.model(given.data)
        for engine in engines:
            print(f"  {name} on {engine}", file=sys.stderr)
            made: Engine = ENGINES[engine]()
            runner = runner_of(model, subject, made)
            ideal += measure_ideal(subject, runner, batches, seconds)
            overhead += measure_overhead(subject, model, runner, batches, 2 * seconds)
    return {"ideal": ideal, "overhead": overhead}


def _device(given: argparse.Namespace) -> dict[str, Any]:
    """The stages on a device, by eager torch."""
    batches, seconds = ([1, 64], 0.5) if given.quick else ([1, 8, 64, 512], 2.0)
    ideal, overhead = [], []
    for name in _networks(given, "resnet56_cifar"):
        print(f"  {name} on {given.device}", file=sys.stderr)
        subject = replace(SUBJECTS[name], device=given.device)
        model = subject.model(given.data)
        runner = runner_of(model, subject, Torch())
        ideal += measure_ideal(subject, runner, batches, seconds)
        overhead += measure_overhead(subject, model, runner, batches, seconds)
    return {
        "device": torch.cuda.get_device_name(given.device),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "ideal": ideal,
        "overhead": overhead,
    }


def _compaction(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A network so small that compacting does not pay."""
    runner = runner_of(SMALL.model(given.data), SMALL, OnnxRuntime(threads=1))
    return measure_compaction(SMALL, runner, [8, 64, 512], 1.0 if given.quick else 3.0)


def _earlyon(given: argparse.Namespace) -> dict[str, Any]:
    counts = {1: 200, 8: 400, 64: 640} if given.quick else {1: 1000, 8: 2000, 64: 2560}
    return measure_rival(given.data, given.runs, counts)


def _file(given: argparse.Namespace) -> list[dict[str, Any]]:
    names = _networks(given, "resnet18_64px")
    return [
        measure_file(SUBJECTS[name], SUBJECTS[name].model(given.data), 1.0 if given.quick else 8.0)
        for name in names
    ]


def _memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    names = _networks(given, "resnet56_cifar")
    return [measure_memory(SUBJECTS[n], SUBJECTS[n].model(given.data), 64) for n in names]


_PARTS = {
    "stages": _stages,
    "compaction": _compaction,
    "file": _file,
    "memory": _memory,
    "earlyon": _earlyon,
    "device": _device,
}


def summary(parts: dict[str, Any]) -> dict[str, float]:
    """The figures that are watched; those on stages are the worst on onnxruntime."""
    found: dict[str, float] = {}
    stages = parts.get("stages", {"ideal": [], "overhead": []})
    for kind, rows, key in (
        ("ideal_ratio", stages["ideal"], "ratio"),
        ("overhead", stages["overhead"], "ratio_less_heads"),
    ):
        for batch in (1, 32, 64):
            values = [
                row[key] for row in rows if row["batch"] == batch and row["engine"] == "onnxruntime"
            ]
            if values:
                found[f"{kind}_b{batch}"] = max(values)
    for row in parts.get("earlyon", {"rows": []})["rows"]:
        found[f"earlyon_b{row['batch']}"] = row["over_earlyon"]
    for row in parts.get("file", []):
        if row["network"] == "resnet18_64px":
            found["export_seconds_resnet18"] = row["export_and_proof_seconds"]
    files = [row["file_over_first_stage"] for row in parts.get("file", [])]
    if files:
        found["file_over_first_stage"] = max(files)
    memory = [row["ratio"] for row in parts.get("memory", [])]
    if memory:
        found["memory_ratio"] = max(memory)
    return found


if __name__ == "__main__":
    main()
