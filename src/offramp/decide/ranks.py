"""Thresholds by the share of samples that reach them, instead of by value."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.decide.scored import between

__all__ = ["Ranks"]


class Ranks:
    """The scores of the auxiliary exits, sorted, so that shares and thresholds can be exchanged.

    A threshold between two neighbouring scores is known by the share of all samples that reach it:
    exits with scores of different kinds and scales become comparable. Equal scores cannot be
    parted; a share that falls among them goes to the nearer end.

    Args:
        scores: (K, N) float32, of the K auxiliary exits.
    """

    def __init__(self, scores: Tensor) -> None:
        self.rising = scores.sort(dim=1).values

    @property
    def num_samples(self) -> int:
        """N."""
        return self.rising.shape[1]

    def above(self, scores: Tensor) -> Tensor:
        """(K, M) float32: the share of the samples whose score is above each given score."""
        below = torch.searchsorted(self.rising, scores.contiguous(), right=True)
        return (1 - below.double() / self.num_samples).float()

    def reaching(self, thresholds: Tensor) -> Tensor:
        """(K,) float64: the share of samples that reach each threshold, (K,) float32."""
        below = torch.searchsorted(self.rising, thresholds[:, None].contiguous())
        return 1 - below.squeeze(1).double() / self.num_samples

    def thresholds(self, shares: Tensor) -> Tensor:
        """The thresholds that these shares of the samples reach.

        Args:
            shares: (K,) or (M, K), from 0 (the exit is off) to 1 (everyone leaves).

        Returns:
            float32 of the same shape: ``+inf`` for 0, ``-inf`` for 1, midway between neighbouring
            scores else.
        """
        flat = shares.reshape(-1, shares.shape[-1]).T.contiguous()
        return self.at((flat.double() * self.num_samples).round().long()).T.reshape(shares.shape)

    def at(self, counts: Tensor) -> Tensor:
        """The thresholds that so many samples reach, (K, M) int64 to (K, M) float32."""
        samples = self.num_samples
        counts = counts.clamp(0, samples)
        inner = counts.clamp(1, max(samples - 1, 1))
        counts = torch.where((counts > 0) & (counts < samples), self._parted(inner), counts)
        inner = counts.clamp(1, max(samples - 1, 1))
        high = self.rising.gather(1, samples - inner)
        low = self.rising.gather(1, (samples - inner - 1).clamp(min=0))
        middle = between(low, high)
        middle = torch.where(counts <= 0, torch.inf, middle)
        return torch.where(counts >= samples, -torch.inf, middle)

    def _parted(self, counts: Tensor) -> Tensor:
        """Each count moved to the nearer end of the run of equal scores that it falls into."""
        value = self.rising.gather(1, self.num_samples - counts)
        more = self.num_samples - torch.searchsorted(self.rising, value, right=True)
        most = self.num_samples - torch.searchsorted(self.rising, value)
        return torch.where(counts - more < most - counts, more, most)
