"""When to stop: traces, rules, thresholds, promises."""

from __future__ import annotations

from offramp.decide.calibrate import Point, calibrate, frontier
from offramp.decide.criteria import (
    Agreement,
    ArithmeticEnsemble,
    ClassMeanDistance,
    Confidence,
    Criterion,
    Energy,
    Entropy,
    GeometricEnsemble,
    LearnedGate,
    Margin,
    Patience,
    PowerEntropy,
    ProductOfExperts,
    Tempered,
    Voting,
    criterion,
)
from offramp.decide.fitting import Temperatures, fit_apart, fit_ensemble, fit_temperatures
from offramp.decide.gating import fit_gates
from offramp.decide.monitor import Monitor, Watch
from offramp.decide.policy import Decisions, Policy, replay
from offramp.decide.pruning import Pruned, prune_exits
from offramp.decide.record import record
from offramp.decide.trace import Trace

__all__ = [
    "Agreement",
    "ArithmeticEnsemble",
    "ClassMeanDistance",
    "Confidence",
    "Criterion",
    "Decisions",
    "Energy",
    "Entropy",
    "GeometricEnsemble",
    "LearnedGate",
    "Margin",
    "Monitor",
    "Patience",
    "Point",
    "Policy",
    "PowerEntropy",
    "ProductOfExperts",
    "Pruned",
    "Temperatures",
    "Tempered",
    "Trace",
    "Voting",
    "Watch",
    "calibrate",
    "criterion",
    "fit_apart",
    "fit_ensemble",
    "fit_gates",
    "fit_temperatures",
    "frontier",
    "prune_exits",
    "record",
    "replay",
]
