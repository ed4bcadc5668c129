"""The free energy of the logits."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from offramp.decide.criteria.base import Criterion, State
from offramp.errors import PolicyError

__all__ = ["Energy"]


class Energy(Criterion):
    """The negative free energy (Liu et al., 2020, Energy-based out-of-distribution detection, 4).

    Score ``T ln sum_c exp(logit_c / T)``, unbounded. Unlike probabilities it does not saturate, so
    exits that are sure of nearly everything can still be told apart.

    Args:
        temperature: T.

    Raises:
        PolicyError: a temperature that is not positive.
    """

    name: ClassVar[str] = "energy"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise PolicyError(f"The temperature of the energy must be positive, got {temperature}.")
        self.temperature = temperature

    def config(self) -> dict[str, Any]:
        """The temperature."""
        return {"temperature": self.temperature}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits and the score (B,); see :class:`Criterion`."""
        score = self.temperature * (logits / self.temperature).logsumexp(dim=-1)
        return logits, score, state
