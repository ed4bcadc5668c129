"""Inception V1, GoogLeNet (Szegedy et al., CVPR 2015)."""

from __future__ import annotations

from offramp.zoo.inception.auxiliary import (
    AUXILIARY_WEIGHT,
    AuxiliaryClassifier,
    inception_v1,
    load_torchvision,
)
from offramp.zoo.inception.network import GoogLeNet

__all__ = [
    "AUXILIARY_WEIGHT",
    "AuxiliaryClassifier",
    "GoogLeNet",
    "inception_v1",
    "load_torchvision",
]
