"""Accuracy against cost, when the thresholds of a policy are turned up or down together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.decide.policy import Policy
from offramp.decide.scored import as_thresholds, measure, score
from offramp.decide.trace import Trace

__all__ = ["Point", "turned"]


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
    scored = score(trace, policy.criterion)
    right = scored.predictions == reference
    ordered = scored.scores[:-1].sort(dim=1).values
    held = as_thresholds(policy.thresholds_for(trace.num_exits))
    off = held.isposinf() if policy.thresholds is not None else torch.zeros_like(held) > 0
    below = (ordered < held[:, None]).double().mean(dim=1)
    settings = [held]
    for step in range(1, steps + 1):
        rest = 1 - step / steps
        for quantiles in (below * rest, 1 - (1 - below) * rest):
            # The score below which this share of the samples lies; past the last, nobody leaves.
            ranks = (quantiles * trace.num_samples - 1e-9).ceil().long()
            inside = ranks.clamp(max=trace.num_samples - 1)
            turned_to = ordered.gather(1, inside[:, None])[:, 0]
            settings.append(turned_to.masked_fill(off | (ranks > inside), math.inf))
    points: dict[float, Point] = {}
    for thresholds in settings:
        cost, gain = measure(scored, thresholds, right)
        points.setdefault(cost, Point(tuple(thresholds.tolist()), cost, gain))
    return [points[cost] for cost in sorted(points)]
