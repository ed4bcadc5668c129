"""The tables of docs/deciding.md, from the results of decide.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.markdown import table

__all__ = ["DECIDING_TABLES"]

Result = dict[str, Any]
Row = dict[str, Any]


def _unique(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def _summary(result: Result) -> str:
    """Every bar and what was measured."""
    bars: list[tuple[str, str, str, Callable[[float], bool]]] = [
        ("search_minus_best_baseline", "points, worst budget", "≥ −0.05", lambda v: v >= -0.05),
        ("search_minus_best_baseline_worst_cell", "points, worst trace and budget", "≥ −0.05",
         lambda v: v >= -0.05),
        ("search_minus_geometric", "points, worst budget", "> 0", lambda v: v > 0),
        ("search_minus_geometric_worst_cell", "points, worst trace and budget", "> 0",
         lambda v: v > 0),
        ("budget_use", "of the budget, on test, worst", "≥ 0.985", lambda v: v >= 0.985),
        ("budget_use_most", "of the budget, on test, most", "≤ 1.01", lambda v: v <= 1.01),
        ("best_rule_gain_at_40", "points", "≥ 0.5", lambda v: v >= 0.5),
        ("violations_excess", "cells", "0", lambda v: v == 0),
        ("cost_over_cheapest_valid", "ratio, worst cell", "≤ 1.01", lambda v: v <= 1.01),
        ("seconds_1e6x12", "s", "≤ 10", lambda v: v <= 10),
        ("gigabytes_1e6x12", "GB beyond the trace", "≤ 2", lambda v: v <= 2),
        ("replay_seconds_1e6x12", "s", "≤ 1", lambda v: v <= 1),
        ("search_growth_over_n_log_n", "of N log N, 10⁵ to 10⁶ samples", "≤ 1", lambda v: v <= 1),
        ("equality_rows_that_differ", "rows", "0", lambda v: v == 0),
    ]  # fmt: skip
    # Equal up to rounding is not above.
    summary = {k: round(v, 9) if isinstance(v, float) else v for k, v in result["summary"].items()}
    rows = [
        [f"`{name}`", f"{summary[name]:.4g}", unit, bar, "yes" if met(summary[name]) else "**no**"]
        for name, unit, bar, met in bars
        if name in summary
    ]
    return table(["figure", "measured", "of what", "bar", "met"], rows)


def _methods(result: Result) -> str:
    found = [row for row in result["rows"]["methods"] if row["criterion"] == "confidence"]
    methods = _unique(found, "method")
    rows = []
    for trace in _unique(found, "trace"):
        for budget in sorted(_unique(found, "budget")):
            cell = {r["method"]: r for r in found if (r["trace"], r["budget"]) == (trace, budget)}
            if cell:
                shown = [_percent(cell[m]["accuracy"], 2) if m in cell else "–" for m in methods]
                use = f"{cell['search']['use']:.3f}"
                rows.append([trace, _percent(budget, 0), *shown, use])
    text = table(["trace", "budget, %", *methods, "use of it by search"], rows)
    halves = found[0]["halves"]
    return f"{text}\n\nAccuracy in % on the other half, mean over {halves} random halves."


def _rules(result: Result) -> str:
    found = result["rows"]["rules"]
    traces = _unique(found, "trace")
    means = {}
    for rule in _unique(found, "rule"):
        own = {row["trace"]: row for row in found if row["rule"] == rule}
        shown = [
            f"{own[trace]['gain']:+.2f} ± {own[trace]['gain_error']:.2f}" if trace in own else "–"
            for trace in traces
        ]
        mean = sum(row["gain"] for row in own.values()) / len(own)
        means[rule] = mean, [rule, *shown, f"{mean:+.2f}"]
    rows = [row for _, row in sorted(means.values(), key=lambda pair: -pair[0])]
    text = table(["rule, with search", *traces, "mean"], rows)
    return (
        f"{text}\n\nPoints of accuracy above maximum softmax with `geometric` at the same "
        f"{_percent(found[0]['budget'], 0)} % of the cost, over {found[0]['halves']} random halves "
        f"(standard error between halves, which share samples: rather too small)."
    )


def _promises(result: Result) -> str:
    found = result["rows"]["promises"]
    levels = _unique(found, "confidence")
    rows = []
    for risk, bound in dict.fromkeys((row["risk"], row["bound"]) for row in found):
        for epsilon in _unique(found, "epsilon"):
            shown = []
            for level in levels:
                wanted = (risk, bound, epsilon, level)
                own = [
                    r for r in found
                    if (r["risk"], r["bound"], r["epsilon"], r["confidence"]) == wanted
                ]  # fmt: skip
                worst = max(own, key=lambda row: row["violations"] / row["draws"])
                excess = sum(row["violations"] > row["allowed"] for row in own)
                shown.append(f"{_percent(worst['violations'] / worst['draws'])}")
                shown.append(worst["population"])
                shown.append(f"{excess} of {len(own)}")
            rows.append([risk, bound, f"{epsilon:g}", *shown])
    head = ["risk", "bound", "ε"]
    for level in levels:
        promised = _percent(1 - level, 0)
        head += [f"violations, % (promised ≤ {promised}), worst", "where", "cells above chance"]
    text = table(head, rows)
    draws = found[0]["draws"]
    return (
        f"{text}\n\n{draws:,} draws a cell. A cell is above chance where its count exceeds the "
        f"99.9 % quantile of a binomial at the promised rate."
    )


def _costs(result: Result) -> str:
    found = [row for row in result["rows"]["costs"] if row["confidence"] == 0.9]
    methods = _unique(found, "method")
    rows = []
    for population in _unique(found, "population"):
        for epsilon in _unique(found, "epsilon"):
            at = (population, epsilon)
            cell = {r["method"]: r for r in found if (r["population"], r["epsilon"]) == at}
            rows.append([population, f"{epsilon:g}", *(_paid(cell.get(m)) for m in methods)])
    text = table(["samples from", "ε", *methods], rows)
    return (
        f"{text}\n\nMean cost as a share of the full network's, for an accuracy gap of at most ε "
        f"with confidence 0.9; in brackets, the share of calibration sets with which the promise "
        f"was broken, struck through where that is more than chance allows."
    )


def _paid(row: Row | None) -> str:
    if row is None:
        return "–"
    broken = f"({_percent(row['violations'] / row['draws'])} %)"
    if row["violations"] > row["allowed"]:
        return f"~~{row['cost']:.3f}~~ {broken}"
    return f"{row['cost']:.3f} {broken}"


def _speed(result: Result) -> str:
    rows = [
        [
            f"{row['samples']:,} × {row['exits']}",
            f"{row['search_seconds']:.2f}",
            f"{row['search_gigabytes']:.2f}",
            f"{row['replay_seconds']:.2f}",
        ]
        for row in result["rows"]["speed"]
    ]
    head = ["samples × exits", "calibrate, s", "GB beyond the trace", "replay, s"]
    return table(head, rows)


def _equality(result: Result) -> str:
    rows = [
        [
            row["criterion"],
            " / ".join(_percent(share, 0) for share in row["shares"]),
            str(row["runner_differs"]),
            str(row["onnx_differs"]),
        ]
        for row in result["rows"]["equality"]
    ]
    head = ["criterion", "leave at each exit, %", "rows where the runner differs", "the ONNX file"]
    text = table(head, rows)
    return f"{text}\n\nOf {result['rows']['equality'][0]['rows']:,} random rows: exit or class."


def _of(part: str, table: Callable[[Result], str]) -> Callable[[Result], str]:
    """The table of a part, which a run with ``--only`` may have left out."""
    return lambda result: table(result) if result["rows"].get(part) else "Not measured yet."


DECIDING_TABLES = {
    "decide": _summary,
    "decide.methods": _of("methods", _methods),
    "decide.rules": _of("rules", _rules),
    "decide.promises": _of("promises", _promises),
    "decide.costs": _of("costs", _costs),
    "decide.speed": _of("speed", _speed),
    "decide.equality": _of("equality", _equality),
}
