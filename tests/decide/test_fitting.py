"""Temperatures, ensembles, gates: fitted parameters against other solvers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torch.nn import functional

from offramp.decide import (
    calibrate,
    criterion,
    fit_apart,
    fit_ensemble,
    fit_gates,
    fit_temperatures,
    replay,
)
from offramp.decide.criteria import LearnedGate, Tempered
from offramp.decide.fitting import stack
from offramp.decide.scored import score
from offramp.decide.trace import Trace
from offramp.errors import PolicyError, TraceError
from tests.decide.rules import random_trace

TRACE = random_trace(1500)


def nll(logits, labels, temperature):
    logs = special.log_softmax(logits.double().numpy() / temperature, axis=1)
    return -logs[np.arange(len(labels)), labels].mean()


def test_temperatures_are_scipys():
    found = fit_temperatures(TRACE)
    for k in range(4):
        best = optimize.minimize_scalar(
            lambda t, k=k: nll(TRACE.logits[k], TRACE.labels, np.exp(t)),
            bounds=(np.log(0.05), np.log(20)),
            method="bounded",
            options={"xatol": 1e-8},
        )
        assert found.values[k] == pytest.approx(np.exp(best.x), rel=1e-3)
        assert found.after[k] == pytest.approx(best.fun, abs=1e-9)
        assert found.before[k] == pytest.approx(nll(TRACE.logits[k], TRACE.labels, 1.0))
        assert found.after[k] <= found.before[k]


def test_a_scaled_trace_gets_the_scale_back():
    plain = fit_temperatures(TRACE).values
    scaled = fit_temperatures(replace(TRACE, logits=TRACE.logits * 3)).values
    assert scaled == pytest.approx([3 * value for value in plain], rel=1e-3)


def test_one_is_kept_where_it_is_better():
    """Labels that say nothing want an infinite temperature; ones that say all, none."""
    labels = torch.arange(100) % 2
    sure = torch.full((1, 100, 2), -5.0)
    sure[0, torch.arange(100), labels] = 5.0
    right = Trace(sure, labels, torch.ones(1), torch.zeros(1))
    found = fit_temperatures(right)
    assert 0.05 <= found.values[0] <= 0.1
    assert found.after[0] <= found.before[0]
    flat = Trace(torch.zeros(1, 100, 2), labels, torch.ones(1), torch.zeros(1))
    assert fit_temperatures(flat).values == (1.0,)


def test_extreme_logits_do_not_overflow():
    found = fit_temperatures(replace(TRACE, logits=TRACE.logits * 1e6))
    assert found.values == pytest.approx([20.0] * 4, rel=1e-3)
    assert all(np.isfinite(found.after))


def test_tempered_scores_mean_the_same_everywhere():
    logits = TRACE.logits.clone()
    logits[0] *= 4
    skewed = replace(TRACE, logits=logits)
    fitted = fit_temperatures(skewed)
    scores = score(skewed, fitted.apply()).scores
    right = (skewed.logits.argmax(2) == skewed.labels).float()
    for k in range(4):
        assert float(scores[k].mean()) == pytest.approx(float(right[k].mean()), abs=0.05)


def test_the_stack_is_where_the_slope_is_nothing():
    logs = TRACE.logits.double().log_softmax(2)
    start = torch.full((4,), 0.25, dtype=torch.float64)
    weights = stack(logs, TRACE.labels, start).requires_grad_()
    joint = torch.tensordot(weights, logs, dims=1)
    loss = functional.cross_entropy(joint, TRACE.labels)
    loss = loss + ((weights - start) ** 2).sum() / len(TRACE.labels)
    (slope,) = torch.autograd.grad(loss, weights)
    assert float(slope.abs().max()) < 1e-5


def test_a_fitted_ensemble_is_likelier_than_any_exit_and_the_mean():
    fit, test = random_trace(4000).split(0.5)
    rule = fit_ensemble(fit)
    state = ()
    for k in range(4):
        joint, _, state = rule(test.logits[k], state, k)
        fitted = nll(joint, test.labels, 1.0)
        alone = nll(test.logits[k], test.labels, 1.0)
        mean = test.logits[: k + 1].log_softmax(2).mean(0)
        assert fitted < alone + 1e-3
        assert fitted < nll(mean, test.labels, 1.0) + 1e-3


def test_gates_are_no_worse_than_what_they_look_at():
    fit, test = random_trace(6000, seed=5).split(0.5)
    gate = fit_gates(fit, max_cost=0.6)
    assert isinstance(gate, LearnedGate)
    by_gate, by_confidence = (
        replay(test, calibrate(fit, rule, max_cost=0.6)) for rule in (gate, "confidence")
    )
    right = [float((d.prediction == test.labels).double().mean()) for d in (by_gate, by_confidence)]
    assert right[0] > right[1] - 0.012
    assert float(by_gate.cost.mean()) < 0.62


def test_gates_find_a_signal_that_confidence_hides():
    """An exit that is right exactly when it agrees with the one before, equally sure always."""
    generator = torch.Generator().manual_seed(0)
    rows = 3000
    labels = torch.randint(0, 5, (rows,), generator=generator)
    agrees = torch.rand(rows, generator=generator) < 0.5
    second = torch.where(agrees, labels, (labels + 1) % 5)
    first = torch.where(agrees, labels, (labels + 2) % 5)
    logits = torch.stack(
        [4.0 * functional.one_hot(said, 5).float() for said in (first, second, labels)]
    )
    trace = Trace(logits, labels, torch.ones(3), torch.zeros(3))
    fit, test = trace.split(0.5)
    gate = fit_gates(fit, price=0.3)
    scored = score(test, gate)
    right = scored.predictions[1] == test.labels
    assert float(scored.scores[1][right].min()) > float(scored.scores[1][~right].max())
    decided = replay(test, calibrate(fit, gate, max_accuracy_drop=0.0))
    assert bool((decided.prediction == test.labels).all())
    assert float(decided.cost.mean()) == pytest.approx(2.5, abs=0.1)


def test_a_higher_price_stops_earlier():
    costs = []
    for price in (0.05, 2.0):
        gate = fit_gates(TRACE, price=price)
        scored = score(TRACE, gate)
        costs.append(scored.cost(torch.zeros(3)))
    assert costs[1] < costs[0]


def test_gates_come_out_the_same_and_leave_the_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    one = fit_gates(random_trace(200), max_cost=0.6)
    assert torch.equal(torch.rand(1), expected)
    two = fit_gates(random_trace(200), max_cost=0.6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_refusals():
    for fit in (fit_temperatures, fit_ensemble):
        with pytest.raises(TraceError, match="must not be fitted on a trace of training data"):
            fit(replace(TRACE, source="training"))
        with pytest.raises(TraceError, match="only be fitted on a trace with labels"):
            fit(replace(TRACE, labels=None))
    with pytest.raises(TraceError, match="training data"):
        fit_gates(replace(TRACE, source="training"), price=0.1)
    for wrong in ({}, {"price": 0.1, "max_cost": 0.5}):
        with pytest.raises(PolicyError, match="either max_cost= or price="):
            fit_gates(TRACE, **wrong)
    with pytest.raises(PolicyError, match="at least 2 exits, got 1"):
        fit_gates(TRACE.keep_exits([]), price=0.1)


def test_what_is_fitted_apart_is_judged_on_other_samples():
    rule, rest = fit_apart(TRACE, fit_ensemble, share=0.25, seed=3)
    fitting, others = TRACE.split(0.25, seed=3)
    assert rule.weights == fit_ensemble(fitting).weights
    assert torch.equal(rest.logits, others.logits)
    assert not any(samples.overlap(rest) for samples in rule.fitted_on)


def test_what_fits_nothing_takes_no_samples_away():
    rule, rest = fit_apart(TRACE, lambda _: criterion("margin"))
    assert rule.name == "margin"
    assert rest is TRACE


def test_what_wraps_a_fitted_rule_was_fitted_on_its_samples():
    trace = random_trace(2000)
    rule = fit_ensemble(trace)
    for wrapped in (Tempered(rule, [1.0] * 4), LearnedGate(4, inner=rule)):
        with pytest.raises(TraceError, match="was fitted on 2000 of the 2000"):
            calibrate(trace, wrapped, max_accuracy_drop=0.05, confidence=0.9)


def test_samples_are_known_where_some_exits_are_left_out():
    trace = random_trace(2000)
    assert trace.samples.overlap(trace.keep_exits([0, 2]).subset(torch.arange(500))) == 500


def test_samples_are_known_by_their_inputs_where_logits_differ_in_their_last_bits():
    """As they do at another batch size."""
    inputs = torch.arange(2000) * 7
    one = replace(random_trace(2000), inputs=inputs)
    again = replace(one, logits=one.logits * (1 + 1e-7))
    rule = fit_ensemble(one)
    with pytest.raises(TraceError, match="was fitted on 2000 of the 2000"):
        calibrate(again, rule, max_accuracy_drop=0.05, confidence=0.9)
    some = again.keep_exits([0, 2]).subset(torch.arange(500))
    assert one.samples.overlap(some) == 500
    assert one.samples.overlap(replace(again, inputs=inputs + 1)) == 0
    assert one.samples.overlap(replace(again, inputs=None)) == 0  # nothing else tells
    assert one.samples.overlap(replace(some, logits=one.keep_exits([0, 2]).logits[:, :500],
                                       inputs=None)) == 500  # fmt: skip
