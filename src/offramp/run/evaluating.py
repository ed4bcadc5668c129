"""A model as it is deployed, for a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from offramp.build.attention import plain_attention
from offramp.build.unchanged import buffers_kept, without_autocast

__all__ = ["PRECISION", "evaluating", "full_precision"]

PRECISION = threading.RLock()  # held by whoever relies on it, or changes it for a moment


@contextmanager
def evaluating(model: nn.Module, *, fused: bool = False) -> Iterator[None]:
    """The model in eval mode and without the caller's autocast, and as it was afterwards.

    Args:
        model: any module.
        fused: leave the fused fast path of ``nn.MultiheadAttention`` as it is. It is off otherwise:
            it cannot be exported, and rounds otherwise than the operators that stand for it in a
            stage.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            nullcontext() if fused else plain_attention(),
            buffers_kept(model),
            without_autocast(model),
        ):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def full_precision(*, wanted: bool = True) -> Iterator[None]:
    """Products of float32 on a device without TF32, whatever the process has chosen, for a moment.

    Meanwhile torch's older switches (``allow_tf32``) cannot be read, since they say less.

    Args:
        wanted: whether anything is computed on a device; nothing is touched otherwise.
    """
    if not wanted:
        yield
        return
    cudnn: Any = torch.backends.cudnn  # its parts are not known to type checkers
    kinds: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    with PRECISION:
        chosen = [kind.fp32_precision for kind in kinds]
        try:
            for kind in kinds:
                kind.fp32_precision = "ieee"
            yield
        finally:
            for kind, own in zip(kinds, chosen, strict=True):
                kind.fp32_precision = "none"
                if kind.fp32_precision != own:  # it was not what a wider choice says
                    kind.fp32_precision = own
