"""What a network costs, and what exits would: for a terminal, and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from offramp.analyse.table import cost_text
from offramp.build.cost import CostProfile
from offramp.build.model import MultiExitModel
from offramp.build.placement import Exits, candidates, resolve
from offramp.build.tree import cost_tree

__all__ = ["Inspection"]


@dataclass(frozen=True)
class Inspection:
    """A profile, and the exits that were asked for.

    Attributes:
        found: the profile.
        exits: what was asked for.
        model: the network with these exits.
    """

    found: CostProfile
    exits: Exits
    model: MultiExitModel

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        fit = {(place.path, place.call) for place in candidates(self.found)}
        chosen = {(p.path, p.call): k for k, p in enumerate(resolve(self.found, self.exits))}
        return {
            "measure": self.found.measure,
            "unit": self.found.unit,
            "total": self.found.total,
            "calls": [
                {
                    "path": call.path,
                    "call": call.index,
                    "kind": call.kind,
                    "depth": call.depth,
                    "cost": call.cost,
                    "fraction": call.after / self.found.total,
                    "shape": None if call.feature is None else list(call.feature.shape),
                    "candidate": (call.path, call.index) in fit,
                    "exit": chosen.get((call.path, call.index)),
                }
                for call in self.found.calls
            ],
            "exits": [
                {"place": place, "stage_macs": stage, "head_macs": head, "leaving_macs": leaving}
                for place, stage, head, leaving in self._rows()
            ],
        }

    def render(self, depth: int | None) -> Group:
        """The tree, and below it what the exits cost.

        Args:
            depth: levels of the tree; ``None``: down to the candidates.
        """
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("exit", overflow="fold")
        for name in ("stage, MACs", "head, MACs", "leaving here, MACs", "of full"):
            table.add_column(name, justify="right", no_wrap=True)
        full = self.model.costs.full
        for k, (place, *costs) in enumerate(self._rows()):
            numbers = [cost_text(value) for value in costs]
            table.add_row(f"{k}: {place}", *numbers, f"{costs[-1] / full:.3f}")
        legend = "● exit  ○ candidate  ◂ where that share of the cost is reached"
        return Group(cost_tree(self.found, self.exits, depth), legend, table)

    def _rows(self) -> list[tuple[str, float, float, float]]:
        """Place, stage, head and the sum of leaving there, of every exit."""
        costs = self.model.costs
        places = (*self.model.places, "backbone")
        return list(zip(places, costs.stages, costs.heads, costs.cumulative(), strict=True))
