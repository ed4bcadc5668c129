"""Power entropy: a one-parameter family around the entropy."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from offramp.decide.criteria.base import Criterion, State
from offramp.errors import PolicyError

__all__ = ["PowerEntropy"]


class PowerEntropy(Criterion):
    """The entropy of order alpha (Rényi, 1961, equation 1.21), normalised.

    ``H_a = ln(sum_c p_c^a) / (1 - a)``; the score is ``1 - H_a / ln C``, from 0 to 1. The sum of
    powers weighs the leading classes the more, the larger ``a`` is: towards 1 it is the entropy,
    towards infinity the largest probability alone.

    Args:
        alpha: the order, positive and not 1.

    Raises:
        PolicyError: another order.
    """

    name: ClassVar[str] = "power_entropy"

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__()
        if not alpha > 0 or alpha == 1 or math.isinf(alpha):
            raise PolicyError(
                f"The order alpha of the power entropy must be positive, finite and not 1 (for "
                f"which there is 'entropy'), got {alpha}."
            )
        self.alpha = alpha

    def config(self) -> dict[str, Any]:
        """The order."""
        return {"alpha": self.alpha}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits and the score (B,); see :class:`Criterion`."""
        # In logarithms: a power of a small probability would underflow.
        powers = (self.alpha * logits.log_softmax(dim=-1)).logsumexp(dim=-1)
        scale = (1 - self.alpha) * math.log(max(logits.shape[-1], 2))
        return logits, 1 - powers / scale, state
