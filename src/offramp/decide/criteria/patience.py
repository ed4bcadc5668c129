"""Stop when several exits in a row say the same."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp.decide.criteria.base import Criterion, State
from offramp.errors import PolicyError

__all__ = ["Patience"]


class Patience(Criterion):
    """How many exits in a row agree with this one (Zhou et al., 2020, PABEE, equations 5 and 6).

    The score is 0 at the first exit and one more each time the exit says what the one before said,
    0 again when it does not. PABEE's patience t is the threshold t. Outputs that are regressed
    rather than classified agree when they lie within a tolerance of each other.

    Args:
        tolerance: ``None`` compares predicted classes; a number compares the outputs themselves
            and asks that none of them moved by ``tolerance`` or more.

    Raises:
        PolicyError: a tolerance that is not positive.
    """

    name: ClassVar[str] = "patience"
    stateful: ClassVar[bool] = True

    def __init__(self, tolerance: float | None = None) -> None:
        super().__init__()
        if tolerance is not None and not tolerance > 0:
            raise PolicyError(f"The tolerance of patience must be positive, got {tolerance}.")
        self.tolerance = tolerance

    def config(self) -> dict[str, Any]:
        """The tolerance."""
        return {"tolerance": self.tolerance}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits, the count (B,) and (what was said, count)."""
        said = logits.argmax(dim=-1) if self.tolerance is None else logits
        if not state:
            count = torch.zeros_like(logits[:, 0])
            return logits, count, (said, count)
        before, count = state
        if self.tolerance is None:
            same = said == before
        else:
            same = (said - before).abs().amax(dim=-1) < self.tolerance
        count = (count + 1) * same.to(count.dtype)
        return logits, count, (said, count)
