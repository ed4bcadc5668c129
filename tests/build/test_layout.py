"""Channels first or last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.build.cost import profile
from offramp.build.layout import channel_use, channels_last, find_layout, layout_of
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
    assert layouts == {"turn": "NHWC", "mid": "NCHW"}  # nobody takes "mid" as it stands
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
