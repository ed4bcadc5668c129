"""Where thresholds come from: what a policy remembers of the samples they were chosen on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp.decide.scored import Scored
from offramp.decide.trace import Trace

__all__ = ["provenance"]


def provenance(
    trace: Trace, scored: Scored, thresholds: Tensor, right: Tensor, labelled: bool
) -> dict[str, Any]:
    """The data, and what the thresholds do there, as JSON can hold it.

    Args:
        trace: the calibration samples.
        scored: their scores.
        thresholds: (E - 1,) float32.
        right: (E, N), 1 where leaving at the exit answers right (or as the full network does).
        labelled: whether ``right`` is about labels.
    """
    taken = scored.exits(thresholds)
    shares = torch.bincount(taken, minlength=scored.num_exits).double() / scored.num_samples
    cost = float(scored.exit_costs(thresholds) @ shares)
    rate = float(right.gather(0, taken[None]).double().mean())
    answers = scored.predictions.gather(0, taken[None])[0]
    same = float((answers == trace.logits[-1].argmax(dim=1)).double().mean())
    return {
        "data": {
            "source": trace.source,
            "samples": trace.num_samples,
            "fingerprint": trace.fingerprint,
        },
        "achieved": {
            "cost_ratio": cost,
            "cost": cost * trace.full_cost,
            "cost_unit": trace.cost_unit,
            **({"accuracy": rate} if labelled else {}),
            "agreement": same,
            "shares": shares.tolist(),
        },
    }
