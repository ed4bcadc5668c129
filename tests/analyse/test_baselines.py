from __future__ import annotations

import pytest
import torch

from offramp.analyse.baselines import oracle, random_exit, truncations
from offramp.decide import Policy
from offramp.decide.policy import replay
from tests.traces import make_trace


@pytest.fixture
def case():
    trace = make_trace()
    decisions = replay(trace, Policy("confidence", [0.9, 0.9, 0.9]))
    right = trace.logits.argmax(2) == trace.labels
    return trace, decisions, right, decisions.prediction == trace.labels


def test_a_truncation_pays_for_its_own_head_alone(case):
    trace, _, right, answered = case
    cuts = truncations(trace, right, answered, 0.95)
    assert [cut.cost for cut in cuts] == pytest.approx([1.05, 2.05, 3.05])
    for k, cut in enumerate(cuts):
        assert cut.accuracy == pytest.approx(float(right[k].double().mean()))
        lead = float(answered.double().mean()) - cut.accuracy
        assert cut.lead[0] == pytest.approx(lead)
        assert cut.lead[1][0] < lead < cut.lead[1][1]


def test_the_oracle_leaves_at_the_first_right_exit(case):
    trace, _, right, answered = case
    costs = trace.exit_costs().tolist()
    spent, hits = 0.0, 0
    for n in range(trace.num_samples):
        first = next((k for k in range(4) if right[k, n]), None)
        spent += costs[0 if first is None else first]
        hits += first is not None
    best = oracle(trace, right, answered, 0.95)
    assert best.cost == pytest.approx(spent / trace.num_samples)
    assert best.accuracy == pytest.approx(hits / trace.num_samples)
    assert best.lead[0] <= 0


def test_random_exits_keep_the_shares(case):
    trace, decisions, right, answered = case
    cost = float(decisions.cost.mean())
    found = random_exit(trace, right, answered, decisions.exit, cost, 0.95, seed=0)
    drawn = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):  # shuffled exits: the same shares, and nothing known about samples
        exit = decisions.exit[torch.randperm(trace.num_samples, generator=generator)]
        drawn.append(right.gather(0, exit[None]).double().mean())
    assert found.accuracy == pytest.approx(float(torch.stack(drawn).mean()), abs=2e-3)
    assert found.cost == cost
    assert found.lead[1][0] > 0  # confidence knows something here
