"""From recorded logits to a plan, by hand."""

from __future__ import annotations

import pytest
import torch

from offramp.decide.criteria import Confidence
from offramp.places.dense import attach_densely
from offramp.places.features import HeldOut
from offramp.places.judging import Terms, judged
from tests.networks import example_of, make


def held_out(dense, samples=400):
    """Candidates at later places are right more often, and surer where they are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (samples,), generator=generator)
    hard = torch.rand(samples, generator=generator)
    logits = []
    for candidate in [*dense.candidates, None]:
        accuracy = 0.95 if candidate is None else 0.5 + 0.1 * candidate.place
        said = torch.where(hard < accuracy, labels, (labels + 1) % 4)
        sure = 0.5 + 5 * (1 - hard)
        logits.append(torch.nn.functional.one_hot(said, 4) * sure[:, None])
    return HeldOut(torch.stack(logits), labels)


@pytest.fixture(scope="module")
def dense():
    return attach_densely(make("mlp"), example_of("mlp"))


def test_what_the_exits_do_is_what_a_loop_over_fresh_samples_says(dense):
    held = held_out(dense)
    plan = judged(dense, held, Terms((0.0, 0.02), 0.01, None, Confidence(), seed=3))
    assert plan.exits
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    fresh = order[200:]
    assert plan.samples[1:] == (200, 200)
    chosen = [
        next(
            k
            for k, c in enumerate(dense.candidates)
            if dense.model.places[c.place] == exit.place and c.name == exit.head
        )
        for exit in plan.planned
    ]
    costs = dense.model.costs
    for point in plan.operating:
        spent, right, left = 0.0, 0, [0] * (len(chosen) + 1)
        for n in fresh.tolist():
            heads = 0.0
            for position, k in enumerate([*chosen, len(dense.candidates)]):
                last = position == len(chosen)
                place = len(costs.stages) - 1 if last else dense.candidates[k].place
                heads += 0.0 if last else dense.candidates[k].macs
                z = held.logits[k, n]
                if last or float(z.softmax(0).max()) >= point.thresholds[position]:
                    spent += (sum(costs.stages[: place + 1]) + heads) / costs.full
                    right += int(z.argmax() == held.labels[n])
                    left[position] += 1
                    break
        assert point.cost_ratio == pytest.approx(spent / 200)
        assert point.accuracy == pytest.approx(right / 200)
        assert point.shares == pytest.approx([count / 200 for count in left])
    assert plan.trained == tuple(dense.candidates[k].head for k in chosen)


def test_what_pays_by_chance_where_it_is_chosen_does_not_stay(dense):
    """On fresh samples the exits are turned into guesses: then the plan is that none pays."""
    held = held_out(dense)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(3))
    fresh = order[200:]
    noise = torch.randn(len(dense.candidates), 200, 4, generator=torch.Generator().manual_seed(1))
    held.logits[:-1, fresh] = 3 * noise
    plan = judged(dense, held, Terms((0.0, 0.02), 0.01, None, Confidence(), seed=3))
    assert plan.exits == ()
    assert plan.operating == ()
    assert plan.value_fresh == plan.without
    assert plan.verdict.startswith("No exit pays. The best found, blocks.")
