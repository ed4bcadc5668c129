"""A path of per-exit thresholds, chosen on samples of its own and tested on others."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.decide import gains as worth
from offramp.decide.criteria import Criterion
from offramp.decide.guarantees.verdicts import Test
from offramp.decide.methods.search import Search
from offramp.decide.scored import Scored, score
from offramp.decide.trace import Trace

__all__ = ["best_of_all", "down_the_path", "learn_path"]

BUDGETS = 24


def learn_path(trace: Trace, rule: Criterion, labelled: bool, seed: int) -> list[Tensor]:
    """Thresholds from never leaving early to the cheapest, by the search at falling budgets.

    Args:
        trace: samples that the path is not tested on.
        rule: the criterion.
        labelled: whether to aim at accuracy rather than at agreement.
        seed: of the search.

    Returns:
        Settings (E - 1,), the dearest first.
    """
    scored = score(trace, rule)
    smooth = worth.smoothed(trace, scored) if labelled else worth.agreement(scored)
    search = Search(scored, smooth, seed)
    off = torch.full((scored.num_exits - 1,), torch.inf)
    first = torch.full_like(off, -torch.inf)
    low, high = scored.cost(first), scored.cost(off)
    path = [off]
    for step in range(1, BUDGETS):
        path.append(search.at(high + (low - high) * step / BUDGETS))
    return [*path, first] if low < high else path


def tested(
    path: list[Tensor], scored: Scored, test: Test, losses: Tensor, groups: list[Tensor]
) -> list[list[tuple[Tensor, int]]]:
    """For each setting and group, the sums that the test needs, and the number of samples."""
    out = []
    for thresholds in path:
        taken = scored.exits(thresholds)
        seen = losses.gather(0, taken[None])[0]
        features = test.features(seen)
        out.append([((features * rows).sum(1), int(rows.sum())) for rows in groups])
    return out


def down_the_path(
    path: list[Tensor],
    scored: Scored,
    test: Test,
    losses: Tensor,
    groups: list[Tensor],
    error: float,
) -> Tensor | None:
    """Fixed-sequence testing: the last setting before the first that fails.

    Args:
        path: settings in the order in which they are tested.
        scored: samples that did not choose the path.
        test: the claim.
        losses: (E, N) float64.
        groups: (N,) bool masks that each have to pass.
        error: the probability of going past the first setting whose risk is too high.

    Returns:
        The thresholds, or ``None`` where the first failed.
    """
    last = None
    for thresholds, sums in zip(path, tested(path, scored, test, losses, groups), strict=True):
        if not all(bool(test.passes(s[:, None], n, error)[0]) for s, n in sums):
            break
        last = thresholds
    return last


def best_of_all(
    path: list[Tensor],
    scored: Scored,
    test: Test,
    losses: Tensor,
    groups: list[Tensor],
    error: float,
) -> Tensor | None:
    """Bonferroni testing: the cheapest of all settings that pass at their share of the error.

    It looks past a setting that fails, which pays where the risk is not monotone along the path.
    Arguments and result as for :func:`down_the_path`.
    """
    share = error / len(path)
    passed = [
        thresholds
        for thresholds, sums in zip(path, tested(path, scored, test, losses, groups), strict=True)
        if all(bool(test.passes(s[:, None], n, share)[0]) for s, n in sums)
    ]
    return min(passed, key=scored.cost) if passed else None
