"""The exits learn: objectives, schemes, and a loop that runs them.

:func:`offramp.fit` runs any scheme. In a loop of one's own: :func:`cross_entropy` or an
:class:`ExitLoss` of any objective. In Lightning's ``Trainer``: :class:`ExitModule` and
:class:`ExitLogger`. In Hugging Face's: :class:`HuggingFaceModule`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.train.exit_logger import ExitLogger
    from offramp.train.exit_module import ExitModule
    from offramp.train.history import EpochRow, History
    from offramp.train.huggingface import HuggingFaceModule, exit_accuracies
    from offramp.train.loop import fit
    from offramp.train.losses import cross_entropy, exit_accuracy, exit_losses
    from offramp.train.objectives import (
        Boosting,
        CrossEntropy,
        Distill,
        ExitLoss,
        ExitsSoFar,
        Matched,
        Objective,
    )
    from offramp.train.phases import Phase, Plan
    from offramp.train.prototypes import fit_prototypes
    from offramp.train.schemes import (
        SCHEMES,
        Alternating,
        Heads,
        Joint,
        Layerwise,
        Mixed,
        Scheme,
        Separate,
        as_plan,
    )
    from offramp.train.weights import exit_weights

__all__ = [
    "SCHEMES",
    "Alternating",
    "Boosting",
    "CrossEntropy",
    "Distill",
    "EpochRow",
    "ExitLogger",
    "ExitLoss",
    "ExitModule",
    "ExitsSoFar",
    "Heads",
    "History",
    "HuggingFaceModule",
    "Joint",
    "Layerwise",
    "Matched",
    "Mixed",
    "Objective",
    "Phase",
    "Plan",
    "Scheme",
    "Separate",
    "as_plan",
    "cross_entropy",
    "exit_accuracies",
    "exit_accuracy",
    "exit_losses",
    "exit_weights",
    "fit",
    "fit_prototypes",
]

# Where each name lives. Imported when first used: Lightning takes its time, few names need it.
_HOMES = {
    "SCHEMES": "schemes",
    "Alternating": "schemes",
    "Boosting": "objectives",
    "CrossEntropy": "objectives",
    "Distill": "objectives",
    "EpochRow": "history",
    "ExitLogger": "exit_logger",
    "ExitLoss": "objectives",
    "ExitModule": "exit_module",
    "ExitsSoFar": "objectives",
    "Heads": "schemes",
    "History": "history",
    "HuggingFaceModule": "huggingface",
    "Joint": "schemes",
    "Layerwise": "schemes",
    "Matched": "objectives",
    "Mixed": "schemes",
    "Objective": "objectives",
    "Phase": "phases",
    "Plan": "phases",
    "Scheme": "schemes",
    "Separate": "schemes",
    "as_plan": "schemes",
    "cross_entropy": "losses",
    "exit_accuracies": "huggingface",
    "exit_accuracy": "losses",
    "exit_losses": "losses",
    "exit_weights": "weights",
    "fit": "loop",
    "fit_prototypes": "prototypes",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"offramp.train.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
