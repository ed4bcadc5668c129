"""The way without ``torch.export``: a backbone that its author has cut by hand.

An ``nn.Sequential`` whose exits lie at its own children needs no graph: a stage is a run of
children and a head. Its parts may do what they like, branch on values for instance, as long as each
row's answer does not depend on the others, which the proof checks as it does for any stage.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

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
        model: its backbone must be an ``nn.Sequential`` of one tensor input, its exits at children.
        example: one input batch.
        exits: the exits to keep, by number, the final one not counted.
    """
    backbone, call = model.backbone, Call.of(example)
    if not isinstance(backbone, nn.Sequential) or len(call.leaves) != 1:
        return None
    names = list(backbone._modules)  # named_children leaves out what comes twice
    places = [model.places[k] for k in exits]
    if any(place not in names for place in places) or any(model._asked[k] for k in exits):
        return None
    parts, stages, begin, reads = [_own(part) for part in backbone], [], 0, "input"
    for k, place in zip(exits, places, strict=True):
        end = names.index(place) + 1
        piece = _Piece(parts[begin:end], _own(model.heads[k]))
        stages.append(Stage(k, piece, (reads,), (f"after_{place}",)))
        begin, reads = end, f"after_{place}"
    last = Stage(model.num_exits - 1, _Last(parts[begin:], model), (reads,), ())
    rows: dict[str, RowAxis | None] = dict.fromkeys(
        [s.inputs[0] for s in (*stages, last)], RowAxis()
    )
    size = _row_bytes(parts, call.tensors[0])
    return StagedModel((*stages, last), rows, ("input",), call, size)


def _own(module: nn.Module) -> nn.Module:
    """The module for inference, sharing parameters and buffers: its flags are not the user's."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared).eval()


def _row_bytes(parts: Sequence[nn.Module], x: Tensor) -> float:
    """Bytes of the largest value between two parts and the one before it, for one sample."""
    sizes, x = [0.0], x.clone()
    with torch.no_grad():
        for part in (nn.Identity(), *parts):
            x = part(x)
            if isinstance(x, Tensor):
                sizes.append(x.element_size() * x.numel() / len(x))
    return max(a + b for a, b in zip(sizes[:-1], sizes[1:], strict=True))


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
