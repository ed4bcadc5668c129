"""The four Shallow-Deep Networks as recipes."""

from __future__ import annotations

from functools import partial

import torch

from offramp.decide.calibrate import calibrate
from offramp.decide.policy import Policy
from offramp.decide.trace import Trace
from offramp.train.schemes import Joint
from offramp.zoo.recipe import Recipe
from offramp.zoo.shallow_deep.classifiers import (
    sdn_mobilenet,
    sdn_resnet,
    sdn_vgg16,
    sdn_wide_resnet,
)

__all__ = ["RECIPES"]

_PAPER = "Kaya et al., Shallow-Deep Networks (ICML 2019)"
_GROWING = Joint(weights="growing")

# The authors' code: a step of 0.1, and more decay for the networks with most parameters.
_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
_DECAYED = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)


def _shared(trace: Trace, drop: float) -> Policy:
    return calibrate(trace, "confidence", method="shared", max_accuracy_drop=drop)


RECIPES = (
    Recipe(
        "sdn-vgg16", _PAPER, "VGG-16, six internal classifiers; CIFAR-10",
        sdn_vgg16, "cifar10", _shared, _DECAYED, _GROWING,
        epochs=15, pad=4, flip=True, precision="auto",
    ),
    Recipe(
        "sdn-resnet56", _PAPER, "ResNet-56, six internal classifiers; CIFAR-10",
        sdn_resnet, "cifar10", _shared, _SGD, _GROWING,
        epochs=30, pad=4, flip=True, precision="auto",
    ),
    Recipe(
        "sdn-wrn32-4", _PAPER, "WRN-32-4, six internal classifiers; CIFAR-10",
        sdn_wide_resnet, "cifar10", _shared, _DECAYED, _GROWING,
        epochs=8, pad=4, flip=True, precision="auto",
    ),
    Recipe(
        "sdn-mobilenet", _PAPER, "MobileNet, six internal classifiers; CIFAR-10",
        sdn_mobilenet, "cifar10", _shared, _SGD, _GROWING,
        epochs=30, pad=4, flip=True, precision="auto",
    ),
)  # fmt: skip
