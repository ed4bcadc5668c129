"""Thresholds with a distribution-free promise."""

from __future__ import annotations

from offramp.decide.guarantees.promise import Promise, promised
from offramp.decide.guarantees.risks import RISKS, Risk
from offramp.decide.guarantees.verdicts import BOUNDS

__all__ = ["BOUNDS", "RISKS", "Promise", "Risk", "promised"]
