"""What else could be had: static truncation, a random exit at equal cost, the hindsight oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.analyse.intervals import Interval, bootstrap, paired_difference, wilson
from offramp.decide.trace import Trace

__all__ = ["Baseline", "oracle", "random_exit", "truncations"]


@dataclass(frozen=True)
class Baseline:
    """An alternative to the policy, on the same samples.

    Attributes:
        name: what it is.
        accuracy: share of samples that it gets right.
        interval: of that share.
        cost: mean cost per sample, in the trace's unit, heads that ran included.
        lead: the policy's accuracy less this one's, and the interval of that difference.
    """

    name: str
    accuracy: float
    interval: Interval
    cost: float
    lead: tuple[float, Interval]


def truncations(trace: Trace, right: Tensor, answered: Tensor, level: float) -> list[Baseline]:
    """Everyone leaves at exit k, and the network ends there: only that exit's head is counted.

    Args:
        trace: what every exit said.
        right: (E, N) bool, whether each exit is right.
        answered: (N,) bool, whether the policy is.
        level: confidence of the intervals.

    Returns:
        One for each exit but the last.
    """
    costs = _costs_alone(trace).tolist()
    return [
        _compare(f"everyone leaves at exit {k}", right[k], costs[k], answered, level)
        for k in range(trace.num_exits - 1)
    ]


def oracle(trace: Trace, right: Tensor, answered: Tensor, level: float) -> Baseline:
    """The hindsight oracle: every sample leaves at the cheapest exit that is right about it.

    It knows where to leave, so of the heads it pays only for the one that answers, and in a cascade
    for those that this one reads. A sample that no exit gets right leaves at the cheapest of all,
    since waiting would not help it. Of policies whose answers are those of single exits none is
    more often right, and none that is as often right costs less, so it bounds what a criterion
    could still gain. (An ensemble or a vote may be right where no exit is.)

    Args:
        trace: what every exit said.
        right: (E, N) bool, whether each exit is right.
        answered: (N,) bool, whether the policy is.
        level: confidence of the intervals.
    """
    costs, found = _costs_alone(trace), right.any(dim=0)
    fits = right | ~found  # any exit does where none is right
    spent = torch.where(fits, costs[:, None], torch.inf).amin(dim=0)
    return _compare("hindsight oracle", found, float(spent.mean()), answered, level)


def random_exit(
    trace: Trace,
    right: Tensor,
    answered: Tensor,
    exit: Tensor,
    cost: float,
    level: float,
    seed: int,
) -> Baseline:
    """Samples leave at random, as many at each exit as under the policy, so at equal cost.

    What the policy gains over it is what its criterion knows about single samples.

    Args:
        trace: what every exit said.
        right: (E, N) bool, whether each exit is right.
        answered: (N,) bool, whether the policy is.
        exit: (N,) int64, the exits that the policy took.
        cost: the policy's mean cost.
        level: confidence of the intervals.
        seed: of the resampling.
    """
    shares = torch.bincount(exit, minlength=trace.num_exits).double() / trace.num_samples
    expected = shares @ right.double()  # (N,): the chance that a random exit is right about each
    gap = answered.double() - expected
    return Baseline(
        name="random exit, same cost",
        accuracy=float(expected.mean()),
        interval=bootstrap(expected.numpy(), level=level, seed=seed),
        cost=cost,
        lead=(float(gap.mean()), bootstrap(gap.numpy(), level=level, seed=seed)),
    )


def _costs_alone(trace: Trace) -> Tensor:
    """(E,) float64: the cost of leaving at each exit where no other head runs unless it must."""
    exits = range(trace.num_exits)
    return torch.stack([trace.exit_costs([j == k for j in exits[:-1]])[k] for k in exits])


def _compare(name: str, right: Tensor, cost: float, answered: Tensor, level: float) -> Baseline:
    samples = len(right)
    gained, lost = int((answered & ~right).sum()), int((right & ~answered).sum())
    return Baseline(
        name=name,
        accuracy=float(right.double().mean()),
        interval=wilson(int(right.sum()), samples, level),
        cost=cost,
        lead=((gained - lost) / samples, paired_difference(gained, lost, samples, level)),
    )
