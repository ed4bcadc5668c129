"""All thresholds together, on the budget, and kept from fitting the calibration set's noise.

The best thresholds for a price on cost (``max gain - price * cost``, by coordinate ascent over
sorted prefix sums) reach only the convex hull of what thresholds can do. The search therefore walks
on the budget itself: a setting is a share per exit (how many samples reach its threshold), in
log-odds; one exit's is moved, and then all are shifted together until the mean cost is the budget
again. A move stays where the gain grew. Heads are switched off and on likewise.

What keeps it honest on few samples:

* it starts from lines that fit no label, and stays with MSDNet's geometric shares as far as the
  gain over them could be chance;
* gains are smoothed (:mod:`offramp.decide.gains`);
* a network cut short (:mod:`offramp.decide.methods.cuts`) takes its place only where it is better
  by more than half a standard error;
* it runs on several random parts of the samples, and their mean in log-odds is the answer (bagging:
  Breiman, 1996), because the mean of several good settings moves less with the sample than any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.decide.methods.cuts import Cuts
from offramp.decide.methods.families import geometric, quantile, shared
from offramp.decide.methods.landscape import Array, Landscape, Used, odds, shares
from offramp.decide.methods.lattice import Lattice, is_lattice
from offramp.decide.methods.turn import turn
from offramp.decide.ranks import Ranks
from offramp.decide.scored import Scored

__all__ = ["Search"]

STEPS = (1.0, 0.5, 0.25)  # log-odds that an exit is moved by, coarse to fine
ROUNDS = 6  # of each step, at most
PROBE = 0.1  # log-odds, the common shift that tells what cost is worth
PARTS = 6  # random parts whose settings are averaged
PART = 0.7  # of the samples, in each part
WORTH = 2e-4  # the gain for which a head is switched off or on
ROWS = 20_000  # beyond it, sampling noise is far below what any test set could show
COARSE = 6_000  # of them that the first, long steps are taken on
CLIMBS = 3  # starts that are improved
TRIES = 20  # settings of a lattice that are looked at on all samples
SURE = 0.5  # standard errors by which a shorter network has to be better
LINES = (geometric, shared, quantile)  # the first is what is held to in doubt


@dataclass(frozen=True, eq=False)
class _Setting:
    log_odds: Array
    on: Used
    gain: float


class Search:
    """The search over one scored trace.

    Args:
        scored: scores of all exits.
        gains: of rows (n,) int64 what leaving at each exit is worth there, (E, n).
        seed: of the random parts.
    """

    def __init__(self, scored: Scored, gains: Callable[[Tensor], Tensor], seed: int = 0) -> None:
        self.scored = scored
        self.ranks = Ranks(scored.scores[:-1])
        generator = np.random.default_rng(seed)
        rows = torch.from_numpy(generator.permutation(scored.num_samples)[:ROWS])
        self.few, worth = scored.subset(rows), gains(rows)
        self.land = Landscape.of(self.few, worth, self.ranks)
        self.lattice = Lattice(self.few, worth) if is_lattice(self.few) else None
        # Rows are in random order, so the first ones are as good as any.
        self.coarse = self.land.rows(np.arange(min(len(rows), COARSE)))
        self.first = self.few.subset(torch.arange(min(len(rows), COARSE)))
        self.families = [line(self.first, worth[:, : self.coarse.size]) for line in LINES]
        self.cuts = Cuts(self.first, self.ranks)
        # What everyone pays at the least where an exit is the first in use.
        heads = scored.heads if scored.switchable else scored.heads.cumsum(0)
        self.least = (scored.stages.cumsum(0) + heads).numpy()
        size = max(1, min(round(PART * len(rows)), COARSE))
        self.parts = [self.land.rows(generator.permutation(len(rows))[:size]) for _ in range(PARTS)]

    def at(self, budget: float) -> Tensor:
        """Thresholds whose mean cost on the calibration samples is the budget, and not above it.

        Args:
            budget: a share of the full backbone's cost, within reach.

        Returns:
            (E - 1,) float32.
        """
        if self.lattice is not None:
            return self._on_lattice(self.lattice, budget)
        known, starts = self._starts(budget)
        climbed = [self._climb(self.coarse, start, budget) for start in starts[:CLIMBS]]
        best = self._switch(max(climbed, key=lambda setting: setting.gain), budget)
        if self.coarse.size < self.land.size:
            best = self._settle(self.land, best.log_odds, best.on, budget)
            best = self._climb(self.land, best, budget, STEPS[-1:])
        start = self._settle(self.land, known.log_odds, best.on, budget)
        found = []
        for part in self.parts:
            seen = self._settle(part, best.log_odds, best.on, budget)
            found.append(self._climb(part, seen, budget, STEPS[1:]).log_odds)
        way = self._way(start, best)
        mean = (1 - way) * start.log_odds + way * np.mean(found, axis=0)
        chosen = self._or_cut(self._settle(self.land, mean, best.on, budget), budget)
        return self._exact(chosen.log_odds, chosen.on, budget)

    def _on_lattice(self, lattice: Lattice, budget: float) -> Tensor:
        """The lattice's, which sees some of the samples only, within the budget on all of them."""
        aim = budget
        for _ in range(TRIES):
            found = lattice.at(aim)
            over = self.scored.cost(found) - budget
            if over <= 1e-12:
                break
            aim = min(aim - over, self.few.cost(found) - 1e-9)
        return found

    def _or_cut(self, found: _Setting, budget: float) -> _Setting:
        """What was found, or a network cut short that is better by more than little chance."""
        before = self.land.each(found.log_odds, found.on)
        best, most = found, 0.0
        for log_odds, on in self.cuts.at(budget):
            other = self._settle(self.land, log_odds, on, budget)
            if other.gain <= found.gain + most:
                continue
            gained = self.land.each(other.log_odds, on) - before
            if other.gain - found.gain > SURE * float(gained.std()) / len(gained) ** 0.5:
                best, most = other, other.gain - found.gain
        return best

    def _starts(self, budget: float) -> tuple[_Setting, list[_Setting]]:
        """The geometric line, and all lines that fit no label and means of two, best first."""
        on = np.ones(self.scored.num_exits - 1, np.bool_)
        ends = [turn(self.first, family, budget) for family in self.families]
        lines = np.stack([odds(self.ranks.reaching(end).numpy()) for end in ends])
        pairs = (lines + np.roll(lines, 1, axis=0)) / 2
        moved, gain = self.coarse.onto(np.concatenate([lines, pairs]), on, budget)
        order = np.argsort(-gain, kind="stable")
        found = [_Setting(moved[i], on, float(gain[i])) for i in range(len(gain))]
        return found[0], [found[i] for i in order]

    def _way(self, start: _Setting, best: _Setting) -> float:
        """How far to go from the start to what was found: all the way if the gain is sure.

        With z the gain in standard errors, z^2 / (z^2 + 1), the shrinkage that is best for a
        normal mean whose own estimate of size is z.
        """
        here = self.land.each(best.log_odds, best.on).astype(np.float64)
        difference = here - self.land.each(start.log_odds, start.on)
        spread = float(difference.std())
        if spread == 0:
            return 0.0
        z = max(float(difference.mean()), 0.0) / spread * len(difference) ** 0.5
        return float(z**2 / (z**2 + 1))

    def _settle(self, land: Landscape, log_odds: Array, on: Used, budget: float) -> _Setting:
        moved, gain = land.onto(log_odds[None], on, budget)
        # A little above the budget is near enough to compare, but not where nothing lies below it.
        out_of_reach = bool(on.any()) and self.least[int(on.argmax())] > budget
        return _Setting(moved[0], on, -np.inf if out_of_reach else float(gain[0]))

    def _climb(
        self,
        land: Landscape,
        start: _Setting,
        budget: float,
        steps: tuple[float, ...] = STEPS,
    ) -> _Setting:
        """Move one exit at a time, on the budget, while the gain grows."""
        here = start
        unit = np.eye(len(here.on))[here.on]
        probes = np.full((2, len(here.on)), PROBE) * np.array([[1.0], [-1.0]])
        for step in steps:
            moves = np.concatenate([step * unit, -step * unit, probes])
            for _ in range(ROUNDS):
                tried = here.log_odds + moves
                cost, gain = land.means(tried, here.on)
                # All moves are compared at the budget, by the price that a common shift pays.
                spread = cost[-1] - cost[-2]
                price = max((gain[-1] - gain[-2]) / spread, 0.0) if spread > 1e-9 else 0.0
                worth = gain[:-2] + price * (budget - cost[:-2])
                better = here
                for best in np.argsort(-worth, kind="stable")[:2]:
                    if worth[best] <= here.gain:
                        break
                    better = self._settle(land, tried[best], here.on, budget)
                    if better.gain > here.gain:
                        break
                if better.gain <= here.gain:
                    break
                here = better
        return here

    def _switch(self, start: _Setting, budget: float) -> _Setting:
        """Switch single heads off or on while that is worth it."""
        here = start
        if not self.scored.switchable:
            return here
        for _ in range(2 * len(here.on)):
            options = []
            for k in range(len(here.on)):
                on = here.on.copy()
                on[k] = not on[k]
                if on.any():
                    options.append(self._settle(self.coarse, here.log_odds, on, budget))
            best = max(options, key=lambda option: option.gain, default=here)
            if best.gain <= here.gain + WORTH:
                return here
            here = self._climb(self.coarse, best, budget)
        return here

    def _exact(self, log_odds: Array, on: Used, budget: float) -> Tensor:
        """Thresholds on all samples: the smallest common shift that keeps to the budget."""
        used = torch.from_numpy(on)

        def at(position: float) -> Tensor:
            share = shares(log_odds + 16 * (2 * position - 1))
            thresholds = self.ranks.thresholds(torch.from_numpy(share))
            return torch.where(used, thresholds, torch.inf)

        return turn(self.scored, at, budget)
