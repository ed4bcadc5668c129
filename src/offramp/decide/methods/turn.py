"""Turn the one dial of a family until the mean cost is the budget."""

from __future__ import annotations

from torch import Tensor

from offramp.decide.methods.families import Family
from offramp.decide.scored import Scored

__all__ = ["turn"]

HALVINGS = 30


def turn(scored: Scored, family: Family, budget: float) -> Tensor:
    """The dearest thresholds of a family whose mean cost is within the budget.

    Args:
        scored: the samples that the cost is the mean over.
        family: from dear (0) to cheap (1).
        budget: a share of the full backbone's cost.

    Returns:
        (E - 1,) float32. Where even the family's cheapest is above the budget, that.
    """
    dear, cheap = 0.0, 1.0
    found = family(dear)
    if scored.cost(found) <= budget:
        return found
    found = family(cheap)
    best = scored.cost(found)
    for _ in range(HALVINGS):
        # Near the budget, further halving moves no sample.
        if 0 <= budget - best <= 1e-4 * budget:
            break
        middle = (dear + cheap) / 2
        tried = family(middle)
        cost = scored.cost(tried)
        if cost <= budget:
            cheap = middle
            if cost >= best or best > budget:
                found, best = tried, cost
        else:
            dear = middle
    return found
