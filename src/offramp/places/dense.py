"""Every place where an exit might stand, with heads of several sizes at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offramp.build.batch import as_call
from offramp.build.cost import CostProfile, ModuleCall, profile
from offramp.build.heads import TwoStepHead, make_head, name_and_width
from offramp.build.layout import find_layout
from offramp.build.model import MultiExitModel, attach
from offramp.build.outputs import LogitsFunction
from offramp.build.placement import candidates
from offramp.errors import HeadError, PlaceError

__all__ = ["Candidate", "Dense", "attach_densely"]

# A head of our choice that costs more than this share of the backbone is not tried: it could hardly
# pay.
LARGEST = 0.1
# From small to large. "conv" is the largest that the automatic placement would take.
VECTOR_HEADS = ("linear", "mlp")
TOKEN_HEADS = ("pool", "mlp")
MAP_HEADS = ("pool", "conv:16", "conv")


@dataclass(frozen=True)
class Candidate:
    """A head of one size at one place.

    Attributes:
        place: index of the place among all.
        name: of the head, as :func:`offramp.attach` takes it.
        head: the head, in float32 while it learns.
        macs: what it costs per sample.
        dtype: what it is in a model.
    """

    place: int
    name: str
    head: TwoStepHead
    macs: float
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Dense:
    """A backbone with an exit at every candidate place.

    Attributes:
        model: whose features the heads are trained on; its own heads are not used.
        candidates: in order of execution, at each place from cheap to dear.
    """

    model: MultiExitModel
    candidates: tuple[Candidate, ...]

    @property
    def head_macs(self) -> float:
        """Of all heads together, per sample."""
        return sum(candidate.macs for candidate in self.candidates)


def attach_densely(
    backbone: nn.Module,
    example: Any,  # noqa: ANN401
    heads: str | Sequence[str] | None = None,
    logits: LogitsFunction | None = None,
) -> Dense:
    """Exits at all places that the automatic placement chooses from.

    Args:
        backbone: any classifier.
        example: as for :func:`offramp.attach`.
        heads: names of the heads to try at each place, where they suit its feature; by default
            two or three sizes of each kind, as far as they are cheap beside the backbone.
        logits: as for :func:`offramp.attach`.

    Raises:
        PlaceError: the backbone has no such place.
        HeadError: an unknown head, one that does not learn, or none that suits some place.
    """
    heads = (heads,) if isinstance(heads, str) else heads
    for name in heads or ():
        name_and_width(name)
    args, kwargs = as_call(example)
    kwargs.pop("labels", None)
    found = profile(backbone, args, kwargs, logits=logits)
    places = candidates(found)
    if not places:
        raise PlaceError(
            f"The backbone {type(backbone).__name__!r} has no place that is fit for an automatic "
            "exit, so there is nothing to search. Name places by their paths: "
            "attach(backbone, example, exits=['...']). `offramp inspect` lists the modules."
        )
    calls = [found.calls_of(place.path)[place.call] for place in places]
    options = [_fitting(found, call, heads) for call in calls]
    names = [place.name for place in places]
    made: list[Candidate] = []
    for size in range(max(map(len, options))):
        chosen = [offered[min(size, len(offered) - 1)] for offered in options]
        model = attach(backbone, example, exits=names, heads=chosen, logits=logits)
        model.detach()  # its hooks are gone, also where a head below is refused
        for place, (name, head) in enumerate(zip(chosen, model.heads, strict=True)):
            kind = next((p.dtype for p in head.parameters()), torch.float32)
            macs = model.costs.heads[place]
            made.append(Candidate(place, name, _learning(name, head), macs, kind))
    model = attach(backbone, example, exits=names, heads=chosen, logits=logits)
    distinct = _distinct(made)
    if heads is None:
        first = {c.place: c for c in reversed(distinct)}  # the cheapest, at every place
        most = LARGEST * found.macs
        distinct = [c for c in distinct if c.macs <= most or c is first[c.place]]
    return Dense(model, tuple(distinct))


def _fitting(found: CostProfile, call: ModuleCall, heads: Sequence[str] | None) -> tuple[str, ...]:
    """The heads that suit the feature of a call."""
    if call.feature is None:  # a candidate has one; this is for readers and type checkers
        raise PlaceError(f"The output of {found.name(call)!r} holds no tensor.")
    shape, layout = call.feature.shape, find_layout(found, call)
    if heads is None:
        if len(shape) == 2:
            return VECTOR_HEADS
        return TOKEN_HEADS if layout == "NLC" else MAP_HEADS
    fitting, why = [], HeadError("heads is empty: name at least one, such as 'auto'.")
    for name in heads:
        try:
            make_head(name, torch.empty(shape, device="meta"), found.num_classes, layout=layout)
        except HeadError as error:
            why = error
        else:
            fitting.append(name)
    if not fitting:
        raise why
    return tuple(fitting)


def _learning(name: str, head: nn.Module) -> TwoStepHead:
    if not isinstance(head, TwoStepHead):
        raise HeadError(
            f"The head {name!r} has nothing to learn, so a search cannot compare it. Leave it out."
        )
    return head.float()


def _distinct(made: Sequence[Candidate]) -> list[Candidate]:
    """Two names can stand for one head, such as 'conv' where 16 channels are all that fit."""
    kept: dict[object, Candidate] = {}
    for candidate in made:
        shapes = tuple(tuple(p.shape) for p in candidate.head.parameters())
        reads = getattr(candidate.head, "class_token", None)  # the first token or their mean
        key = candidate.place, type(candidate.head), shapes, candidate.macs, reads
        kept.setdefault(key, candidate)
    return sorted(kept.values(), key=lambda c: (c.place, c.macs))
