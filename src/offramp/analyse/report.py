"""The numbers with intervals, the alternatives beside them, and the verdict."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.analyse import baselines
from offramp.analyse.baselines import Baseline
from offramp.analyse.calibration import expected_calibration_error
from offramp.analyse.frontier import Point, turned
from offramp.analyse.intervals import Interval, bootstrap, paired_difference, wilson
from offramp.analyse.overthinking import Overthinking, overthinking
from offramp.analyse.verdict import Verdict, verdict, with_time
from offramp.decide.defaults import usual_defaults
from offramp.decide.policy import Decisions, Policy, replay
from offramp.decide.provenance import of_another_network, seen_before
from offramp.decide.trace import Trace
from offramp.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

__all__ = ["ExitRow", "Report", "Scored", "evaluate"]

LEVEL = 0.95
CHANCE = 0.1  # of the calibration samples may be alike others, as where data hold images twice
SCHEMA = 1


@dataclass(frozen=True)
class Scored:
    """An accuracy with its interval, and the mean cost per sample that it takes."""

    accuracy: float
    interval: Interval
    cost: float


@dataclass(frozen=True)
class ExitRow:
    """One exit.

    Attributes:
        place: where it is; the last is ``"backbone"``.
        cost: of leaving there, heads that ran on the way included.
        share: of the samples that leave there under the policy.
        accuracy: of this exit on all samples.
        interval: of that accuracy.
        accuracy_taken: of the answers that leave here; ``None`` where none does.
        interval_taken: of that accuracy.
        calibration_error: expected calibration error on all samples; ``None`` without labels.
    """

    place: str
    cost: float
    share: float
    accuracy: float
    interval: Interval
    accuracy_taken: float | None
    interval_taken: Interval | None
    calibration_error: float | None


@dataclass(frozen=True)
class Report:
    """What a policy does on a data set. ``print(report)`` is a table.

    Costs are estimates in ``cost_unit``; measured time, where somebody measured it, is ``time``.

    Attributes:
        measure: ``"accuracy"``, or without labels ``"agreement"`` with the full network.
        samples: N.
        source: of the trace.
        cost_unit: of all costs.
        policy: one sentence about the rule and where it comes from.
        full: the backbone alone, without heads.
        early: the network under the policy.
        difference: accuracy of ``early`` less that of ``full``, and its paired interval.
        cost_ratio: mean cost with all heads that ran, over the backbone's.
        cost_interval: of that ratio, by bootstrap.
        exits: one row for each exit.
        overthinking: ``None`` without labels.
        truncations: everyone leaves at exit k.
        random: a random exit at equal cost.
        oracle: the hindsight oracle.
        frontier: the curve that the policy's thresholds run through.
        estimate: whether it is worth it by estimated cost.
        notes: what a reader has to know about these numbers.
        measured: what was measured beside the trace (time, agreement of runner and replay,
            versions, seed), as :meth:`with_measurements` took it.
    """

    measure: str
    samples: int
    source: str
    cost_unit: str
    policy: str
    full: Scored
    early: Scored
    difference: tuple[float, Interval]
    cost_ratio: float
    cost_interval: Interval
    exits: tuple[ExitRow, ...]
    overthinking: Overthinking | None
    truncations: tuple[Baseline, ...]
    random: Baseline
    oracle: Baseline
    frontier: tuple[Point, ...]
    estimate: Verdict
    notes: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether it is worth it, in the light of the time that was measured, if any was."""
        time = self.measured.get("time")
        return with_time(self.estimate, time) if isinstance(time, Mapping) else self.estimate

    def with_measurements(self, **measured: object) -> Report:
        """The same report with what was measured beside the trace.

        Args:
            measured: JSON-able values; ``time`` is shown in the table, and the verdict heeds it: a
                mapping with ``engine``, ``threads`` and, for each batch size, ``batch_<size>`` with
                ``full_ms``, ``early_ms``, ``speedup`` and perhaps ``exits_ms``, milliseconds per
                sample.
        """
        return replace(self, measured={**self.measured, **measured})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        gain, gain_interval = self.difference
        plain = {
            "schema": SCHEMA,
            "kind": "report",
            "measure": self.measure,
            "samples": self.samples,
            "source": self.source,
            "policy": self.policy,
            "cost_unit": self.cost_unit,
            "full": asdict(self.full),
            "early": {**asdict(self.early), "gain": gain, "gain_interval": gain_interval},
            "exits": [asdict(row) for row in self.exits],
            "cost_ratio": self.cost_ratio,
            "cost_ratio_interval": self.cost_interval,
            "overthinking": None if self.overthinking is None else asdict(self.overthinking),
            "baselines": {
                "truncations": [_baseline(cut) for cut in self.truncations],
                "random": _baseline(self.random),
                "oracle": _baseline(self.oracle),
            },
            "frontier": [
                {"cost_ratio": point.cost_ratio, "accuracy": point.accuracy}
                for point in self.frontier
            ],
            "verdict": self.verdict.text,
            "worth_it": self.verdict.worth_it,
            "notes": list(self.notes),
            **self.measured,
        }
        # Through JSON, so that tuples are lists and what JSON cannot hold is refused here.
        return dict(json.loads(json.dumps(plain, allow_nan=False)))

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One self-contained HTML page; nothing in it is fetched when it is viewed."""
        from offramp.analyse.html import page

        return page(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy against cost.

        Args:
            ax: axes to draw on; new ones by default.

        Returns:
            The axes; ``.figure.savefig(...)`` writes them.
        """
        from offramp.analyse.plot import draw

        return draw(self, ax)

    def __rich__(self) -> Group:
        from offramp.analyse.table import render

        return render(self)

    def __str__(self) -> str:
        from offramp.analyse.table import as_text

        return as_text(self)


