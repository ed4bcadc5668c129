"""One architecture through the whole path: attach, cut, run, export, and compare at each step.

Answers are compared with an oracle that shares nothing with the runtime: the eager multi-exit
model on each sample alone, and a loop over its exits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import offramp
from benchmarks.architectures.entry import CLASSES, ROWS, Architecture
from benchmarks.architectures.weights import redraw, sharpen
from benchmarks.vision_packages import prepare
from offramp.build.model import MultiExitModel
from offramp.build.outputs import find_logits
from offramp.run.chain import Step, chain
from offramp.run.difference import distance
from offramp.run.engines import OnnxRuntime, engine_of
from offramp.run.evaluating import evaluating
from offramp.run.graph import cut
from offramp.run.onnx import convert
from offramp.run.onnx_rule import connect, join
from offramp.run.proof import TOLERANCE, prove
from offramp.run.runner import Runner
from offramp.run.stages import StagedModel
from offramp.run.whole import Whole

__all__ = ["BATCH", "Row", "onnx_rows", "take_through", "warm_up"]

EXITS = 3
BATCH = 5  # rows that are compared; the other samples are the example for attach and cut
APART = 1e-3  # samples whose logits are nearer than this (relative) are as good as the same
CLOSE = 10.0  # a score within this many tolerances of its threshold may go either way


@dataclass
class Row:
    """What became of one architecture.

    Attributes:
        name, source, kind: as in the list.
        placed: the exits were placed and the heads made.
        staged: the model was exported and cut, and the library's own proof holds.
        equal: with no exit taken, all exits' logits have the bits of the whole network.
        per_sample: at batch 5 each sample gets what it gets alone, exits mixed.
        onnx: the flat ONNX file answers as the network does, none, all and some leaving; and so
            does a runner's one call of all stages.
        seconds: wall time of attach and cut.
        cpu_seconds: and the processor's time, which other programs do not stretch.
        memory_mb: peak memory of attach and cut beyond what was there, where it can be told.
        largest_difference: of per-sample logits, relative; and of the file's.
        exits: which exits the compared rows took.
        places: where the exits stand.
        reason: why the first thing that is false is false.
    """

    name: str
    source: str
    kind: str
    placed: bool = False
    staged: bool = False
    equal: bool = False
    per_sample: bool = False
    onnx: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_mb: float | None = None
    parameters: int = 0
    places: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    largest_difference: float | None = None
    largest_difference_onnx: float | None = None
    seconds_onnx: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class _Unequal(Exception):
    """A comparison failed."""


def take_through(architecture: Architecture, *, onnx: bool = True, seed: int = 0) -> Row:
    """Take one architecture through the whole path; what fails is in the row, never raised."""
    prepare()
    row = Row(architecture.name, architecture.source, architecture.kind)
    try:
        _passage(architecture, row, onnx, seed)
    except Exception as error:  # whatever a network does is an entry in the table
        text = " ".join(str(error).split())
        label = "" if isinstance(error, _Unequal) else f"{type(error).__name__}: "
        row.reason = f"{label}{text}"[:500]
    return row


def _passage(architecture: Architecture, row: Row, onnx: bool, seed: int) -> None:
    torch.manual_seed(seed)
    backbone, samples = architecture.build()
    redraw(backbone, lambda: _call(backbone, samples))
    row.parameters = sum(p.numel() for p in backbone.parameters())
    select = architecture.attach.get("select")
    example = _rows(samples, torch.arange(BATCH, ROWS), select)
    batch = _rows(samples, torch.arange(BATCH), select)
    measured = _Measured()
    model = offramp.attach(backbone, example, exits=EXITS, **architecture.attach)
    measured.pause()
    row.placed, row.places = True, list(model.places)
    redraw(model.heads, lambda: _call(model.eval(), example))
    sharpen(model, CLASSES, lambda: _call(model, example))
    alone = _alone(model, batch, select)
    policy = offramp.Policy("confidence", _mixed(alone))
    measured.resume()
    staged = cut(model, example)
    row.seconds, row.cpu_seconds, row.memory_mb = measured.stop()
    steps = chain(staged, policy, model.num_exits)
    row.staged = True
    runner = _runner(model, policy, staged, steps)
    _check_whole(runner, model, batch)
    row.equal = True
    wanted = _decide(alone, policy.thresholds_for(model.num_exits))
    row.exits = wanted.exit.tolist()
    row.largest_difference = _check_per_sample(runner, batch, wanted, select)
    row.per_sample = True
    prove(runner, model, staged)
    if onnx:
        begin = time.perf_counter()
        row.largest_difference_onnx = _check_file(steps, staged, batch, alone, wanted.thresholds)
        row.seconds_onnx = round(time.perf_counter() - begin, 2)
        row.onnx = True


def warm_up(architecture: Architecture) -> None:
    """Let torch and its exporters import and build what they do at first use; start no threads."""
    torch.manual_seed(0)
    backbone, samples = architecture.build()
    example = _rows(samples, torch.arange(BATCH, ROWS), None)
    model = offramp.attach(backbone, example, exits=EXITS)
    staged = cut(model, example)
    steps = chain(staged, offramp.Policy("confidence", [0.5] * EXITS), model.num_exits)
    connect(convert(steps), steps, staged.call.names)


# -- samples ---------------------------------------------------------------------------------------


def _rows(samples: Any, rows: Tensor, select: Callable[..., Any] | None) -> Any:
    if select is not None:
        return select(rows, **samples)
    return pytree.tree_map(lambda value: value[rows], samples)


def _call(model: Callable[..., Any], batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def _alone(model: MultiExitModel, batch: Any, select: Callable[..., Any] | None) -> Tensor:
    """Logits of every exit (E, B, C) by the eager model, for each sample by itself.

    Raises:
        _Unequal: the samples are alike, or not finite, so that a comparison would say nothing.
    """
    model.eval()
    with torch.no_grad():
        found = [
            _call(model, _rows(batch, torch.tensor([i]), select)).stack() for i in range(BATCH)
        ]
    logits = torch.cat(found, 1).float()
    if not torch.isfinite(logits).all():
        raise _Unequal("The network overflows with these random weights.")
    for exit, own in enumerate(logits):
        spread = min(distance(own[i], own[j]) for i in range(BATCH) for j in range(i))
        if spread < APART:
            raise _Unequal(
                f"Two samples have the same logits within {spread:.1g} at exit {exit}, so that "
                "equality would say nothing."
            )
    return logits


# -- decisions: the oracle -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decided:
    """What each sample gets: logits (B, C), exit (B,), whether a score was too close to call."""

    thresholds: tuple[float, ...]
    logits: Tensor
    exit: Tensor
    close: Tensor


def _mixed(logits: Tensor) -> list[float]:
    """Thresholds halfway between scores, so that of five rows two, one, one and one leave."""
    left = list(range(logits.shape[1]))
    thresholds = []
    for own, leaving in zip(logits[:-1], (2, 1, 1), strict=True):
        score = own.softmax(-1).max(-1).values
        order = sorted(left, key=lambda i, score=score: -float(score[i]))
        thresholds.append(float((score[order[leaving - 1]] + score[order[leaving]]) / 2))
        left = order[leaving:]
    return thresholds


def _decide(logits: Tensor, thresholds: tuple[float, ...]) -> _Decided:
    exits, close, taken = [], [], []
    for i in range(logits.shape[1]):
        near = False
        for exit, own in enumerate(logits[:, i]):
            last = exit == len(logits) - 1
            score = float(own.softmax(-1).max())
            if not last and math.isfinite(thresholds[exit]):
                near |= abs(score - thresholds[exit]) <= CLOSE * TOLERANCE[True]
            if last or score >= thresholds[exit]:
                break
        exits.append(exit)
        taken.append(own)
        close.append(near)
    return _Decided(thresholds, torch.stack(taken), torch.tensor(exits), torch.tensor(close))


def _compare(
    what: str, got: tuple[Any, Any, Any], wanted: _Decided, rows: Any, limit: float
) -> float:
    """The largest relative difference of the logits.

    Raises:
        _Unequal: another exit, another class, or logits further away than ``limit``.
    """
    logits, prediction, exit = (torch.as_tensor(value) for value in got)
    clear = ~wanted.close[rows]
    if (exit != wanted.exit[rows])[clear].any():
        raise _Unequal(f"{what}: exits {exit.tolist()}, expected {wanted.exit[rows].tolist()}.")
    if not clear.any():
        return 0.0
    far = distance(logits[clear], wanted.logits[rows][clear])
    if not far <= limit:
        raise _Unequal(f"{what}: logits differ by {far:.2g} (relative).")
    if (prediction != wanted.logits[rows].argmax(-1))[clear].any():
        top = wanted.logits[rows][clear].topk(2).values
        if (top[:, 0] - top[:, 1]).min() > limit:
            raise _Unequal(f"{what}: other classes.")
    return far


# -- the runtime -----------------------------------------------------------------------------------


def _runner(
    model: MultiExitModel, policy: offramp.Policy, staged: StagedModel, steps: list[Step]
) -> Runner:
    """What ``Runner(model, policy, example)`` makes, of stages that were cut already."""
    engine = engine_of("torch")
    calls = engine.load(steps)
    links = [step.link for step in steps]
    return Runner.of_links(
        engine,
        links,
        calls,
        policy,
        model.costs,
        model.places,
        staged.call,
        staged.row_bytes,
        staged.selector,
    )


def _check_whole(runner: Runner, model: MultiExitModel, batch: Any) -> None:
    with evaluating(model), torch.no_grad():  # without fused kernels that cannot be exported
        wanted = _call(model, batch)
        final = find_logits(_call(model.backbone, batch))
    with torch.no_grad():
        fused = find_logits(_call(model.backbone, batch))
    got = _call(runner.all_exits, batch)
    for exit, (own, other) in enumerate(zip(got, wanted, strict=True)):
        if not torch.equal(own, other):
            far = distance(own, other)
            raise _Unequal(f"No exit taken: exit {exit} differs by {far:.2g} (relative).")
    if not torch.equal(got.final, final):
        raise _Unequal("No exit taken: the last exit is not the backbone's own output.")
    if not distance(got.final, fused) <= TOLERANCE[True]:
        raise _Unequal("No exit taken: the backbone's fused kernels give another output.")


def _check_per_sample(
    runner: Runner, batch: Any, wanted: _Decided, select: Callable[..., Any] | None
) -> float:
    runner.times = type(runner.times).none()  # compact at every exit, whether it pays or not
    limit = TOLERANCE[True]
    result = _call(runner, batch)
    got = (result.logits, result.prediction, result.exit)
    far = _compare("A batch of 5", got, wanted, slice(None), limit)
    for i in range(BATCH):
        single = _call(runner, _rows(batch, torch.tensor([i]), select))
        got = (single.logits, single.prediction, single.exit)
        far = max(far, _compare(f"Row {i} alone", got, wanted, slice(i, i + 1), limit))
    return far


# -- the file --------------------------------------------------------------------------------------


def onnx_rows() -> int:
    """How many rows of a file are compared: three mixes, at batch 5 and at batch 1."""
    return 3 * 2 * BATCH


def _check_file(
    steps: list[Step],
    staged: StagedModel,
    batch: Any,
    alone: Tensor,
    thresholds: tuple[float, ...],
    keep: Path | None = None,
) -> float:
    import onnxruntime

    names = staged.call.names
    model = convert(steps)
    file = connect(model, steps, names).SerializeToString()
    engine, links = OnnxRuntime(threads=1), [step.link for step in steps]
    one = engine.session(join(model, links, staged.call.finite).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    call = type(staged.call).of(batch)
    arrays = dict(zip(names, (value.numpy() for value in call.tensors), strict=True))
    count = len(thresholds)
    mixes = {
        "none leave": (math.inf,) * count,
        "all leave": (-math.inf,) * count,
        "mixed": thresholds,
    }
    far = 0.0
    for mix, given in mixes.items():
        wanted = _decide(alone, given)
        for rows in (slice(0, BATCH), *(slice(i, i + 1) for i in range(BATCH))):
            feed = {name: value[rows] for name, value in arrays.items()}
            feed["thresholds"] = np.array(given, np.float32)
            logits, prediction, exit, _ = session.run(None, feed)
            what = f"The file, {mix}, a batch of {len(logits)}"
            got = (logits, prediction, exit)
            far = max(far, _compare(what, got, wanted, rows, TOLERANCE[False]))
            limited = [replace(k, threshold=t) for k, t in zip(links[:-1], given, strict=True)]
            own = [link.threshold for link in links[:-1]]
            whole = Whole(engine, one, [*limited, links[-1]], own)
            said = whole([value[rows] for value in arrays.values()]).result(logits)
            got = (said.logits, said.prediction, said.exit)
            what = f"In one call, {mix}, a batch of {len(logits)}"
            far = max(far, _compare(what, got, wanted, rows, TOLERANCE[False]))
    return far


# -- time and memory -------------------------------------------------------------------------------


class _Measured:
    """Wall time, and the peak of memory where the system tells it (Linux)."""

    def __init__(self) -> None:
        self.spent = self.cpu = 0.0
        self.peak = 0.0
        self.resume()

    def resume(self) -> None:
        """Begin, or go on."""
        self.before = _resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        except OSError:
            self.before = math.nan
        self.begin = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        """What follows does not count."""
        self.spent += time.perf_counter() - self.begin[0]
        self.cpu += time.process_time() - self.begin[1]
        self.peak = max(self.peak, _resident("VmHWM") - self.before)

    def stop(self) -> tuple[float, float, float | None]:
        """Seconds of wall and of processor, and MB or ``None``."""
        self.pause()
        memory = None if math.isnan(self.peak) else round(self.peak, 1)
        return round(self.spent, 3), round(self.cpu, 3), memory


def _resident(key: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(float(x.split()[1]) / 1024 for x in lines if x.startswith(key))
    except (OSError, StopIteration):
        return math.nan
