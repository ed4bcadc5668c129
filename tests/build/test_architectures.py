"""Automatic places on the networks that people use: at blocks, in no branch, spread, rising."""

from __future__ import annotations

import re

import pytest
import torch

from offramp.build.batch import as_call
from offramp.build.heads import MapHead, TokenHead
from offramp.build.model import attach

# name of the timm model, size of the picture, what the places must look like
TIMM = [
    ("resnet18", 64, r"layer\d(\.\d)?"),
    ("densenet121", 64, r"features\.(denseblock|transition)\d"),
    ("inception_v3", 160, r"Pool\d|Mixed_\d[a-e]"),
    ("regnetx_002", 64, r"s\d(\.b\d+)?"),
    ("mobilenetv4_conv_small", 64, r"blocks\.\d(\.\d)?"),
    ("hrnet_w18_small", 64, r"layer1|stage\d"),
    ("vit_tiny_patch16_224", 64, r"blocks\.\d+"),
    ("levit_128s", 224, r"stages\.\d(\.downsample|\.blocks\.\d)?"),
    ("lcnet_050", 64, r"blocks\.\d(\.\d)?"),
    pytest.param(
        "swin_tiny_patch4_window7_224", 224, r"layers\.\d\.blocks\.\d", marks=pytest.mark.slow
    ),
    pytest.param("maxvit_tiny_rw_224", 224, r"stages\.\d(\.blocks\.\d)?", marks=pytest.mark.slow),
    pytest.param("hiera_tiny_224", 224, r"blocks\.\d+", marks=pytest.mark.slow),
    pytest.param("tnt_s_patch16_224", 224, r"blocks\.\d+", marks=pytest.mark.slow),
]


def check(backbone, example, pattern, exits=3, share=0.06):
    model = attach(backbone, example, exits=exits).eval()
    args, kwargs = as_call(example)
    assert all(re.fullmatch(pattern, place) for place in model.places), model.places
    assert min(model.costs.stages) >= 0.02 * model.costs.full  # each exit dearer, none at the end
    assert sum(model.costs.heads) <= share * model.costs.full
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    assert {z.shape for z in outputs} == {outputs.final.shape}
    return model


@pytest.mark.parametrize(("name", "size", "pattern"), TIMM)
def test_timm(name, size, pattern):
    timm = pytest.importorskip("timm")
    options = {"img_size": size} if name.startswith("vit") else {}
    backbone = timm.create_model(name, num_classes=10, **options)
    check(backbone, torch.randn(2, 3, size, size), pattern)


def test_layouts_are_found():
    timm = pytest.importorskip("timm")
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=10,
        img_size=56,
        window_size=7,
        embed_dim=24,
        num_heads=(1, 2, 3, 4),
    )
    model = attach(swin, torch.randn(2, 3, 56, 56), exits=2)
    assert all(isinstance(head, MapHead) and head.last for head in model.heads)
    convnext = timm.create_model("convnext_atto", num_classes=10)
    model = attach(convnext, torch.randn(2, 3, 64, 64), exits=2)
    assert not any(head.last for head in model.heads)


def test_googlenet_and_video():
    models = pytest.importorskip("torchvision.models")
    net = models.googlenet(num_classes=10, init_weights=False)
    check(net, torch.randn(2, 3, 96, 96), r"maxpool\d|inception\d[a-e]")
    video = models.video.mc3_18(num_classes=10)
    check(video, torch.randn(2, 3, 4, 32, 32), r"layer\d(\.\d)?")


def text():
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(5, 60, (3, 10)), "attention_mask": mask}


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 60,
    "pad_token_id": 0,
    "num_labels": 3,
}
HUGGING_FACE = {
    "Bert": r"bert\.encoder\.layer\.\d",
    "Albert": r"albert\.encoder\.albert_layer_groups\.0@\d",
    "Llama": r"model\.layers\.\d",
    "GPT2": r"transformer\.h\.\d",
}


@pytest.mark.parametrize(("name", "pattern"), HUGGING_FACE.items(), ids=HUGGING_FACE.keys())
def test_text(name, pattern):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2} if name == "GPT2" else {}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    backbone = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model = check(backbone, text(), pattern)
    assert all(isinstance(head, TokenHead) for head in model.heads)
    example = text()
    changed = {**example, "input_ids": example["input_ids"].clone()}
    changed["input_ids"][1, 6:] = 0  # padding
    with torch.no_grad():
        torch.testing.assert_close(model(**changed)[0], model(**example)[0], rtol=1e-4, atol=1e-5)
