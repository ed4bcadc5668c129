"""BranchyNet's Table I: the plain network, the one with branches, and what leaving early saves."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import offramp
from benchmarks.running.bare import bare_call
from benchmarks.subjects import NEVER, thresholds_for
from benchmarks.systems.judging import paired, paired_error, right_of, share
from benchmarks.writing import trained_on
from offramp.build.model import MultiExitModel
from offramp.decide.criteria import Criterion, criterion
from offramp.decide.criteria.ensembles import GeometricEnsemble
from offramp.decide.fitting import fit_apart, fit_ensemble
from offramp.decide.policy import Policy, replay
from offramp.decide.trace import Trace
from offramp.errors import Infeasible
from offramp.run.engines import OnnxRuntime
from offramp.run.runner import Runner
from offramp.run.timing import compare
from offramp.train.objectives import Distill
from offramp.train.phases import Phase
from offramp.train.schemes import as_plan
from offramp.zoo.branchynet.screening import screen_all
from offramp.zoo.images import Batches, Images, open_images
from offramp.zoo.recipe import Recipe
from offramp.zoo.running import plain_phases, train
from offramp.zoo.systems import system

__all__ = [
    "PAPER",
    "SURER",
    "WAYS",
    "Conditions",
    "fewer",
    "judged",
    "measure_branchynet",
    "phases_of",
    "retimed",
    "timed",
    "trace_of",
    "trained",
]

Row = dict[str, Any]

# Table I of Teerapittayanon et al. (2016): accuracies in %, gain in running time on a processor,
# share of the samples that leave at each exit in %.
PAPER: dict[str, Row] = {
    "b-lenet": {"data": "MNIST", "plain": 99.20, "branches": 99.25, "gain": 5.4, "first": 94.3},
    "b-alexnet": {"data": "CIFAR-10", "plain": 78.38, "branches": 79.19, "gain": 1.5},
    "b-resnet110": {"data": "CIFAR-10", "plain": 80.70, "branches": 79.17, "gain": 1.9},
}
DATA = {"mnist": "Fashion-MNIST", "cifar10": "CIFAR-10 (JPEG)"}
# Calibrated with a margin: one standard error of the difference to the plain network.
SURER = "calibrated, ensemble, margin"
FIRST = 0.943  # of the samples leave at the first exit of B-LeNet, in the paper
SINGLE, BATCH, BATCHES = 256, 64, 16
CLASSES = 10
# The paper starts from the trained plain network. Where that is done: how many epochs then train
# all exits. Those before train the network alone, once; the plain network goes on from there,
# alone, for as many as the exits have, at the same learning rate, which is less than at first.
JOINT_EPOCHS = {"b-resnet110": 8, "b-resnet110-distilled": 8}
LATER = 0.3
# Networks of the paper whose exits learn by another loss than the paper's, with its weights.
VARIANTS = {"b-alexnet-distilled": "b-alexnet", "b-resnet110-distilled": "b-resnet110"}
LOSSES = {
    "b-alexnet-distilled": Distill(teacher="ensemble"),
    "b-resnet110-distilled": Distill(teacher="last"),
}


@dataclass(frozen=True)
class Conditions:
    """How it is measured.

    Attributes:
        data: by the name of the data, the folder that it is in.
        runs: where trainings are kept.
        epochs: of both trainings; the recipe's where ``None``.
        seed: of both.
        seconds: of timing, for each policy and batch size.
        images: to train on, at the most.
        drop: of accuracy that may be lost, as a share.
    """

    data: dict[str, Path]
    runs: Path
    epochs: int | None = None
    seed: int = 0
    seconds: float = 10.0
    images: int | None = None
    drop: float = 0.0


def measure_branchynet(name: str, given: Conditions) -> Row:
    """One system: trained twice with the same budget, calibrated, tested and timed."""
    base = VARIANTS.get(name, name)
    recipe = system(base)
    epochs = given.epochs or recipe.epochs
    images = fewer(open_images(recipe.data, given.data[recipe.data], seed=given.seed), given.images)
    first, with_branches, alone = phases_of(name, recipe, epochs)
    # A variant shares the plain network, and what both begin from.
    kept, shared = (
        given.runs / of / f"epochs{epochs}" / f"seed{given.seed}" for of in (name, base)
    )
    how: Row = {}
    if first:
        begun, how["first"] = trained(recipe, images, shared / "first", first, given.seed)
        recipe = _after(recipe, begun, first)
    branchy, how["branches"] = trained(recipe, images, kept / "branches", with_branches, given.seed)
    plain, how["plain"] = trained(recipe, images, shared / "plain", alone, given.seed)
    calibration, test = (trace_of(branchy, images, part) for part in ("calibration", "test"))
    before, full = (trace_of(plain, images, part) for part in ("calibration", "test"))
    right = right_of(full)
    rows = []
    for way, choose in _ways(name, given.drop).items():
        policy = choose(calibration, before)
        if policy is None:
            rows.append({"way": way, "found": False})
            continue
        known = replay(calibration, policy)
        found = judged(test, policy, right)
        found["calibration_cost"] = float(known.cost.mean()) / calibration.full_cost
        times = timed(branchy, plain, policy, images, given.seconds)
        rows.append({"way": way, "found": True, **found, **times})
    return {
        "system": name,
        "data": DATA[recipe.data],
        "epochs": epochs,
        "phases": [[phase.name, phase.epochs] for phase in [*first, *with_branches]],
        "loss": with_branches[-1].row(branchy.num_exits)[-1],
        "seed": given.seed,
        "training_images": len(images.train[0]),
        "trained": how,
        "places": list(branchy.places),
        "stage_macs": list(branchy.costs.stages),
        "head_macs": list(branchy.costs.heads),
        "samples": test.num_samples,
        "plain": share(right),
        "exits": [share(test.logits[k].argmax(1) == test.labels) for k in range(test.num_exits)],
        "last_less_plain": paired(right_of(test), right),
        "policies": rows,
    }


def retimed(name: str, given: Conditions, before: Row) -> Row:
    """The row of a system whose weights are not kept here, with times measured anew.

    The time does not depend on the weights: they are drawn, and thresholds are put where as many of
    the timed images leave at each exit as the trained network lets out of the test images.
    """
    recipe = system(VARIANTS.get(name, name))
    images = open_images(recipe.data, given.data[recipe.data], seed=given.seed)
    torch.manual_seed(given.seed)
    drawn = recipe.build(CLASSES).eval()
    sums = GeometricEnsemble([[1.0] * (k + 1) for k in range(drawn.num_exits)])
    rows = []
    for row in before["policies"]:
        if row["found"]:
            rule = sums if row["criterion"] == sums.name else criterion(row["criterion"])
            policy = Policy(rule, [NEVER] * (drawn.num_exits - 1))
            shares = row["shares"][:-1]
            times = timed(drawn, drawn, policy, images, given.seconds, shares)
            rows.append({**row, **times, "timed_with": "drawn weights"})
        else:
            rows.append(row)
    return {**before, "places": list(drawn.places), "policies": rows}


def fewer(images: Images, most: int | None) -> Images:
    """So many to train on, at the most."""
    x, y = images.train
    return Images((x[:most], y[:most]), images.calibration, images.test)


def phases_of(
    name: str, recipe: Recipe, epochs: int
) -> tuple[list[Phase], list[Phase], list[Phase]]:
    """How the network is trained in so many epochs: before, if at all; with branches; alone."""
    with torch.random.fork_rng(devices=[]):
        exits = recipe.build(CLASSES).num_exits
    scheme = recipe.scheme
    if name in LOSSES:
        scheme = replace(scheme, objective=LOSSES[name])
    after = JOINT_EPOCHS.get(name, epochs)
    if after >= epochs:  # from the start, as a sample of the benchmark is
        return [], list(as_plan(scheme, exits, epochs)), plain_phases(exits, epochs)
    together = [replace(phase, lr_scale=LATER) for phase in as_plan(scheme, exits, after)]
    alone = [replace(phase, name="on", lr_scale=LATER) for phase in plain_phases(exits, after)]
    return plain_phases(exits, epochs - after), together, alone


def _after(recipe: Recipe, begun: MultiExitModel, first: list[Phase]) -> Recipe:
    """The recipe, from a trained network instead of drawn weights."""
    epochs = sum(phase.epochs for phase in first)
    name = f"{recipe.name}, after {epochs} epochs alone"
    return replace(recipe, name=name, build=lambda _: copy.deepcopy(begun))


def trained(
    recipe: Recipe, images: Images, out: Path, phases: list[Phase], seed: int
) -> tuple[MultiExitModel, Row]:
    """The model, and where it was trained, in how many seconds where that was a processor."""
    noted = out / "trained.json"
    begin = time.process_time()
    model = train(recipe, images, out, seed=seed, scheme=phases, progress=False)
    if not noted.exists():
        on_device = torch.cuda.is_available()
        seconds = None if on_device else round(time.process_time() - begin, 1)
        noted.write_text(json.dumps({"on": trained_on(), "seconds": seconds}), "utf-8")
    found: Row = json.loads(noted.read_text("utf-8"))
    return model, found


def trace_of(model: MultiExitModel, images: Images, part: str) -> Trace:
    """What the exits say of a part of the images."""
    x, y = getattr(images, part)
    return offramp.record(model, Batches(images.normalise(x), y, 500), source=part, progress=False)


# -- thresholds ------------------------------------------------------------------------------------

Rule = str | Criterion
Choose = Callable[[Trace, Trace], Policy | None]


def _screened(drop: float, trace: Trace, plain: Trace) -> Policy | None:
    """The cheapest combination of the paper's grid that is as accurate as the plain network."""
    wanted = _accuracy(plain) - drop - 1e-12
    good = [row for row in screen_all(trace) if row.accuracy >= wanted]
    best = min(good, key=lambda row: row.cost, default=None)
    return None if best is None else Policy("entropy", nats=best.nats)


