from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

import offramp
from offramp.decide.policy import replay
from offramp.errors import DataError, PlaceError
from offramp.train.weights import exit_weights
from offramp.zoo.msdnet import ANYTIME, BUDGETED, Classifier, MSDNet, msdnet
from offramp.zoo.msdnet.network import DenseNode
from offramp.zoo.systems import system
from tests.traces import make_trace


def layers_of(network):
    """For each layer, its nodes by scale; transitions and the first column left out."""
    columns = [{int(name[-1]): node for name, node in c.items()} for c in network.columns]
    return [c for c in columns[1:] if isinstance(next(iter(c.values())), DenseNode)]


@pytest.mark.parametrize(
    ("steps", "behind"),
    [(BUDGETED, [1, 3, 6, 10, 15]), (ANYTIME, [4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24])],
)
def test_classifiers_stand_behind_the_layers_of_the_paper(steps, behind):
    model = msdnet(10, steps)
    assert list(accumulate(steps)) == behind
    assert model.num_exits == len(behind)
    layers = layers_of(model.backbone)
    coarsest = [model.backbone.get_submodule(place) for place in model.backbone.places]
    assert [next(n for n, at in enumerate(layers, 1) if at[2] is c) for c in coarsest] == behind
    assert model.places == model.backbone.places[:-1]
    with torch.no_grad():
        logits = model.eval()(torch.randn(2, 3, 32, 32))
    assert {tuple(each.shape) for each in logits} == {(2, 10)}


