"""Inception V1, the network GoogLeNet, without its auxiliary classifiers (Szegedy et al., 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.errors import DataError

__all__ = ["Convolution", "GoogLeNet", "Inception"]

# Table 1 of the paper: 1×1, reduced and 3×3, reduced and 5×5, pooled and projected channels.
_MODULES = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


class Convolution(nn.Module):
    """A convolution, batch normalisation and ReLU: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return torch.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four branches side by side, their channels one after the other; figure 2(b) of the paper.

    Args:
        in_channels: C.
        widths: channels of: the 1×1 branch, the reduction before the 3×3 and the 3×3, the reduction
            before the 5×5 and the 5×5, the projection after the pooling.
        kernel: size of the third branch.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], kernel: int) -> None:
        super().__init__()
        one, reduced3, three, reduced5, five, pooled = widths
        self.branch1 = Convolution(in_channels, one, 1)
        self.branch2 = nn.Sequential(
            Convolution(in_channels, reduced3, 1), Convolution(reduced3, three, 3, padding=1)
        )
        self.branch3 = nn.Sequential(
            Convolution(in_channels, reduced5, 1),
            Convolution(reduced5, five, kernel, padding=kernel // 2),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True),
            Convolution(in_channels, pooled, 1),
        )
        self.out_channels = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """Nine Inception modules behind a stem, pooling, dropout, one linear layer.

    As in torchvision, and unlike the paper, with batch normalisation in place of local response
    normalisation, and with pooling of 2×2 instead of 3×3 before module 5a. Parameters have the
    names of torchvision's ``googlenet``.

    Args:
        num_classes: C.
        kernel: of the third branch of every module: 5 in the paper, 3 in torchvision's weights.
        width: factor on all channels but the images'; 1 has the paper's channels.
        dropout: before the classifier.

    Raises:
        DataError: a kernel that is not 3 or 5, or a width that leaves no channel.
    """

    def __init__(
        self, num_classes: int = 1000, kernel: int = 5, width: float = 1.0, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if kernel not in (3, 5):
            raise DataError(
                f"The third branch of an Inception module has a kernel of 5 (the paper) or 3 "
                f"(torchvision's weights), got kernel={kernel}."
            )
        if int(16 * width) < 1 or num_classes < 1:
            raise DataError(
                f"Width and classes must leave at least one channel, got width={width:g}, "
                f"num_classes={num_classes}. Expected a width of at least 1/16."
            )
        stem, channels = int(64 * width), int(192 * width)
        self.conv1 = Convolution(3, stem, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = Convolution(stem, stem, 1)
        self.conv3 = Convolution(stem, channels, 3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        for name, widths in _MODULES.items():
            if name == "inception4a":
                self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
            if name == "inception5a":
                self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
            module = Inception(channels, [int(wide * width) for wide in widths], kernel)
            self.add_module(name, module)
            channels = module.out_channels
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C) logits; H and W at least 33."""
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        for name in _MODULES:
            if name == "inception4a":
                x = self.maxpool3(x)
            if name == "inception5a":
                x = self.maxpool4(x)
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(self.dropout(x.mean(dim=(2, 3))))
        return logits
