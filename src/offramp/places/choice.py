"""Which exits, and of which size: every subset judged by what it costs to stay accurate.

A subset is judged by its frontier, at one threshold that all of its exits share: the mean, over
some tolerated drops of accuracy, of the least cost at which the accuracy falls by no more. One
threshold is nothing that could be fitted to labels, so that the comparison of thousands of subsets
is not won by the one that fits noise best. Costs are shares of the backbone's, with all heads that
run.

Guessing needs no exit: to answer a share of the samples with the commonest class costs nothing and
some accuracy. Exits pay where they cost less than that at the same accuracy, and each of them stays
only where it brings a least share of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.decide import gains
from offramp.decide.scored import Scored
from offramp.decide.trace import Trace

__all__ = ["EXACT", "Choice", "Judge", "choose"]

EXACT = 12  # candidates, up to which every subset is looked at
GRID = 64  # shared thresholds that a subset is judged at; between them it is interpolated

Subset = tuple[int, ...]
Array = NDArray[np.float64]
Bits = NDArray[np.uint8]
State = tuple[Bits, Array, Array]


class Judge:
    """What subsets of candidates cost at tolerated drops of accuracy.

    Whether a sample reaches a threshold is one bit, so that a walk over all subsets is a few
    operations on bits at each of its branches.

    Args:
        trace: what K candidates and the backbone say on N samples, with labels; the stages between
            candidates at one place cost nothing.
        scored: the same under the criterion.
        groups: for each candidate, the number of its place.
        drops: of accuracy, as shares.
    """

    def __init__(
        self, trace: Trace, scored: Scored, groups: Sequence[int], drops: Sequence[float]
    ) -> None:
        right = gains.correctness(trace, scored)
        self.groups, self.samples = tuple(groups), scored.num_samples
        self.stages, self.heads = scored.stages.numpy(), scored.heads.numpy()
        pool = scored.scores[:-1].flatten().sort().values
        marks = torch.linspace(0, len(pool) - 1, GRID - 1, dtype=torch.float64).long()
        grid = torch.cat([pool[marks], torch.tensor([torch.inf])])
        # Bit by bit: a sample that leaves at each exit under each threshold.
        self.reach = np.stack(
            [np.packbits((s >= grid[:, None]).numpy(), axis=-1) for s in scored.scores[:-1]]
        )
        self.right = np.packbits(right.numpy() > 0.5, axis=-1)
        self.start = np.packbits(np.ones((GRID, self.samples), np.bool_), axis=-1)
        self.full = float(right[-1].double().mean())
        labels = trace.labels if trace.labels is not None else scored.predictions[-1]
        self.commonest = float(labels.bincount().max()) / self.samples
        self.floors = [self.full - drop for drop in drops]
        lead = max(self.full - self.commonest, 1e-9)
        # What guessing leaves to pay at each drop.
        self.guessed = [max(0.0, 1 - drop / lead) for drop in drops]

    def costs(self, subset: Subset) -> list[float]:
        """At each tolerated drop, the least cost, never above that of guessing."""
        state: State = (self.start, np.zeros(GRID), np.zeros(GRID))
        for k in range(len(self.groups)):
            state = self._pass(state, k, k in subset)
        return self._at_floors(state)

    def value(self, subset: Subset) -> float:
        """The mean of :meth:`costs`: less is better."""
        return float(np.mean(self.costs(subset)))

    def all(self, pool: Sequence[int], most: int) -> dict[Subset, float]:
        """The value of every subset of ``pool`` of at most ``most``, one candidate a place."""
        seen: dict[Subset, float] = {}
        start: State = (self.start, np.zeros(GRID), np.zeros(GRID))
        for subset, state in self._walk((), 0, start, set(pool), most):
            seen[subset] = float(np.mean(self._at_floors(state)))
        return seen

    def _walk(
        self, chosen: Subset, k: int, state: State, pool: set[int], most: int
    ) -> Iterator[tuple[Subset, State]]:
        def offered(k: int) -> bool:
            free = not chosen or self.groups[chosen[-1]] != self.groups[k]
            return k in pool and free and len(chosen) < most

        while k < len(self.groups) and not offered(k):  # no choice, and there may be thousands
            state, k = self._pass(state, k, False), k + 1
        if k == len(self.groups):
            yield chosen, state
            return
        yield from self._walk(chosen, k + 1, self._pass(state, k, False), pool, most)
        yield from self._walk((*chosen, k), k + 1, self._pass(state, k, True), pool, most)

    def _pass(self, state: State, k: int, taken: bool) -> State:
        """Come to candidate ``k``; let go who reaches the threshold, if its exit is taken."""
        alive, cost, gain = state
        if not taken and self.stages[k] == 0:
            return state
        left = _count(alive)
        cost = cost + left * (self.stages[k] + (self.heads[k] if taken else 0.0))
        if not taken:
            return alive, cost, gain
        leaves = alive & self.reach[k]
        return alive ^ leaves, cost, gain + _count(leaves & self.right[k])

    def _at_floors(self, state: State) -> list[float]:
        alive, cost, gain = state
        cost = (cost + _count(alive) * self.stages[-1]) / self.samples
        gain = (gain + _count(alive & self.right[-1])) / self.samples
        return [
            min(guessed, _least(cost, gain, floor))
            for floor, guessed in zip(self.floors, self.guessed, strict=True)
        ]


def _count(bits: Bits) -> Array:
    """Samples at each threshold."""
    counted: Array = np.bitwise_count(bits).sum(axis=1, dtype=np.int64).astype(np.float64)
    return counted


def _least(cost: Array, gain: Array, floor: float) -> float:
    """The least cost at which the gain is not below ``floor``, also between two thresholds."""
    enough = gain >= floor - 1e-12
    least = float(cost[enough].min(initial=math.inf))
    # Where the gain comes to the floor from one threshold to the next stricter one.
    (low,) = np.nonzero(~enough[:-1] & enough[1:])
    share = (floor - gain[low]) / (gain[low + 1] - gain[low])
    between = cost[low] + share * (cost[low + 1] - cost[low])
    return min(least, float(between.min(initial=math.inf)))


@dataclass(frozen=True)
class Choice:
    """A subset of the candidates.

    Attributes:
        subset: their indices, rising; empty where no exit pays.
        value: mean cost over the tolerated drops, as a share of the backbone's.
        best: of the subsets that have exits, the best; what ``subset`` is, if that is not empty.
        tried: how many subsets were looked at.
        exact: whether these were all.
    """

    subset: Subset
    value: float
    best: Subset
    tried: int
    exact: bool


def choose(judge: Judge, worth: float, most: int | None = None) -> Choice:
    """The subset of least value, each exit of which lowers it by ``worth`` or more.

    Up to 12 candidates every subset is looked at. Of more, exits are first added, dropped and
    exchanged one by one as long as that helps; then every subset is looked at of those that are
    left and of the others that come nearest to helping.

    Args:
        judge: of subsets.
        worth: what an exit has to bring, as a share of the backbone's cost.
        most: exits at most; never more than 12.
    """
    every = range(len(judge.groups))
    most = EXACT if most is None else min(most, EXACT)
    pool, tried = tuple(every), 0
    if len(every) > EXACT:
        pool, tried = _reduced(judge, worth, most)
    seen = judge.all(pool, most)

    def price(subset: Subset) -> tuple[float, int]:
        return seen[subset] + worth * len(subset), len(subset)

    chosen = min(seen, key=price)
    best = min((subset for subset in seen if subset), key=price, default=())
    exact = len(pool) == len(every)
    return Choice(chosen, seen[chosen], best, tried + len(seen), exact)


def _reduced(judge: Judge, worth: float, most: int) -> tuple[Subset, int]:
    """The candidates that one-by-one changes end in, and the most promising others, 12 in all."""
    known: dict[Subset, float] = {}

    def price(subset: Subset) -> float:
        if subset not in known:
            known[subset] = judge.value(subset) + worth * len(subset)
        return known[subset]

    here: Subset = ()
    while True:
        moves = _moves(here, judge.groups, most)
        best = min(moves, key=price)
        if price(best) >= price(here) - 1e-12:
            break
        here = best
    promise = {
        k: min(price(move) for move in moves if k in move)
        for k in range(len(judge.groups))
        if k not in here and any(k in move for move in moves)
    }
    others = sorted(promise, key=lambda k: promise[k])[: EXACT - len(here)]
    return tuple(sorted((*here, *others))), len(known)


def _moves(subset: Subset, groups: Sequence[int], most: int) -> list[Subset]:
    """All subsets that come of adding, dropping or exchanging one candidate."""
    dropped = [tuple(k for k in subset if k != drop) for drop in subset]
    moves = list(dropped)
    for base in (subset, *dropped):
        held = {groups[k] for k in base}
        if len(base) < most:
            free = (k for k, group in enumerate(groups) if group not in held and k not in subset)
            moves += [tuple(sorted((*base, k))) for k in free]
    return moves
