"""What every module of a network costs: multiply-accumulates, parameters, or time measured here."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from offramp.build.batch import batch_size, take_rows
from offramp.build.flow import FlowRecorder
from offramp.build.layout import ChannelUse, channel_use
from offramp.build.outputs import LogitsFunction, find_logits, first_tensor
from offramp.errors import DataError, PlaceError, unknown_name

__all__ = ["MEASURES", "CostProfile", "ExitCosts", "ModuleCall", "as_found", "last_inside", "profile"]

MEASURES = {"macs": "MACs", "params": "parameters", "latency": "ms"}
_LATENCY_REPEATS = 7


@dataclass(frozen=True)
class ExitCosts:
    """What it costs to come to each exit, per sample.

    Attributes:
        stages: E numbers, the backbone between consecutive exits; they sum to the whole backbone.
        heads: E numbers, the head of each exit; the last is 0, the backbone being its own head.
        unit: always ``"MACs"``.
        by: the measure that chose the places: ``"macs"``, ``"params"``, ``"latency"``, ``"given"``.
    """

    stages: tuple[float, ...]
    heads: tuple[float, ...]
    unit: str = "MACs"
    by: str = "macs"

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
class ModuleCall:
    """One call of one module during the profiled pass; costs are per sample.

    Attributes:
        path: name of the module in the backbone; ``""`` is the backbone.
        index: which call of this module it is, from 0.
        kind: class name.
        depth: how many calls it stands inside.
        parent: position of the surrounding call in :attr:`CostProfile.calls`, -1 for the backbone.
        before: cost, in the profile's measure, spent when the call began.
        after: the same when it ended.
        macs_after: multiply-accumulates spent when it ended.
        began: number of operations done when the call began; ``ended``: when it ended.
        order: position in the order in which calls ended.
        shape: shape of the output (of its first tensor), ``None`` where there is no tensor.
        floating: whether that tensor is of a floating type.
        batched: whether its dimension 0 follows the batch.
        value: identity of that tensor's content; equal for calls that hand the same tensor on.
        needed: whether the backbone's logits depend on it.
        cut: whether nothing else that is costly is needed after it (see ``build/flow.py``).
        feeds_all: whether all later work depends on it.
        overwritten: whether a later operation writes into it.
        uses: how the module uses the channels of its input, for finding layouts.
    """

    path: str
    index: int
    kind: str
    depth: int
    parent: int
    before: float = 0.0
    after: float = 0.0
    macs_after: float = 0.0
    began: int = 0
    ended: int = 0
    order: int = 0
    shape: tuple[int, ...] | None = None
    floating: bool = False
    batched: bool = False
    value: int | None = None
    needed: bool = False
    cut: bool = False
    feeds_all: bool = False
    overwritten: bool = False
    uses: ChannelUse | None = None

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
    """

    calls: tuple[ModuleCall, ...]
    measure: str
    total: float
    macs: float
    batch: int
    num_classes: int
    paths: tuple[str, ...]
    parameter_use: Mapping[str, int] = field(default_factory=dict)

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
    """Run the backbone once and say what each of its modules costs, per sample.

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
        DataError: the example is not usable.
        PlaceError: an unknown measure.
    """
    if measure not in MEASURES:
        raise PlaceError(unknown_name("cost measure", measure, list(MEASURES)))
    kwargs = dict(kwargs or {})
    few, more = (args, kwargs), None
    if batch_first:
        size = batch_size(args, kwargs)
        few = take_rows(args, kwargs, torch.arange(min(2, size)))
        more = take_rows(args, kwargs, torch.arange(3 if size >= 3 else 1))
    with as_found(backbone):
        counted = _count(backbone, *few, logits=logits, batch_first=batch_first)
        if more is not None:
            counted = _mark_batched(counted, _shapes(backbone, *more))
        else:
            counted = replace(counted, calls=tuple(replace(c, batched=True) for c in counted.calls))
        if measure == "params":
            counted = _by_parameters(counted, backbone)
        elif measure == "latency":
            counted = _by_latency(counted, backbone, args, kwargs)
    return counted


