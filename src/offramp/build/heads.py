"""Auxiliary classifiers: from a feature of any common shape to logits.

A head is a module from the feature to ``(B, C)`` logits. If its ``forward`` has further parameters
that are named like inputs of the backbone (``attention_mask``, ``batch``), it is given those too.

Those made here work in two steps: they condense the feature, which needs no parameters, and
classify what is left. So features of a frozen backbone can be kept for training in little space.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.build.layout import LAYOUTS, channels_last, layout_of
from offramp.errors import HeadError, unknown_name

__all__ = [
    "HEADS",
    "FunctionHead",
    "MapHead",
    "TokenHead",
    "TwoStepHead",
    "VectorHead",
    "asked_inputs",
    "make_head",
    "name_and_width",
]

_SIDES, _WIDTHS = (8, 6, 4, 3, 2), (128, 64, 32, 16)
_DEEP_SIDE = 32


class TwoStepHead(nn.Module):
    """``head(feature, **inputs)`` is ``head.classify(head.condense(feature, **inputs))``."""

    def condense(self, feature: Tensor, **inputs: Tensor) -> Tensor:
        """The feature, no larger than need be; without parameters, and each row by itself."""
        raise NotImplementedError

    def classify(self, condensed: Tensor) -> Tensor:
        """Logits ``(B, C)`` of what :meth:`condense` left; all that learns is here."""
        raise NotImplementedError


class VectorHead(TwoStepHead):
    """``(B, D)`` to ``(B, C)`` by one linear layer, or by two with a ReLU between.

    Args:
        width: D.
        num_classes: C.
        hidden: width of the hidden layer; ``None`` for a single linear layer.
    """

    def __init__(self, width: int, num_classes: int, hidden: int | None = None) -> None:
        super().__init__()
        self.hidden = None if hidden is None else nn.Linear(width, hidden)
        self.classifier = nn.Linear(width if hidden is None else hidden, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, C)``."""
        return self.classify(feature)

    def condense(self, feature: Tensor, **inputs: Tensor) -> Tensor:
        """A vector is small enough: as it is."""
        return feature

    def classify(self, condensed: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, C)``."""
        if self.hidden is not None:
            condensed = torch.relu(self.hidden(condensed))
        logits: Tensor = self.classifier(condensed)
        return logits


class MapHead(TwoStepHead):
    """Maps of one to three spatial dimensions to ``(B, C)``.

    Average pooling to at most ``side`` positions per dimension, 3-wide convolutions with batch norm
    and ReLU (where ``hidden`` is given), global average, one linear layer.

    Args:
        shape: of the feature, batch included.
        num_classes: C.
        hidden: channels of the convolutions; ``None`` for pooling alone.
        side: positions per spatial dimension that the first convolution sees.
        last: whether the channels are last.
        depth: how many convolutions. With more than one, each halves the positions.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        hidden: int | None = None,
        side: int = 8,
        last: bool = False,
        depth: int = 1,
    ) -> None:
        super().__init__()
        space = tuple(shape[1:-1] if last else shape[2:])
        channels = shape[-1] if last else shape[1]
        conv, norm, pool = _SPATIAL[len(space)]
        self.last = last
        self.reduce: nn.Sequential | None = None
        if hidden is not None:
            window = tuple(_window(size, side) for size in space)
            parts = [pool(window, window) if max(window) > 1 else nn.Identity()]
            stride = 1 if depth == 1 else 2
            for wide in (channels, *[hidden] * (depth - 1)):
                parts += [conv(wide, hidden, 3, stride, 1, bias=False), norm(hidden), nn.ReLU()]
            self.reduce = nn.Sequential(*parts)
        self.classifier = nn.Linear(channels if hidden is None else hidden, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """``(B, C, *space)`` or ``(B, *space, C)`` to ``(B, classes)``."""
        return self.classify(self.condense(feature))

    def condense(self, feature: Tensor, **inputs: Tensor) -> Tensor:
        """Pooled to what the convolution sees, channels first; without one, to ``(B, C)``."""
        if self.last:
            feature = feature.movedim(-1, 1)
        if self.reduce is None:
            return feature.mean(tuple(range(2, feature.ndim)))
        pooled: Tensor = self.reduce[0](feature)
        return pooled

    def classify(self, condensed: Tensor) -> Tensor:
        """What is pooled to ``(B, classes)``."""
        if self.reduce is not None:
            for part in list(self.reduce)[1:]:
                condensed = part(condensed)
            condensed = condensed.mean(tuple(range(2, condensed.ndim)))
        logits: Tensor = self.classifier(condensed)
        return logits


class TokenHead(TwoStepHead):
    """``(B, T, D)`` to ``(B, C)``: one vector per sample, layer norm, one or two linear layers.

    Args:
        width: D.
        num_classes: C.
        class_token: take the first token; otherwise the mean of the tokens that the mask keeps.
        hidden: width of a hidden layer with a ReLU; ``None`` for a single linear layer.
    """

    def __init__(
        self, width: int, num_classes: int, class_token: bool = False, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.class_token = class_token
        self.norm = nn.LayerNorm(width)
        self.hidden = None if hidden is None else nn.Linear(width, hidden)
        self.classifier = nn.Linear(width if hidden is None else hidden, num_classes)

    def forward(self, feature: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``(B, T, D)``, and a mask ``(B, T)`` that is nonzero where a token counts."""
        return self.classify(self.condense(feature, attention_mask))

    def condense(  # type: ignore[override]  # the mask is what it asks for
        self, feature: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """One standardised vector per sample, ``(B, D)``."""
        if self.class_token:
            pooled = feature[:, 0]
        elif attention_mask is None:
            pooled = feature.mean(1)
        else:  # as a product of matrices, which is quicker than to weigh every token first
            counts = (attention_mask != 0).to(feature.dtype)
            share = counts / counts.sum(1, keepdim=True).clamp(min=1.0)
            pooled = torch.bmm(share.unsqueeze(1), feature).squeeze(1)
        return functional.layer_norm(pooled, self.norm.normalized_shape, eps=self.norm.eps)

    def classify(self, condensed: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, C)``."""
        pooled = condensed * self.norm.weight + self.norm.bias
        if self.hidden is not None:
            pooled = torch.relu(self.hidden(pooled))
        logits: Tensor = self.classifier(pooled)
        return logits


class FunctionHead(nn.Module):
    """A plain function from the feature to ``(B, C)`` logits, as a module without parameters."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, feature: Tensor) -> Tensor:
        """Whatever the function makes of the feature."""
        return self.function(feature)


_SPATIAL: dict[int, tuple[Any, Any, Any]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.AvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d),
}


def make_head(
    name: str,
    feature: Tensor,
    num_classes: int,
    layout: str | None = None,
    budget: float | None = None,
) -> nn.Module:
    """A new head for a feature, on its device and of its type.

    Args:
        name: ``"auto"``, ``"linear"``, ``"mlp"``, ``"conv"``, ``"deep"`` (two convolutions, as in
            MSDNet, Huang et al., 2018: dearer, and early features of images need it), ``"pool"``,
            ``"token"`` or ``"identity"`` (the feature is logits already). ``"mlp:64"``,
            ``"conv:32"`` and ``"deep:64"`` say how wide the head is inside, which the feature says
            otherwise.
        feature: an example; only its shape, type and device count.
        num_classes: width of the logits.
        layout: such as ``"NHWC"``; found from the shape if not given.
        budget: multiply-accumulates per sample that the head "conv" may cost. The dearest width
            and resolution that fit are taken; where none do, pooling alone, or of a width that was
            asked for the lowest resolution.

    Raises:
        HeadError: an unknown name or layout, or a feature that this head does not take.
    """
    name, hidden = name_and_width(name)
    shape = tuple(feature.shape)
    if len(shape) not in LAYOUTS:
        raise HeadError(
            f"A feature of shape {shape} has {len(shape)} dimensions; heads are known for "
            "(B, D), (B, T, D), (B, C, H, W), (B, C, T, H, W) and their channels-last forms. "
            "Choose another place, or give a head of your own: exits={path: module}."
        )
    layout = layout_of(shape) if layout is None else layout
    last = channels_last(layout, len(shape)) and len(shape) > 2
    head = HEADS[name](shape, last, num_classes, hidden, budget)
    return head.to(device=feature.device, dtype=feature.dtype)


def name_and_width(name: str) -> tuple[str, int | None]:
    """``"conv:32"`` is ``("conv", 32)``.

    Raises:
        HeadError: no name of a head.
    """
    if not isinstance(name, str):
        raise HeadError(
            f"A head of type {type(name).__name__!r} came where a name was expected. Known: "
            f"{', '.join(HEADS)}. A head of your own goes to attach(..., heads=[head, ...])."
        )
    kind, colon, width = name.partition(":")
    if kind not in HEADS:
        raise HeadError(unknown_name("head", kind, list(HEADS)))
    if not colon:
        return kind, None
    if kind not in _WIDE or not width.isdecimal() or int(width) < 1:
        raise HeadError(
            f"The head {name!r} has no width. Expected a number of 1 or more after the colon, and "
            f"before it one of {', '.join(_WIDE)}, as in 'conv:32'."
        )
    return kind, int(width)


def _vector(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 2:
        raise HeadError(
            f"The head {name!r} takes vectors (B, D) and the feature has shape {shape}. "
            "Use 'auto', 'pool' or 'conv'."
        )
    return shape[1]


def _auto(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    if len(shape) == 2:
        return VectorHead(shape[1], classes)
    if len(shape) == 3 and last:
        return TokenHead(shape[2], classes)
    return _conv(shape, last, classes, hidden, budget)


def _linear(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    return VectorHead(_vector("linear", shape), classes)


def _mlp(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    if len(shape) == 3 and last:
        return TokenHead(shape[2], classes, hidden=hidden or _hidden(shape[2]))
    width = _vector("mlp", shape)
    return VectorHead(width, classes, hidden or _hidden(width))


def _hidden(width: int) -> int:
    return min(max(width, 32), 256)


def _conv(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    if len(shape) < 3:
        raise HeadError(
            f"The head 'conv' takes maps and the feature has shape {shape}. Use 'auto' or 'linear'."
        )
    space = shape[1:-1] if last else shape[2:]
    channels = shape[-1] if last else shape[1]
    widest = hidden or min(max(channels, 32), 128)
    widths = [widest] if hidden else [widest, *(w for w in _WIDTHS if w < widest)]
    options = []
    for width in widths:
        for side in _SIDES:
            positions = math.prod(size // _window(size, side) for size in space)
            options.append((3 ** len(space) * channels * width * positions, width, side))
    fitting = [option for option in options if budget is None or option[0] <= budget]
    if not fitting and hidden is None:
        return MapHead(shape, classes, last=last)
    fitting = fitting or [min(options)]
    # At equal cost the narrower of higher resolution: at small batches weights cost time, too.
    _, side, width = max((macs, side, width) for macs, width, side in fitting)
    return MapHead(shape, classes, width, side, last)


def _deep(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    if len(shape) < 3:
        raise HeadError(
            f"The head 'deep' takes maps and the feature has shape {shape}. Use 'auto' or 'mlp'."
        )
    channels = shape[-1] if last else shape[1]
    width = hidden or min(max(2 * channels, 32), 128)
    return MapHead(shape, classes, width, _DEEP_SIDE, last, depth=2)


def _window(size: int, side: int) -> int:
    """The least window that leaves at most ``side`` positions and drops little at the edge."""
    for window in range(-(-size // side), size):
        if size % window <= size // 6:
            return window
    return size


def _pool(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    if len(shape) == 2:
        return VectorHead(shape[1], classes)
    if len(shape) == 3 and last:
        return TokenHead(shape[2], classes)
    return MapHead(shape, classes, last=last)


def _token(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    if len(shape) != 3:
        raise HeadError(
            f"The head 'token' takes token sequences (B, T, D) and the feature has shape {shape}. "
            "Use 'auto' or 'pool'."
        )
    return TokenHead(shape[2], classes, class_token=True)


def _identity(
    shape: tuple[int, ...], last: bool, classes: int, hidden: int | None, budget: float | None
) -> nn.Module:
    return nn.Identity()


HEADS: dict[str, Callable[..., nn.Module]] = {
    "auto": _auto,
    "conv": _conv,
    "deep": _deep,
    "identity": _identity,
    "linear": _linear,
    "mlp": _mlp,
    "pool": _pool,
    "token": _token,
}
_WIDE = ("conv", "deep", "mlp")  # those that have something inside


def asked_inputs(head: nn.Module) -> tuple[str, ...]:
    """Names of the inputs of the backbone that a head wants beside its feature."""
    parameters = list(inspect.signature(head.forward).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters[1:] if p.kind in named)
