"""Where exits should stand, and how many: read off one network with an exit behind every block."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.learning.frontiers import Folds, curve, fronts_of
from benchmarks.learning.settings import confidence
from offramp.decide import Trace

__all__ = ["compare_places"]

Row = dict[str, Any]
Places = tuple[int, ...]


def compare_places(folds: Folds) -> list[Row]:
    """A row for each number of exits and each way to place them.

    Args:
        folds: traces of the network with an exit behind every block. Exits that are left out are
            switched off, not trained anew.
    """
    searched = _search(folds)
    count = folds[0][0].num_exits - 1
    rows = []
    for number in range(1, count + 1):
        ways = {
            "percentiles": _percentiles(folds[0][0], number),
            "depth": _depth(count, number),
            "search": searched[number],
        }
        rows += [
            {"exits": number, "way": way, "places": [folds[0][0].places[k] for k in places]}
            | _figures(folds, places)
            for way, places in ways.items()
        ]
    return rows


def _figures(folds: Folds, places: Places) -> Row:
    kept = [(cal.keep_exits(places), test.keep_exits(places)) for cal, test in folds]
    found: Row = curve(kept, fronts_of(kept, confidence))
    del found["calibration_accuracy"]
    return found


def _percentiles(trace: Trace, number: int) -> Places:
    """The exits nearest to 1 / (n + 1), 2 / (n + 1), ... of the cost, all different."""
    spent = trace.stage_costs.cumsum(0)[:-1] / trace.full_cost
    return _nearest(spent, number)


def _depth(count: int, number: int) -> Places:
    """Likewise of the blocks, whatever they cost."""
    return _nearest((torch.arange(count) + 1) / (count + 1), number)


def _nearest(positions: torch.Tensor, number: int) -> Places:
    taken: list[int] = []
    for step in range(1, number + 1):
        distance = (positions - step / (number + 1)).abs()
        distance[taken] = torch.inf
        taken.append(int(distance.argmin()))
    return tuple(sorted(taken))


def _search(folds: Folds) -> dict[int, Places]:
    """Exits are dropped one by one, each time the one whose loss costs least calibration area."""
    places: Places = tuple(range(folds[0][0].num_exits - 1))
    found = {len(places): places}
    while len(places) > 1:
        fewer = [tuple(k for k in places if k != out) for out in places]
        places = max(fewer, key=lambda one: _figures(folds, one)["calibration_area"])
        found[len(places)] = places
    return found
