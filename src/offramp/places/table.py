"""A plan as a table, for a terminal and as plain text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from offramp.build.tree import amount

if TYPE_CHECKING:
    from offramp.places.result import PlacePlan

__all__ = ["as_text", "render"]

WIDTH = 120


def render(plan: PlacePlan) -> Group:
    """The exits, what they do, what they rest on, and what the search took, for rich."""
    parts: list[Table | Text] = []
    if plan.planned:
        parts.append(_exits(plan))
    if plan.operating:
        parts.append(_operating(plan))
    parts += [Text(line) for line in _grounds(plan)]
    parts.append(Text(plan.verdict, style="bold green" if plan.planned else "bold yellow"))
    return Group(*parts)


def as_text(plan: PlacePlan) -> str:
    """The same as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(render(plan))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _exits(plan: PlacePlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("exit", overflow="fold")
    table.add_column("head")
    searched = plan.method == "search"
    columns = ["at, % of cost", "head, % of cost"]
    for name in columns + ["brings, % of cost", "on fresh samples"] * searched:
        table.add_column(name, justify="right", no_wrap=True)
    for k, exit in enumerate(plan.planned):
        numbers = [exit.fraction, exit.head_share]
        numbers += [n for n in (exit.brings, exit.brings_fresh) if n is not None]
        table.add_row(f"{k}: {exit.place}", exit.head, *(f"{100 * n:.2f}" for n in numbers))
    return table


def _operating(plan: PlacePlan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("accuracy given up, points")
    for name in ("cost, of full", "accuracy, %", "leave at each exit, %", "threshold"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in plan.operating:
        table.add_row(
            f"at most {100 * point.drop:g}",
            f"{point.cost_ratio:.3f}",
            f"{100 * point.accuracy:.2f}",
            " ".join(f"{100 * share:.0f}" for share in point.shares),
            f"{point.thresholds[0]:.3f}",
        )
    return table


def _grounds(plan: PlacePlan) -> list[str]:
    if plan.cost is None or plan.full_accuracy is None:
        return []
    learned, chosen, fresh = plan.samples
    heads, places = plan.candidates
    how = "all there are" if plan.exact else "changes one by one, then all of the best 12 heads"
    cost = plan.cost
    more = ["MACs"] * (cost.macs >= cost.training_macs)
    more += ["seconds"] * (cost.seconds >= cost.training_seconds)
    beside = f"MORE in {' and '.join(more)}" if more else "less"
    return [
        f"{heads} heads at {places} places, trained on {learned} samples with the backbone frozen; "
        f"exits chosen on {chosen} others ({plan.tried} subsets: {how}); accuracies, costs and "
        f"the last column of the exits are of {fresh} fresh ones, where the backbone has "
        f"{100 * plan.full_accuracy:.2f} %.",
        f"The search took {amount(cost.macs)}MACs and {cost.seconds:.1f} s, {beside} than "
        f"10 epochs of the backbone on this loader: {amount(cost.training_macs)}MACs and about "
        f"{cost.training_seconds:.1f} s.",
    ]
