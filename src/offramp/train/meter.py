"""Sums over an epoch, kept on the device so that a step never waits for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Meter"]


class Meter:
    """Mean loss and accuracy of every exit over the samples seen since the last reset.

    Args:
        num_exits: ``E``.
    """

    def __init__(self, num_exits: int) -> None:
        self.num_exits = num_exits
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._loss = torch.zeros(self.num_exits)
        self._weight = [0] * self.num_exits
        self._hits = torch.zeros(self.num_exits, dtype=torch.int64)
        self.samples = 0

    @torch.no_grad()
    def update(
        self, exits: Sequence[int], losses: Tensor, outputs: Sequence[Tensor], labels: Tensor
    ) -> None:
        """Add a batch.

        Args:
            exits: indices of the ``K`` supervised exits.
            losses: ``(K,)`` mean loss of each over the batch.
            outputs: ``E`` tensors ``(B, C)``.
            labels: ``(B,)``.
        """
        size = len(labels)
        if self._loss.device != losses.device:
            self._loss = self._loss.to(losses.device)
            self._hits = self._hits.to(losses.device)
        if tuple(exits) == tuple(range(self.num_exits)):
            self._loss.add_(losses.detach().float(), alpha=size)
        else:
            for row, k in enumerate(exits):
                self._loss[k].add_(losses[row].detach().float(), alpha=size)
        for k in exits:
            self._weight[k] += size
        predicted = torch.stack([logits.argmax(-1) for logits in outputs])
        self._hits.add_((predicted == labels).sum(1))
        self.samples += size

    @property
    def losses(self) -> tuple[float | None, ...]:
        """Mean loss of each exit; ``None`` for one that was never supervised."""
        sums: list[float] = self._loss.tolist()
        return tuple(s / w if w else None for s, w in zip(sums, self._weight, strict=True))

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Share of samples that each exit classified rightly."""
        hits: list[int] = self._hits.tolist()
        return tuple(h / max(self.samples, 1) for h in hits)

    @property
    def broken(self) -> list[int]:
        """Exits whose loss is no longer a finite number. Waits for the device."""
        finite: list[bool] = torch.isfinite(self._loss).tolist()
        return [k for k, good in enumerate(finite) if not good]

    def state(self) -> dict[str, Tensor]:
        """All sums as tensors."""
        weight = torch.tensor([*self._weight, self.samples])
        return {"loss": self._loss, "hits": self._hits, "weight": weight}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state`."""
        self._loss, self._hits = state["loss"].clone(), state["hits"].clone()
        *self._weight, self.samples = (int(value) for value in state["weight"])
