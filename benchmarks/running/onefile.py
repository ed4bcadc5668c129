"""The exported file: how long export and its proof take, and what leaving at once costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.running.ideal import BLOCK
from benchmarks.subjects import EXITS, Subject
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.run.artifact import export, load
from offramp.run.engines import OnnxRuntime
from offramp.run.timing import compare

__all__ = ["measure_file"]

ALWAYS = -1.0  # every confidence reaches it


def measure_file(subject: Subject, model: MultiExitModel, seconds: float) -> dict[str, Any]:
    """At batch 1: everybody leaves at the first exit, against the first stage alone.

    The file is deployed with thresholds by which they do, and called with nothing but its input.
    """
    leaving = Policy("confidence", [ALWAYS] * EXITS)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.offramp"
        begin = time.perf_counter()
        export(model, leaving, subject.rows(4), path, stages=True)
        took = time.perf_counter() - begin
        file = _session(path / "model.onnx")
        first = _session(path / "stages" / "0.onnx")
        nodes = len(onnx.load(path / "model.onnx").graph.node)
        runner = load(path, OnnxRuntime(threads=1))
    call = runner.call.of(subject.rows(1))
    inputs = [value.numpy() for value in call.tensors]
    args, kwargs = call.build(call.tensors)
    own_first = runner._calls[0]
    # Two at a time, so that each finds in the caches what it finds in service.
    of_file = compare(
        {
            "file_all_leave": lambda: file(inputs),
            "first_stage": lambda: first(inputs),
        },
        repeats=400,
        seconds=seconds,
        block=BLOCK,
    )
    of_runner = compare(
        {
            "runner_all_leave": lambda: runner(*args, **kwargs),
            "runner_first_stage": lambda: own_first(inputs),
        },
        repeats=400,
        seconds=seconds,
        block=BLOCK,
    )
    return {
        "network": subject.name,
        "export_and_proof_seconds": took,
        "nodes": nodes,
        **{f"{key}_ms": value for key, value in {**of_runner, **of_file}.items()},
        "file_over_first_stage": of_file["file_all_leave"] / of_file["first_stage"],
        "runner_over_first_stage": of_runner["runner_all_leave"] / of_runner["runner_first_stage"],
    }


def _session(path: Path) -> Callable[[Sequence[np.ndarray]], Any]:
    """As one deploys it: plain ONNX Runtime, its own settings, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda values: session.run(None, dict(zip(names, values, strict=True)))
