"""The residual networks for small images (He et al., 2016, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import DataError

__all__ = ["CifarResNet", "ResidualBlock", "cifar_resnet"]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters: (B, C, H, W) -> (B, C', H', W').

    Where the shape changes, the shortcut takes every second pixel and fills the new channels with
    zeros, half of them on either side (option A).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.added = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.added:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return torch.relu(y + x)


class CifarResNet(nn.Module):
    """A residual network for small images: three groups of blocks, pooling, one linear layer.

    Its parameters have the names of the usual CIFAR-10 checkpoints (``conv1``, ``layer1.0.conv1``,
    ..., ``linear``); those were saved from a parallel wrapper, so drop ``module.`` from their keys.

    Args:
        depth: 6n + 2 layers with weights: 8, 14, 20, 32, 44, 56, 110.
        num_classes: C.
        in_channels: of the images.
        width: channels of the first group; the others have twice and four times as many.

    Raises:
        DataError: a depth that is not 6n + 2, or a size that is not positive.
    """

    def __init__(
        self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise DataError(
                f"The depth of this residual network is 6n + 2 (8, 14, 20, 32, 44, 56, 110), "
                f"got {depth}."
            )
        if min(num_classes, in_channels, width) < 1:
            raise DataError(
                f"Classes, channels and width must be positive, got num_classes={num_classes}, "
                f"in_channels={in_channels}, width={width}."
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _group(blocks, width, width, 1)
        self.layer2 = _group(blocks, width, 2 * width, 2)
        self.layer3 = _group(blocks, 2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # He et al., 2015, equation 14
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, C) logits; H and W at least 4."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def cifar_resnet(
    depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16
) -> CifarResNet:
    """Build a :class:`CifarResNet`; its arguments and errors are that class's."""
    return CifarResNet(depth, num_classes, in_channels, width)


def _group(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(in_channels, out_channels, stride)
    rest = [ResidualBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
