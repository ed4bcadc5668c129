"""One threshold for all exits, lowered from where nobody leaves: every setting there is, tested."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.guarantees.verdicts import Test
from offramp.decide.scored import Scored, between

__all__ = ["Sweep", "walk"]


@dataclass(frozen=True, eq=False)
class Sweep:
    """All settings of one shared threshold, from the safest down.

    The exit of a sample under threshold t is the first whose score reaches t: it depends on the
    running maximum of its scores alone. Lowering t past one such maximum moves one sample to an
    earlier exit, so prefix sums over the sorted maxima give every total at every t.

    Attributes:
        levels: (M,) float32, falling: the thresholds at which something changes.
        order: (M,) int64, into the flattened (E - 1, N).
        ends: (M,) bool, whether the next level is lower (equal scores move together).
    """

    levels: Tensor
    order: Tensor
    ends: Tensor

    @classmethod
    def of(cls, scored: Scored) -> Sweep:
        """The sweep of a scored trace."""
        peaks = scored.scores[:-1].cummax(dim=0).values.flatten()
        levels, order = peaks.sort(descending=True)
        ends = torch.ones_like(levels, dtype=torch.bool)
        ends[:-1] = levels[:-1] > levels[1:]
        return cls(levels, order, ends)

    def totals(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Sums over samples of what leaving is worth, at every level.

        Args:
            values: (E, N) float64, of leaving at each exit.
            rows: (N,) bool, the samples that count; all by default.

        Returns:
            (M + 1,): first where nobody leaves, then after each level.
        """
        if rows is not None:
            values = values * rows
        steps = (values[:-1] - values[1:]).flatten()[self.order]
        start = values[-1].sum()[None]
        return torch.cat([start, start + steps.cumsum(0)])

    def threshold(self, position: int) -> float:
        """The threshold after ``position`` levels, midway to the next; ``inf`` for 0."""
        if position <= 0:
            return float("inf")
        high = self.levels[position - 1]
        if position >= len(self.levels):
            return float("-inf")
        return float(between(self.levels[position], high))


def walk(
    sweep: Sweep, test: Test, losses: Tensor, groups: list[Tensor], error: float
) -> tuple[int, bool]:
    """Fixed-sequence testing down the sweep.

    The thresholds are all real numbers, in falling order: a sequence that no data chose, so each is
    tested at the full error, until the first that fails (Bauer, 1991; Angelopoulos et al., 2021,
    Learn then test, section 3). The last that passed is returned. With groups, a threshold passes
    where every group does: the first that is bad for any group stops the walk with probability
    1 - error, so the error is not divided among them.

    Args:
        sweep: the settings.
        test: the claim.
        losses: (E, N) float64.
        groups: (N,) bool masks of the samples that each have to pass.
        error: the probability of going past the first setting whose risk is too high.

    Returns:
        The number of levels passed, and whether even "nobody leaves" did.
    """
    fails = torch.zeros(len(sweep.levels) + 1, dtype=torch.bool)
    features = test.features(losses)
    for rows in groups:
        sums = torch.stack([sweep.totals(feature, rows) for feature in features])
        fails |= ~test.passes(sums, int(rows.sum()), error)
    fails[1:] &= sweep.ends
    first = int(fails.nonzero()[0]) if bool(fails.any()) else len(fails)
    if first == 0:
        return 0, False
    # The last end of a run of equal levels before the first failure.
    passed = sweep.ends[: first - 1].nonzero()
    return (int(passed[-1]) + 1 if len(passed) else 0), True
