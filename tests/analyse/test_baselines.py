from __future__ import annotations

import itertools

import pytest
import torch

from offramp.analyse.baselines import oracle, random_exit, truncations
from offramp.decide import Policy
from offramp.decide.policy import replay
from offramp.decide.trace import Trace
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


def test_the_oracle_leaves_at_the_cheapest_right_exit(case):
    trace, _, right, answered = case
    costs = [1.05, 2.05, 3.05, 4.0]  # no head but the one that answers
    spent, hits = 0.0, 0
    for n in range(trace.num_samples):
        fitting = [k for k in range(4) if right[k, n]]
        spent += min(costs[k] for k in fitting or range(4))
        hits += bool(fitting)
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


def oracle_of(right, heads, stages=(1.0, 1.0, 8.0), **settings):
    logits = torch.nn.functional.one_hot((~right).long(), 2).float()
    labels, heads = torch.zeros(right.shape[1], dtype=torch.long), torch.tensor(heads)
    trace = Trace(logits, labels, torch.tensor(stages), heads, **settings)
    return trace, oracle(trace, right, right[-1], 0.95)


def test_no_policy_is_as_right_for_less_than_the_oracle():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        right = torch.rand(3, 50, generator=generator) < torch.tensor([[0.2], [0.6], [0.8]])
        trace, best = oracle_of(right, (3.0, 0.5, 0.0))
        # Every sample at its best, for each choice of the heads that run.
        for active in itertools.product([True, False], repeat=2):
            on = torch.tensor([*active, True])
            costs = trace.exit_costs(active)
            fits = (right | ~right.any(0)) & on[:, None]
            spent = torch.where(fits, costs[:, None], torch.inf).amin(0)
            assert best.cost <= float(spent.mean()) + 1e-9


def test_the_oracle_pays_for_no_head_that_never_answers():
    right = torch.tensor([[False] * 4, [True] * 4, [True] * 4])
    _, best = oracle_of(right, (3.0, 0.5, 0.0))
    assert best.cost == 2.5
    _, linked = oracle_of(right, (3.0, 0.5, 0.0), cascade=True)
    assert linked.cost == 5.5  # the head at exit 1 reads the one at exit 0
    _, dear = oracle_of(~right, (3.0, 0.5, 0.0))
    assert dear.cost == 4.0
    _, hopeless = oracle_of(right & False, (3.0, 0.5, 0.0))
    assert hopeless.cost == 2.5
