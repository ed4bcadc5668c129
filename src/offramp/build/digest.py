"""By what a network is known again: thresholds that were chosen for one are not for another."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from offramp.build.model import MultiExitModel

__all__ = ["digest", "digests"]

LOOKED_AT = 1024  # values of each tensor: training changes nearly all of them


def digest(module: nn.Module) -> str:
    """A sha256 over shapes and first values of parameters and real-valued buffers, hexadecimal.

    The same on any device and in any memory format; another in another dtype. Integer buffers do
    not count, which count batches as a rule.
    """
    found = hashlib.sha256()
    for value in module.state_dict().values():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        found.update(str(tuple(value.shape)).encode())
        if not value.is_meta:
            values = value.detach().flatten()[:LOOKED_AT].cpu().contiguous()
            found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def digests(model: MultiExitModel) -> tuple[str, ...]:
    """E of them: of each head, and of the backbone in the place of its own exit."""
    return tuple(digest(part) for part in (*model.heads, model.backbone))
