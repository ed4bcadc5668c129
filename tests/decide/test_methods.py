"""Ways to choose thresholds, against loops by hand and brute force over all thresholds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.decide import Policy, calibrate, frontier, replay
from offramp.decide.calibrate import _Task
from offramp.decide.criteria import criterion
from offramp.decide.gains import correctness, smoothed
from offramp.decide.methods.cuts import Cuts
from offramp.decide.methods.families import FAMILIES, _reached_by
from offramp.decide.methods.landscape import Landscape, odds
from offramp.decide.methods.lattice import Lattice
from offramp.decide.methods.search import Search
from offramp.decide.methods.turn import turn
from offramp.decide.ranks import Ranks
from offramp.decide.scored import between, measure, score
from offramp.decide.trace import Trace
from tests.decide.rules import random_trace

METHODS = ["search", *FAMILIES]


def scored_of(trace, rule="confidence"):
    scored = score(trace, criterion(rule))
    return scored, correctness(trace, scored)


def brute(trace, rule="confidence"):
    """All (cost, accuracy, thresholds) there are: a threshold at every score, and off."""
    scored, right = scored_of(trace, rule)
    levels = [[math.inf, *row.unique().tolist()] for row in scored.scores[:-1]]
    out = []
    for thresholds in itertools.product(*levels):
        out.append((*measure(scored, torch.tensor(thresholds), right), thresholds))
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_the_budget_is_kept_and_used(method, budget):
    trace = random_trace(1000)
    policy = calibrate(trace, max_cost=budget, method=method)
    decided = replay(trace, policy)
    cost = float(decided.cost.mean()) / trace.full_cost
    assert cost <= budget + 1e-9
    # What is said to have been achieved is what the replay gives.
    achieved = policy.provenance["achieved"]
    assert achieved["cost_ratio"] == pytest.approx(cost)
    assert achieved["accuracy"] == pytest.approx(
        float((decided.prediction == trace.labels).double().mean())
    )
    shares = torch.bincount(decided.exit, minlength=4).double() / 1000
    assert achieved["shares"] == pytest.approx(shares.tolist())
    if method in ("search", "shared", "geometric", "quantile"):
        assert cost >= 0.985 * budget


@pytest.mark.parametrize("seed", range(3))
def test_search_is_near_the_best_of_all_thresholds(seed):
    """Against every pair of thresholds on a grid, in the gain that was aimed at."""
    trace = random_trace(400, seed=seed, exits=3)
    scored, right = scored_of(trace)
    search = Search(scored, lambda rows: right[:, rows])
    ranks = Ranks(scored.scores[:-1])
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 41, dtype=torch.float64)] * 2)
    everything = [measure(scored, t, right) for t in ranks.thresholds(grid)]
    for budget in (0.5, 0.6, 0.75, 0.9):
        cost, gain = measure(scored, search.at(budget), right)
        best = max(g for c, g in everything if c <= budget)
        assert 0.985 * budget <= cost <= budget + 1e-9
        # What is kept back is what three standard errors could not tell from chance.
        assert gain >= best - 0.02


@pytest.mark.parametrize("rule", ["patience", "agreement"])
def test_few_distinct_scores_are_searched_one_by_one(rule):
    for seed in range(3):
        trace = random_trace(60, seed=seed)
        scored, right = scored_of(trace, rule)
        lattice = Lattice(scored, right)
        for budget in (0.45, 0.6, 0.8):
            cost, gain = measure(scored, lattice.at(budget), right)
            best = max((g for c, g, _ in brute(trace, rule) if c <= budget), default=None)
            assert best is not None
            assert cost <= budget + 1e-9
            assert gain >= best - 1.01 / 60


def test_between_hull_points_the_budget_is_still_used():
    """Two exits of which only all-or-nothing settings are on the hull."""
    generator = torch.Generator().manual_seed(0)
    trace = random_trace(2000, exits=2)
    # Accuracy that falls slowly and then at once: concave nowhere in between.
    scored, _ = scored_of(trace)
    order = scored.scores[0].argsort(descending=True)
    right = torch.ones(2, 2000)
    right[0, order[:1000]] = (torch.rand(1000, generator=generator) < 0.5).float()
    search = Search(scored, lambda rows: right[:, rows])
    for budget in (0.6, 0.75, 0.9):
        assert scored.cost(search.at(budget)) >= 0.985 * budget


def test_families_from_dear_to_cheap():
    trace = random_trace(500)
    scored, right = scored_of(trace)
    for name, make in FAMILIES.items():
        family = make(scored, right)
        costs = [scored.cost(family(position)) for position in np.linspace(0, 1, 21)]
        assert costs[0] == pytest.approx(1.0), name
        assert costs[-1] <= costs[0], name
        if name in ("shared", "quantile", "geometric"):
            assert costs[-1] == pytest.approx(0.27, abs=1e-6), name
            # From the second on: where nobody leaves, heads do not run.
            assert all(a >= b - 5e-3 for a, b in itertools.pairwise(costs[1:])), name


def test_geometric_shares_are_geometric():
    trace = random_trace(5000, head=0.0)
    scored, right = scored_of(trace)
    thresholds = turn(scored, FAMILIES["geometric"](scored, right), 0.55)
    shares = torch.bincount(scored.exits(thresholds), minlength=4).double()
    ratios = shares[1:] / shares[:-1]
    assert float(ratios.max() / ratios.min()) < 1.02


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=25), st.integers(-1, 26))
def test_selecting_a_threshold_is_sorting_for_it(values, count):
    """Ties above all: a threshold cannot part them, and goes to the nearer end of their run."""
    scores = torch.tensor(values) / 7
    wanted = Ranks(scores[None]).at(torch.tensor([[count]]))[0, 0]
    assert torch.equal(_reached_by(scores, count), wanted)


def test_quantile_shares_are_equal():
    trace = random_trace(1000)
    scored, right = scored_of(trace)
    thresholds = FAMILIES["quantile"](scored, right)(0.3)
    assert (scored.scores[:-1] >= thresholds[:, None]).sum(1).tolist() == [300] * 3


def test_per_exit_accuracy_is_that_of_all_takers():
    trace = random_trace(400)
    scored, right = scored_of(trace)
    family = FAMILIES["per-exit accuracy"](scored, right)
    for position in (0.2, 0.5, 0.7):
        takers = scored.scores[:-1] >= family(position)[:, None]
        rates = [float(right[k][takers[k]].mean()) for k in range(3) if bool(takers[k].any())]
        level = min(rates)
        for k in range(3):
            rank = right[k][scored.scores[k].argsort(descending=True)].double()
            running = rank.cumsum(0) / torch.arange(1, 401)
            # One that lets more leave would be right less often than the others are.
            more = running[int(takers[k].sum()) :]
            assert not len(more) or float(more.max()) < level + 1e-9


def test_greedy_is_each_exit_against_the_end():
    trace = random_trace(60, exits=2)
    scored, right = scored_of(trace)
    thresholds = FAMILIES["greedy"](scored, right)(0.2)
    price = 0.2 / 0.8
    values = [(gain - price * cost, -t[0]) for cost, gain, t in brute(trace) if t[0] < math.inf]
    cost, gain = measure(scored, thresholds, right)
    # With one exit, greedy is the optimum of gain - price * cost (head paid by all).
    assert gain - price * cost == pytest.approx(max(values)[0], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=40),
    st.integers(0, 60),
)
def test_ranks_part_scores_midway_and_ties_never(values, count):
    scores = torch.tensor([values])
    threshold = Ranks(scores).at(torch.tensor([[count]]))[0, 0]
    reached = int((scores >= threshold).sum())
    possible = {0, *(int((scores >= value).sum()) for value in scores.unique())}
    assert reached in possible
    nearest = min(abs(p - min(count, len(values))) for p in possible)
    assert abs(reached - min(count, len(values))) == nearest
    if torch.isfinite(threshold):
        low, high = scores[scores < threshold], scores[scores >= threshold]
        middle = (float(low.max()) + float(high.min())) / 2
        assert float(threshold) == pytest.approx(middle, abs=1e-6)


def test_neighbours_in_the_last_bit_are_still_parted():
    high = torch.tensor([0.5, 1.0, -2.0])
    low = torch.nextafter(high, torch.tensor(-10.0))
    threshold = between(low, high)
    assert bool((high >= threshold).all())
    assert not bool((low >= threshold).any())


@pytest.mark.parametrize("rule", ["confidence", "geometric", "cascade"])
def test_landscape_is_the_mean_over_rows(rule):
    trace = replace(random_trace(300, head=0.1), cascade=rule == "cascade")
    scored, right = scored_of(trace, "confidence" if rule == "cascade" else rule)
    ranks = Ranks(scored.scores[:-1])
    land = Landscape.of(scored, right, ranks)
    generator = np.random.default_rng(0)
    settings_ = generator.normal(size=(6, 3))
    for on in itertools.product([True, False], repeat=3):
        used = np.array(on)
        cost, gain = land.means(settings_, used)
        for m in range(6):
            share = torch.from_numpy(1 / (1 + np.exp(-settings_[m])))
            thresholds = torch.where(torch.from_numpy(used), ranks.thresholds(share), torch.inf)
            wanted = measure(scored, thresholds, right)
            assert cost[m] == pytest.approx(wanted[0], abs=8e-3)
            assert gain[m] == pytest.approx(wanted[1], abs=8e-3)
            each = land.each(settings_[m], used)
            assert each.mean() == pytest.approx(gain[m], abs=1e-6)


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("budget", [0.6, 0.8, 1.0])
def test_heads_that_run_all_the_same_are_counted(budget, cascade):
    """Costly heads, of which an ensemble needs all: cutting the network short is no way out."""
    trace = replace(random_trace(3000, head=0.12), cascade=cascade)
    rule = "confidence" if cascade else "geometric"
    found, shared = (
        replay(trace, calibrate(trace, rule, max_cost=budget, method=method))
        for method in ("search", "shared")
    )
    right = [float((d.prediction == trace.labels).double().mean()) for d in (found, shared)]
    assert right[0] > right[1] - 0.003


def test_shifting_onto_the_budget_finds_it():
    trace = random_trace(800)
    scored, right = scored_of(trace)
    land = Landscape.of(scored, right, Ranks(scored.scores[:-1]))
    on = np.ones(3, bool)
    start = odds(np.array([[0.1, 0.5, 0.9], [0.5, 0.5, 0.5], [0.02, 0.02, 0.02]]))
    moved, gain = land.onto(start, on, 0.6)
    cost, direct = land.means(moved, on)
    np.testing.assert_allclose(cost, 0.6, rtol=0.01)
    np.testing.assert_allclose(gain, direct, atol=0.01)


def test_smoothing_is_unbiased_enough_and_quieter():
    """On a trace whose exits are calibrated, the estimate is nearer the truth than the label."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, 4000, 5, generator=generator)
    logits = logits.cumsum(0)
    chance = logits[-1].softmax(1)
    labels = chance.multinomial(1, generator=generator).squeeze(1)
    trace = Trace(logits, labels, torch.ones(3), torch.zeros(3))
    scored, right = scored_of(trace)
    truth = chance.gather(1, scored.predictions.T).T
    smooth = smoothed(trace, scored)
    assert float(((smooth - truth) ** 2).mean()) < 0.35 * float(((right - truth) ** 2).mean())
    assert float((smooth - right).mean().abs()) < 0.01
    rows = torch.arange(100)
    assert smoothed(trace, scored, rows).shape == (3, 100)


