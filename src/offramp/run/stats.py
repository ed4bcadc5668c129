"""What a runner has done."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.build.cost import ExitCosts

__all__ = ["Stats", "Tally"]

NOTED = 256  # batches, before they are counted


@dataclass(frozen=True)
class Stats:
    """What a runner has done since it was made, or since ``reset``.

    Attributes:
        samples: how many samples came.
        exits: how many left at each exit of the model.
        survivors: how many entered each stage.
        mean_cost: cost per sample in the unit of the model's costs, heads that ran included.
        missed: how many samples were answered after the deadline they were given.
    """

    samples: int
    exits: tuple[int, ...]
    survivors: tuple[int, ...]
    mean_cost: float
    missed: int = 0


class Tally:
    """Counts as batches are answered, by several threads at once.

    Args:
        costs: of the model.
        kept: the exits that run, by number.
    """

    def __init__(self, costs: ExitCosts, kept: Sequence[int]) -> None:
        runs = range(kept[-2] + 1 if len(kept) > 1 else 0) if costs.cascade else kept
        heads = [cost if k in runs else 0.0 for k, cost in enumerate(costs.heads)]
        self._costs = np.cumsum(np.add(costs.stages, heads))
        self._lock = threading.Lock()
        # Who leaves at an exit that runs came to every stage up to it.
        self._from = (0, *(exit + 1 for exit in kept[:-1]))
        self._taken = [0] * len(costs.stages)
        self._missed = 0
        self._new: deque[tuple[list[int], int]] = deque()  # appending to it needs no lock

    def add(self, exits: list[int], missed: int = 0) -> None:
        """Note a batch: the exit of each sample, and how many missed their deadline."""
        self._new.append((exits, missed))
        if len(self._new) > NOTED:
            with self._lock:
                self._count()

    def _count(self) -> None:
        while self._new:
            exits, missed = self._new.popleft()
            self._missed += missed
            for exit in exits:
                self._taken[exit] += 1

    def stats(self) -> Stats:
        """The counts so far."""
        with self._lock:
            self._count()
            taken, missed = tuple(self._taken), self._missed
        samples = sum(taken)
        entered = tuple(sum(taken[exit:]) for exit in self._from)
        mean = float(np.dot(taken, self._costs)) / samples if samples else math.nan
        return Stats(samples, taken, entered, mean, missed)
