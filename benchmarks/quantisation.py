"""What int8 does to early exits: thresholds as they were, and calibrated on what really runs.

    python benchmarks/quantisation.py --data DIR --json benchmarks/results/quantisation.json

Every stage of the trained ResNet-56 is quantised by ONNX Runtime (static, weights int8 per channel,
activations uint8, ranges from training images). The quantised runner is then recorded like any
model, so that its thresholds can be calibrated on its own scores. Ranges come from training images,
thresholds from one half of the test images, and what is reported from the other half.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import offramp
from benchmarks.traces import fashion
from benchmarks.trained import DATA, ready, test_images, trained_resnet56
from benchmarks.writing import versions, write_result
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy, replay
from offramp.run.chain import Step, chain
from offramp.run.engines import OnnxRuntime, StepCall
from offramp.run.graph import cut
from offramp.run.onnx import convert, split
from offramp.run.runner import Runner
from offramp.run.timing import compare

DROP = 0.002
RANGES = 256  # training images from which ranges of activations are taken


class Quantised(OnnxRuntime):
    """ONNX Runtime on stages that it has quantised.

    Args:
        images: (N, 3, 32, 32) from which the ranges of activations are taken.
    """

    name = "onnxruntime-int8"

    def __init__(self, images: np.ndarray) -> None:
        super().__init__(threads=1)
        self.images = images

    def load(self, steps: Sequence[Step]) -> list[StepCall]:
        """Each stage quantised on what the stages before it, in float, make of the images."""
        models = split(convert(steps), steps)
        values = {steps[0].inputs[0]: self.images}
        calls = []
        for model, step in zip(models, steps, strict=True):
            given = [values[name] for name in step.inputs]
            calls.append(self.session(_quantised(model, given)))
            outputs = self.session(model.SerializeToString())(given)
            values.update(zip(step.outputs, outputs, strict=True))
        return calls


def _quantised(model: onnx.ModelProto, given: Sequence[np.ndarray]) -> bytes:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    names = [value.name for value in model.graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            parts = (np.array_split(value, len(value) // 32) for value in given)
            self.batches = iter(
                [dict(zip(names, part, strict=True)) for part in zip(*parts, strict=True)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    logging.getLogger().setLevel(logging.ERROR)  # it advises a step that is of no use here
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "Add", "Relu"],
        )
        return target.read_bytes()


def unproven(model: MultiExitModel, example: Tensor, engine: OnnxRuntime) -> Runner:
    """A runner that is not compared with the model, from which it differs on purpose."""
    policy = Policy("confidence", [2.0] * (model.num_exits - 1))
    staged = cut(model, example)
    steps = chain(staged, policy, model.num_exits)
    links, calls = [step.link for step in steps], engine.load(steps)
    return Runner.of_links(
        engine, links, calls, policy, model.costs, model.places, staged.call, staged.row_bytes
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="fewer images")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = trained_resnet56(given.data, given.runs / "trained")
    images = fashion()
    some = torch.randperm(len(images["train_x"]))[:RANGES]
    ranges = ready(images["train_x"][some]).numpy()
    x, y = test_images()
    order = torch.randperm(len(x))[: 2000 if given.quick else len(x)]
    halves = [list(zip(x[h].split(250), y[h].split(250), strict=True)) for h in order.chunk(2)]
    engines = {"float32": OnnxRuntime(threads=1), "int8": Quantised(ranges)}
    runners = {kind: unproven(model, x[:4], engine) for kind, engine in engines.items()}
    policies, tests = {}, {}
    for kind, runner in runners.items():
        trace = offramp.record(runner, halves[0], progress=False)
        policies[kind] = offramp.calibrate(trace, "confidence", max_accuracy_drop=DROP)
        tests[kind] = offramp.record(runner, halves[1], progress=False)
    rows = [
        _row("float32", "its own", tests["float32"], policies["float32"]),
        _row("int8", "of float32", tests["int8"], policies["float32"]),
        _row("int8", "its own", tests["int8"], policies["int8"]),
    ]
    times = [_times(runners, policies, x[order[:batch]], batch) for batch in (1, 64)]
    document = {
        "schema": 1,
        "benchmark": "quantisation",
        "conditions": {
            "data": DATA,
            "network": "ResNet-56",
            "places": list(model.places),
            "max_accuracy_drop": DROP,
            "range_images": RANGES,
            "calibration_samples": len(order) // 2,
            "test_samples": len(order) - len(order) // 2,
            "threads": 1,
            "quick": given.quick,
            "versions": versions(("torch", "onnxruntime", "onnx")),
        },
        "rows": rows,
        "times": times,
    }
    if given.json:
        write_result(given.json, document)
    print(json.dumps(document, indent=1))


def _row(engine: str, thresholds: str, trace: offramp.Trace, policy: Policy) -> dict[str, Any]:
    decided = replay(trace, policy)
    right = decided.prediction == trace.labels
    full = trace.logits[-1].argmax(-1) == trace.labels
    return {
        "engine": engine,
        "thresholds": thresholds,
        "full_accuracy": float(full.double().mean()),
        "accuracy": float(right.double().mean()),
        "cost_share": float(decided.cost.mean() / trace.stage_costs.sum()),
        "exit_shares": [
            float((decided.exit == k).double().mean()) for k in range(len(trace.logits))
        ],
        "values": list(policy.thresholds_for(len(trace.logits))),
    }


def _times(
    runners: dict[str, Runner], policies: dict[str, Policy], x: Tensor, batch: int
) -> dict[str, Any]:
    """Milliseconds of a batch: nobody leaves, and under the thresholds of its own."""
    candidates = {}
    for kind, runner in runners.items():
        early = runner.under(policies[kind])
        candidates[f"{kind}_whole"] = lambda runner=runner: runner(x)
        candidates[f"{kind}_early"] = lambda early=early: early(x)
    found = compare(candidates, repeats=60, seconds=20.0, block=5)
    return {"batch": batch, **{f"{name}_ms": value for name, value in found.items()}}


if __name__ == "__main__":
    main()
