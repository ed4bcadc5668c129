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

__all__ = ["Path", "best_of_all", "down_the_path", "learn_path"]

BUDGETS = 10  # that the search is asked for
BETWEEN = 4  # steps from one to the next
BLOCK = 1 << 15  # samples times settings that are looked at together


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


class Path:
    """Settings in the order in which they are tested, and the samples that test them.

    Args:
        settings: each (E - 1,), the first where nobody leaves.
        scored: samples; those in no group did choose the path, or play no part in it.
        groups: (N,) bool masks that each have to pass.
    """

    def __init__(self, settings: list[Tensor], scored: Scored, groups: list[Tensor]) -> None:
        self.settings, self.scored = settings, scored
        self.rows = torch.stack(groups).any(dim=0)
        self.groups = [group[self.rows] for group in groups]
        self._step = max(1, BLOCK // int(self.rows.sum()))
        self._tested = scored.subset(self.rows)
        self._taken: dict[int, Tensor] = {}
        self._counted: dict[tuple[str, int], Tensor] = {}

    def passing(self, test: Test, losses: Tensor, error: float) -> Iterator[bool]:
        """Setting by setting, whether every group passes.

        Args:
            test: the claim.
            losses: (E, N) float64, for one risk always the same: its counts are kept.
            error: of each setting.
        """
        for start in range(0, len(self.settings), self._step):
            sums = self._sums(test, losses, start)
            passes = torch.ones(sums.shape[2], dtype=torch.bool)
            for total, group in zip(sums, self.groups, strict=True):
                passes &= test.passes(total, int(group.sum()), error)
            yield from passes.tolist()

    def _sums(self, test: Test, losses: Tensor, start: int) -> Tensor:
        """(G, F, S) the features' sums over each group under some of the settings."""
        key = (test.risk.name, start)
        if key in self._counted:
            return self._counted[key]
        features = test.features(losses[:, self.rows].gather(0, self._exits(start).long()))
        sums = torch.stack([(features * group).sum(2) for group in self.groups])
        if test.risk.whole:  # counts, whatever the bound
            self._counted[key] = sums
        return sums

    def _exits(self, start: int) -> Tensor:
        """(S, n) the exits under some of the settings, kept for the next promise."""
        if start not in self._taken:
            block = self.settings[start : start + self._step]
            taken = torch.stack([self._tested.exits(setting) for setting in block])
            self._taken[start] = taken.to(torch.int16)
        return self._taken[start]


def down_the_path(path: Path, test: Test, losses: Tensor, error: float) -> Tensor | None:
    """Fixed-sequence testing: the last setting before the first that fails.

    Args:
        path: settings, and samples that did not choose them.
        test: the claim.
        losses: (E, N) float64.
        error: the probability of going past the first setting whose risk is too high.

    Returns:
        The thresholds, or ``None`` where the first failed.
    """
    last = None
    for setting, passes in zip(path.settings, path.passing(test, losses, error), strict=True):
        if not passes:
            break
        last = setting
    return last


def best_of_all(path: Path, test: Test, losses: Tensor, error: float) -> Tensor | None:
    """Bonferroni testing: the cheapest of all settings that pass at their share of the error.

    It looks past a setting that fails, which pays where the risk is not monotone along the path.
    Arguments and result as for :func:`down_the_path`.
    """
    passing = path.passing(test, losses, error / len(path.settings))
    passed = [setting for setting, good in zip(path.settings, passing, strict=True) if good]
    return min(passed, key=path.scored.cost) if passed else None
