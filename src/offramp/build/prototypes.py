"""A head without weights: how near the mean of each class is."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer

from offramp.build.layout import channels_last, layout_of

__all__ = ["PrototypeHead"]

LEAST = 1e-12  # of a squared distance, so that its root has a slope


class PrototypeHead(LazyModuleMixin, nn.Module):
    """A feature of any common shape to minus its distances from the class means, ``(B, C)``.

    The feature's mean over space or tokens is compared with one vector for each class by Euclidean
    distance (Görmez et al., 2022, E2CM, section III). The nearest class has the largest logit, so
    that a trace of such exits is one of logits like any other; ``"class_mean"`` is the criterion
    that is made for them. The means are those of training samples, which
    :func:`offramp.train.fit_prototypes` takes in one pass: nothing is learned by gradient.

    Its width is that of the first feature it sees, which is when it is attached::

        attach(backbone, example, exits=3, heads=[PrototypeHead(10) for _ in range(3)])

    Args:
        num_classes: C.
        layout: of the feature, such as ``"NHWC"``; found when it is attached if not given.

    Attributes:
        means: (C, D), zero until they are fitted.
    """

    means: Tensor

    def __init__(self, num_classes: int, layout: str | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layout = layout
        self.register_buffer("means", UninitializedBuffer())

    def initialize_parameters(self, feature: Tensor, *args: Any) -> None:  # noqa: ANN401
        """Take the width of the first feature."""
        if isinstance(self.means, UninitializedBuffer):
            width = self.pool(feature).shape[1]
            self.means.materialize((self.num_classes, width), feature.device, feature.dtype)
            self.means.zero_()

    def pool(self, feature: Tensor) -> Tensor:
        """The mean over space or tokens, ``(B, D)``."""
        if feature.ndim == 2:
            return feature
        last = channels_last(self.layout or layout_of(tuple(feature.shape)), feature.ndim)
        inner = range(1, feature.ndim - 1) if last else range(2, feature.ndim)
        return feature.mean(tuple(inner))

    def forward(self, feature: Tensor) -> Tensor:
        """``(B, ...)`` to ``(B, C)``; computed in single precision at least."""
        device, exact = feature.device.type, torch.promote_types(feature.dtype, torch.float32)
        mixed = torch.is_autocast_enabled(device)  # asked, so that no export holds the switch
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            means = self.means.to(exact)
            # Distances are small beside what means have in common, which would leave few digits.
            centre = means.mean(0)
            point, means = self.pool(feature).to(exact) - centre, means - centre
            squares = point.square().sum(1, keepdim=True) + means.square().sum(1)
            squares = squares - 2 * point @ means.T
            return -squares.clamp(min=LEAST).sqrt().to(feature.dtype)
