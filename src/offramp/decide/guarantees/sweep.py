"""One threshold for all exits, lowered from where nobody leaves: every setting there is, tested."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.guarantees.verdicts import Test
from offramp.decide.scored import Scored, between

__all__ = ["Sweep", "walk"]

BLOCK = 1 << 12  # levels that are tested at once: the walk seldom goes to the end


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
    early, late = losses[:-1].flatten(), losses[1:].flatten()
    sums = [test.features(losses[-1, rows]).sum(1, keepdim=True) for rows in groups]
    sizes = [int(rows.sum()) for rows in groups]
    if not all(
        bool(test.passes(total, size, error)) for total, size in zip(sums, sizes, strict=True)
    ):
        return 0, False
    last = 0
    for start in range(0, len(sweep.order), BLOCK):
        block, ends = sweep.order[start : start + BLOCK], sweep.ends[start : start + BLOCK]
        steps = test.features(early[block]) - test.features(late[block])
        fails = torch.zeros(len(block), dtype=torch.bool)
        for g, rows in enumerate(groups):
            totals = sums[g] + (steps * rows[block % losses.shape[1]]).cumsum(1)
            fails |= ~test.passes(totals, sizes[g], error)
            sums[g] = totals[:, -1:]
        # Only the end of a run of equal levels is a setting.
        failed = (fails & ends).nonzero()
        stop = int(failed[0]) if len(failed) else len(block)
        passed = ends[:stop].nonzero()
        last = start + int(passed[-1]) + 1 if len(passed) else last
        if len(failed):
            break
    return last, True
