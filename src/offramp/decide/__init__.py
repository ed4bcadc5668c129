"""When to stop: traces, rules, thresholds, promises."""

from __future__ import annotations

from offramp.decide.calibrate import calibrate, frontier
from offramp.decide.criteria import Confidence, Criterion, Entropy, Margin, Patience, criterion
from offramp.decide.policy import Decisions, Policy, replay
from offramp.decide.record import record
from offramp.decide.trace import Trace

__all__ = [
    "Confidence",
    "Criterion",
    "Decisions",
    "Entropy",
    "Margin",
    "Patience",
    "Policy",
    "Trace",
    "calibrate",
    "criterion",
    "frontier",
    "record",
    "replay",
]
