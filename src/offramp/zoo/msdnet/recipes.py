"""The multi-scale dense network as a recipe."""

from __future__ import annotations

from functools import partial

import torch

from offramp.decide.calibrate import calibrate
from offramp.decide.policy import Policy
from offramp.decide.trace import Trace
from offramp.zoo.msdnet.classifiers import msdnet
from offramp.zoo.recipe import Recipe

__all__ = ["RECIPES"]


def _geometric(trace: Trace, drop: float) -> Policy:
    return calibrate(trace, "confidence", method="geometric", max_accuracy_drop=drop)


RECIPES = (
    Recipe(
        "msdnet",
        "Huang et al., Multi-Scale Dense Networks (ICLR 2018)",
        "MSDNet of 15 layers, five classifiers; CIFAR-10",
        msdnet,
        "cifar10",
        _geometric,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        epochs=30,
        batch=64,
        pad=4,
        flip=True,
        precision="auto",
    ),
)
