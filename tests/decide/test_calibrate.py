"""Goals, provenance, and the inputs that are bad."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from offramp.decide import (
    Criterion,
    Policy,
    calibrate,
    criterion,
    fit_ensemble,
    fit_gates,
    fit_temperatures,
    frontier,
    prune_exits,
    replay,
)
from offramp.decide.methods.search import Search
from offramp.decide.scored import measure, score
from offramp.decide.trace import Trace
from offramp.errors import Infeasible, PolicyError, TraceError
from tests.decide.rules import random_trace
from tests.traces import make_trace

TRACE = random_trace(800)


def accuracy(trace, policy):
    return float((replay(trace, policy).prediction == trace.labels).double().mean())


FULL = float((TRACE.logits[-1].argmax(1) == TRACE.labels).double().mean())


@pytest.mark.parametrize("method", ["search", "shared", "greedy"])
def test_goals_about_answers_are_met_at_less_cost(method):
    policy = calibrate(TRACE, max_accuracy_drop=0.03, method=method)
    assert accuracy(TRACE, policy) >= FULL - 0.03 - 1e-9
    assert policy.provenance["achieved"]["cost_ratio"] < 0.9
    policy = calibrate(TRACE, min_accuracy=0.8, method=method)
    assert accuracy(TRACE, policy) >= 0.8
    policy = calibrate(TRACE, min_agreement=0.9, method=method)
    same = replay(TRACE, policy).prediction == TRACE.logits[-1].argmax(1)
    assert float(same.double().mean()) >= 0.9
    assert policy.provenance["achieved"]["cost_ratio"] < 0.95


def test_a_loss_of_ones_own_without_a_promise():
    policy = calibrate(TRACE, max_brier_gap=0.05)
    assert policy.provenance["achieved"]["cost_ratio"] < 0.95

    def miss(logits, labels):
        return 1 - logits.softmax(1).gather(1, labels[:, None]).squeeze(1)

    policy = calibrate(TRACE, max_loss=0.4, loss=miss, loss_limits=(0, 1))
    out = replay(TRACE, policy)
    assert float(miss(out.logits, TRACE.labels).mean()) <= 0.4 + 1e-6


def test_latency_is_a_cost_in_milliseconds():
    times = ([3.0, 2.0, 2.0, 3.0], [0.5, 0.5, 0.5])
    policy = calibrate(TRACE, max_latency=6.0, times=times)
    achieved = policy.provenance["achieved"]
    assert achieved["cost_unit"] == "ms"
    assert 5.9 <= achieved["cost"] <= 6.0
    with pytest.raises(PolicyError, match=r"max_latency needs times=\(stage_ms, head_ms\)"):
        calibrate(TRACE, max_latency=6.0)
    with pytest.raises(Infeasible, match="cost 3.5 ms"):
        calibrate(TRACE, max_latency=1.0, times=times)


def test_without_labels_only_agreement():
    bare = replace(TRACE, labels=None)
    policy = calibrate(bare, min_agreement=0.9)
    assert "accuracy" not in policy.provenance["achieved"]
    assert calibrate(bare, max_cost=0.6).provenance["achieved"]["agreement"] > 0.6
    for goal in ({"max_accuracy_drop": 0.1}, {"min_accuracy": 0.5}, {"max_brier_gap": 0.1}):
        with pytest.raises(TraceError, match="needs labels, and this trace has none"):
            calibrate(bare, **goal)


def test_exactly_one_goal():
    with pytest.raises(PolicyError, match="exactly one goal of .*; got none"):
        calibrate(TRACE)
    with pytest.raises(PolicyError, match="got max_cost, min_accuracy"):
        calibrate(TRACE, max_cost=0.5, min_accuracy=0.5)


@pytest.mark.parametrize(
    "goal",
    [
        {"max_cost": -0.1},
        {"max_cost": math.inf},
        {"max_cost": math.nan},
        {"min_accuracy": 90},
        {"min_agreement": 1.5},
        {"max_accuracy_drop": 2},
    ],
)
def test_goals_out_of_range(goal):
    with pytest.raises(PolicyError, match="out of range"):
        calibrate(TRACE, **goal)


def test_unknown_names():
    with pytest.raises(PolicyError, match="Unknown method 'serch'. Did you mean 'search'"):
        calibrate(TRACE, max_cost=0.5, method="serch")
    with pytest.raises(PolicyError, match="Unknown method 'x'"):
        frontier(TRACE, method="x")
    with pytest.raises(PolicyError, match="Unknown criterion 'entrop'. Did you mean 'entropy'"):
        calibrate(TRACE, "entrop", max_cost=0.5)
    with pytest.raises(PolicyError, match="at least 2 points"):
        frontier(TRACE, points=1)


def test_training_data_is_refused():
    for call in (calibrate, frontier):
        with pytest.raises(TraceError, match="recorded from data that the model was trained on"):
            call(
                replace(TRACE, source="training"),
                **({"max_cost": 0.5} if call is calibrate else {}),
            )


def test_goals_that_cannot_be_met_carry_the_best():
    with pytest.raises(Infeasible, match="cheapest, everyone leaving .* cost 0.27 of") as caught:
        calibrate(TRACE, max_cost=0.1)
    best = caught.value.best
    assert isinstance(best, Policy)
    assert (replay(TRACE, best).exit == 0).all()
    with pytest.raises(Infeasible, match="best found has accuracy 0.9.*, and 0.9990") as caught:
        calibrate(TRACE, min_accuracy=0.999)
    assert accuracy(TRACE, caught.value.best) >= FULL


def test_the_least_cost_that_is_told_can_be_asked_for():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        stages = 0.2 + torch.rand(4, generator=generator)
        trace = Trace(TRACE.logits, TRACE.labels, stages.tolist(), [0.01, 0.02, 0.03, 0.0])
        with pytest.raises(Infeasible) as caught:
            calibrate(trace, max_cost=0.01)
        told = float(str(caught.value).rpartition(" cost ")[2].partition(" of the full")[0])
        least = caught.value.best.provenance["achieved"]["cost_ratio"]
        assert least <= told * (1 + 1e-6)
        assert told <= 1.002 * least
        calibrate(trace, max_cost=told)


def test_what_the_whole_network_does_not_reach_less_of_it_may():
    """The last exit turns the answers wrong that the one before is sure of."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (1000,), generator=generator)
    right = torch.nn.functional.one_hot(labels, 4).float()
    sure = torch.rand(1000, 1, generator=generator)
    middle = torch.where(sure > 0.15, 8 * right * sure, 0.1 * (1 - right))
    spoilt = torch.where(sure > 0.6, 5 * (1 - right), 9 * right)  # the sure ones
    first = torch.randn(1000, 4, generator=generator) * 0.01
    trace = Trace(torch.stack([first, middle, spoilt]), labels, [1.0, 1.0, 2.0], [0.1, 0.1, 0.0])
    assert float((spoilt.argmax(1) == labels).double().mean()) < 0.7
    policy = calibrate(trace, min_accuracy=0.97)
    assert accuracy(trace, policy) >= 0.97
    assert policy.provenance["achieved"]["cost_ratio"] < 1


