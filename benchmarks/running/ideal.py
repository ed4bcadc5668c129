"""Against the ideal, and against the backbone alone.

The ideal is the sum of the stages' own times, each on exactly the rows that reach it, prepared
beforehand: nothing is scored, released, compacted or put together. The backbone alone runs on the
same engine; the early-exit network beside it computes all heads and scores, and nobody leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.running.bare import bare_call
from benchmarks.subjects import EXITS, MIXES, NEVER, Subject, on_host, policy_for
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.run.engines import Array, Engine
from offramp.run.runner import Runner
from offramp.run.times import StageTimes
from offramp.run.timing import compare

__all__ = ["BLOCK", "measure_compaction", "measure_ideal", "measure_overhead", "runner_of"]

BLOCK = 5  # calls in a row: alternating, each would find the other's weights in the caches

Row = dict[str, Any]


def runner_of(model: MultiExitModel, subject: Subject, engine: Engine) -> Runner:
    """The early-exit network; nobody leaves until other thresholds are given."""
    return Runner(model, Policy("confidence", [NEVER] * EXITS), subject.rows(4), engine=engine)


def measure_ideal(
    subject: Subject, runner: Runner, batches: Sequence[int], seconds: float
) -> list[Row]:
    """One row for each batch size and mix of exits."""
    found = []
    for batch in batches:
        x = subject.rows(batch)
        for mix, shares in MIXES.items():
            chosen = runner.under(policy_for(runner, x, shares))
            exits = on_host(chosen(x).exit)
            pieces = _stages(chosen, x)
            own = subject.arrays(x, runner.engine)
            times = compare(
                {
                    "runner": lambda chosen=chosen, own=own: chosen(own),
                    "ideal": lambda pieces=pieces: _one_after_another(runner.engine, pieces),
                },
                repeats=200,
                seconds=seconds,
                block=BLOCK,
            )
            entered = [int((exits >= k).sum()) for k in range(len(pieces))]
            found.append(
                {
                    "network": subject.name,
                    "engine": runner.engine.name,
                    "batch": batch,
                    "mix": mix,
                    "entered": entered,
                    "compacts": [
                        after == 0 or chosen.times.compaction_pays(k, before, after)
                        for k, (before, after) in enumerate(zip(entered, entered[1:], strict=False))
                        if after < before
                    ],
                    "runner_ms": times["runner"],
                    "ideal_ms": times["ideal"],
                    "ratio": times["runner"] / times["ideal"],
                }
            )
    return found


def _one_after_another(
    engine: Engine, pieces: Sequence[tuple[Callable[[Sequence[Array]], Any], list[Array]]]
) -> None:
    for call, given in pieces:
        outputs = call(given)
    engine.wait(outputs[-1])


def _stages(runner: Runner, x: Any) -> list[tuple[Callable[[Sequence[Array]], Any], list[Array]]]:
    """Each stage that somebody reaches, with the values of exactly those rows."""
    engine = runner.engine
    inputs = map(engine.array, runner.call.of(x).tensors)
    values = dict(zip(runner._inputs, inputs, strict=True))
    found = []
    for link, call in zip(runner._links, runner._calls, strict=True):
        given = [values[name] for name in link.inputs]
        found.append((call, given))
        values.update(zip(link.outputs, call(given), strict=True))
        score = engine.host(values["score"])
        stay = np.flatnonzero(~(score >= score.dtype.type(link.threshold)))
        if not len(stay):
            break
        values = runner._compact(link, values, stay)
    return found


def measure_overhead(
    subject: Subject,
    model: MultiExitModel,
    runner: Runner,
    batches: Sequence[int],
    seconds: float,
) -> list[Row]:
    """One row for each batch size: nobody leaves."""
    bare = bare_call(model, subject.rows(4), runner.engine)
    share = sum(model.costs.heads) / sum(model.costs.stages)
    found = []
    for batch in batches:
        x = subject.rows(batch)
        inputs = list(map(runner.engine.array, runner.call.of(x).tensors))
        own = subject.arrays(x, runner.engine)
        times = compare(
            {
                "runner": lambda own=own: runner(own),
                "bare": lambda inputs=inputs: runner.engine.wait(bare(inputs)[-1]),
            },
            repeats=200,
            seconds=seconds,
            block=BLOCK,
        )
        ratio = times["runner"] / times["bare"]
        found.append(
            {
                "network": subject.name,
                "engine": runner.engine.name,
                "batch": batch,
                "runner_ms": times["runner"],
                "bare_ms": times["bare"],
                "ratio": ratio,
                "heads_share_of_macs": share,
                "ratio_less_heads": ratio - share,
                "in_one_call": runner.in_one_call,
            }
        )
    return found


def measure_compaction(
    subject: Subject, runner: Runner, batches: Sequence[int], seconds: float
) -> list[Row]:
    """Where compacting is a loss: the runner as it is, and stage by stage as it decides by its
    measurement, always, and never."""
    always, never = StageTimes.none(), _Never((), ())
    found = []
    for batch in batches:
        x = subject.rows(batch)
        chosen = runner.under(policy_for(runner, x, MIXES["50/25/25"]))
        entered = [int((on_host(chosen(x).exit) >= k).sum()) for k in range(EXITS + 1)]
        own = subject.arrays(x, chosen.engine)
        candidates = {"runner": lambda chosen=chosen, own=own: chosen(own)}
        for name, times in (("measured", chosen.times), ("always", always), ("never", never)):
            other = chosen.under(chosen.policy)
            other.times, other.in_one_call = times, False
            candidates[name] = lambda other=other, own=own: other(own)
        times = compare(candidates, repeats=400, seconds=seconds, block=BLOCK)
        found.append(
            {
                "network": subject.name,
                "engine": runner.engine.name,
                "batch": batch,
                "entered": entered,
                "in_one_call": chosen.in_one_call,
                "compacts": [
                    chosen.times.compaction_pays(k, entered[k], entered[k + 1])
                    for k in range(EXITS)
                ],
                **{f"{name}_ms": value for name, value in times.items()},
            }
        )
    return found


class _Never(StageTimes):
    def compaction_pays(self, position: int, before: int, after: int) -> bool:
        return False
