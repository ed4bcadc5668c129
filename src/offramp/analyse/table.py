"""The report as a table, for a terminal and as plain text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from offramp.analyse.intervals import Interval
    from offramp.analyse.report import Report

__all__ = ["WIDTH", "as_text", "batches", "columns", "cost_text", "facts", "rows"]

WIDTH = 120
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(report: Report) -> Group:
    """Table, overthinking, verdict and notes, for rich."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    label_heading, *headings = columns(report)
    table.add_column(label_heading, overflow="fold")  # a long place takes two lines
    for name in headings:
        table.add_column(name, justify="right", no_wrap=True)
    for label, cells in rows(report):
        style = {"full network": "bold", "early exits": "bold green"}.get(label, "")
        table.add_row(label, *cells, style=style)
    tone = "green" if report.verdict.worth_it else "yellow"
    lines = [Text(f"{name}: {text}") for name, text in facts(report)]
    notes = [Text(note, style="yellow") for note in report.notes]
    return Group(
        table, *lines, *notes, Text(f"Verdict: {report.verdict.text}", style=f"bold {tone}")
    )


def as_text(report: Report) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(render(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def columns(report: Report) -> list[str]:
    """Headings of the table."""
    unit = "MACs" if report.cost_unit.lower() == "macs" else f"cost ({report.cost_unit})"
    timed = [f"ms, batch {size}" for size, _ in batches(report)]
    heads = ["", f"{report.measure}, %", "leave, %", "right, %", unit, "of full", "ECE"]
    return [*heads, *timed]


def rows(report: Report) -> list[tuple[str, list[str]]]:
    """Label and cells of every line: the full network, the exits, the policy, the baselines."""
    full, early = report.full, report.early
    last = len(report.exits) - 1

    def timed(key: str, index: int | None = None) -> list[str]:
        return [_milliseconds(times.get(key), index) for _, times in batches(report)]

    def line(
        accuracy: float, interval: Interval, cost: float, middle: Sequence[str] = ("", "")
    ) -> list[str]:
        start = f"{_percent(accuracy)} ({_interval(interval)})"
        return [start, *middle, cost_text(cost), f"{cost / full.cost:.2f}"]

    found = [
        ("full network", [*line(full.accuracy, full.interval, full.cost), "", *timed("full_ms")])
    ]
    for k, row in enumerate(report.exits):
        taken = "" if row.accuracy_taken is None else _percent(row.accuracy_taken)
        error = "" if row.calibration_error is None else f"{row.calibration_error:.3f}"
        cells = line(row.accuracy, row.interval, row.cost, (_percent(row.share), taken))
        times = timed("exits_ms", k) if k < last else ["" for _ in batches(report)]
        found.append((f"exit {k}: {row.place}", [*cells, error, *times]))
    found.append(
        ("early exits", [*line(early.accuracy, early.interval, early.cost), "", *timed("early_ms")])
    )
    blank = ["" for _ in batches(report)]
    for other in (report.random, report.oracle):
        cells = line(other.accuracy, other.interval, other.cost)
        found.append((other.name, [*cells, "", *blank]))
    return found


def facts(report: Report) -> list[tuple[str, str]]:
    """What stands below the table: name and sentence."""
    gain, interval = report.difference
    low, high = report.cost_interval
    found = [
        (
            "Early exits against the full network",
            f"{100 * gain:+.2f} points of {report.measure} ({100 * interval[0]:+.2f} to "
            f"{100 * interval[1]:+.2f}) at {report.cost_ratio:.3f} of its cost ({low:.3f} to "
            f"{high:.3f}); {report.samples} samples",
        )
    ]
    time = report.measured.get("time")
    if time:
        speed = ", ".join(
            f"{times['speedup']:.2f} times as fast at batch {size}"
            for size, times in batches(report)
        )
        threads = f"{time['threads']} thread{'s' if time['threads'] != 1 else ''}"
        found.append(("Measured", f"{speed} ({time['engine']}, {threads})"))
    thinking = report.overthinking
    if thinking is not None:
        found.append(
            (
                "Overthinking",
                f"of all samples, destructive {_percent(thinking.destructive)} % (an earlier exit "
                f"is right, the end wrong); rescued {_percent(thinking.rescued)} % (destructive, "
                f"but answered right); lost by leaving early {_percent(thinking.lost)} %; wasteful "
                f"{_percent(thinking.wasteful)} % (right early, went on to a right answer; full "
                f"network {_percent(thinking.wasteful_full)} %); some exit is right "
                f"{_percent(thinking.oracle_accuracy)} %",
            )
        )
    if "agreement" in report.measured:
        share = _percent(report.measured["agreement"])
        found.append(("Runner and replay", f"same exit and class for {share} % of the samples"))
    found.append(("Policy", report.policy))
    return found


def batches(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    """Batch size and measured times, for each size that was timed."""
    time: Mapping[str, Any] = report.measured.get("time") or {}
    return [(k.removeprefix("batch_"), time[k]) for k in time if k.startswith("batch_")]


def cost_text(cost: float) -> str:
    """A cost with three digits: ``12.3 M``."""
    for size, letter in UNITS:
        if abs(cost) >= size:
            return f"{cost / size:.3g} {letter}"
    return f"{cost:.3g}"


def _milliseconds(value: float | Sequence[float | None] | None, index: int | None) -> str:
    if isinstance(value, Sequence):
        value = None if index is None else value[index]
    return "" if value is None else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _interval(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"