def test_more_may_be_spent_than_pays_and_is_not():
    """The last exit mends some hard samples and spoils some easy ones."""
    trace = make_trace(3000, strengths=(1.5, 3.0, 4.5, 6.0))
    labels, before, last = trace.labels, trace.logits[-2], trace.logits[-2].clone()
    right = torch.nn.functional.one_hot(labels, 5).float()
    best = before.softmax(1).amax(1)
    luck = torch.rand(3000, generator=torch.Generator().manual_seed(1))
    last[(best < 0.6) & (luck < 0.6)] = 9 * right[(best < 0.6) & (luck < 0.6)]
    spoilt = (best > 0.6) & (luck < 0.4)
    last[spoilt] = 9 * right[spoilt].roll(1, dims=1)
    trace = replace(trace, logits=torch.cat([trace.logits[:-1], last[None]]))
    spent = [calibrate(trace, max_cost=budget) for budget in (0.8, 0.9, 1.0, 1.1)]
    reached = [accuracy(trace, policy) for policy in spent]
    assert min(reached[1:]) > reached[0] - 0.005, reached
    alone = (trace.logits.argmax(2) == labels).double().mean(1)
    assert reached[-1] > float(alone.max()) + 0.03
    assert spent[-1].provenance["achieved"]["cost_ratio"] < 0.95


