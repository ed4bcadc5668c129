from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from offramp.errors import DataError
from offramp.zoo import cifar_resnet
from offramp.zoo.resnet import ResidualBlock


def parameters_by_hand(depth, width, channels, classes):
    n = (depth - 2) // 6
    total = 9 * channels * width + 2 * width
    before = width
    for group in (width, 2 * width, 4 * width):
        for block in range(n):
            total += 9 * (before if block == 0 else group) * group + 9 * group * group + 4 * group
        before = group
    return total + 4 * width * classes + classes


@pytest.mark.parametrize(
    ("depth", "width", "channels", "classes"), [(8, 16, 3, 10), (20, 16, 3, 10), (14, 6, 1, 4)]
)
def test_size_is_that_of_the_paper(depth, width, channels, classes):
    net = cifar_resnet(depth, classes, channels, width)
    found = sum(value.numel() for value in net.parameters())
    assert found == parameters_by_hand(depth, width, channels, classes)
    convolutions = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules())
    assert convolutions == depth
    assert net.eval()(torch.zeros(2, channels, 32, 32)).shape == (2, classes)


def test_resnet_20_has_the_parameters_that_the_paper_counts():
    found = sum(value.numel() for value in cifar_resnet(20).parameters())
    assert found == 269_722  # "0.27M", table 6


def test_keys_are_those_of_the_usual_checkpoints():
    keys = set(cifar_resnet(20).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer3.2.bn2.bias",
        "linear.weight",
    } <= keys
    assert not any("shortcut" in key or "downsample" in key for key in keys)


def test_the_shortcut_is_option_a():
    block = ResidualBlock(4, 8, 2).eval()
    nn.init.zeros_(block.bn2.weight)  # silences the branch: only the shortcut is left
    x = torch.rand(2, 4, 8, 8)
    expected = torch.zeros(2, 8, 4, 4)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_a_block_is_the_formula():
    block = ResidualBlock(4, 4, 1).eval()
    x = torch.randn(2, 4, 6, 6)
    y = functional.conv2d(x, block.conv1.weight, padding=1)
    y = functional.conv2d(torch.relu(y / (1 + 1e-5) ** 0.5), block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x), torch.relu(y / (1 + 1e-5) ** 0.5 + x))


def test_it_exports_with_a_dynamic_batch():
    net = cifar_resnet(8, width=4).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (torch.randn(3, 3, 16, 16),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(x), net(x))


def test_the_seed_makes_the_weights():
    torch.manual_seed(3)
    one = cifar_resnet(8)
    torch.manual_seed(3)
    assert torch.equal(one.linear.weight, cifar_resnet(8).linear.weight)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_depth_that_does_not_exist(depth):
    with pytest.raises(DataError, match=rf"6n \+ 2 .* got {depth}"):
        cifar_resnet(depth)


def test_sizes_must_be_positive():
    with pytest.raises(DataError, match="num_classes=0"):
        cifar_resnet(8, num_classes=0)
