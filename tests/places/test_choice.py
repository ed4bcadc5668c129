"""The choice of a subset, against every subset by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from offramp.decide.criteria import Confidence
from offramp.decide.scored import score
from offramp.decide.trace import Trace
from offramp.places import choice
from offramp.places.choice import Judge, choose

DROPS = (0.0, 0.01, 0.03)


def trace_of(accuracies, stages, heads, samples=601, classes=4, seed=0):
    """Exits that are right on a share of the samples, and surer where they are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    hard = torch.rand(samples, generator=generator)
    logits = []
    for accuracy in accuracies:
        noise = 0.15 * torch.randn(samples, generator=generator)
        right = hard + noise < accuracy
        said = torch.where(right, labels, (labels + 1) % classes)
        sure = 1 + 4 * (1 - hard) + 0.5 * torch.randn(samples, generator=generator)
        logits.append(torch.nn.functional.one_hot(said, classes) * sure[:, None])
    return Trace(
        torch.stack(logits),
        labels,
        torch.tensor(stages, dtype=torch.float64),
        torch.tensor([*heads, 0.0], dtype=torch.float64),
        source="held out",
    )


# Three places; two sizes of head at the first and at the last.
GROUPS = (0, 0, 1, 2, 2)
STAGES = (2.0, 0.0, 3.0, 2.0, 0.0, 3.0)
HEADS = (0.1, 0.4, 0.2, 0.1, 0.6)
ACCURACIES = (0.5, 0.62, 0.75, 0.8, 0.88, 0.92)


def judge_of(seed=0, groups=GROUPS, **settings):
    trace = trace_of(ACCURACIES, STAGES, HEADS, seed=seed, **settings)
    return trace, Judge(trace, score(trace, Confidence()), groups, DROPS)


def by_hand(trace, subset, drops=DROPS):
    """Sample by sample and threshold by threshold, with numpy."""
    full, labels = trace.full_cost, trace.labels.numpy()
    probs = trace.logits.softmax(-1)
    sure, said = probs.max(-1).values.numpy(), probs.argmax(-1).numpy()
    pool = np.sort(sure[:-1].ravel())
    marks = torch.linspace(0, len(pool) - 1, choice.GRID - 1, dtype=torch.float64).long().numpy()
    curve = []
    for threshold in [*pool[marks], math.inf]:
        spent, right = 0.0, 0
        for n in range(trace.num_samples):
            paid = 0.0
            for k in range(trace.num_exits):
                paid += float(trace.stage_costs[k])
                last = k == trace.num_exits - 1
                if not last and k not in subset:
                    continue
                paid += float(trace.head_costs[k])
                if last or sure[k, n] >= threshold:
                    right += said[k, n] == labels[n]
                    break
            spent += paid / full
        curve.append((spent / trace.num_samples, right / trace.num_samples))
    full_accuracy = float((said[-1] == labels).mean())
    commonest = np.bincount(labels).max() / len(labels)
    found = []
    for drop in drops:
        floor, options = full_accuracy - drop, [1 - drop / (full_accuracy - commonest)]
        for (c0, a0), (c1, a1) in itertools.pairwise([(math.nan, -1.0), *curve]):
            if a1 >= floor - 1e-12:
                options.append(c1)
                if -1.0 < a0 < floor - 1e-12:
                    options.append(c0 + (floor - a0) / (a1 - a0) * (c1 - c0))
        found.append(min(options))
    return found


def subsets(groups):
    for size in range(len(set(groups)) + 1):
        for subset in itertools.combinations(range(len(groups)), size):
            if len({groups[k] for k in subset}) == size:
                yield subset


@pytest.mark.parametrize("subset", [(), (0,), (1, 2), (0, 3), (1, 2, 4)])
def test_costs_are_those_by_hand(subset):
    trace, judge = judge_of(samples=203)
    assert judge.costs(subset) == pytest.approx(by_hand(trace, subset), abs=1e-9)
    assert judge.value(subset) == pytest.approx(np.mean(judge.costs(subset)))


def test_every_subset_is_looked_at_once_and_no_place_twice():
    _, judge = judge_of()
    seen = judge.all(range(5), 5)
    assert sorted(seen) == sorted(subsets(GROUPS))
    assert all(value == pytest.approx(judge.value(subset)) for subset, value in seen.items())
    assert set(judge.all(range(5), 1)) == {s for s in seen if len(s) <= 1}
    assert set(judge.all([0, 3], 5)) == {(), (0,), (3,), (0, 3)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("worth", [0.0, 0.01, 0.05])
def test_the_best_subset_is_that_of_brute_force(seed, worth):
    trace, judge = judge_of(seed, samples=97)
    values = {subset: float(np.mean(by_hand(trace, subset))) for subset in subsets(GROUPS)}
    found = choose(judge, worth)
    best = min(value + worth * len(subset) for subset, value in values.items())
    assert values[found.subset] + worth * len(found.subset) == pytest.approx(best)
    assert found.exact
    assert found.tried == len(values)
    for k in found.subset:  # each brings what it has to
        rest = tuple(other for other in found.subset if other != k)
        assert values[rest] - values[found.subset] >= worth - 1e-9


def test_exits_at_most():
    _, judge = judge_of()
    assert len(choose(judge, 0.0).subset) > 1
    one = choose(judge, 0.0, most=1).subset
    assert judge.value(one) == min(judge.value((k,)) for k in range(5))


def test_one_by_one_changes_find_what_brute_force_finds(monkeypatch):
    for seed in range(4):
        _, judge = judge_of(seed)
        exact = choose(judge, 0.01)
        with monkeypatch.context() as patch:
            patch.setattr(choice, "EXACT", 3)
            found = choose(judge, 0.01)
        assert not found.exact
        assert found.subset == exact.subset


def test_exits_that_know_nothing_are_not_taken():
    trace = trace_of((0.0, 0.0, 0.9), (3.0, 3.0, 4.0), (0.1, 0.1), samples=1001)
    generator = torch.Generator().manual_seed(1)
    logits = trace.logits.clone()
    logits[:2] = torch.randn(2, 1001, 4, generator=generator)
    trace = Trace(logits, trace.labels, trace.stage_costs, trace.head_costs, source="held out")
    found = choose(Judge(trace, score(trace, Confidence()), (0, 1), DROPS), 0.01)
    assert found.subset == ()
    assert found.best != ()


def test_guessing_costs_what_is_left_to_compute():
    """At a drop, a share of the samples can be answered with the commonest class for nothing."""
    trace, judge = judge_of()
    full = float((trace.logits[-1].argmax(1) == trace.labels).double().mean())
    commonest = float(trace.labels.bincount().max()) / trace.num_samples
    assert judge.costs(()) == pytest.approx([1 - drop / (full - commonest) for drop in DROPS])


def test_candidates_may_be_thousands():
    places = 1200
    accuracies = [0.5] * places + [0.9]
    trace = trace_of(accuracies, [1.0] * (places + 1), [0.0] * places, samples=20)
    judge = Judge(trace, score(trace, Confidence()), tuple(range(places)), DROPS)
    assert len(judge.all([3, 1100], 2)) == 4


def test_thresholds_do_not_follow_the_default_type():
    trace, judge = judge_of()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = Judge(trace, score(trace, Confidence()), GROUPS, DROPS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(again.reach, judge.reach)
