"""Mean cost and mean gain of many settings of the thresholds at once, on a bounded sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp.decide.ranks import Ranks
from offramp.decide.scored import Scored

__all__ = ["Array", "Landscape", "Used", "odds", "shares"]

Array = NDArray[np.float64]
Used = NDArray[np.bool_]

EDGE = 1e-4  # shares are kept this far from 0 and 1, where log-odds end
NUDGE = 0.1  # log-odds, the first step towards the budget
REACH = 4.0  # log-odds, the longest step
FLAT = 1e-3  # of the full cost for one log-odds: flatter is treated as this
FAR = 12.0  # log-odds, beyond which everyone has left, or nobody
SECANTS = 8
NEAR = 0.01  # of the budget: how near is near enough to compare gains


def odds(share: Array) -> Array:
    """Log-odds of shares: the scale on which thresholds are moved."""
    inner = np.clip(share, EDGE, 1 - EDGE)
    return np.log(inner / (1 - inner))


def shares(log_odds: Array) -> Array:
    """Shares of log-odds."""
    return 1 / (1 + np.exp(-np.clip(log_odds, -50, 50)))


@dataclass(frozen=True, eq=False)
class Landscape:
    """A sample of rows, each exit's score as the share of all samples above it.

    NumPy rather than torch: a search calls it thousands of times with small arrays, where the time
    of a call is what counts.

    Attributes:
        above: (K, n) float32, K = E - 1; a row leaves at k where ``above < share``.
        gains: (E, n) float32.
        stages: (E,) float64, shares of the full cost.
        heads: (E,) float64, likewise.
        running: which heads run where some exits are in use.
    """

    above: NDArray[np.float32]
    gains: NDArray[np.float32]
    stages: Array
    heads: Array
    running: Callable[[Used], Used]

    @property
    def size(self) -> int:
        """How many rows."""
        return int(self.gains.shape[1])

    @classmethod
    def of(cls, scored: Scored, gains: Tensor, ranks: Ranks) -> Landscape:
        """The landscape of scored samples, by ranks among samples that may be more."""
        return cls(
            ranks.above(scored.scores[:-1]).numpy(),
            gains.float().contiguous().numpy(),
            scored.stages.numpy(),
            scored.heads.numpy(),
            scored.running,
        )

    def rows(self, index: NDArray[np.int64]) -> Landscape:
        """The landscape of some of the rows."""
        above, gains = self.above[:, index], self.gains[:, index]
        return Landscape(
            np.ascontiguousarray(above),
            np.ascontiguousarray(gains),
            self.stages,
            self.heads,
            self.running,
        )

    def means(self, log_odds: Array, on: Used) -> tuple[Array, Array]:
        """Mean cost and mean gain of M settings.

        Args:
            log_odds: (M, K), where the thresholds stand.
            on: (K,) bool, the exits that are in use.

        Returns:
            Cost (M,) and gain (M,).
        """
        share = shares(log_odds).astype(np.float32)
        rows, runs = self.gains.shape[1], self.running(on)
        here = np.ones((len(share), rows), np.float32)  # 1 for a row that is still on its way
        cost, gain = np.zeros(len(share)), np.zeros(len(share))
        left = np.full(len(share), float(rows))
        for k in range(len(self.above)):
            cost += left * (self.stages[k] + runs[k] * self.heads[k])
            if not on[k]:
                continue
            gain += here @ self.gains[k]
            here *= self.above[k] >= share[:, k, None]
            gain -= here @ self.gains[k]
            left = here.sum(axis=1, dtype=np.float64)
        cost += left * self.stages[-1]
        gain += here @ self.gains[-1]
        return cost / rows, gain / rows

    def each(self, log_odds: Array, on: Used) -> NDArray[np.float32]:
        """The gain of every row under one setting, (K,) to (n,)."""
        share = shares(log_odds)
        gain: NDArray[np.float32] = self.gains[-1].copy()
        for k in reversed(range(len(self.above))):
            if on[k]:
                gain = np.where(self.above[k] < share[k], self.gains[k], gain)
        return gain

    def onto(self, log_odds: Array, on: Used, budget: float) -> tuple[Array, Array]:
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
        before = np.zeros(len(log_odds))
        cost0, gain0 = self.means(log_odds, on)
        here = np.where(cost0 > budget, NUDGE, -NUDGE)
        low = np.where(cost0 > budget, 0.0, -FAR)  # shifts between which the budget lies
        high = np.where(cost0 > budget, FAR, 0.0)
        cost1, gain1 = self.means(log_odds + here[:, None], on)
        for _ in range(SECANTS):
            if np.all(np.abs(cost1 - budget) <= NEAR / 20 * budget):
                break
            low, high = np.where(cost1 > budget, here, low), np.where(cost1 > budget, high, here)
            slope = np.minimum((cost1 - cost0) / _nonzero(here - before), -FLAT)
            there = here + np.clip((budget - cost1) / slope, -REACH, REACH)
            outside = (there <= low) | (there >= high)
            there = np.where(outside, (np.maximum(low, -FAR) + np.minimum(high, FAR)) / 2, there)
            before, cost0, gain0, here = here, cost1, gain1, there
            cost1, gain1 = self.means(log_odds + here[:, None], on)
        moved = cost1 - cost0
        price = np.where(np.abs(moved) > 1e-6, (gain1 - gain0) / _nonzero(moved), 0.0)
        gain = gain1 + np.clip(price, 0, 10) * (budget - cost1)
        gain = np.where(np.abs(cost1 - budget) <= NEAR * budget, gain, -np.inf)
        return log_odds + here[:, None], gain


def _nonzero(value: Array) -> Array:
    return np.where(value == 0, 1e-12, value)