@pytest.mark.parametrize("steps", [BUDGETED, ANYTIME])
def test_a_scale_is_left_out_after_each_third(steps):
    depth = sum(steps)
    scales = [sorted(layer) for layer in layers_of(MSDNet(steps))]
    assert scales == [[0, 1, 2]] * (depth // 3) + [[1, 2]] * (depth // 3) + [[2]] * (depth // 3)


def test_channels_grow_by_6_12_24_and_are_halved_between_the_thirds():
    network = MSDNet(BUDGETED)
    given = [layer[2].same[0][0].in_channels for layer in layers_of(network)]
    expected, channels = [], 64
    for layer in range(15):
        if layer in (5, 10):
            channels //= 2
        expected.append(channels)
        channels += 24
    assert given == expected
    assert network.channels == tuple(expected[n - 1] + 24 for n in (1, 3, 6, 10, 15))
    first = layers_of(network)[0]
    assert [node.same[1][0].out_channels for node in first.values()] == [6, 6, 12]
    assert [node.down and node.down[1][0].out_channels for node in first.values()] == [None, 6, 12]


def parameters_by_hand(steps, classes):
    """Weights of convolutions, two numbers a channel for normalisation, the linear layer."""
    depth, channels, total = sum(steps), [16, 32, 64], 0

    def conv(a, b, kernel):
        return kernel * kernel * a * b + 2 * b

    def path(read, scale, new):
        inner = min(read, 2**scale * new)
        return conv(read, inner, 1) + conv(inner, new, 3)

    total += conv(3, 16, 3) + conv(16, 32, 3) + conv(32, 64, 3)
    for layer in range(depth):
        start = layer // (depth // 3)
        dropped = layer > 0 and start > (layer - 1) // (depth // 3)
        if dropped:
            total += sum(conv(channels[s], channels[s] // 2, 1) for s in range(start - 1, 3))
            channels = [c // 2 for c in channels]
        for scale in range(start, 3):
            new = 6 * 2**scale
            if scale > start or dropped:
                total += path(channels[scale - 1], scale - 1, new // 2)
                new //= 2
            total += path(channels[scale], scale, new)
        channels = [c + 6 * 2**s for s, c in enumerate(channels)]
    return total + conv(channels[2], 128, 3) + conv(128, 128, 3) + 128 * classes + classes


@pytest.mark.parametrize("steps", [BUDGETED, ANYTIME])
def test_size_is_that_of_the_formula(steps):
    found = sum(value.numel() for value in MSDNet(steps, 7).parameters())
    assert found == parameters_by_hand(steps, 7)


def test_lazily_computed_is_column_by_column():
    torch.manual_seed(0)
    model = msdnet(4, (1, 2, 3), width=4, growth=2).eval()
    network, x = model.backbone, torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        known, x0 = {}, x
        for scale in range(3):
            x0 = known[scale] = network.columns[0][f"scale{scale}"](x0)
        expected = []
        for number, column in enumerate(network.columns[1:], 1):
            made = {}
            for name, node in column.items():
                scale = int(name[-1])
                if getattr(node, "down", None) is not None:
                    made[scale] = node(known[scale], known[scale - 1])
                else:
                    made[scale] = node(known[scale])
            known = made
            if f"columns.{number}.scale2" in network.places:
                expected.append(known[2])
        heads = [*model.heads, network.classifier]
        for logits, head, feature in zip(model(x), heads, expected, strict=True):
            torch.testing.assert_close(logits, head(feature))


def test_an_early_classifier_costs_nothing_that_it_does_not_need():
    model = msdnet()
    first = {name.rsplit(".", 1)[0] for name, _ in model.stage_modules(0)}
    assert {".".join(name.split(".")[:3]) for name in first} == {
        "columns.0.scale0", "columns.0.scale1", "columns.0.scale2", "columns.1.scale2",
    }  # fmt: skip
    # The second stands behind layer 3: of layer 2 it needs two scales, of layer 1 all.
    second = {".".join(name.split(".")[:3]) for name, _ in model.stage_modules(1)}
    assert second == {
        "columns.1.scale0", "columns.1.scale1", "columns.2.scale1", "columns.2.scale2",
        "columns.3.scale2",
    }  # fmt: skip
    # From the images, between scales, then both paths of one node; pixels times weights.
    macs = 1024 * 27 * 16 + 256 * 144 * 32 + 64 * 288 * 64
    macs += 256 * 32 * 24 + 64 * 9 * 24 * 12 + 64 * 64 * 48 + 64 * 9 * 48 * 12
    assert model.costs.stages[0] == macs


def test_a_node_is_the_formula():
    torch.manual_seed(0)
    node = DenseNode(6, 4, 4, 3, 2).eval()
    same, finer, unit = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 8, 8), 1 / (1 + 1e-5) ** 0.5

    def path(x, part, stride):
        x = (functional.conv2d(x, part[0][0].weight) * unit).relu()
        return (functional.conv2d(x, part[1][0].weight, stride=stride, padding=1) * unit).relu()

    assert node.down[0][0].out_channels == 3  # no wider than what it reads
    assert node.same[0][0].out_channels == 6
    expected = torch.cat([same, path(finer, node.down, 2), path(same, node.same, 1)], 1)
    torch.testing.assert_close(node(same, finer), expected)


def test_a_classifier_is_that_of_the_paper():
    head = Classifier(5, 3)
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size, m.stride, m.out_channels) for m in convolutions] == [
        ((3, 3), (2, 2), 128)
    ] * 2
    assert head.eval()(torch.randn(2, 5, 8, 8)).shape == (2, 3)


def test_all_exits_count_the_same():
    (phase,) = system("msdnet").scheme.phases(5)
    assert exit_weights(phase.weights, 5) == (1.0,) * 5


@pytest.mark.parametrize("budget", [0.45, 0.7, 0.9])
def test_a_budgeted_batch_leaves_in_geometric_shares(budget):
    trace = make_trace(samples=4000)
    policy = offramp.calibrate(trace, method="geometric", max_cost=budget)
    done = replay(trace, policy)
    assert float(done.cost.mean()) / trace.full_cost == pytest.approx(budget, abs=2e-3)
    assert float(done.cost.mean()) <= budget * trace.full_cost
    counts = torch.bincount(done.exit, minlength=trace.num_exits).tolist()
    # q from the two largest; every count is then n q^k / (q^0 + q^1 + ...), but for rounding.
    ends = (counts[1] / counts[0], counts[-1] / counts[-2])
    q = ends[0] if counts[0] > counts[-1] else ends[1]
    powers = [q**k for k in range(len(counts))]
    assert counts == pytest.approx([4000 * p / sum(powers) for p in powers], abs=4)


def test_the_surest_of_those_that_are_left_leave():
    trace = make_trace(samples=1000)
    policy = offramp.calibrate(trace, method="geometric", max_cost=0.6)
    done = replay(trace, policy)
    scores = trace.logits.softmax(2).amax(2)
    for k in range(trace.num_exits - 1):
        stayed = done.exit > k
        assert scores[k, done.exit == k].min() >= scores[k, stayed].max()


def test_the_recipe_chooses_geometric_shares():
    policy = system("msdnet").choose(make_trace(), 0.02)
    assert policy.provenance["method"] == "geometric"


def test_at_any_time_each_exit_answers_in_turn():
    torch.manual_seed(0)
    model = msdnet(4, (1, 2), width=4, growth=2).eval()
    x = torch.randn(4, 3, 32, 32)
    runner = offramp.Runner(model, offramp.Policy("confidence", [0.5]), x)
    with torch.no_grad():
        expected = model(x).logits
    for answer, logits in zip(runner.anytime(x), expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(answer.logits), logits, rtol=0, atol=1e-5)


def test_costs_rise_from_exit_to_exit():
    for steps in (BUDGETED, ANYTIME):
        assert all(a < b for a, b in pairwise(msdnet(10, steps).costs.cumulative()))


@pytest.mark.parametrize("steps", [(1, 1), (3, 0, 2), ()])
def test_steps_that_make_no_network(steps):
    with pytest.raises(DataError, match="3 layers or more"):
        MSDNet(steps)


def test_what_makes_no_exits_is_refused():
    with pytest.raises(DataError, match="growth=0"):
        MSDNet(BUDGETED, growth=0)
    with pytest.raises(PlaceError, match="expected at least one place"):
        msdnet(10, (3,))
