"""The way without ``torch.export``: a backbone that its author has cut by hand.

An ``nn.Sequential`` whose exits lie at its own children needs no graph: a stage is a run of
children and a head. Its parts may do what they like, branch on values for instance, as long as each
row's answer does not depend on the others, which the proof checks as it does for any stage.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from offramp.build.model import MultiExitModel
from offramp.build.outputs import find_logits
from offramp.errors import StageError
from offramp.run.calls import Call
from offramp.run.engines import Engine, Torch
from offramp.run.evaluating import evaluating
from offramp.run.graph import cut
from offramp.run.rows import RowAxis
from offramp.run.stages import Stage, StagedModel

__all__ = ["cut_by_hand", "cut_for"]


class _Piece(nn.Module):
    """Children of the backbone in turn, and the head at their end: ``x -> (logits, feature)``."""

    def __init__(self, children: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()  # a part may write into what it is given, which is the caller's
        for part in self.parts:
            x = part(x)
        return self.head(x), x


class _Last(nn.Module):
    """The children after the last exit."""

    def __init__(self, children: Sequence[nn.Module], model: MultiExitModel) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)
        self._logits = model._logits

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()
        for part in self.parts:
            x = part(x)
        return (find_logits(x, self._logits),)


def cut_by_hand(model: MultiExitModel, example: object, exits: Sequence[int]) -> StagedModel | None:
    """The stages of a sequential model, or ``None`` where it is not one.

    Args:
        model: its backbone must be a plain ``nn.Sequential`` of one tensor input, its exits at
            children that return one tensor.
        example: one input batch.
        exits: the exits to keep, by number, the final one not counted.
    """
    backbone, call = model.backbone, Call.of(example)
    if not _plain(backbone) or len(call.leaves) != 1:
        return None
    names = list(backbone._modules)  # named_children leaves out what comes twice
    places = [model.places[k] for k in exits]
    if any(place not in names for place in places) or any(model._asked[k] for k in exits):
        return None
    ends = [names.index(place) + 1 for place in places]
    parts, stages, begin, reads = [_own(part) for part in backbone], [], 0, "input"
    sizes = _sizes(parts, call.tensors[0])
    if any(sizes[end] is None for end in ends):
        return None
    for k, place, end in zip(exits, places, ends, strict=True):
        piece = _Piece(parts[begin:end], _own(model.heads[k]))
        stages.append(Stage(k, piece, (reads,), (f"after_{place}",)))
        begin, reads = end, f"after_{place}"
    last = Stage(model.num_exits - 1, _Last(parts[begin:], model), (reads,), ())
    rows: dict[str, RowAxis | None] = dict.fromkeys(
        [s.inputs[0] for s in (*stages, last)], RowAxis()
    )
    size = max((a or 0.0) + (b or 0.0) for a, b in itertools.pairwise(sizes))
    return StagedModel((*stages, last), rows, ("input",), call, size)


def _plain(backbone: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module runs its children in turn and does nothing else."""
    if not isinstance(backbone, nn.Sequential):
        return False
    own = type(backbone).forward is not nn.Sequential.forward or "forward" in vars(backbone)
    return not (own or backbone._forward_pre_hooks or backbone._forward_hooks)


def _own(module: nn.Module) -> nn.Module:
    """The module for inference, sharing parameters and buffers: its flags are not the user's."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared).eval()


def _sizes(parts: Sequence[nn.Module], x: Tensor) -> list[float | None]:
    """Bytes for one sample of the input and behind each part; ``None`` where it is no tensor."""
    samples, sizes, value = len(x), [], x.clone()
    with torch.no_grad():
        for part in (nn.Identity(), *parts):
            value = part(value)
            sizes.append(value.nbytes / samples if isinstance(value, Tensor) else None)
    return sizes


def cut_for(
    engine: str | Engine, model: MultiExitModel, example: object, exits: Sequence[int]
) -> StagedModel:
    """The model's stages; those cut by hand where export refuses and eager torch executes.

    Raises:
        StageError: neither way is open.
    """
    try:
        return cut(model, example, exits)
    except StageError:
        by_hand = engine == "torch" or isinstance(engine, Torch)
        last = model.num_exits - 1
        kept = [k for k in exits if k != last]
        with evaluating(model):
            staged = cut_by_hand(model, example, kept) if by_hand else None
        if staged is None:
            raise
        return staged
