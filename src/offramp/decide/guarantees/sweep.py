"""One threshold for all exits, lowered from where nobody leaves: every setting there is, tested."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.guarantees.verdicts import Test
from offramp.decide.scored import Scored, between

__all__ = ["Changes", "Sweep", "walk"]

BLOCK = 1 << 9  # changes that are tested at once: the walk seldom goes to the end


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

    def changes(self, losses: Tensor) -> Changes:
        """The levels that change somebody's loss; most change nobody's.

        Args:
            losses: (E, N) float64, of leaving at each exit.
        """
        early, late = losses[:-1].flatten()[self.order], losses[1:].flatten()[self.order]
        moved = (early != late).nonzero().flatten()
        settings = self.ends.nonzero().flatten()
        begin = torch.searchsorted(settings, moved)
        # No setting sees a change that another follows at an equal level.
        seen = begin.diff(append=begin.new_tensor([len(settings)])) > 0
        # What the settings before it pass: all levels up to the last of them.
        before = torch.cat([settings.new_zeros(1), settings + 1])[begin]
        rows = self.order[moved] % losses.shape[1]
        return Changes(len(self.levels), losses[-1], early[moved], late[moved], rows, before, seen)

    def threshold(self, position: int) -> float:
        """The threshold after ``position`` levels, midway to the next; ``inf`` for 0."""
        if position <= 0:
            return float("inf")
        high = self.levels[position - 1]
        if position >= len(self.levels):
            return float("-inf")
        return float(between(self.levels[position], high))


@dataclass(frozen=True, eq=False)
class Changes:
    """What a sweep does to one loss: J changes, each of one sample.

    Attributes:
        levels: M, of the sweep.
        last: (N,) the losses where nobody leaves.
        early: (J,) the loss after the change.
        late: (J,) and before it.
        rows: (J,) int64, the sample.
        before: (J,) int64, how many levels the settings before the change have passed.
        seen: (J,) bool, whether there is a setting between this change and the next.
    """

    levels: int
    last: Tensor
    early: Tensor
    late: Tensor
    rows: Tensor
    before: Tensor
    seen: Tensor


def walk(changes: Changes, test: Test, groups: list[Tensor], error: float) -> tuple[int, bool]:
    """Fixed-sequence testing down the sweep.

    The thresholds are all real numbers, in falling order: a sequence that no data chose, so each is
    tested at the full error, until the first that fails (Bauer, 1991; Angelopoulos et al., 2021,
    Learn then test, section 3). The last that passed is returned. With groups, a threshold passes
    where every group does: the first that is bad for any group stops the walk with probability
    1 - error, so the error is not divided among them.

    Args:
        changes: of the loss, by a sweep.
        test: the claim.
        groups: (N,) bool masks of the samples that each have to pass.
        error: the probability of going past the first setting whose risk is too high.

    Returns:
        The number of levels passed, and whether even "nobody leaves" did.
    """
    sums = [test.features(changes.last[rows]).sum(1, keepdim=True) for rows in groups]
    sizes = [int(rows.sum()) for rows in groups]
    if not all(
        bool(test.passes(total, size, error)) for total, size in zip(sums, sizes, strict=True)
    ):
        return 0, False
    for start in range(0, len(changes.rows), BLOCK):
        block = slice(start, start + BLOCK)
        steps = test.features(changes.early[block]) - test.features(changes.late[block])
        seen = changes.seen[block]
        fails = torch.zeros(int(seen.sum()), dtype=torch.bool)
        for g, rows in enumerate(groups):
            totals = sums[g] + (steps * rows[changes.rows[block]]).cumsum(1)
            fails |= ~test.passes(totals[:, seen], sizes[g], error)
            sums[g] = totals[:, -1:]
        if bool(fails.any()):
            return int(changes.before[block][seen][int(fails.int().argmax())]), True
    return changes.levels, True
