"""The cost profile as a tree for the terminal: candidates, chosen places and percentiles marked."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text
from rich.tree import Tree

from offramp.build.cost import CostProfile, ModuleCall
from offramp.build.placement import Exits, Place, candidates, percentiles, resolve

__all__ = ["amount", "cost_tree"]

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def cost_tree(profile: CostProfile, exits: Exits = 3, depth: int | None = None) -> Tree:
    """A `rich` tree of the module calls, one line each, in the order of execution.

    A line names the module, its class, its cost, the share of the whole that is spent when it
    ends, and the shape of what it hands on. ``○`` marks a candidate for an exit, ``●`` a place
    that ``exits`` chooses, and ``◂ 25%`` the line in which that share of the cost is reached.

    Args:
        profile: of the backbone.
        exits: as for :func:`offramp.attach`.
        depth: levels to show; without it, down to the candidates and what stands beside them.

    Raises:
        PlaceError: ``exits`` does not resolve.
    """
    chosen = {(place.path, place.call): place for place in resolve(profile, exits)}
    fit = {(place.path, place.call): place for place in candidates(profile, len(chosen))}
    shown = _shown(profile, {**fit, **chosen}, depth)
    wanted = _marks(exits, list(chosen.values()))
    tree = Tree(_headline(profile))
    nodes = {0: tree}
    for position, call in enumerate(profile.calls):
        if position not in shown or position == 0:
            continue
        place = chosen.get((call.path, call.index))
        mark = "●" if place else "○" if (call.path, call.index) in fit else " "
        line = _line(profile, call, mark)
        if not any(profile.calls[later].parent == position for later in shown):
            while wanted and wanted[0] <= call.after / profile.total + 1e-9:
                line.append(f"  ◂ {wanted.pop(0):.0%}", style="bold cyan")
        nodes[position] = nodes[call.parent].add(line)
    return tree


def amount(value: float) -> str:
    """A number with three digits and a prefix: ``41200000`` is ``"41.2 M"``."""
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _headline(profile: CostProfile) -> Text:
    root = profile.calls[0]
    text = Text(root.kind, style="bold")
    text.append(f"  {amount(profile.total)}{profile.unit} per sample", style="default")
    if profile.measure != "macs":
        text.append(f", {amount(profile.macs)}MACs", style="default")
    text.append(f", {profile.num_classes} classes", style="default")
    return text


def _line(profile: CostProfile, call: ModuleCall, mark: str) -> Text:
    parent = profile.calls[call.parent].path
    name = profile.name(call)
    if parent and name.startswith(parent + "."):
        name = name[len(parent) + 1 :]
    shape = ""
    if call.feature is not None:
        shape = "×".join(
            ["B" if call.feature.batched else str(call.feature.shape[0])] * bool(call.feature.shape)
            + [str(size) for size in call.feature.shape[1:]]
        )
    style = {"●": "bold green", "○": "green"}.get(mark, "default")
    text = Text(f"{mark} {name}", style=style)
    text.append(f"  {call.kind}", style="dim")
    text.append(f"  {amount(call.cost)}{profile.unit}", style="default")
    text.append(f"  ends at {call.after / profile.total:.1%}", style="default")
    text.append(f"  {shape}", style="dim")
    return text


def _shown(
    profile: CostProfile, places: Mapping[tuple[str, int], Place], depth: int | None
) -> set[int]:
    """Positions of the calls that get a line: around every place, all calls beside it."""
    calls = profile.calls
    if depth is not None:
        return {position for position, call in enumerate(calls) if call.depth <= depth}
    opened = {0}
    for position, call in enumerate(calls):
        if (call.path, call.index) in places:
            parent = calls[position].parent
            while parent >= 0:
                opened.add(parent)
                parent = calls[parent].parent
    return {0} | {position for position, call in enumerate(calls) if call.parent in opened}


def _marks(exits: Exits, chosen: list[Place]) -> list[float]:
    """The percentiles to draw: those that were asked for, or as many as there are exits."""
    if isinstance(exits, int):
        return list(percentiles(exits))
    if not isinstance(exits, (str, Mapping)):
        fractions = sorted(item for item in exits if isinstance(item, float))
        if fractions:
            return fractions
    return list(percentiles(len(chosen)))
