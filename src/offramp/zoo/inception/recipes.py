"""Inception V1 as a recipe, for images of 64×64."""

from __future__ import annotations

from functools import partial

import torch

from offramp.decide.calibrate import calibrate
from offramp.decide.policy import Policy
from offramp.decide.trace import Trace
from offramp.train.schemes import Joint
from offramp.zoo.inception.auxiliary import AUXILIARY_WEIGHT, inception_v1
from offramp.zoo.recipe import Recipe

__all__ = ["RECIPES"]


def _calibrated(trace: Trace, drop: float) -> Policy:
    return calibrate(trace, "confidence", max_accuracy_drop=drop)


RECIPES = (
    Recipe(
        "inception-v1",
        "Szegedy et al., Going deeper with convolutions (CVPR 2015)",
        "GoogLeNet, its auxiliary classifiers as exits; Tiny-ImageNet, 20 classes",
        partial(inception_v1, size=64),
        "tiny-imagenet-20",
        _calibrated,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=2e-4),
        Joint(weights=(AUXILIARY_WEIGHT, AUXILIARY_WEIGHT, 1.0)),
        epochs=40,
        batch=64,
        pad=4,
        flip=True,
        precision="auto",
    ),
)
