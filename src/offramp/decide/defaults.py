"""Thresholds do not depend on what a program makes torch's default type and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["usual_defaults"]


@contextmanager
def usual_defaults() -> Iterator[None]:
    """New tensors are float32 and on the CPU, as traces are; also a decorator.

    Programs for large models make bfloat16 the default: a threshold so coarse is another one than
    the one that was tested.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        yield
