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
from offramp.decide.criteria.energy import Energy
from offramp.decide.criteria.ensembles import (
    ArithmeticEnsemble,
    GeometricEnsemble,
    ProductOfExperts,
)
from offramp.decide.criteria.gates import LearnedGate
from offramp.decide.criteria.patience import Patience
from offramp.decide.criteria.power import PowerEntropy
from offramp.decide.criteria.prototype import ClassMeanDistance
from offramp.decide.criteria.softmax import Confidence, Entropy, Margin
from offramp.decide.criteria.tempered import Tempered
from offramp.decide.criteria.votes import Agreement, Voting

__all__ = [
    "Agreement",
    "ArithmeticEnsemble",
    "ClassMeanDistance",
    "Confidence",
    "Criterion",
    "Energy",
    "Entropy",
    "GeometricEnsemble",
    "LearnedGate",
    "Margin",
    "Patience",
    "PowerEntropy",
    "ProductOfExperts",
    "State",
    "Tempered",
    "Voting",
    "criterion",
    "criterion_from_json",
    "criterion_to_json",
    "known",
]
