"""What heads are given beside their feature: inputs of the backbone, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from offramp.build.cascade import asked_of, core
from offramp.build.heads import TokenHead

__all__ = ["named_inputs", "wanted_inputs"]


def named_inputs(
    backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a call by the names that the backbone's forward gives them."""
    signature = inspect.signature(backbone.forward)
    bound: dict[str, Any] = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return {name: value for name, value in bound.items() if isinstance(value, Tensor)}


def wanted_inputs(
    head: nn.Module,
    feature: Tensor,
    named: Mapping[str, Tensor],
    asked: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """What a head asks for. A mask over other tokens than the feature's is of no use to ours.

    Args:
        head: any head.
        feature: what it is to classify.
        named: of :func:`named_inputs`.
        asked: of :func:`~offramp.build.cascade.asked_of`, where it was asked before.
    """
    wanted = asked_of(head) if asked is None else asked
    extra = {name: named[name] for name in wanted if name in named}
    mask = extra.get("attention_mask")
    if isinstance(core(head), TokenHead) and mask is not None and mask.shape != feature.shape[:2]:
        del extra["attention_mask"]
    return extra
