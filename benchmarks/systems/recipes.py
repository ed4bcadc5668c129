"""Recipes of papers on one network of five exits: what each answers at four costs, and its claim.

Nothing is trained here: the traces are those of the runs of ``learn.py`` that share the data, the
network and the budget of training. Thresholds are chosen on images that training held out, and
judged on test images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.learning.frontiers import between
from benchmarks.learning.runs import Keep, Run
from benchmarks.learning.settings import PLAIN, SETTINGS
from benchmarks.learning.tasks import TASKS
from offramp.analyse import paired_difference, wilson
from offramp.decide import Criterion, Policy, Trace, criterion, frontier, replay
from offramp.decide.guarantees import Risk
from offramp.decide.guarantees.risks import losses
from offramp.errors import Infeasible
from offramp.zoo.recipes import PAPERS, PaperRecipe

__all__ = ["AGAINST", "BUDGETS", "RUNS", "TOLERANCES", "keeps", "measure_recipes", "not_below"]

TASK = "fashion_resnet20"
BUDGETS = (0.25, 0.5, 0.75, 1.0)  # shares of the plain network's cost
POINTS = 25  # of a frontier
TOLERANCES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
DELTA = 0.1
HEADS, JOINT = "heads", "joint"
RUNS = {
    "ztw": "ztw",
    "eenet": HEADS,
    "jei-dnn": HEADS,
    "boosted": "boosting",
    "l2w-den": "matched",
    "calm": HEADS,
    "fast-yet-safe": HEADS,
}  # fmt: skip
# The run that a recipe is compared with, left by confidence, and the budgets that its claim is of.
AGAINST = {
    "ztw": (HEADS, BUDGETS),
    "eenet": (HEADS, BUDGETS),
    "jei-dnn": (HEADS, BUDGETS),
    "boosted": (JOINT, BUDGETS[2:]),
    "l2w-den": (JOINT, BUDGETS),
}

Row = dict[str, Any]
Array = NDArray[np.float64]
Make = Callable[[Trace, float], tuple[Criterion, Trace]]


@dataclass(frozen=True)
class _Traces:
    """What a run's exits say on held-out images and on test images."""

    held: Trace
    test: Trace


def measure_recipes(keep: Keep, seed: int = 0) -> Row:
    """All recipes whose runs are done.

    Args:
        keep: where the runs of ``learn.py`` are.
        seed: of the runs.
    """
    task = TASKS[TASK]
    runs = {name: Run(task, SETTINGS[name], seed) for name in (PLAIN, HEADS, JOINT, *RUNS.values())}
    done = {
        name: _Traces(run.trace(keep, "held"), run.trace(keep, "test"))
        for name, run in runs.items()
        if run.done(keep)
    }
    known = {name: _by_confidence(done[name]) for name in (HEADS, JOINT) if name in done}
    references = [_reference(name, right) for name, right in known.items()]
    if PLAIN in done:
        references.insert(0, _plain(done[PLAIN]))
    rows = [
        _measured(recipe, done[RUNS[name]], known)
        for name, recipe in PAPERS.items()
        if RUNS[name] in done
    ]
    sizes = next(iter(done.values()), None)
    return {
        "task": {"network": task.network, "data": task.data, "passes": task.passes},
        "seed": seed,
        "held": 0 if sizes is None else sizes.held.num_samples,
        "test": 0 if sizes is None else sizes.test.num_samples,
        "delta": DELTA,
        "references": references,
        "recipes": rows,
        "missing": {n: run.setting.title for n, run in runs.items() if n not in done},
    }


def _measured(recipe: PaperRecipe, traces: _Traces, known: dict[str, Array]) -> Row:
    row: Row = {"recipe": recipe.name, "run": RUNS[recipe.name], "claim": recipe.claim}
    if recipe.control is not None:
        policies, row["tolerated"] = _controlled(recipe, traces)
        right = between(policies, traces.test, BUDGETS)
        return row | {"at": _at(right), "verdict": keeps(row["tolerated"])}
    right = _right(traces, recipe.prepare)
    other, budgets = AGAINST[recipe.name]
    verdict = None
    if other in known:
        rows = [BUDGETS.index(budget) for budget in budgets]
        verdict = not_below(right[rows], known[other][rows], budgets)
    return row | {"at": _at(right), "against": other, "verdict": verdict}


def _reference(name: str, right: Array) -> Row:
    return {"run": name, "title": f"{SETTINGS[name].title}; confidence", "at": _at(right)}


def _plain(traces: _Traces) -> Row:
    right = (traces.test.logits[-1].argmax(1) == traces.test.labels).double().numpy()
    at = {str(BUDGETS[-1]): _share(right)}
    return {"run": PLAIN, "title": SETTINGS[PLAIN].title, "at": at}