def _calibrated(
    drop: float, trace: Trace, plain: Trace, rule: Rule = "confidence"
) -> Policy | None:
    try:
        return offramp.calibrate(trace, rule, min_accuracy=_accuracy(plain) - drop)
    except Infeasible:
        return None


def _ensemble(drop: float, trace: Trace, plain: Trace, *, surer: bool = False) -> Policy | None:
    rule, rest = fit_apart(trace, fit_ensemble)
    _, same = fit_apart(plain, lambda _: rule)
    first = _calibrated(drop, rest, same, rule)
    if first is None or not surer:
        return first
    # Thresholds that just do on these samples lose on new ones in half of the cases.
    answered = replay(rest, first).prediction == rest.labels
    return _calibrated(drop - paired_error(answered, right_of(same)), rest, same, rule)


# How the library chooses thresholds: from what accuracy may be lost, what the exits say of
# calibration samples, and what the plain network says of the same.
WAYS: dict[str, Callable[[float, Trace, Trace], Policy | None]] = {
    "calibrated": _calibrated,
    "calibrated, ensemble": _ensemble,
    SURER: partial(_ensemble, surer=True),
}


def _ways(name: str, drop: float) -> dict[str, Choose]:
    """How thresholds are chosen, beside what the plain network says of the same samples."""
    ways = {way: partial(choose, drop) for way, choose in ({"screened": _screened} | WAYS).items()}
    return ways | {"first exit": _leaving_first} if name == "b-lenet" else ways


