"""Answers, put together as rows leave at different exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from offramp.run.engines import Array, Engine, sent

__all__ = ["Answer", "Result", "as_tensors"]


@dataclass(slots=True)  # frozen, it would take twice as long to make: a caller at batch 1 waits
class Result:
    """The answers to a batch, in the order of its rows, as arrays of the kind that was given.

    Arrays of a single row may be read-only.

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


def as_tensors(found: Result, device: torch.device) -> Result:
    """Arrays of the processor as tensors that lie on a device."""
    arrays = [getattr(found, name) for name in _NAMES]
    tensors = [torch.from_numpy(v if v.flags.writeable else v.copy()) for v in arrays]
    if device.type != "cpu":
        tensors = [sent(value, device) for value in tensors]
    return Result(*tensors)


@dataclass
class Answer:
    """The answers of a batch of B samples, as they come in.

    Attributes:
        engine: whose arrays they are.
        exit: (B,) int64.
        logits: (B, C); ``None`` as long as nobody left.
        score: (B,); likewise.
        prediction: (B,) int64; ``None`` where it is not known yet.
        finite: whether inputs and logits are known to be finite; if not, they have to be looked at.
    """

    engine: Engine
    exit: np.ndarray
    logits: Array = None
    score: Array = None
    prediction: np.ndarray | None = None
    finite: bool = False
    _host: np.ndarray | None = None

    def add(self, exit: int, rows: np.ndarray, logits: Array, score: Array) -> None:
        """The answers (R, C) and scores (R,) with which the samples ``rows`` (R,) leave."""
        samples = len(self.exit)
        self.exit[rows] = exit
        if len(rows) == samples:  # all at once: nothing to put together
            self.logits, self.score = logits, score
            return
        index = self.engine.index(rows)
        self.logits = self.engine.scatter(self.logits, logits, index, samples)
        self.score = self.engine.scatter(self.score, score, index, samples)

    def own(self, others: Sequence[Array] | None = None) -> None:
        """Copy logits and scores of torch that share memory with ``others``; by default, all.

        Engines on numpy arrays write every value to memory of its own.
        """
        self.logits, self.score = (_apart(value, others) for value in (self.logits, self.score))

    def host_logits(self) -> np.ndarray:
        """(B, C), once all rows have left; they come from a device once."""
        if self._host is None:
            self._host = self.engine.host(self.logits)
        return self._host

    def result(self, like: Tensor | np.ndarray) -> Result:
        """As arrays of the kind of ``like``."""
        logits, prediction = self.host_logits(), self.prediction
        if prediction is None:
            prediction = logits.argmax(-1)
        if isinstance(like, np.ndarray):
            return Result(prediction, logits, self.exit, self.engine.host(self.score))
        found: list[Tensor] = [
            torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            for x in (prediction, self.logits, self.exit, self.score)
        ]
        # Not in inference mode: gradients may be taken of what is made of an answer.
        found = [value.clone() if value.is_inference() else value for value in found]
        if not (like.is_cpu and isinstance(self.score, np.ndarray)):
            found = [sent(value, like.device) for value in found]
        return Result(*found)


def _apart(value: Array, others: Sequence[Array] | None) -> Array:
    if not isinstance(value, Tensor):
        return value
    if others is not None:
        place = value.untyped_storage().data_ptr()
        if all(place != other.untyped_storage().data_ptr() for other in others):
            return value
    return value.detach().clone()


_NAMES = tuple(field.name for field in fields(Result))
