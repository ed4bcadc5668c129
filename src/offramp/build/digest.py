"""By what a network is known again: thresholds that were chosen for one are not for another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["digest"]

LOOKED_AT = 1024  # values of each parameter: training changes nearly all of them


def digest(model: nn.Module) -> str:
    """A sha256 over shapes and the first values of all parameters, as hexadecimal text.

    The same on any device, in any memory format and inside of a wrapper; another in another dtype.
    """
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(str(tuple(parameter.shape)).encode())
        if not parameter.is_meta:
            values = parameter.detach().flatten()[:LOOKED_AT].cpu().contiguous()
            found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()
