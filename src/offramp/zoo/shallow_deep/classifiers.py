"""Internal classifiers and the places where they stand; the four networks with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.build.cost import profile
from offramp.build.model import MultiExitModel, attach
from offramp.build.placement import resolve
from offramp.errors import DataError, HeadError, OfframpError
from offramp.zoo.resnet import cifar_resnet
from offramp.zoo.shallow_deep.networks import WideResNet, mobilenet, vgg16

__all__ = [
    "SHARES",
    "InternalClassifier",
    "sdn_mobilenet",
    "sdn_resnet",
    "sdn_vgg16",
    "sdn_wide_resnet",
    "shallow_deep",
]

# Of the cost of the network, at which the paper's internal classifiers stand.
SHARES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)

# Positions in each direction that a linear layer sees, or a few more where the size is no multiple.
_SIDE = 4


class InternalClassifier(nn.Module):
    """Mixed pooling to about 4×4, one linear layer.

    ``a * max + (1 - a) * average`` over windows that do not overlap, with one learned ``a`` for the
    whole map: mixed pooling (Lee, Gallagher and Tu, AISTATS 2016). Maps of less than
    8×8 are not pooled.

    Args:
        channels: D of the feature.
        side: H and W of it.
        num_classes: C.
    """

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        self.window = max(1, side // _SIDE)
        if self.window > 1:
            self.mix = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(channels * (side // self.window) ** 2, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, C) logits."""
        if self.window > 1:
            largest = functional.max_pool2d(feature, self.window)
            average = functional.avg_pool2d(feature, self.window)
            feature = self.mix * largest + (1 - self.mix) * average
        logits: Tensor = self.linear(feature.flatten(1))
        return logits


def shallow_deep(backbone: nn.Module, size: int = 32, channels: int = 3) -> MultiExitModel:
    """Give a network its internal classifiers, at the shares of its cost that the paper names.

    Args:
        backbone: from square images (B, channels, size, size) to (B, C) logits, its features square
            maps.
        size: side of the images.
        channels: of the images; 1 where they are grey.

    Raises:
        DataError: the network does not take such images.
        PlaceError: the network has fewer than six places where an exit can stand.
        HeadError: what stands at one of these is no square map.
    """
    example = torch.zeros(2, channels, size, size)
    try:
        found = profile(backbone, (example,))
    except OfframpError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{type(backbone).__name__} fails on images {tuple(example.shape)} with "
            f"{type(error).__name__}: {error}. Pass the size= and channels= of those it takes; "
            "other networks get exits by attach(network, example)."
        ) from error
    heads: dict[str, nn.Module] = {}
    for place in resolve(found, SHARES):
        feature = found.calls_of(place.path)[place.call].feature
        shape = () if feature is None else tuple(feature.shape)
        if len(shape) != 4 or shape[2] != shape[3]:
            raise HeadError(
                f"{place.name!r} yields {shape}; an internal classifier reads square maps "
                "(B, D, S, S). Give such a network exits by attach(network, example)."
            )
        heads[place.name] = InternalClassifier(shape[1], shape[2], found.num_classes)
    return attach(backbone, example, exits=heads)


def sdn_vgg16(num_classes: int = 10, width: int = 64) -> MultiExitModel:
    """VGG-16 with six internal classifiers; see :func:`vgg16`. Takes (B, 3, 32, 32)."""
    return shallow_deep(vgg16(num_classes, width))


def sdn_resnet(num_classes: int = 10, depth: int = 56, width: int = 16) -> MultiExitModel:
    """ResNet-56 with six internal classifiers; see :func:`cifar_resnet`. Takes (B, 3, 32, 32)."""
    return shallow_deep(cifar_resnet(depth, num_classes, width=width))


def sdn_wide_resnet(
    num_classes: int = 10, depth: int = 32, widening: int = 4, width: int = 16
) -> MultiExitModel:
    """WRN-32-4 with six internal classifiers; see :class:`WideResNet`. Takes (B, 3, 32, 32)."""
    return shallow_deep(WideResNet(depth, widening, num_classes, width))


def sdn_mobilenet(num_classes: int = 10, width: int = 32) -> MultiExitModel:
    """MobileNet with six internal classifiers; see :func:`mobilenet`. Takes (B, 3, 32, 32)."""
    return shallow_deep(mobilenet(num_classes, width))
