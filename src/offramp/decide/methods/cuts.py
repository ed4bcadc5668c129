"""Settings of a network that is cut short: where later exits are no better, nobody goes on to them.

A climb that starts where the last exit takes the rest does not find these: on the way there, the
budget is spent twice. They fit no label, so that few can be compared without fitting noise.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from offramp.decide.methods.families import Family, geometric
from offramp.decide.methods.landscape import Array, Used, odds
from offramp.decide.methods.turn import turn
from offramp.decide.ranks import Ranks
from offramp.decide.scored import Scored

__all__ = ["Cuts"]


class Cuts:
    """For each auxiliary exit: alone, and as the end of a line of geometric shares.

    Args:
        scored: samples.
        ranks: of samples that may be more.
    """

    def __init__(self, scored: Scored, ranks: Ranks) -> None:
        self.scored, self.ranks = scored, ranks
        self.shorter = [_shorter(scored, k) for k in range(1, scored.num_exits - 1)]
        # Geometric shares look at no gains.
        self.lines: list[Family] = [geometric(part, part.scores) for part in self.shorter]

    def at(self, budget: float) -> Iterator[tuple[Array, Used]]:
        """Where thresholds stand, in log-odds, and the exits in use; still to be put on the budget.

        Args:
            budget: a share of the full backbone's cost.
        """
        aux = self.scored.num_exits - 1
        for k in range(aux):
            on = np.zeros(aux, np.bool_)
            on[k] = True
            yield odds(np.full(aux, 0.5)), on
        for k, (part, line) in enumerate(zip(self.shorter, self.lines, strict=True), 1):
            ends = turn(part, line, budget)
            if part.cost(ends) <= budget < float(part.exit_costs(ends)[-1]):
                rest = torch.full((aux - k,), -torch.inf)
                reached = self.ranks.reaching(torch.cat([ends, rest]))
                yield odds(reached.numpy()), np.arange(aux) <= k


def _shorter(scored: Scored, last: int) -> Scored:
    """The samples as if the network ended at an exit."""
    stop = last + 1
    return Scored(
        scored.scores[:stop],
        scored.predictions[:stop],
        scored.stages[:stop],
        scored.heads[:stop],
        scored.switchable,
        cascade=scored.cascade,
    )