def test_a_head_that_is_never_worth_it_is_switched_off():
    trace = random_trace(2000, exits=4, head=0.0)
    heads = torch.tensor([0.0, 0.6, 0.0, 0.0])
    dear = Trace(trace.logits, trace.labels, trace.stage_costs, heads)
    policy = calibrate(dear, max_cost=0.6)
    assert policy.thresholds[1] == math.inf
    assert min(policy.thresholds[0], policy.thresholds[2]) < math.inf


def test_a_frontier_rises():
    trace = random_trace(400)
    points = frontier(trace, points=6)
    assert len(points) >= 3
    for a, b in itertools.pairwise(points):
        assert a.cost_ratio < b.cost_ratio
        assert a.accuracy < b.accuracy
    for point in points:
        decided = replay(trace, point.policy)
        assert float(decided.cost.mean()) / trace.full_cost == pytest.approx(point.cost_ratio)
        right = float((decided.prediction == trace.labels).double().mean())
        assert right == pytest.approx(point.accuracy)


def test_less_is_spent_only_where_that_is_surely_better():
    trace = random_trace(4000)
    worse = trace.logits.clone()
    worse[2:] = worse[2:].roll(1, dims=1)  # behind the second exit, answers of other samples
    spoilt = Trace(worse, trace.labels, trace.stage_costs, trace.head_costs)
    achieved = calibrate(spoilt, max_cost=0.9).provenance["achieved"]
    assert achieved["cost_ratio"] < 0.6
    assert achieved["accuracy"] >= float(
        (trace.logits[1].argmax(1) == trace.labels).double().mean()
    )


