"""Classifiers of Hugging Face, small by configuration: text, image, audio, video, decoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures.entry import CLASSES, ROWS, Architecture

__all__ = ["TRANSFORMERS"]

VOCABULARY, TOKENS = 60, 12

# The names that nearly all configurations share.
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_IMAGE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_WAVE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 8),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 32,
    "vocab_size": 32,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1,
            "eos_token_id": 2}  # fmt: skip


def _ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS))


def _text() -> dict[str, Tensor]:
    length = torch.randint(TOKENS // 2, TOKENS + 1, (ROWS, 1))
    mask = (torch.arange(TOKENS) < length).long()
    return {"input_ids": _ids() * mask, "attention_mask": mask}


def _unpadded() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _pixels(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, *shape)}


def _waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(ROWS, 1600)}


def _build(
    name: str, settings: dict[str, Any], example: Callable[[], dict[str, Tensor]]
) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    network = getattr(transformers, name)
    config = network.config_class(num_labels=CLASSES, **settings)
    return network(config), example()


def _hf(
    kind: str,
    name: str,
    model: str,
    settings: dict[str, Any],
    example: Callable[[], dict[str, Tensor]],
) -> Architecture:
    build = partial(_build, model, settings, example)
    return Architecture(f"hf_{name}", "transformers", kind, build)


def _encoder(name: str, model: str, **settings: Any) -> Architecture:
    return _hf("text", name, f"{model}ForSequenceClassification", settings, _text)


def _image(name: str, model: str, size: int = 32, **settings: Any) -> Architecture:
    example = partial(_pixels, 3, size, size)
    return _hf("image", name, f"{model}ForImageClassification", settings, example)


def _decoder(name: str, model: str, **settings: Any) -> Architecture:
    return _hf("decoder", name, f"{model}ForSequenceClassification", settings, _text)


TRANSFORMERS: tuple[Architecture, ...] = (
    _encoder("bert", "Bert", **_TEXT),
    _encoder("distilbert", "DistilBert", vocab_size=VOCABULARY, dim=32, n_layers=4, n_heads=4,
             hidden_dim=64, max_position_embeddings=32, pad_token_id=0),
    _encoder("roberta", "Roberta", **_TEXT),
    _encoder("albert", "Albert", embedding_size=16, **_TEXT),
    _encoder("deberta_v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"],
             position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
             position_biased_input=False, **_TEXT),
    _encoder("electra", "Electra", embedding_size=16, **_TEXT),
    _encoder("modernbert", "ModernBert", **_TEXT),
    _encoder("mpnet", "MPNet", **_TEXT),
    _encoder("convbert", "ConvBert", embedding_size=32, **_TEXT),
    _encoder("squeezebert", "SqueezeBert", embedding_size=32, **_TEXT),
    _image("vit", "ViT", **_IMAGE),
    _image("convnext", "ConvNext", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]),
    _image("resnet", "ResNet", embedding_size=16, hidden_sizes=[16, 24, 32, 48],
           depths=[1, 1, 2, 1], layer_type="basic"),
    _image("swin", "Swin", 64, image_size=64, patch_size=4, embed_dim=16, depths=[2, 2, 2],
           num_heads=[1, 2, 4], window_size=4),
    _image("dinov2", "Dinov2", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4,
           num_attention_heads=4, mlp_ratio=2),
    _image("segformer", "Segformer", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1],
           num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=32),
    _hf("audio", "wav2vec2", "Wav2Vec2ForSequenceClassification", _WAVE, _waves),
    _hf("audio", "hubert", "HubertForSequenceClassification", _WAVE, _waves),
    _hf("audio", "ast", "ASTForAudioClassification",
        {**_IMAGE, "num_mel_bins": 16, "max_length": 40, "patch_size": 8,
         "frequency_stride": 4, "time_stride": 4},
        lambda: {"input_values": torch.randn(ROWS, 40, 16)}),
    _hf("audio", "whisper_encoder", "WhisperForAudioClassification",
        {"num_mel_bins": 16, "d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 4,
         "encoder_ffn_dim": 64, "max_source_positions": 20, "classifier_proj_size": 32},
        lambda: {"input_features": torch.randn(ROWS, 16, 40)}),
    _hf("video", "videomae", "VideoMAEForVideoClassification",
        {**_IMAGE, "num_frames": 4, "tubelet_size": 2}, partial(_pixels, 4, 3, 32, 32)),
    _hf("video", "vivit", "VivitForVideoClassification",
        {**{k: v for k, v in _IMAGE.items() if k != "patch_size"}, "num_frames": 4,
         "tubelet_size": [2, 8, 8]}, partial(_pixels, 4, 3, 32, 32)),
    _decoder("llama", "Llama", **_DECODER),
    _decoder("qwen2", "Qwen2", **_DECODER),
    _decoder("gpt2", "GPT2", vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4,
             n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False),
    _decoder("mistral", "Mistral", **_DECODER),
    _decoder("gemma", "Gemma", head_dim=8, **_DECODER),
)  # fmt: skip
