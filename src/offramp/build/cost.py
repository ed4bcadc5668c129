"""What every module of a network costs: multiply-accumulates, parameters, or time measured here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.build.batch import batch_size, take_rows
from offramp.build.flow import Flow, FlowRecorder
from offramp.build.layout import ChannelUse
from offramp.build.outputs import LogitsFunction, find_logits
from offramp.build.watch import ClockWatch, FlowWatch, Seen, Watch, as_found
from offramp.errors import DataError, PlaceError, unknown_name

__all__ = [
    "MEASURES",
    "CostProfile",
    "ExitCosts",
    "Feature",
    "ModuleCall",
    "check_backbone",
    "last_inside",
    "profile",
]

MEASURES = {"macs": "MACs", "params": "parameters", "latency": "ms"}
_LATENCY_REPEATS = 7


@dataclass(frozen=True)
class ExitCosts:
    """What it costs to come to each exit, per sample.

    Attributes:
        stages: E numbers, the backbone between consecutive exits; they sum to the whole backbone.
        heads: E numbers, the head of each exit; the last is 0, the backbone being its own head.
        unit: always ``"MACs"``.
        by: the measure that chose the places: ``"macs"``, ``"params"`` or ``"latency"``.
        cascade: whether each head reads the one before it, and so needs it to run.
    """

    stages: tuple[float, ...]
    heads: tuple[float, ...]
    unit: str = "MACs"
    by: str = "macs"
    cascade: bool = False

    @property
    def full(self) -> float:
        """Cost of the backbone alone, without any head."""
        return sum(self.stages)

    def cumulative(self) -> tuple[float, ...]:
        """E numbers: the cost of leaving at each exit when every head before it runs too."""
        total, out = 0.0, []
        for stage, head in zip(self.stages, self.heads, strict=True):
            total += stage + head
            out.append(total)
        return tuple(out)


@dataclass(frozen=True)
class Feature:
    """The tensor of a call's output that an exit there would take.

    Attributes:
        item: which of the tensors in the output it is.
        shape: with the rows of the profiled pass.
        dtype: its type.
        device: where it lies.
        value: identity of its content; equal for calls that hand the same tensor on.
        batched: whether its dimension 0 follows the batch.
        needed: whether the backbone's logits depend on it.
        overwritten: whether a later operation writes into it.
    """

    item: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: int | None
    batched: bool
    needed: bool
    overwritten: bool


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module during the profiled pass; costs are per sample.

    Attributes:
        path: name of the module in the backbone; ``""`` is the backbone.
        index: which call of this module it is, from 0.
        kind: class name.
        depth: how many calls it stands inside.
        parent: position of the surrounding call in :attr:`CostProfile.calls`, -1 for the backbone.
        order: position in the order in which calls ended.
        before: cost, in the profile's measure, spent when the call began.
        after: the same when it ended.
        macs_after: multiply-accumulates spent when it ended.
        began: number of operations done when the call began; ``ended``: when it ended.
        feature: what an exit would take here; ``None`` where the output holds no tensor.
        cut: whether nothing else that is costly is needed after it (see ``build/flow.py``).
        feeds_all: whether all later work depends on it.
        seen: the share of the work until here that it depends on.
        pending: the share of all work that is still to come from the inputs past it.
        uses: where the module has the channels of its input, for finding layouts.
        makes: the same of its output.
    """

    path: str
    index: int
    kind: str
    depth: int
    parent: int
    order: int
    before: float
    after: float
    macs_after: float
    began: int
    ended: int
    feature: Feature | None
    cut: bool
    feeds_all: bool
    seen: float = 1.0
    pending: float = 0.0
    uses: ChannelUse | None = None
    makes: ChannelUse | None = None

    @property
    def cost(self) -> float:
        """Cost of this call with all it contains, per sample."""
        return self.after - self.before


