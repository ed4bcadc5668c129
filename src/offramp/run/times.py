"""What a stage takes here: measured when a runner is made, and what follows from it."""

from __future__ import annotations

import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.run.calls import Call
from offramp.run.chain import Link
from offramp.run.compaction import Compaction
from offramp.run.engines import Array, Engine, StepCall, engine_of
from offramp.run.selection import Selector, samples_of, take_samples

__all__ = ["Line", "StageTimes", "fastest", "rows_in_memory"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

MEMORY = Path("/proc/meminfo")
REPEATS = 3
PATIENCE_SECONDS = 1.0  # a larger batch that would take longer than this to time is not timed


@dataclass(frozen=True)
class Line:
    """Seconds as a line over the number of rows: ``fixed + rows * each``."""

    fixed: float
    each: float

    @classmethod
    def through(cls, few: int, seconds_few: float, many: int, seconds_many: float) -> Line:
        """The line through two measurements; neither part is negative."""
        if many == few:
            return cls(0.0, seconds_few / few)
        each = max(0.0, (seconds_many - seconds_few) / (many - few))
        return cls(max(0.0, seconds_few - few * each), each)

    def at(self, rows: int) -> float:
        """Seconds for that many rows."""
        return self.fixed + rows * self.each


@dataclass(frozen=True)
class StageTimes:
    """Seconds of every stage, and of compacting what is live after it, over the number of rows."""

    stages: tuple[Line, ...]
    takes: tuple[Line, ...]

    @classmethod
    def none(cls) -> StageTimes:
        """Nothing measured yet: compaction is taken to pay."""
        return cls((), ())

    def stage(self, position: int, rows: int) -> float:
        """Expected seconds of a stage for ``rows`` samples; 0 where nothing was measured."""
        return self.stages[position].at(rows) if self.stages else 0.0

    def compaction_pays(self, position: int, before: int, after: int) -> bool:
        """Whether taking ``after`` of ``before`` rows out costs less than the next stages save."""
        if not self.stages:
            return True
        saved = sum(line.each for line in self.stages[position + 1 :]) * (before - after)
        return saved > self.takes[position].at(after)

    @classmethod
    def measure(
        cls,
        engine: Engine,
        links: Sequence[Link],
        calls: Sequence[StepCall],
        call: Call,
        compact: Compaction,
        batch: int,
    ) -> StageTimes:
        """Time every stage on one row of the example, and on it repeated to ``batch`` rows.

        Where a selector takes samples out, the example is not repeated: ``batch`` ends there.
        """
        samples = samples_of(call.tensors, compact.selector)
        one, single = _run(engine, links, calls, call, compact, torch.zeros(1, dtype=torch.int64))
        many, several = batch if compact.selector is None else min(batch, samples), None
        while many > 1 and sum(one) * many * (REPEATS + 1) > PATIENCE_SECONDS:
            many //= 2
        if many > 1:
            several = _run(engine, links, calls, call, compact, torch.arange(many) % samples)
        if several is None:
            return cls(
                tuple(Line.through(1, t, 1, t) for t in one),
                tuple(Line.through(1, t, 1, t) for t in single),
            )
        return cls(
            tuple(Line.through(1, a, many, b) for a, b in zip(one, several[0], strict=True)),
            tuple(Line.through(1, a, many, b) for a, b in zip(single, several[1], strict=True)),
        )


def fastest(
    names: Sequence[str],
    load: Callable[[Engine], Sequence[StepCall]],
    links: Sequence[Link],
    call: Call,
    selector: Selector | None = None,
) -> tuple[Engine, Sequence[StepCall]]:
    """The engine that runs all steps in the least time on a batch like the example.

    An engine that is not installed, or cannot execute these steps, is passed over; what was
    measured is logged.

    Args:
        names: of the engines to try.
        load: makes the steps executable by an engine.
        links: the steps.
        call: the example.
        selector: takes samples out of inputs where dimension 0 is not the batch.

    Raises:
        OfframpError: no engine executes these steps.
    """
    found: list[tuple[float, Engine, Sequence[StepCall]]] = []
    batch = samples_of(call.tensors, selector)
    reason: OfframpError | None = None
    for name in names:
        try:
            engine = engine_of(name)
            engine.check(call.names, call.tensors)
            calls = load(engine)
            compact = Compaction(engine, links[0].inputs, selector)
            times = StageTimes.measure(engine, links, calls, call, compact, batch)
        except OfframpError as error:
            _log.info("engine %s passed over: %s", name, error)
            reason = error
            continue
        seconds = sum(line.at(batch) for line in times.stages)
        _log.info("engine %s: %.3f ms for a batch of %d", name, 1e3 * seconds, batch)
        found.append((seconds, engine, calls))
    if not found:
        raise OfframpError(f"None of the engines {', '.join(names)} runs this: {reason}")
    _, engine, calls = min(found, key=lambda one: one[0])
    _log.info("engine %s picked", engine.name)
    return engine, calls


def _run(
    engine: Engine,
    links: Sequence[Link],
    calls: Sequence[StepCall],
    call: Call,
    compact: Compaction,
    rows: Tensor,
) -> tuple[list[float], list[float]]:
    """Median seconds of each stage and of each compaction, for a batch of the samples ``rows``."""
    inputs = map(engine.array, take_samples(call.tensors, rows, compact.selector))
    values = dict(zip(compact.inputs, inputs, strict=True))
    stages, takes = [], []
    everyone = np.arange(len(rows))
    for link, step in zip(links, calls, strict=True):
        given = [values[name] for name in link.inputs]
        seconds, outputs = _median(partial(_finished, engine, step, given))
        stages.append(seconds)
        values.update(zip(link.outputs, outputs, strict=True))
        if not link.live:
            takes.append(0.0)
            continue
        seconds, _ = _median(partial(_taken, compact, link, values, everyone))
        takes.append(seconds)
    return stages, takes


def _finished(engine: Engine, call: StepCall, given: Sequence[Array]) -> list[Array]:
    """Call, and wait until a device has computed the values."""
    values = call(given)
    engine.wait(values[-1])
    return values


def _taken(
    compact: Compaction, link: Link, values: Mapping[str, Array], rows: np.ndarray
) -> list[Array]:
    taken = list(compact(link, values, rows).values())
    compact.engine.wait(taken[-1])
    return taken


def _median(run: Callable[[], T]) -> tuple[float, T]:
    values = run()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        values = run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), values


def rows_in_memory(row_bytes: float, device: torch.device) -> int:
    """How many rows fit into half of the memory that is free now, on that device."""
    try:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            # What torch holds for later use is free for it.
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        else:
            free = _available()
    except (ValueError, OSError, AttributeError):  # not every system tells
        free = 4 << 30
    return max(1, int(free / 2 / max(row_bytes, 1.0)))


def _available() -> int:
    """Bytes that can be had: on Linux also those of files, which are kept until others want them.

    Raises:
        ValueError, OSError, AttributeError: this system does not tell.
    """
    if MEMORY.is_file():
        found = re.search(r"^MemAvailable: +(\d+) kB$", MEMORY.read_text("ascii"), re.MULTILINE)
        if found is not None:
            return int(found[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
