"""Shallow-Deep Networks and MSDNet: with exits, without, and exits on the trained network."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from scipy.stats import mannwhitneyu

import offramp
from benchmarks.systems.branchynet import WAYS, fewer, judged, timed, trace_of, trained
from benchmarks.systems.conditions import ImageConditions
from benchmarks.systems.judging import paired, right_of, share
from offramp.analyse.overthinking import overthinking
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy, replay
from offramp.decide.trace import Trace
from offramp.errors import Infeasible
from offramp.train.phases import Phase
from offramp.train.schemes import Heads, as_plan
from offramp.zoo.images import Images, open_images
from offramp.zoo.recipe import Recipe
from offramp.zoo.running import plain_phases
from offramp.zoo.shallow_deep import confusion
from offramp.zoo.systems import system

__all__ = ["HEIRS", "measure_heir", "train_heir"]

Row = dict[str, Any]

# How the paper shares a budget, or one goal of accuracy, among the exits.
HEIRS = {
    "sdn-vgg16": "shared",
    "sdn-resnet56": "shared",
    "sdn-mobilenet": "shared",
    "msdnet": "geometric",
}
BUDGETS = (0.25, 0.5, 0.75, 1.0)  # of the plain network's cost
# Internal classifiers on the trained network: the optimiser of the paper, and half of the epochs.
ADAM = partial(torch.optim.Adam, lr=1e-3)
CLASSES = 10


@dataclass(frozen=True)
class Heir:
    """One system, trained.

    Attributes:
        images: of all parts.
        plain: trained alone, by its last exit.
        ways: the other trainings by name.
        how: where each was trained.
    """

    images: Images
    plain: MultiExitModel
    ways: dict[str, MultiExitModel]
    how: Row


def train_heir(name: str, given: ImageConditions) -> Heir:
    """One system, trained in two or three ways; what is done is read."""
    recipe = system(name)
    images = fewer(open_images(recipe.data, given.data, seed=given.seed), given.images)
    kept = given.runs / name / f"epochs{given.epochs}" / f"seed{given.seed}"
    with torch.random.fork_rng(devices=[]):
        exits = recipe.build(CLASSES).num_exits
    alone = plain_phases(exits, given.epochs)
    how: Row = {}
    plain, how["plain"] = trained(recipe, images, kept / "plain", alone, given.seed)
    ways = {}
    for way, (made, phases) in _trainings(recipe, plain, exits, given.epochs).items():
        ways[way], how[way] = trained(made, images, kept / way, phases, given.seed)
    return Heir(images, plain, ways, how)


def measure_heir(name: str, given: ImageConditions) -> Row:
    """One system, calibrated, tested and timed."""
    heir = train_heir(name, given)
    plain = heir.plain
    alone = Traces.of(plain, heir.images)
    return {
        "system": name,
        "data": "CIFAR-10 (JPEG)",
        "epochs": given.epochs,
        "seed": given.seed,
        "training_images": len(heir.images.train[0]),
        "trained": heir.how,
        "places": list(plain.places),
        "stage_macs": list(plain.costs.stages),
        "head_macs": list(plain.costs.heads),
        "samples": alone.test.num_samples,
        "plain": share(right_of(alone.test)),
        "method": HEIRS[name],
        "ways": {
            way: _measured(name, model, heir, alone, given.seconds)
            for way, model in heir.ways.items()
        },
    }


def _trainings(
    recipe: Recipe, plain: MultiExitModel, exits: int, epochs: int
) -> dict[str, tuple[Recipe, list[Phase]]]:
    """What is trained how: all exits as the paper does, and of its other way, the heads alone."""
    ways = {"joint": (recipe, list(as_plan(recipe.scheme, exits, epochs)))}
    if recipe.name.startswith("sdn"):
        heads = replace(
            recipe,
            name=f"{recipe.name}, internal classifiers on the network of {epochs} epochs",
            build=lambda _: copy.deepcopy(plain),
            optimizer=ADAM,
        )
        ways["heads"] = (heads, list(as_plan(Heads(), exits, max(1, epochs // 2))))
    return ways


@dataclass(frozen=True)
class Traces:
    """What a model says of the calibration and of the test images."""

    calibration: Trace
    test: Trace

    @classmethod
    def of(cls, model: MultiExitModel, images: Images) -> Traces:
        """Record both."""
        return cls(*(trace_of(model, images, part) for part in ("calibration", "test")))


def _measured(name: str, model: MultiExitModel, heir: Heir, alone: Traces, seconds: float) -> Row:
    """One training beside the plain network."""
    traces = Traces.of(model, heir.images)
    right, own = right_of(alone.test), system(name).choose(traces.calibration, 0.0)
    ways: dict[str, Policy | None] = {"paper": own}
    for way, choose in WAYS.items():
        ways[way] = choose(0.0, traces.calibration, alone.calibration)
    policies = []
    for way, policy in ways.items():
        if policy is None:
            policies.append({"way": way, "found": False})
            continue
        chosen = judged(traces.test, policy, right)
        times = timed(model, heir.plain, policy, heir.images, seconds)
        policies.append({"way": way, "found": True, **chosen, **times})
    return {
        "exits": [share(row) for row in _right(traces.test)],
        "last_less_plain": paired(right_of(traces.test), right),
        "overthinking": _thinking(traces.test, own),
        "confusion": _telling(traces),
        "at": {
            str(budget): {
                method: _spending(traces, budget, method) for method in (HEIRS[name], "search")
            }
            for budget in BUDGETS
        },
        "policies": policies,
    }


def _right(test: Trace) -> torch.Tensor:
    return test.logits.argmax(2) == test.labels


def _thinking(test: Trace, policy: Policy) -> Row:
    decided = replay(test, policy)
    return asdict(overthinking(_right(test), decided.exit, decided.prediction == test.labels))


def _telling(traces: Traces) -> Row:
    """How well the disagreement of the exits tells wrong answers of the last one from right ones.

    The chance that a wrong answer has the higher score than a right one (area under the ROC
    curve), beside that of one less the last exit's own confidence.
    """
    test = traces.test
    wrong = ~right_of(test)

    def area(scores: torch.Tensor) -> float:
        ranked = mannwhitneyu(scores[wrong].numpy(), scores[~wrong].numpy())
        return float(ranked.statistic) / float(wrong.sum() * (~wrong).sum())

    unsure = 1 - test.logits[-1].double().softmax(1).amax(1)
    return {"confusion": area(confusion(test, traces.calibration)), "unsure": area(unsure)}


def _spending(traces: Traces, budget: float, method: str) -> Row | None:
    """Thresholds for a mean cost, on test samples."""
    try:
        policy = offramp.calibrate(traces.calibration, "confidence", method=method, max_cost=budget)
    except Infeasible:
        return None
    test = traces.test
    decided = replay(test, policy)
    cost = float(decided.cost.mean()) / test.full_cost
    return {**share(decided.prediction == test.labels), "cost": cost}
