"""Bounds against scipy and enumeration; paths against loops; promises against known risk."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from offramp.decide import (
    Policy,
    calibrate,
    fit_ensemble,
    fit_gates,
    fit_temperatures,
    replay,
)
from offramp.decide.criteria import Confidence
from offramp.decide.guarantees import Promise, Risk, promised, verdicts
from offramp.decide.guarantees import promise as promise_module
from offramp.decide.guarantees.bounded import bets, betting_log_wealth, hoeffding_bentkus
from offramp.decide.guarantees.exact import ScoreTest, binomial_limit, enough, score_test
from offramp.decide.guarantees.expectation import conformal
from offramp.decide.guarantees.ground import Ground
from offramp.decide.guarantees.paths import Path, best_of_all, down_the_path
from offramp.decide.guarantees.sweep import Sweep, walk
from offramp.decide.guarantees.verdicts import Test
from offramp.decide.scored import score
from offramp.errors import Infeasible, PolicyError, TraceError
from tests.decide.rules import random_trace


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 0.6), st.floats(1e-4, 0.4))
def test_binomial_limit_is_scipys(samples, bound, error):
    limit = binomial_limit(samples, bound, error)
    if limit >= 0:
        assert stats.binom.cdf(limit, samples, bound) <= error * (1 + 1e-9)
    assert stats.binom.cdf(limit + 1, samples, bound) > error * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0.001, 0.5), st.floats(0.01, 0.3))
def test_the_claim_is_clopper_and_pearsons(samples, bound, error):
    limit = binomial_limit(samples, bound, error)
    for count in range(max(0, limit - 1), min(samples, limit + 2)):
        upper = stats.beta.ppf(1 - error, count + 1, samples - count)
        if abs(upper - bound) > 1e-9:
            assert (count <= limit) == (upper <= bound)


def test_enough_is_the_first_that_passes():
    for bound, error in ((0.01, 0.05), (0.05, 0.1), (0.2, 0.01)):
        n = enough(bound, error)
        assert binomial_limit(n, bound, error) >= 0
        assert binomial_limit(n - 1, bound, error) < 0


def passing_chance(test, samples, lost, won):
    """The probability of passing at true rates, summed over the whole trinomial."""
    a, b = np.meshgrid(np.arange(samples + 1), np.arange(samples + 1), indexing="ij")
    keep = a + b <= samples
    counts = np.stack([a, b, samples - a - b], -1)[keep]
    mass = stats.multinomial.pmf(counts, samples, [lost, won, 1 - lost - won])
    passes = test.passes(torch.tensor(counts[:, 0]), torch.tensor(counts[:, 1])).numpy()
    return float(mass[passes].sum())


@pytest.mark.parametrize(
    ("samples", "bound", "error"),
    [
        (40, 0.05, 0.1), (60, 0.0, 0.1), (80, 0.1, 0.05), (80, 0.02, 0.2),
        (12, 0.2, 0.009), (16, 0.1, 0.009), (12, 0.02, 0.045), (20, 0.1, 0.045),
    ],
)  # fmt: skip
def test_the_score_test_keeps_its_error_everywhere(samples, bound, error):
    """Over a fine grid of true rates, on the boundary and inside the hypothesis."""
    test = ScoreTest(samples, bound, error)
    worst = 0.0
    for won in np.concatenate([np.linspace(0, 0.1, 21), np.linspace(0.12, (1 - bound) / 2, 40)]):
        for extra in (0.0, 0.01, 0.05):
            if 2 * won + bound + extra <= 1:
                worst = max(worst, passing_chance(test, samples, won + bound + extra, won))
    assert worst <= error


@pytest.mark.parametrize(
    ("samples", "bound", "error"), [(1000, 0.01, 0.01), (300, 0.01, 0.01), (1000, 0.05, 0.01)]
)
def test_the_score_test_keeps_its_error_between_the_rates_it_looks_at(samples, bound, error):
    """At rates of won samples ten times as dense, and far beyond the closely looked at."""
    test = ScoreTest(samples, bound, error)
    worst = 0.0
    for won in [*np.arange(0.2, 11, 0.5) ** 2, *np.geomspace(121, 0.4 * samples, 25)]:
        rate = float(won) / samples
        lost = np.arange(samples * (rate + bound) + 80 + 9 * won**0.5)[:, None]
        gained = np.arange(won + 60 + 9 * won**0.5)[None]
        rest = samples - lost - gained
        mass = np.exp(
            special.gammaln(samples + 1)
            - special.gammaln(lost + 1)
            - special.gammaln(gained + 1)
            - special.gammaln(np.maximum(rest, 0) + 1)
            + special.xlogy(lost, rate + bound)
            + special.xlogy(gained, rate)
            + special.xlogy(rest, 1 - 2 * rate - bound)
        )
        passes = test.passes(torch.tensor(lost), torch.tensor(gained)).numpy()
        worst = max(worst, float(mass[passes & (rest >= 0)].sum()))
    assert worst <= error


def test_the_score_test_wastes_little():
    test = score_test(2000, 0.02, 0.1)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(2000, [0.04, 0.02, 0.94], size=20_000)
    passed = test.passes(torch.tensor(counts[:, 0]), torch.tensor(counts[:, 1]))
    assert 0.085 <= float(passed.double().mean()) <= 0.105


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_fewer_losses_or_more_wins_never_hurt(lost, won):
    test = score_test(500, 0.02, 0.1)
    here = bool(test.passes(torch.tensor(lost), torch.tensor(won)))
    if here:
        assert bool(test.passes(torch.tensor(lost), torch.tensor(won + 1)))
        assert bool(test.passes(torch.tensor(max(lost - 1, 0)), torch.tensor(won)))


@pytest.mark.parametrize(
    ("low", "high", "values", "chances"),
    [
        (-2, 2, [-0.5, 0.0, 1.5], [0.3, 0.5, 0.2]),
        (0, 1, [0.0, 0.3, 1.0], [0.5, 0.4, 0.1]),
        (-1, 1, [-1.0, 0.0, 1.0], [0.5, 0.3, 0.2]),  # a mean below 0
    ],
)
def test_bets_do_not_gain_where_the_mean_is_the_bound(low, high, values, chances):
    mean = float(np.dot(values, chances))
    stakes = bets(mean, low, high)
    wealth = betting_log_wealth(torch.tensor(values), mean, stakes).exp()
    expected = wealth @ torch.tensor(chances, dtype=torch.float64)
    torch.testing.assert_close(expected, torch.ones_like(expected))
    worse = betting_log_wealth(torch.tensor(values), mean - 0.05, bets(mean - 0.05, low, high))
    assert bool((worse.exp() @ torch.tensor(chances, dtype=torch.float64) < 1).all())
    assert bool(torch.isfinite(betting_log_wealth(torch.tensor([low, high]), mean, stakes)).all())


def test_hoeffding_bentkus_is_its_formula():
    for samples, bound, mean in ((100, 0.1, 0.05), (500, 0.05, 0.02), (50, 0.3, 0.4)):
        seen = min(mean, bound)
        divergence = seen * math.log(seen / bound) + (1 - seen) * math.log((1 - seen) / (1 - bound))
        bentkus = math.e * stats.binom.cdf(math.ceil(samples * mean - 1e-9), samples, bound)
        wanted = min(1.0, math.exp(-samples * divergence), bentkus)
        exact = torch.tensor(mean, dtype=torch.float64)  # float32 would round the count up
        found = float(hoeffding_bentkus(exact, samples, bound, 0, 1))
        assert found == pytest.approx(wanted, rel=1e-9)
        scaled = float(hoeffding_bentkus(2 * exact - 1, samples, 2 * bound - 1, -1, 1))
        assert scaled == pytest.approx(wanted, rel=1e-6)


def slow_totals(scored, values, threshold):
    taken = scored.exits(torch.full((scored.num_exits - 1,), threshold))
    return float(values.gather(0, taken[None]).sum())


@pytest.mark.parametrize("levels", [None, 4])
def test_a_sweep_is_every_shared_threshold(levels):
    trace = random_trace(40)
    scored = score(trace, Confidence())
    if levels:  # ties
        scored = replace(scored, scores=(scored.scores * levels).round() / levels)
    values = torch.randn(4, 40, dtype=torch.float64)
    rows = torch.arange(40) % 3 == 0
    sweep = Sweep.of(scored)
    totals, some = sweep.totals(values), sweep.totals(values, rows)
    assert float(totals[0]) == pytest.approx(slow_totals(scored, values, math.inf))
    for position in [p for p in range(1, len(totals)) if bool(sweep.ends[p - 1])]:
        threshold = sweep.threshold(position)
        assert float(totals[position]) == pytest.approx(slow_totals(scored, values, threshold))
        assert float(some[position]) == pytest.approx(slow_totals(scored, values * rows, threshold))


def slow_walk(scored, test, losses, groups, error):
    """The last threshold that passed before the first that failed, one by one."""
    levels = sorted({math.inf, *scored.scores[:-1].flatten().tolist()}, reverse=True)
    last = None
    for level in levels:
        taken = scored.exits(torch.full((scored.num_exits - 1,), level))
        seen = losses.gather(0, taken[None])[0]
        for rows in groups:
            sums = test.features(seen[rows]).sum(1)
            if not bool(test.passes(sums[:, None], int(rows.sum()), error)[0]):
                return last
        last = level
    return last


@pytest.mark.parametrize("name", ["disagreement", "accuracy gap", "brier gap", "error rate"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_walk_returns_the_last_that_passed(name, grouped, tied):
    trace = random_trace(300)
    if tied:  # few distinct scores, whose samples move together
        trace = replace(trace, logits=(trace.logits / 2).round() * 2)
    if grouped:
        trace = replace(trace, groups=(torch.arange(300) % 7 == 0).long())
    risk = Risk.named(name)
    ground = Ground(trace, Confidence())
    scored, values = ground.losses(risk)
    for bound in (0.05, 0.15, 0.3):
        test = Test(risk, bound)
        count, possible = walk(ground.changes(risk), test, ground.groups, 0.1)
        wanted = slow_walk(scored, test, values, ground.groups, 0.1)
        assert possible == (wanted is not None)
        if wanted is not None:
            same = scored.exits(torch.full((3,), wanted))
            found = torch.full((3,), ground.sweep.threshold(count))
            assert torch.equal(scored.exits(found), same)


def test_paths_are_tested_in_order_or_all_at_once():
    """A risk that falls again behind a bad setting: one stops before it, the other looks past."""
    trace = random_trace(400)
    scored = score(trace, Confidence())
    values = torch.zeros(4, 400, dtype=torch.float64)
    values[1] = 1.0  # leaving at exit 1 is always a loss
    path = [
        torch.tensor([math.inf] * 3),
        torch.tensor([math.inf, math.inf, -math.inf]),
        torch.tensor([math.inf, -math.inf, -math.inf]),
        torch.tensor([-math.inf] * 3),
    ]
    test = Test(Risk.named("disagreement"), 0.05)
    way = Path(path, scored, [torch.ones(400, dtype=torch.bool)])
    assert torch.equal(down_the_path(way, test, values, 0.1), path[1])
    assert torch.equal(best_of_all(way, test, values, 0.1), path[3])
    values[3] = 1.0
    again = Path(path, scored, [torch.ones(400, dtype=torch.bool)])
    assert down_the_path(again, test, values, 0.1) is None


def test_every_group_has_to_pass_on_a_path():
    trace = random_trace(400)
    scored = score(trace, Confidence())
    few = torch.arange(400) < 100
    values = torch.zeros(4, 400, dtype=torch.float64)
    values[1, :100] = 1.0  # leaving at exit 1 is a loss for the few alone
    values[0, 100:108] = 1.0  # and at exit 0 for 8 of the many: rare enough
    path = [
        torch.tensor([math.inf] * 3),
        torch.tensor([-math.inf] * 3),
        torch.tensor([math.inf, -math.inf, math.inf]),
    ]
    test = Test(Risk.named("disagreement"), 0.05)
    together = Path(path, scored, [torch.ones(400, dtype=torch.bool)])
    each = Path(path, scored, [few, ~few])
    for _ in range(2):  # the second time from what is kept
        assert list(together.passing(test, values, 0.1)) == [True, True, False]
        assert list(each.passing(test, values, 0.1)) == [True, True, False]
    strict = Test(Risk.named("disagreement"), 0.02)
    assert list(each.passing(strict, values, 0.1))[1:] == [False, False]
    many = Path(path, scored, [~few])
    assert list(many.passing(test, values, 0.1)) == [True, True, True]


@pytest.mark.parametrize("name", ["accuracy gap", "disagreement"])
def test_bets_on_counts_are_bets_on_samples(name):
    risk, bound = Risk.named(name), 0.05
    test = Test(risk, bound, "betting")
    losses = torch.tensor([1.0, 0.0, 0.0, 1.0, -1.0 if risk.low < 0 else 0.0, *[0.0] * 60])
    single = betting_log_wealth(losses, bound, bets(bound, risk.low, risk.high)).sum(1)
    wealth = math.log(float(single.exp().mean()))
    sums = test.features(losses).sum(1, keepdim=True)
    for error in (math.exp(-wealth) * 1.001, math.exp(-wealth) * 0.999):
        assert bool(test.passes(sums, len(losses), error)[0]) == (wealth >= -math.log(error))


def test_conformal_is_the_formula():
    trace = random_trace(300)
    ground = Ground(trace, Confidence())
    scored, values = ground.losses(Risk.named("accuracy gap"))
    count, possible = conformal(ground.sweep, values, ground.groups, 0.05, 1.0)
    worst = values.flip(0).cummax(0).values.flip(0)
    assert possible
    passed = None
    for level in sorted({math.inf, *scored.scores[:-1].flatten().tolist()}, reverse=True):
        if (slow_totals(scored, worst, level) + 1) / 301 > 0.05:
            break
        passed = level
    found = torch.full((3,), ground.sweep.threshold(count))
    assert torch.equal(scored.exits(found), scored.exits(torch.full((3,), passed)))


# Promises, on traces whose true risk can be had.


POPULATION = random_trace(200_000, seed=99, head=0.0)


def true_risk(policy, name):
    decided = replay(POPULATION, policy)
    full = POPULATION.logits[-1].argmax(1)
    if name == "disagreement":
        return float((decided.prediction != full).double().mean())
    gap = (full == POPULATION.labels).double() - (decided.prediction == POPULATION.labels).double()
    return float(gap.mean())


def draw(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return POPULATION.subset(torch.randint(0, 200_000, (rows,), generator=generator))


@pytest.mark.parametrize(
    ("goal", "name", "bound"),
    [
        ({"min_agreement": 0.9}, "disagreement", "auto"),
        ({"max_accuracy_drop": 0.05}, "accuracy gap", "auto"),
        ({"max_accuracy_drop": 0.05}, "accuracy gap", "betting"),
        ({"min_agreement": 0.9}, "disagreement", "hoeffding-bentkus"),
    ],
)
def test_promises_hold(goal, name, bound):
    """Of 60 draws at confidence 0.8, no more violations than chance allows (one in 10^4)."""
    limit = 1 - goal["min_agreement"] if "min_agreement" in goal else goal["max_accuracy_drop"]
    other = random_trace(2000, seed=7, head=0.0)
    learned = Ground(other, Confidence()).settings(labelled=name != "disagreement")
    violated = 0
    for seed in range(60):
        trace = draw(800, seed)
        risk = Risk.named(name)
        promise = Promise(risk, limit, 0.8, bound, path=other)
        ground = Ground(trace, Confidence(), path=other)
        ground.settings = lambda labelled: learned  # always the same, so it is learned once
        kept = promised(trace, Confidence(), promise, ground)
        policy = Policy("confidence", kept.thresholds.tolist())
        violated += true_risk(policy, name) > limit
    assert violated <= stats.binom.ppf(1 - 1e-4, 60, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_promises_hold_with_the_path_on_the_same_samples(seed):
    violated = 0
    for turn in range(100):
        policy = calibrate(
            draw(1000, 1000 * seed + turn), max_accuracy_drop=0.04, confidence=0.8, seed=turn
        )
        violated += true_risk(policy, "accuracy gap") > 0.04
    assert violated <= stats.binom.ppf(1 - 1e-4, 100, 0.2)


def test_the_expectation_is_kept():
    risks = [
        true_risk(
            calibrate(draw(300, s), min_agreement=0.9, confidence="expectation"), "disagreement"
        )
        for s in range(60)
    ]
    assert np.mean(risks) <= 0.1 + 3 * np.std(risks) / 60**0.5
    assert np.mean(risks) >= 0.05  # cautious, since losses are made monotone, but not idle


def test_more_confidence_costs_more_and_the_exact_test_least():
    trace = draw(3000, 0)
    costs = {}
    for confidence in (0.8, 0.95, 0.99):
        policy = calibrate(trace, max_accuracy_drop=0.04, confidence=confidence)
        costs[confidence] = policy.provenance["achieved"]["cost_ratio"]
    assert costs[0.8] <= costs[0.95] <= costs[0.99]  # the path has steps: two may be the same
    assert costs[0.8] < costs[0.99]
    betting = calibrate(trace, max_accuracy_drop=0.04, confidence=0.95, bound="betting")
    assert costs[0.95] <= betting.provenance["achieved"]["cost_ratio"]


def test_groups_are_each_promised():
    """One group is much harder: the promise for all together would not hold for it."""
    trace = draw(6000, 1)
    hard = (torch.arange(6000) % 6 == 0).long()
    logits = trace.logits.clone()
    logits[:-1, hard == 1] = logits[:-1, hard == 1].roll(1, dims=2) * 2
    grouped = replace(trace, logits=logits, groups=hard)
    policy = calibrate(grouped, min_agreement=0.85, confidence=0.9)
    together = calibrate(replace(grouped, groups=None), min_agreement=0.85, confidence=0.9)
    rates = {}
    for name, p in (("each", policy), ("all", together)):
        same = replay(grouped, p).prediction == grouped.logits[-1].argmax(1)
        rates[name] = float(same[hard == 1].double().mean())
    assert rates["each"] >= 0.85
    assert rates["all"] < 0.85
    assert "for each group" in policy.describe()


def test_a_user_loss_that_may_be_negative_and_is_not_monotone():
    def regret(logits, labels):
        return 0.5 - logits.softmax(1).gather(1, labels[:, None]).squeeze(1)

    trace = draw(4000, 2)
    policy = calibrate(trace, max_loss=0.0, loss=regret, loss_limits=(-0.5, 0.5), confidence=0.9)
    out = replay(POPULATION, policy)
    assert float(regret(out.logits, POPULATION.labels).mean()) <= 0.0
    assert policy.provenance["achieved"]["cost_ratio"] < 0.9
    with pytest.raises(PolicyError, match=r"said to lie between 0.0 and 0.2, but takes values"):
        calibrate(trace, max_loss=0.1, loss=regret, loss_limits=(0, 0.2), confidence=0.9)
    with pytest.raises(PolicyError, match="max_loss needs loss="):
        calibrate(trace, max_loss=0.1, confidence=0.9)
    with pytest.raises(PolicyError, match=r"\(least, most\) of the loss"):
        calibrate(trace, max_loss=0.1, loss=regret, loss_limits=(1, 0), confidence=0.9)


def test_a_gain_can_be_promised_as_a_loss_below_zero():
    def regret(logits, labels):
        return 0.5 - logits.softmax(1).gather(1, labels[:, None]).squeeze(1)

    trace = draw(4000, 2)
    ask = {"loss": regret, "loss_limits": (-0.5, 0.5), "confidence": 0.9}
    for bound in ("betting", "hoeffding-bentkus"):
        policy = calibrate(trace, max_loss=-0.1, bound=bound, **ask)
        out = replay(POPULATION, policy)
        assert float(regret(out.logits, POPULATION.labels).mean()) <= -0.1
        assert policy.provenance["achieved"]["cost_ratio"] < 0.95
        with pytest.raises(Infeasible, match="cannot be promised: already where nobody leaves"):
            calibrate(trace, max_loss=-0.45, bound=bound, **ask)
    with pytest.raises(PolicyError, match=r"must lie in \[-0.5, 0.5\), got -0.6"):
        calibrate(trace, max_loss=-0.6, **ask)


def test_nobody_leaves_where_heads_cost_more_than_early_leavers_save():
    base = draw(2000, 9)
    dear = replace(base, head_costs=torch.tensor([0.3, 0.3, 0.3, 0.0]))
    for trace in (dear, dear.keep_exits([0])):
        policy = calibrate(trace, max_accuracy_drop=0.01, confidence=0.95)
        assert policy.provenance["achieved"]["cost_ratio"] <= 1.0
        assert policy.provenance["promise"]["sentence"].startswith("nobody leaves early, so with")
    cheap = calibrate(base, max_accuracy_drop=0.01, confidence=0.95)
    assert cheap.provenance["achieved"]["cost_ratio"] < 0.95


def test_brier_and_bonferroni_and_a_path_of_other_samples():
    trace = draw(3000, 3)
    for more in ({}, {"testing": "bonferroni"}, {"path": draw(2000, 4)}):
        policy = calibrate(trace, max_brier_gap=0.08, confidence=0.9, **more)
        assert policy.provenance["achieved"]["cost_ratio"] < 1.0
        assert policy.provenance["promise"]["test"] == "betting"


def test_the_sentence_says_what_over_what_and_what_would_void_it():
    policy = calibrate(draw(2000, 5), max_accuracy_drop=0.05, confidence=0.9)
    sentence = policy.provenance["promise"]["sentence"]
    assert sentence.startswith("with probability 0.9 over the draw of the 2000 calibration samples")
    assert "accuracy lost against the full network is at most 0.05" in sentence
    assert "drawn independently from the same source" in sentence
    assert "void if" in sentence
    assert sentence in policy.describe()


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        ({"min_agreement": 0.99}, r"trace has 20 samples, too few .* at least \d{3} are needed"),
        ({"max_accuracy_drop": 0.01}, r"too few .* at least \d{3} are needed"),
        ({"max_brier_gap": 0.01}, r"too few .* at least \d{3,} are needed"),
        ({"min_agreement": 0.99, "confidence": "expectation"}, "at least 99 are needed"),
    ],
)
def test_too_few_samples_say_how_many_would_do(goal, text):
    with pytest.raises(Infeasible, match=text) as caught:
        calibrate(random_trace(20), **{"confidence": 0.95, **goal})
    assert (replay(POPULATION.subset(torch.arange(9)), caught.value.best).exit == 3).all()


def test_that_many_do():
    for kind, name in (
        ("auto", "disagreement"),
        ("auto", "accuracy gap"),
        ("betting", "accuracy gap"),
        ("auto", "brier gap"),
    ):
        for error in (0.1, 0.01):  # the score test needs more than a binomial there
            test = Test(Risk.named(name), 0.05, kind)
            needed = test.needed(1, error)
            sums = test.features(torch.zeros(1))
            assert bool(test.passes(sums * needed, needed, error)[0])
            assert not bool(test.passes(sums * (needed - 1), needed - 1, error)[0])
            assert test.needed(needed, error) is None


def test_few_exact_tests_tell_how_many_are_needed(monkeypatch):
    made = []
    exact = verdicts.score_test
    monkeypatch.setattr(verdicts, "score_test", lambda *given: made.append(given) or exact(*given))
    needed = Test(Risk.named("accuracy gap"), 0.01, "auto").needed(100, 0.049)
    assert needed >= enough(0.01, 0.049)
    assert 1 <= len(made) <= 3


def test_groups_of_one_name_the_group():
    trace = replace(random_trace(500), groups=(torch.arange(500) == 0).long() * 4)
    with pytest.raises(Infeasible, match="Group 4 has 1 samples, too few"):
        calibrate(trace, min_agreement=0.9, confidence=0.9)


def test_what_cannot_be_promised_at_all():
    with pytest.raises(Infeasible, match="already where nobody leaves early the share of wrong"):
        calibrate(draw(1000, 6), min_accuracy=0.99, confidence=0.9)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"max_cost": 0.5}, "max_cost is about cost"),
        ({"max_accuracy_drop": 0.1, "confidence": 95}, "strictly between 0 and 1"),
        ({"max_accuracy_drop": 0.1, "confidence": "high"}, "or 'expectation', got 'high'"),
        (
            {"max_accuracy_drop": 0.1, "confidence": "expectation", "bound": "score"},
            "conformal risk control alone, which has no bound='score'",
        ),
        ({"max_accuracy_drop": 0.1, "bound": "bennett"}, "Unknown bound 'bennett'"),
        ({"max_accuracy_drop": 0.1, "bound": "clopper-pearson"}, "for losses of 0 or 1"),
        ({"min_agreement": 0.9, "bound": "score"}, "for losses of -1, 0 or 1"),
        ({"max_accuracy_drop": 0.1, "testing": "holm"}, "Unknown testing 'holm'"),
        ({"max_accuracy_drop": -0.1}, r"must lie in \[0, 1\), got -0.1"),
    ],
)
def test_promises_that_make_no_sense(more, text):
    with pytest.raises(PolicyError, match=text):
        calibrate(random_trace(200), **{"confidence": 0.9, **more})


@pytest.mark.parametrize("fit", ["temperatures", "ensemble", "gates"])
def test_nothing_is_promised_about_samples_that_fitted_the_criterion(fit):
    trace = draw(900, 8)
    fitting, calibration = trace.split(0.4)

    def fitted(on):
        if fit == "temperatures":
            return fit_temperatures(on).apply("margin")
        if fit == "ensemble":
            return fit_ensemble(on)
        return fit_gates(on, max_cost=0.6)

    goal = {"min_agreement": 0.8, "confidence": 0.9}
    with pytest.raises(TraceError, match="fitted on 540 of the 540 samples that the promise"):
        calibrate(calibration, fitted(calibration), **goal)
    # A few are alike there, since they are drawn with replacement.
    with pytest.raises(TraceError, match=r"fitted on 5[34]\d of the 540 samples that the promise"):
        calibrate(calibration, fitted(trace), **goal)
    some = trace.subset(torch.arange(trace.num_samples)[::3])
    with pytest.raises(TraceError, match=r"fitted on \d+ of the 540 samples"):
        calibrate(calibration, fitted(some), **goal)
    assert calibrate(calibration, fitted(fitting), **goal).provenance["promise"]


@pytest.mark.parametrize("testing", ["fixed-sequence", "bonferroni"])
@pytest.mark.parametrize("own_path", [False, True])
def test_the_two_ways_share_the_error(monkeypatch, testing, own_path):
    trace = random_trace(400)
    errors = []

    def watched(way):
        def run(*given):
            errors.append(given[-1])
            return way(*given)

        return run

    for name in ("walk", "down_the_path", "best_of_all"):
        monkeypatch.setattr(promise_module, name, watched(getattr(promise_module, name)))
    path = random_trace(300, seed=5) if own_path else None
    asked = Promise(Risk.named("disagreement"), 0.2, 0.9, testing=testing, path=path)
    promised(trace, Confidence(), asked)
    assert len(errors) == 2
    assert min(errors) > 0
    assert sum(errors) == pytest.approx(0.1)


def test_hoeffding_bentkus_claims_where_its_p_value_is_within_the_error():
    samples, error = 2000, 0.1
    test = Test(Risk.named("disagreement"), 0.05, "hoeffding-bentkus")
    losses = torch.arange(100)
    sums = torch.stack([losses.double(), torch.zeros(100).double()])
    p = hoeffding_bentkus(sums[0] / samples, samples, 0.05, 0.0, 1.0)
    assert bool(((p > error) & (p <= 2 * error)).any())  # where it matters
    assert torch.equal(test.passes(sums, samples, error), p <= error)


def test_bonferroni_divides_the_error_among_all_settings(monkeypatch):
    scored = score(random_trace(300), Confidence())
    settings = [torch.full((3,), level) for level in (torch.inf, 0.9, 0.6, 0.3)]
    path = Path(settings, scored, [torch.ones(300, dtype=torch.bool)])
    errors = []
    passing = Path.passing
    monkeypatch.setattr(Path, "passing", lambda *given: errors.append(given[-1]) or passing(*given))
    wrong = (scored.predictions != scored.predictions[-1]).double()
    best_of_all(path, Test(Risk.named("disagreement"), 0.2), wrong, 0.1)
    assert errors == [pytest.approx(0.1 / 4)]


def test_samples_are_told_apart_where_logits_tell():
    trace = draw(900, 8)
    one, other = trace.split(0.5)
    own = one.samples
    assert own.overlap(other) == 0
    assert own.overlap(one) == own.overlap(trace) == one.num_samples
    few = trace.subset(torch.randperm(900, generator=torch.Generator().manual_seed(1))[:40])
    assert own.overlap(few) == sum(
        any(torch.equal(a, b) for b in one.logits.unbind(1)) for a in few.logits.unbind(1)
    )


def test_samples_that_are_alike_are_not_taken_for_the_same():
    trace = draw(900, 8)
    coarse = replace(trace, logits=trace.logits.sign())  # a few different rows, many of each
    one, other = coarse.split(0.5)
    assert one.samples.overlap(other) == 0
    assert one.samples.overlap(one) == one.num_samples
    twice = trace.subset(torch.arange(900) // 2)  # each image comes two times in the data set
    one, other = twice.split(0.5)
    assert one.samples.overlap(other) == 0
    rows = torch.arange(900)
    blank = trace.subset(rows.where(rows >= 270, 0))  # a block of alike samples hides nothing
    some = blank.subset(rows[::2])
    assert some.samples.overlap(blank) > 300


def test_promises_need_labels_and_the_right_network():
    bare = replace(random_trace(200), labels=None)
    with pytest.raises(TraceError, match="needs labels"):
        calibrate(bare, max_accuracy_drop=0.1, confidence=0.9)
    assert calibrate(bare, min_agreement=0.7, confidence=0.9).provenance["promise"]
    with pytest.raises(TraceError, match="for the path has 3 exits, the calibration trace 4"):
        calibrate(
            random_trace(200), min_agreement=0.7, confidence=0.9, path=random_trace(99, exits=3)
        )
    with pytest.raises(TraceError, match="holds 200 of the 200 samples that the promise"):
        calibrate(random_trace(200), min_agreement=0.7, confidence=0.9, path=random_trace(200))
