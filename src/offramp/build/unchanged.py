"""What looks at a model leaves it as it was, and sees it as it is by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["buffers_kept", "without_autocast"]

_FULL = (torch.float32, torch.float64)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers hold afterwards what they held before: some models count or average in every pass.

    But for tables that grow with their input: what stands beside them knows of their new size.
    """
    held = [
        (module._buffers, name, buffer, buffer.detach().clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for owner, name, buffer, before, version in held:
            now = owner.get(name)
            if now is None or now.shape != before.shape or now.dtype != before.dtype:
                continue
            owner[name] = buffer
            # An expanded view is restored with what it is a view of.
            written = buffer._version != version and 0 not in buffer.stride()
            if written and buffer.shape == before.shape:
                with torch.no_grad():
                    buffer.copy_(before)


@contextlib.contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """The caller's autocast is off, but for a model in half precision: some run under it alone."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    full = all(p.dtype in _FULL for p in model.parameters() if p.is_floating_point())
    with contextlib.ExitStack() as exact:
        for kind in kinds if full else ():
            if torch.amp.is_autocast_available(kind):
                exact.enter_context(torch.autocast(kind, enabled=False))
        yield
