"""The networks of Shallow-Deep Networks for 32×32 images; ResNet-56 is in ``zoo/resnet.py``."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn

from offramp.errors import DataError

__all__ = ["SeparableBlock", "WideBlock", "WideResNet", "mobilenet", "vgg16"]

_Network = TypeVar("_Network", bound=nn.Module)

# Configuration D of Simonyan and Zisserman (2015): channels in units of the first layer's, and
# whether the maps are halved behind the convolution.
_VGG16 = (
    (1, False), (1, True), (2, False), (2, True), (4, False), (4, False), (4, True),
    (8, False), (8, False), (8, True), (8, False), (8, False), (8, True),
)  # fmt: skip

# Table 1 of Howard et al. (2017): channels in units of the stem's, and the stride. For small images
# the stem and the second halving keep their size.
_MOBILENET = (
    (2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1), (16, 1), (16, 1), (16, 1), (16, 1),
    (32, 2), (32, 1),
)  # fmt: skip


def vgg16(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """VGG-16 with batch normalisation: (B, 3, 32, 32) to (B, num_classes).

    Configuration D of Simonyan and Zisserman (ICLR 2015): thirteen convolutions and three linear
    layers, these of 512 where ImageNet's has 4096.

    Args:
        num_classes: C.
        width: channels of the first two convolutions.

    Raises:
        DataError: a size that is not positive.
    """
    _check(num_classes, width)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, (factor, halved) in enumerate(_VGG16, 1):
        layers = [*_convolution(channels, factor * width), *([nn.MaxPool2d(2)] if halved else [])]
        parts[f"conv{number}"] = nn.Sequential(*layers)
        channels = factor * width
    parts["flatten"] = nn.Flatten()
    for name in ("hidden1", "hidden2"):
        parts[name] = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Dropout(0.5))
    parts["classifier"] = nn.Linear(channels, num_classes)
    return _initialised(nn.Sequential(parts))


def mobilenet(num_classes: int = 10, width: int = 32) -> nn.Sequential:
    """MobileNet for small images: (B, 3, 32, 32) to (B, num_classes).

    Howard et al., "MobileNets" (2017): a convolution and thirteen separable blocks; the maps are
    halved four times instead of five.

    Args:
        num_classes: C.
        width: channels of the first convolution.

    Raises:
        DataError: a size that is not positive.
    """
    _check(num_classes, width)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = nn.Sequential(*_convolution(3, width))
    channels = width
    for number, (factor, stride) in enumerate(_MOBILENET, 1):
        parts[f"block{number}"] = SeparableBlock(channels, factor * width, stride)
        channels = factor * width
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["classifier"] = nn.Linear(channels, num_classes)
    return _initialised(nn.Sequential(parts))


class SeparableBlock(nn.Module):
    """A 3×3 convolution of each channel by itself, then a 1×1 across channels, both normalised.

    (B, C, H, W) -> (B, C', H', W').
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = torch.relu(self.bn1(self.depthwise(x)))
        return torch.relu(self.bn2(self.pointwise(x)))


class WideBlock(nn.Module):
    """Normalisation before each of two 3×3 convolutions, dropout between: (B, C, H, W) likewise.

    The shortcut is a 1×1 convolution where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = self.conv1(torch.relu(self.bn1(x)))
        y = self.conv2(self.dropout(torch.relu(self.bn2(y))))
        added: Tensor = y + self.shortcut(x)
        return added


class WideResNet(nn.Module):
    """A wide residual network for small images: three groups of blocks, pooling, one linear layer.

    Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016).

    Args:
        depth: 6n + 2, the shortcuts not counted; the paper of wide networks counts two of them.
        widening: factor on the channels of the groups.
        num_classes: C.
        width: channels before the first group, and of it before widening.
        dropout: between the convolutions of a block.

    Raises:
        DataError: a depth that is not 6n + 2, or a size that is not positive.
    """

    def __init__(
        self,
        depth: int = 32,
        widening: int = 4,
        num_classes: int = 10,
        width: int = 16,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise DataError(
                f"The depth of this wide residual network is 6n + 2 (8, 14, 20, 26, 32, 38), got "
                f"{depth}."
            )
        _check(num_classes, min(width, widening))
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        channels = width
        for number in (1, 2, 3):
            wide = widening * width * 2 ** (number - 1)
            blocks = [
                WideBlock(wide if k else channels, wide, 1 if k or number == 1 else 2, dropout)
                for k in range((depth - 2) // 6)
            ]
            self.add_module(f"group{number}", nn.Sequential(*blocks))
            channels = wide
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        _initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C) logits; H and W at least 4."""
        x = self.conv1(x)
        for number in (1, 2, 3):
            x = self.get_submodule(f"group{number}")(x)
        logits: Tensor = self.linear(torch.relu(self.bn(x)).mean(dim=(2, 3)))
        return logits


def _convolution(in_channels: int, out_channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


def _initialised(network: _Network) -> _Network:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _check(num_classes: int, width: int) -> None:
    if min(num_classes, width) < 1:
        raise DataError(
            f"Classes and width must be positive, got num_classes={num_classes}, width={width}."
        )
