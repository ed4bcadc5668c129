"""A trace seen through one criterion: the scores that thresholds are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.decide.criteria import Criterion
from offramp.decide.defaults import usual_defaults
from offramp.decide.trace import Trace
from offramp.errors import PolicyError

__all__ = ["Scored", "as_thresholds", "between", "measure", "score"]

CHUNK = 1 << 13  # rows at a time: what fits a processor's cache

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores and answers of every exit, had every sample come that far.

    Attributes:
        scores: (E, N) float32.
        predictions: (E, N) int64.
        stages: (E,) float64, cost of the backbone between exits, as shares of the full backbone.
        heads: (E,) float64, cost of the heads, likewise.
        switchable: whether a head whose exit nobody takes need not run.
        cascade: whether it runs all the same where a later head does, which reads it.
        losses: (E, N) float64, where a loss was asked for.
    """

    scores: Tensor
    predictions: Tensor
    stages: Tensor
    heads: Tensor
    switchable: bool
    losses: Tensor | None = None
    cascade: bool = False

    @property
    def num_exits(self) -> int:
        """E."""
        return self.scores.shape[0]

    @property
    def num_samples(self) -> int:
        """N."""
        return self.scores.shape[1]

    def exits(self, thresholds: Tensor) -> Tensor:
        """The exit that each sample takes.

        Args:
            thresholds: (E - 1,) float32.

        Returns:
            (N,) int64.
        """
        taken = torch.full((self.num_samples,), self.num_exits - 1)
        for k in reversed(range(self.num_exits - 1)):
            taken.masked_fill_(self.scores[k] >= thresholds[k], k)
        return taken

    def exit_costs(self, thresholds: Tensor) -> Tensor:
        """What leaving at each exit costs, as shares of the full backbone, (E,) float64."""
        runs = torch.ones(self.num_exits, dtype=torch.float64)
        runs[:-1] = torch.from_numpy(self.running((thresholds < torch.inf).numpy()))
        return self.stages.cumsum(0) + (self.heads * runs).cumsum(0)

    def running(self, on: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which heads run where these exits are in use, (E - 1,) of (E - 1,)."""
        if self.switchable:
            return on
        if self.cascade:
            return np.maximum.accumulate(on[::-1])[::-1].copy()
        return np.ones_like(on)

    def cost(self, thresholds: Tensor) -> float:
        """The mean cost, as a share of the full backbone."""
        shares = torch.bincount(self.exits(thresholds), minlength=self.num_exits)
        return float(shares.double() @ self.exit_costs(thresholds)) / self.num_samples

    def subset(self, index: Tensor) -> Scored:
        """Some of the samples."""
        return Scored(
            self.scores[:, index],
            self.predictions[:, index],
            self.stages,
            self.heads,
            self.switchable,
            None if self.losses is None else self.losses[:, index],
            self.cascade,
        )


@usual_defaults()
def score(trace: Trace, rule: Criterion, loss: Loss | None = None) -> Scored:
    """Run a criterion over a whole trace.

    Args:
        trace: what every exit said.
        rule: the criterion.
        loss: optionally, of logits (B, C) and labels (B,) the loss of each sample (B,).

    Raises:
        PolicyError: the criterion is for another number of exits, or it or the loss returned
            another shape, or NaN.
    """
    exits, samples, _ = trace.logits.shape
    rule.check_exits(exits)
    scores = torch.empty(exits, samples)
    predictions = torch.empty(exits, samples, dtype=torch.int64)
    losses = None if loss is None else torch.empty(exits, samples, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, samples, CHUNK):
            part = slice(start, min(start + CHUNK, samples))
            state: tuple[Tensor, ...] = ()
            for k in range(exits):
                logits, value, state = rule(trace.logits[k, part], state, k)
                scores[k, part] = _checked(value, part, f"criterion {rule.name!r}", k)
                if bool(torch.isposinf(scores[k, part]).any()):
                    raise PolicyError(
                        f"The criterion {rule.name!r} returned an infinite score at exit {k}: an "
                        f"infinite threshold means that nobody leaves there. Bound its scores."
                    )
                predictions[k, part] = logits.argmax(dim=1)
                if loss is not None and losses is not None:
                    labels = _labels(trace, part)
                    losses[k, part] = _checked(loss(logits, labels), part, "loss", k).double()
    full = trace.full_cost
    # Out of inference mode: what is kept may be used in any later computation.
    return Scored(
        scores,
        predictions,
        trace.stage_costs / full,
        trace.head_costs / full,
        not (rule.stateful or trace.cascade),
        losses,
        trace.cascade and not rule.stateful,
    )


def measure(scored: Scored, thresholds: Tensor, gains: Tensor) -> tuple[float, float]:
    """Mean cost and mean gain under thresholds.

    Args:
        scored: N samples.
        thresholds: (E - 1,) float32.
        gains: (E, N), what is gained by leaving at each exit.
    """
    taken = scored.exits(thresholds)
    gain = gains.gather(0, taken[None]).double().mean()
    return float(scored.exit_costs(thresholds)[taken].mean()), float(gain)


def between(low: Tensor, high: Tensor) -> Tensor:
    """A float32 threshold that ``high`` reaches and ``low`` does not, midway where there is room.

    Midway, so that another engine's last bits do not flip a decision.

    Args:
        low: float32, below ``high`` everywhere.
        high: float32, of the same shape.
    """
    middle = ((low.double() + high.double()) / 2).float()
    return torch.where(middle > low, middle, high)


def _labels(trace: Trace, part: slice) -> Tensor:
    if trace.labels is None:
        raise PolicyError("A loss needs labels, and this trace has none.")
    return trace.labels[part]


def _checked(value: Tensor, part: slice, what: str, exit: int) -> Tensor:
    wanted = (part.stop - part.start,)
    if tuple(value.shape) != wanted:
        raise PolicyError(
            f"The {what} must return one number for each sample, shape {wanted}, "
            f"got {tuple(value.shape)} at exit {exit}."
        )
    if bool(torch.isnan(value).any()):
        raise PolicyError(f"The {what} returned NaN at exit {exit}: no threshold compares with it.")
    return value


def as_thresholds(values: Sequence[float]) -> Tensor:
    """Thresholds as the float32 tensor that scores are compared with."""
    return torch.tensor(list(values), dtype=torch.float32)
