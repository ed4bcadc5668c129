"""All steps in one call of the engine, where it can do that: rows leave inside of the call.

What is left to do outside is to put the answers together. For a network that runs in a millisecond
that matters: between two calls of the engine, Python finds its own code thrown out of the caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from offramp.run.answers import Answer
from offramp.run.chain import Link
from offramp.run.engines import Array, Engine, StepCall

__all__ = ["Whole"]


class Whole:
    """The steps under thresholds, as one call.

    Args:
        engine: whose call it is.
        call: what :func:`offramp.run.onnx_rule.join` describes, executable.
        links: the steps.
    """

    def __init__(self, engine: Engine, call: StepCall, links: Sequence[Link]) -> None:
        self._engine = engine
        self._call = call
        self._exits = [link.exit for link in links]
        limits = [link.threshold for link in links[:-1]]
        # A single step has no such input.
        self._limits = [np.array(limits, np.float32)] if limits else []

    def under(self, links: Sequence[Link]) -> Whole:
        """The same call under the thresholds of other links."""
        return Whole(self._engine, self._call, links)

    def trim(self, inputs: Sequence[Array]) -> None:
        """As in :class:`offramp.run.engines.Engine`."""
        self._engine.trim(self._call, [*inputs, *self._limits])

    def __call__(self, inputs: Sequence[Array]) -> Answer:
        """The answers to a batch."""
        check, *said = self._call([*inputs, *self._limits])
        count = len(self._exits)
        logits, scores, goes = said[: 2 * count : 2], said[1 : 2 * count : 2], said[2 * count :]
        finite = math.isfinite(check.item())
        if len(logits[0]) == 1:
            last = max(k for k in range(count) if len(logits[k]))
            entered = [1] * (last + 1)
            exit = np.array([self._exits[last]])
            return Answer(self._engine, exit, logits[last], scores[last], entered, finite)
        # What the first step says of all rows is written over by what later ones say of some.
        answer = Answer(self._engine, np.full(len(logits[0]), self._exits[0]))
        answer.logits, answer.score, answer.finite = logits[0], scores[0], finite
        rows = np.arange(len(logits[0]))
        answer.entered.append(len(rows))
        for position, stays in enumerate(goes, 1):
            rows = rows[stays]
            if not len(rows):
                break
            answer.entered.append(len(rows))
            answer.exit[rows] = self._exits[position]
            answer.logits[rows], answer.score[rows] = logits[position], scores[position]
        return answer
