"""Rules for heads whose logits are distances."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from offramp.decide.criteria.base import Criterion, State

__all__ = ["ClassMeanDistance"]


class ClassMeanDistance(Criterion):
    """How near the nearest class mean is (Görmez et al., 2022, E2CM, section III).

    For prototype heads, whose logits are the negative distances of a feature to the class means.
    The score is ``1 - d_(1) / d_mean``, one minus the nearest distance over the mean of all: it
    does not depend on the scale of the features, which differs from exit to exit. From 0, where all
    means are equally far, to 1.
    """

    name: ClassVar[str] = "class_mean"

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits and the score (B,); see :class:`Criterion`."""
        distance = (-logits).clamp(min=0)
        nearest = distance.amin(dim=-1)
        return logits, 1 - nearest / distance.mean(dim=-1).clamp(min=1e-6), state
