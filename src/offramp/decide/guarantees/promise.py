"""From a promise that is asked for to thresholds that keep it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.criteria import Criterion
from offramp.decide.guarantees.expectation import conformal
from offramp.decide.guarantees.ground import Ground
from offramp.decide.guarantees.paths import Path, best_of_all, down_the_path
from offramp.decide.guarantees.risks import Risk
from offramp.decide.guarantees.sweep import walk
from offramp.decide.guarantees.verdicts import Test
from offramp.decide.scored import Scored
from offramp.decide.trace import Trace
from offramp.errors import PolicyError, unknown_name

__all__ = ["TESTING", "Kept", "Promise", "promised"]

TESTING = ("fixed-sequence", "bonferroni")
LEARNED = 0.1  # of the error goes to the learned path, the rest to the one shared threshold


@dataclass(frozen=True)
class Promise:
    """What is asked for.

    Attributes:
        risk: the loss.
        bound: its mean on new samples is to be at most this.
        confidence: the probability, over calibration sets, with which that holds; or
            ``"expectation"`` for the mean over calibration sets.
        kind: the statistical bound; see ``BOUNDS``.
        testing: ``"fixed-sequence"`` or ``"bonferroni"``, for the learned path.
        path: a trace of other samples to choose the learned path on; a part of the calibration
            samples is set aside for it otherwise.
        seed: of that part.

    Raises:
        PolicyError: a figure or a name that is not possible.
    """

    risk: Risk
    bound: float
    confidence: float | str
    kind: str = "auto"
    testing: str = "fixed-sequence"
    path: Trace | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.testing not in TESTING:
            raise PolicyError(unknown_name("testing", self.testing, TESTING))
        if isinstance(self.confidence, str):
            if self.confidence != "expectation":
                raise PolicyError(
                    f"confidence must be a number such as 0.95, or 'expectation', got "
                    f"{self.confidence!r}."
                )
            if self.kind != "auto":
                raise PolicyError(
                    f"confidence='expectation' is kept by conformal risk control alone, which has "
                    f"no bound={self.kind!r}: leave it out, or give a number as confidence."
                )
        elif not 0 < self.confidence < 1:
            raise PolicyError(
                f"confidence must lie strictly between 0 and 1, as in confidence=0.95, got "
                f"{self.confidence}."
            )


@dataclass(frozen=True, eq=False)
class Kept:
    """Thresholds that keep a promise.

    Attributes:
        thresholds: (E - 1,) float32.
        scored: the calibration samples.
        losses: (E, N) float64, of leaving at each exit.
        way: how they were found: ``"shared"`` threshold or ``"learned"`` path, or ``"none"`` where
            the promise only holds if nobody leaves early.
        tests: the bound that was used.
        needed: where there are too few samples to pass even without any loss: how many would do.
        possible: whether anything passed, if only that nobody leaves early.
    """

    thresholds: Tensor
    scored: Scored
    losses: Tensor
    way: str
    tests: str
    needed: int | None = None
    possible: bool = True


def promised(trace: Trace, rule: Criterion, promise: Promise, ground: Ground | None = None) -> Kept:
    """The cheapest thresholds that keep the promise.

    Two ways are tried, and the error is divided between them so that the cheaper may be taken: one
    shared threshold, lowered over all calibration samples; and a path of per-exit thresholds that
    the search chose on other samples (a part of these, set aside). The division favours the first,
    which needs no samples of its own.

    Args:
        trace: calibration samples.
        rule: the criterion.
        promise: what is asked for.
        ground: what was computed for another promise about the same samples.

    Raises:
        TraceError: labels are wanting, or the trace for the path is of another network.
        PolicyError: the bound does not suit the loss.
    """
    ground = ground or Ground(trace, rule, promise.path, promise.seed)
    scored, values = ground.losses(promise.risk)
    if isinstance(promise.confidence, str):
        return _on_average(ground, promise, scored, values)
    test = Test(promise.risk, promise.bound, promise.kind)
    error = 1 - promise.confidence
    learns = scored.num_exits > 2
    portion = error * (LEARNED if promise.path is None else 0.5) if learns else 0.0
    off = _all(scored, math.inf)
    found = {}
    count, possible = walk(ground.changes(promise.risk), test, ground.groups, error - portion)
    if possible:
        # All settings up to the last that passed are promised together, so the cheaper end may be
        # taken: heads can cost more than a few early leavers save.
        found = {"none": off, "shared": _all(scored, ground.sweep.threshold(count))}
    path = _path(ground, promise) if learns else None
    if path is not None:
        testing = down_the_path if promise.testing == "fixed-sequence" else best_of_all
        other = testing(path, test, values, portion)
        found |= {} if other is None else {"learned": other}
    way = min(found, key=lambda name: ground.cost(found[name]), default="none")
    thresholds = found.get(way, off)
    way = "none" if torch.equal(thresholds, off) else way
    needed = test.needed(ground.smallest, error - portion) if way == "none" else None
    return Kept(thresholds, scored, values, way, test.kind, needed, bool(found))


def _on_average(ground: Ground, promise: Promise, scored: Scored, values: Tensor) -> Kept:
    """By conformal risk control."""
    high = promise.risk.high
    count, possible = conformal(ground.sweep, values, ground.groups, promise.bound, high)
    needed = None
    if promise.bound > 0 and high > promise.bound * (ground.smallest + 1):
        needed = math.ceil(high / promise.bound - 1)
    thresholds = _all(scored, ground.sweep.threshold(count))
    way = "shared" if count else "none"
    return Kept(thresholds, scored, values, way, "conformal", needed, possible)


def _path(ground: Ground, promise: Promise) -> Path | None:
    chooser = promise.path or ground.trace
    return ground.path(promise.risk.name != "disagreement" and chooser.labels is not None)


def _all(scored: Scored, threshold: float) -> Tensor:
    return torch.full((scored.num_exits - 1,), threshold)
