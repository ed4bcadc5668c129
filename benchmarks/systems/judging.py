"""Accuracies with their intervals, as all systems report them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offramp.analyse.intervals import paired_difference, wilson
from offramp.decide.trace import Trace

__all__ = ["paired", "paired_error", "right_of", "share"]

Row = dict[str, Any]


def right_of(trace: Trace) -> Tensor:
    """(N,) bool: where the last exit is right."""
    return trace.logits[-1].argmax(1) == trace.labels


def share(right: Tensor) -> Row:
    """The share of right answers, as a fraction, and its interval of 95 %."""
    hits = int(right.sum())
    return {"accuracy": hits / len(right), "interval": list(wilson(hits, len(right)))}


def paired(one: Tensor, other: Tensor) -> Row:
    """How many points one is above the other on the same samples, and the interval of 95 %."""
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    interval = paired_difference(gained, lost, len(one))
    return {"points": 100 * (gained - lost) / len(one), "interval": [100 * v for v in interval]}


def paired_error(one: Tensor, other: Tensor) -> float:
    """Standard error of the difference between two shares of right answers on the same samples."""
    return float((one.double() - other.double()).std()) / len(one) ** 0.5
