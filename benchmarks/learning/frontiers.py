"""What the exits of a run are worth: accuracy against cost, and what the network overthinks.

Thresholds are chosen on the calibration samples and measured on others. Where there are held-out
training images, those calibrate and the whole test set measures. Otherwise each half of the test
set measures what the other half calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.learning.runs import Keep, Run
from offramp.analyse import overthinking, paired_difference, wilson
from offramp.decide import Criterion, Point, Policy, Trace, frontier, replay
from offramp.decide.scored import score

__all__ = [
    "BUDGETS",
    "TOLERANCE",
    "Folds",
    "as_good_as",
    "between",
    "curve",
    "figures",
    "folds_of",
    "fronts_of",
    "reaches",
]

BUDGETS = tuple(round(0.2 + 0.025 * step, 3) for step in range(33))  # shares of the plain network
POINTS = 25  # of a frontier
TOLERANCE = 0.003  # below the plain network, and still its accuracy

Row = dict[str, Any]
Array = NDArray[np.float64]
Folds = list[tuple[Trace, Trace]]  # calibration, test
Front = list[Point]
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
    fronts = {name: fronts_of(folds, make) for name, make in run.setting.rules.items()}
    rules = {name: curve(folds, points) for name, points in fronts.items()}
    before = torch.cat([_right(known.logits[-1:].argmax(2), known)[0] for known, _ in plain])
    wanted = float(before.double().mean()) - TOLERANCE
    for found_by in rules.values():
        known = found_by.pop("calibration_accuracy")
        found_by["calibration_cost"] = reaches(known, wanted)
    best = max(rules, key=lambda name: rules[name]["calibration_area"])
    found["rule"] = best
    found["rules"] = rules
    policies = [
        as_good_as(known, points) for (known, _), points in zip(plain, fronts[best], strict=True)
    ]
    found["operating"] = _operating([test for _, test in folds], policies, exits, full)
    return found


def fronts_of(folds: Folds, make: Rule) -> list[Front]:
    """The frontier on the calibration samples of each fold."""
    return [frontier(calibration, make(calibration), points=POINTS) for calibration, _ in folds]


def as_good_as(plain: Trace, points: Front) -> Policy:
    """The cheapest thresholds that are as accurate as the plain network, where they were chosen.

    Args:
        plain: what the plain network says on the calibration samples.
        points: the frontier of the exits on the same samples.
    """
    wanted = float((plain.logits[-1].argmax(1) == plain.labels).double().mean())
    good = [point for point in points if point.accuracy >= wanted] or points[-1:]
    return min(good, key=lambda point: point.cost_ratio).policy


def reaches(curve: list[float], wanted: float) -> float | None:
    """The least cost at which a curve over :data:`BUDGETS` has an accuracy, or ``None``."""
    before: tuple[float, float] | None = None
    for budget, accuracy in zip(BUDGETS, curve, strict=True):
        if accuracy >= wanted:
            if before is None:
                return budget
            share = (wanted - before[1]) / (accuracy - before[1])
            return before[0] + share * (budget - before[0])
        before = budget, accuracy
    return None


def curve(folds: Folds, fronts: list[Front]) -> Row:
    """Accuracy over budgets, on test samples and on calibration samples; and its mean.

    Args:
        folds: samples that thresholds were chosen on, and others.
        fronts: thresholds of each fold, from :func:`fronts_of`.
    """
    fitted, measured = [], []
    for (calibration, test), points in zip(folds, fronts, strict=True):
        policies = [point.policy for point in points]
        fitted.append(between(policies, calibration))
        measured.append(between(policies, test))
    chance = np.concatenate(measured, 1)
    own = chance.mean(0)  # of each sample, over the budgets
    error = 1.96 * float(own.std(ddof=1)) / len(own) ** 0.5
    return {
        "accuracy": chance.mean(1).tolist(),
        "area": float(own.mean()),
        "area_interval": [float(own.mean()) - error, float(own.mean()) + error],
        "calibration_area": float(np.concatenate(fitted, 1).mean()),
        "calibration_accuracy": np.concatenate(fitted, 1).mean(1).tolist(),
    }


def between(policies: list[Policy], trace: Trace, budgets: Sequence[float] = BUDGETS) -> Array:
    """The chance that each sample is answered right at each budget: (budgets, samples).

    Between two policies of a frontier, thresholds are drawn at random from both, such that the mean
    cost is the budget; below the first, it is drawn from it and a guess that costs nothing.
    """
    costs = [0.0]
    rights = [np.full(trace.num_samples, 1 / trace.num_classes)]
    for policy in policies:
        decided = replay(trace, policy)
        costs.append(float(decided.cost.mean()) / trace.full_cost)
        rights.append((decided.prediction == trace.labels).double().numpy())
    order = np.argsort(costs)
    cost, right = np.asarray(costs)[order], np.stack(rights)[order]
    rows = []
    for budget in budgets:
        above = int(np.searchsorted(cost, budget))
        if above == len(cost):
            rows.append(right[-1])
        else:
            share = (budget - cost[above - 1]) / (cost[above] - cost[above - 1])
            rows.append((1 - share) * right[above - 1] + share * right[above])
    return np.stack(rows)


def _operating(tests: list[Trace], policies: list[Policy], right: Tensor, full: Tensor) -> Row:
    """What thresholds do on test samples that are as good as the plain network on calibration."""
    taken, answers, costs, ran = [], [], [], []
    for test, policy in zip(tests, policies, strict=True):
        decided = replay(test, policy)
        taken.append(decided.exit)
        on = np.less(policy.thresholds_for(test.num_exits), np.inf)
        runs = torch.from_numpy(score(test, policy.criterion).running(on))
        came = decided.exit[:, None] >= torch.arange(test.num_exits - 1)
        ran.append((came & runs).double())
        answers.append(decided.prediction == test.labels)
        costs.append(decided.cost / test.full_cost)
    exit, answered, cost = torch.cat(taken), torch.cat(answers), torch.cat(costs)
    return {
        "cost": float(cost.mean()),
        "accuracy": _share(answered),
        "less_plain": _paired(answered, full),
        "shares": (torch.bincount(exit, minlength=len(right)) / len(exit)).tolist(),
        "heads": torch.cat(ran).mean(0).tolist(),
        "overthinking": vars(overthinking(right, exit, answered)),
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
