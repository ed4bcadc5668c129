"""The multi-scale dense network for 32×32 images, without its early classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from offramp.errors import DataError

__all__ = ["Classifier", "Convolution", "DenseNode", "MSDNet"]

SCALES = 3

_Made = dict[tuple[int, int], Tensor]


class Convolution(nn.Sequential):
    """A convolution, batch normalisation and ReLU: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class DenseNode(nn.Module):
    """One layer at one scale: what it is given, and new channels behind it.

    New channels come from the features of the same scale, and half of them, by a convolution of
    stride 2, from the next finer scale where there is one (section 4 of the paper). Each of these
    convolutions stands behind a 1×1 bottleneck.

    Args:
        channels: of the same scale.
        growth: new channels.
        factor: width of the bottleneck, in units of what it leads to.
        finer: channels of the next finer scale; ``None`` without one.
        finer_factor: likewise of the bottleneck there.
    """

    def __init__(
        self,
        channels: int,
        growth: int,
        factor: int,
        finer: int | None = None,
        finer_factor: int = 1,
    ) -> None:
        super().__init__()
        self.down = None
        if finer is not None:
            self.down = _bottlenecked(finer, growth // 2, finer_factor, stride=2)
            growth -= growth // 2
        self.same = _bottlenecked(channels, growth, factor, stride=1)

    def forward(self, same: Tensor, finer: Tensor | None = None) -> Tensor:
        """(B, C, H, W), and (B, C', 2H, 2W) of the finer scale -> (B, C + growth, H, W)."""
        parts = [same]
        if self.down is not None:
            parts.append(self.down(finer))
        return torch.cat([*parts, self.same(same)], 1)


class Classifier(nn.Sequential):
    """Two 3×3 convolutions of stride 2 and 128 channels, 2×2 average, one linear layer.

    (B, D, 8, 8) -> (B, C).
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            Convolution(channels, 128, 3, stride=2),
            Convolution(128, 128, 3, stride=2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, num_classes),
        )
        _initialise(self)


class MSDNet(nn.Module):
    """A multi-scale dense network: columns of three scales, 32×32, 16×16 and 8×8.

    Huang et al. (ICLR 2018), section 4, with the network reduction: the finest scale is left
    out after a third of the layers and the next after two thirds; there, a 1×1 convolution halves
    the channels of each scale. A value is computed when a classifier, or the output, first needs
    it, and not before (the paper's lazy computation).

    Attributes:
        places: for each classifier, the address of the coarsest scale's features before it; the
            last are those of the output.
        channels: for each of these, its channels.

    Args:
        steps: layers before the first classifier, between it and the second, and so on.
        num_classes: C.
        width: channels of the finest scale's first layer; the others have twice and four times as
            many.
        growth: channels that a layer adds at the finest scale; likewise.

    Raises:
        DataError: fewer than three layers, or a size that is not positive.
    """

    def __init__(
        self, steps: Sequence[int], num_classes: int = 10, width: int = 16, growth: int = 6
    ) -> None:
        super().__init__()
        depth = sum(steps)
        if depth < SCALES or min(steps, default=0) < 1:
            raise DataError(
                f"A multi-scale dense network has {SCALES} layers or more and at least one before "
                f"each classifier, got steps={tuple(steps)}. The paper's are (1, 2, 3, 4, 5)."
            )
        if min(num_classes, width, growth) < 1:
            raise DataError(
                f"Classes, width and growth must be positive, got num_classes={num_classes}, "
                f"width={width}, growth={growth}."
            )
        channels = [width * 2**scale for scale in range(SCALES)]
        columns = [_first(channels)]
        ends = set(accumulate(steps))
        places, widths, finest = [], [], 0
        for layer in range(1, depth + 1):
            start = SCALES * (layer - 1) // depth
            if start > finest:
                columns.append(_transition(channels, finest))
                channels = [wide // 2 for wide in channels]
            columns.append(_layer(channels, start, finest, growth))
            channels = [wide + growth * 2**scale for scale, wide in enumerate(channels)]
            finest = start
            if layer in ends:
                places.append(len(columns) - 1)
                widths.append(channels[-1])
        self.columns = nn.ModuleList(columns)
        self.places = tuple(f"columns.{column}.{_name(SCALES - 1)}" for column in places)
        self.channels = tuple(widths)
        _initialise(self)
        self.classifier = Classifier(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, C) logits."""
        logits: Tensor = self.classifier(self._value(len(self.columns) - 1, SCALES - 1, x, {}))
        return logits

    def _value(self, column: int, scale: int, images: Tensor, made: _Made) -> Tensor:
        """The features of one column at one scale; ``made`` holds those that are known."""
        if (column, scale) in made:
            return made[column, scale]
        node = self.get_submodule(f"columns.{column}.{_name(scale)}")
        if column == 0:
            given = [self._value(0, scale - 1, images, made) if scale else images]
        else:  # the coarse first, so that what an early classifier reads is there before the rest
            given = [self._value(column - 1, scale, images, made)]
            if isinstance(node, DenseNode) and node.down is not None:
                given.append(self._value(column - 1, scale - 1, images, made))
        made[column, scale] = cast("Tensor", node(*given))
        return made[column, scale]


def _name(scale: int) -> str:
    return f"scale{scale}"


def _first(channels: Sequence[int]) -> nn.ModuleDict:
    """From the images to the finest scale, and from each scale to the next."""
    sources = [3, *channels]
    return nn.ModuleDict(
        {
            _name(scale): Convolution(sources[scale], wide, 3, stride=2 if scale else 1)
            for scale, wide in enumerate(channels)
        }
    )


def _transition(channels: Sequence[int], finest: int) -> nn.ModuleDict:
    """Half of the channels, at every scale there is."""
    return nn.ModuleDict(
        {
            _name(scale): Convolution(channels[scale], channels[scale] // 2, 1)
            for scale in range(finest, SCALES)
        }
    )


def _layer(channels: Sequence[int], start: int, finest: int, growth: int) -> nn.ModuleDict:
    """A layer for the scales from ``start``; the column before it has those from ``finest``."""
    nodes = {}
    for scale in range(start, SCALES):
        finer = channels[scale - 1] if scale > finest else None
        nodes[_name(scale)] = DenseNode(
            channels[scale], growth * 2**scale, 2**scale, finer, 2 ** max(scale - 1, 0)
        )
    return nn.ModuleDict(nodes)


def _bottlenecked(in_channels: int, out_channels: int, factor: int, stride: int) -> nn.Sequential:
    inner = min(in_channels, factor * out_channels)
    return nn.Sequential(
        Convolution(in_channels, inner, 1), Convolution(inner, out_channels, 3, stride)
    )


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
