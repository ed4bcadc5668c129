"""Where the exits go.

Automatic places are taken from *candidates*: the points where a network is one stream. They are the
module calls whose output

* is a tensor (or a tuple that begins with one) of a floating type, with the batch in dimension 0,
  of a shape that a head understands, and is not written over later;
* is all that the rest of the network needs: no skip connection is open around it and no parallel
  branch is pending (values that cost nothing to make, such as masks, do not count);
* does not lie inside a repeated block. A block is a class of modules that occurs several times and
  either is not one stream inside (the residual block, the inception module, the transformer layer),
  be it in one of its instances only, or holds no list of like modules (a stage of a network holds
  one, and is entered).

Of several calls that end at the same cost, such as a convolution with its norm and activation, or a
stage and its last block, the outermost counts, and of those the last. Where too few pass the second
point, as where a network joins all of its layers at the end (weighted sums of layers) or reads its
inputs again and again, it is enough that all later work depends on the output, or most of it; but
never within a branch that is blind to others, or with others still to begin.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.build.cost import CostProfile, Feature, ModuleCall
from offramp.build.flow import COSTLY, SEES
from offramp.build.layout import LAYOUTS
from offramp.errors import PlaceError, near_matches

__all__ = ["Exits", "Place", "candidates", "percentiles", "resolve"]

# At least this share of the work must remain after an automatic exit, or leaving saves nothing.
REST = 0.02
# Where there are too few places: the most of the work after one that comes from the inputs past it.
PASSES = 0.5

Exits = int | Sequence[int | float | str] | Mapping[str, Any]

_CALL = re.compile(r"(?P<path>.*)@(?P<call>0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Place:
    """A place after which an exit stands.

    Attributes:
        path: name of the module in the backbone.
        call: which call of it, from 0.
        fraction: share of the backbone's cost spent when it ends, in the profile's measure.
        name: ``path``, or ``path@call`` for a module that is called several times.
        item: which tensor of the module's output the exit takes.
        copied: whether the feature must be copied, since a later operation writes over it.
    """

    path: str
    call: int
    fraction: float
    name: str
    item: int = 0
    copied: bool = False

    def __str__(self) -> str:
        return self.name


def candidates(profile: CostProfile, at_least: int = 1) -> tuple[Place, ...]:
    """The places that are fit for an automatic exit, in order of execution and of rising cost.

    Args:
        profile: of the backbone.
        at_least: how many are wanted; with fewer strict ones, the weaker rule is added.
    """
    calls = _open_calls(profile)
    found = _thin(profile, [c for c in calls if c.cut and c.pending < COSTLY])
    if len(found) < at_least:
        found = _thin(profile, [c for c in calls if _one_stream(profile, c)])
    return tuple(_place(profile, call) for call in found)


def _one_stream(profile: CostProfile, call: ModuleCall) -> bool:
    """The weaker rule."""
    after = 1.0 - call.macs_after / profile.macs
    fed = call.feeds_all or (call.cut and call.pending <= PASSES * after)
    return fed and call.seen >= SEES


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
        return _nearest(profile, percentiles(exits), gap=1 / (3 * (exits + 1)))
    wanted = [exits] if isinstance(exits, str) else list(exits)
    if isinstance(exits, Mapping) and not all(isinstance(key, str) for key in exits):
        raise PlaceError(
            f"exits maps {', '.join(map(repr, exits))}. Expected module paths as keys and heads as "
            "values; give fractions and indices in a list, and the heads by heads=."
        )
    if not wanted:
        raise PlaceError("exits is empty: expected at least one place.")
    fractions = [item for item in wanted if isinstance(item, float)]
    places = list(_nearest(profile, fractions)) if fractions else []
    for item in wanted:
        if isinstance(item, float):
            continue
        places.append(
            _by_index(profile, item) if isinstance(item, int) else _by_path(profile, item)
        )
    return _in_order(profile, places)


def _open_calls(profile: CostProfile) -> list[ModuleCall]:
    """Calls with a usable output that stand in no repeated block, in the order of their ends."""
    calls = profile.calls
    closed = _blocks(profile)
    inside = [False] * len(calls)
    for position, call in enumerate(calls):
        if call.parent > 0:
            inside[position] = inside[call.parent] or calls[call.parent].kind in closed
    found = [c for c, hidden in zip(calls, inside, strict=True) if not hidden and _usable(c)]
    return sorted(found[1:] if found[:1] == [calls[0]] else found, key=lambda call: call.order)


def _blocks(profile: CostProfile) -> set[str]:
    """Classes of modules that are not entered."""
    calls = profile.calls
    repeated = {kind for kind, n in Counter(call.kind for call in calls).items() if n > 1}
    repeated -= _CONTAINERS
    branching = repeated & {
        calls[call.parent].kind
        for call in calls
        if call.parent > 0
        and call.feature is not None
        and call.feature.needed
        and not call.cut
        and call.ended < calls[call.parent].ended
    }
    closed = {call.path for call in calls if call.kind in branching}
    lists = [path for path in _lists(calls) if closed.isdisjoint(_upwards(path))]
    stages = {path for found in lists for path in _upwards(found)}
    return branching | (repeated - {call.kind for call in calls if call.path in stages})


def _lists(calls: Sequence[ModuleCall]) -> set[str]:
    """Paths that hold two or more modules of one class that are themselves made of modules.

    A container may hold others beside them, a module of its own may not.
    """
    kinds = {call.path: call.kind for call in calls}
    parents = {call.parent for call in calls}
    alike: Counter[tuple[str, str]] = Counter()
    children: Counter[str] = Counter()
    for position, call in enumerate(calls):
        if call.index == 0:
            holder = call.path.rpartition(".")[0]
            children[holder] += 1
            alike[holder, call.kind] += position in parents
    return {
        holder
        for (holder, _), n in alike.items()
        if n > 1 and (kinds.get(holder, "") in _CONTAINERS or n == children[holder])
    }


def _upwards(path: str) -> set[str]:
    """A path and the paths of all that surround it."""
    parts = path.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


# Modules without a meaning of their own; "" stands for a ModuleList, which is never called.
_CONTAINERS = {"", "Sequential", "ModuleList"}


def _usable(call: ModuleCall) -> bool:
    feature = call.feature
    return (
        feature is not None
        and feature.needed
        and feature.batched
        and not feature.overwritten
        and feature.dtype.is_floating_point
        and len(feature.shape) in LAYOUTS
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
    item = call.feature.item if call.feature else 0
    copied = call.feature is not None and call.feature.overwritten
    name = profile.name(call)
    return Place(call.path, call.index, call.after / profile.total, name, item, copied)


def _nearest(
    profile: CostProfile, fractions: Sequence[float], gap: float = 0.0
) -> tuple[Place, ...]:
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
        others = [call for call in profile.calls if call.cut and not _is_batched(call)]
        raise PlaceError(
            f"{len(wanted)} exits were asked for and the backbone has {len(found)} fit place"
            f"{'' if len(found) == 1 else 's'}"
            f"{': ' + ', '.join(p.name for p in found) if found else ''}."
            f"{_not_batched(profile, others)} Ask for fewer, or name the places by their paths."
        )
    chosen = _closest([place.fraction for place in found], wanted, gap)
    return tuple(found[j] for j in chosen)


def _is_batched(call: ModuleCall) -> bool:
    return call.feature is None or call.feature.batched


def _not_batched(profile: CostProfile, calls: Sequence[ModuleCall]) -> str:
    if not calls:
        return ""
    call = calls[0]
    shape = call.feature.shape if call.feature else ()
    return (
        " Others hand on tensors whose dimension 0 is not the batch, such as "
        f"{profile.name(call)!r} with {shape} for {profile.batch} samples."
    )


def _closest(offered: Sequence[float], wanted: Sequence[float], gap: float) -> tuple[int, ...]:
    """Rising indices into ``offered``, one for each of ``wanted``, of least total |log ratio|.

    The ratio, not the difference, since an exit at a fifth of the cost that was asked for is of
    less use than one at twice it. Neighbours lie at least ``gap`` apart where that is possible.
    """
    # best[j]: the least distance with offered[j] as the last chosen, and what was chosen.
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        j: (abs(math.log(f / wanted[0])), (j,)) for j, f in enumerate(offered)
    }
    for want in wanted[1:]:
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for j, fraction in enumerate(offered):
            before = [best[i] for i in best if i < j and fraction - offered[i] >= gap]
            if before:
                distance, chosen = min(before)
                following[j] = (distance + abs(math.log(fraction / want)), (*chosen, j))
        best = following
    if not best:
        return _closest(offered, wanted, 0.0)
    return min(best.values())[1]


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
    if path in profile.aliases:
        first = profile.aliases[path]
        raise PlaceError(
            f"The module {path!r} is the same object as {first!r}. Name it so: {first!r}, or where "
            f"it is called several times, '{first}@k' for its call k, counted from 0."
        )
    if path not in profile.paths or path == "":
        raise PlaceError(_unknown(profile, name, path))
    calls = profile.calls_of(path)
    if not calls:
        raise PlaceError(
            f"The module {path!r} exists and never runs in evaluation mode with this example (or "
            "is TorchScript, which cannot be watched), so no exit can stand there. Places that "
            f"run: {_list(profile)}."
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
    feature = call.feature
    if feature is None:
        raise PlaceError(
            f"The output of {name!r} ({call.kind}) is no tensor and holds none, so no exit can "
            "stand there. Choose a module that returns a tensor, or a tuple that begins with one."
        )
    if not feature.dtype.is_floating_point:
        raise PlaceError(
            f"The output of {name!r} ({call.kind}) is of type {feature.dtype}. Expected a "
            "floating type, which a head can classify."
        )
    if not feature.batched:
        raise PlaceError(
            f"The output of {name!r} ({call.kind}) has shape {feature.shape} for {profile.batch} "
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
        if first.feature and second.feature and _same(first.feature, second.feature):
            raise PlaceError(
                f"Two exits stand at one place: {earlier.name!r} and {later.name!r} hand on the "
                "same tensor. Keep one of them."
            )
    return tuple(ordered)


def _same(first: Feature, second: Feature) -> bool:
    """Whether two calls hand on one and the same tensor (and not two views of it)."""
    return first.value is not None and first.value == second.value and first.shape == second.shape
