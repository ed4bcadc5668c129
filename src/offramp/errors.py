"""Every error that offramp raises on purpose.

One tree, so that ``except OfframpError`` catches all of it, and each leaf is also the standard
exception that a caller would expect::

    OfframpError
    ├── PlaceError        (ValueError)   an exit place that does not resolve, repeats or never runs
    ├── HeadError         (ValueError)   an auxiliary classifier that does not fit its feature
    ├── DataError         (ValueError)   inputs, labels, examples, loaders
    ├── TrainingError     (RuntimeError) training cannot go on
    ├── TraceError        (ValueError)   a trace that is damaged, or used for what it is not
    ├── PolicyError       (ValueError)   a criterion, thresholds, or a policy for another model
    ├── Infeasible        (ValueError)   a goal that no thresholds meet; carries the best that can
    ├── StageError        (RuntimeError) a model that cannot be cut into stages
    ├── EqualityError     (RuntimeError) stages or files that do not reproduce the model
    ├── ArtifactError     (ValueError)   a file that is foreign, damaged or too new
    └── MissingExtra      (ImportError)  an optional dependency that is not installed

Every text names the object, what was expected, what came, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "ArtifactError",
    "DataError",
    "EqualityError",
    "HeadError",
    "Infeasible",
    "MissingExtra",
    "OfframpError",
    "PlaceError",
    "PolicyError",
    "StageError",
    "TraceError",
    "TrainingError",
    "near_matches",
    "unknown_name",
]


class OfframpError(Exception):
    """Base of all errors of this library."""


class PlaceError(OfframpError, ValueError):
    """An exit place does not resolve, stands twice, or never runs."""


class HeadError(OfframpError, ValueError):
    """An auxiliary classifier does not fit its feature or the backbone's classes."""


class DataError(OfframpError, ValueError):
    """Inputs, labels, examples or loaders are not what was expected."""


class TrainingError(OfframpError, RuntimeError):
    """Training cannot go on."""


class TraceError(OfframpError, ValueError):
    """A trace is damaged, or is used for something it does not hold."""


class PolicyError(OfframpError, ValueError):
    """A criterion or its thresholds are wrong, or belong to another model."""


class Infeasible(OfframpError, ValueError):
    """No thresholds meet the goal.

    Attributes:
        best: the best feasible policy found, or ``None`` where there is none.
    """

    def __init__(self, message: str, best: object | None = None) -> None:
        super().__init__(message)
        self.best = best


class StageError(OfframpError, RuntimeError):
    """A model cannot be cut into stages."""


class EqualityError(OfframpError, RuntimeError):
    """What was cut or exported does not reproduce the model."""


class ArtifactError(OfframpError, ValueError):
    """A file is foreign, damaged, or of a later schema."""


class MissingExtra(OfframpError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'offramp[{extra}]'"
        )


def near_matches(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The names in ``known`` that look most like ``name``, nearest first."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.4)


def unknown_name(kind: str, name: object, known: Sequence[str]) -> str:
    """One sentence for an unknown name: what came, the nearest match, and all known ones."""
    near = near_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}."
