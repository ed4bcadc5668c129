"""Gradient norm by layer over training, noted in passing by every run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from offramp.build.model import MultiExitModel
from offramp.train.optimizers import OptimizerFactory

__all__ = ["Counts", "Norms", "read_norms"]

EVERY = 20  # steps
PERIODS = 4  # of a training, over which norms are averaged


class Counts(Protocol):
    """What knows how many steps were taken."""

    step: int


class Norms:
    """An optimiser factory whose optimisers note the gradients that they used.

    Args:
        make: makes the optimiser.
        model: whose backbone is looked at.
        loader: knows the step.
        path: a line of JSON is appended to it every so many steps.
    """

    def __init__(
        self, make: OptimizerFactory, model: MultiExitModel, loader: Counts, path: Path
    ) -> None:
        self.make, self.loader, self.path = make, loader, path
        self.layers = {p: _layer(name) for name, p in model.backbone.named_parameters()}

    def __call__(self, parameters: list[Parameter]) -> Optimizer:
        optimizer = self.make(parameters)
        # Not before the step: in Lightning, gradients are computed within it.
        optimizer.register_step_post_hook(lambda *_: self.note())
        return optimizer

    def note(self) -> None:
        """Write down the norm of the gradient of every layer, if it is time."""
        if self.loader.step % EVERY:
            return
        gradients = defaultdict(list)
        for parameter, layer in self.layers.items():
            if parameter.grad is not None:
                gradients[layer].append(parameter.grad.flatten())
        norms = {layer: float(torch.cat(parts).norm()) for layer, parts in gradients.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.loader.step, "norms": norms}) + "\n")


def read_norms(path: Path, steps: int) -> dict[str, list[float | None]]:
    """The mean norm of every layer in each quarter of a training.

    Args:
        path: what :class:`Norms` wrote; a step that was done twice, after an interruption, counts
            once.
        steps: of the whole training.

    Returns:
        By layer, in the order of the network; ``None`` where it was frozen.
    """
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    by_step: dict[int, dict[str, Any]] = {line["step"]: line["norms"] for line in lines}
    found: dict[str, list[list[float]]] = {}
    for step, norms in sorted(by_step.items()):
        for layer, norm in norms.items():
            periods = found.setdefault(layer, [[] for _ in range(PERIODS)])
            periods[min(PERIODS * step // steps, PERIODS - 1)].append(norm)
    return {
        layer: [sum(period) / len(period) if period else None for period in periods]
        for layer, periods in sorted(found.items(), key=lambda item: _order(item[0]))
    }


def _layer(name: str) -> str:
    """``layer2.1.conv1.weight`` -> ``layer2.1``; the first convolution is the ``stem``."""
    parts = name.split(".")
    if parts[0].startswith("layer"):
        return ".".join(parts[:2])
    return "stem" if parts[0] in ("conv1", "bn1") else parts[0]


def _order(layer: str) -> tuple[int, str, int]:
    group, _, block = layer.partition(".")
    return {"stem": 0, "linear": 2, "fc": 2}.get(group, 1), group, int(block or 0)
