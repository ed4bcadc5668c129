"""Mean cost and mean gain of many settings of the thresholds at once, on a bounded sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.ranks import Ranks
from offramp.decide.scored import Scored

__all__ = ["Landscape", "odds", "shares"]

ROWS = 20_000  # beyond it, sampling noise is far below what any test set could show
EDGE = 1e-4  # shares are kept this far from 0 and 1, where log-odds end


def odds(share: Tensor) -> Tensor:
    """Log-odds of shares: the scale on which thresholds are moved."""
    return share.clamp(EDGE, 1 - EDGE).logit()


def shares(log_odds: Tensor) -> Tensor:
    """Shares of log-odds."""
    return log_odds.sigmoid()


@dataclass(frozen=True, eq=False)
class Landscape:
    """A sample of rows, each exit's score as the share of all samples above it.

    Attributes:
        above: (K, n) float32, K = E - 1; a row leaves at k where ``above < share``.
        gains: (E, n) float32.
        stages: (E,) float64, shares of the full cost.
        heads: (E,) float64, likewise.
        weights: (n,) float32, the share of the mean that each row has; they sum to 1.
    """

    above: Tensor
    gains: Tensor
    stages: Tensor
    heads: Tensor
    weights: Tensor

    @classmethod
    def of(cls, scored: Scored, gains: Tensor, ranks: Ranks, seed: int) -> Landscape:
        """The landscape of a random sample of at most ``ROWS`` rows."""
        samples = scored.num_samples
        rows = torch.arange(samples)
        if samples > ROWS:
            rows = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:ROWS]
        return cls(
            ranks.above(scored.scores[:-1, rows]).float(),
            gains[:, rows].float(),
            scored.stages,
            scored.heads,
            torch.full((len(rows),), 1 / len(rows)),
        )

    def rows(self, index: Tensor) -> Landscape:
        """The landscape of some of the rows."""
        weights = self.weights[index]
        return Landscape(
            self.above[:, index].contiguous(),
            self.gains[:, index].contiguous(),
            self.stages,
            self.heads,
            weights / weights.sum(),
        )

    def means(self, log_odds: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cost and mean gain of M settings.

        Args:
            log_odds: (M, K), where the thresholds stand.
            on: (K,) bool, the exits that are in use; the heads of the others do not run.

        Returns:
            Cost (M,) float64 and gain (M,) float64.
        """
        count = len(log_odds)
        share = shares(log_odds)
        here = self.weights.expand(count, -1)  # the weight of each row that is still on its way
        cost = torch.zeros(count, dtype=torch.float64)
        gain = torch.zeros(count, dtype=torch.float64)
        mass = torch.ones(count, dtype=torch.float64)
        for k in range(self.above.shape[0]):
            cost += mass * self.stages[k]
            if not on[k]:
                continue
            cost += mass * self.heads[k]
            stays = here * (self.above[k] >= share[:, k, None])
            gain += ((here - stays) @ self.gains[k]).double()
            here = stays
            mass = here.sum(dim=1).double()
        cost += mass * self.stages[-1]
        gain += (here @ self.gains[-1]).double()
        return cost, gain

    def onto(self, log_odds: Tensor, on: Tensor, budget: float) -> tuple[Tensor, Tensor]:
        """Shift settings as a whole until they cost the budget, by secants from where they stand.

        What is left of the way after a few secants is covered for the gain alone, along the last
        one: the settings are for comparing, not for use.

        Args:
            log_odds: (M, K).
            on: (K,) bool.
            budget: a share of the full cost.

        Returns:
            The shifted settings (M, K) and their gain at the budget (M,), which is ``-inf`` for
            those that stay away from it.
        """
        before = torch.zeros(len(log_odds), dtype=torch.float64)
        cost0, gain0 = self.means(log_odds, on)
        here = torch.where(cost0 > budget, NUDGE, -NUDGE)
        cost1, gain1 = self.means(log_odds + here[:, None].float(), on)
        for _ in range(SECANTS):
            slope = (cost1 - cost0) / (here - before)
            slope = torch.where(slope > -FLAT, -FLAT, slope)
            step = ((budget - cost1) / slope).clamp(-REACH, REACH)
            before, cost0, gain0, here = here, cost1, gain1, here + step
            cost1, gain1 = self.means(log_odds + here[:, None].float(), on)
        moved = cost1 - cost0
        price = torch.where(moved.abs() > 1e-9, (gain1 - gain0) / moved, 0.0).clamp(0, 100)
        gain = gain1 + price * (budget - cost1)
        gain = torch.where((cost1 - budget).abs() <= NEAR * budget, gain, -torch.inf)
        return log_odds + here[:, None].float(), gain


NUDGE = 0.1  # log-odds, the first step towards the budget
REACH = 4.0  # log-odds, the longest step
FLAT = 1e-3  # of the full cost for one log-odds: flatter is treated as this
SECANTS = 3
NEAR = 0.01  # of the budget: how near is near enough to compare gains
