"""The fused path of ``nn.MultiheadAttention``, switched off for a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["plain_attention"]

_LOCK = threading.Lock()
_inside = 0  # how many are within, on all threads: the switch is the process's
_was = True


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused path, which calls no submodule, hides its work and cannot be exported."""
    global _inside, _was
    with _LOCK:
        if not _inside:
            _was = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                torch.backends.mha.set_fastpath_enabled(_was)
