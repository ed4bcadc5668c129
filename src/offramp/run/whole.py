"""All steps in one call of the engine, where it can do that: rows leave inside of the call.

What is left to do outside is to put the answers together. For a network that runs in a millisecond
that matters: between two calls of the engine, Python finds its own code thrown out of the caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from offramp.run.answers import Answer, Result
from offramp.run.chain import Link
from offramp.run.engines import Array, Engine, StepCall

__all__ = ["Whole"]


class Whole:
    """The steps under thresholds, as one call.

    Args:
        engine: whose call it is.
        call: what :func:`offramp.run.onnx_rule.join` describes, executable.
        links: the steps.
        own: the thresholds that the call has by itself; others are given to it.
    """

    def __init__(
        self, engine: Engine, call: StepCall, links: Sequence[Link], own: Sequence[float]
    ) -> None:
        self._engine = engine
        self._call = call
        self._exits = [link.exit for link in links]
        self._taken = [np.array([link.exit]) for link in links]
        for taken in self._taken:
            taken.flags.writeable = False  # every row that leaves there is given the same
        self._limits = [np.array(link.threshold, np.float32) for link in links[:-1]]
        self._own = tuple(own)
        known = self._own == tuple(link.threshold for link in links[:-1])
        self._more = [] if known else self._limits

    def under(self, links: Sequence[Link]) -> Whole:
        """The same call under the thresholds of other links."""
        return Whole(self._engine, self._call, links, self._own)

    def trim(self, inputs: Sequence[Array]) -> None:
        """As in :class:`offramp.run.engines.Engine`."""
        self._engine.trim(self._call, [*inputs, *self._more])

    def __call__(self, inputs: Sequence[Array]) -> Answer:
        """The answers to a batch."""
        said = self._call([*inputs, *self._more])
        summed = said.pop() if len(said) % 2 else 0.0
        answer = self._together(said[::2], said[1::2])
        # Sums are quick; where large values overflow them, all are looked at.
        with np.errstate(over="ignore", invalid="ignore"):
            total = answer.logits.sum()
        answer.finite = math.isfinite(summed) and math.isfinite(total)
        return answer

    def single(self, inputs: Sequence[np.ndarray]) -> tuple[int, Result | None]:
        """The answer to one row; nothing if it or its logits may not be finite.

        With as little code as can be: the engine's call has emptied the caches of the processor,
        so that each thing that is done here for the first time is fetched from memory.

        Returns:
            The exit's number, and the answer.
        """
        said = self._call([*inputs, *self._more] if self._more else inputs)
        last = len(self._exits) - 1
        while not said[2 * last].size:
            last -= 1
        logits, exit = said[2 * last], self._exits[last]
        prediction = logits.argmax(-1)  # NaN counts as the largest
        far = logits.item(prediction.item()) - logits.item(logits.argmin())
        if len(said) % 2:
            far += said[-1].item()
        # Infinite values of both signs give NaN; a sum that overflows is looked at by who calls.
        if not math.isfinite(far):
            return exit, None
        return exit, Result(prediction, logits, self._taken[last], said[2 * last + 1])

    def _together(self, logits: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> Answer:
        # What the first step says of all rows is written over by what later ones say of some.
        rows = np.arange(len(logits[0]))
        exit = np.full(len(rows), self._exits[0])
        answer = Answer(self._engine, exit, logits[0], scores[0])
        for position, limit in enumerate(self._limits, 1):
            rows = rows[~(scores[position - 1] >= limit)]  # a score that is not a number stays
            if not len(rows):
                break
            answer.exit[rows] = self._exits[position]
            answer.logits[rows], answer.score[rows] = logits[position], scores[position]
        return answer
