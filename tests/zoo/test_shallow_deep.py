from __future__ import annotations

import copy
import math
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.nn import functional

import offramp
from offramp.decide.trace import Trace
from offramp.errors import DataError, HeadError, PlaceError, TraceError
from offramp.train.weights import exit_weights
from offramp.zoo.resnet import cifar_resnet
from offramp.zoo.shallow_deep import (
    SHARES,
    InternalClassifier,
    WideResNet,
    confusion,
    disagreement,
    mobilenet,
    sdn_mobilenet,
    sdn_resnet,
    sdn_vgg16,
    sdn_wide_resnet,
    shallow_deep,
    vgg16,
)
from offramp.zoo.shallow_deep.networks import SeparableBlock, WideBlock
from offramp.zoo.systems import system
from tests.traces import make_trace

# Behind which layers the authors' code has them; its MobileNet has five and so none to compare.
PLACES = {
    sdn_vgg16: ("conv2", "conv4", "conv6", "conv7", "conv9", "conv10"),
    sdn_resnet: ("layer1.3", "layer1.7", "layer2.2", "layer2.6", "layer3.1", "layer3.5"),
}


def weighted(network):
    """Layers with weights but for the shortcuts."""
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]


@pytest.mark.parametrize("build", [sdn_vgg16, sdn_resnet, sdn_wide_resnet, sdn_mobilenet])
def test_six_classifiers_at_the_shares_of_the_paper(build):
    model = build()
    assert model.num_exits == 7
    reached = [spent / model.costs.full for spent in accumulate(model.costs.stages)][:-1]
    assert reached == pytest.approx(SHARES, abs=0.05)
    assert model.places == PLACES.get(build, model.places)
    assert sum(model.costs.heads) < 0.01 * model.costs.full
    with torch.no_grad():
        shapes = {tuple(logits.shape) for logits in model.eval()(torch.randn(2, 3, 32, 32))}
    assert shapes == {(2, 10)}


@pytest.mark.parametrize("build", [sdn_vgg16, sdn_resnet, sdn_wide_resnet, sdn_mobilenet])
def test_what_a_classifier_sees_is_4_by_4_where_the_map_is_larger(build):
    model = build().eval()
    with torch.no_grad():
        features, _ = model.features(torch.randn(2, 3, 32, 32))
    for head, feature in zip(model.heads, features, strict=True):
        _, channels, side, _ = feature.shape
        assert head.linear.in_features == channels * min(side, 4) ** 2
        assert hasattr(head, "mix") == (side > 4)


def test_vgg16_has_thirteen_convolutions_and_three_linear_layers():
    layers = weighted(vgg16())
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 13 + [nn.Linear] * 3
    channels = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    assert [layer.out_channels for layer in layers[:13]] == channels
    convolutions = sum(9 * a * b for a, b in zip([3, *channels], channels, strict=False))
    assert convolutions == 14_710_464  # the weights of configuration D, as everybody counts them
    linear = 2 * (512 * 512 + 512) + 512 * 10 + 10
    found = sum(value.numel() for value in vgg16().parameters())
    assert found == convolutions + 2 * sum(channels) + linear


def test_wrn_32_4_has_the_depth_and_width_of_its_name():
    network = WideResNet()
    assert len(weighted(network)) == 32
    widths = [network.get_submodule(f"group{k}.4.conv2").out_channels for k in (1, 2, 3)]
    assert widths == [64, 128, 256]
    assert sum(isinstance(m, WideBlock) for m in network.modules()) == 15


def test_wrn_28_10_would_have_the_parameters_of_its_paper():
    # Their depth is 6n + 4, since two shortcuts count: 28 there is 26 here. "36.5M".
    found = sum(value.numel() for value in WideResNet(26, 10).parameters())
    assert found == 36_479_194


def test_mobilenet_has_28_layers_and_the_parameters_of_its_paper():
    network = mobilenet()
    assert len(weighted(network)) == 28
    assert sum(isinstance(m, SeparableBlock) for m in network) == 13
    assert sum(m.depthwise.stride == (2, 2) for m in network if isinstance(m, SeparableBlock)) == 4
    # With the classifier of ImageNet: "4.2 million", table 4.
    found = sum(value.numel() for value in mobilenet(1000).parameters())
    assert found == 4_231_976


def test_a_wide_block_is_the_formula():
    torch.manual_seed(0)
    block = WideBlock(3, 4, 2, 0.3).eval()
    x, unit = torch.randn(2, 3, 6, 6), 1 / (1 + 1e-5) ** 0.5
    y = functional.conv2d((x * unit).relu(), block.conv1.weight, stride=2, padding=1)
    y = functional.conv2d((y * unit).relu(), block.conv2.weight, padding=1)
    torch.testing.assert_close(
        block(x),
        y + block.shortcut.weight.flatten(1).matmul(x[:, :, ::2, ::2].flatten(2)).view(2, 4, 3, 3),
    )


