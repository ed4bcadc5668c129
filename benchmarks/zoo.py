"""The named systems: BranchyNet's Table I, its heirs, early exits in text, recipes of papers.

    python benchmarks/zoo.py --data DIR --json benchmarks/results/zoo.json

Trains what is not yet trained (kept under ``--runs``; interrupted, it goes on), calibrates, tests
and times. The result is written after every system. ``--only SYSTEM`` does one anew and keeps the
others. ``--quick``: a sample, in under two minutes. One thread. The recipes train nothing: they
take what runs of ``learn.py`` there are under ``--learnt``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.learning.runs import Keep
from benchmarks.systems.branchynet import PAPER, SURER, Conditions, measure_branchynet, retimed
from benchmarks.systems.conditions import ImageConditions
from benchmarks.systems.heirs import HEIRS, measure_heir, train_heir
from benchmarks.systems.inception import measure_inception
from benchmarks.systems.recipes import measure_recipes
from benchmarks.systems.text import TextConditions, kept, measure_text
from benchmarks.traces import FASHION
from benchmarks.writing import processor, versions, write_result

HERE = Path(__file__).parent
PACKAGES = ("torch", "lightning", "numpy", "onnxruntime", "onnx", "transformers")
# The same for the plain network. B-ResNet-110 wants a device.
EPOCHS = {
    "b-lenet": 20,
    "b-alexnet": 30,
    "b-alexnet-distilled": 30,
    "b-resnet110": 24,
    "b-resnet110-distilled": 24,
    "inception-v1": 15,
    "text": 3,
    "sdn-vgg16": 8,
    "sdn-resnet56": 8,
    "sdn-mobilenet": 8,
    "msdnet": 5,
}
SYSTEMS = (*EPOCHS, "recipes")
DROP = {name: 0.015 for name in EPOCHS if name.startswith("b-resnet110")}

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--idx", type=Path, default=FASHION, help="folder of MNIST-like files")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "zoo")
    parser.add_argument("--learnt", type=Path, default=HERE.parent / "runs" / "learn")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "zoo.json")
    parser.add_argument("--only", action="append", choices=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--encoder", type=Path, help="folder of a BERT; else the package's")
    parser.add_argument("--epochs", type=int, help="instead of the benchmark's own")
    parser.add_argument("--train", action="store_true", help="train only; measure nothing")
    parser.add_argument(
        "--retime", action="store_true", help="only time BranchyNet's anew: weights are drawn"
    )
    parser.add_argument("--quick", action="store_true", help="a sample, in under two minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of the exporter, about operators of its own
    names = given.only or (["b-lenet"] if given.quick else list(SYSTEMS))
    rows = _before(given)
    for name in names:
        print(name, file=sys.stderr, flush=True)
        found = MEASURES.get(name, partial(_branchynet, name))(given)
        rows[name] = found | {"processor": processor()}
        if not given.train:
            _write(rows, given)
    print(json.dumps(summarise(rows), indent=1))


def _branchynet(name: str, given: argparse.Namespace) -> Row:
    wanted = Conditions(
        {"mnist": given.idx, "cifar10": given.data},
        _runs(given),
        epochs=_epochs(name, given),
        seconds=_seconds(given, 10.0),
        images=6400 if given.quick else None,
        drop=DROP.get(name, 0.0),
    )
    if given.retime:
        before = _before(given).get(name)
        if before is None:
            raise SystemExit(f"{given.json} has no {name} to time anew; leave out --retime")
        return retimed(name, wanted, before)
    return measure_branchynet(name, wanted)


def _text(given: argparse.Namespace) -> Row:
    wanted = TextConditions(
        given.data,
        given.encoder,
        _runs(given),
        epochs=_epochs("text", given),
        seconds=_seconds(given, 20.0),
        sentences=200 if given.quick else None,
    )
    before = _before(given).get("text", {})
    if before.get("epochs") == wanted.epochs and not (kept(wanted) / "layers1").exists():
        rows = [{"plain": before["plain"], **row} for row in before["truncated"]]
        wanted = replace(wanted, shorter=rows)
    return measure_text(wanted)


def _inception(given: argparse.Namespace) -> Row:
    return measure_inception(_images("inception-v1", given, 10.0))


def _heir(name: str, given: argparse.Namespace) -> Row:
    wanted = _images(name, given, 5.0)
    if given.train:
        return train_heir(name, wanted).how
    return measure_heir(name, wanted)


def _images(name: str, given: argparse.Namespace, seconds: float) -> ImageConditions:
    return ImageConditions(
        given.data,
        _runs(given),
        epochs=_epochs(name, given),
        seconds=_seconds(given, seconds),
        images=640 if given.quick else None,
    )


def _runs(given: argparse.Namespace) -> Path:
    return Path(given.runs / "quick" if given.quick else given.runs)


def _epochs(name: str, given: argparse.Namespace) -> int:
    return int(given.epochs or (1 if given.quick else EPOCHS[name]))


def _seconds(given: argparse.Namespace, most: float) -> float:
    return 0.0 if given.train else 0.5 if given.quick else most


def _recipes(given: argparse.Namespace) -> Row:
    return measure_recipes(Keep(given.data, given.learnt))


MEASURES = {
    "text": _text,
    "inception-v1": _inception,
    "recipes": _recipes,
    **{name: partial(_heir, name) for name in HEIRS},
}


def _before(given: argparse.Namespace) -> dict[str, Row]:
    if not given.json.exists():
        return {}
    before = json.loads(given.json.read_text("utf-8"))
    return dict(before["systems"]) if before["conditions"]["quick"] == given.quick else {}


def summarise(rows: dict[str, Row]) -> Row:
    """What is watched; of BranchyNet's systems, of one way to choose thresholds each."""
    found: Row = {}
    for name, short in (
        ("b-lenet", "blenet"),
        ("b-alexnet", "balexnet"),
        ("b-resnet110", "bresnet110"),
    ):
        ways = {row["way"]: row for row in rows.get(name, {}).get("policies", []) if row["found"]}
        # Not chosen by test samples: with a margin where there is such a policy, else of the
        # library's ways the cheapest on calibration samples.
        own = [row for way, row in ways.items() if way.startswith("calibrated")]
        cheapest = min(own, key=lambda r: r["calibration_cost"], default=None)
        row = ways.get("first exit") or ways.get(SURER) or cheapest
        if row is None:
            continue
        for size in (1, 64):
            found[f"{short}_speedup_b{size}"] = row[f"batch_{size}"]["speedup"]
        if short != "blenet":
            found[f"{short}_loss"] = -row["less_plain"]["points"]
    text = rows.get("text")
    if text is not None:
        best = next(row for row in text["timed"] if row["system"] == text["best"])
        chosen = next(row for row in text["systems"] if row["system"] == text["best"])["chosen"]
        for size in (1, 32):
            found[f"text_speedup_b{size}"] = best[f"batch_{size}"]["speedup"]
        found["text_loss"] = -chosen["less_plain"]["points"]
    return found


def _write(rows: dict[str, Row], given: argparse.Namespace) -> None:
    document = {
        "schema": 1,
        "benchmark": "zoo",
        "summary": summarise(rows),
        "conditions": {
            "quick": given.quick,
            "threads": 1,
            "python": platform.python_version(),
            "versions": versions(PACKAGES),
            "paper": {"branchynet": PAPER},
        },
        "systems": rows,
    }
    write_result(given.json, document)


if __name__ == "__main__":
    main()
