"""Which stage every module and parameter of the backbone belongs to, for freezing by stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from offramp.build.cost import CostProfile, last_inside

if TYPE_CHECKING:
    from offramp.build.placement import Place

__all__ = ["StageMap", "map_stages", "owns_state"]


@dataclass(frozen=True)
class StageMap:
    """Stage numbers 0 to E-1; stage k lies between the exits k-1 and k.

    Attributes:
        modules: path -> stage in which the module first runs; only modules with parameters or
            buffers of their own.
        parameters: name -> stage in which an operation first reads the parameter.
        stateless: path -> all stages in which the module runs; only those that ran and have neither
            children nor parameters or buffers, such as dropout.
    """

    modules: Mapping[str, int]
    parameters: Mapping[str, int]
    stateless: Mapping[str, frozenset[int]]


def map_stages(backbone: nn.Module, profile: CostProfile, places: Sequence[Place]) -> StageMap:
    """Assign what ran by when it ran, and what did not run to the stage of what surrounds it."""
    last = last_inside(profile.calls)
    spots = {(call.path, call.index): i for i, call in enumerate(profile.calls)}
    taps = [spots[(place.path, place.call)] for place in places]
    ran: dict[str, list[int]] = {}
    for position, call in enumerate(profile.calls):
        ran.setdefault(call.path, []).append(sum(position > last[tap] for tap in taps))

    def stage_of(path: str) -> int:
        while path not in ran and path:
            path = path.rpartition(".")[0]
        return ran[path][0] if path in ran else 0

    ends = [profile.calls[tap].ended for tap in taps]
    modules = {
        path: stage_of(path) for path, module in backbone.named_modules() if owns_state(module)
    }
    stateless = {
        path: frozenset(ran[path])
        for path, module in backbone.named_modules()
        if path in ran and not owns_state(module) and not any(True for _ in module.children())
    }
    parameters = {}
    for name, _ in backbone.named_parameters():
        time = profile.parameter_use.get(name)
        parameters[name] = (
            stage_of(name.rpartition(".")[0]) if time is None else sum(time >= end for end in ends)
        )
    return StageMap(modules, parameters, stateless)


def owns_state(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers of its own."""
    own = (module.parameters(recurse=False), module.buffers(recurse=False))
    return any(True for tensors in own for _ in tensors)
