"""Accuracy against cost, when the thresholds of a policy are turned up or down together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.policy import Policy
from offramp.decide.trace import Trace

__all__ = ["Point", "turned"]

CHUNK = 1 << 16


@dataclass(frozen=True)
class Point:
    """One setting of the thresholds.

    Attributes:
        thresholds: E - 1 of them.
        cost_ratio: mean cost with all heads that ran, over that of the backbone.
        accuracy: share of samples that are answered right.
    """

    thresholds: tuple[float, ...]
    cost_ratio: float
    accuracy: float


def turned(trace: Trace, policy: Policy, reference: Tensor, steps: int = 20) -> list[Point]:
    """The curve through the policy's own point, from "all leave at once" to "nobody leaves".

    Every threshold sits at some quantile of its exit's scores. Going down, all these quantiles
    shrink in proportion to 0; going up, they grow to 1. No label chooses a point of the curve, so
    it is not flattered by the samples that it is drawn on, as the best thresholds of a search on
    them would be. Exits that the policy switched off stay off.

    Args:
        trace: what every exit said.
        policy: its criterion and thresholds; one that never leaves is turned down from there.
        reference: (N,) int64, what counts as right.
        steps: points on either side.

    Returns:
        Points of different cost, cheapest first.
    """
    scores, answers = _walk(trace, policy)
    ordered = scores.sort(dim=1).values
    held = policy.thresholds_for(trace.num_exits)
    off = [policy.thresholds is not None and value == math.inf for value in held]
    samples = trace.num_samples
    below = [float((row < value).double().mean()) for row, value in zip(scores, held, strict=True)]
    settings = [held]
    for step in range(1, steps + 1):
        rest = 1 - step / steps
        for quantiles in ([q * rest for q in below], [1 - (1 - q) * rest for q in below]):
            # The score below which this share of the samples lies; past the last, nobody leaves.
            ranks = [math.ceil(q * samples - 1e-9) for q in quantiles]
            turned_to = [
                math.inf if skip or rank >= samples else float(row[rank])
                for row, rank, skip in zip(ordered, ranks, off, strict=True)
            ]
            settings.append(tuple(turned_to))
    points: dict[float, Point] = {}
    for thresholds in settings:
        point = _point(trace, policy, thresholds, scores, answers, reference)
        points.setdefault(point.cost_ratio, point)
    return [points[cost] for cost in sorted(points)]


def _walk(trace: Trace, policy: Policy) -> tuple[Tensor, Tensor]:
    """Scores (E-1, N) and answers (E, N) of every exit about every sample."""
    exits, samples, _ = trace.logits.shape
    scores = torch.empty(exits - 1, samples)
    answers = torch.empty(exits, samples, dtype=torch.int64)
    with torch.inference_mode():
        for start in range(0, samples, CHUNK):
            part = slice(start, start + CHUNK)
            state: tuple[Tensor, ...] = ()
            for k in range(exits):
                logits, score, state = policy.criterion(trace.logits[k, part], state, k)
                answers[k, part] = logits.argmax(dim=1)
                if k < exits - 1:
                    scores[k, part] = score
    return scores, answers


def _point(
    trace: Trace,
    policy: Policy,
    thresholds: tuple[float, ...],
    scores: Tensor,
    answers: Tensor,
    reference: Tensor,
) -> Point:
    """Accuracy and cost of one setting, from scores that are computed once for all settings."""
    limits = torch.tensor(thresholds, dtype=scores.dtype)[:, None]
    leave = torch.cat([scores >= limits, torch.ones(1, trace.num_samples, dtype=torch.bool)])
    exit = leave.int().argmax(dim=0)  # the first that accepts
    active = Policy(policy.criterion, thresholds).active(trace.num_exits)
    cost = float(trace.exit_costs(active)[exit].mean())
    right = answers.gather(0, exit[None])[0] == reference
    return Point(thresholds, cost / trace.full_cost, float(right.double().mean()))
