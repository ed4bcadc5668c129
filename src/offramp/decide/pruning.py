"""Which exits pay for their heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.decide import gains as worth
from offramp.decide.criteria import Criterion, criterion
from offramp.decide.defaults import usual_defaults
from offramp.decide.fitting import refuse_training
from offramp.decide.methods.families import shared
from offramp.decide.methods.turn import turn
from offramp.decide.scored import Scored, measure, score
from offramp.decide.trace import Trace
from offramp.errors import PolicyError

__all__ = ["Pruned", "prune_exits"]

EXACT = 12  # auxiliary exits, up to which every subset is looked at
ROWS = 8_192
GRID = 64  # shared thresholds that a subset is judged at; between them it is interpolated

Array = NDArray[np.float64]
Bits = NDArray[np.uint8]


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


@usual_defaults()
def prune_exits(
    trace: Trace,
    max_cost: float,
    rule: str | Criterion = "confidence",
    *,
    head_costs: Sequence[float] | None = None,
) -> Pruned:
    """The subset of exits that is most accurate at a budget, its heads counted.

    Every subset is looked at where there are up to 12 auxiliary exits; beyond, exits are dropped
    one by one while that helps. On at most 8,192 samples, each subset is judged under one
    shared threshold that just spends
    the budget: no threshold is fitted to labels, so the comparison between thousands of subsets is
    not won by the one that fits noise best. Calibrate the kept exits afterwards; a promise about
    them needs samples that had no part in this choice.

    Args:
        trace: of samples that training never saw.
        max_cost: mean cost, as a share of the full backbone's.
        rule: the criterion.
        head_costs: of the E exits (or of the E - 1 auxiliary ones), where not those of the trace.

    Raises:
        PolicyError: a criterion that carries state, whose scores depend on the subset in ways that
            one trace cannot show subset by subset cheaply; a cascade; a budget that no subset
            meets.
        TraceError: the trace is of training data.
    """
    refuse_training(trace, "A choice of exits")
    if trace.num_exits < 2:
        raise PolicyError("This trace has no auxiliary exit, so there is none to prune.")
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
    if trace.cascade:
        raise PolicyError(
            "Exits of a cascade cannot be pruned on one trace: each head reads the one before it, "
            "so leaving an exit out saves no head. Attach without cascade=True, and record anew."
        )
    whole = score(trace, named)
    right = worth.correctness(trace, whole)
    judge = _Judge(whole, right, max_cost)
    everything = tuple(range(trace.num_exits - 1))
    seen = judge.all() if len(everything) <= EXACT else _dropping(judge, everything)
    # The fewest exits among the best: a head that changes nothing is a head too many.
    keep = max(seen, key=lambda subset: (seen[subset], -len(subset)))
    if seen[keep] == -math.inf:
        raise PolicyError(
            f"No subset of the exits costs at most {max_cost:g} of the full network's: the "
            f"earliest exit alone costs {float(whole.exit_costs(torch.zeros(len(everything)))[0]):.4g}."  # noqa: E501
        )
    used = torch.zeros(len(everything), dtype=torch.bool)
    used[list(keep)] = True
    line = shared(whole, right)
    found = turn(whole, lambda position: torch.where(used, line(position), torch.inf), max_cost)
    cost, gain = measure(whole, found, right)
    allowed = turn(whole, line, max_cost)
    return Pruned(
        keep,
        tuple(found[used].tolist()),
        gain,
        measure(whole, allowed, right)[1],
        cost,
        len(seen),
    )


def _dropping(judge: _Judge, everything: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Drop the exit whose loss helps most, until none helps."""
    here = everything
    seen = {here: judge.one(here)}
    while here:
        smaller = {tuple(k for k in here if k != drop): 0.0 for drop in here}
        smaller = {subset: judge.one(subset) for subset in smaller}
        seen |= smaller
        best = max(smaller, key=lambda subset: smaller[subset])
        if smaller[best] < seen[here]:
            break
        here = best
    return seen


class _Judge:
    """The gain of subsets at a budget, for a grid of shared thresholds at once.

    Whether a sample reaches a threshold is one bit, so that a walk over all subsets, exit by exit,
    is a few operations on bits at each of its branches.
    """

    def __init__(self, whole: Scored, right: Tensor, budget: float) -> None:
        self.budget, self.samples = budget, whole.num_samples
        self.stages, self.heads = whole.stages.numpy(), whole.heads.numpy()
        pool = whole.scores[:-1].flatten().sort().values
        places = torch.linspace(0, len(pool) - 1, GRID - 1, dtype=torch.float64).long()
        grid = torch.cat([pool[places], torch.tensor([torch.inf])])
        reach = whole.scores[:-1, None] >= grid[None, :, None]
        self.reach = np.packbits(reach.numpy(), axis=-1)
        self.right = np.packbits(right.numpy() > 0.5, axis=-1)
        self.start = np.packbits(np.ones((GRID, self.samples), np.bool_), axis=-1)

    def all(self) -> dict[tuple[int, ...], float]:
        """Every subset."""
        seen: dict[tuple[int, ...], float] = {}
        zero = np.zeros(GRID)
        self._branch((), 0, (self.start, zero, zero), seen, None)
        return seen

    def one(self, subset: tuple[int, ...]) -> float:
        """One subset."""
        seen: dict[tuple[int, ...], float] = {}
        zero = np.zeros(GRID)
        self._branch((), 0, (self.start, zero, zero), seen, set(subset))
        return seen[subset]

    def _branch(
        self,
        chosen: tuple[int, ...],
        k: int,
        state: tuple[Bits, Array, Array],
        seen: dict[tuple[int, ...], float],
        only: set[int] | None,
    ) -> None:
        alive, cost, gain = state
        left = np.bitwise_count(alive).sum(axis=1, dtype=np.int64)
        cost = cost + left * self.stages[k]
        if k == len(self.reach):
            gain = gain + np.bitwise_count(alive & self.right[k]).sum(axis=1, dtype=np.int64)
            seen[chosen] = self._at_budget(cost / self.samples, gain / self.samples)
            return
        if only is None or k not in only:
            self._branch(chosen, k + 1, (alive, cost, gain), seen, only)
        if only is None or k in only:
            leaves = alive & self.reach[k]
            won = np.bitwise_count(leaves & self.right[k]).sum(axis=1, dtype=np.int64)
            after = (alive ^ leaves, cost + left * self.heads[k], gain + won)
            self._branch((*chosen, k), k + 1, after, seen, only)

    def _at_budget(self, cost: Array, gain: Array) -> float:
        """The gain where the cost is the budget, between thresholds of the grid."""
        if cost[0] > self.budget:
            return -math.inf
        # Costs rise with the threshold, but for heads that outweigh what leaving there saves.
        return float(np.interp(self.budget, np.maximum.accumulate(cost), gain))
