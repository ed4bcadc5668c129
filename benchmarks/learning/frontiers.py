"""What the exits of a run are worth: accuracy against cost, and what the network overthinks.

Thresholds are chosen on the calibration samples and measured on others. Where there are held-out
training images, those calibrate and the whole test set measures. Otherwise each half of the test
set measures what the other half calibrated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.learning.runs import Keep, Run
from offramp.analyse import overthinking, paired_difference, wilson
from offramp.decide import Criterion, Point, Policy, Trace, frontier, replay
from offramp.decide.scored import score

__all__ = ["BUDGETS", "TOLERANCE", "Folds", "as_good_as", "figures", "folds_of", "reaches"]

BUDGETS = tuple(round(0.2 + 0.025 * step, 3) for step in range(33))  # shares of the plain network
POINTS = 25  # of a frontier
TOLERANCE = 0.003  # below the plain network, and still its accuracy

Row = dict[str, Any]
Array = NDArray[np.float64]
Folds = list[tuple[Trace, Trace]]  # calibration, test
Rule = Callable[[Trace], Criterion]


def folds_of(run: Run, keep: Keep) -> Folds:
    """Traces to calibrate on and to measure on, of different samples."""
    test = run.trace(keep, "test")
    if (run.folder(keep) / "held.safetensors").is_file():
        return [(run.trace(keep, "held"), test)]
    one, other = test.split(0.5, seed=0)
    return [(one, other), (other, one)]


def figures(run: Run, folds: Folds, plain: Folds) -> Row:
    """Everything about a run that a table shows.

    Args:
        run: what was trained.
        folds: what its exits say.
        plain: what the plain network of the same seed says, on the same samples.
    """
    first = next(iter(run.setting.rules.values()))
    right = [_right(score(test, first(cal)).predictions, test) for cal, test in folds]
    exits = torch.cat(right, 1)
    full = torch.cat([_right(test.logits[-1:].argmax(2), test)[0] for _, test in plain])
    found: Row = {
        "samples": exits.shape[1],
        "exits": [_share(row) for row in exits],
        "plain": _share(full),
        "last_less_plain": _paired(exits[-1], full),
    }
    if run.setting == run.plain.setting:
        return found
    rules = {name: _curve(folds, make) for name, make in run.setting.rules.items()}
    best = max(rules, key=lambda name: rules[name]["calibration_area"])
    found["rule"] = best
    found["rules"] = rules
    found["operating"] = _operating(folds, plain, run.setting.rules[best], right, full)
    return found


def as_good_as(plain: Trace, calibration: Trace, make: Rule) -> Policy:
    """The cheapest thresholds of a frontier that are as accurate as the plain network.

    Args:
        plain: what the plain network says on the calibration samples.
        calibration: what the exits say.
        make: the rule by which samples leave.
    """
    wanted = float((plain.logits[-1].argmax(1) == plain.labels).double().mean())
    points = frontier(calibration, make(calibration), points=POINTS)
    good = [point for point in points if point.accuracy >= wanted] or points[-1:]
    return min(good, key=lambda point: point.cost_ratio).policy


def reaches(curve: list[float | None], wanted: float) -> float | None:
    """The least cost at which a curve over :data:`BUDGETS` has an accuracy, or ``None``."""
    before: tuple[float, float] | None = None
    for budget, accuracy in zip(BUDGETS, curve, strict=True):
        if accuracy is None:
            continue
        if accuracy >= wanted:
            if before is None:
                return budget
            share = (wanted - before[1]) / (accuracy - before[1])
            return before[0] + share * (budget - before[0])
        before = budget, accuracy
    return None


def _curve(folds: Folds, make: Rule) -> Row:
    """Accuracy over budgets: on the calibration samples, where thresholds were chosen, and test."""
    fitted, measured = [], []
    for calibration, test in folds:
        points = frontier(calibration, make(calibration), points=POINTS)
        fitted.append(_between(points, calibration))
        measured.append(_between(points, test))
    chance, known = np.concatenate(measured, 1), np.concatenate(fitted, 1)
    inside = ~np.isnan(chance).any(1)
    areas = chance[inside].mean(0)
    error = 1.96 * float(areas.std(ddof=1)) / len(areas) ** 0.5
    accuracy = [float(row.mean()) if ok else None for row, ok in zip(chance, inside, strict=True)]
    return {
        "accuracy": accuracy,
        "area": float(areas.mean()),
        "area_interval": [float(areas.mean()) - error, float(areas.mean()) + error],
        "calibration_area": float(known[inside].mean()),
    }


def _between(points: list[Point], trace: Trace) -> Array:
    """The chance that each sample is answered right at each budget: (budgets, samples).

    Between two points of the frontier, thresholds are drawn at random from both, such that the mean
    cost is the budget. NaN below the cheapest point.
    """
    costs, rights = [], []
    for point in points:
        decided = replay(trace, point.policy)
        costs.append(float(decided.cost.mean()) / trace.full_cost)
        rights.append((decided.prediction == trace.labels).double().numpy())
    order = np.argsort(costs)
    cost, right = np.asarray(costs)[order], np.stack(rights)[order]
    rows = []
    for budget in BUDGETS:
        above = int(np.searchsorted(cost, budget))
        if above == len(cost):
            rows.append(right[-1])
        elif above == 0 and budget < cost[0]:
            rows.append(np.full(right.shape[1], np.nan))
        else:
            low = max(above - 1, 0)
            width = cost[above] - cost[low]
            share = (budget - cost[low]) / width if width else 0.0
            rows.append((1 - share) * right[low] + share * right[above])
    return np.stack(rows)


def _operating(folds: Folds, plain: Folds, make: Rule, right: list[Tensor], full: Tensor) -> Row:
    """The cheapest thresholds that are as good as the plain network on the calibration samples."""
    taken, answers, costs = [], [], []
    for (calibration, test), (known, _) in zip(folds, plain, strict=True):
        decided = replay(test, as_good_as(known, calibration, make))
        taken.append(decided.exit)
        answers.append(decided.prediction == test.labels)
        costs.append(decided.cost / test.full_cost)
    exit, answered, cost = torch.cat(taken), torch.cat(answers), torch.cat(costs)
    exits = torch.cat(right, 1)
    return {
        "cost": float(cost.mean()),
        "accuracy": _share(answered),
        "less_plain": _paired(answered, full),
        "shares": (torch.bincount(exit, minlength=len(exits)) / len(exit)).tolist(),
        "overthinking": vars(overthinking(exits, exit, answered)),
    }


def _right(predictions: Tensor, trace: Trace) -> Tensor:
    """(E, N) bool."""
    return predictions == trace.labels


def _share(right: Tensor) -> Row:
    hits = int(right.sum())
    return {"accuracy": hits / len(right), "interval": list(wilson(hits, len(right)))}


def _paired(one: Tensor, other: Tensor) -> Row:
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    interval = paired_difference(gained, lost, len(one))
    return {"points": (gained - lost) / len(one), "interval": list(interval)}
