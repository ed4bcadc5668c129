from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from offramp.decide import calibrate, prune_exits, replay
from offramp.decide.criteria import Confidence
from offramp.decide.gains import correctness
from offramp.decide.methods.families import shared
from offramp.decide.methods.turn import turn
from offramp.decide.pruning import _Judge
from offramp.decide.scored import measure, score
from offramp.errors import PolicyError, TraceError
from tests.decide.rules import random_trace

TRACE = random_trace(3000, exits=5, head=0.04)


def by_hand(trace, budget):
    """Accuracy of every subset under one shared threshold, turned to the budget one by one."""
    scored = score(trace, Confidence())
    right = correctness(trace, scored)
    line = shared(scored, right)
    out = {}
    aux = trace.num_exits - 1
    for size in range(aux + 1):
        for subset in itertools.combinations(range(aux), size):
            used = torch.zeros(aux, dtype=torch.bool)
            used[list(subset)] = True
            found = turn(scored, lambda p, used=used: torch.where(used, line(p), torch.inf), budget)
            cost, gain = measure(scored, found, right)
            if cost <= budget:
                out[subset] = gain
    return out


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_no_subset_is_better(budget):
    found = prune_exits(TRACE, budget)
    wanted = by_hand(TRACE, budget)
    assert found.tried == 16
    assert found.cost_ratio <= budget
    assert found.accuracy == pytest.approx(wanted[found.keep])
    assert found.accuracy >= max(wanted.values()) - 0.004
    assert found.accuracy_all == pytest.approx(wanted[0, 1, 2, 3])


def test_every_subset_is_judged_as_it_would_run():
    scored = score(TRACE, Confidence())
    judge = _Judge(scored, correctness(TRACE, scored), 0.6)
    for subset, gain in by_hand(TRACE, 0.6).items():
        assert judge.one(subset) == pytest.approx(gain, abs=0.012)
        assert judge.all()[subset] == judge.one(subset)


def test_a_useless_dear_exit_goes():
    heads = [0.0, 0.3, 0.0, 0.0]
    found = prune_exits(TRACE, 0.6, head_costs=heads)
    assert 1 not in found.keep
    assert found.keep
    kept = TRACE.keep_exits(found.keep)
    policy = calibrate(kept, max_cost=0.6)
    assert float(replay(kept, policy).cost.mean()) <= 0.6


def test_heads_that_never_pay_leave_no_exit():
    found = prune_exits(TRACE, 1.0, head_costs=[2.0] * 4)
    assert found.keep == ()
    assert found.cost_ratio == pytest.approx(1.0)


def test_more_exits_than_subsets_can_be_counted():
    trace = random_trace(500, exits=15, head=0.05)
    found = prune_exits(trace, 0.5)
    assert found.tried < 200
    assert found.accuracy >= found.accuracy_all - 0.01


def test_refusals():
    with pytest.raises(PolicyError, match="earliest exit alone costs 0.24"):
        prune_exits(TRACE, 0.1)
    with pytest.raises(PolicyError, match="cannot be pruned under 'patience'"):
        prune_exits(TRACE, 0.5, "patience")
    with pytest.raises(TraceError, match="training data"):
        prune_exits(replace(TRACE, source="training"), 0.5)


def test_what_cannot_be_pruned():
    whole = random_trace(200)
    with pytest.raises(PolicyError, match="no auxiliary exit"):
        prune_exits(whole.keep_exits([]), 0.5)
    with pytest.raises(TraceError, match="training data"):
        prune_exits(replace(whole, labels=None, source="training"), 0.5)