@pytest.mark.parametrize("how", ["dtype", "device"])
def test_defaults_of_torch_change_no_threshold(how):
    """Programs for large models make bfloat16 the default: thresholds must not be that coarse."""
    before = torch.get_default_dtype()
    wanted = [calibrate(TRACE, rule, max_cost=0.6) for rule in ("confidence", "patience")]
    wanted += [calibrate(TRACE, min_agreement=0.8, confidence=0.9)]
    taken = [replay(TRACE, policy).exit for policy in wanted]
    try:
        if how == "dtype":
            torch.set_default_dtype(torch.bfloat16)
        else:
            torch.set_default_device("meta")
        found = [calibrate(TRACE, rule, max_cost=0.6) for rule in ("confidence", "patience")]
        found += [calibrate(TRACE, min_agreement=0.8, confidence=0.9)]
        exits = [replay(TRACE, policy).exit for policy in found]
        rest = [fit_ensemble(TRACE).weights, fit_temperatures(TRACE).values]
        fit_gates(TRACE, max_cost=0.6)
        prune_exits(TRACE, max_cost=0.6)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert [policy.thresholds for policy in found] == [policy.thresholds for policy in wanted]
    assert all(map(torch.equal, exits, taken))
    assert rest == [fit_ensemble(TRACE).weights, fit_temperatures(TRACE).values]


def test_provenance_is_json_and_says_where_it_comes_from():
    policy = calibrate(TRACE, max_cost=0.6)
    about = json.loads(json.dumps(policy.to_json()))["provenance"]
    assert about["data"] == {"source": "test", "samples": 800, "fingerprint": TRACE.fingerprint}
    assert about["target"] == {"max_cost": 0.6}
    assert about["method"] == "search"
    text = policy.describe()
    assert text.count(".") >= 1
    assert "chosen by search on 800 samples (test)" in text
    assert "nothing is promised" in text


# Bad data: each gives a right answer, or its own clear error.


def odd(logits, labels=None, stages=None, heads=None):
    exits = len(logits)
    stages = torch.ones(exits) if stages is None else stages
    return Trace(logits, labels, stages, torch.zeros(exits) if heads is None else heads)


def test_ties_everywhere():
    """All scores equal: everybody leaves at an exit or nobody does."""
    labels = torch.arange(30) % 3
    logits = torch.zeros(3, 30, 3)
    logits[2, torch.arange(30), labels] = 1.0
    trace = odd(logits, labels)
    policy = calibrate(trace, max_cost=0.5)
    assert len(replay(trace, policy).exit.unique()) == 1
    assert policy.provenance["achieved"]["cost_ratio"] <= 0.5
    kept = calibrate(trace, max_accuracy_drop=0.0)
    assert accuracy(trace, kept) == 1.0
    for method in ("shared", "geometric", "quantile", "greedy", "per-exit accuracy"):
        assert calibrate(trace, max_cost=0.5, method=method).provenance["achieved"][
            "cost_ratio"
        ] == pytest.approx(1 / 3)


def test_all_exits_equal():
    one = random_trace(200).logits[-1]
    labels = random_trace(200).labels
    trace = odd(one.repeat(4, 1, 1), labels)
    policy = calibrate(trace, max_accuracy_drop=0.0)
    assert policy.provenance["achieved"]["cost_ratio"] == pytest.approx(0.25, abs=0.02)


def test_an_exit_that_is_never_right():
    trace = random_trace(1000)
    logits = trace.logits.clone()
    logits[1] = 0.0
    logits[1, torch.arange(1000), (trace.labels + 1) % 5] = 9.0
    hostile = Trace(logits, trace.labels, trace.stage_costs, trace.head_costs)
    policy = calibrate(hostile, max_accuracy_drop=0.02)
    taken = replay(hostile, policy).exit
    assert float((taken == 1).double().mean()) < 0.01
    assert accuracy(hostile, policy) >= full_of(hostile) - 0.02


def full_of(trace):
    return float((trace.logits[-1].argmax(1) == trace.labels).double().mean())


def test_one_class():
    trace = odd(torch.randn(3, 50, 1), torch.zeros(50))
    for rule in ("confidence", "entropy", "margin", "patience", "power_entropy", "energy"):
        policy = calibrate(trace, rule, max_accuracy_drop=0.0)
        # Every exit is right, so all may leave at the first.
        assert policy.provenance["achieved"]["cost_ratio"] == pytest.approx(1 / 3)


def test_twenty_samples():
    trace = random_trace(20)
    for rule in ("confidence", "patience", "arithmetic"):
        for method in ("search", "shared", "geometric", "greedy", "quantile", "per-exit accuracy"):
            policy = calibrate(trace, rule, max_cost=0.7, method=method)
            assert policy.provenance["achieved"]["cost_ratio"] <= 0.7


