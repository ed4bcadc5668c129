"""Whether early exits pay here, in one or two sentences; the answer may be "do not bother"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.analyse.baselines import Baseline
from offramp.analyse.intervals import Interval

__all__ = ["Verdict", "verdict", "with_time"]


@dataclass(frozen=True)
class Verdict:
    """Whether it is worth it, and why."""

    worth_it: bool
    text: str


def verdict(
    *,
    cost: float,
    cost_ratio: float,
    cost_interval: Interval,
    difference: float,
    difference_interval: Interval,
    truncations: Sequence[Baseline],
    random: Baseline,
    tolerance: float,
    measure: str = "accuracy",
) -> Verdict:
    """Judge by the ends of the intervals: what they do not show is not claimed.

    Args:
        cost: mean cost per sample under the policy.
        cost_ratio: that over the backbone's.
        cost_interval: of the ratio.
        difference: accuracy under the policy less that of the full network, as a share.
        difference_interval: of that difference.
        truncations: everyone leaves at exit k, for each k.
        random: the random exit at equal cost.
        tolerance: the loss of accuracy that is acceptable, as a share.
        measure: what the shares are of, "accuracy" or "agreement".
    """
    saving = f"{_percent(1 - cost_ratio)} of the cost"
    within = f"95 % interval {_percent(1 - cost_interval[1])} to {_percent(1 - cost_interval[0])}"
    change = (
        f"{100 * difference:+.1f} points of {measure} "
        f"({100 * difference_interval[0]:+.1f} to {100 * difference_interval[1]:+.1f})"
    )
    if cost_interval[0] > 1:
        more = f"{_percent(cost_interval[0] - 1)} to {_percent(cost_interval[1] - 1)}"
        return Verdict(
            False,
            f"Do not bother: it costs {_percent(cost_ratio - 1)} more than the full network "
            f"(95 % interval {more}), since the heads cost more than leaving early saves.",
        )
    if cost_interval[1] >= 1:
        return Verdict(
            False,
            f"Do not bother: the saving is {saving} ({within}), which includes none.",
        )
    if difference < -tolerance:
        surely = "surely " if difference_interval[1] < -tolerance else ""
        return Verdict(
            False,
            f"Do not bother with this policy: it makes {change}, {surely}a greater loss than the "
            f"{100 * tolerance:.1f} points that are acceptable, for {saving}.",
        )
    served = _as_well(cost, truncations)
    if served is not None:
        return Verdict(
            False,
            f"Do not bother: it saves {saving}, but cutting the network off where {served.name} "
            f"is not shown to do worse on these samples ({measure} {_percent(served.accuracy)} at "
            f"{_percent(served.cost / cost)} of this policy's cost; {_lead(served)}), and is "
            f"simpler.",
        )
    if random.lead[1][0] <= 0:
        return Verdict(
            False,
            f"Do not bother with this criterion: it saves {saving} at {change}, but letting the "
            f"same shares leave at random is not shown to do worse on these samples ({measure} "
            f"{_percent(random.accuracy)}; {_lead(random)}).",
        )
    text = f"Worth it: it saves {saving} ({within}) at {change}."
    if difference_interval[0] < -tolerance:
        text += (
            f" These samples do not rule out a loss of more than {100 * tolerance:.1f} points: "
            f"test on more of them."
        )
    return Verdict(True, text)


def with_time(judged: Verdict, time: Mapping[str, Any]) -> Verdict:
    """The verdict in the light of measured time: a saving that no clock sees is none.

    Args:
        judged: by estimated cost.
        time: for each batch size, ``batch_<size>`` with ``speedup``.
    """
    speeds = {k.removeprefix("batch_"): v["speedup"] for k, v in time.items() if k[:6] == "batch_"}
    slower = [size for size, speed in speeds.items() if speed <= 1]
    if not judged.worth_it or not slower:
        return judged
    told = ", ".join(f"{speeds[size]:.2f} times as fast at batch {size}" for size in slower)
    if len(slower) < len(speeds):
        return Verdict(True, f"{judged.text} But not at every batch size: measured {told}.")
    return Verdict(
        False,
        f"Do not bother on this machine: the estimate is a saving, but measured it is {told}. "
        f"({judged.text})",
    )


def _as_well(cost: float, truncations: Sequence[Baseline]) -> Baseline | None:
    """The best truncation that costs no more and is not shown to be worse."""
    fits = [cut for cut in truncations if cut.cost <= cost and cut.lead[1][0] <= 0]
    return max(fits, key=lambda cut: (cut.accuracy, -cut.cost), default=None)


def _lead(other: Baseline) -> str:
    lead, (low, high) = other.lead
    return f"the policy leads by {100 * lead:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
