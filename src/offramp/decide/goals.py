"""What thresholds are asked for: one figure, and what it is a figure of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from offramp.decide.guarantees.risks import Loss, Risk
from offramp.decide.trace import Trace
from offramp.errors import PolicyError, TraceError

__all__ = ["Goal", "Times", "resolve", "timed"]

Times = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        name: the argument of ``calibrate`` that it came from.
        value: as given.
        bounds: ``"cost"``, ``"accuracy"``, ``"agreement"`` or ``"loss"``: what it is about.
        words: the goal in words, for errors and provenance.
    """

    name: str
    value: float
    bounds: str
    words: str

    def floor(self, full_accuracy: float) -> float:
        """The accuracy or agreement that is wanted at least.

        Args:
            full_accuracy: of the full network on the calibration samples.
        """
        if self.bounds == "loss":
            return -self.value
        return full_accuracy - self.value if self.name == "max_accuracy_drop" else self.value

    def risk(self, loss: Loss | None = None, limits: tuple[float, float] | None = None) -> Risk:
        """The loss whose mean the goal bounds.

        Args:
            loss: a user's, where the goal is ``max_loss``.
            limits: of that loss.

        Raises:
            PolicyError: the goal is about cost, or a user's loss or its limits are missing.
        """
        names = {
            "max_accuracy_drop": "accuracy gap",
            "min_accuracy": "error rate",
            "min_agreement": "disagreement",
            "max_brier_gap": "brier gap",
        }
        if self.name in names:
            return Risk.named(names[self.name])
        if self.name == "max_loss":
            if loss is None or limits is None:
                raise PolicyError(
                    "max_loss needs loss=, a function of logits (B, C) and labels (B,) that "
                    "returns (B,), and loss_limits=(least, most) that hold for every sample."
                )
            return Risk.own(loss, limits)
        raise PolicyError(
            f"confidence= promises something about answers, and {self.name} is about cost. "
            f"Give max_accuracy_drop, min_accuracy, min_agreement, max_brier_gap or max_loss."
        )

    @property
    def bound(self) -> float:
        """The goal as a bound on the mean of its loss."""
        return 1 - self.value if self.name.startswith("min_") else self.value


_BOUNDS = {
    "max_cost": ("cost", "a mean cost of at most {} of the full network's"),
    "max_latency": ("cost", "a mean latency of at most {} ms"),
    "max_accuracy_drop": ("accuracy", "an accuracy at most {} below the full network's"),
    "min_accuracy": ("accuracy", "an accuracy of at least {}"),
    "min_agreement": ("agreement", "agreement with the full network of at least {}"),
    "max_brier_gap": ("loss", "a Brier score at most {} above the full network's"),
    "max_loss": ("loss", "a mean loss of at most {}"),
}


def resolve(trace: Trace, given: dict[str, float | None]) -> Goal:
    """The one goal that was given.

    Raises:
        PolicyError: none or several, or a figure out of range.
        TraceError: a goal about accuracy, and no labels.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        came = ", ".join(sorted(named)) or "none"
        raise PolicyError(f"calibrate needs exactly one goal of {', '.join(_BOUNDS)}; got {came}.")
    ((name, value),) = named.items()
    bounds, words = _BOUNDS[name]
    number = float(value)
    low = {"max_accuracy_drop": -1.0, "max_brier_gap": -2.0, "max_loss": -math.inf}.get(name, 0.0)
    high = 1.0 if bounds in ("accuracy", "agreement") else math.inf
    if not low <= number <= high or math.isinf(number):
        hint = {
            "max_cost": "it is a share of the full network's cost, as in max_cost=0.5",
            "max_latency": "it is in milliseconds, above 0, as in max_latency=2.5",
            "max_brier_gap": "it is a finite difference of scores, -2 or more, as in 0.02",
            "max_loss": "it is a finite mean of your loss, as in 0.1",
        }.get(name, f"it is a share, as in {name}=0.5")
        raise PolicyError(f"{name}={value} is out of range: {hint}.")
    if bounds in ("accuracy", "loss") and trace.labels is None:
        raise TraceError(
            f"{name} needs labels, and this trace has none. Without labels, thresholds can be "
            f"calibrated for min_agreement= with the full network, or for max_cost=."
        )
    return Goal(name, number, bounds, words.format(f"{number:g}"))


def timed(trace: Trace, times: Times | None) -> Trace:
    """The trace with measured times as its costs.

    Args:
        trace: E exits.
        times: milliseconds of the E stages, and of the E heads (or of the E - 1 auxiliary ones).

    Raises:
        PolicyError: no times were given.
    """
    if times is None:
        raise PolicyError(
            "max_latency needs times=(stage_ms, head_ms), the measured milliseconds of each stage "
            "between exits and of each head."
        )
    stages, heads = (torch.as_tensor(part, dtype=torch.float64) for part in times)
    if len(heads) == trace.num_exits - 1:
        heads = torch.cat([heads, heads.new_zeros(1)])
    return replace(trace, stage_costs=stages, head_costs=heads, cost_unit="ms")
