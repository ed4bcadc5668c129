"""From what every candidate says on held-out rows to a plan that says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from offramp.decide.calibrate import calibrate
from offramp.decide.criteria import Criterion
from offramp.decide.policy import replay
from offramp.decide.scored import score
from offramp.decide.trace import Trace
from offramp.places.choice import Choice, Judge, choose
from offramp.places.dense import Dense
from offramp.places.features import HeldOut
from offramp.places.result import Operating, PlacePlan, PlannedExit

__all__ = ["Terms", "judged"]

Subset = tuple[int, ...]


@dataclass(frozen=True)
class Terms:
    """What exits are judged by.

    Attributes:
        drops: tolerated drops of accuracy, as shares.
        worth: what each exit has to bring, as a share of the backbone's cost.
        most: exits at most.
        rule: the criterion.
        seed: of the division of the rows in two.
    """

    drops: tuple[float, ...]
    worth: float
    most: int | None
    rule: Criterion
    seed: int


def judged(dense: Dense, held: HeldOut, terms: Terms) -> PlacePlan:
    """The subset that pays best on half of the rows, and what it does on the other half."""
    halves = _trace(dense, held).split(0.5, terms.seed)
    groups = [candidate.place for candidate in dense.candidates]
    here, there = (Judge(t, score(t, terms.rule), groups, terms.drops) for t in halves)
    choice = choose(here, terms.worth, terms.most)
    subset = choice.subset
    if subset and there.value(subset) >= there.value(()):
        subset = ()  # what paid where it was chosen was chance
    points = [_operating(*halves, subset, drop, terms) for drop in terms.drops] if subset else []
    return PlacePlan(
        "search",
        tuple(_planned(dense, here, there, subset, k) for k in subset),
        _verdict(dense, here, there, choice, subset, terms.worth),
        tuple(points),
        value=here.value(subset),
        value_fresh=there.value(subset),
        without=there.value(()),
        worth=terms.worth,
        full_accuracy=there.full,
        samples=(0, halves[0].num_samples, halves[1].num_samples),
        candidates=(len(groups), len(dense.model.places)),
        tried=choice.tried,
        exact=choice.exact,
        trained=tuple(dense.candidates[k].head.to(dense.candidates[k].dtype) for k in subset),
    )


def _trace(dense: Dense, held: HeldOut) -> Trace:
    """What all candidates said, as exits in a row; those at one place have no stage between."""
    stages = list(dense.model.costs.stages)
    groups = [candidate.place for candidate in dense.candidates]
    own = [
        stages[place] if k == 0 or groups[k - 1] != place else 0.0 for k, place in enumerate(groups)
    ]
    return Trace(
        held.logits,
        held.labels,
        torch.tensor([*own, stages[-1]], dtype=torch.float64),
        torch.tensor([*(c.macs for c in dense.candidates), 0.0], dtype=torch.float64),
        places=(*(_name(dense, k) for k in range(len(groups))), "backbone"),
        source="held out",
    )


def _name(dense: Dense, k: int) -> str:
    candidate = dense.candidates[k]
    return f"{dense.model.places[candidate.place]} ({candidate.name})"


def _planned(dense: Dense, here: Judge, there: Judge, subset: Subset, k: int) -> PlannedExit:
    candidate, costs = dense.candidates[k], dense.model.costs
    others = tuple(other for other in subset if other != k)
    return PlannedExit(
        dense.model.places[candidate.place],
        candidate.name,
        sum(costs.stages[: candidate.place + 1]) / costs.full,
        candidate.macs / costs.full,
        here.value(others) - here.value(subset),
        there.value(others) - there.value(subset),
    )


def _operating(
    choosing: Trace, fresh: Trace, subset: Subset, drop: float, terms: Terms
) -> Operating:
    """A threshold for all exits, as they were judged: from one part of the rows, for the other."""
    policy = calibrate(
        choosing.keep_exits(subset), terms.rule, max_accuracy_drop=drop, method="shared"
    )
    trace = fresh.keep_exits(subset)
    decided = replay(trace, policy)
    right = torch.eq(decided.prediction, cast("Tensor", trace.labels))  # a search has labels
    shares = torch.bincount(decided.exit, minlength=trace.num_exits) / trace.num_samples
    return Operating(
        drop,
        tuple(policy.thresholds_for(trace.num_exits)),
        float(decided.cost.mean()) / trace.full_cost,
        float(right.double().mean()),
        tuple(shares.tolist()),
    )


def _verdict(
    dense: Dense, here: Judge, there: Judge, choice: Choice, subset: Subset, worth: float
) -> str:
    """What comes of the search, and why, in words."""
    nothing = there.value(())
    if subset:
        count = "1 exit pays" if len(subset) == 1 else f"{len(subset)} exits pay"
        return (
            f"{count}: over the tolerated drops of accuracy, the mean cost on fresh samples is "
            f"{there.value(subset):.3f} of the backbone's, and {nothing:.3f} without exits. Each "
            "stays because without it, where the exits were chosen, equal accuracy costs at least "
            f"{100 * worth:g} % of the backbone more."
        )
    best = choice.best
    gains = [judge.value(()) - judge.value(best) for judge in (here, there)]
    return (
        f"No exit pays. The best found, {', '.join(_name(dense, k) for k in best)}, saves "
        f"{100 * gains[0]:.2f} % of the backbone's cost at equal accuracy where it was chosen and "
        f"{100 * gains[1]:.2f} % on fresh samples; each exit has to save {100 * worth:g} %."
    )
