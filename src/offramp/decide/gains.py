"""What leaving at each exit is worth: right or wrong, or smoothed so that noise is not fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.decide.fitting import ELEMENTS, sampled, stack
from offramp.decide.scored import Scored
from offramp.decide.trace import Trace

__all__ = ["agreement", "correctness", "smoothed"]


def correctness(trace: Trace, scored: Scored) -> Tensor:
    """(E, N) float32: 1 where the exit's answer is the label."""
    if trace.labels is None:
        return agreement(scored)
    return (scored.predictions == trace.labels).float()


def agreement(scored: Scored) -> Tensor:
    """(E, N) float32: 1 where the exit's answer is that of the last exit."""
    return (scored.predictions == scored.predictions[-1]).float()


def smoothed(trace: Trace, scored: Scored, rows: Tensor | None = None) -> Tensor:
    """The chance that each exit's answer is right, halfway between label and model.

    A label says right or wrong, which is the chance of being right plus noise, and thresholds
    chosen on few samples fit that noise. The chance is therefore also estimated from what all exits
    say together: a softmax of their weighted log-probabilities (a stack with one weight for each
    exit, fitted by maximum likelihood). The mean of label and estimate has half the noise and half
    of the estimate's bias.

    Args:
        trace: what every exit said.
        scored: the same samples under a criterion.
        rows: (n,) int64, the samples to do it for; all by default.

    Returns:
        (E, n) float32.
    """
    if rows is not None:
        trace, scored = trace.subset(rows), scored.subset(rows)
    right = correctness(trace, scored)
    if trace.labels is None:
        return right
    even = torch.full((trace.num_exits,), 1 / trace.num_exits, dtype=torch.float64)
    weights = stack(*sampled(trace), even)
    chance = torch.empty_like(right)
    step = max(1, ELEMENTS // (trace.num_classes * trace.num_exits))
    for start in range(0, trace.num_samples, step):
        part = slice(start, start + step)
        posterior = _combine(trace.logits[:, part], weights).softmax(dim=1).float()
        chance[:, part] = posterior.gather(1, scored.predictions[:, part].T).T
    return (right + chance) / 2


def _combine(logits: Tensor, weights: Tensor) -> Tensor:
    """(E, B, C) -> (B, C) float64."""
    mixed: Tensor = torch.tensordot(weights, logits.double().log_softmax(dim=2), dims=1)
    return mixed
