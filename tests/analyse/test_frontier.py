from __future__ import annotations

import math

import pytest

from offramp.analyse.frontier import turned
from offramp.decide import Policy
from offramp.decide.policy import replay
from tests.traces import make_trace

POLICIES = [
    Policy("confidence", [0.9, 0.8, 0.7]),
    Policy("entropy", [0.9, math.inf, 0.3]),
    Policy("patience", [1, 2, 1]),
    Policy.final(),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.criterion.name}-{p.thresholds}")
def test_every_point_is_what_a_replay_says(policy):
    trace = make_trace()
    points = turned(trace, policy, trace.labels, steps=6)
    assert len(points) > 2
    for point in points:
        decisions = replay(trace, Policy(policy.criterion, point.thresholds))
        ratio = float(decisions.cost.mean()) / trace.full_cost
        right = float((decisions.prediction == trace.labels).double().mean())
        assert (point.cost_ratio, point.accuracy) == pytest.approx((ratio, right))


@pytest.mark.parametrize("policy", POLICIES[:3], ids=lambda p: p.criterion.name)
def test_the_curve_runs_through_the_policy(policy):
    trace = make_trace()
    own = float(replay(trace, policy).cost.mean()) / trace.full_cost
    assert any(
        point.cost_ratio == pytest.approx(own) for point in turned(trace, policy, trace.labels)
    )


def test_the_curve_runs_from_all_leave_to_none():
    trace = make_trace()
    points = turned(trace, POLICIES[0], trace.labels)
    costs = [point.cost_ratio for point in points]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(1.05 / 4)
    assert 1.0 in costs  # all exits off, so no head runs
    assert costs[-1] < 1.0375  # all heads run and hardly anyone leaves


def test_an_exit_that_is_off_stays_off():
    trace = make_trace()
    points = turned(trace, POLICIES[1], trace.labels)
    assert all(point.thresholds[1] == math.inf for point in points)
