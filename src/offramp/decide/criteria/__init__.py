"""Rules that turn the logits of an exit into a readiness to stop, one idea a file."""

from __future__ import annotations

from offramp.decide.criteria.base import (
    Criterion,
    State,
    criterion,
    criterion_from_json,
    criterion_to_json,
    known,
)
from offramp.decide.criteria.patience import Patience
from offramp.decide.criteria.softmax import Confidence, Entropy, Margin

__all__ = [
    "Confidence",
    "Criterion",
    "Entropy",
    "Margin",
    "Patience",
    "State",
    "criterion",
    "criterion_from_json",
    "criterion_to_json",
    "known",
]