@pytest.mark.parametrize(("wrong", "less"), [(11, False), (200, True)])
def test_everyone_at_one_exit_has_to_be_surely_better(wrong, less):
    """The second exit errs on ten samples, the last on others: one more, or many more."""
    labels = torch.arange(1000) % 4
    said = labels.repeat(3, 1)
    said[0] += 1
    said[1, :10] += 1
    said[2, 10 : 10 + wrong] += 1
    logits = 3 * torch.nn.functional.one_hot(said % 4, 4).float()
    trace = Trace(logits, labels, torch.ones(3), torch.zeros(3))
    task = _Task(trace, criterion("confidence"), "search", "cost", 0)
    off = task.off()
    chosen = task._or_alone(off, measure(task.scored, off, task.right)[1], 1.0)
    assert torch.equal(chosen, off) is not less


def test_an_exit_that_alone_costs_a_little_too_much_is_no_way_out():
    """The third exit alone costs 0.76: near a budget of 0.759, but above it."""
    scored, right = scored_of(random_trace(2000, head=0.01))
    search = Search(scored, lambda rows: right[:, rows])
    alone = np.array([False, False, True])
    for budget, reached in ((0.759, False), (0.761, True)):
        setting = search._settle(search.land, np.zeros(3), alone, budget)
        assert (setting.gain > -np.inf) is reached


