"""Where the channels of a feature are: after the batch (NCHW) or last (NHWC).

The next module that takes the feature as it stands knows best: a convolution reads its channels
from axis 1, a linear layer or a layer norm from the last. Failing that, the one that made it, or
made the last value of its shape: what lies between is most often an activation or a sum. Failing
that, the shape tells: the two axes of a picture are of one size more often than a picture axis and
the channels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from offramp.errors import HeadError, unknown_name

if TYPE_CHECKING:
    from offramp.build.cost import CostProfile, ModuleCall

__all__ = [
    "LAYOUTS",
    "ChannelUse",
    "channel_made",
    "channel_use",
    "channels_last",
    "find_layout",
    "layout_of",
]

# By number of dimensions: channels first, channels last. Vectors have but one layout.
LAYOUTS: dict[int, tuple[str, str]] = {
    2: ("NC", "NC"),
    3: ("NCL", "NLC"),
    4: ("NCHW", "NHWC"),
    5: ("NCTHW", "NTHWC"),
}


@dataclass(frozen=True)
class ChannelUse:
    """Where a module has the channels of its input, or of its output.

    Attributes:
        value: identity of the tensor's content, as in ``Feature.value``.
        shape: its shape.
        last: whether the channels are on its last axis.
    """

    value: int | None
    shape: tuple[int, ...]
    last: bool


class _Channels(NamedTuple):
    """How many channels a module takes and makes (``None``: any number), and on which axis."""

    taken: int | None
    made: int | None
    last: bool


def channel_use(module: nn.Module, shape: tuple[int, ...], value: int | None) -> ChannelUse | None:
    """What a module says about the layout of its input; ``None`` if it says nothing."""
    found = _channels(module, len(shape))
    return None if found is None else _told(found.taken, found.last, shape, value)


def channel_made(module: nn.Module, shape: tuple[int, ...], value: int | None) -> ChannelUse | None:
    """What a module says about the layout of its output; ``None`` if it says nothing."""
    found = _channels(module, len(shape))
    return None if found is None else _told(found.made, found.last, shape, value)


def _told(
    size: int | None, last: bool, shape: tuple[int, ...], value: int | None
) -> ChannelUse | None:
    if len(shape) < 3:
        return None
    first_fits, last_fits = (size is None or axis == size for axis in (shape[1], shape[-1]))
    if first_fits and last_fits:
        return ChannelUse(value, shape, last)
    if first_fits or last_fits:
        return ChannelUse(value, shape, last_fits)
    return None


def _channels(module: nn.Module, dimensions: int) -> _Channels | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return _Channels(module.in_channels, module.out_channels, False)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return _Channels(module.num_features, module.num_features, False)
    if isinstance(module, nn.GroupNorm):
        return _Channels(module.num_channels, module.num_channels, False)
    if isinstance(module, _POOLS.get(dimensions, ())):
        return _Channels(None, None, False)
    if isinstance(module, nn.Linear):
        return _Channels(module.in_features, module.out_features, True)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        size = int(module.normalized_shape[0])
        return _Channels(size, size, True)
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)) and module.batch_first:
        hidden = (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
        return _Channels(module.input_size, hidden, True)
    if isinstance(module, nn.MultiheadAttention):
        return _Channels(module.embed_dim, module.embed_dim, True)
    return None


# By number of dimensions, batch and channels included.
_POOLS: dict[int, tuple[type[nn.Module], ...]] = {
    3: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    4: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    5: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}


def find_layout(profile: CostProfile, call: ModuleCall) -> str:
    """Layout of the output of a call, such as ``"NCHW"``."""
    if call.feature is None or len(call.feature.shape) not in LAYOUTS:
        raise HeadError(f"The output of {call.path!r} has no layout: {call.feature}.")
    shape, value = call.feature.shape, call.feature.value
    later = [c.uses for c in profile.calls if c.began >= call.ended]
    before = sorted((c for c in profile.calls if c.order <= call.order), key=lambda c: -c.order)
    told = [use for use in later if use and use.value == value is not None]
    made = [c.makes for c in before]
    told += [use for use in made if use and use.value == value is not None]
    told += [use for use in made if use]
    for use in told:
        if use.shape == shape:
            return LAYOUTS[len(shape)][use.last]
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
