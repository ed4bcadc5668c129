"""A temperature for each exit, in front of any rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from offramp.decide.criteria.base import (
    Criterion,
    State,
    criterion,
    criterion_from_json,
    criterion_to_json,
)
from offramp.errors import PolicyError

__all__ = ["Tempered"]


class Tempered(Criterion):
    """Another criterion on logits divided by a temperature per exit (Guo et al., 2017, equation 9).

    Exits are sure to different degrees; tempered, the same score means about the same everywhere.
    Answers do not change, and logits leave as they came, unless the inner rule combines exits.
    :func:`offramp.decide.fitting.fit_temperatures` finds the temperatures on a trace.

    Args:
        inner: a name or an instance.
        temperatures: one positive number for each exit, the last included.

    Raises:
        PolicyError: temperatures that are not positive, or not as many as the inner criterion's
            exits or (when it runs) the network's.
    """

    name: ClassVar[str] = "tempered"

    def __init__(self, inner: str | Criterion, temperatures: Sequence[float]) -> None:
        super().__init__()
        self.inner = criterion(inner)
        self.temperatures = tuple(float(value) for value in temperatures)
        if not self.temperatures or not all(value > 0 for value in self.temperatures):
            raise PolicyError(
                f"Temperatures must be positive, one for each exit, got {list(self.temperatures)}."
            )
        self.exits = len(self.temperatures)
        self.inner.check_exits(self.exits)
        # As the inner one is: whether exits pass state on, and whether logits are joint.
        self.stateful = self.inner.stateful  # type: ignore[misc]
        self.fitted_on = self.inner.fitted_on
        self.combines = self.inner.combines  # type: ignore[misc]

    def config(self) -> dict[str, Any]:
        """The inner criterion and the temperatures."""
        return {"inner": criterion_to_json(self.inner), "temperatures": list(self.temperatures)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Criterion:
        """Build from what :meth:`config` returned."""
        return cls(criterion_from_json(config["inner"]), config["temperatures"])

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> logits, the inner score of the tempered ones (B,), the inner state."""
        joint, score, after = self.inner(logits / self.temperatures[exit], state, exit)
        return joint if self.inner.combines else logits, score, after
