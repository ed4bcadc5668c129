"""Other ways to a threshold that promises something: one threshold for all exits."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from offramp.decide.guarantees import Risk
from offramp.decide.guarantees.expectation import conformal
from offramp.decide.guarantees.ground import Ground
from offramp.decide.guarantees.sweep import walk
from offramp.decide.guarantees.verdicts import Test

__all__ = ["Rivals"]

GRID = 100  # thresholds that UCB is asked about, evenly spread in log-odds: no data chose them
RISK = Risk.named("accuracy gap")


class Rivals:
    """What others would choose on one calibration set, for the accuracy gap.

    Args:
        ground: the calibration set.
        slow: whether UCB is asked as well.
    """

    def __init__(self, ground: Ground, slow: bool) -> None:
        self.ground, self.slow = ground, slow
        self.scored, self.values = ground.losses(RISK)

    def at(self, epsilon: float, confidence: float) -> dict[str, float]:
        """The shared threshold by each method.

        ``naive``: the lowest whose loss on the calibration set is within the bound. ``CRC``:
        conformal risk control (Angelopoulos et al., 2024). ``UCB``: the lowest above which the
        upper confidence bound of Waudby-Smith and Ramdas stays below the bound (Bates et al., 2021;
        Jazbec et al., 2024, Fast yet safe). ``LTT``: Learn then test (Angelopoulos et al., 2021),
        fixed sequence, with Hoeffding and Bentkus' p-value or with the exact test of this library.
        """
        sweep, groups = self.ground.sweep, self.ground.groups
        error = 1 - confidence
        found = {"naive": sweep.threshold(self._naive(epsilon))}
        found["CRC"] = sweep.threshold(conformal(sweep, self.values, groups, epsilon, 1.0)[0])
        for name, kind in (
            ("LTT, Hoeffding-Bentkus", "hoeffding-bentkus"),
            ("LTT, exact", "score"),
        ):
            count, _ = walk(self.ground.changes(RISK), Test(RISK, epsilon, kind), groups, error)
            found[name] = sweep.threshold(count)
        if self.slow:
            found["UCB"] = self._ucb(epsilon, error)
        return found

    def _naive(self, epsilon: float) -> int:
        sweep = self.ground.sweep
        fits = self._totals[1:] <= epsilon * self.scored.num_samples + 1e-9
        good = (fits & sweep.ends).nonzero()
        return int(good[-1]) + 1 if len(good) else 0

    @cached_property
    def _totals(self) -> Tensor:
        return self.ground.sweep.totals(self.values)

    @cached_property
    def _grid(self) -> Tensor:
        odds = torch.linspace(16, -3, GRID, dtype=torch.float64)
        return torch.cat([torch.tensor([torch.inf]), odds.sigmoid().float()])

    @cached_property
    def _seen(self) -> Tensor:
        """(GRID + 1, N) losses at the grid's thresholds, brought to [0, 1]."""
        exits = self.scored.num_exits - 1
        taken = torch.stack([self.scored.exits(level.repeat(exits)) for level in self._grid])
        rows = torch.arange(self.scored.num_samples).expand_as(taken)
        return ((self.values[taken, rows] - RISK.low) / (RISK.high - RISK.low)).float()

    @cached_property
    def _spread(self) -> Tensor:
        """(GRID + 1, N): the variance that was known before each sample."""
        count = torch.arange(1, self._seen.shape[1] + 1)
        mean = (0.5 + self._seen.cumsum(1)) / (1 + count)
        spread = (0.25 + (self._seen - mean).square().cumsum(1)) / (1 + count)
        return torch.cat([torch.full_like(spread[:, :1], 0.25), spread[:, :-1]], dim=1)

    def _ucb(self, epsilon: float, error: float) -> float:
        goal = (epsilon - RISK.low) / (RISK.high - RISK.low)
        size = self._seen.shape[1]
        stakes = (2 * math.log(1 / error) / (size * self._spread)).sqrt().clamp(max=1)
        wealth = (-stakes * (self._seen - goal)).log1p().cumsum(1).amax(1)
        fails = (wealth <= math.log(1 / error)).nonzero()
        stop = int(fails[0]) if len(fails) else len(self._grid)
        return float(self._grid[stop - 1]) if stop else math.inf
