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


def _densenet() -> tuple[nn.Module, Tensor]:
    from torchvision.models import DenseNet

    model = DenseNet(12, (3, 4, 6, 4), 24, num_classes=CLASSES)
    return model, torch.randn(ROWS, 3, 64, 64)


def _mvit() -> tuple[nn.Module, Tensor]:
    """``mvit_v1_b`` with a third of its width, for 4 frames of 64 by 64."""
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = []
    for i in range(16):
        first = i in (1, 3, 14)  # where the resolution falls
        level = sum(i >= start for start in (1, 3, 14))
        widen = sum(i >= start for start in (0, 2, 13))  # the layer before widens
        wide = 32 * 2 ** max(0, sum(i > start for start in (0, 2, 13)))
        out = 32 * 2**widen
        blocks.append(
            MSBlockConfig(
                num_heads=2**level,
                input_channels=wide,
                output_channels=out,
                kernel_q=[3, 3, 3] if first else [],
                kernel_kv=[3, 3, 3],
                stride_q=[1, 2, 2] if first else [],
                stride_kv=[1, 8 >> level, 8 >> level],
            )
        )
    model = MViT(
        spatial_size=(64, 64),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=False,
        residual_with_cls_embed=False,
        rel_pos_embed=False,
        proj_after_attn=False,
        num_classes=CLASSES,
    )
    return model, torch.randn(ROWS, 3, 4, 64, 64)


TORCHVISION: tuple[Architecture, ...] = (
    _torchvision("inception", "googlenet", aux_logits=False, init_weights=True),
    Architecture("torchvision_densenet", "torchvision", "cnn", _densenet),
    _torchvision("cnn", "mobilenet_v3_small"),
    _torchvision("cnn", "squeezenet1_1"),
    _torchvision("cnn", "shufflenet_v2_x0_5"),
    Architecture("torchvision_vit", "torchvision", "vit", _vit),
    Architecture("torchvision_swin", "torchvision", "windowed", _swin),
    _torchvision("video", "r3d_18", (3, 4, 32, 32)),
    _torchvision("video", "mc3_18", (3, 4, 32, 32)),
    Architecture("torchvision_mvit_v1_b", "torchvision", "video", _mvit),
)  # fmt: skip
