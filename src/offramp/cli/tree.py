"""What a network costs, as a tree: every module, the candidate places, where the exits fall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from offramp.analyse.table import cost_text
from offramp.build.cost import CostProfile, ModuleCall
from offramp.build.model import MultiExitModel
from offramp.build.placement import Place, candidates

__all__ = ["Inspection"]


@dataclass(frozen=True)
class Inspection:
    """A profile, and the exits that were asked for.

    Attributes:
        found: the profile.
        model: the network with its exits.
        chosen: the places of the exits, as fractions of the profile's measure.
        wanted: the fractions that they were to fall on, where a number of exits was asked for.
    """

    found: CostProfile
    model: MultiExitModel
    chosen: tuple[Place, ...]
    wanted: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        marks, exits = self._candidates(), self._exits()
        costs = self.model.costs
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
                    "fraction": self._fraction(call),
                    "shape": None if call.feature is None else list(call.feature.shape),
                    "candidate": (call.path, call.index) in marks,
                    "exit": exits.get((call.path, call.index)),
                }
                for call in self.found.calls
            ],
            "exits": [
                {"place": place, "stage_macs": stage, "head_macs": head, "leaving_macs": leaving}
                for place, stage, head, leaving in zip(
                    (*self.model.places, "backbone"),
                    costs.stages,
                    costs.heads,
                    costs.cumulative(),
                    strict=True,
                )
            ],
        }

    def render(self, depth: int) -> Group:
        """Two tables for a terminal.

        Args:
            depth: how deep modules are shown; candidates are shown at any depth.
        """
        return Group(self._tree(depth), self._stages())

    def _tree(self, depth: int) -> Table:
        marks, exits = self._candidates(), self._exits()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("module", no_wrap=True)
        table.add_column("class")
        table.add_column("output", no_wrap=True)
        for name in (self.found.unit, "spent after it"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("place", no_wrap=True)
        for call in self.found.calls:
            key = (call.path, call.index)
            if call.depth > depth and key not in marks and key not in exits:
                continue
            name = call.path.rpartition(".")[2] or "(network)"
            again = f"@{call.index}" if len(self.found.calls_of(call.path)) > 1 else ""
            shape = ""
            if call.feature is not None:
                shape = "×".join(map(str, ("B", *call.feature.shape[1:])))
            mark = "candidate" if key in marks else ""
            if key in exits:
                k = exits[key]
                aim = f" (for {100 * self.wanted[k]:.0f} %)" if self.wanted else ""
                mark = f"exit {k}{aim}"
            table.add_row(
                "  " * call.depth + name + again,
                call.kind,
                shape,
                cost_text(call.cost),
                f"{100 * self._fraction(call):.1f} %",
                mark,
                style="bold green" if key in exits else "",
            )
        return table

    def _stages(self) -> Table:
        costs = self.model.costs
        full = sum(costs.stages)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("exit", no_wrap=True)
        for name in ("stage, MACs", "head, MACs", "leaving here, MACs", "of full"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = zip(
            (*self.model.places, "backbone"),
            costs.stages,
            costs.heads,
            costs.cumulative(),
            strict=True,
        )
        for k, (place, stage, head, leaving) in enumerate(rows):
            numbers = (cost_text(stage), cost_text(head), cost_text(leaving))
            table.add_row(f"{k}: {place}", *numbers, f"{leaving / full:.3f}")
        return table

    def _fraction(self, call: ModuleCall) -> float:
        return call.after / self.found.total if self.found.total else 0.0

    def _candidates(self) -> set[tuple[str, int]]:
        return {(place.path, place.call) for place in candidates(self.found)}

    def _exits(self) -> Mapping[tuple[str, int], int]:
        return {(place.path, place.call): k for k, place in enumerate(self.chosen)}
