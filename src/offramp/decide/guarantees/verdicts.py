"""Whether a risk may be claimed to be within a bound, from sums over samples."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from offramp.decide.guarantees.bounded import (
    bets,
    betting_log_wealth,
    hoeffding_bentkus,
    mixed,
)
from offramp.decide.guarantees.exact import SPARED, binomial_limit, enough, score_test
from offramp.decide.guarantees.risks import Risk
from offramp.errors import PolicyError, unknown_name

__all__ = ["BOUNDS", "Test"]

MOST = 1 << 24  # samples: beyond, nobody is told how many would do
BOUNDS = ("auto", "betting", "clopper-pearson", "hoeffding-bentkus", "score")


class Test:
    """A test of "the mean loss exceeds the bound", by what has to be summed over samples for it.

    Losses become ``features``: whole ones, indicators of 1 and of -1; others, for means the loss,
    for bets the log of what each bet wins. Their sums over the samples are all that :meth:`passes`
    needs, so that a whole path of thresholds is tested with one prefix sum.

    Args:
        risk: the loss and its limits.
        bound: the mean that is claimed not to be exceeded.
        kind: one of ``BOUNDS``; ``"auto"`` is exact for whole losses and betting for others.

    Raises:
        PolicyError: an unknown bound, one that does not suit the loss, or a bound outside it.
    """

    __test__ = False  # no test case of pytest's, for all its name

    def __init__(self, risk: Risk, bound: float, kind: str = "auto") -> None:
        if kind not in BOUNDS:
            raise PolicyError(unknown_name("bound", kind, BOUNDS))
        if kind == "auto":
            exact = "clopper-pearson" if risk.low == 0 else "score"
            kind = exact if risk.whole else "betting"
        least = 0.0 if kind == "score" else risk.low
        if not least <= bound < risk.high:
            raise PolicyError(
                f"The bound on the {risk.name} must lie in [{least:g}, {risk.high:g}), got {bound}."
            )
        if kind == "clopper-pearson" and not (risk.whole and risk.low == 0):
            raise PolicyError(
                f"Clopper-Pearson is for losses of 0 or 1; the {risk.name} lies between "
                f"{risk.low:g} and {risk.high:g}. Use bound='auto'."
            )
        if kind == "score" and not (risk.whole and risk.low == -1):
            raise PolicyError(
                f"The score test is for losses of -1, 0 or 1, not for the {risk.name}. "
                f"Use bound='auto'."
            )
        self.risk, self.bound, self.kind = risk, bound, kind
        self.stakes = bets(bound, risk.low, risk.high)

    def features(self, losses: Tensor) -> Tensor:
        """What is summed: (F, ...) float64 from losses (...,)."""
        if self.risk.whole:
            return torch.stack([losses > 0, losses < 0]).double()
        if self.kind == "betting":
            return betting_log_wealth(losses, self.bound, self.stakes)
        return losses.double()[None]

    def passes(self, sums: Tensor, samples: int, error: float) -> Tensor:
        """Whether the claim may be made.

        Args:
            sums: (F, M), sums of the features over the samples, of M settings.
            samples: how many.
            error: the probability with which the claim may be wrong.

        Returns:
            (M,) bool.
        """
        if self.kind == "clopper-pearson":
            return sums[0] <= binomial_limit(samples, self.bound, error) + 0.5
        if self.kind == "score":
            return score_test(samples, self.bound, error).passes(sums[0].round(), sums[1].round())
        if self.kind == "betting":
            return mixed(self._won(sums, samples)) >= -math.log(error)
        mean = (sums[0] - sums[1] if self.risk.whole else sums[0]) / samples
        p = hoeffding_bentkus(mean, samples, self.bound, self.risk.low, self.risk.high)
        return p <= error

    def _won(self, sums: Tensor, samples: int) -> Tensor:
        """(K, M) what each bet has won of all samples, in logarithms."""
        if not self.risk.whole:
            return sums
        counts = torch.stack([sums[0], sums[1], samples - sums[0] - sums[1]])
        losses = torch.tensor([1.0, -1.0, 0.0])
        return betting_log_wealth(losses, self.bound, self.stakes) @ counts

    def needed(self, samples: int, error: float) -> int | None:
        """The least number of samples with which a loss that is always 0 would pass.

        Args:
            samples: how many there are.
            error: the probability with which the claim may be wrong.

        Returns:
            The number, or ``None`` where ``samples`` do, or where none that one could record does,
            as for a bound of 0 or less.
        """
        if self.bound <= 0 or self._silent(samples, error):
            return None
        return _least(self.risk, self.bound, self.kind, error)

    def _silent(self, samples: int, error: float) -> bool:
        """Whether so many samples without any loss pass."""
        if self.kind == "score" and samples < enough(self.bound, error):
            return False  # without having to make the test
        sums = self.features(torch.zeros(1)) * samples
        return bool(self.passes(sums, samples, error)[0])


@lru_cache(maxsize=256)
def _least(risk: Risk, bound: float, kind: str, error: float) -> int | None:
    """How many samples without any loss pass, by doubling and halving.

    An exact test of many samples takes long to make: of fewer than are tried first, none passes, as
    no gain and no loss at all would be too likely where no sample gains.
    """
    test = Test(risk, bound, kind)
    if kind == "score":
        few = enough(bound, (1 - SPARED) * error)
        return next((n for n in range(few, MOST) if test._silent(n, error)), None)
    low, high = 0, 1
    while not test._silent(high, error):
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if test._silent(middle, error) else (middle, high)
    return high
