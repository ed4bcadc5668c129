"""Against earlyon 0.3.0: the same trained ResNet-56, the same exits, heads and thresholds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import offramp
from benchmarks.running.bare import bare_call
from benchmarks.trained import DATA, test_images, trained_resnet56
from benchmarks.vision_packages import prepare
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.run.engines import OnnxRuntime
from offramp.run.runner import Runner

__all__ = ["measure_rival"]

REQUIREMENT = "earlyon==0.3.0"
DROP = 0.0  # as accurate as the full network on the calibration half
TURN = 100  # images in a row, so that caches hold what they hold in service

Row = dict[str, Any]
Answering = Callable[[Tensor], np.ndarray]


def measure_rival(data: Path, runs: Path, batches: dict[int, int]) -> Row:
    """One row for each batch size, and how the thresholds were chosen.

    Args:
        data: the folder of data.
        runs: where the trained network and the rival's package are kept.
        batches: how many test images to time at each batch size.
    """
    model = trained_resnet56(data, runs / "trained")
    x, y = test_images()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    half = len(x) // 2
    loader = list(zip(x[:half].split(500), y[:half].split(500), strict=True))
    trace = offramp.record(model, loader, progress=False)
    policy = offramp.calibrate(trace, "confidence", max_accuracy_drop=DROP)
    accuracies = (trace.logits.argmax(2) == trace.labels).double().mean(1).tolist()
    found = []
    for batch, count in batches.items():
        candidates = _candidates(model, policy, x[:4], batch, runs)
        found.append(_race(candidates, x[half : half + count], y[half : half + count], batch))
    return {
        "data": DATA,
        "places": list(model.places),
        "thresholds": list(policy.thresholds_for(model.num_exits)),
        "max_accuracy_drop": DROP,
        "calibration_samples": half,
        "accuracy_of_exits_on_calibration": accuracies,
        "rows": found,
    }


def _candidates(
    model: MultiExitModel, policy: Policy, example: Tensor, batch: int, runs: Path
) -> dict[str, Answering]:
    rival = _earlyon(model, policy, runs)
    ours = Runner(model, policy, example, engine=OnnxRuntime(threads=1))
    eager = Runner(model, policy, example, engine="torch")
    bare = bare_call(model, example, OnnxRuntime(threads=1))
    call = rival if batch == 1 else rival.forward_inference_batched
    logits = "prediction" if batch == 1 else "predictions"
    return {
        "offramp_onnxruntime": lambda x: ours(x).prediction,
        "offramp_torch": lambda x: eager(x).prediction.numpy(),
        "earlyon": lambda x: getattr(call(x), logits).argmax(-1).numpy(),
        "backbone_onnxruntime": lambda x: bare([x])[0].argmax(-1),
        "backbone_torch": lambda x: _plain(model.backbone, x),
    }


def _plain(backbone: nn.Module, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return backbone(x).argmax(-1).numpy()


def _earlyon(model: MultiExitModel, policy: Policy, runs: Path) -> Any:
    """The rival around our backbone and heads."""
    folder = runs / "earlyon"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), REQUIREMENT], check=True)
    prepare()  # it imports torchvision
    sys.path.insert(0, str(folder))
    from earlyon.core.types import EarlyExitConfig, ExitPoint
    from earlyon.core.wrappers import EarlyExitWrapper

    points, heads = [], {}
    for index, (place, head) in enumerate(zip(model.places, model.heads, strict=True)):
        points.append(ExitPoint(f"e{index}", place, 1))
        heads[f"e{index}"] = head
    # It takes no threshold above 1, which its confidences reach by rounding only.
    thresholds = [min(1.0, t) for t in policy.thresholds_for(model.num_exits)]
    config = EarlyExitConfig(
        backbone="cifar_resnet56",
        num_classes=model.num_classes,
        exit_points=points,
        confidence_thresholds=thresholds,
        loss_weights=[1.0] * (len(points) + 1),
    )
    return EarlyExitWrapper(
        model.backbone, heads, lambda x: x, config, input_shape=(1, 3, 32, 32)
    ).eval()


def _race(candidates: dict[str, Answering], x: Tensor, y: Tensor, batch: int) -> Row:
    """All on the same images, a few batches each in turn, as arrays of the engine's own kind."""
    own = {name: x.numpy() if name.endswith("_onnxruntime") else x for name in candidates}
    seconds = dict.fromkeys(candidates, 0.0)
    answers: dict[str, list[np.ndarray]] = {name: [] for name in candidates}
    turn = max(TURN // batch, 1) * batch
    for start in range(0, len(x), turn):
        for name, call in candidates.items():
            parts = [own[name][k : k + batch] for k in range(start, start + turn, batch)]
            parts = [part for part in parts if len(part)]
            call(parts[0])  # not counted: it finds what the others left in the caches
            begin = time.perf_counter()
            answers[name] += [call(part) for part in parts]
            seconds[name] += time.perf_counter() - begin
    row: Row = {"batch": batch, "images": len(x)}
    for name in candidates:
        right = float((np.concatenate(answers[name]) == y.numpy()).mean())
        row[name] = {"images_per_second": len(x) / seconds[name], "accuracy": right}
    row["accuracy_over_earlyon"] = (
        row["offramp_onnxruntime"]["accuracy"] - row["earlyon"]["accuracy"]
    )
    rate = {name: row[name]["images_per_second"] for name in candidates}
    row["over_earlyon"] = rate["offramp_onnxruntime"] / rate["earlyon"]
    row["over_earlyon_both_eager"] = rate["offramp_torch"] / rate["earlyon"]
    return row
