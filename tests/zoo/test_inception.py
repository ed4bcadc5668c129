from __future__ import annotations

import copy
import json

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import offramp
from benchmarks.vision_packages import prepare
from offramp.errors import DataError
from offramp.train.weights import exit_weights
from offramp.zoo.inception import AuxiliaryClassifier, GoogLeNet, inception_v1, load_torchvision
from offramp.zoo.systems import system


@pytest.fixture(scope="module")
def rival():
    """torchvision's network with weights and statistics that are far from their defaults."""
    prepare()
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    torch.manual_seed(1)
    net = models.googlenet(num_classes=7, aux_logits=True, init_weights=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def model():
    return inception_v1(7, kernel=3).eval()


@pytest.mark.parametrize("size", [64, 96])
def test_all_logits_are_torchvisions(rival, model, size):
    load_torchvision(model, rival.state_dict())
    x = torch.randn(2, 3, size, size)
    rival.training = True  # of the outermost module alone: it decides whether auxiliaries run
    with torch.no_grad():
        expected = rival(x)
        found = model(x)
    rival.training = False
    ordered = (expected.aux_logits1, expected.aux_logits2, expected.logits)
    for ours, theirs in zip(found, ordered, strict=True):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_without_auxiliary_classifiers_leave_the_heads(rival, model):
    state = {k: v + 1 for k, v in rival.state_dict().items() if not k.startswith("aux")}
    heads = copy.deepcopy(model.heads.state_dict())
    load_torchvision(model, state)
    assert torch.equal(model.backbone.fc.bias, state["fc.bias"])
    assert all(torch.equal(heads[k], v) for k, v in model.heads.state_dict().items())


def test_weights_of_another_network_are_refused(rival, model):
    state = dict(rival.state_dict())
    with pytest.raises(DataError, match=r"backbone\.inception3a\.branch3\.1\.conv\.weight"):
        load_torchvision(inception_v1(7, size=64), state)
    state.pop("aux1.fc2.bias")
    with pytest.raises(DataError, match=r"'heads\.0\.fc2\.bias', expected \(7,\), got nothing"):
        load_torchvision(model, state)


def test_channels_are_those_of_table_1():
    net = GoogLeNet()
    outputs = {"3a": 256, "3b": 480, "4a": 512, "4b": 512, "4c": 512, "4d": 528, "4e": 832}
    outputs |= {"5a": 832, "5b": 1024}
    for name, channels in outputs.items():
        assert net.get_submodule(f"inception{name}").out_channels == channels
    assert net.inception3a.branch3[1].conv.kernel_size == (5, 5)


def test_an_auxiliary_classifier_is_that_of_section_5():
    head = AuxiliaryClassifier(512, 10).eval()
    assert head.dropout.p == 0.7
    x = torch.randn(2, 512, 8, 8)
    y = functional.avg_pool2d(x, 2)
    y = functional.conv2d(y, head.conv.conv.weight) / (1 + 1e-3) ** 0.5
    y = functional.linear(y.relu().flatten(1), head.fc1.weight, head.fc1.bias).relu()
    torch.testing.assert_close(head(x), functional.linear(y, head.fc2.weight, head.fc2.bias))


def test_the_auxiliary_losses_count_0_3():
    scheme = system("inception-v1").scheme
    assert exit_weights(scheme.phases(3)[0].weights, 3) == (0.3, 0.3, 1.0)


@pytest.mark.slow
def test_exported_without_early_exits_there_is_no_trace_of_the_heads(tmp_path):
    torch.manual_seed(0)
    net = inception_v1(5, size=64, width=1 / 16).eval()
    offramp.export(net, offramp.Policy.final(), torch.randn(2, 3, 64, 64), tmp_path / "net")
    graph = onnx.load(str(tmp_path / "net" / "model.onnx")).graph
    shapes = [tuple(value.dims) for value in graph.initializer]
    assert (5, 1024) not in shapes  # the last layer of a head
    assert (1024, 5) not in shapes
    assert "heads" not in json.dumps([value.name for value in graph.initializer])
    own = sum(value.numel() for value in net.backbone.parameters())
    written = sum(torch.Size(dims).numel() for dims in shapes)
    assert written < 1.1 * own + 2000


def test_what_is_too_small_is_refused():
    with pytest.raises(DataError, match="size of 33 or more, got 32"):
        inception_v1(size=32)
    with pytest.raises(DataError, match="kernel=4"):
        GoogLeNet(kernel=4)
    with pytest.raises(DataError, match="at least 1/16"):
        GoogLeNet(width=0.01)
