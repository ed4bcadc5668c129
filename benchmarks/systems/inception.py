"""Inception V1 with and without its auxiliary classifiers: what they are for, and what else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import offramp
from benchmarks.learning.frontiers import BUDGETS, curve, fronts_of
from benchmarks.learning.gradients import Norms, read_norms
from benchmarks.systems.branchynet import fewer, judged, timed, trace_of, trained
from benchmarks.systems.conditions import ImageConditions
from benchmarks.systems.judging import paired, right_of, share
from offramp.build.model import MultiExitModel
from offramp.decide import Criterion, Trace, criterion
from offramp.errors import Infeasible
from offramp.train.schemes import as_plan
from offramp.zoo.images import open_images
from offramp.zoo.recipe import Recipe
from offramp.zoo.running import plain_phases
from offramp.zoo.systems import system

__all__ = ["measure_inception"]

Row = dict[str, Any]
SHOWN = (0.5, 0.75, 0.9, 1.0)  # shares of the plain network's cost


def measure_inception(given: ImageConditions) -> Row:
    """Trained twice with the same budget; accuracy, gradients, and the classifiers as exits."""
    recipe = system("inception-v1")
    images = fewer(open_images(recipe.data, given.data, seed=given.seed), given.images)
    kept = given.runs / recipe.name / f"epochs{given.epochs}" / f"seed{given.seed}"
    found: dict[str, MultiExitModel] = {}
    how, norms = {}, {}
    for name in ("auxiliary", "plain"):
        out = kept / name
        out.mkdir(parents=True, exist_ok=True)
        steps = len(images.train[0]) // recipe.batch
        watched = _Watched(recipe, out / "gradients.jsonl", steps)
        phases = plain_phases(3, given.epochs)
        if name == "auxiliary":
            phases = list(as_plan(recipe.scheme, 3, given.epochs))
        found[name], how[name] = trained(watched.recipe(), images, out, phases, given.seed)
        norms[name] = read_norms(watched.path, given.epochs * steps)
    calibration, test = (trace_of(found["auxiliary"], images, p) for p in ("calibration", "test"))
    full = trace_of(found["plain"], images, "test")
    before = trace_of(found["plain"], images, "calibration")
    right = right_of(full)
    wanted = float(right_of(before).double().mean())
    front = fronts_of([(calibration, test)], _confidence)
    measured = curve([(calibration, test)], front)["accuracy"]
    try:
        policy = offramp.calibrate(calibration, "confidence", min_accuracy=wanted)
    except Infeasible:
        policy = None
    chosen = None
    if policy is not None:
        chosen = judged(test, policy, right)
        chosen |= timed(found["auxiliary"], found["plain"], policy, images, given.seconds)
    return {
        "system": recipe.name,
        "data": "Tiny-ImageNet, 20 classes, 64×64",
        "epochs": given.epochs,
        "seed": given.seed,
        "training_images": len(images.train[0]),
        "trained": how,
        "places": list(found["auxiliary"].places),
        "stage_macs": list(found["auxiliary"].costs.stages),
        "head_macs": list(found["auxiliary"].costs.heads),
        "samples": test.num_samples,
        "plain": share(right),
        "exits": [share(test.logits[k].argmax(1) == test.labels) for k in range(test.num_exits)],
        "last_less_plain": paired(right_of(test), right),
        "gradient_norms": norms,
        "accuracy_at": {str(b): measured[BUDGETS.index(b)] for b in SHOWN},
        "chosen": chosen,
    }


def _confidence(trace: Trace) -> Criterion:
    del trace
    return criterion("confidence")


class _Steps:
    """How many steps were taken; an interrupted training goes on where its last epoch began.

    Args:
        path: where norms were noted before.
        epoch: steps of an epoch.
    """

    def __init__(self, path: Path, epoch: int) -> None:
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        last = json.loads(lines[-1])["step"] if lines else 0
        self.step = last // epoch * epoch


class _Noting(Norms):
    def note(self) -> None:
        super().note()
        self.loader.step += 1


class _Watched:
    """A recipe whose optimiser notes the gradients of the network that it makes."""

    def __init__(self, recipe: Recipe, path: Path, epoch: int) -> None:
        self.plain, self.path, self.epoch = recipe, path, epoch
        self.model: MultiExitModel | None = None

    def recipe(self) -> Recipe:
        """The recipe, watched."""
        return replace(self.plain, build=self._build, optimizer=self._optimizer)

    def _build(self, classes: int) -> MultiExitModel:
        self.model = self.plain.build(classes)
        return self.model

    def _optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        assert self.model is not None
        steps = _Steps(self.path, self.epoch)
        return _Noting(self.plain.optimizer, self.model, steps, self.path)(parameters)
