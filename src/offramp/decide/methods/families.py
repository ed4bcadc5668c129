"""The published ways to set thresholds: each a line from dear to cheap, with one dial to turn.

A family is built from scores (and gains, where it looks at labels) and maps a position from 0,
where nobody leaves early, to 1, where everyone leaves at the first exit, to thresholds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from offramp.decide.ranks import Ranks
from offramp.decide.scored import Scored, between

__all__ = ["FAMILIES", "Family", "geometric", "greedy", "per_exit_accuracy", "quantile", "shared"]

Family = Callable[[float], Tensor]

POOLED = 1_000_000  # scores that a shared threshold is chosen from, at most


def shared(scored: Scored, gains: Tensor) -> Family:
    """One threshold for all exits (BranchyNet's and most others' practice).

    Args:
        scored: what the exits score.
        gains: not looked at.
    """
    del gains
    pool = scored.scores[:-1].flatten()
    pool = pool[:: max(1, len(pool) // POOLED)].unique()  # sorted, so neighbours are neighbours

    def at(position: float) -> Tensor:
        if position <= 0:
            value = torch.tensor(torch.inf)
        elif position >= 1:
            value = torch.tensor(-torch.inf)
        else:
            index = round((1 - position) * len(pool))
            inner = min(max(index, 1), len(pool) - 1)
            value = between(pool[inner - 1], pool[inner]) if len(pool) > 1 else pool[0]
        return value.repeat(scored.num_exits - 1)

    return at


def geometric(scored: Scored, gains: Tensor) -> Family:
    """Exit shares in geometric progression (Huang et al., 2018, MSDNet, section 4 and appendix).

    Of all samples the share ``q^k / sum_j q^j`` leaves at exit k: the most certain of those that
    are left. The dial turns ln q.

    Args:
        scored: what the exits score.
        gains: not looked at.
    """
    del gains
    samples, exits = scored.num_samples, scored.num_exits

    def at(position: float) -> Tensor:
        thresholds = torch.full((exits - 1,), torch.inf)
        if position <= 0:
            return thresholds
        slope = torch.tensor(1 - 2 * min(position, 1 - 1e-9), dtype=torch.float64).atanh() * 2
        powers = (slope * torch.arange(exits)).softmax(0)
        left = torch.arange(samples)
        owed = 0.0
        for k in range(exits - 1):
            owed += float(powers[k]) * samples
            here = scored.scores[k, left]
            leave = min(round(owed), len(here))
            thresholds[k] = _reached_by(here, leave)
            gone = here >= thresholds[k]
            owed -= float(gone.sum())  # ties make an exit take more or fewer than its share
            left = left[~gone]
            if not len(left):
                break
        return thresholds

    return at


def quantile(scored: Scored, gains: Tensor) -> Family:
    """Every exit would take the same share of all samples.

    Args:
        scored: what the exits score.
        gains: not looked at.
    """
    del gains
    ranks = Ranks(scored.scores[:-1])

    def at(position: float) -> Tensor:
        return ranks.thresholds(torch.full((scored.num_exits - 1,), position))

    return at


def per_exit_accuracy(scored: Scored, gains: Tensor) -> Family:
    """Each exit's lowest threshold whose takers are right at a given rate, the same for all.

    The takers are all samples that reach the threshold, whether or not they would have left before.

    Args:
        scored: what the exits score.
        gains: (E, N), whether each exit is right.
    """
    order = scored.scores[:-1].argsort(dim=1, descending=True)
    ranks = Ranks(scored.scores[:-1])
    counts = torch.arange(1, scored.num_samples + 1, dtype=torch.float64)
    rates = gains[:-1].double().gather(1, order).cumsum(1) / counts
    # A rate is that of a threshold only at the end of a run of equal scores.
    ends = torch.ones_like(rates, dtype=torch.bool)
    falling = ranks.rising.flip(1)
    ends[:, :-1] = falling[:, :-1] > falling[:, 1:]
    rates = torch.where(ends, rates, -torch.inf)
    # The best rate from each position on: the largest position that still has the wanted rate.
    best = rates.flip(1).cummax(1).values.flip(1)
    levels = best.flatten().unique()
    levels = torch.cat([levels, levels.new_tensor([torch.inf])])

    def at(position: float) -> Tensor:
        index = round((1 - min(max(position, 0.0), 1.0)) * (len(levels) - 1))
        reached = (best >= levels[index]).sum(dim=1)
        return ranks.at(reached[:, None]).squeeze(1)

    return at


def greedy(scored: Scored, gains: Tensor) -> Family:
    """Exit by exit from the first: the threshold that is best if all others went to the end.

    The dial turns the price of cost in ``gain - price * cost``.

    Args:
        scored: what the exits score.
        gains: (E, N), what leaving at each exit is worth.
    """
    order = scored.scores[:-1].argsort(dim=1, descending=True)
    falling = scored.scores[:-1].gather(1, order)
    costs = scored.exit_costs(torch.zeros(scored.num_exits - 1))

    def at(position: float) -> Tensor:
        thresholds = torch.full((scored.num_exits - 1,), torch.inf)
        if position <= 0:
            return thresholds
        price = position / (1 - position) if position < 1 else torch.inf
        left = torch.ones(scored.num_samples, dtype=torch.bool)
        for k in range(scored.num_exits - 1):
            saved = float(costs[-1] - costs[k])
            if price == torch.inf:
                edge = torch.full((scored.num_samples,), float(saved > 0))
            else:
                edge = gains[k].double() - gains[-1].double() + price * saved
            worth = torch.where(left, edge, 0.0)[order[k]].double().cumsum(0)
            same = falling[k, :-1] <= falling[k, 1:]
            worth[:-1].masked_fill_(same, -torch.inf)  # equal scores leave together
            best = int(worth.argmax())
            if float(worth[best]) > 0:
                low = falling[k, best + 1] if best + 1 < len(worth) else -torch.inf
                thresholds[k] = between(torch.as_tensor(low), falling[k, best])
                left &= scored.scores[k] < thresholds[k]
        return thresholds

    return at


def _reached_by(scores: Tensor, count: int) -> Tensor:
    """The threshold that about ``count`` of the scores (M,) reach.

    As :class:`Ranks` would say, by selection instead of a sort: a dial asks for many of them.
    """
    size = len(scores)
    if 0 < count < size:
        low, high = np.partition(scores.numpy(), (size - count - 1, size - count))[
            size - count - 1 : size - count + 1
        ]
        if low < high:
            return between(torch.tensor(low), torch.tensor(high))
        # Equal scores cannot be parted: to the nearer end of their run.
        more, most = int((scores > high).sum()), int((scores >= high).sum())
        count = more if count - more < most - count else most
        if 0 < count < size:
            reach = scores > high if count == more else scores >= high
            return between(scores[~reach].max(), scores[reach].min())
    return torch.tensor(torch.inf if count <= 0 or not size else -torch.inf)


FAMILIES: dict[str, Callable[[Scored, Tensor], Family]] = {
    "shared": shared,
    "geometric": geometric,
    "quantile": quantile,
    "per-exit accuracy": per_exit_accuracy,
    "greedy": greedy,
}