def _leaving_first(trace: Trace, plain: Trace) -> Policy:
    """As many leave at the first exit as in the paper."""
    del plain
    probabilities = trace.logits[0].double().softmax(1)
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(1)
    return Policy("entropy", nats=[float(entropy.quantile(FIRST))])


# -- on the test samples ---------------------------------------------------------------------------


def judged(test: Trace, policy: Policy, plain: Tensor) -> Row:
    """What thresholds do on test samples, beside where the plain network is right (N,)."""
    decided = replay(test, policy)
    answered = decided.prediction == test.labels
    shares = torch.bincount(decided.exit, minlength=test.num_exits) / test.num_samples
    cost = float(decided.cost.mean()) / test.full_cost
    return {
        # None: the exit is switched off.
        "thresholds": [
            limit if math.isfinite(limit) else None
            for limit in policy.thresholds_for(test.num_exits)
        ],
        "criterion": policy.criterion.name,
        "accuracy": share(answered),
        "less_plain": paired(answered, plain),
        "shares": shares.tolist(),
        "cost": cost,
        "macs_speedup": 1 / cost,
    }


def timed(
    branchy: MultiExitModel,
    plain: MultiExitModel,
    policy: Policy,
    images: Images,
    seconds: float,
    shares: Sequence[float] | None = None,
) -> Row:
    """The plain network beside the one with branches, in turn, on the same test images.

    Args:
        branchy: with branches.
        plain: without; of one with branches, its backbone.
        policy: by which rows leave.
        images: whose test images are timed.
        seconds: of timing, for each batch size.
        shares: how many leave at each exit but the last, instead of the policy's thresholds.
    """
    x = images.normalise(images.test[0][: BATCH * BATCHES])
    runner = Runner(branchy, policy, x[:4], engine=OnnxRuntime(threads=1))
    if shares is not None:
        scores = [np.asarray(answer.score) for answer in runner.anytime(x)][:-1]
        runner = runner.under(Policy(policy.criterion, thresholds_for(scores, shares)))
        _check_shares(runner, x, shares)
    bare = bare_call(plain, x[:4], OnnxRuntime(threads=1))
    found: Row = {"in_one_call": runner.in_one_call}
    for size, count in ((1, SINGLE), (BATCH, BATCH * BATCHES)):
        parts = [part.numpy() for part in x[:count].split(size)]
        times = compare(
            {
                "plain": lambda parts=parts: [bare([part]) for part in parts],
                "branches": lambda parts=parts: [runner(part) for part in parts],
            },
            repeats=1000,
            seconds=seconds,
        )
        decided = torch.cat([torch.as_tensor(runner(part).exit) for part in parts])
        found[f"batch_{size}"] = {
            "plain_us": 1e3 * times["plain"] / count,
            "branches_us": 1e3 * times["branches"] / count,
            "speedup": times["plain"] / times["branches"],
            "first": float((decided == 0).double().mean()),
        }
    return found


def _check_shares(runner: Runner, x: Tensor, wanted: Sequence[float]) -> None:
    """Refuse to time other shares: scores of drawn weights may be all alike, in deep networks."""
    left = torch.as_tensor(runner(x).exit).bincount(minlength=len(wanted) + 1) / len(x)
    for exit, (came, due) in enumerate(zip(left.tolist(), wanted, strict=False)):
        if abs(came - due) > 1 / BATCH:
            raise SystemExit(
                f"With drawn weights {100 * came:.0f} % leave at exit {exit}, where "
                f"{100 * due:.0f} % are to: scores are alike. Time it with trained weights."
            )


def _accuracy(trace: Trace) -> float:
    return float(right_of(trace).double().mean())