def test_networks_cut_short_are_put_on_the_budget():
    trace = random_trace(2000, exits=5)
    scored, right = scored_of(trace)
    ranks = Ranks(scored.scores[:-1])
    land = Landscape.of(scored, right, ranks)
    for budget in (0.3, 0.5, 0.7):
        costs = []
        for log_odds, on in Cuts(scored, ranks).at(budget):
            assert on.any()
            moved, gain = land.onto(log_odds[None], on, budget)
            if gain[0] > -np.inf:
                costs.append(land.means(moved, on)[0][0])
        assert len(costs) >= 4
        np.testing.assert_allclose(costs, budget, rtol=0.011)


def test_the_same_seed_gives_the_same_thresholds():
    trace = random_trace(500)
    one, two = (calibrate(trace, max_cost=0.6, seed=1) for _ in range(2))
    assert one.thresholds == two.thresholds


def test_search_beats_the_baselines_where_exits_differ_in_scale():
    """One exit is overconfident: a shared threshold cannot serve both."""
    trace = random_trace(8000, seed=2)
    logits = trace.logits.clone()
    logits[1] *= 4
    skewed = Trace(logits, trace.labels, trace.stage_costs, trace.head_costs)
    fit, test = skewed.split(0.5)
    gains = {}
    for method in METHODS:
        decided = replay(test, calibrate(fit, max_cost=0.6, method=method))
        gains[method] = float((decided.prediction == test.labels).double().mean())
    assert gains["search"] >= max(gains.values()) - 0.002
    assert gains["search"] > gains["shared"]


def test_policies_of_all_methods_are_plain():
    trace = random_trace(100)
    for method in METHODS:
        policy = calibrate(trace, max_cost=0.6, method=method)
        back = Policy.from_json(policy.to_json())
        assert back.thresholds == policy.thresholds
        assert all(np.float32(t) == t for t in policy.thresholds)
