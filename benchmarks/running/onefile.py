"""The exported file: how long export and its proof take, and what leaving at once costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.running.ideal import BLOCK
from benchmarks.subjects import EXITS, NEVER, Subject
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.run.artifact import export, load
from offramp.run.engines import OnnxRuntime
from offramp.run.timing import compare

__all__ = ["measure_file"]


def measure_file(subject: Subject, model: MultiExitModel, seconds: float) -> dict[str, Any]:
    """At batch 1: everybody leaves at the first exit, against the first stage alone."""
    engine = OnnxRuntime(threads=1)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.offramp"
        begin = time.perf_counter()
        export(model, Policy("confidence", [NEVER] * EXITS), subject.rows(4), path)
        took = time.perf_counter() - begin
        file = engine.session((path / "model.onnx").read_bytes())
        nodes = len(onnx.load(path / "model.onnx").graph.node)
        runner = load(path, engine)
    call = runner.call.of(subject.rows(1))
    inputs = [value.numpy() for value in call.tensors]
    leave = np.full(EXITS, -1.0, np.float32)
    stay = np.full(EXITS, NEVER, np.float32)
    first = runner._calls[0]
    leaving = runner.under(Policy("confidence", [-1.0] * EXITS))
    args, kwargs = call.build(call.tensors)
    times = compare(
        {
            "file_all_leave": lambda: file([*inputs, leave]),
            "runner_all_leave": lambda: leaving(*args, **kwargs),
            "first_stage": lambda: first(inputs),
            "file_none_leave": lambda: file([*inputs, stay]),
        },
        repeats=400,
        seconds=seconds,
        block=BLOCK,
    )
    return {
        "network": subject.name,
        "export_and_proof_seconds": took,
        "nodes": nodes,
        **{f"{key}_ms": value for key, value in times.items()},
        "file_over_first_stage": times["file_all_leave"] / times["first_stage"],
        "runner_over_first_stage": times["runner_all_leave"] / times["first_stage"],
    }
