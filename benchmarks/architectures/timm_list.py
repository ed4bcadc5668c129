"""Families of timm: the smallest of each, at a small image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures.entry import CLASSES, ROWS, Architecture

__all__ = ["TIMM"]


def _build(name: str, size: int, settings: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)
    return model, torch.randn(ROWS, 3, size, size)


def _timm(kind: str, name: str, size: int = 64, **settings: Any) -> Architecture:
    return Architecture(name, "timm", kind, partial(_build, name, size, settings))


TIMM: tuple[Architecture, ...] = (
    # convolutional
    _timm("cnn", "resnet10t"),
    _timm("cnn", "resnetv2_18"),
    _timm("cnn", "resnest14d"),
    _timm("cnn", "skresnet18"),
    _timm("cnn", "res2net50_14w_8s", layers=(1, 1, 2, 1)),
    _timm("cnn", "regnety_002"),
    _timm("cnn", "densenet121", growth_rate=12, block_config=(3, 4, 6, 4)),
    _timm("inception", "inception_v3", 139),
    _timm("inception", "inception_next_atto"),
    _timm("branches", "hrnet_w18_small"),
    _timm("branches", "dla34"),
    _timm("cnn", "dpn48b", k_sec=(1, 1, 2, 1)),
    _timm("cnn", "ese_vovnet19b_slim_dw"),
    _timm("cnn", "cs3darknet_s"),
    _timm("cnn", "cspnext_tiny"),
    _timm("cnn", "hgnetv2_b0"),
    _timm("cnn", "ghostnet_050"),
    _timm("cnn", "repghostnet_050"),
    _timm("cnn", "mobilenetv2_035"),
    _timm("cnn", "mobilenetv3_small_050"),
    _timm("cnn", "mobilenetv4_conv_small_035"),
    _timm("cnn", "lcnet_035"),
    _timm("cnn", "efficientnet_b0"),
    _timm("cnn", "tf_efficientnetv2_b0"),
    _timm("cnn", "mixnet_s"),
    _timm("cnn", "rexnet_100"),
    _timm("cnn", "xception41"),
    _timm("cnn", "nf_regnet_b0"),
    _timm("cnn", "test_nfnet"),
    _timm("cnn", "convnext_atto", depths=(1, 1, 2, 1)),
    _timm("cnn", "convnextv2_atto", depths=(1, 1, 2, 1)),
    _timm("cnn", "convmixer_768_32", 28),
    _timm("cnn", "repvgg_a0"),
    _timm("cnn", "mobileone_s0"),
    _timm("cnn", "fasternet_t0"),
    _timm("cnn", "starnet_s050"),
    _timm("cnn", "mambaout_femto", depths=(1, 1, 3, 1)),
    _timm("cnn", "test_byobnet"),
    # vision transformers
    _timm("vit", "vit_tiny_patch16_224", img_size=64, depth=6),
    _timm("vit", "vit_tiny_r_s16_p8_224", img_size=64, depth=6),
    _timm("vit", "test_vit_relpos", img_size=64),
    _timm("vit", "samvit_base_patch16_224", img_size=64, embed_dim=96, depth=4, num_heads=3,
          global_attn_indexes=(1, 3), window_size=2),
    _timm("vit", "deit_tiny_distilled_patch16_224", img_size=64, depth=6),
    _timm("vit", "deit3_small_patch16_224", img_size=64, depth=6),
    _timm("vit", "beit_base_patch16_224", img_size=64, embed_dim=96, depth=6, num_heads=3),
    _timm("vit", "eva02_tiny_patch14_224", 56, img_size=56, depth=6),
    _timm("vit", "cait_xxs24_224", img_size=64, depth=8),
    _timm("vit", "crossvit_9_240", 240),
    _timm("vit", "tnt_s_patch16_224", img_size=64, depth=6),
    _timm("vit", "pit_ti_224", img_size=64, depth=(1, 2, 1)),
    _timm("vit", "xcit_nano_12_p16_224", img_size=64, depth=4),
    _timm("vit", "convit_tiny", img_size=64, depth=6, local_up_to_layer=4),
    _timm("vit", "volo_d1_224", img_size=64),
    _timm("vit", "hiera_tiny_224", img_size=64, embed_dim=24, stages=(1, 1, 2, 1)),
    _timm("vit", "mvitv2_tiny", img_size=64),
    _timm("vit", "naflexvit_base_patch16_gap", embed_dim=96, depth=4, num_heads=3),
    # windowed
    _timm("windowed", "swin_tiny_patch4_window7_224", img_size=64, embed_dim=32,
          depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), window_size=4),
    _timm("windowed", "swinv2_tiny_window8_256", img_size=64, embed_dim=32,
          depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), window_size=4),
    _timm("windowed", "swinv2_cr_tiny_224", img_size=64, embed_dim=32,
          depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), window_size=4),
    _timm("windowed", "test_maxvit", img_size=64),
    _timm("windowed", "test_coatnet", img_size=64),
    _timm("windowed", "gcvit_xxtiny", img_size=64),
    _timm("windowed", "davit_tiny", 64, embed_dims=(24, 48, 96, 192), num_heads=(1, 2, 4, 8),
          depths=(1, 1, 2, 1)),
    _timm("windowed", "nest_tiny", img_size=64),
    _timm("windowed", "twins_svt_small", img_size=64, depths=(1, 1, 2, 1)),
    _timm("windowed", "focalnet_tiny_srf"),
    # hybrid
    _timm("hybrid", "levit_128s", img_size=64),
    _timm("hybrid", "mobilevit_xxs"),
    _timm("hybrid", "mobilevitv2_050"),
    _timm("hybrid", "efficientformer_l1", 224),
    _timm("hybrid", "efficientformerv2_s0", img_size=64),
    _timm("hybrid", "efficientvit_b0"),
    _timm("hybrid", "efficientvit_m0", 224),
    _timm("hybrid", "edgenext_xx_small"),
    _timm("hybrid", "fastvit_t8"),
    _timm("hybrid", "repvit_m0_9"),
    _timm("hybrid", "coat_tiny", img_size=64),
    _timm("hybrid", "pvt_v2_b0", depths=(1, 1, 2, 1)),
    _timm("hybrid", "swiftformer_xs"),
    _timm("hybrid", "tiny_vit_5m_224"),
    _timm("hybrid", "visformer_tiny", img_size=64),
    _timm("hybrid", "vitamin_small_224", img_size=64),
    _timm("hybrid", "nextvit_small"),
    _timm("hybrid", "shvit_s1"),
    _timm("hybrid", "iformer_t"),
    _timm("state", "efficientvim_m1"),
    # mixers
    _timm("mixer", "mixer_s32_224", img_size=64),
    _timm("mixer", "gmlp_ti16_224", img_size=64),
    _timm("mixer", "resmlp_12_224", img_size=64),
    _timm("mixer", "sequencer2d_s", img_size=64, layers=(1, 1, 2, 1)),
    _timm("mixer", "poolformer_s12"),
)  # fmt: skip
