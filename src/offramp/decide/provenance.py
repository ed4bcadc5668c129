"""Where thresholds come from: what a policy remembers of the samples they were chosen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.decide.scored import Scored
from offramp.decide.trace import Trace

__all__ = ["CELLS", "of_another_network", "provenance", "seen_before"]

CELLS = 8  # per exit, in which a monitor counts scores: of equal shares on these samples
REMEMBERED = 64  # samples, by which a later trace is found to have them, too


def provenance(trace: Trace, scored: Scored, thresholds: Tensor) -> dict[str, Any]:
    """The data, and what the thresholds do there, as JSON can hold it.

    Args:
        trace: the calibration samples.
        scored: their scores.
        thresholds: (E - 1,) float32.
    """
    taken = scored.exits(thresholds)
    shares = torch.bincount(taken, minlength=scored.num_exits).double() / scored.num_samples
    cost = float(scored.exit_costs(thresholds) @ shares)
    answers = scored.predictions.gather(0, taken[None])[0]
    achieved: dict[str, Any] = {
        "cost_ratio": cost,
        "cost": cost * trace.full_cost,
        "cost_unit": trace.cost_unit,
        "agreement": float((answers == trace.logits[-1].argmax(dim=1)).double().mean()),
        "shares": shares.tolist(),
    }
    if trace.labels is not None:
        achieved["accuracy"] = float((answers == trace.labels).double().mean())
    data: dict[str, Any] = {
        "source": trace.source,
        "samples": trace.num_samples,
        "fingerprint": trace.fingerprint,
    }
    if trace.network is not None:
        data["network"] = list(trace.network)
    if trace.inputs is not None:
        data["inputs"] = _some(trace.inputs)
    return {
        "data": data,
        "achieved": achieved,
        "scores": _cells(scored, taken),
    }


def _some(inputs: Tensor) -> list[int]:
    """Hashes of some samples, always of the same ones: the least of those that come once."""
    values, counts = inputs.unique(return_counts=True)
    found: list[int] = values[counts == 1][:REMEMBERED].tolist()
    return found


def seen_before(trace: Trace, provenance: Mapping[str, Any]) -> float:
    """The share of the calibration samples that a trace has, too, as far as is remembered.

    Args:
        trace: other samples, or so one hopes.
        provenance: of a policy.

    Returns:
        1 for the same trace; 0 where nothing is remembered, or inputs are not known.
    """
    data = provenance.get("data")
    if not isinstance(data, Mapping):  # of somebody else's making
        return 0.0
    if data.get("fingerprint") == trace.fingerprint:
        return 1.0
    known = data.get("inputs")
    if trace.inputs is None or not known or not isinstance(known, list):
        return 0.0
    there = set(trace.inputs.tolist())
    return sum(mark in there for mark in known) / len(known)


def of_another_network(network: Sequence[str] | None, provenance: Mapping[str, Any]) -> bool:
    """Whether thresholds were chosen for other weights than these, as far as is remembered.

    Args:
        network: digests of a network's heads and backbone, ``None`` where they are not known.
        provenance: of a policy.
    """
    data = provenance.get("data")
    known = data.get("network") if isinstance(data, Mapping) else None
    return network is not None and isinstance(known, list) and list(network) != known


def _cells(scored: Scored, taken: Tensor) -> list[dict[str, Any]]:
    """For each exit, where the scores of those that leave there lie.

    Edges part the scores into cells of about equal shares; ``counts`` has one more number than
    ``edges``.
    """
    out = []
    for k in range(scored.num_exits):
        scores = scored.scores[k, taken == k]
        edges = torch.empty(0)
        if len(scores):
            wanted = torch.linspace(0, 1, CELLS + 1, dtype=torch.float64)[1:-1]
            edges = scores.sort().values[(wanted * len(scores)).long()].unique()
        counts = torch.bincount(
            torch.bucketize(scores, edges, right=True), minlength=len(edges) + 1
        )
        out.append({"edges": edges.tolist(), "counts": counts.tolist()})
    return out
