"""Rules that look at the probabilities of one exit alone."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from offramp.decide.criteria.base import Criterion, State
from offramp.errors import PolicyError

__all__ = ["Confidence", "Entropy", "Margin"]


class Confidence(Criterion):
    """The largest softmax probability (Huang et al., 2018, MSDNet, section 4).

    Score ``max_c softmax(logits)_c``, from 1/C to 1.
    """

    name: ClassVar[str] = "confidence"

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits and the score (B,); see :class:`Criterion`."""
        # One over the sum of what is relative to the largest: a fifth of the time of a softmax
        # where classes are few, and like it the same bits for a row in any batch.
        relative = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        return logits, relative.sum(dim=-1).reciprocal(), state


class Entropy(Criterion):
    """The entropy of the softmax (Teerapittayanon et al., 2016, BranchyNet, equation 3).

    With ``H = -sum_c p_c ln p_c``, the score is ``1 - H / ln C`` (from 0 to 1), or ``-H`` where the
    unit is nats, so that ``H <= h`` is ``score >= -h``. ``Policy("entropy", nats=[...])`` takes the
    thresholds as BranchyNet gives them.

    Args:
        unit: ``"normalised"`` or ``"nats"``.

    Raises:
        PolicyError: another unit.
    """

    name: ClassVar[str] = "entropy"

    def __init__(self, unit: str = "normalised") -> None:
        super().__init__()
        if unit not in ("normalised", "nats"):
            raise PolicyError(f"Entropy takes unit='normalised' or unit='nats', got {unit!r}.")
        self.unit = unit

    def config(self) -> dict[str, Any]:
        """The unit."""
        return {"unit": self.unit}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits and the score (B,); see :class:`Criterion`."""
        logs = logits.log_softmax(dim=-1)
        negative = (logs.exp() * logs).sum(dim=-1)
        if self.unit == "nats":
            return logits, negative, state
        return logits, 1 + negative / math.log(max(logits.shape[-1], 2)), state


class Margin(Criterion):
    """The lead of the best class over the second, in probability (Park et al., 2015).

    Score ``p_(1) - p_(2)``, from 0 to 1.
    """

    name: ClassVar[str] = "margin"

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits and the score (B,); see :class:`Criterion`."""
        best = logits.softmax(dim=-1).topk(min(2, logits.shape[-1]), dim=-1).values
        return logits, 2 * best[:, 0] - best.sum(dim=-1), state