# -- accuracy at a cost ----------------------------------------------------------------------------


def _by_confidence(traces: _Traces) -> Array:
    return _right(traces, lambda held, budget: (criterion("confidence"), held))


def _right(traces: _Traces, prepare: Make) -> Array:
    """The chance that each test image is answered right at each budget: (budgets, images).

    Args:
        traces: of a run.
        prepare: from held-out images and a budget to the criterion for it, and the images that are
            left for its thresholds.
    """
    rows = []
    for budget in BUDGETS:
        rule, rest = prepare(traces.held, budget)
        policies = [point.policy for point in frontier(rest, rule, points=POINTS)]
        rows.append(between(policies, traces.test, (budget,))[0])
    return np.stack(rows)


def _controlled(recipe: PaperRecipe, traces: _Traces) -> tuple[list[Policy], list[Row]]:
    """Policies from tolerating nothing, and what becomes of each tolerance."""
    policies, rows = [Policy.final()], []
    for tolerated in TOLERANCES:
        try:
            policy = recipe.choose(traces.held, tolerated, delta=DELTA)
        except Infeasible:
            rows.append({"tolerated": tolerated, "found": False})
            continue
        policies.append(policy)
        rows.append({"tolerated": tolerated, "found": True, **_risk(policy, traces.test)})
    return policies, rows


def _risk(policy: Policy, test: Trace) -> Row:
    """The risk on test images, as the policy promises it, and the cost."""
    decided = replay(test, policy)
    risk = Risk.named(policy.provenance["promise"]["risk"])
    lost = losses(test, policy.criterion, risk)[1].gather(0, decided.exit[None])[0]
    worse, better, images = int((lost > 0).sum()), int((lost < 0).sum()), len(lost)
    share = risk.low == 0  # of images, not a difference of two shares
    return {
        "risk": float(lost.mean()),
        "interval": list(
            wilson(worse, images) if share else paired_difference(worse, better, images)
        ),
        "cost": float(decided.cost.mean()) / test.full_cost,
    }


def _at(right: Array) -> dict[str, Row]:
    return {str(budget): _share(row) for budget, row in zip(BUDGETS, right, strict=True)}


def _share(right: Array) -> Row:
    """The mean of chances of being right, and its interval of 95 %."""
    hits = round(float(right.sum()))
    return {"accuracy": float(right.mean()), "interval": list(wilson(hits, len(right)))}


# -- claims ----------------------------------------------------------------------------------------


def not_below(one: Array, other: Array, budgets: Sequence[float]) -> Row:
    """Whether a recipe is at no budget below what it is compared with.

    Args:
        one: (budgets, images), chances of being right.
        other: the same of what it is compared with.
        budgets: of the rows.

    Returns:
        ``holds``; the budget where it is nearest to failing or fails most, and there the points by
        which it is above, with their interval of 95 %.
    """
    rows = []
    for budget, mine, others in zip(budgets, one, other, strict=True):
        gained = float((mine - others).clip(min=0).sum())
        lost = float((others - mine).clip(min=0).sum())
        # Chances that differ by a share count as that share of an image.
        interval = paired_difference(round(gained), round(lost), len(mine))
        points = (gained - lost) / len(mine)
        rows.append({"at": budget, "points": 100 * points, "interval": [100 * v for v in interval]})
    worst = min(rows, key=lambda row: row["points"])
    return {"holds": worst["points"] >= 0, **worst, "all": rows}


def keeps(rows: list[Row]) -> Row:
    """Whether risks are no larger than tolerated, and tolerating more is cheaper.

    Args:
        rows: of rising tolerance: what is tolerated, the risk and its interval, the cost; those
            that nothing was found for count for neither.

    Returns:
        ``holds``; the tolerance that is nearest to being exceeded or exceeded most, and the points
        by which the risk is below it there, with their interval of 95 %.
    """
    found = [row for row in rows if row["found"]]
    if not found:
        return {"holds": False}
    worst = min(found, key=lambda row: row["tolerated"] - row["risk"])
    costs = [row["cost"] for row in found]
    cheaper = costs == sorted(costs, reverse=True) and (len(costs) == 1 or costs[-1] < costs[0])
    margin = [worst["tolerated"] - end for end in reversed(worst["interval"])]
    points = worst["tolerated"] - worst["risk"]
    return {
        "holds": bool(points >= 0 and cheaper),
        "cheaper": cheaper,
        "at": worst["tolerated"],
        "points": 100 * points,
        "interval": [100 * end for end in margin],
    }
