"""The multi-scale dense network with its classifiers as exits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offramp.build.model import MultiExitModel, attach
from offramp.zoo.msdnet.network import Classifier, MSDNet

__all__ = ["ANYTIME", "BUDGETED", "msdnet"]

# Layers between classifiers: the paper's networks for CIFAR.
ANYTIME = (4, *(2,) * 10)
BUDGETED = (1, 2, 3, 4, 5)


def msdnet(
    num_classes: int = 10, steps: Sequence[int] = BUDGETED, *, width: int = 16, growth: int = 6
) -> MultiExitModel:
    """A multi-scale dense network with a classifier after each step. Takes (B, 3, 32, 32).

    Args:
        num_classes: C.
        steps: :data:`ANYTIME`, eleven classifiers at even distances in 24 layers; :data:`BUDGETED`,
            five at growing distances in 15 layers; or others, two at least.
        width: see :class:`MSDNet`.
        growth: see :class:`MSDNet`.

    Raises:
        DataError: steps or a size that the network does not take.
        PlaceError: a single step, which leaves no early classifier.
    """
    backbone = MSDNet(steps, num_classes, width, growth)
    heads = {
        place: Classifier(channels, num_classes)
        for place, channels in zip(backbone.places[:-1], backbone.channels[:-1], strict=True)
    }
    return attach(backbone, torch.zeros(2, 3, 32, 32), exits=heads)