@dataclass(frozen=True)
class CostProfile:
    """Every module call of one pass, in the order in which they began.

    Attributes:
        calls: the calls; the first is the backbone itself.
        measure: ``"macs"``, ``"params"`` or ``"latency"``.
        total: cost of the whole backbone in that measure, per sample.
        macs: multiply-accumulates of the whole backbone, per sample.
        batch: rows of the pass.
        num_classes: width of the backbone's logits.
        paths: every module of the backbone, those that never ran too.
        parameter_use: for each parameter, the number of operations done before its first use.
        aliases: further names of modules that have several: name -> the one in ``paths``.
    """

    calls: tuple[ModuleCall, ...]
    measure: str
    total: float
    macs: float
    batch: int
    num_classes: int
    paths: tuple[str, ...]
    parameter_use: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Unit of the costs; time is in milliseconds per sample."""
        return MEASURES[self.measure]

    def calls_of(self, path: str) -> list[ModuleCall]:
        """All calls of one module, in order."""
        return [call for call in self.calls if call.path == path]

    def name(self, call: ModuleCall) -> str:
        """The address of a call: its path, with ``@k`` where the module is called several times."""
        several = sum(1 for other in self.calls if other.path == call.path) > 1
        return f"{call.path}@{call.index}" if several else call.path


def profile(
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    measure: str = "macs",
    *,
    logits: LogitsFunction | None = None,
    batch_first: bool = True,
) -> CostProfile:
    """Run the backbone and say what each of its modules costs, per sample.

    Multiply-accumulates are half the operations of ``torch.utils.flop_counter``, attention counted.
    Parameters count once, at the first call of the module that owns them. Latency is the median of
    several passes over the whole example, on the device where the backbone lies.

    The backbone is left as found: training flags, random state, statistics and hooks.

    Args:
        backbone: any network.
        args: positional inputs of an example batch.
        kwargs: keyword inputs of it.
        measure: ``"macs"``, ``"params"`` or ``"latency"``.
        logits: function from what the backbone returns to its ``(B, C)`` logits.
        batch_first: whether dimension 0 of the inputs is the batch. If so, two rows are enough to
            count, and a pass over another number of rows shows which outputs follow the batch.

    Raises:
        DataError: logits are not found, or not one row for each sample.
        PlaceError: no module that can be watched, an unknown measure, or a network without any
            multiply-accumulate.
    """
    if measure not in MEASURES:
        raise PlaceError(unknown_name("cost measure", measure, list(MEASURES)))
    check_backbone(backbone)
    kwargs = dict(kwargs or {})
    few, rows = (args, kwargs), None
    with as_found(backbone):
        follows = None
        if batch_first:
            # Three rows against two: what follows the batch cannot be mistaken.
            size, rows = batch_size(args, kwargs), 2
            few = take_rows(args, kwargs, torch.arange(2) % size)
            try:
                follows = _follow(backbone, *take_rows(args, kwargs, torch.arange(3) % size))
            except Exception as error:
                error.add_note(
                    "This came from calling the backbone with 3 rows of the example, taken along "
                    "dimension 0. If that is not the batch, pass select=, a function that takes "
                    "rows."
                )
                raise
        found = _count(backbone, *few, rows, follows, logits)
        if measure == "params":
            return _by_parameters(found, backbone)
        if measure == "latency":
            rows = batch_size(args, kwargs) if batch_first else found.batch
            return _by_latency(found, backbone, args, kwargs, rows)
    return found


def check_backbone(backbone: object) -> None:
    """Refuse what has no modules that can be watched.

    Raises:
        PlaceError: no ``nn.Module``, or TorchScript.
    """
    if not isinstance(backbone, nn.Module):
        raise PlaceError(
            f"The backbone is of type {type(backbone).__name__!r}. Expected an nn.Module, behind "
            "whose modules exits can stand. Give the network itself, not a function that calls it."
        )
    if isinstance(backbone, torch.jit.ScriptModule):
        raise PlaceError(
            "The backbone is TorchScript, whose modules cannot be watched. Give the nn.Module that "
            "it was made from."
        )


def _follow(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[tuple[str, int], list[bool]]:
    """For each call and each tensor of its output, whether dimension 0 is the number of rows."""
    rows = batch_size(args, kwargs)
    with Watch(backbone) as watch:
        backbone(*args, **kwargs)
    return {
        (call.path, call.index): [t.shape[:1] == (rows,) for t in call.tensors]
        for call in watch.calls
    }


def _count(
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int | None,
    follows: Mapping[tuple[str, int], Sequence[bool]] | None,
    logits: LogitsFunction | None,
) -> CostProfile:
    """One recorded pass. ``rows`` and ``follows`` are ``None`` where inputs are not batch-first."""
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    recorder = FlowRecorder(backbone.named_parameters(), given)
    with FlowWatch(backbone, recorder) as watch, recorder:
        output = backbone(*args, **kwargs)
        answer = find_logits(output, logits)
    rows = int(answer.shape[0]) if rows is None else rows
    if answer.shape[0] != rows:
        raise DataError(
            f"The backbone's logits have shape {tuple(answer.shape)} for a batch of {rows} "
            "samples. Expected (B, C). If dimension 0 of the inputs is not the batch, pass "
            "select=, a function that takes rows; if the logits are elsewhere in the output, "
            "pass logits=, a function that finds them."
        )
    macs = recorder.flops / 2 / rows
    if macs == 0:
        raise PlaceError(
            f"The backbone {type(backbone).__name__!r} does no multiply-accumulate that can be "
            "counted (convolution, matrix product, attention), so nothing can be saved."
        )
    flow = recorder.flow(answer)
    calls = tuple(
        _call(seen, flow, rows, None if follows is None else follows.get((seen.path, seen.index)))
        for seen in watch.calls
    )
    first = {id(module): path for path, module in backbone.named_modules()}
    named = backbone.named_modules(remove_duplicate=False)
    aliases = {path: first[id(module)] for path, module in named if path != first[id(module)]}
    return CostProfile(
        calls,
        "macs",
        macs,
        macs,
        rows,
        num_classes=int(answer.shape[1]),
        paths=tuple(first.values()),
        parameter_use=dict(recorder.first_use),
        aliases=aliases,
    )


def _call(seen: Seen, flow: Flow | None, rows: int, follows: Sequence[bool] | None) -> ModuleCall:
    features = [
        Feature(
            item,
            tensor.shape,
            tensor.dtype,
            tensor.device,
            tensor.value,
            batched=_is_batched(tensor.shape, item, rows, follows),
            needed=flow is not None and flow.needed(tensor.value),
            overwritten=flow is not None and flow.overwritten(tensor.value, seen.ended),
        )
        for item, tensor in enumerate(seen.tensors)
    ]
    fit = [f for f in features if f.batched and f.needed and f.dtype.is_floating_point]
    values = {f.value for f in features if f.value is not None}
    cut = feeds_all = False
    share, pending = 1.0, 0.0
    if flow is not None and any(f.needed for f in features):
        cut = flow.is_cut(seen.ended, values)
        feeds_all = flow.all_later_work_needs(seen.ended, values)
        if cut or feeds_all:
            share, pending = flow.seen(seen.ended, values), flow.pending(seen.ended, values)
    return ModuleCall(
        seen.path,
        seen.index,
        seen.kind,
        seen.depth,
        seen.parent,
        seen.order,
        before=seen.before / 2 / rows,
        after=seen.after / 2 / rows,
        macs_after=seen.after / 2 / rows,
        began=seen.began,
        ended=seen.ended,
        feature=next(iter(fit or features), None),
        cut=cut,
        feeds_all=feeds_all,
        seen=share,
        pending=pending,
        uses=seen.uses,
        makes=seen.makes,
    )


def _is_batched(
    shape: tuple[int, ...], item: int, rows: int, follows: Sequence[bool] | None
) -> bool:
    """Whether dimension 0 is the batch; taken for granted where the inputs are not batch-first."""
    if follows is None:
        return len(shape) > 0
    return shape[:1] == (rows,) and item < len(follows) and follows[item]


def _by_parameters(found: CostProfile, backbone: nn.Module) -> CostProfile:
    """Each parameter counts at the first call of its owner, or of what surrounds the owner."""
    first: dict[str, int] = {}
    for position, call in enumerate(found.calls):
        first.setdefault(call.path, position)
    added = [0.0] * len(found.calls)
    for name, parameter in backbone.named_parameters():
        owner = name.rpartition(".")[0]
        while owner not in first and owner:
            owner = owner.rpartition(".")[0]
        added[first.get(owner, 0)] += parameter.numel()
    spent = [0.0]
    for amount in added:
        spent.append(spent[-1] + amount)
    if not spent[-1]:
        raise PlaceError(
            f"The backbone {type(backbone).__name__!r} has no parameters, so that they cannot say "
            "where exits go. Use cost='macs'."
        )
    last = last_inside(found.calls)
    calls = tuple(
        replace(call, before=spent[i], after=spent[last[i] + 1])
        for i, call in enumerate(found.calls)
    )
    return replace(found, calls=calls, measure="params", total=spent[-1])


def last_inside(calls: Sequence[ModuleCall]) -> list[int]:
    """For each call, the position of the last call that began before it ended."""
    last = list(range(len(calls)))
    for position in range(len(calls) - 1, 0, -1):
        parent = calls[position].parent
        if parent >= 0:
            last[parent] = max(last[parent], last[position])
    return last


def _by_latency(
    found: CostProfile,
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int,
) -> CostProfile:
    passes: list[list[Seen]] = []
    with ClockWatch(backbone) as watch:
        for repeat in range(_LATENCY_REPEATS + 1):
            watch.restart()
            backbone(*args, **kwargs)
            if repeat:  # the first pass warms up
                passes.append(watch.calls)
    if any(len(seen) != len(found.calls) for seen in passes):
        raise PlaceError(
            "The backbone calls other modules for the whole example than for two rows of it, so "
            "its latency cannot be told by module. Use cost='macs'."
        )
    scale = 1000.0 / max(1, rows)
    # The median of each instant over the passes keeps the order of the instants.
    calls = tuple(
        replace(
            call,
            before=scale * statistics.median(p[i].before - p[0].before for p in passes),
            after=scale * statistics.median(p[i].after - p[0].before for p in passes),
        )
        for i, call in enumerate(found.calls)
    )
    return replace(found, calls=calls, measure="latency", total=calls[0].after)
