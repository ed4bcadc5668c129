"""Thresholds as BranchyNet finds them: every combination of a few entropies is tried."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offramp.decide.criteria import Entropy
from offramp.decide.policy import Policy, replay
from offramp.decide.provenance import provenance
from offramp.decide.scored import as_thresholds, score
from offramp.decide.trace import Trace
from offramp.errors import Infeasible, TraceError

__all__ = ["GRID", "Screened", "screen", "screen_all"]

# Nats; the entropy of ten classes is at most 2.3, so that the last lets everything out.
GRID = (1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Screened:
    """One combination of thresholds on a trace.

    Attributes:
        nats: the largest entropy at which each exit but the last is taken.
        accuracy: share of right answers.
        cost: mean cost, as a share of the backbone's.
        shares: of the samples at each of the E exits.
    """

    nats: tuple[float, ...]
    accuracy: float
    cost: float
    shares: tuple[float, ...]


def screen_all(trace: Trace, grid: Sequence[float] = GRID) -> list[Screened]:
    """Every combination of the entropies in ``grid``, in the order of the grid.

    How BranchyNet (Teerapittayanon et al., 2016) finds its thresholds. The combinations number
    ``len(grid) ** (E - 1)``: for networks of few exits. With more, ``calibrate`` searches.

    Raises:
        TraceError: the trace has no labels.
    """
    if trace.labels is None:
        raise TraceError(
            "Screening compares accuracies and this trace has no labels. Record it on labelled "
            "samples, or calibrate for agreement: offramp.calibrate(trace, min_agreement=0.99)."
        )
    tried = []
    for nats in itertools.product(grid, repeat=trace.num_exits - 1):
        done = replay(trace, Policy("entropy", nats=nats))
        counts = torch.bincount(done.exit, minlength=trace.num_exits).double()
        tried.append(
            Screened(
                nats,
                float((done.prediction == trace.labels).double().mean()),
                float(done.cost.double().mean()) / trace.full_cost,
                tuple((counts / trace.num_samples).tolist()),
            )
        )
    return tried


def screen(trace: Trace, *, max_accuracy_drop: float = 0.0, grid: Sequence[float] = GRID) -> Policy:
    """The cheapest combination that loses no more than ``max_accuracy_drop``.

    Args:
        trace: of samples that training never saw, with labels.
        max_accuracy_drop: against the backbone alone, as a share.
        grid: entropies to combine, in nats.

    Raises:
        TraceError: the trace has no labels, or holds training data.
        Infeasible: every combination loses more; carries the most accurate.
    """
    if trace.source == "training":
        raise TraceError(
            "Screening on the training samples would choose thresholds that are too loose. Record "
            "samples that training never saw."
        )
    tried = screen_all(trace, grid)
    full = float(torch.as_tensor(trace.logits[-1].argmax(1) == trace.labels).double().mean())
    allowed = [row for row in tried if row.accuracy >= full - max_accuracy_drop - 1e-12]
    if not allowed:
        best = max(tried, key=lambda row: (row.accuracy, -row.cost))
        raise Infeasible(
            f"All {len(tried)} combinations lose more than {max_accuracy_drop:g}; the best has an "
            f"accuracy of {best.accuracy:.4f} where the network alone has {full:.4f}. Allow a "
            "larger drop, or a grid with smaller entropies.",
            _policy(best, trace, len(tried)),
        )
    return _policy(min(allowed, key=lambda row: (row.cost, -row.accuracy)), trace, len(tried))


def _policy(row: Screened, trace: Trace, tried: int) -> Policy:
    rule, thresholds = Entropy("nats"), [-nats for nats in row.nats]
    about = provenance(trace, score(trace, rule), as_thresholds(thresholds))
    about["method"] = "screening"
    about["combinations"] = tried
    about["summary"] = f"screened on {trace.num_samples} samples of {trace.source}"
    return Policy(rule, thresholds, about)
