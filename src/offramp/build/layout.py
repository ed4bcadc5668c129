"""Where the channels of a feature are: after the batch (NCHW) or last (NHWC).

The next module that takes the feature as it stands knows best: a convolution reads its channels
from axis 1, a linear layer or a layer norm from the last. Failing that, the shape tells: the two
axes of a picture are of one size more often than a picture axis and the channels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from offramp.errors import HeadError, unknown_name

if TYPE_CHECKING:
    from offramp.build.cost import CostProfile, ModuleCall

__all__ = ["LAYOUTS", "ChannelUse", "channel_use", "channels_last", "find_layout", "layout_of"]

# By number of dimensions: channels first, channels last. Vectors have but one layout.
LAYOUTS: dict[int, tuple[str, str]] = {
    2: ("NC", "NC"),
    3: ("NCL", "NLC"),
    4: ("NCHW", "NHWC"),
    5: ("NCTHW", "NTHWC"),
}


@dataclass(frozen=True)
class ChannelUse:
    """How a module uses its input.

    Attributes:
        value: identity of the input's content, as in ``ModuleCall.value``.
        shape: shape of the input.
        last: whether the module reads the channels from the last axis.
    """

    value: int | None
    shape: tuple[int, ...]
    last: bool


def channel_use(module: nn.Module, shape: tuple[int, ...], value: int | None) -> ChannelUse | None:
    """What a module says about the layout of its input; ``None`` if it says nothing."""
    size, last = _channels(module)
    if size is None or len(shape) < 3:
        return None
    first_fits, last_fits = shape[1] == size, shape[-1] == size
    if first_fits and last_fits:
        return ChannelUse(value, shape, last)
    if first_fits or last_fits:
        return ChannelUse(value, shape, last_fits)
    return None


def _channels(module: nn.Module) -> tuple[int | None, bool]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels, False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features, False
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, False
    if isinstance(module, nn.Linear):
        return module.in_features, True
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        return int(module.normalized_shape[0]), True
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)) and module.batch_first:
        return module.input_size, True
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, True
    return None, False


def find_layout(profile: CostProfile, call: ModuleCall) -> str:
    """Layout of the output of a call, such as ``"NCHW"``."""
    if call.feature is None or len(call.feature.shape) not in LAYOUTS:
        raise HeadError(f"The output of {call.path!r} has no layout: {call.feature}.")
    shape, value = call.feature.shape, call.feature.value
    for later in profile.calls:
        if later.uses is None or later.began < call.ended or value is None:
            continue
        if later.uses.value == value and later.uses.shape == shape:
            return LAYOUTS[len(shape)][later.uses.last]
    return layout_of(shape)


def layout_of(shape: Sequence[int]) -> str:
    """Layout as far as the shape tells; sequences and the undecided follow the field's habit."""
    first, last = LAYOUTS[len(shape)]
    if len(shape) == 3:
        return last
    if len(shape) < 3 or shape[-1] == shape[-2]:
        return first
    return last if shape[-2] == shape[-3] else first


def channels_last(layout: str, dimensions: int) -> bool:
    """Whether a given layout has the channels last.

    Raises:
        HeadError: the layout is unknown, or for another number of dimensions.
    """
    if layout not in LAYOUTS[dimensions]:
        known = sorted({name for pair in LAYOUTS.values() for name in pair})
        if layout not in known:
            raise HeadError(unknown_name("layout", layout, known))
        raise HeadError(
            f"Layout {layout!r} is for {len(layout)} dimensions and the feature has {dimensions}. "
            f"Expected {' or '.join(dict.fromkeys(LAYOUTS[dimensions]))}."
        )
    return layout == LAYOUTS[dimensions][1]
