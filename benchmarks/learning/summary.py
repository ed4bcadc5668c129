"""The flat figures, and which scheme is the best of a network."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from benchmarks.learning.frontiers import TOLERANCE, reaches
from benchmarks.learning.settings import PLAIN

__all__ = ["best_setting", "least_cost", "summarise"]

Row = dict[str, Any]

# The figure of a network is that of the training with the most seeds; else of the longest that is
# measured.
NETWORKS = {
    "fashion": ("fashion_resnet20",),
    "cifar": ("cifar_resnet20_narrow", "cifar_resnet20_long", "cifar_resnet20"),
    "cifar56": ("cifar_resnet56_long", "cifar_resnet56"),
    "fashion_long": ("fashion_resnet20_long",),
    "cifar_long": ("cifar_resnet20_long",),
    "cifar_short": ("cifar_resnet20",),
    "cifar56_short": ("cifar_resnet56",),
}


def best_setting(runs: list[Row], task: str) -> str | None:
    """The setting that has the plain network's accuracy at the least cost, on calibration samples.

    Mean over its seeds; where none has it, or several at the same cost, the largest area decides.
    Only settings with as many seeds as any other count.
    """
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in runs:
        if row["task"] == task and row["setting"] != PLAIN:
            rule = row["rules"][row["rule"]]
            cost = rule.get("calibration_cost")
            found[row["setting"]].append(
                (float("inf") if cost is None else cost, -rule["calibration_area"])
            )
    most = max(map(len, found.values()), default=0)
    means = {name: tuple(np.mean(v, 0)) for name, v in found.items() if len(v) == most}
    return min(means, key=lambda name: means[name]) if means else None


def least_cost(row: Row) -> float | None:
    """The share of the plain network's cost at which a run has its accuracy, within tolerance."""
    curve = row["rules"][row["rule"]]["accuracy"]
    return reaches(curve, row["plain"]["accuracy"] - TOLERANCE)


def summarise(rows: Row) -> Row:
    """What is watched: means over seeds of the best setting of each network; else the worst."""
    runs = rows["runs"]
    found: Row = {}
    said: set[str] = set()
    for short, tasks in NETWORKS.items():
        task = next((name for name in tasks if best_setting(runs, name)), tasks[-1])
        best = best_setting(runs, task)
        if best is None or task in said:  # no larger budget was measured
            continue
        said.add(task)
        own = [r for r in runs if (r["task"], r["setting"]) == (task, best)]
        costs = [least_cost(r) for r in own]
        reached = [cost for cost in costs if cost is not None]
        found[f"best_{short}"] = best
        found[f"macs_at_plain_accuracy_{short}"] = (
            float(np.mean(reached)) if len(reached) == len(costs) else None
        )
        points = [r["operating"] for r in own]
        found[f"calibrated_macs_{short}"] = float(np.mean([p["cost"] for p in points]))
        gained = np.mean([p["less_plain"]["points"] for p in points])
        found[f"calibrated_points_{short}"] = 100 * float(gained)
    worst = {
        "measured_over_macs_speedup": (min, "speed", "measured_over_macs"),
        "step_overhead": (max, "steps", "ratio_less_heads"),
        "memory_overhead": (max, "memory", "ratio"),
    }
    for name, (of, section, key) in worst.items():
        if rows.get(section):
            found[name] = of(row[key] for row in rows[section])
    found["runs"] = len(runs)
    return found
