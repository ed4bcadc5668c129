"""Replay, torch runner and ONNX file: the same exits and classes, for every criterion?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import offramp
from offramp.decide import (
    Agreement,
    Criterion,
    Energy,
    Entropy,
    Patience,
    Policy,
    PowerEntropy,
    ProductOfExperts,
    Trace,
    Voting,
    criterion,
    fit_ensemble,
    fit_gates,
    fit_temperatures,
    record,
    replay,
)

__all__ = ["check_equality", "every_criterion"]

WIDTH, CLASSES, EXITS = 12, 5, 4
ROWS, FIT = 1_000, 400
NEAR = 1e-4  # a score so near its threshold may decide either way on another engine

Row = dict[str, Any]
Say = Callable[[str], None]


class Small(nn.Module):
    """A backbone that costs nothing to run: what is compared is the deciding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(EXITS))
        )
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, WIDTH) -> (B, CLASSES)."""
        return self.last(self.blocks(x))


def every_criterion(trace: Trace) -> dict[str, Criterion]:
    """Each criterion of the library, and the variants that change what runs."""
    plain = ("confidence", "entropy", "margin", "power_entropy", "energy", "patience", "agreement")
    plain += ("voting", "arithmetic", "geometric", "product", "class_mean")
    ensemble, temperatures = fit_ensemble(trace), fit_temperatures(trace)
    return {name: criterion(name) for name in plain} | {
        "entropy in nats": Entropy(unit="nats"),
        "power entropy of one half": PowerEntropy(0.5),
        "energy at 2": Energy(2.0),
        "patience of outputs": Patience(tolerance=0.8),
        "agreement, weighted": Agreement(weighted=True),
        "votes, weighted": Voting([0.5, 1.0, 1.5, 2.0]),
        "geometric, fitted": ensemble,
        "uniform experts": ProductOfExperts("uniform", 0.2),
        "tempered": temperatures.apply("confidence"),
        "tempered ensemble": temperatures.apply("arithmetic"),
        "gate": fit_gates(trace, max_cost=0.6),
        "gate on an ensemble": fit_gates(trace, max_cost=0.6, inner=ensemble),
    }


def check_equality(say: Say, names: set[str] | None = None) -> list[Row]:
    """One row a criterion: rows whose exit or class differs from the replay's.

    Args:
        say: takes progress.
        names: the criteria to look at; all by default.
    """
    torch.manual_seed(0)
    fitting, x = torch.randn(FIT, WIDTH), torch.randn(ROWS, WIDTH)
    model = offramp.attach(Small(), x[:4], exits=EXITS - 1).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # so that scores spread
    with torch.no_grad():
        labels = model.backbone(fitting).argmax(1)
    known = record(model, [(fitting, labels)], progress=False)
    trace = record(model, [(x, torch.zeros(ROWS, dtype=torch.long))], progress=False)
    rows = []
    for name, rule in every_criterion(known).items():
        if names is None or name in names:
            rows.append({"criterion": name} | _compared(model, x, trace, _policy(known, rule)))
            say(f"equality: {name}")
    return rows


def _policy(trace: Trace, rule: Criterion) -> Policy:
    """Thresholds that some samples reach at every exit, whatever the scale of the scores."""
    state: tuple[Tensor, ...] = ()
    thresholds = []
    with torch.no_grad():
        for k in range(trace.num_exits - 1):
            _, score, state = rule(trace.logits[k], state, k)
            values = score.unique()
            if len(values) < 2:
                thresholds.append(float("inf"))  # a count at the first exit tells nothing apart
                continue
            at = max(1, int(0.7 * len(values)))
            thresholds.append(float((values[at - 1].double() + values[at].double()) / 2))
    return Policy(rule, thresholds)


def _compared(model: nn.Module, x: Tensor, trace: Trace, policy: Policy) -> Row:
    expected = replay(trace, policy)
    run = offramp.Runner(model, policy, x[:8], engine="torch")(x)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "one.offramp"
        offramp.export(model, policy, x[:8], artifact)
        (file,) = artifact.glob("*.onnx")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (given,) = [n.name for n in session.get_inputs() if n.name not in _tunable(session)]
        outputs = dict(
            zip(
                [node.name for node in session.get_outputs()],
                session.run(None, {given: x.numpy()}),
                strict=True,
            )
        )
    near = _near(trace, policy)
    exits, classes = expected.exit.numpy(), expected.prediction.numpy()
    onnx_exit, onnx_class = outputs["exit"], outputs["logits"].argmax(1)
    return {
        "rows": len(x),
        "shares": (np.bincount(exits, minlength=trace.num_exits) / len(x)).tolist(),
        "runner_differs": _differs(exits, classes, run.exit, run.prediction),
        "onnx_differs": _differs(exits, classes, onnx_exit, onnx_class),
        "rows_near_a_threshold": int(near.sum()),
    }


def _differs(exits: np.ndarray, classes: np.ndarray, exit: Any, prediction: Any) -> int:  # noqa: ANN401
    other = (np.asarray(exit) != exits) | (np.asarray(prediction) != classes)
    return int(other.sum())


def _tunable(session: onnxruntime.InferenceSession) -> set[str]:
    return {node.name for node in session.get_overridable_initializers()} | {"thresholds"}


def _near(trace: Trace, policy: Policy) -> np.ndarray:
    """Rows of which some score lies within float noise of its threshold."""
    near = torch.zeros(trace.num_samples, dtype=torch.bool)
    state: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for k, threshold in enumerate(policy.thresholds_for(trace.num_exits)):
            _, score, state = policy.criterion(trace.logits[k], state, k)
            if threshold < float("inf"):
                near |= (score - threshold).abs() <= NEAR * max(1.0, abs(threshold))
    return near.numpy()
