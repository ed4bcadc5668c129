"""Networks of torchvision, its video networks among them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures.entry import CLASSES, ROWS, Architecture

__all__ = ["TORCHVISION"]


def _build(name: str, shape: tuple[int, ...], settings: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **settings)
    return model, torch.randn(ROWS, *shape)


def _torchvision(
    kind: str, name: str, shape: tuple[int, ...] = (3, 64, 64), **settings: Any
) -> Architecture:
    build = partial(_build, name, shape, settings)
    return Architecture(f"torchvision_{name}", "torchvision", kind, build)


def _vit() -> tuple[nn.Module, Tensor]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 6, 4, 64, 128, num_classes=CLASSES)
    return model, torch.randn(ROWS, 3, 32, 32)


def _swin() -> tuple[nn.Module, Tensor]:
    from torchvision.models import SwinTransformer

    model = SwinTransformer([4, 4], 24, [2, 2, 2, 2], [1, 2, 4, 8], [4, 4], num_classes=CLASSES)
    return model, torch.randn(ROWS, 3, 64, 64)


TORCHVISION: tuple[Architecture, ...] = (
    _torchvision("inception", "googlenet", aux_logits=False, init_weights=True),
    _torchvision("cnn", "densenet121"),
    _torchvision("cnn", "mobilenet_v3_small"),
    _torchvision("cnn", "squeezenet1_1"),
    _torchvision("cnn", "shufflenet_v2_x0_5"),
    Architecture("torchvision_vit", "torchvision", "vit", _vit),
    Architecture("torchvision_swin", "torchvision", "windowed", _swin),
    _torchvision("video", "r3d_18", (3, 4, 32, 32)),
    _torchvision("video", "mc3_18", (3, 4, 32, 32)),
    _torchvision(
        "video", "mvit_v1_b", (3, 4, 32, 32), spatial_size=(32, 32), temporal_size=4
    ),
)  # fmt: skip
