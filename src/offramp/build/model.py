"""A backbone becomes a multi-exit model, and stays itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.build.asking import named_inputs, wanted_inputs
from offramp.build.batch import as_call, batch_size, take_rows
from offramp.build.capture import Taps
from offramp.build.cascade import PREVIOUS, asked_of, cascaded
from offramp.build.cost import CostProfile, ExitCosts, ModuleCall, profile
from offramp.build.flow import count_macs
from offramp.build.heads import FunctionHead, make_head
from offramp.build.layout import LAYOUTS, find_layout
from offramp.build.outputs import ExitOutputs, LogitsFunction, find_logits
from offramp.build.ownership import StageMap, map_stages
from offramp.build.placement import Exits, Place, resolve
from offramp.build.prototypes import PrototypeHead
from offramp.build.watch import as_found
from offramp.errors import DataError, HeadError, PlaceError

__all__ = ["ExitOutputs", "HeadLike", "MultiExitModel", "attach"]

HeadLike = str | nn.Module | Callable[..., Tensor]

# An automatic convolutional head may cost this share of the backbone.
HEAD_SHARE = 0.015


class MultiExitModel(nn.Module):
    """A backbone, untouched, and the heads of its auxiliary exits. Made by :func:`attach`.

    Attributes:
        backbone: the very object that was given.
        heads: E-1 heads in order of execution.
        places: E-1 addresses, ``"path"`` or ``"path@call"``.
        costs: what it costs to come to each exit.
        num_classes: width C of all logits.
        select: function that takes rows of the inputs where dimension 0 is not the batch.
        cascade: whether each exit but the first also sees the logits of the one before.
        training_fingerprints: sorted int64 hashes of the samples the model was trained on.
    """

    def __init__(
        self,
        backbone: nn.Module,
        taps: Taps,
        heads: Sequence[nn.Module],
        costs: ExitCosts,
        stages: StageMap,
        num_classes: int,
        *,
        logits: LogitsFunction | None = None,
        select: Callable[..., Any] | None = None,
        cascade: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.places = taps.names
        self.costs = costs
        self.num_classes = num_classes
        self.select = select
        self.cascade = cascade
        self.training_fingerprints = torch.empty(0, dtype=torch.int64)
        self._taps = taps
        self._stages = stages
        self._logits = logits
        self._asked = [asked_of(head) for head in heads]
        own = {PREVIOUS} if cascade else set()
        self._wants_inputs = any(set(asked) - own for asked in self._asked)

    @property
    def num_exits(self) -> int:
        """E: the auxiliary exits and the backbone's own output."""
        return len(self.places) + 1

    def features(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Any]:  # noqa: ANN401
        """Run the backbone; return the E-1 tapped features and what the backbone returned.

        Raises:
            PlaceError: a tapped module did not run in this pass.
        """
        return self._taps.run(self.backbone, args, kwargs)

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> ExitOutputs:  # noqa: ANN401
        """Logits of all exits: E tensors ``(B, C)``, the last being the backbone's own.

        Args:
            *args: positional inputs of the backbone.
            labels: ``(B,)`` class indices; if given, ``loss`` is the mean over the exits of their
                cross-entropies. They are not passed to the backbone.
            **kwargs: keyword inputs of the backbone.
        """
        features, output = self.features(*args, **kwargs)
        named = named_inputs(self.backbone, args, kwargs) if self._wants_inputs else {}
        logits: list[Tensor] = []
        for head, asked, feature in zip(self.heads, self._asked, features, strict=True):
            if self.cascade and logits:
                named[PREVIOUS] = logits[-1].detach()
            logits.append(head(feature, **wanted_inputs(head, feature, named, asked)))
        logits.append(find_logits(output, self._logits))
        loss = None
        if labels is not None:
            loss = torch.stack([functional.cross_entropy(z, labels) for z in logits]).mean()
        return ExitOutputs(logits, output, loss)

    def stage_modules(self, k: int) -> list[tuple[str, nn.Module]]:
        """Modules with parameters or buffers of their own that first run in stage ``k``.

        Stage k lies between the exits k-1 and k. Names are those in ``backbone``.
        """
        return [
            (name, module)
            for name, module in self.backbone.named_modules()
            if self._stages.modules.get(name) == k
        ]

    def stage_parameters(self, k: int) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the backbone that are first used in stage ``k``, with their names in it."""
        return [
            (name, parameter)
            for name, parameter in self.backbone.named_parameters()
            if self._stages.parameters.get(name) == k
        ]

    def detach(self) -> nn.Module:
        """Remove all hooks and return the backbone. The model cannot run afterwards."""
        self._taps.remove()
        return self.backbone


def attach(
    backbone: nn.Module,
    example: Any,  # noqa: ANN401
    *,
    exits: Exits = 3,
    heads: str | Sequence[HeadLike] = "auto",
    cost: str = "macs",
    logits: LogitsFunction | None = None,
    num_classes: int | None = None,
    select: Callable[..., Any] | None = None,
    cascade: bool = False,
) -> MultiExitModel:
    """Give a backbone early exits.

    The backbone is not edited: it is the same object with the same parameters, and its training
    flags, statistics and the random state are as before. Heads are drawn from the current random
    state, so ``torch.manual_seed`` makes them reproducible.

    Args:
        backbone: any classifier.
        example: a batch of at least two samples: a tensor, a tuple of positional inputs, or a
            mapping of keyword inputs.
        exits: a number n (at the n percentiles of the cost), a list of fractions, module paths or
            negative indices, or a mapping from path to head.
        heads: name of the head of all exits, or one for each exit in order of execution. A head is
            a name, a module, or a function from the feature to ``(B, C)`` logits.
        cost: the measure that places by number or fraction refer to: ``"macs"``, ``"params"`` or
            ``"latency"`` (measured here). ``model.costs`` is in MACs in any case.
        logits: function from what the backbone returns to its ``(B, C)`` logits.
        num_classes: number of classes, if it is to be checked against the backbone's.
        select: for inputs whose dimension 0 is not the batch: the function that takes rows.
        cascade: every exit after the first also sees the logits of the one before it, without
            gradient ("Zero Time Waste", Wołczyk et al., 2021, section 3.1): through a linear layer
            beside its head, or as the head likes if its forward names ``previous_logits``. The
            backbone's own output stays as it is.

    Raises:
        DataError: the example has fewer than two samples, or logits of two classes or more are not
            found.
        PlaceError: the backbone is no module, or a place does not resolve.
        HeadError: a head does not fit its feature or the classes.
    """
    args, kwargs = as_call(example)
    kwargs.pop("labels", None)  # as in the model's forward, they are not the backbone's
    if select is None and batch_size(args, kwargs) < 2:
        raise DataError(
            "The example has a batch of 1. Expected at least 2 samples: with a single one the "
            "batch dimension cannot be told from the others. Pass two rows or more."
        )
    found = profile(backbone, args, kwargs, cost, logits=logits, batch_first=select is None)
    if num_classes is not None and num_classes != found.num_classes:
        raise HeadError(
            f"num_classes={num_classes} and the backbone's logits have {found.num_classes} "
            "classes. Leave num_classes out, or give the backbone a classifier of that width."
        )
    places = resolve(found, exits)
    wanted = _wanted_heads(exits, heads, places)
    calls = [found.calls_of(place.path)[place.call] for place in places]
    if select is None:
        args, kwargs = take_rows(args, kwargs, torch.arange(found.batch))
    with as_found(backbone), torch.inference_mode(False), torch.no_grad():
        named = named_inputs(backbone, args, kwargs)
        made: list[_Made] = []
        for head, call in zip(wanted, calls, strict=True):
            previous = made[-1].logits if cascade and made else None
            made.append(_make(head, call, found, named, previous))
    heads_cost = (*(head.macs for head in made), 0.0)
    costs = ExitCosts(_stage_costs(found, calls), heads_cost, by=cost, cascade=cascade)
    return MultiExitModel(
        backbone,
        Taps(backbone, places),
        [head.module for head in made],
        costs,
        map_stages(backbone, found, places),
        found.num_classes,
        logits=logits,
        select=select,
        cascade=cascade,
    )


def _wanted_heads(
    exits: Exits, heads: str | Sequence[HeadLike], places: Sequence[Place]
) -> list[HeadLike]:
    """One head for each place, in order of execution."""
    if isinstance(exits, Mapping):
        if heads != "auto":
            raise HeadError(
                "exits is a mapping from path to head and heads is given too. Give the heads once."
            )
        names = {place.name for place in places}
        given = {p if p in names else p.removesuffix("@0"): head for p, head in exits.items()}
        return [given[place.name] for place in places]
    if isinstance(heads, str):
        return [heads] * len(places)
    if not isinstance(heads, Sequence) or len(heads) != len(places):
        came = len(heads) if isinstance(heads, Sequence) else type(heads).__name__
        raise HeadError(
            f"heads: expected a name or one head for each of the {len(places)} exits, got {came}. "
            "The backbone's own output needs none."
        )
    return list(heads)


class _Made(NamedTuple):
    """A head, the logits (B, C) that it gave on trial, and its cost per sample in MACs."""

    module: nn.Module
    logits: Tensor
    macs: float


def _make(
    head: HeadLike,
    call: ModuleCall,
    found: CostProfile,
    named: Mapping[str, Tensor],
    previous: Tensor | None,
) -> _Made:
    """The head as a module, tried on a feature; in a cascade, on previous logits too."""
    if call.feature is None:
        raise PlaceError(f"The output of {found.name(call)!r} holds no tensor.")
    shape, dtype, device = call.feature.shape, call.feature.dtype, call.feature.device
    feature = torch.zeros(shape, dtype=dtype, device=device)
    layout = find_layout(found, call) if len(shape) in LAYOUTS else None
    if isinstance(head, PrototypeHead):
        head.layout = head.layout or layout
    if isinstance(head, str):
        budget = HEAD_SHARE * found.macs
        head = make_head(head, feature, found.num_classes, layout=layout, budget=budget)
    elif not isinstance(head, nn.Module):
        if not callable(head):
            raise HeadError(
                f"The head at {found.name(call)!r} is of type {type(head).__name__!r}. Expected a "
                "name, an nn.Module, or a function from the feature to (B, C) logits."
            )
        head = FunctionHead(head)
    place = found.name(call)
    if previous is None:
        return _try_head(head, feature, named, found, place)
    named = {**named, PREVIOUS: previous}
    logits = _try_head(head, feature, named, found, place).logits
    return _try_head(cascaded(head, logits), feature, named, found, place)


def _try_head(
    head: nn.Module, feature: Tensor, named: Mapping[str, Tensor], found: CostProfile, place: str
) -> _Made:
    """Run a head, compare what comes with (B, C), and count it."""
    flags = [(module, module.training) for module in head.modules()]
    head.eval()
    extra = wanted_inputs(head, feature, named)
    made: list[Any] = []
    try:
        macs = count_macs(lambda: made.append(head(feature, **extra)))
    except Exception as error:
        raise HeadError(
            f"The head at {place!r} ({type(head).__name__}) fails on its feature of shape "
            f"{tuple(feature.shape)} with {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, training in flags:
            module.training = training
    came = tuple(made[0].shape) if isinstance(made[0], Tensor) else type(made[0]).__name__
    if came != (found.batch, found.num_classes):
        raise HeadError(
            f"The head at {place!r} ({type(head).__name__}) turns a feature of shape "
            f"{tuple(feature.shape)} into {came}; expected {(found.batch, found.num_classes)}: "
            f"{found.batch} samples and the backbone's {found.num_classes} classes. (A head is "
            "given what its forward names of the backbone's inputs, such as 'attention_mask'.)"
        )
    return _Made(head, made[0], macs / found.batch)


def _stage_costs(found: CostProfile, calls: Sequence[ModuleCall]) -> tuple[float, ...]:
    """MACs per sample between consecutive exits; the last number leads to the output."""
    marks = [0.0, *(call.macs_after for call in calls), found.macs]
    return tuple(after - before for before, after in zip(marks[:-1], marks[1:], strict=True))
