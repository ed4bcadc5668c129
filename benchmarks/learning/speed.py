"""Whether the time goes down as the multiply-accumulates do: ONNX Runtime, one thread."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.learning.frontiers import as_good_as, folds_of, fronts_of
from benchmarks.learning.runs import Keep, Run, model_of
from benchmarks.running.bare import bare_call
from benchmarks.traces import normalise
from offramp.decide import Trace, replay
from offramp.run.engines import OnnxRuntime
from offramp.run.runner import Runner
from offramp.run.timing import compare

__all__ = ["measure_speed"]

BATCH = 64
BATCHES = 8

Row = dict[str, Any]


def measure_speed(run: Run, keep: Keep, rule: str, seconds: float) -> Row:
    """The plain network beside the runner at its operating point, in turn, on test images.

    Args:
        run: one that is done.
        keep: where it is kept.
        rule: by which its samples leave.
        seconds: of measuring.
    """
    folds, (plain, _) = folds_of(run, keep)[:1], folds_of(run.plain, keep)[0]
    policy = as_good_as(plain, fronts_of(folds, run.setting.rules[rule])[0])
    model, data = model_of(run, keep).eval(), keep.images(run.task)
    test: Trace = run.trace(keep, "test").subset(torch.arange(BATCH * BATCHES))
    images = normalise(data["test_x"][: BATCH * BATCHES])
    parts = list(images.split(BATCH))
    runner = Runner(model, policy, images[:4], engine=OnnxRuntime(threads=1))
    bare = bare_call(model, images[:4], OnnxRuntime(threads=1))
    arrays = [part.numpy() for part in parts]
    took = compare(
        {
            "plain": lambda: [bare([array]) for array in arrays],
            "exits": lambda: [runner(part) for part in parts],
        },
        repeats=1000,
        seconds=seconds,
    )
    decided = replay(test, policy)
    same = torch.cat([torch.as_tensor(runner(part).exit) for part in parts]) == decided.exit
    cost = float(decided.cost.mean()) / test.full_cost
    faster = took["plain"] / took["exits"]
    return {
        "task": run.task.name,
        "setting": run.setting.name,
        "seed": run.seed,
        "rule": rule,
        "batch": BATCH,
        "images": len(images),
        "plain_ms": took["plain"] / BATCHES,
        "exits_ms": took["exits"] / BATCHES,
        "cost": cost,
        "faster": faster,
        "by_macs": 1 / cost,
        "measured_over_macs": faster * cost,
        "same_exit_as_replay": float(same.double().mean()),
    }
