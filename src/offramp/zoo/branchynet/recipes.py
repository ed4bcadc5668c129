"""BranchyNet's three systems as recipes."""

from __future__ import annotations

from functools import partial

import torch

from offramp.decide.policy import Policy
from offramp.decide.trace import Trace
from offramp.train.schemes import Joint
from offramp.zoo.branchynet.networks import b_alexnet, b_lenet, b_resnet
from offramp.zoo.branchynet.screening import screen
from offramp.zoo.recipe import Recipe

__all__ = ["RECIPES"]

_PAPER = "Teerapittayanon et al., BranchyNet (ICPR 2016)"

# The paper: Adam with a step of 0.001 and decay rates of 0.99 and 0.999.
_ADAM = partial(torch.optim.Adam, lr=1e-3, betas=(0.99, 0.999))
_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _joint(branches: int) -> Joint:
    """The paper's weights: 1 for every branch, 0.3 for the last exit."""
    return Joint(weights=(*(1.0,) * branches, 0.3))


def _screened(trace: Trace, drop: float) -> Policy:
    return screen(trace, max_accuracy_drop=drop)


RECIPES = (
    Recipe(
        "b-lenet", _PAPER, "LeNet-5, one branch; MNIST or Fashion-MNIST",
        b_lenet, "mnist", _screened, _ADAM, _joint(1), epochs=6,
    ),
    Recipe(
        "b-alexnet", _PAPER, "AlexNet for small images, two branches; CIFAR-10",
        b_alexnet, "cifar10", _screened, _ADAM, _joint(2),
        epochs=20, pad=4, flip=True, precision="auto",
    ),
    Recipe(
        "b-resnet110", _PAPER, "ResNet-110, two branches; CIFAR-10",
        partial(b_resnet, 110), "cifar10", _screened, _SGD, _joint(2),
        epochs=30, pad=4, flip=True, precision="auto",
    ),
)  # fmt: skip