@pytest.mark.parametrize(("side", "seen"), [(16, 4), (8, 4), (10, 5)])
def test_pooling_is_mixed_as_by_hand(side, seen):
    torch.manual_seed(0)
    head = InternalClassifier(2, side, 3)
    with torch.no_grad():
        head.mix.fill_(0.3)
    x = torch.randn(2, 2, side, side)
    window = side // seen
    mixed = torch.empty(2, 2, seen, seen)
    for row in range(seen):
        for column in range(seen):
            down, right = row * window, column * window
            part = x[:, :, down : down + window, right : right + window].flatten(2)
            mixed[:, :, row, column] = 0.3 * part.max(2).values + 0.7 * part.sum(2) / window**2
    expected = mixed.flatten(1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), expected)


def test_the_mix_is_learned():
    head = InternalClassifier(2, 8, 3)
    head(torch.randn(4, 2, 8, 8)).square().sum().backward()
    assert float(head.mix.grad) != 0


def test_weights_grow_from_little_to_the_share_of_the_cost():
    model = sdn_resnet(4, depth=20, width=4)
    (phase,) = system("sdn-vgg16").scheme.phases(7)
    stages = model.costs.stages
    rows = [exit_weights(phase.weights, 7, stage_costs=stages, epoch=k, epochs=5) for k in range(5)]
    shares = [spent / sum(stages) for spent in accumulate(stages)][:-1]
    assert rows[0] == pytest.approx([*[0.01] * 6, 1.0])
    assert rows[-1] == pytest.approx([*shares, 1.0])
    assert rows[2] == pytest.approx([*[(0.01 + share) / 2 for share in shares], 1.0])


def test_a_network_that_is_trained_keeps_its_weights_to_the_byte():
    torch.manual_seed(0)
    network = mobilenet(4, width=4)
    before = copy.deepcopy(network.state_dict())
    model = shallow_deep(network)
    heads = copy.deepcopy(model.heads.state_dict())
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)]
    adam = partial(torch.optim.Adam, lr=1e-3)
    offramp.fit(model, batches, scheme="heads", optimizer=adam, epochs=2, progress=False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(not torch.equal(heads[name], v) for name, v in model.heads.state_dict().items())


def disagreement_by_hand(trace, row):
    def softmax(values):
        powers = [math.exp(v - max(values)) for v in values]
        return [p / sum(powers) for p in powers]

    *inner, end = [softmax(trace.logits[k, row].tolist()) for k in range(trace.num_exits)]
    return sum(abs(p - q) for each in inner for p, q in zip(each, end, strict=True))


def test_confusion_is_the_formula():
    trace, reference = make_trace(samples=40, seed=1), make_trace(samples=50, seed=2)
    ours = [disagreement_by_hand(trace, row) for row in range(40)]
    usual = [disagreement_by_hand(reference, row) for row in range(50)]
    assert disagreement(trace).tolist() == pytest.approx(ours)
    mean = sum(usual) / 50
    deviation = (sum((value - mean) ** 2 for value in usual) / 50) ** 0.5
    expected = [(value - mean) / deviation for value in ours]
    assert confusion(trace, reference).tolist() == pytest.approx(expected)


def test_confusion_is_higher_where_the_answer_is_wrong():
    trace, reference = make_trace(samples=2000, seed=1), make_trace(samples=500, seed=2)
    wrong = trace.logits[-1].argmax(1) != trace.labels
    scores = confusion(trace, reference)
    assert scores[wrong].mean() > scores[~wrong].mean() + 0.3


def test_confusion_says_what_it_cannot_do():
    trace = make_trace(samples=20)
    with pytest.raises(TraceError, match="4 exits and 5 classes, the reference 3 and 5"):
        confusion(trace, trace.keep_exits([0, 1]))
    same = Trace(torch.ones(3, 5, 2), None, torch.ones(3), torch.zeros(3))
    with pytest.raises(TraceError, match="disagree by 0 on each of the 5 reference"):
        confusion(same, same)
    alike = Trace(trace.logits[:, :1].repeat(1, 7, 1), None, trace.stage_costs, trace.head_costs)
    assert float(disagreement(alike).std(correction=0)) > 0  # by rounding alone
    with pytest.raises(TraceError, match="on each of the 7 reference"):
        confusion(trace, alike)


def test_what_is_no_network_is_refused():
    with pytest.raises(DataError, match=r"6n \+ 2 .* got 28"):
        WideResNet(28)
    with pytest.raises(DataError, match="width=0"):
        vgg16(width=0)
    with pytest.raises(DataError, match="num_classes=0"):
        mobilenet(0)
    with pytest.raises(PlaceError, match="6 exits were asked for"):
        shallow_deep(WideResNet(8, 1, 4, 4))


def test_grey_images_and_networks_that_it_does_not_take():
    grey = cifar_resnet(20, 4, in_channels=1, width=4)
    model = shallow_deep(grey, channels=1).eval()
    assert [tuple(z.shape) for z in model(torch.randn(3, 1, 32, 32))] == [(3, 4)] * 7
    with pytest.raises(DataError, match=r"images \(2, 3, 32, 32\) with RuntimeError: .* channels="):
        shallow_deep(grey)
    layers = [nn.Linear(192, 192) for _ in range(10)]
    with pytest.raises(HeadError, match=r"yields \(2, 192\); an internal classifier reads square"):
        shallow_deep(nn.Sequential(nn.Flatten(), *layers, nn.Linear(192, 4)), size=8)
