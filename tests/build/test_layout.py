"""Channels first or last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.build.cost import profile
from offramp.build.layout import channel_use, channels_last, find_layout, layout_of
from offramp.build.model import attach
from offramp.build.prototypes import PrototypeHead
from offramp.errors import HeadError


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 7), "NC"),
        ((2, 9, 32), "NLC"),
        ((2, 16, 8, 8), "NCHW"),
        ((2, 8, 8, 16), "NHWC"),
        ((2, 3, 8, 6), "NCHW"),
        ((2, 16, 4, 8, 8), "NCTHW"),
        ((2, 4, 8, 8, 16), "NTHWC"),
    ],
)
def test_layout_by_shape(shape, layout):
    assert layout_of(shape) == layout


@pytest.mark.parametrize(
    ("module", "shape", "last"),
    [
        (nn.Conv2d(8, 4, 1), (2, 8, 8, 8), False),
        (nn.BatchNorm2d(8), (2, 8, 6, 5), False),
        (nn.GroupNorm(2, 8), (2, 8, 8, 8), False),
        (nn.Linear(8, 4), (2, 8, 8, 8), True),
        (nn.LayerNorm(8), (2, 8, 8, 8), True),
        (nn.LSTM(8, 4, batch_first=True), (2, 5, 8), True),
        (nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8), True),
    ],
)
def test_what_a_module_says_of_its_input(module, shape, last):
    use = channel_use(module, shape, 7)
    assert use is not None
    assert use.last is last
    assert use.value == 7


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.ReLU(), (2, 8, 8)), (nn.Linear(8, 4), (2, 8)), (nn.Linear(8, 4), (2, 5, 6, 7))],
)
def test_what_says_nothing(module, shape):
    assert channel_use(module, shape, 0) is None


class Alternating(nn.Module):
    """A picture whose sides are as long as it has channels: the shape cannot tell the layout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.back, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
        self.turn, self.turn_back = Permute(0, 2, 3, 1), Permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.turn(self.stem(x)))
        return self.fc(self.back(self.turn_back(x)).mean((2, 3)))


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.order) * 1


def test_the_next_module_knows_best():
    found = profile(Alternating(), (torch.randn(2, 3, 8, 8),))
    layouts = {c.path: find_layout(found, c) for c in found.calls if c.path in ("turn", "mid")}
    # Nobody takes "mid" as it stands: the linear layer that made it tells.
    assert layouts == {"turn": "NHWC", "mid": "NHWC"}
    turned = found.calls_of("turn_back")[0]
    assert find_layout(found, turned) == "NCHW"


def test_given_layouts():
    assert channels_last("NHWC", 4)
    assert not channels_last("NCTHW", 5)
    with pytest.raises(HeadError, match="Unknown layout 'NHWZ'. Did you mean 'NHWC'"):
        channels_last("NHWZ", 4)
    with pytest.raises(HeadError, match="'NHWC' is for 4 dimensions and the feature has 5. Exp"):
        channels_last("NHWC", 5)


def test_no_tensor_has_no_layout():
    found = profile(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(2, 3),))
    assert find_layout(found, found.calls_of("0")[0]) == "NC"


class Sequences(nn.Module):
    """Convolutions over time, activations and the mean as functions: no module tells the layout
    of what an exit reads but the one that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(1, 32, 5, padding=2), nn.BatchNorm1d(32)
        self.conv2, self.norm2 = nn.Conv1d(32, 32, 5, padding=2), nn.BatchNorm1d(32)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.fc(x.mean(-1))


def test_what_made_a_feature_tells_its_layout():
    model = attach(Sequences(), torch.randn(2, 1, 50), exits=["norm1", "norm2"])
    longer = model(torch.randn(3, 1, 80))
    assert [z.shape for z in longer.logits] == [(3, 3)] * 3
    prototypes = attach(
        Sequences(), torch.randn(2, 1, 50), exits=["norm1"], heads=[PrototypeHead(3)]
    )
    assert prototypes.heads[0].means.shape == (3, 32)


def test_pooling_tells_the_layout_of_what_it_reads_and_makes():
    def block(wide: int) -> nn.Sequential:
        return nn.Sequential(nn.LazyConv2d(wide, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    net = nn.Sequential(block(64), block(64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.LazyLinear(4))
    x = torch.randn(2, 1, 64, 100)
    net(x)
    found = profile(net, (x,))
    for path in ("0", "0.1", "1.1", "1"):  # 64 rows of 100 columns and 64 channels, and halves
        assert find_layout(found, found.calls_of(path)[0]) == "NCHW"


def test_a_sum_is_laid_out_as_what_is_summed():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(5, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + x).relu()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fc = Sum(), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(x).mean((2, 3)))

    found = profile(Net(), (torch.randn(2, 5, 5, 9),))
    assert find_layout(found, found.calls_of("block")[0]) == "NCHW"
