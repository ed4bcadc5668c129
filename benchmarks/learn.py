"""Learning: what exits bring, by every scheme, on three networks.

    python benchmarks/learn.py --data DIR --json benchmarks/results/learn.json

Trains what is not yet trained, one run after the other, each kept under ``--runs`` with what its
exits say; a run that was interrupted goes on where it stopped. The result is written after every
run, so that it can be ended at any moment. Several processes share the runs among them
(``--only train`` for the second). ``--only SECTION`` does one section anew and keeps the others.
``--quick``: a sample, in under two minutes. One thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.learning import summary
from benchmarks.learning.energy import PICOJOULES, estimate, readable
from benchmarks.learning.frontiers import BUDGETS, TOLERANCE, figures, folds_of
from benchmarks.learning.places import compare_places
from benchmarks.learning.runs import PACKAGES, SGD_RATE, Keep, Run, model_of, train
from benchmarks.learning.settings import COMPARED, LEADING, PROMISING, SETTINGS
from benchmarks.learning.speed import measure_speed
from benchmarks.learning.steps import measure_memory, measure_steps
from benchmarks.learning.tasks import (
    BATCH,
    DEEP_LONG,
    DENSE,
    HELD_OUT,
    LONG,
    NARROW_LONG,
    PARTS,
    SHALLOW_LONG,
    TASKS,
    quick,
)
from benchmarks.traces import normalise
from benchmarks.writing import processor, versions, write_result

HERE = Path(__file__).parent
DENSE_SETTING = "joint_distill"
MEASURED_ON = ("processor", "python", "versions")
TIMED = {"steps", "memory"}  # rows of speed say themselves where

Rows = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "learn")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "learn.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=sorted(SECTIONS), metavar="SECTION")
    parser.add_argument(
        "--task", action="append", metavar="NAME", help="train these networks alone"
    )
    parser.add_argument(
        "--setting", action="append", choices=list(SETTINGS), help="train by these alone"
    )
    parser.add_argument("--quick", action="store_true", help="a sample, in under two minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of the exporter, about operators of its own
    if given.quick:
        given.runs = given.runs / "quick"
    keep = Keep(given.data, given.runs)
    for name in given.only or SECTIONS:
        SECTIONS[name](keep, given)
    print(json.dumps(json.loads(given.json.read_text("utf-8"))["summary"], indent=1))


# -- what is trained, and in which order -----------------------------------------------------------


def queue(seeds: int) -> Iterator[Run]:
    """All runs: at any moment, what is done is as even a table as can be."""
    fashion, cifar, deep = TASKS.values()
    for seed in range(seeds):
        for setting in SETTINGS.values():
            yield Run(fashion, setting, seed)
        for task in (cifar, deep)[: 2 if seed == 0 else 1]:
            for name in COMPARED:
                yield Run(task, SETTINGS[name], seed)
        if seed == 0:
            yield Run(DENSE, SETTINGS[DENSE_SETTING], seed)
            for name in PROMISING:
                yield Run(LONG, SETTINGS[name], seed)
            for task, name in product((SHALLOW_LONG, NARROW_LONG, DEEP_LONG), LEADING):
                yield Run(task, SETTINGS[name], seed)


def small() -> Iterator[Run]:
    """A sample of the runs."""
    for name in ("plain", "joint_distill", "heads"):
        yield Run(quick(TASKS["fashion_resnet20"]), SETTINGS[name], 0)


def _runs(given: argparse.Namespace) -> list[Run]:
    return list(small() if given.quick else queue(given.seeds))


def _wanted(given: argparse.Namespace) -> list[Run]:
    """Those that this process is to train."""
    return [
        run
        for run in _runs(given)
        if run.task.name in (given.task or [run.task.name])
        and run.setting.name in (given.setting or [run.setting.name])
    ]


def _train(keep: Keep, given: argparse.Namespace) -> None:
    """Train until nothing is left that this process can do."""
    left = _wanted(given)
    while left:
        before = len(left)
        for run in list(left):
            if run.done(keep):
                left.remove(run)
            elif train(run, keep):
                left.remove(run)
                _say(f"{run.task.name}, {run.setting.name}, seed {run.seed}")
                _write(keep, given, {})
        if len(left) == before:  # another process is at them
            break
    _write(keep, given, {})


def _steps(keep: Keep, given: argparse.Namespace) -> None:
    """Time and memory of training."""
    names = ["fashion_resnet20"] if given.quick else ["fashion_resnet20", "cifar_resnet56"]
    rounds, count = (2, 4) if given.quick else (4, 8)
    times, memory = [], []
    for name in names:
        times += measure_steps(TASKS[name], given.data, rounds, count)
        memory += measure_memory(TASKS[name], given.data)
        _say(f"steps: {name}")
        _write(keep, given, {"steps": times, "memory": memory})


def _places(keep: Keep, given: argparse.Namespace) -> None:
    """Where exits stand, and how many."""
    dense = Run(DENSE, SETTINGS[DENSE_SETTING], 0)
    if not given.quick and dense.done(keep):
        _write(keep, given, {"places": compare_places(folds_of(dense, keep))})


def _best(keep: Keep, given: argparse.Namespace) -> list[tuple[Run, Rows]]:
    """The best run of each network, the first seed of it, and its row."""
    rows, found = _merged(given, keep), []
    for task in {run.task.name: run.task for run in _runs(given)}.values():
        name = summary.best_setting(rows, task.name)
        if name is not None:
            row = next(r for r in rows if _key(r) == (task.name, name, 0))
            found.append((Run(task, SETTINGS[name], 0), row))
    return found


def _speed(keep: Keep, given: argparse.Namespace) -> None:
    """Measured time of the best beside its multiply-accumulates."""
    seconds = 2.0 if given.quick else 30.0
    measured, best = [], _best(keep, given)
    for run, row in best:
        if run.done(keep):
            measured.append(
                measure_speed(run, keep, row["rule"], seconds)
                | {"processor": processor(), "versions": versions(PACKAGES)}
            )
        else:
            _say(f"{run.task.name}: the best run, {run.setting.name}, is not kept here")
    anew = {(row["task"], row["processor"]) for row in measured}
    still = {(run.task.name, run.setting.name) for run, _ in best}  # the best, as they were before
    rows = measured + [
        row
        for row in _before(given).get("speed", [])
        if (row["task"], row["processor"]) not in anew and (row["task"], row["setting"]) in still
    ]
    order = [run.task.name for run in _runs(given)]
    _write(keep, given, {"speed": sorted(rows, key=lambda row: order.index(row["task"]))})


def _energy(keep: Keep, given: argparse.Namespace) -> None:
    """Energy of the best, estimated."""
    rows = []
    for run, row in _best(keep, given):
        model = model_of(run, keep, drawn=True)
        example = normalise(keep.images(run.task)["test_x"][:4])
        about = {"task": run.task.name, "setting": run.setting.name, "seed": run.seed}
        rows.append(about | estimate(model, example, row["operating"]))
    _write(keep, given, {"energy": {"rapl_readable": readable(), "estimates": rows}})


def _key(row: Rows) -> tuple[str, str, int]:
    return row["task"], row["setting"], row["seed"]


SECTIONS = {
    "train": _train,
    "steps": _steps,
    "places": _places,
    "speed": _speed,
    "energy": _energy,
}


# -- the result ------------------------------------------------------------------------------------


def _figures(keep: Keep, runs: list[Run]) -> list[Rows]:
    """A row for every run that is done, its figures computed once."""
    rows = []
    for run in runs:
        if not (run.done(keep) and run.plain.done(keep)):
            continue
        path = run.folder(keep) / "figures.json"
        if not path.is_file():
            found = figures(run, folds_of(run, keep), folds_of(run.plain, keep))
            write_result(path, found)
        machine = {"processor": processor(), "versions": versions(PACKAGES)}
        rows.append(machine | run.about(keep) | json.loads(path.read_text("utf-8")))
    return rows


def _write(keep: Keep, given: argparse.Namespace, found: Rows) -> None:
    """What is found, beside what the file has of other sections."""
    rows, conditions = _before(given), _conditions(given)
    if rows and not TIMED & found.keys():  # was timed where it was timed; runs have their own
        before = json.loads(given.json.read_text("utf-8"))
        conditions |= {name: before["conditions"][name] for name in MEASURED_ON}
    rows |= {"runs": _merged(given, keep)} | found
    write_result(
        given.json,
        {
            "schema": 1,
            "benchmark": "learn",
            "summary": summary.summarise(rows),
            "conditions": conditions,
            "rows": rows,
        },
    )


def _before(given: argparse.Namespace) -> Rows:
    """What the file has of the same kind of run."""
    if not given.json.exists():
        return {}
    before = json.loads(given.json.read_text("utf-8"))
    return dict(before["rows"]) if before["conditions"]["quick"] == given.quick else {}


def _conditions(given: argparse.Namespace) -> Rows:
    return {
        "quick": given.quick,
        "threads": 1,
        "processor": processor(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "batch": BATCH,
        "precision": "bfloat16 mixed where the machine multiplies it, else single precision",
        "optimizer": "AdamW, weight decay 0.05, cosine in each phase",
        "sgd": f"Nesterov momentum 0.9, weight decay 5e-4, learning rate {SGD_RATE}",
        "parts_of_a_pass": PARTS,
        "held_out": HELD_OUT,
        "tolerance": TOLERANCE,
        "picojoules": PICOJOULES,
        "budgets": list(BUDGETS),
        "tasks": {run.task.name: _task(run.task) for run in _runs(given)},
        "settings": {s.name: {"title": s.title, "source": s.source} for s in SETTINGS.values()},
    }


def _merged(given: argparse.Namespace, keep: Keep) -> list[Rows]:
    """Rows of the runs that are kept here, and those that the file has of others like them."""
    runs = _runs(given)
    rows = {_key(row): row for row in _figures(keep, runs)}
    if given.json.exists():
        before = json.loads(given.json.read_text("utf-8"))
        now = _conditions(given)
        for row in before["rows"].get("runs", []):
            key = _key(row)
            if key not in rows and _same(before["conditions"], now, key):
                own = ("processor", "versions", "precision")
                machine = {name: before["conditions"][name] for name in own}
                rows[key] = {**machine, **row}
    order = {(run.task.name, run.setting.name, run.seed): k for k, run in enumerate(runs)}
    return sorted(rows.values(), key=lambda row: order.get(_key(row), len(order)))


def _same(before: Rows, now: Rows, key: tuple[str, str, int]) -> bool:
    """Whether a run of the file was made as it would be made now."""
    task, setting, _ = key
    alike = ("quick", "batch", "optimizer", "sgd", "held_out", "budgets", "tolerance")
    return all(before[name] == now[name] for name in alike) and all(
        name in now[kind] and before[kind].get(name) == now[kind][name]
        for kind, name in (("tasks", task), ("settings", setting))
    )


def _task(task: Any) -> Rows:
    return {
        "network": task.network,
        "data": task.data,
        "passes": task.passes,
        "rate": task.rate,
        "exits": list(task.exits),
        "heads": task.heads,
        "begins": task.begins,
        "calibrated_on": task.calibrated_on,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
