"""Data that nobody wishes for, through everything: a right answer, or an error of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from offramp.decide import (
    calibrate,
    fit_ensemble,
    fit_gates,
    fit_temperatures,
    frontier,
    prune_exits,
    replay,
)
from offramp.decide.calibrate import METHODS
from offramp.decide.trace import Trace
from offramp.errors import Infeasible, PolicyError, TraceError
from tests.decide.rules import random_trace

BASE = random_trace(400)


def ties() -> Trace:
    """Every score of an exit is the same; only the last exit is right."""
    logits = torch.zeros_like(BASE.logits)
    logits[-1, torch.arange(400), BASE.labels] = 3.0
    return replace(BASE, logits=logits)


def equal_exits() -> Trace:
    return replace(BASE, logits=BASE.logits[-1].repeat(4, 1, 1))


def never_right() -> Trace:
    logits = BASE.logits.clone()
    logits[1] = 0.0
    logits[1, torch.arange(400), (BASE.labels + 1) % 5] = 9.0
    return replace(BASE, logits=logits)


def one_class() -> Trace:
    return replace(BASE, logits=BASE.logits[:, :, :1], labels=torch.zeros(400))


def flat_costs() -> Trace:
    return replace(BASE, stage_costs=torch.tensor([1.0, 0, 0, 1]), head_costs=torch.zeros(4))


def groups_of_one() -> Trace:
    return replace(BASE, groups=torch.arange(400))


BAD = {
    "ties": ties(),
    "equal exits": equal_exits(),
    "an exit that is never right": never_right(),
    "one class": one_class(),
    "twenty samples": random_trace(20),
    "one sample": random_trace(1),
    "costs that do not grow": flat_costs(),
    "groups of one": groups_of_one(),
}


def right(trace, policy):
    return float((replay(trace, policy).prediction == trace.labels).double().mean())


def full(trace):
    return float((trace.logits[-1].argmax(1) == trace.labels).double().mean())


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_the_goal(name, method):
    trace = BAD[name]
    policy = calibrate(trace, max_cost=0.7, method=method)
    assert float(replay(trace, policy).cost.mean()) <= 0.7 * trace.full_cost + 1e-9
    policy = calibrate(trace, max_accuracy_drop=0.02, method=method)
    assert right(trace, policy) >= full(trace) - 0.02 - 1e-9
    assert float(replay(trace, policy).cost.mean()) <= trace.full_cost + 1e-9


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("bound", ["auto", "betting", "hoeffding-bentkus"])
@pytest.mark.parametrize("testing", ["fixed-sequence", "bonferroni"])
def test_a_promise_is_kept_here_or_refused(name, bound, testing):
    trace = BAD[name]
    ask = {"confidence": 0.9, "bound": bound, "testing": testing}
    why = "kept"
    try:
        policy = calibrate(trace, max_accuracy_drop=0.1, **ask)
    except Infeasible as refused:
        why, policy = str(refused), refused.best
    assert why == "kept" or "too few to promise" in why
    # A promise about new samples holds on those that it was tested on with room to spare.
    assert right(trace, policy) >= full(trace) - 0.1
    assert float(replay(trace, policy).cost.mean()) <= trace.full_cost + 1e-9


@pytest.mark.parametrize("name", BAD)
def test_frontiers_and_prunings(name):
    trace = BAD[name]
    for point in frontier(trace, points=4):
        assert point.accuracy == pytest.approx(right(trace, point.policy))
    found = prune_exits(trace, 0.7)
    assert found.cost_ratio <= 0.7 + 1e-9
    assert found.accuracy >= found.accuracy_all - 0.05
    trace.keep_exits(found.keep)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("fit", ["temperatures", "ensemble", "gates"])
def test_what_is_fitted_can_be_used(name, fit):
    trace = BAD[name]
    if fit == "gates" and trace.num_samples < 10:
        with pytest.raises(TraceError, match="at least 10 are needed; this trace has 1"):
            fit_gates(trace, max_cost=0.7)
        return
    rule = {
        "temperatures": lambda: fit_temperatures(trace).apply("confidence"),
        "ensemble": lambda: fit_ensemble(trace),
        "gates": lambda: fit_gates(trace, max_cost=0.7),
    }[fit]()
    policy = calibrate(trace, rule, max_cost=0.75)
    assert float(replay(trace, policy).cost.mean()) <= 0.75 * trace.full_cost + 1e-9
    assert all(not math.isnan(value) for value in policy.thresholds)


def test_nan_is_refused_wherever_it_comes_from():
    logits = BASE.logits.clone()
    logits[1, 7, 2] = math.nan
    with pytest.raises(TraceError, match=r"exit 1 are NaN or infinite in 1 of 400 .*rows: \[7\]"):
        replace(BASE, logits=logits)
    with pytest.raises(TraceError, match="head_costs of a trace must be finite"):
        replace(BASE, head_costs=torch.tensor([math.nan, 0, 0, 0]))

    def unsure(logits, labels):
        return torch.full_like(logits[:, 0], math.nan)

    with pytest.raises(PolicyError, match="loss returned NaN at exit 0"):
        calibrate(BASE, max_loss=0.1, loss=unsure, loss_limits=(0, 1), confidence=0.9)
