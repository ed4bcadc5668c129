"""Which exits pay for their heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from offramp.decide import gains as worth
from offramp.decide.criteria import Criterion, criterion
from offramp.decide.fitting import usable
from offramp.decide.methods.families import shared
from offramp.decide.methods.turn import turn
from offramp.decide.scored import Scored, measure, score
from offramp.decide.trace import Trace
from offramp.errors import PolicyError

__all__ = ["Pruned", "prune_exits"]

EXACT = 12  # auxiliary exits, up to which every subset is looked at
ROWS = 20_000


@dataclass(frozen=True)
class Pruned:
    """The subset of the auxiliary exits that is worth its heads.

    Attributes:
        keep: indices of the auxiliary exits to keep; give them to ``Trace.keep_exits``.
        thresholds: what each kept exit was compared with.
        accuracy: with the subset, at the budget (agreement, where the trace has no labels).
        accuracy_all: with all exits, at the budget.
        cost_ratio: mean cost with the subset.
        tried: how many subsets were looked at.
    """

    keep: tuple[int, ...]
    thresholds: tuple[float, ...]
    accuracy: float
    accuracy_all: float
    cost_ratio: float
    tried: int


def prune_exits(
    trace: Trace,
    max_cost: float,
    rule: str | Criterion = "confidence",
    *,
    head_costs: Sequence[float] | None = None,
) -> Pruned:
    """The subset of exits that is most accurate at a budget, its heads counted.

    Every subset is looked at where there are up to 12 auxiliary exits; beyond, exits are dropped
    one by one while that helps. Each subset is judged under one shared threshold that just spends
    the budget: no threshold is fitted to labels, so the comparison between thousands of subsets is
    not won by the one that fits noise best. Calibrate the kept exits afterwards.

    Args:
        trace: of samples that training never saw.
        max_cost: mean cost, as a share of the full backbone's.
        rule: the criterion.
        head_costs: of the E exits (or of the E - 1 auxiliary ones), where not those of the trace.

    Raises:
        PolicyError: a criterion that carries state, whose scores depend on the subset in ways that
            one trace cannot show subset by subset cheaply; a budget that no subset meets.
        TraceError: the trace is of training data.
    """
    if trace.labels is not None:
        usable(trace, "A choice of exits")
    if head_costs is not None:
        heads = torch.as_tensor(head_costs, dtype=torch.float64)
        if len(heads) == trace.num_exits - 1:
            heads = torch.cat([heads, heads.new_zeros(1)])
        trace = replace(trace, head_costs=heads)
    if trace.num_samples > ROWS:
        generator = torch.Generator().manual_seed(0)
        trace = trace.subset(torch.randperm(trace.num_samples, generator=generator)[:ROWS])
    named = criterion(rule)
    if named.stateful:
        raise PolicyError(
            f"Exits cannot be pruned under {named.name!r}, whose scores change with the exits "
            f"before. Prune under 'confidence', and calibrate the kept exits under it."
        )
    whole = score(trace, named)
    right = worth.correctness(trace, whole)
    everything = tuple(range(trace.num_exits - 1))
    judge = _Judge(whole, right, max_cost)
    if len(everything) <= EXACT:
        for size in range(len(everything) + 1):
            for subset in combinations(everything, size):
                judge(subset)
    else:
        here = everything
        while here:
            smaller = [tuple(k for k in here if k != drop) for drop in here]
            best = max(smaller, key=lambda subset: judge(subset)[0])
            if judge(best)[0] < judge(here)[0]:
                break
            here = best
    # The fewest exits among the best: a head that changes nothing is a head too many.
    keep = max(judge.seen, key=lambda subset: (judge.seen[subset][0], -len(subset)))
    accuracy, cost, threshold = judge.seen[keep]
    if cost > max_cost:
        raise PolicyError(
            f"No subset of the exits costs at most {max_cost:g} of the full network's: the "
            f"cheapest costs {min(value[1] for value in judge.seen.values()):.4g}."
        )
    return Pruned(
        keep,
        (threshold,) * len(keep),
        accuracy,
        judge(everything)[0],
        cost,
        len(judge.seen),
    )


class _Judge:
    """Accuracy, cost and threshold of a subset at the budget."""

    def __init__(self, whole: Scored, right: Tensor, budget: float) -> None:
        self.whole, self.right, self.budget = whole, right, budget
        self.line = shared(whole, right)
        self.seen: dict[tuple[int, ...], tuple[float, float, float]] = {}

    def __call__(self, subset: tuple[int, ...]) -> tuple[float, float, float]:
        if subset not in self.seen:
            used = torch.zeros(self.whole.num_exits - 1, dtype=torch.bool)
            used[list(subset)] = True

            def at(position: float) -> Tensor:
                return torch.where(used, self.line(position), torch.inf)

            found = turn(self.whole, at, self.budget)
            cost, gain = measure(self.whole, found, self.right)
            gain = gain if cost <= self.budget else -1.0 - cost
            level = float(found[used][0]) if subset else float("inf")
            self.seen[subset] = gain, cost, level
        return self.seen[subset]
