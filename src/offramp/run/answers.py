"""Answers, put together as rows leave at different exits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.run.engines import Array, Engine

__all__ = ["Answer", "Result"]


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
        if isinstance(like, np.ndarray):
            score = self.engine.host(self.score)
            return Result(logits.argmax(-1), logits, self.exit, score)
        answer, scores, taken = (
            torch.as_tensor(value).to(like.device) for value in (self.logits, self.score, self.exit)
        )
        return Result(answer.argmax(-1), answer, taken, scores)
