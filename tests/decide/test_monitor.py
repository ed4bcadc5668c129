from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from offramp.decide import Monitor, Policy, calibrate, replay
from offramp.errors import DataError, PolicyError
from tests.decide.rules import random_trace

POPULATION = random_trace(40_000, seed=3)
FIT = POPULATION.subset(torch.arange(2000))
POLICY = calibrate(FIT, max_cost=0.6)
REST = replay(POPULATION.subset(torch.arange(2000, 40_000)), POLICY)


def stream(rows, seed, decided=REST):
    index = torch.randint(
        0, len(decided.exit), (rows,), generator=torch.Generator().manual_seed(seed)
    )
    return decided.score[index].numpy(), decided.exit[index].numpy()


def test_false_alarms_are_as_rare_as_said():
    """At a rate of 0.2, over 60 streams of 1,500 samples, each with its own calibration set."""
    alarms = 0
    for seed in range(60):
        rows = torch.randint(
            2000, 40_000, (3500,), generator=torch.Generator().manual_seed(100 + seed)
        )
        drawn = POPULATION.subset(rows)
        reference, new = drawn.subset(torch.arange(2000)), drawn.subset(torch.arange(2000, 3500))
        monitor = Monitor(POLICY, false_alarm=0.2, reference=reference, seed=seed)
        decided = replay(new, POLICY)
        alarms += monitor.observe(decided.score.numpy(), decided.exit.numpy()).alarm
    assert alarms <= 22  # a binomial of 60 at 0.2 is above it once in 700


def test_the_policys_own_samples_serve_as_reference():
    alarms = sum(
        Monitor(POLICY, false_alarm=0.05, seed=s).observe(*stream(1500, s)).alarm for s in range(30)
    )
    assert alarms <= 6


def harder(rows, seed):
    trace = POPULATION.subset(
        torch.randint(0, 40_000, (rows,), generator=torch.Generator().manual_seed(seed))
    )
    weak = type(trace)(trace.logits * 0.7, trace.labels, trace.stage_costs, trace.head_costs)
    decided = replay(weak, POLICY)
    return decided.score.numpy(), decided.exit.numpy()


def test_a_drift_is_found_soon_also_after_a_long_calm():
    monitor = Monitor(POLICY, false_alarm=0.01)
    assert not monitor.observe(*stream(8000, 1)).alarm
    watch = monitor.observe(*harder(600, 2))
    assert watch.alarm
    assert 8000 < watch.since <= 8600
    assert watch.samples == 8600
    assert watch.evidence > 100 or watch.since < 8600


def test_a_drift_of_scores_alone_is_found():
    """The exits taken stay as they were; only the scores within them move up."""
    scores, exits = stream(3000, 4)
    assert Monitor(POLICY).observe(np.minimum(scores * 1.08, 1.0), exits).alarm


def test_shares_are_reported_beside_what_was_expected():
    watch = Monitor(POLICY).observe(*stream(2000, 5))
    assert watch.expected == pytest.approx(POLICY.provenance["achieved"]["shares"])
    assert sum(watch.shares) == pytest.approx(1.0)
    assert np.abs(np.subtract(watch.shares, watch.expected)).max() < 0.05


def test_one_by_one_is_all_at_once():
    scores, exits = stream(300, 6)
    whole, single = Monitor(POLICY, seed=2), Monitor(POLICY, seed=2)
    whole.observe(scores, exits)
    for score, exit in zip(scores, exits, strict=True):
        single.observe([score], [exit])
    assert whole.watch == single.watch
    assert Monitor(POLICY).watch.samples == 0


def test_the_cost_is_held_when_inputs_get_harder():
    hard = POPULATION.logits * 0.6
    trace = type(POPULATION)(hard, POPULATION.labels, POPULATION.stage_costs, POPULATION.head_costs)
    without = float(replay(trace, POLICY).cost.mean())
    monitor = Monitor(POLICY, hold_cost=True)
    costs = []
    for start in range(0, 12_000, 20):
        part = trace.subset(torch.arange(start, start + 20))
        decided = replay(part, monitor.policy)
        costs.append(float(decided.cost.mean()))
        monitor.observe(decided.score.numpy(), decided.exit.numpy())
    assert without > 0.65
    assert np.mean(costs[300:]) == pytest.approx(0.6, abs=0.015)
    assert not monitor.watch.alarm
    assert monitor.policy.thresholds != POLICY.thresholds
    assert POLICY.thresholds == Monitor(POLICY).policy.thresholds


def test_exits_that_are_off_stay_off():
    thresholds = [POLICY.thresholds[0], math.inf, POLICY.thresholds[2]]
    policy = Policy("confidence", thresholds)
    monitor = Monitor(policy, reference=FIT, hold_cost=True)
    decided = replay(FIT, policy)
    monitor.observe(decided.score.numpy(), decided.exit.numpy())
    assert monitor.policy.thresholds[1] == math.inf


def test_refusals():
    with pytest.raises(PolicyError, match="does not say what its scores were on calibration"):
        Monitor(Policy("confidence", [0.9] * 3))
    with pytest.raises(PolicyError, match="strictly between 0 and 1, got 0"):
        Monitor(POLICY, false_alarm=0)
    monitor = Monitor(POLICY)
    with pytest.raises(DataError, match=r"shapes \(2,\) and \(1,\)"):
        monitor.observe([0.5, 0.5], [1])
    with pytest.raises(DataError, match="without NaN"):
        monitor.observe([math.nan], [1])
    with pytest.raises(DataError, match=r"Exits of this policy are 0\.\.3, got 4 to 4"):
        monitor.observe([0.5], [4])
    with pytest.raises(DataError, match="not whole"):
        monitor.observe([0.5], [0.7])


def test_it_survives_the_policys_file(tmp_path):
    POLICY.save(tmp_path / "p.json")
    loaded = Monitor(Policy.load(tmp_path / "p.json"), seed=1)
    assert loaded.observe(*stream(200, 7)) == Monitor(POLICY, seed=1).observe(*stream(200, 7))


def test_moved_thresholds_promise_nothing():
    kept = calibrate(random_trace(2000), max_accuracy_drop=0.1, confidence=0.9)
    held = Monitor(kept, hold_cost=True).policy
    assert "promise" in kept.provenance
    assert "promise" not in held.provenance
    assert "nothing is promised" in held.provenance["summary"]
