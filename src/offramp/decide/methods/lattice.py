"""Thresholds among few distinct scores: counts of patience and votes, or ties everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from offramp.decide.methods.landscape import Array
from offramp.decide.scored import Scored, between

__all__ = ["Lattice", "is_lattice"]

LEVELS = 64  # distinct scores of an exit, up to which its thresholds are counted off
SAMPLED = 4096  # scores that are looked at to see whether there are that many
MOVES = 400  # improvements, at most


def is_lattice(scored: Scored) -> bool:
    """Whether every auxiliary exit has few distinct scores."""
    step = max(1, scored.num_samples // SAMPLED)
    return all(len(row[::step].unique()) <= LEVELS for row in scored.scores[:-1])


class Lattice:
    """All thresholds that part the scores of each exit, and a walk among them.

    A setting is a level for each exit: 0 is off, m is the threshold that the m highest distinct
    scores reach. The walk starts with everything off and lowers the exit that saves most for what
    it loses, until everything is at its lowest; of what it met within the budget, the best is
    improved by moving one exit, or two at a time.

    Args:
        scored: samples.
        gains: (E, N).
    """

    def __init__(self, scored: Scored, gains: Tensor) -> None:
        self.scored = scored
        self.gains = gains.double().numpy()
        self.levels = [row.unique().flip(0) for row in scored.scores[:-1]]
        self.sizes = [len(level) for level in self.levels]
        # The position of each score among the levels: a sample leaves where position < level.
        self.positions = np.stack(
            [
                len(level) - 1 - torch.searchsorted(level.flip(0).contiguous(), row).numpy()
                for level, row in zip(self.levels, scored.scores[:-1], strict=True)
            ]
        )
        self.seen: dict[tuple[int, ...], tuple[float, float]] = {}
        # Everyone at one exit is a setting too, which a walk may pass by.
        alone = np.diag(self.sizes).tolist()
        self.walked = [*self._walk(), *map(tuple, alone)]

    def at(self, budget: float) -> Tensor:
        """The best setting within the budget, or the cheapest, (E - 1,) float32."""
        fits = [state for state in self.walked if self._value(state)[0] <= budget]
        if not fits:
            return self._thresholds(min(self.walked, key=lambda state: self._value(state)[0]))
        here = max(fits, key=self._rank)
        for _ in range(MOVES):
            near = [s for s in self._near(here) if self._value(s)[0] <= budget]
            best = max(near, key=self._rank, default=here)
            if self._rank(best) <= self._rank(here):
                break
            here = best
        return self._thresholds(here)

    def _walk(self) -> Iterator[tuple[int, ...]]:
        here = (0,) * len(self.sizes)
        yield here
        while any(level < size for level, size in zip(here, self.sizes, strict=True)):
            cost, gain = self._value(here)
            options = [_moved(here, k, 1) for k, size in enumerate(self.sizes) if here[k] < size]

            def rate(state: tuple[int, ...], cost: float = cost, gain: float = gain) -> float:
                cheaper, worth = self._value(state)
                saved, lost = cost - cheaper, gain - worth
                if saved <= 0:
                    return -1e9 - lost + saved
                return -lost / saved

            here = max(options, key=rate)
            yield here

    def _near(self, here: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        singles = [
            (k, by)
            for k, size in enumerate(self.sizes)
            for by in {-1, 1, -here[k], size - here[k]}
            if by and 0 <= here[k] + by <= size
        ]
        for k, by in singles:
            moved = _moved(here, k, by)
            yield moved
            for j, other in singles:
                if j > k:
                    yield _moved(moved, j, other)

    def _value(self, state: tuple[int, ...]) -> tuple[float, float]:
        """Mean cost and mean gain."""
        if state not in self.seen:
            rows = np.arange(self.positions.shape[1])
            taken = np.full(len(rows), len(self.sizes))
            for k in reversed(range(len(state))):
                taken[self.positions[k] < state[k]] = k
            on = np.array([level > 0 for level in state])
            runs = np.append(self.scored.running(on), True)
            costs: Array = np.cumsum(self.scored.stages.numpy()) + np.cumsum(
                self.scored.heads.numpy() * runs
            )
            self.seen[state] = float(costs[taken].mean()), float(self.gains[taken, rows].mean())
        return self.seen[state]

    def _rank(self, state: tuple[int, ...]) -> tuple[float, float]:
        """The gain, and of equal gains the cheaper."""
        cost, gain = self._value(state)
        return gain, -cost

    def _thresholds(self, state: tuple[int, ...]) -> Tensor:
        out = torch.full((len(state),), torch.inf)
        for k, level in enumerate(state):
            if level == self.sizes[k]:
                out[k] = -torch.inf
            elif level:
                out[k] = between(self.levels[k][level], self.levels[k][level - 1])
        return out


def _moved(state: tuple[int, ...], exit: int, by: int) -> tuple[int, ...]:
    return (*state[:exit], state[exit] + by, *state[exit + 1 :])
