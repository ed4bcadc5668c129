"""Where the exits go.

Automatic places are taken from *candidates*: the points where a network is one stream. They are the
module calls whose output

* is a tensor (or a tuple that begins with one) of a floating type, with the batch in dimension 0,
  of a shape that a head understands, and is not written over later;
* is all that the rest of the network needs: no skip connection is open around it and no parallel
  branch is pending (values that cost nothing to make, such as masks, do not count);
* does not lie inside a repeated block. A block is a class of modules that occurs several times and
  somewhere in which the first two points fail: the residual block, the inception module, the
  transformer layer. A module of such a class is never entered, not even where one instance of it
  (the first block of a ResNet stage, say) would allow it.

Of several calls that end at the same cost, such as a convolution with its norm and activation, or a
stage and its last block, the outermost counts, and of those the last. Where a network joins all of
its layers at the end (jumping knowledge, weighted sums of layers) nothing passes the second point;
then it is enough that all later work depends on the output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.build.cost import CostProfile, ModuleCall
from offramp.build.layout import LAYOUTS
from offramp.errors import PlaceError, near_matches

__all__ = ["Exits", "Place", "candidates", "percentiles", "resolve"]

# After an automatic exit at least this share of the work must remain, or leaving there saves nothing.
REST = 0.02

Exits = int | Sequence[int | float | str] | Mapping[str, Any]

_CALL = re.compile(r"(?P<path>.*)@(?P<call>\d+)")


@dataclass(frozen=True)
class Place:
    """A place after which an exit stands.

    Attributes:
        path: name of the module in the backbone.
        call: which call of it, from 0.
        fraction: share of the backbone's cost spent when it ends, in the profile's measure.
        name: ``path``, or ``path@call`` for a module that is called several times.
    """

    path: str
    call: int
    fraction: float
    name: str

    def __str__(self) -> str:
        return self.name


def candidates(profile: CostProfile, at_least: int = 1) -> tuple[Place, ...]:
    """The places that are fit for an automatic exit, in order of execution and of strictly rising cost.

    Args:
        profile: of the backbone.
        at_least: how many are wanted; with fewer strict ones, the weaker rule is added.
    """
    strict = _thin(profile, [c for c in _open_calls(profile) if c.cut])
    if len(strict) < at_least:
        strict = _thin(profile, [c for c in _open_calls(profile) if c.cut or c.feeds_all])
    return tuple(_place(profile, call) for call in strict)


def percentiles(n: int) -> tuple[float, ...]:
    """The n cost fractions 1/(n+1), 2/(n+1), ..., n/(n+1)."""
    return tuple(k / (n + 1) for k in range(1, n + 1))


def resolve(profile: CostProfile, exits: Exits) -> tuple[Place, ...]:
    """Turn what the user said into places, in order of execution.

    Args:
        profile: of the backbone.
        exits: a number n (the n percentiles of cost), or a list whose elements are fractions of the
            cost, module paths (``"path@k"`` is the call k, from 0, of a module that is called
            several times), or negative indices over the candidates (-1 is the last before the
            output); or a mapping whose keys are paths.

    Raises:
        PlaceError: a place does not exist, never runs, yields no tensor, or stands twice; or the
            network has not as many fit places as were asked for.
    """
    if isinstance(exits, bool) or not isinstance(exits, (int, Sequence, Mapping)):
        raise PlaceError(
            f"exits={exits!r} is of type {type(exits).__name__!r}. Expected a number of exits, a "
            "list of paths, fractions or negative indices, or a mapping from path to head."
        )
    if isinstance(exits, int):
        if exits < 1:
            raise PlaceError(f"exits={exits}: expected at least one exit.")
        return _nearest(profile, percentiles(exits))
    wanted = [exits] if isinstance(exits, str) else list(exits)
    if not wanted:
        raise PlaceError("exits is empty: expected at least one place.")
    fractions = [item for item in wanted if isinstance(item, float)]
    places = list(_nearest(profile, fractions)) if fractions else []
    for item in wanted:
        if isinstance(item, float):
            continue
        places.append(_by_index(profile, item) if isinstance(item, int) else _by_path(profile, item))
    return _in_order(profile, places)


def _open_calls(profile: CostProfile) -> list[ModuleCall]:
    """Calls with a usable output that stand in no repeated block, in the order of their ends."""
    calls = profile.calls
    times = Counter(call.kind for call in calls)
    blocks = {
        calls[call.parent].kind
        for call in calls
        if call.parent > 0 and call.needed and not call.cut and call.ended < calls[call.parent].ended
    }
    blocks = {kind for kind in blocks if times[kind] > 1 and kind not in _CONTAINERS}
    inside = [False] * len(calls)
    for position, call in enumerate(calls):
        if call.parent > 0:
            inside[position] = inside[call.parent] or calls[call.parent].kind in blocks
    found = [
        call
        for position, call in enumerate(calls)
        if position > 0 and not inside[position] and call.needed and _usable(call)
    ]
    return sorted(found, key=lambda call: call.order)


_CONTAINERS = {"Sequential", "ModuleList"}


def _usable(call: ModuleCall) -> bool:
    shape = call.shape
    return (
        shape is not None
        and call.floating
        and call.batched
        and not call.overwritten
        and len(shape) in LAYOUTS
    )


def _thin(profile: CostProfile, calls: Sequence[ModuleCall]) -> list[ModuleCall]:
    """Of calls that end at equal cost keep the outermost, the last of those; drop the two ends."""
    kept: dict[float, ModuleCall] = {}
    for call in calls:
        if call.macs_after <= 0.0 or call.macs_after > (1.0 - REST) * profile.macs:
            continue
        other = kept.get(call.macs_after)
        if other is None or call.depth <= other.depth:
            kept[call.macs_after] = call
    thinned: list[ModuleCall] = []
    for call in sorted(kept.values(), key=lambda call: call.order):
        before = thinned[-1].after if thinned else 0.0
        if before < call.after < profile.total:
            thinned.append(call)
    return thinned


def _place(profile: CostProfile, call: ModuleCall) -> Place:
    return Place(call.path, call.index, call.after / profile.total, profile.name(call))


def _nearest(profile: CostProfile, fractions: Sequence[float]) -> tuple[Place, ...]:
    """For each fraction a candidate of its own, nearest in cost, in rising order."""
    for fraction in fractions:
        if not 0.0 < fraction < 1.0:
            raise PlaceError(
                f"The fraction {fraction!r} is not between 0 and 1. Fractions of the backbone's "
                "cost are given as numbers such as 0.25."
            )
    wanted = sorted(fractions)
    found = candidates(profile, len(wanted))
    if len(found) < len(wanted):
        raise PlaceError(
            f"{len(wanted)} exits were asked for and the backbone has {len(found)} fit places"
            f"{': ' + ', '.join(p.name for p in found) if found else ''}. Ask for fewer, or name "
            "the places by their module paths."
        )
    # Least total distance under rising order: best[j] after i fractions uses candidates up to j.
    best = [(0.0, ())] * (len(found) + 1)  # type: list[tuple[float, tuple[int, ...]]]
    for fraction in wanted:
        row: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())]
        for j, place in enumerate(found):
            distance, chosen = best[j]
            taken = (distance + abs(place.fraction - fraction), (*chosen, j))
            row.append(min(row[-1], taken, key=lambda entry: entry[0]))
        best = row
    return tuple(found[j] for j in best[-1][1])


def _by_index(profile: CostProfile, index: int) -> Place:
    found = candidates(profile)
    if index >= 0:
        raise PlaceError(
            f"The index {index} is not negative. Indices count back from the output, -1 being the "
            "last candidate before it; give paths to count otherwise."
        )
    if -index > len(found):
        raise PlaceError(
            f"The index {index} is out of range: the backbone has {len(found)} candidate places"
            f"{': ' + ', '.join(p.name for p in found) if found else ''}."
        )
    return found[index]


def _by_path(profile: CostProfile, name: str) -> Place:
    if not isinstance(name, str):
        raise PlaceError(
            f"The place {name!r} is of type {type(name).__name__!r}. Expected a module path, a "
            "fraction of the cost (a float), or a negative index."
        )
    match = _CALL.fullmatch(name)
    path, number = (match["path"], int(match["call"])) if match else (name, None)
    if path not in profile.paths or path == "":
        raise PlaceError(_unknown(profile, name, path))
    calls = profile.calls_of(path)
    if not calls:
        raise PlaceError(
            f"The module {path!r} exists and never runs in evaluation mode with this example, so "
            f"no exit can stand there. Places that run: {_list(profile)}."
        )
    if number is None and len(calls) > 1:
        raise PlaceError(
            f"The module {path!r} is called {len(calls)} times in one pass. Say which call: "
            f"'{path}@0' to '{path}@{len(calls) - 1}'."
        )
    if number is not None and number >= len(calls):
        raise PlaceError(
            f"The place {name!r} asks for call {number} (counted from 0) of a module that is "
            f"called {len(calls)} times."
        )
    call = calls[number or 0]
    _check(profile, call)
    return _place(profile, call)


def _check(profile: CostProfile, call: ModuleCall) -> None:
    name = profile.name(call)
    if call.shape is None:
        raise PlaceError(
            f"The output of {name!r} ({call.kind}) is no tensor, nor a tuple that begins with one, "
            "so no exit can stand there. Choose a module that returns a tensor."
        )
    if not call.floating:
        raise PlaceError(f"The output of {name!r} ({call.kind}) is not of a floating type.")
    if not call.batched:
        raise PlaceError(
            f"The output of {name!r} ({call.kind}) has shape {call.shape} for {profile.batch} "
            "samples: its dimension 0 is not the batch. Choose a place where it is: "
            f"{_list(profile)}."
        )


def _unknown(profile: CostProfile, name: str, path: str) -> str:
    known = [p for p in profile.paths if p]
    near = near_matches(path, known)
    near += [p for p in known if path and p.endswith("." + path) and p not in near][:3]
    hint = f" Near matches: {', '.join(near)}." if near else ""
    return f"The backbone has no module {name!r}.{hint} Fit places: {_list(profile)}."


def _list(profile: CostProfile) -> str:
    names = [place.name for place in candidates(profile)]
    if len(names) > 12:
        names = [*names[:6], "...", *names[-5:]]
    return ", ".join(names) or "none"


def _in_order(profile: CostProfile, places: Sequence[Place]) -> tuple[Place, ...]:
    order = {(c.path, c.index): c for c in profile.calls}
    ordered = sorted(places, key=lambda p: order[(p.path, p.call)].order)
    for earlier, later in zip(ordered[:-1], ordered[1:], strict=True):
        if (earlier.path, earlier.call) == (later.path, later.call):
            raise PlaceError(f"Two exits stand at one place, {later.name!r}. Give each its own.")
        first, second = order[(earlier.path, earlier.call)], order[(later.path, later.call)]
        if first.value is not None and first.value == second.value:
            raise PlaceError(
                f"Two exits stand at one place: {earlier.name!r} and {later.name!r} hand on the "
                "same tensor. Keep one of them."
            )
    return tuple(ordered)
