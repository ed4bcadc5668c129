"""Networks of the literature."""

from __future__ import annotations

from offramp.zoo.resnet import CifarResNet, cifar_resnet

__all__ = ["CifarResNet", "cifar_resnet"]
