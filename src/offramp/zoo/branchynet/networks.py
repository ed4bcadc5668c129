"""The networks of BranchyNet, plain and with the branches of the paper.

The branches of LeNet and AlexNet begin with what the network itself does next (pooling, for AlexNet
a response normalisation, too; nothing that learns). They stand behind that: the function is the
same, it is computed once, and what waits for the decision is a quarter as large.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from offramp.build.model import MultiExitModel, attach
from offramp.zoo.resnet import cifar_resnet

__all__ = ["alexnet", "b_alexnet", "b_lenet", "b_resnet", "lenet"]


def lenet(num_classes: int = 10) -> nn.Sequential:
    """LeNet-5 as BranchyNet has it: three convolutions, two linear layers; (B, 1, 28, 28)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 5, 5, padding=3),
            pool1=_halved(),
            conv2=nn.Conv2d(5, 10, 5, padding=3),
            pool2=_halved(),
            conv3=nn.Conv2d(10, 20, 5, padding=3),
            pool3=_halved(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(20 * 6 * 6, 84),
            classifier=nn.Linear(84, num_classes),
        )
    )


def b_lenet(num_classes: int = 10) -> MultiExitModel:
    """B-LeNet: one branch of a convolution and a linear layer behind the first convolution.

    Takes (B, 1, 28, 28).
    """
    branch = nn.Sequential(
        nn.Conv2d(5, 10, 3, padding=1),
        _halved(),
        nn.Flatten(),
        nn.Linear(10 * 8 * 8, num_classes),
    )
    return attach(lenet(num_classes), torch.zeros(2, 1, 28, 28), exits={"pool1": branch})


def alexnet(num_classes: int = 10) -> nn.Sequential:
    """AlexNet for 32×32 images: five convolutions, three linear layers; (B, 3, 32, 32)."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 32, 5, padding=2),
            norm1=_normalised(),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            norm2=_normalised(),
            conv3=nn.Conv2d(64, 96, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(96, 96, 3, padding=1),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(96, 64, 3, padding=1),
            relu5=nn.ReLU(),
            pool5=_overlapping(),
            flatten=nn.Flatten(),
            hidden1=_hidden(64 * 4 * 4, 256),
            hidden2=_hidden(256, 128),
            classifier=nn.Linear(128, num_classes),
        )
    )


def b_alexnet(num_classes: int = 10) -> MultiExitModel:
    """B-AlexNet: a branch behind each of the first two convolutions.

    The first has two convolutions and a linear layer, the second one convolution and a linear
    layer. Takes (B, 3, 32, 32).
    """
    first = nn.Sequential(
        *_convolution(32, 32), *_convolution(32, 32), *_closing(32, 8, num_classes)
    )
    second = nn.Sequential(*_convolution(64, 32), *_closing(32, 4, num_classes))
    return attach(
        alexnet(num_classes), torch.zeros(2, 3, 32, 32), exits={"norm1": first, "norm2": second}
    )


def b_resnet(depth: int = 110, num_classes: int = 10) -> MultiExitModel:
    """B-ResNet: branches behind the second convolution and behind the first group of blocks.

    The first has three convolutions and a linear layer, the second two convolutions and a linear
    layer. In ResNet-110 the first group ends with the 37th convolution, the paper's place. Takes
    (B, 3, 32, 32).

    Args:
        depth: 6n + 2.
        num_classes: C.

    Raises:
        DataError: a depth that is not 6n + 2.
    """
    backbone = cifar_resnet(depth, num_classes)
    blocks = (depth - 2) // 6
    first = nn.Sequential(
        nn.BatchNorm2d(16), nn.ReLU(), *_reduced(16), *_reduced(32), *_reduced(32, stride=1),
        nn.Flatten(), nn.Linear(32 * 8 * 8, num_classes),
    )  # fmt: skip
    second = nn.Sequential(
        *_reduced(16), *_reduced(32), nn.Flatten(), nn.Linear(32 * 8 * 8, num_classes)
    )
    return attach(
        backbone,
        torch.zeros(2, 3, 32, 32),
        exits={"layer1.0.conv1": first, f"layer1.{blocks - 1}": second},
    )


def _halved() -> nn.Sequential:
    return nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.ReLU())


def _overlapping() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def _normalised() -> nn.Sequential:
    # torch divides alpha by the size of the window, Krizhevsky's equation does not.
    response = nn.LocalResponseNorm(3, alpha=3 * 5e-5, beta=0.75, k=2.0)
    return nn.Sequential(nn.ReLU(), _overlapping(), response)


def _convolution(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU()]


def _closing(channels: int, side: int, num_classes: int) -> list[nn.Module]:
    return [_overlapping(), nn.Flatten(), nn.Linear(channels * side * side, num_classes)]


def _reduced(in_channels: int, stride: int = 2) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, 32, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(32), nn.ReLU()]


def _hidden(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.5))