def test_one_sample():
    trace = random_trace(1)
    policy = calibrate(trace, max_cost=0.7)
    assert policy.provenance["achieved"]["cost_ratio"] <= 0.7


def test_costs_that_do_not_grow():
    """Exits behind a stage that costs nothing: the later of two equally dear ones is as cheap."""
    base = random_trace(600)
    trace = Trace(base.logits, base.labels, torch.tensor([1.0, 0, 0, 1]), torch.zeros(4))
    policy = calibrate(trace, max_accuracy_drop=0.02)
    achieved = policy.provenance["achieved"]
    assert achieved["accuracy"] >= full_of(trace) - 0.02
    assert calibrate(trace, max_cost=0.5).provenance["achieved"]["accuracy"] >= 0.5


def test_heads_that_cost_more_than_they_save():
    base = random_trace(400)
    heads = torch.tensor([5.0, 5.0, 5.0, 0.0])
    trace = Trace(base.logits, base.labels, base.stage_costs, heads)
    policy = calibrate(trace, max_cost=1.0)
    assert (replay(trace, policy).exit == 3).all()
    assert policy.provenance["achieved"]["cost_ratio"] == pytest.approx(1.0)
    with pytest.raises(Infeasible):
        calibrate(trace, max_cost=0.5)


def test_a_network_without_auxiliary_exits():
    base = random_trace(50)
    trace = base.keep_exits([])
    policy = calibrate(trace, max_cost=1.0)
    assert policy.thresholds == ()
    assert (replay(trace, policy).exit == 0).all()


@pytest.mark.parametrize("rule", ["confidence", "patience"])
def test_the_whole_budget_may_be_spent_whatever_rounding_says(rule):
    """Ten tenths are a last bit more than one."""
    cost = torch.full((10,), 0.1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    logits = torch.randn(10, 300, 3, generator=generator)
    logits[-1, torch.arange(300), labels] += 6  # only the last exit is any good
    trace = Trace(logits, labels, cost, torch.zeros(10))
    policy = calibrate(trace, rule, max_cost=1.0)
    full = float((logits[-1].argmax(1) == labels).double().mean())
    assert accuracy(trace, policy) >= full - 0.01


@pytest.mark.parametrize("seed", range(3))
def test_few_scores_and_many_samples_keep_to_the_budget_and_to_what_was_found(seed):
    """The lattice sees some of the samples; at its own cost there, all of them may cost more."""
    trace = random_trace(60_000, seed)
    search = Search(score(trace, criterion("patience")), lambda rows: _right(trace)[:, rows], seed)
    for state in search.lattice.walked[1:-3:2]:
        cost, gain = search.lattice._value(state)
        found = search.at(cost)
        assert search.scored.cost(found) <= cost + 1e-12
        assert measure(search.scored, found, _right(trace))[1] >= gain - 0.02


def _right(trace):
    return (trace.logits.argmax(2) == trace.labels).float()


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        ({"max_latency": -1.0}, "it is in milliseconds"),
        ({"max_brier_gap": -3.0}, "difference of scores"),
        ({"min_accuracy": 1.5}, "it is a share, as in min_accuracy=0.5"),
    ],
)
def test_a_goal_out_of_range_says_what_it_is(goal, text):
    with pytest.raises(PolicyError, match=text):
        calibrate(TRACE, **goal)


def test_a_score_without_bound_is_refused():
    class Odds(Criterion):
        name = "odds"

        def forward(self, logits, state, exit):
            best = logits.softmax(-1).amax(-1)
            return logits, best / (1 - best), state

    with pytest.raises(PolicyError, match="'odds' returned an infinite score at exit 0"):
        calibrate(replace(TRACE, logits=TRACE.logits * 100), Odds(), max_cost=0.9)


def test_per_exit_accuracy_serves_losses_too():
    """The same goal, said as a loss of 0 or 1."""
    wrong = calibrate(
        TRACE,
        max_loss=0.2,
        loss=lambda logits, labels: (logits.argmax(1) != labels).double(),
        loss_limits=(0.0, 1.0),
        method="per-exit accuracy",
    )
    right = calibrate(TRACE, min_accuracy=0.8, method="per-exit accuracy")
    cost = [p.provenance["achieved"]["cost_ratio"] for p in (wrong, right)]
    assert cost[0] == pytest.approx(cost[1], abs=0.02)