@usual_defaults()
def evaluate(
    trace: Trace,
    policy: Policy,
    *,
    tolerance: float = 0.01,
    resamples: int = 10_000,
    seed: int = 0,
) -> Report:
    """What the policy does on a trace, with intervals, baselines and a verdict.

    Without labels, the full network's answers count as right: accuracy is then agreement.

    Args:
        trace: recorded on samples that neither training nor calibration saw.
        policy: to judge.
        tolerance: the loss of accuracy that the verdict accepts, as a share.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The report.

    Raises:
        PolicyError: the policy is for another number of exits.
        DataError: a tolerance outside [0, 1], or fewer than one resample.

    Warns:
        UserWarning: the policy was calibrated on some of these samples, its criterion was fitted on
            some of them, or the trace holds training data, so that the numbers flatter it.
    """
    if not 0 <= tolerance <= 1 or resamples < 1:
        raise DataError(
            f"evaluate takes a tolerance from 0 to 1 and at least one resample, "
            f"got tolerance={tolerance}, resamples={resamples}."
        )
    decisions = replay(trace, policy)
    predicted = trace.logits.argmax(dim=2)
    labels = trace.labels
    reference = predicted[-1] if labels is None else labels
    right, answered = predicted == reference, decisions.prediction == reference
    # Summed as the policy's costs are, so that the ratio is 1 to the last bit where none leaves.
    full_cost = float(trace.exit_costs([False] * (trace.num_exits - 1))[-1])
    # By shares: where all leave at one exit, the mean is that exit's cost to the last bit.
    shares = torch.bincount(decisions.exit, minlength=trace.num_exits).double() / trace.num_samples
    mean_cost = float(shares @ trace.exit_costs(policy.active(trace.num_exits)))
    ratio = mean_cost / full_cost
    low, high = bootstrap(
        decisions.cost.numpy() / full_cost, level=LEVEL, resamples=resamples, seed=seed
    )
    ratio_interval = (min(low, ratio), max(high, ratio))  # the two means are rounded differently
    difference = _difference(right[-1], answered, labels is not None)
    cuts = baselines.truncations(trace, right, answered, LEVEL)
    random = baselines.random_exit(trace, right, answered, decisions.exit, mean_cost, LEVEL, seed)
    measure = "agreement" if labels is None else "accuracy"
    thinking = None if labels is None else overthinking(right, decisions.exit, answered)
    return Report(
        measure=measure,
        samples=trace.num_samples,
        source=trace.source,
        cost_unit=trace.cost_unit,
        policy=policy.describe(),
        full=_scored(right[-1], full_cost),
        early=_scored(answered, mean_cost),
        difference=difference,
        cost_ratio=ratio,
        cost_interval=ratio_interval,
        exits=_exit_rows(trace, policy, decisions, right, answered),
        overthinking=thinking,
        truncations=tuple(cuts),
        random=random,
        oracle=baselines.oracle(trace, right, answered, LEVEL),
        frontier=tuple(turned(trace, policy, reference)),
        estimate=verdict(
            cost=mean_cost,
            cost_ratio=ratio,
            cost_interval=ratio_interval,
            difference=difference[0],
            difference_interval=difference[1],
            truncations=cuts,
            random=random,
            tolerance=tolerance,
            measure=measure,
        ),
        notes=_notes(trace, policy),
    )


