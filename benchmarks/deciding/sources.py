"""Traces to decide on: recorded ones, and synthetic ones whose risk has a known shape."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offramp.decide import Trace

__all__ = ["RECORDED", "SHAPES", "recorded", "two_exits"]

RECORDED = ("fashion_mnist", "cifar10_jpeg")
CSV = Path("traces") / "cifar10_two_exits.csv"
FIRST = 0.3  # of the full cost, up to the first exit of the CSV: the file does not say
ROWS = 40_000  # of a synthetic population: its mean loss is the true risk
CLASSES = 5


def two_exits(data: Path) -> Trace:
    """The trace of two exits, which has confidences and predictions in place of logits.

    The logits are ``ln c`` at the prediction and ``ln((1 - c) / 9)`` elsewhere: their softmax has
    the confidence at the prediction, and its largest value wherever that is above 0.1. What a
    criterion says that looks at more than the confidence is a function of it here.
    """
    path = data / CSV
    if not path.is_file():
        raise SystemExit(f"{path} is missing: give the folder that holds it as --data.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = torch.tensor([int(float(row["target"])) for row in rows])
    blocks = []
    for exit in (1, 2):
        said = torch.tensor([int(row[f"infered_class_branches_{exit}"]) for row in rows])
        sure = torch.tensor([float(row[f"conf_branch_{exit}"]) for row in rows]).double()
        sure = sure.clamp(1e-6, 1 - 1e-6)
        logits = ((1 - sure) / 9).log()[:, None].repeat(1, 10)
        blocks.append(logits.scatter(1, said[:, None], sure.log()[:, None]))
    stages = torch.tensor([FIRST, 1 - FIRST])
    return Trace(torch.stack(blocks), labels, stages, torch.zeros(2), source="CIFAR-10, two exits")


def recorded(name: str, folder: Path) -> Trace:
    """A trace of benchmarks/traces.py."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: python benchmarks/traces.py --data DIR --out {folder} makes it, "
            f"in about a quarter of an hour."
        )
    return Trace.load(path)


def _trace(logits: Tensor, labels: Tensor, name: str) -> Trace:
    exits = len(logits)
    heads = torch.full((exits,), 0.02)
    heads[-1] = 0
    return Trace(logits, labels, torch.ones(exits) / exits, heads, source=name)


def _noisy(strengths: tuple[float, ...], seed: int) -> tuple[Tensor, Tensor, np.random.Generator]:
    """Exits that see the answer through noise, the later the less of it; samples differ."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, ROWS)
    ease = random.random(ROWS)
    shared = random.normal(size=(ROWS, CLASSES))
    logits = []
    for strength in strengths:
        block = shared + random.normal(size=(ROWS, CLASSES))
        block[np.arange(ROWS), labels] += strength * (0.4 + ease)
        logits.append(2 * block)
    return torch.tensor(np.stack(logits)).float(), torch.from_numpy(labels), random


def monotone() -> Trace:
    """The lower the threshold, the more is lost."""
    logits, labels, _ = _noisy((2.0, 3.0, 4.0, 5.5), 1)
    return _trace(logits, labels, "monotone")


def not_monotone() -> Trace:
    """The most confident samples of the first exit are wrong; further down it wins answers back.

    2.5 % of the samples fool the first exit and not the later ones, so the risk rises at once to
    2.5 %; 6 %, which it finds easy but not as easy, are right there alone and wrong later on, so it
    falls below 0 again, before it rises for good.
    """
    logits, labels, random = _noisy((2.0, 3.0, 4.0, 5.5), 2)
    kind = random.random(ROWS)
    fooled = torch.from_numpy(np.flatnonzero(kind < 0.025))
    won = torch.from_numpy(np.flatnonzero((kind >= 0.025) & (kind < 0.085)))
    logits *= 0.5  # the others come after these
    other = (labels + 1) % CLASSES
    logits[0, fooled] = 0
    logits[0, fooled, other[fooled]] = (
        13.0 + 2 * torch.from_numpy(random.random(len(fooled))).float()
    )
    logits[1:, won] = 0
    logits[1:, won, other[won]] = 9.0
    logits[0, won] = 0
    logits[0, won, labels[won]] = 8.0 + 2 * torch.from_numpy(random.random(len(won))).float()
    return _trace(logits, labels, "not monotone")


def ties() -> Trace:
    """Logits of three values, so that scores have few levels and many samples share each."""
    logits, labels, _ = _noisy((2.0, 3.0, 4.0, 5.5), 3)
    return _trace((logits / 5).round().clamp(0, 2) * 2.5, labels, "heavy ties")


def near_perfect() -> Trace:
    """Every exit is right about nearly everything, the first about 1.5 % less than the last."""
    logits, labels, _ = _noisy((7.5, 8.5, 9.5, 11.0), 4)
    return _trace(logits, labels, "near-perfect")


SHAPES: dict[str, Callable[[], Trace]] = {
    "monotone": monotone,
    "not monotone": not_monotone,
    "heavy ties": ties,
    "near-perfect": near_perfect,
}