@contextlib.contextmanager
def as_found(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random state restored afterwards."""
    flags = [(module, module.training) for module in backbone.modules()]
    devices = sorted({p.device for p in backbone.parameters() if p.device.type == "cuda"}, key=str)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # The fused path of nn.TransformerEncoder calls no submodule and hides its work.
    torch.backends.mha.set_fastpath_enabled(False)
    backbone.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in flags:
            module.training = training


class _Watch:
    """Hooks on every module that note when each call begins and ends."""

    def __init__(self, backbone: nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        self._open: list[int] = []
        self._times: dict[str, int] = {}
        self._ended = 0
        self._handles: list[Any] = []
        for path, module in backbone.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            before, after = self._hooks(path)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def began(self, call: dict[str, Any], module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        """What to note when a call begins."""

    def ended(self, call: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        """What to note when a call ends."""

    def _hooks(self, path: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
            call = {
                "path": path,
                "index": self._times.get(path, 0),
                "kind": type(module).__name__,
                "depth": len(self._open),
                "parent": self._open[-1] if self._open else -1,
            }
            self._times[path] = self._times.get(path, 0) + 1
            self._open.append(len(self.calls))
            self.calls.append(call)
            self.began(call, module, (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            call = self.calls[self._open.pop()]
            call["order"] = self._ended
            self._ended += 1
            self.ended(call, output)

        return before, after


class _CountingWatch(_Watch):
    def __init__(self, backbone: nn.Module, recorder: FlowRecorder) -> None:
        super().__init__(backbone)
        self.recorder = recorder
        self.values: list[set[int]] = []

    def began(self, call: dict[str, Any], module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        call["before"], call["began"] = self.recorder.flops, self.recorder.time
        args, kwargs = inputs
        tensor = first_tensor(args) if args else first_tensor(kwargs)
        if tensor is not None:
            call["uses"] = channel_use(module, tuple(tensor.shape), self.recorder.value_of(tensor))
        self.values.append(set())

    def ended(self, call: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        call["after"] = call["macs_after"] = self.recorder.flops
        call["ended"] = self.recorder.time
        tensor = first_tensor(output)
        if tensor is not None:
            call["shape"] = tuple(tensor.shape)
            call["floating"] = tensor.is_floating_point()
            call["value"] = self.recorder.value_of(tensor)
        position = next(i for i in range(len(self.calls) - 1, -1, -1) if self.calls[i] is call)
        self.values[position] = self.recorder.values_of(output)


class _ClockWatch(_Watch):
    def __init__(self, backbone: nn.Module, wait: Any) -> None:  # noqa: ANN401
        super().__init__(backbone)
        self.wait = wait

    def began(self, call: dict[str, Any], module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        self.wait()
        call["before"] = time.perf_counter()

    def ended(self, call: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        self.wait()
        call["after"] = time.perf_counter()


def _count(
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    logits: LogitsFunction | None,
    batch_first: bool,
) -> CostProfile:
    recorder = FlowRecorder(backbone.named_parameters())
    with _CountingWatch(backbone, recorder) as watch, recorder:
        output = backbone(*args, **kwargs)
        answer = find_logits(output, logits)
    rows = batch_size(args, kwargs) if batch_first else int(answer.shape[0])
    if answer.shape[0] != rows:
        raise DataError(
            f"The backbone's logits have shape {tuple(answer.shape)} for a batch of {rows} "
            "samples. Expected (B, C). If dimension 0 of the inputs is not the batch, pass "
            "select=, a function that takes rows; if the logits are elsewhere in the output, "
            "pass logits=, a function that finds them."
        )
    flow = recorder.flow(answer)
    calls = []
    for raw, values in zip(watch.calls, watch.values, strict=True):
        if "after" not in raw:
            continue
        for key in ("before", "after", "macs_after"):
            raw[key] = raw[key] / 2 / rows
        value, end = raw.get("value"), raw["ended"]
        if flow is not None and value is not None and flow.needed(value):
            raw.update(
                needed=True,
                cut=flow.is_cut(end, values),
                feeds_all=flow.all_later_work_needs(end, values),
                overwritten=flow.overwritten(value, end),
            )
        calls.append(ModuleCall(**raw))
    macs = recorder.flops / 2 / rows
    return CostProfile(
        calls=tuple(calls),
        measure="macs",
        total=macs,
        macs=macs,
        batch=rows,
        num_classes=int(answer.shape[1]),
        paths=tuple(path for path, _ in backbone.named_modules()),
        parameter_use=dict(recorder.first_use),
    )


def _shapes(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[tuple[str, int], int]:
    rows = batch_size(args, kwargs)
    sizes: dict[tuple[str, int], int] = {}

    class Shapes(_Watch):
        def ended(self, call: dict[str, Any], output: Any) -> None:  # noqa: ANN401
            tensor = first_tensor(output)
            if tensor is not None and tensor.dim() > 0 and tensor.shape[0] == rows:
                sizes[(call["path"], call["index"])] = rows

    with Shapes(backbone):
        backbone(*args, **kwargs)
    return sizes


def _mark_batched(found: CostProfile, follows: Mapping[tuple[str, int], int]) -> CostProfile:
    def batched(call: ModuleCall) -> bool:
        if not call.shape or call.shape[0] != found.batch:
            return False
        return (call.path, call.index) in follows

    return replace(found, calls=tuple(replace(c, batched=batched(c)) for c in found.calls))


def _by_parameters(found: CostProfile, backbone: nn.Module) -> CostProfile:
    """Each parameter counts at the first call of its owner, or of what surrounds the owner."""
    first = {}
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
    last = last_inside(found.calls)
    calls = tuple(
        replace(call, before=spent[i], after=spent[last[i] + 1])
        for i, call in enumerate(found.calls)
    )
    return replace(found, calls=calls, measure="params", total=spent[-1])


def last_inside(calls: tuple[ModuleCall, ...]) -> list[int]:
    """For each call, the position of the last call that began before it ended."""
    last = list(range(len(calls)))
    for position in range(len(calls) - 1, 0, -1):
        parent = calls[position].parent
        if parent >= 0:
            last[parent] = max(last[parent], last[position])
    return last


def _by_latency(
    found: CostProfile, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CostProfile:
    rows = max(1, batch_size(args, kwargs))
    on_accelerator = any(p.device.type not in ("cpu", "meta") for p in backbone.parameters())
    wait = torch.accelerator.synchronize if on_accelerator else (lambda: None)
    passes: list[list[dict[str, Any]]] = []
    with _ClockWatch(backbone, wait) as watch:
        for repeat in range(_LATENCY_REPEATS + 1):
            watch.calls.clear()
            watch._times.clear()
            backbone(*args, **kwargs)
            if repeat:  # the first pass warms up
                passes.append([dict(call) for call in watch.calls])
    scale = 1000.0 / rows
    # Medians of each instant over the passes keep the order of the instants.
    calls = tuple(
        replace(
            call,
            before=scale * statistics.median(p[i]["before"] - p[0]["before"] for p in passes),
            after=scale * statistics.median(p[i]["after"] - p[0]["before"] for p in passes),
        )
        for i, call in enumerate(found.calls)
    )
    return replace(found, calls=calls, measure="latency", total=calls[0].after)

