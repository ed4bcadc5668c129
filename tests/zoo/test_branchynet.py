from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import offramp
from offramp.decide.monitor import Monitor
from offramp.decide.policy import replay
from offramp.errors import Infeasible, TraceError
from offramp.zoo.branchynet import b_alexnet, b_lenet, b_resnet, screen, screen_all
from tests.traces import make_trace


def layers(module):
    return [type(m).__name__ for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("build", "main", "branches", "places"),
    [
        (b_lenet, (3, 2), [(1, 1)], ("pool1",)),
        (b_alexnet, (5, 3), [(2, 1), (1, 1)], ("norm1", "norm2")),
        (b_resnet, (109, 1), [(3, 1), (2, 1)], ("layer1.0.conv1", "layer1.17")),
    ],
)
def test_layers_and_places_are_the_papers(build, main, branches, places):
    model = build()
    found = [
        (layers(part).count("Conv2d"), layers(part).count("Linear"))
        for part in (model.backbone, *model.heads)
    ]
    assert found == [main, *branches]
    assert model.places == places


def test_the_second_branch_of_resnet_110_stands_behind_the_37th_convolution():
    model = b_resnet(110)
    before = [
        name
        for k in (0, 1)
        for name, module in model.stage_modules(k)
        if isinstance(module, nn.Conv2d)
    ]
    assert len(before) == 37


def test_lenet_is_the_formula():
    torch.manual_seed(0)
    model = b_lenet().eval()
    net, x = model.backbone, torch.randn(3, 1, 28, 28)
    y = functional.conv2d(x, net.conv1.weight, net.conv1.bias, padding=3)
    branch = functional.max_pool2d(y, 2).relu()
    branch = functional.conv2d(branch, model.heads[0][0].weight, model.heads[0][0].bias, padding=1)
    branch = functional.max_pool2d(branch, 2, ceil_mode=True).relu().flatten(1)
    for layer in (net.conv2, net.conv3):
        y = functional.max_pool2d(y, 2, ceil_mode=True).relu()
        y = functional.conv2d(y, layer.weight, layer.bias, padding=3)
    y = functional.max_pool2d(y, 2, ceil_mode=True).relu().flatten(1)
    early, late = model(x)
    torch.testing.assert_close(early, model.heads[0][3](branch))
    torch.testing.assert_close(late, net.classifier(net.hidden(y)))


def test_response_normalisation_is_krizhevskys():
    response = b_alexnet().backbone.norm1[2]
    x = torch.rand(1, 4, 2, 2)
    expected = torch.empty_like(x)
    for c in range(4):
        near = x[:, max(c - 1, 0) : c + 2].square().sum(1)
        expected[:, c] = x[:, c] / (2.0 + 5e-5 * near) ** 0.75
    torch.testing.assert_close(response(x), expected)


def by_hand(trace, nats):
    """Accuracy and shares of one combination, sample by sample."""
    right, taken = 0, [0] * trace.num_exits
    for n in range(trace.num_samples):
        for k in range(trace.num_exits):
            p = trace.logits[k, n].double().softmax(0)
            entropy = -sum(float(v) * math.log(float(v)) for v in p if v > 0)
            if k == trace.num_exits - 1 or entropy <= nats[k]:
                right += int(p.argmax() == trace.labels[n])
                taken[k] += 1
                break
    return right / trace.num_samples, [t / trace.num_samples for t in taken]


def test_screening_tries_every_combination():
    trace = make_trace(samples=60)
    grid = (0.05, 0.4, 1.0)
    rows = screen_all(trace, grid)
    assert [row.nats for row in rows] == list(itertools.product(grid, repeat=trace.num_exits - 1))
    for row in rows[:: max(1, len(rows) // 5)]:
        accuracy, shares = by_hand(trace, row.nats)
        assert row.accuracy == pytest.approx(accuracy)
        assert list(row.shares) == pytest.approx(shares)


def test_the_cheapest_that_loses_little_is_chosen():
    trace = make_trace(samples=200)
    grid = (0.01, 0.3, 1.5)
    full = float((trace.logits[-1].argmax(1) == trace.labels).double().mean())
    policy = screen(trace, max_accuracy_drop=0.05, grid=grid)
    allowed = [r for r in screen_all(trace, grid) if r.accuracy >= full - 0.05]
    cheapest = min(allowed, key=lambda r: (r.cost, -r.accuracy))
    achieved = policy.provenance["achieved"]
    assert achieved["cost_ratio"] == pytest.approx(cheapest.cost)
    assert achieved["cost"] == pytest.approx(cheapest.cost * trace.full_cost)
    assert achieved["accuracy"] == pytest.approx(cheapest.accuracy)
    assert achieved["shares"] == pytest.approx(list(cheapest.shares))
    assert tuple(-t for t in policy.thresholds) in {r.nats for r in allowed}
    assert offramp.Policy.from_json(policy.to_json()).thresholds == policy.thresholds
    assert "screened on 200 samples" in policy.describe()


def test_what_is_screened_is_known_again_and_watched():
    trace = make_trace(samples=200)
    policy = screen(trace, max_accuracy_drop=0.05, grid=(0.01, 0.3, 1.5))
    assert policy.provenance["method"] == "screening"
    assert policy.provenance["combinations"] == 27
    with pytest.warns(UserWarning, match="100% of the samples that the policy was calibrated on"):
        offramp.evaluate(trace, policy)
    decided = replay(trace, policy)
    watch = Monitor(policy).observe(decided.score, decided.exit)
    assert watch.shares == pytest.approx(watch.expected)


def test_screening_says_what_it_cannot_do():
    trace = make_trace(samples=50)
    trace.labels.copy_(trace.logits[-1].argmax(1))
    trace.logits[0] = -trace.logits[-1] * 50  # sure and wrong
    with pytest.raises(Infeasible, match="combinations lose more than 0; the best") as caught:
        screen(trace, grid=(3.0,))
    assert isinstance(caught.value.best, offramp.Policy)
    object.__setattr__(trace, "source", "training")
    with pytest.raises(TraceError, match="training never saw"):
        screen(trace)
