"""The picture of a report: accuracy against cost."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from offramp.errors import DataError, unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from offramp.analyse.report import Report

__all__ = ["draw", "picture"]

FORMATS = ("pdf", "png", "svg")

# Dark blue, orange, green, grey, violet: told apart also without red or green, and by marker.
CURVE, POLICY, ORACLE, STATIC, RANDOM = "#1f4e79", "#d95f02", "#1b9e77", "#666666", "#7570b3"


def draw(report: Report, ax: Axes | None = None) -> Axes:
    """Draw the frontier, the chosen point, the full network, the baselines and the oracle.

    Args:
        report: to draw.
        ax: axes to draw on; those of a new figure by default, which no window holds.

    Returns:
        The axes.
    """
    if ax is None:
        ax = _figure().subplots()
    full = report.full.cost
    ax.plot(
        [point.cost_ratio for point in report.frontier],
        [100 * point.accuracy for point in report.frontier],
        color=CURVE,
        linewidth=1.5,
        label="frontier: thresholds turned together",
    )
    for cut in report.truncations:
        label = "everyone leaves at one exit" if cut is report.truncations[0] else None
        x, y = cut.cost / full, 100 * cut.accuracy
        ax.plot(x, y, "s", color=STATIC, markersize=5, label=label)
    whole, early = report.full, report.early
    ax.axhline(100 * whole.accuracy, color=STATIC, linewidth=0.8, linestyle=":")
    ax.plot(1.0, 100 * whole.accuracy, "D", color="black", markersize=6, label="full network")
    ax.plot(
        report.random.cost / full,
        100 * report.random.accuracy,
        "x",
        color=RANDOM,
        markersize=7,
        label=report.random.name,
    )
    ax.plot(
        report.oracle.cost / full,
        100 * report.oracle.accuracy,
        "*",
        color=ORACLE,
        markersize=11,
        label=report.oracle.name,
    )
    low, high = early.interval
    ax.errorbar(
        report.cost_ratio,
        100 * early.accuracy,
        yerr=[[100 * (early.accuracy - low)], [100 * (high - early.accuracy)]],
        xerr=[
            [report.cost_ratio - report.cost_interval[0]],
            [report.cost_interval[1] - report.cost_ratio],
        ],
        fmt="o",
        color=POLICY,
        markersize=7,
        capsize=3,
        label="early exits, 95 % intervals",
        zorder=5,
    )
    unit = "MACs" if report.cost_unit.lower() == "macs" else report.cost_unit
    ax.set_xlabel(f"mean cost per sample ({unit}), share of the full network's")
    ax.set_ylabel(f"{report.measure} (%)")
    ax.set_xlim(left=0)
    ax.grid(alpha=0.25)
    ax.legend(loc="lower right", fontsize="small")
    return ax


def picture(report: Report, format: str = "png") -> bytes:
    """The picture as the content of a file.

    Args:
        report: to draw.
        format: ``"png"``, ``"svg"`` or ``"pdf"``.

    Raises:
        DataError: another format.
    """
    if format not in FORMATS:
        raise DataError(unknown_name("picture format", format, FORMATS))
    figure = _figure()
    draw(report, figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format=format)
    return file.getvalue()


def _figure() -> Figure:
    return Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