def _scored(right: Tensor, cost: float) -> Scored:
    interval = wilson(int(right.sum()), len(right), LEVEL)
    return Scored(float(right.double().mean()), interval, cost)


def _difference(full: Tensor, early: Tensor, labelled: bool) -> tuple[float, Interval]:
    samples = len(full)
    if not labelled:  # the full network is right by definition: one share, nothing to pair
        agreed = int(early.sum())
        lower, upper = wilson(agreed, samples, LEVEL)
        return (agreed - samples) / samples, (lower - 1, upper - 1)
    gained, lost = int((early & ~full).sum()), int((full & ~early).sum())
    return (gained - lost) / samples, paired_difference(gained, lost, samples, LEVEL)


def _exit_rows(
    trace: Trace, policy: Policy, decisions: Decisions, right: Tensor, answered: Tensor
) -> tuple[ExitRow, ...]:
    costs = trace.exit_costs(policy.active(trace.num_exits))
    rows = []
    for k in range(trace.num_exits):
        here = decisions.exit == k
        count, correct = int(here.sum()), int(right[k].sum())
        taken = int((answered & here).sum())
        labels = trace.labels
        error = None if labels is None else expected_calibration_error(trace.logits[k], labels)
        rows.append(
            ExitRow(
                place=trace.places[k],
                cost=float(costs[k]),
                share=count / trace.num_samples,
                accuracy=correct / trace.num_samples,
                interval=wilson(correct, trace.num_samples, LEVEL),
                accuracy_taken=taken / count if count else None,
                interval_taken=wilson(taken, count, LEVEL) if count else None,
                calibration_error=error,
            )
        )
    return tuple(rows)


def _notes(trace: Trace, policy: Policy) -> tuple[str, ...]:
    notes = []
    if of_another_network(trace.network, policy.provenance):
        notes.append(
            "The policy was calibrated on another network than the trace was recorded with (their "
            "weights differ: one was trained anew, or converted), so its thresholds and what it "
            "promises are not for this one: calibrate on a trace of this network."
        )
    known = seen_before(trace, policy.provenance)
    if known > CHANCE:
        notes.append(
            f"{known:.0%} of the samples that the policy was calibrated on are in this trace, so "
            "these numbers flatter it: evaluate on samples that calibration did not see."
        )
    shared = max((samples.overlap(trace) for samples in policy.criterion.fitted_on), default=0)
    if shared:
        notes.append(
            f"The criterion {policy.criterion.name!r} was fitted on {shared} of these "
            f"{trace.num_samples} samples, so these numbers flatter it: evaluate on samples that "
            "fitting did not see."
        )
    if trace.source == "training":
        notes.append(
            "The trace holds training data, on which every exit is surer and more often right "
            "than it will be: evaluate on samples that training did not see."
        )
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    if trace.labels is None:
        notes.append("No labels: the full network's answers count as right.")
    return tuple(notes)


def _baseline(baseline: Baseline) -> dict[str, Any]:
    lead, interval = baseline.lead
    plain = {key: value for key, value in asdict(baseline).items() if key != "lead"}
    return {**plain, "lead": lead, "lead_interval": interval}
