"""Deciding: thresholds at a budget, promises that hold, speed, and one decision everywhere.

    python benchmarks/decide.py --data DIR --json benchmarks/results/decide.json

``--data`` holds ``traces/cifar10_two_exits.csv``; ``--traces`` the two traces that
``benchmarks/traces.py`` records. Everything on one thread. Sections are written as they come;
``--only SECTION`` does one anew, ``--on NAME`` does so for one trace or population, ``--rule NAME``
for one rule, and the rest is kept. ``--quick``: a sample, in under two minutes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.deciding import budgets, promises
from benchmarks.deciding.equality import check_equality
from benchmarks.deciding.rules import RULES
from benchmarks.deciding.sources import FIRST, RECORDED, SHAPES, recorded, two_exits
from benchmarks.deciding.speed import measure
from benchmarks.writing import processor, versions, write_result
from offramp.decide import Trace

HERE = Path(__file__).parent
PACKAGES = ("torch", "numpy", "scipy", "onnxruntime", "onnx")
SIZES = (10_000, 100_000, 1_000_000)
DRAWS, SIZE = 2000, 1000  # calibration sets of each population, and samples in a synthetic one
HALVES = 50
QUICK: dict[str, Any] = {
    "halves": 2,
    "budgets": (0.3, 0.4, 0.6),
    "criteria": ("confidence",),
    "draws": 40,
    "epsilons": (0.02,),
    "populations": ("monotone", "not monotone", "cifar10_two_exits, halves"),
    "rules": ("confidence", "margin", "geometric ensemble, fitted", "gates"),
    "sizes": (10_000, 1_000_000),
    "equality": {"confidence", "patience", "geometric"},
}

NAMES = [*SHAPES, "cifar10_two_exits", *RECORDED]  # of populations and traces
TRACED = ("methods", "rules", "promises", "costs")  # rows of a trace or population

Traces = Callable[[], dict[str, Trace]]
Section = Callable[[Traces, set[str], bool], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--traces", type=Path, default=HERE.parent / "runs" / "traces")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "decide.json")
    parser.add_argument("--only", action="append", choices=sorted(SECTIONS), metavar="SECTION")
    parser.add_argument("--on", action="append", choices=NAMES, metavar="NAME")
    parser.add_argument("--rule", action="append", choices=list(RULES), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a sample, in under two minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of the exporter, about operators of its own
    names = given.only or list(SECTIONS)
    wanted = set(given.on or NAMES) | set(given.rule or RULES)
    for name in names:
        begin = time.perf_counter()
        found = SECTIONS[name](_traces(given.data, given.traces, wanted), wanted, given.quick)
        found["seconds"] = {name: round(time.perf_counter() - begin)}
        anew = not (given.only or given.on or given.rule) and name == names[0]
        _write(given.json, found, given.quick, anew=anew)
    print(json.dumps(json.loads(given.json.read_text("utf-8"))["summary"], indent=1))


def _traces(data: Path, folder: Path, wanted: set[str]) -> Traces:
    """What reads the traces that are wanted, once a section needs them."""

    def read() -> dict[str, Trace]:
        traces = {"cifar10_two_exits": two_exits(data)} if "cifar10_two_exits" in wanted else {}
        return traces | {name: recorded(name, folder) for name in RECORDED if name in wanted}

    return read


def _methods(traces: Traces, wanted: set[str], quick: bool) -> dict[str, Any]:
    if not quick:
        return {"methods": budgets.compare_methods(traces(), HALVES, _say)}
    sample = (QUICK["criteria"], QUICK["budgets"])
    return {"methods": budgets.compare_methods(traces(), QUICK["halves"], _say, *sample)}


def _rules(traces: Traces, wanted: set[str], quick: bool) -> dict[str, Any]:
    many = {name: trace for name, trace in traces().items() if trace.num_exits >= budgets.MANY}
    halves, every = (QUICK["halves"], QUICK["rules"]) if quick else (HALVES, RULES)
    names = [name for name in every if name in wanted]
    return {"rules": budgets.compare_rules(many, halves, _say, names)}


def _promises(traces: Traces, wanted: set[str], quick: bool) -> dict[str, Any]:
    populations = {
        name: promises.Population(make(), SIZE, again=True)
        for name, make in SHAPES.items()
        if name in wanted
    }
    for name, trace in traces().items():
        half = trace.num_samples // 2
        populations[f"{name}, halves"] = promises.Population(trace, half, again=False)
    if not quick:
        valid, costs = promises.check(populations, DRAWS, _say)
    else:
        populations = {k: v for k, v in populations.items() if k in QUICK["populations"]}
        valid, costs = promises.check(
            populations, QUICK["draws"], _say, epsilons=QUICK["epsilons"], paths=2
        )
    return {"promises": valid, "costs": costs}


def _speed(traces: Traces, wanted: set[str], quick: bool) -> dict[str, Any]:
    return {"speed": measure(QUICK["sizes"] if quick else SIZES, _say)}


def _equality(traces: Traces, wanted: set[str], quick: bool) -> dict[str, Any]:
    return {"equality": check_equality(_say, QUICK["equality"] if quick else None)}


SECTIONS: dict[str, Section] = {
    "speed": _speed,
    "equality": _equality,
    "methods": _methods,
    "promises": _promises,
    "rules": _rules,
}


def _summary(rows: dict[str, Any]) -> dict[str, Any]:
    """The flat figures of the sections that were run."""
    found: dict[str, Any] = {}
    if "methods" in rows:
        found |= budgets.summarise_methods(rows["methods"])
    if "rules" in rows:
        found |= budgets.summarise_rules(rows["rules"])
    if "promises" in rows:
        found |= promises.summarise(rows["promises"], rows["costs"])
    if "speed" in rows:
        few, many = rows["speed"][-2:]
        least, most = (row["samples"] * math.log(row["samples"]) for row in (few, many))
        found |= {
            "seconds_1e6x12": many["search_seconds"],
            "gigabytes_1e6x12": many["search_gigabytes"],
            "replay_seconds_1e6x12": many["replay_seconds"],
            "search_growth_over_n_log_n": (
                many["search_seconds"] / few["search_seconds"] / (most / least)
            ),
        }
    if "equality" in rows:
        found |= {
            "equality_criteria": len(rows["equality"]),
            "equality_rows_that_differ": sum(
                row["runner_differs"] + row["onnx_differs"] for row in rows["equality"]
            ),
        }
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(path: Path, found: dict[str, Any], quick: bool, *, anew: bool) -> None:
    """The sections that are found, beside what the file has of the others."""
    rows: dict[str, Any] = {"seconds": {}}
    if not anew and path.exists():
        rows = json.loads(path.read_text("utf-8"))["rows"]
    for name in set(TRACED) & set(found) & set(rows):
        found[name] = _merged(rows[name], found[name])
    rows |= found | {"seconds": rows.get("seconds", {}) | found["seconds"]}
    result = {
        "schema": 1,
        "benchmark": "decide",
        "summary": _summary(rows),
        "conditions": {
            "quick": quick,
            "threads": 1,
            "halves": QUICK["halves"] if quick else HALVES,
            "draws": QUICK["draws"] if quick else DRAWS,
            "calibration_samples_synthetic": SIZE,
            "two_exits_first_stage": FIRST,
            "violations_allowed": "the 99.9 % quantile of a binomial at the promised rate",
            "processor": processor(),
            "python": platform.python_version(),
            "versions": versions(PACKAGES),
        },
        "rows": rows,
    }
    write_result(path, result)


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, and the old ones of traces that are not done anew."""

    def about(row: dict[str, Any]) -> tuple[str, str | None]:
        return str(row.get("trace") or row["population"]).removesuffix(", halves"), row.get("rule")

    done = {about(row) for row in new}
    rows = [row for row in old if about(row) not in done] + new
    return sorted(rows, key=lambda row: NAMES.index(about(row)[0]))


if __name__ == "__main__":
    main()
