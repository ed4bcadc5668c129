"""A path of per-exit thresholds, chosen on samples of its own and tested on others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from offramp.decide import gains as worth
from offramp.decide.criteria import Criterion
from offramp.decide.guarantees.verdicts import Test
from offramp.decide.methods.search import Search
from offramp.decide.scored import Scored, score
from offramp.decide.trace import Trace

__all__ = ["best_of_all", "down_the_path", "learn_path"]

BUDGETS = 10  # that the search is asked for
BETWEEN = 4  # steps from one to the next


def learn_path(trace: Trace, rule: Criterion, labelled: bool, seed: int) -> list[Tensor]:
    """Thresholds from never leaving early to the cheapest: the search at falling budgets.

    Between two budgets the shares of samples that reach each threshold go evenly from one to the
    other.

    Args:
        trace: samples that the path is not tested on.
        rule: the criterion.
        labelled: whether to aim at accuracy rather than at agreement.
        seed: of the search.

    Returns:
        Settings (E - 1,), the dearest first.
    """
    scored = score(trace, rule)

    def gains(rows: Tensor) -> Tensor:
        if labelled:
            return worth.smoothed(trace, scored, rows)
        return worth.agreement(scored.subset(rows))

    search = Search(scored, gains, seed)
    off = torch.full((scored.num_exits - 1,), torch.inf)
    first = torch.full_like(off, -torch.inf)
    low, high = scored.cost(first), scored.cost(off)
    if low >= high:
        return [off]
    budgets = [high + (low - high) * step / BUDGETS for step in range(1, BUDGETS)]
    stops = [off, *(search.at(budget) for budget in budgets), first]
    shares = torch.stack([search.ranks.reaching(stop) for stop in stops])
    path = [off]
    for k in range(1, len(stops)):
        ways = torch.linspace(0, 1, BETWEEN + 1, dtype=torch.float64)[1:-1, None]
        path += list(search.ranks.thresholds(torch.lerp(shares[k - 1], shares[k], ways)))
        path.append(stops[k])
    return path


def _passing(
    path: list[Tensor],
    scored: Scored,
    test: Test,
    losses: Tensor,
    groups: list[Tensor],
    error: float,
) -> Iterator[bool]:
    """Setting by setting, whether every group passes."""
    rows = torch.stack(groups).any(dim=0)
    scored, losses = scored.subset(rows), losses[:, rows]
    members = [group[rows] for group in groups]
    for thresholds in path:
        features = test.features(losses.gather(0, scored.exits(thresholds)[None])[0])
        sums = [(features[:, group].sum(1, keepdim=True), int(group.sum())) for group in members]
        yield all(bool(test.passes(total, size, error)[0]) for total, size in sums)


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
    for thresholds, passes in zip(
        path, _passing(path, scored, test, losses, groups, error), strict=True
    ):
        if not passes:
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
    passing = _passing(path, scored, test, losses, groups, error / len(path))
    passed = [thresholds for thresholds, passes in zip(path, passing, strict=True) if passes]
    return min(passed, key=scored.cost) if passed else None
