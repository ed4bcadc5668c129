"""Watch a policy at work: does what comes still look like calibration, and does it cost as much?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.decide.policy import Policy
from offramp.decide.provenance import provenance
from offramp.decide.scored import as_thresholds, score
from offramp.decide.trace import Trace
from offramp.errors import DataError, PolicyError

__all__ = ["Monitor", "Watch"]

Array = NDArray[np.float64]

BINS = 10  # of the p-values that bets are placed on
STARTS = 40  # bettors that begin at doubling times, so that a late drift finds a fresh one
PACE = 0.01  # of the spread of scores, how far a held threshold moves for one sample


@dataclass(frozen=True)
class Watch:
    """What a monitor has seen.

    Attributes:
        samples: how many.
        alarm: whether the evidence of drift has ever reached the level for an alarm.
        since: after how many samples it did, or ``None``.
        evidence: the wealth of the bets against "no drift"; an alarm at 1 / false_alarm.
        shares: the share of samples that left at each exit.
        expected: what it was on calibration.
    """

    samples: int
    alarm: bool
    since: int | None
    evidence: float
    shares: tuple[float, ...]
    expected: tuple[float, ...]


class Monitor:
    """A sequential test that scores and exits still look like calibration.

    Each sample is placed among the calibration samples and those seen since by how hard it was: the
    exit it took, and its score there. Without drift these ranks are uniform and independent
    (conformal p-values: Vovk et al., 2005, Algorithmic learning in a random world, section 7.1), so
    no bet against that can be expected to gain; the wealth of a mixture of bettors, who learn from
    the past which ranks come too often, exceeds ``1 / false_alarm`` with at most the probability
    ``false_alarm``, ever (Ville, 1939). Finite calibration data is thereby allowed for. That the
    thresholds were chosen on the very samples the monitor compares with is not; give other ones as
    ``reference`` where the false alarm rate has to be exact.

    Args:
        policy: from ``calibrate``, whose provenance holds the calibration scores.
        false_alarm: the probability of ever raising a false alarm.
        reference: a trace to compare with instead.
        hold_cost: move the thresholds so that, of the samples that reach an exit, the share that
            leaves there stays that of calibration, and with it the mean cost, whatever comes
            (running quantiles by stochastic approximation: Robbins and Monro, 1951; Gibbs and
            Candès, 2021). Read :attr:`policy` for them. Drift is then not tested, because the
            thresholds hide it: look how far they have moved.
        seed: of the tie-breaks.

    Raises:
        PolicyError: a policy without the calibration scores and no reference, or a false alarm rate
            outside (0, 1).
    """

    def __init__(
        self,
        policy: Policy,
        *,
        false_alarm: float = 0.01,
        reference: Trace | None = None,
        hold_cost: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < false_alarm < 1:
            raise PolicyError(f"false_alarm must lie strictly between 0 and 1, got {false_alarm}.")
        about = _about(policy, reference)
        self._policy, self.false_alarm, self.hold_cost = policy, false_alarm, hold_cost
        self._edges = [np.asarray(cell["edges"], np.float32) for cell in about["scores"]]
        # Cells from the easiest (first exit, highest scores) to the hardest.
        self._sizes = [len(edges) + 1 for edges in self._edges]
        counts = [list(reversed(cell["counts"])) for cell in about["scores"]]
        self._cells = np.array([c for row in counts for c in row], np.float64)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self.expected = tuple(float(value) for value in about["achieved"]["shares"])
        self._taken = np.zeros(len(self._edges), np.int64)
        self._random = np.random.default_rng(seed)
        self._bins = np.zeros((STARTS, BINS))
        self._wealth = np.zeros(STARTS)  # logarithms
        order = np.arange(1, STARTS + 1)
        self._weights = np.log(1 / (order * (order + 1)))
        self._weights[-1] = math.log(1 / STARTS)  # what is left of the sum of all
        self._samples = 0
        self._since: int | None = None
        self._thresholds = np.array(policy.thresholds_for(len(self._edges)), np.float64)
        self._leaving, self._spread = _rates(self.expected, self._edges)

    @property
    def policy(self) -> Policy:
        """The policy with the thresholds as they stand."""
        if not self.hold_cost:
            return self._policy
        about = {**self._policy.provenance, "held": self._samples}
        about.pop("promise", None)  # it was of the thresholds as they were
        about["summary"] = (
            f"thresholds moved by a monitor over {self._samples} samples to hold the cost; nothing "
            f"is promised of them"
        )
        return Policy(self._policy.criterion, self._thresholds.tolist(), about)

    def observe(self, scores: ArrayLike, exits: ArrayLike) -> Watch:
        """Take note of samples, in the order in which they came.

        Args:
            scores: (B,) score of each at the exit it took.
            exits: (B,) the exit it took.

        Raises:
            DataError: shapes that do not fit, NaN, or an exit that the policy does not have.
        """
        score, exit = np.asarray(scores, np.float32), np.asarray(exits)
        if score.ndim != 1 or score.shape != exit.shape or np.isnan(score).any():
            raise DataError(
                f"observe takes one score and one exit for each sample, without NaN, got shapes "
                f"{score.shape} and {exit.shape}."
            )
        if (exit != np.floor(exit)).any():
            raise DataError("observe takes the numbers of exits, got some that are not whole.")
        if len(exit) and not (0 <= int(exit.min()) <= int(exit.max()) < len(self._edges)):
            raise DataError(
                f"Exits of this policy are 0..{len(self._edges) - 1}, got {int(exit.min())} to "
                f"{int(exit.max())}."
            )
        for value, k in zip(score, exit.astype(int), strict=True):
            self._samples += 1
            self._taken[k] += 1
            if self.hold_cost:
                self._hold(k)
            else:
                self._bet(self._place(value, k))
        return self.watch

    @property
    def watch(self) -> Watch:
        """What has been seen so far."""
        shares = self._taken / max(self._samples, 1)
        return Watch(
            self._samples,
            self._since is not None,
            self._since,
            math.exp(min(self._evidence(), 700.0)) if self._samples else 1.0,
            tuple(shares.tolist()),
            self.expected,
        )

    def _place(self, score: np.float32, exit: int) -> float:
        """The conformal p-value: the share of samples that were harder, ties at random."""
        inside = int(np.searchsorted(self._edges[exit], score, side="right"))
        cell = int(self._first[exit]) + self._sizes[exit] - 1 - inside
        self._cells[cell] += 1
        harder = self._cells[cell + 1 :].sum()
        return float((harder + self._random.random() * self._cells[cell]) / self._cells.sum())

    def _bet(self, p: float) -> None:
        started = min(self._samples.bit_length(), STARTS)
        chosen = min(int(p * BINS), BINS - 1)
        bins = self._bins[:started]
        # Krichevsky and Trofimov's estimate, from the past alone: that makes the bet fair.
        chance = (bins[:, chosen] + 0.5) / (bins.sum(axis=1) + BINS / 2)
        self._wealth[:started] += np.log(BINS * chance)
        bins[:, chosen] += 1
        if self._since is None and self._evidence() >= -math.log(self.false_alarm):
            self._since = self._samples

    def _evidence(self) -> float:
        total: float = np.logaddexp.reduce(self._weights + self._wealth)
        return float(total)

    def _hold(self, exit: int) -> None:
        for k in range(min(exit + 1, len(self._thresholds))):
            if math.isfinite(self._thresholds[k]):
                left = 1.0 if k == exit else 0.0
                self._thresholds[k] += PACE * self._spread * (left - self._leaving[k])


def _about(policy: Policy, reference: Trace | None) -> dict[str, Any]:
    """Cells, counts and shares of the calibration samples, or of the reference."""
    if reference is not None:
        scored = score(reference, policy.criterion)
        return provenance(
            replace(reference, labels=None),
            scored,
            as_thresholds(policy.thresholds_for(reference.num_exits)),
        )
    about = dict(policy.provenance)
    if "scores" not in about or "achieved" not in about:
        raise PolicyError(
            "This policy does not say what its scores were on calibration (it was set by hand), so "
            "there is nothing to compare with: calibrate it, or give reference=, a trace."
        )
    return about


def _rates(expected: Sequence[float], edges: list[NDArray[np.float32]]) -> tuple[Array, float]:
    """Of those that reach an exit, the share that leaves; and how far scores spread."""
    shares = np.asarray(expected)
    reached = np.concatenate([[1.0], 1 - np.cumsum(shares)[:-1]])
    leaving = np.where(reached > 1e-12, shares / np.maximum(reached, 1e-12), 0.0)
    every = np.concatenate([*edges, np.zeros(0, np.float32)])
    spread = float(every.max() - every.min()) if len(every) > 1 else 1.0
    return leaving, spread or 1.0
