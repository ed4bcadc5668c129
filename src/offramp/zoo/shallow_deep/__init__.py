"""Shallow-Deep Networks (Kaya et al., ICML 2019)."""

from __future__ import annotations

from offramp.zoo.shallow_deep.classifiers import (
    SHARES,
    InternalClassifier,
    sdn_mobilenet,
    sdn_resnet,
    sdn_vgg16,
    sdn_wide_resnet,
    shallow_deep,
)
from offramp.zoo.shallow_deep.confusion import confusion, disagreement
from offramp.zoo.shallow_deep.networks import WideResNet, mobilenet, vgg16

__all__ = [
    "SHARES",
    "InternalClassifier",
    "WideResNet",
    "confusion",
    "disagreement",
    "mobilenet",
    "sdn_mobilenet",
    "sdn_resnet",
    "sdn_vgg16",
    "sdn_wide_resnet",
    "shallow_deep",
    "vgg16",
]
