"""All thresholds together, on the budget, and kept from fitting the calibration set's noise.

The best thresholds for a price on cost (``max gain - price * cost``, by coordinate ascent over
sorted prefix sums) reach only the convex hull of what thresholds can do. The search therefore walks
on the budget itself: a setting is a share per exit (how many samples reach its threshold), in
log-odds; one exit's is moved, and then all are shifted together until the mean cost is the budget
again. A move stays where the gain grew. Heads are switched off and on likewise.

What keeps it honest on few samples:

* it starts midway between one shared threshold and MSDNet's geometric shares, which fit no label;
* gains are smoothed (:mod:`offramp.decide.gains`);
* it runs on several random parts of the samples, and their mean in log-odds is the answer (bagging:
  Breiman, 1996), because the mean of several good settings moves less with the sample than any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.methods.families import geometric, quantile, shared
from offramp.decide.methods.landscape import Landscape, odds, shares
from offramp.decide.methods.turn import turn
from offramp.decide.ranks import Ranks
from offramp.decide.scored import Scored

__all__ = ["Search"]

STEPS = (1.0, 0.5, 0.25)  # log-odds that an exit is moved by, coarse to fine
ROUNDS = 4  # of each step, at most
PARTS = 6  # random parts whose settings are averaged
PART = 0.7  # of the samples, in each part
WORTH = 2e-4  # the gain for which a head is switched off or on
WAYS = torch.linspace(0, 1, 5)  # how far to go from the start to what was found


@dataclass(frozen=True, eq=False)
class _Setting:
    log_odds: Tensor
    on: Tensor
    gain: float


class Search:
    """The search over one scored trace.

    Args:
        scored: scores of all exits.
        gains: (E, N), smoothed or not.
        seed: of the random parts.
    """

    def __init__(self, scored: Scored, gains: Tensor, seed: int = 0) -> None:
        self.scored, self.seed = scored, seed
        self.ranks = Ranks(scored.scores[:-1])
        self.land = Landscape.of(scored, gains, self.ranks, seed)
        self.families = [family(scored, gains) for family in (shared, geometric, quantile)]
        generator = torch.Generator().manual_seed(seed + 1)
        rows = len(self.land.weights)
        size = max(1, round(PART * rows))
        self.parts: list[tuple[Landscape, Landscape]] = []
        for _ in range(PARTS):
            order = torch.randperm(rows, generator=generator)
            inside, outside = order[:size], order[size:]
            self.parts.append((self.land.rows(inside), self.land.rows(outside)))

    def at(self, budget: float) -> Tensor:
        """Thresholds whose mean cost on the calibration samples is the budget, and not above it.

        Args:
            budget: a share of the full backbone's cost, within reach.

        Returns:
            (E - 1,) float32.
        """
        start = self._start(budget)
        best = self._switch(self._climb(self.land, start, budget), budget)
        start = self._settle(self.land, start.log_odds, best.on, budget)
        found, outside = [], torch.zeros(len(WAYS), dtype=torch.float64)
        for inner, outer in self.parts:
            seen = self._settle(inner, best.log_odds, best.on, budget)
            mine = self._climb(inner, seen, budget).log_odds
            found.append(mine)
            ways = torch.lerp(start.log_odds[None], mine[None], WAYS[:, None])
            outside += outer.onto(ways, best.on, budget)[1]
        way = WAYS[int(outside.argmax())]
        mean = torch.lerp(start.log_odds, torch.stack(found).mean(0), way)
        return self._exact(mean, best.on, budget)

    def _start(self, budget: float) -> _Setting:
        """The best of the lines that fit no label, and of their means."""
        on = torch.ones(self.scored.num_exits - 1, dtype=torch.bool)
        ends = [turn(self.scored, family, budget) for family in self.families]
        lines = torch.stack([odds(self.ranks.reaching(end).float()) for end in ends])
        pairs = (lines + lines.roll(1, 0)) / 2
        moved, gain = self.land.onto(torch.cat([lines, pairs]), on, budget)
        best = int(gain.argmax())
        return _Setting(moved[best], on, float(gain[best]))

    def _settle(self, land: Landscape, log_odds: Tensor, on: Tensor, budget: float) -> _Setting:
        moved, gain = land.onto(log_odds[None], on, budget)
        return _Setting(moved[0], on, float(gain[0]))

    def _climb(self, land: Landscape, start: _Setting, budget: float) -> _Setting:
        """Move one exit at a time, on the budget, while the gain grows."""
        here = start
        used = here.on.nonzero().flatten()
        for step in STEPS:
            for _ in range(ROUNDS):
                moves = torch.zeros(2 * len(used), len(here.log_odds))
                moves[torch.arange(len(used)), used] = step
                moves[torch.arange(len(used)) + len(used), used] = -step
                tried, gain = land.onto(here.log_odds + moves, here.on, budget)
                best = int(gain.argmax())
                if float(gain[best]) <= here.gain:
                    break
                here = _Setting(tried[best], here.on, float(gain[best]))
        return here

    def _switch(self, start: _Setting, budget: float) -> _Setting:
        """Switch single heads off or on while that is worth it."""
        here = start
        if not self.scored.switchable:
            return here
        for _ in range(2 * len(here.on)):
            options = []
            for k in range(len(here.on)):
                on = here.on.clone()
                on[k] = not on[k]
                if bool(on.any()):
                    options.append(self._settle(self.land, here.log_odds, on, budget))
            best = max(options, key=lambda option: option.gain, default=here)
            if best.gain <= here.gain + WORTH:
                return here
            here = self._climb(self.land, best, budget)
        return here

    def _exact(self, log_odds: Tensor, on: Tensor, budget: float) -> Tensor:
        """Thresholds on all samples: the smallest common shift that keeps to the budget."""

        def at(position: float) -> Tensor:
            thresholds = self.ranks.thresholds(shares(log_odds + 16 * (2 * position - 1)).double())
            return torch.where(on, thresholds, torch.inf)

        return turn(self.scored, at, budget)
