"""From a promise that is asked for to thresholds that keep it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.criteria import Criterion
from offramp.decide.guarantees.expectation import conformal
from offramp.decide.guarantees.paths import best_of_all, down_the_path, learn_path
from offramp.decide.guarantees.risks import Risk, losses
from offramp.decide.guarantees.sweep import Sweep, walk
from offramp.decide.guarantees.verdicts import Test
from offramp.decide.scored import Scored
from offramp.decide.trace import Trace
from offramp.errors import PolicyError, TraceError, unknown_name

__all__ = ["TESTING", "Kept", "Promise", "promised"]

TESTING = ("fixed-sequence", "bonferroni")
LEARNED = 0.1  # of the error goes to the learned path, the rest to the one shared threshold
CHOOSING = 0.4  # of the samples choose the learned path, the rest test it


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
        needed: where no samples without any loss could have passed: how many are needed.
    """

    thresholds: Tensor
    scored: Scored
    losses: Tensor
    way: str
    tests: str
    needed: int | None = None
    possible: bool = True


def promised(trace: Trace, rule: Criterion, promise: Promise) -> Kept:
    """The cheapest thresholds that keep the promise.

    Two ways are tried, and the error is divided between them so that the cheaper may be taken: one
    shared threshold, lowered over all calibration samples; and a path of per-exit thresholds that
    the search chose on other samples (a part of these, set aside). The division favours the first,
    which needs no samples of its own.

    Raises:
        TraceError: labels or groups are wanting.
        PolicyError: the bound does not suit the loss.
    """
    scored, values = losses(trace, rule, promise.risk)
    groups = _groups(trace)
    sweep = Sweep.of(scored)
    if isinstance(promise.confidence, str):
        count, possible = conformal(sweep, values, groups, promise.bound, promise.risk.high)
        smallest = min(int(rows.sum()) for rows in groups)
        needed = None
        if promise.risk.high > promise.bound * (smallest + 1):
            needed = round(promise.risk.high / promise.bound) if promise.bound > 0 else None
        shared = _all(scored, sweep.threshold(count))
        way = "shared" if count else "none"
        return Kept(shared, scored, values, way, "conformal", needed, possible)
    test = Test(promise.risk, promise.bound, promise.kind)
    error = 1 - promise.confidence
    learns = scored.num_exits > 2
    portion = error * (LEARNED if promise.path is None else 0.5) if learns else 0.0
    count, possible = walk(sweep, test, values, groups, error - portion)
    found = {"shared": _all(scored, sweep.threshold(count))} if possible else {}
    if learns:
        other = _learned(trace, rule, promise, test, (scored, values), portion)
        if other is not None:
            found["learned"] = other
    least = test.needed(error - portion)
    short = least is None or least > min(int(rows.sum()) for rows in groups)
    needed = least if short else None
    off = torch.full((scored.num_exits - 1,), torch.inf)
    if not found:
        return Kept(off, scored, values, "none", test.kind, needed, False)
    way = min(found, key=lambda name: scored.cost(found[name]))
    thresholds = found[way]
    if bool((thresholds == torch.inf).all()):
        way = "none"
    return Kept(thresholds, scored, values, way, test.kind, needed, possible)


def _learned(
    trace: Trace,
    rule: Criterion,
    promise: Promise,
    test: Test,
    seen: tuple[Scored, Tensor],
    error: float,
) -> Tensor | None:
    """The cheapest setting of a learned path that passes on samples that did not choose it."""
    scored, values = seen
    chooser = promise.path
    rows = torch.ones(trace.num_samples, dtype=torch.bool)
    if chooser is None:
        generator = torch.Generator().manual_seed(promise.seed)
        order = torch.randperm(trace.num_samples, generator=generator)
        aside = order[: round(CHOOSING * trace.num_samples)]
        if len(aside) < 2:
            return None
        chooser = trace.subset(aside)
        rows[aside] = False
    elif chooser.num_exits != trace.num_exits:
        raise TraceError(
            f"The trace for the path has {chooser.num_exits} exits, the calibration trace "
            f"{trace.num_exits}: record both from the same model."
        )
    labelled = promise.risk.name != "disagreement" and chooser.labels is not None
    path = learn_path(chooser, rule, labelled, promise.seed)
    groups = [group & rows for group in _groups(trace)]
    if any(not bool(group.any()) for group in groups):
        return None
    testing = down_the_path if promise.testing == "fixed-sequence" else best_of_all
    return testing(path, scored, test, values, groups, error)


def _groups(trace: Trace) -> list[Tensor]:
    """The samples for which the promise has to hold each: all, or every group."""
    if trace.groups is None:
        return [torch.ones(trace.num_samples, dtype=torch.bool)]
    return [trace.groups == value for value in trace.groups.unique()]


def _all(scored: Scored, threshold: float) -> Tensor:
    return torch.full((scored.num_exits - 1,), threshold)
