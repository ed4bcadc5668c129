"""Conformal risk control: a promise about the mean over calibration sets."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.decide.guarantees.sweep import Sweep

__all__ = ["conformal"]


def conformal(
    sweep: Sweep, losses: Tensor, groups: list[Tensor], bound: float, high: float
) -> tuple[int, bool]:
    """The lowest shared threshold whose expected risk is within the bound.

    Conformal risk control (Angelopoulos et al., 2024, theorem 1): the risk on a new sample,
    averaged over calibration sets too, is at most the bound if
    ``(sum of losses + high) / (n + 1)`` is, and if no sample's loss falls as the threshold does.
    Losses that do are replaced by the worst they have been on the way, which makes the theorem
    apply, at the price of caution.

    Args:
        sweep: the settings.
        losses: (E, N) float64.
        groups: (N,) bool masks of the samples for which it has to hold each.
        bound: of the expected loss.
        high: the most that a loss can be.

    Returns:
        The number of levels passed, and whether even "nobody leaves" did.
    """
    # From the last exit to the first, which is the order in which a falling threshold visits them.
    worst = losses.flip(0).cummax(dim=0).values.flip(0)
    fails = torch.zeros(len(sweep.levels) + 1, dtype=torch.bool)
    for rows in groups:
        fails |= (sweep.totals(worst, rows) + high) / (int(rows.sum()) + 1) > bound
    fails[1:] &= sweep.ends
    first = int(fails.nonzero()[0]) if bool(fails.any()) else len(fails)
    if first == 0:
        return 0, False
    passed = torch.nonzero(sweep.ends[: first - 1])
    return (int(passed[-1]) + 1 if len(passed) else 0), True
