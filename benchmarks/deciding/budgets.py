"""Accuracy at a budget: every method and rule on one half, looked at on the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.deciding.rules import COMBINED, RULES
from offramp.decide import Criterion, Policy, Trace, calibrate, replay
from offramp.errors import Infeasible

__all__ = ["MANY", "compare_methods", "compare_rules", "summarise_methods", "summarise_rules"]

METHODS = ("search", "shared", "geometric", "greedy", "per-exit accuracy", "quantile")
CRITERIA = ("confidence", "margin")
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
AT = 0.4  # of the full cost: where rules are compared
MANY = 6  # exits, the last included, from which a trace counts for the comparison of rules

Row = dict[str, Any]
Say = Callable[[str], None]


def compare_methods(
    traces: dict[str, Trace],
    halves: int,
    say: Say,
    criteria: Sequence[str] = CRITERIA,
    budgets: Sequence[float] = BUDGETS,
) -> list[Row]:
    """One row for each trace, criterion, budget and method: accuracy and use on the other half."""
    rows = []
    for name, trace in traces.items():
        for wanted in criteria:
            found: dict[tuple[float, str], list[tuple[float, float]]] = defaultdict(list)
            for half in range(halves):
                fit, test = trace.split(0.5, seed=half)
                rule = RULES[wanted](fit, AT)
                for budget in budgets:
                    for method in METHODS:
                        seen = _at(fit, test, rule, budget, method)
                        if seen is not None:
                            found[budget, method].append(seen)
            for (budget, method), seen in found.items():
                about = {"trace": name, "criterion": wanted, "budget": budget, "method": method}
                rows.append(about | _spread(seen, budget))
            say(f"methods: {name}, {wanted}")
    return rows


def compare_rules(
    traces: dict[str, Trace], halves: int, say: Say, names: Sequence[str]
) -> list[Row]:
    """One row for each trace and rule at 40 % of the cost, beside max-softmax with geometric."""
    rows = []
    for name, trace in traces.items():
        base = []
        for half in range(halves):
            fit, test = trace.split(0.5, seed=half)
            base.append(_at(fit, test, RULES["confidence"](fit, AT), AT, "geometric"))
        for wanted in names:
            make, seen = RULES[wanted], []
            for half in range(halves):
                fit, test = trace.split(0.5, seed=half)
                seen.append(_at(fit, test, make(fit, AT), AT, "search"))
            gains = [100 * (a[0] - b[0]) for a, b in zip(seen, base, strict=True) if a and b]
            about = {"trace": name, "exits": trace.num_exits, "rule": wanted, "budget": AT}
            gain = {"gain": float(np.mean(gains)), "gain_error": _error(gains)}
            rows.append(about | _spread([one for one in seen if one], AT) | gain)
            say(f"rules: {name}, {wanted}, {np.mean(gains):+.2f} points")
    return rows


def summarise_methods(rows: list[Row]) -> dict[str, float]:
    """Search beside the best baseline and beside geometric, in points, and its use of the budget.

    Means over traces and criteria, of the worst budget; and the worst cell of all.
    """
    accuracy = {_key(row): 100 * row["accuracy"] for row in rows}
    use = [row["use"] for row in rows if row["method"] == "search"]
    cells = sorted({key[:3] for key in accuracy})
    behind: dict[float, list[float]] = defaultdict(list)
    above: dict[float, list[float]] = defaultdict(list)
    for cell in cells:
        ours, budget = accuracy[*cell, "search"], cell[2]
        behind[budget].append(ours - max(accuracy[*cell, method] for method in METHODS[1:]))
        above[budget].append(ours - accuracy[*cell, "geometric"])
    return {
        "search_minus_best_baseline": _worst_mean(behind),
        "search_minus_best_baseline_worst_cell": min(map(min, behind.values())),
        "search_minus_geometric": _worst_mean(above),
        "search_minus_geometric_worst_cell": min(map(min, above.values())),
        "budget_use": min(use),
        "budget_use_most": max(use),
    }


def summarise_rules(rows: list[Row]) -> dict[str, Any]:
    """Mean gains of the rules that were tried on every trace: the best gate or ensemble, and the
    best of all."""
    traces = len({row["trace"] for row in rows})
    found = {rule: [row["gain"] for row in rows if row["rule"] == rule] for rule in _rules(rows)}
    gains = {rule: float(np.mean(own)) for rule, own in found.items() if len(own) == traces}
    best = max(set(COMBINED) & set(gains), key=lambda rule: gains[rule])
    most = max(gains, key=lambda rule: gains[rule])
    return {
        "best_rule": best,
        "best_rule_gain_at_40": gains[best],
        "best_of_all_rules": most,
        "best_of_all_rules_gain_at_40": gains[most],
        "confidence_with_search_gain_at_40": gains["confidence"],
    }


def _rules(rows: list[Row]) -> list[str]:
    return list({row["rule"]: None for row in rows})


def _worst_mean(values: dict[float, list[float]]) -> float:
    return min(float(np.mean(found)) for found in values.values())


def _key(row: Row) -> tuple[str, str, float, str]:
    return row["trace"], row["criterion"], row["budget"], row["method"]


def _at(
    fit: Trace, test: Trace, rule: Criterion, budget: float, method: str
) -> tuple[float, float] | None:
    """Accuracy and mean cost on the other half, or nothing where the budget is out of reach."""
    try:
        policy: Policy = calibrate(fit, rule, max_cost=budget, method=method)
    except Infeasible:
        return None
    decided = replay(test, policy)
    accuracy = float((decided.prediction == test.labels).double().mean())
    return accuracy, float(decided.cost.mean()) / test.full_cost


def _spread(seen: list[tuple[float, float]], budget: float) -> Row:
    accuracy, cost = map(np.asarray, zip(*seen, strict=True))
    return {
        "halves": len(seen),
        "accuracy": float(accuracy.mean()),
        "accuracy_error": _error(accuracy),
        "use": float(cost.mean() / budget),
        "use_most": float(cost.max() / budget),
    }


def _error(values: Sequence[float] | np.ndarray) -> float:
    """The standard error of a mean; halves of the same samples, so that it is a rough one."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
