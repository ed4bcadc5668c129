"""Where the samples of a batch lie in a tensor, and how to take some of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowAxis", "most_rows"]


def most_rows(device: torch.device) -> int | None:
    """How many rows a batch may have there; ``None``: any number.

    Convolutions on a device are exported with the guard that their batch is at most 65,535.
    """
    return None if device.type == "cpu" else 65_535


@dataclass(frozen=True)
class RowAxis:
    """Where the samples of a batch lie in a tensor.

    Attributes:
        dim: the dimension that holds them.
        multiple: entries along ``dim`` per sample: 1 for a plain batch, the number of windows or
            heads where these were folded into the batch.
        inner: with ``multiple`` > 1, whether the sample is the fast index of the folded dimension
            (``window * batch + sample``) rather than the slow one (``sample * multiple + window``).
        of: what ``dim`` counts: "" for the samples; else the input and dimension, ``x.0``, that
            count the same (the nodes of a batch of graphs, say).
    """

    dim: int = 0
    multiple: int = 1
    inner: bool = False
    of: str = ""

    def take(self, value: Tensor, rows: Tensor) -> Tensor:
        """The part of ``value`` that belongs to ``rows`` (R,) of what is counted, in that order."""
        return value.index_select(self.dim, self.expand(rows, value.shape[self.dim]))

    def expand(self, rows: Tensor, size: int) -> Tensor:
        """Indices along ``dim`` (R * multiple,) of the samples ``rows`` (R,)."""
        if self.multiple == 1:
            return rows
        part = torch.arange(self.multiple, device=rows.device)
        if self.inner:
            batch = size // self.multiple
            return (part[:, None] * batch + rows[None, :]).reshape(-1)
        return (rows[:, None] * self.multiple + part[None, :]).reshape(-1)
