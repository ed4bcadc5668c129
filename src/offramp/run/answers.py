"""Answers, put together as rows leave at different exits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.run.engines import Array, Engine

__all__ = ["Answer", "Result", "result_of"]


@dataclass(frozen=True)
class Result:
    """The answers to a batch, in the order of its rows, as arrays of the kind that was given.

    Attributes:
        prediction: (B,) int64 class indices.
        logits: (B, C) of the exit that was taken (as the criterion gives them: an ensemble's, say).
        exit: (B,) int64 number of that exit.
        score: (B,) its score.
    """

    prediction: Array
    logits: Array
    exit: Array
    score: Array


class Answer:
    """The answers as they come in."""

    def __init__(self, engine: Engine, samples: int) -> None:
        self.engine = engine
        self.samples = samples
        self.exit = np.zeros(samples, np.int64)
        self.logits: Array = None
        self.score: Array = None
        self.entered: list[int] = []

    def add(self, exit: int, rows: np.ndarray, logits: Array, score: Array) -> None:
        """The answers (R, C) and scores (R,) with which the samples ``rows`` (R,) leave."""
        self.exit[rows] = exit
        if len(rows) == self.samples:  # all at once: nothing to put together
            self.logits, self.score = logits, score
            return
        self.logits = self.engine.scatter(self.logits, logits, rows, self.samples)
        self.score = self.engine.scatter(self.score, score, rows, self.samples)

    def result(self, logits: np.ndarray, like: Tensor | np.ndarray) -> Result:
        """As arrays of the kind of ``like``; ``logits`` are the answer's, on the host."""
        return result_of(self.engine, self.logits, self.exit, self.score, logits, like)


def result_of(
    engine: Engine,
    logits: Array,
    exit: np.ndarray,
    score: Array,
    on_host: np.ndarray,
    like: Tensor | np.ndarray,
) -> Result:
    """Answers as arrays of the kind of ``like``.

    Args:
        engine: whose arrays the logits and scores are.
        logits: (B, C).
        exit: (B,).
        score: (B,).
        on_host: the logits as a numpy array.
        like: an input.
    """
    prediction = on_host.argmax(-1)
    if isinstance(like, np.ndarray):
        return Result(prediction, on_host, exit, engine.host(score))
    found: list[Tensor] = [
        torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        for x in (prediction, logits, exit, score)
    ]
    # Not in inference mode, and not a view of an input.
    found = [value.clone() if value.is_inference() else value for value in found]
    if not (like.is_cpu and isinstance(score, np.ndarray)):
        found = [value.to(like.device) for value in found]
    return Result(*found)
