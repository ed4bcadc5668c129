"""Exact tests of "the mean loss is above a bound" for losses of two or three values.

Binomial tails are summed in float64 from logarithms; nothing here is an approximation by a normal.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy.special import bdtrc
from torch import Tensor

__all__ = ["SPARED", "ScoreTest", "binomial_limit", "enough", "score_test"]

ROOMS = 6.5  # standard deviations that are summed to each side: beyond lies less than 1e-10
DENSE = 0.5  # step of the nuisance rate, in its own standard deviations
RARE = 100.0  # expected number of rare samples up to which the nuisance is looked at that closely
WIDE = 1.5  # and beyond, where skewness fades, each step so many times the one before
CLOSE = 1e-12  # relative, to which a critical value is found
STEP = 0.01  # in which the critical value of a rate is looked for below that of others
SPARED = 0.02  # of the error, for the rates that lie between those that are looked at


def log_binomial(samples: int, rate: float, count: Tensor) -> Tensor:
    """Ln P(X = count) for X ~ Binomial(samples, rate), float64."""
    count = count.double()
    if rate <= 0:
        return torch.where(count == 0, 0.0, -torch.inf).double()
    if rate >= 1:
        return torch.where(count == samples, 0.0, -torch.inf).double()
    size = torch.tensor(samples, dtype=torch.float64)
    choose = (size + 1).lgamma() - (count + 1).lgamma() - (size - count + 1).lgamma()
    return choose + count * math.log(rate) + (size - count) * math.log1p(-rate)


@lru_cache(maxsize=4096)
def binomial_limit(samples: int, bound: float, error: float) -> int:
    """How many losses of 1 may be seen, for the claim "the rate is at most ``bound``".

    The claim is made where P(Binomial(n, bound) <= losses) <= error, which is where the upper end
    of Clopper and Pearson's interval (1934) lies at or below the bound.

    Args:
        samples: n.
        bound: the rate that is claimed not to be exceeded, in [0, 1).
        error: the probability with which the claim may be wrong.

    Returns:
        The largest number, or -1 where even none would not do.
    """
    low, high = -1, math.floor(samples * bound)
    spread = ROOMS * math.sqrt(samples * bound * (1 - bound)) + 2 * ROOMS**2
    start = max(0, math.floor(samples * bound - spread))
    tail = log_binomial(samples, bound, torch.arange(start, max(high, start) + 1)).logcumsumexp(0)
    fits = (tail <= math.log(error)).sum()
    return max(low, start + int(fits) - 1) if int(fits) else low


def enough(bound: float, error: float) -> int:
    """The least number of samples with which a loss of 0 or 1 could be claimed to be rare."""
    if bound >= 1:
        return 1
    return math.ceil(math.log(error) / math.log1p(-bound))


class ScoreTest:
    """Whether a loss in {-1, 0, 1} has a mean above a bound, by an exact unconditional test.

    The accuracy gap is such a loss: 1 where leaving early lost a right answer, -1 where it won one.
    The statistic is the score statistic of paired proportions (Tango, 1998, equation 3): the mean
    loss minus the bound, over its standard error at the most likely rates that have the bound as
    their mean. What remains unknown under the hypothesis is the rate q of samples at -1; the
    critical value is the one whose error is within limits at every q (Barnard, 1947), by summing
    the trinomial over a grid of q, dense at both of its ends. Between its points the error is up
    to 2 % larger than on them (summed on grids ten times as fine), so that much of it is spared.
    Above the bound the error is smaller than on it: what speaks for the claim still does so with
    fewer losses or more gains.

    Args:
        samples: n.
        bound: of the mean, at least 0 and below 1.
        error: the probability of passing when the mean is above the bound.
    """

    def __init__(self, samples: int, bound: float, error: float) -> None:
        self.samples, self.bound, self.error = samples, bound, error
        self.critical = self._critical()

    def statistic(self, lost: Tensor, won: Tensor) -> Tensor:
        """The score statistic of counts of 1 and of -1, any shape, float64."""
        size, bound = float(self.samples), self.bound
        lost, won = lost.double(), won.double()
        rest = size - lost - won
        linear = lost * (1 - bound) + won * (1 - 3 * bound) - 2 * rest * bound
        root = (linear**2 + 8 * size * won * bound * (1 - bound)).clamp(min=0).sqrt()
        rate = ((linear + root) / (4 * size)).clamp(min=0)
        variance = 2 * rate + bound - bound**2
        gap = (lost - won) / size - bound
        scaled = gap / (variance / size).sqrt()
        # Without variance (a bound of 0 and nothing seen) nothing speaks against the hypothesis.
        return torch.where(variance > 0, scaled, 0.0)

    def passes(self, lost: Tensor, won: Tensor) -> Tensor:
        """Whether "the mean is at most the bound" may be claimed, bool of the same shape."""
        return self.statistic(lost, won) < self.critical

    def _critical(self) -> float:
        """The statistic below which a claim is made: the strictest over all nuisance rates."""
        size = self.samples
        near = torch.arange(0.0, math.sqrt(RARE) + 0.5, DENSE / 2, dtype=torch.float64) ** 2 / size
        steps = math.ceil(math.log(max(size / RARE, 1.0), WIDE))
        far = RARE / size * WIDE ** torch.arange(1.0, steps + 1, dtype=torch.float64)
        rates = torch.cat([near, far])
        # At most so many are at -1; where nearly all are at one end, the rest is rare likewise.
        top = (1 - self.bound) / 2 * (1 - 1e-9)
        rates = torch.cat([rates[rates < top], top - rates[rates < 0.75 * top]])
        critical = math.inf
        # Widely spread ones first: what they allow is near the end, and checked in one look.
        for rate in torch.cat([rates[first::8] for first in range(8)]).tolist():
            critical = self._at(rate, critical)
        return critical

    def _at(self, rate: float, critical: float) -> float:
        """The critical value if the share at -1 were ``rate`` and the mean the bound, or a lower.

        Found by halving: the error grows with the critical value. It ends below the first value of
        the statistic that is too much, and closer to it than to any before.

        Args:
            rate: at -1.
            critical: what other rates allow.
        """
        lost, weight = _around(self.samples, rate + self.bound)
        rest = self.samples - lost
        given = rate / (1 - rate - self.bound) if rate > 0 else 0.0
        mass = weight.exp()
        # What is not summed counts against the claim.
        allowed = (1 - SPARED) * self.error - max(0.0, 1.0 - float(mass.sum()))
        if allowed <= 0:  # an error so small that it is lost in what is not summed
            return -math.inf

        def fits(value: float) -> bool:
            least = self._least_won(lost, rest, value)
            tail = torch.from_numpy(bdtrc((least - 1).numpy(), rest.numpy(), given))
            return float((mass * tail).sum()) <= allowed

        if fits(critical):
            return critical
        high, step = critical, 1.0
        if math.isinf(high):
            high = 0.0
            while fits(high):
                high += step
                step *= 2
        low, step = high - STEP, STEP
        while not fits(low):
            high, step = low, 2 * step
            low -= step
        while high - low > CLOSE * max(1.0, abs(low)):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _least_won(self, lost: Tensor, rest: Tensor, critical: float) -> Tensor:
        """How many must be at -1 beside those at 1, for a statistic below the critical value.

        By halving: the more there are, the lower is the statistic. One more than the rest of the
        samples where no number will do.
        """
        low, high = torch.zeros_like(lost), rest + 1
        while bool((low < high).any()):
            middle = (low + high) // 2
            good = (self.statistic(lost, middle) < critical) | (low >= high)
            low, high = torch.where(good, low, middle + 1), torch.where(good, middle, high)
        return high


@lru_cache(maxsize=256)
def score_test(samples: int, bound: float, error: float) -> ScoreTest:
    """The test for these figures, made once."""
    return ScoreTest(samples, bound, error)


def _ends(samples: int, rate: float) -> tuple[int, int]:
    """The counts between which practically all of a binomial lies."""
    mean = samples * rate
    spread = ROOMS * math.sqrt(max(mean * (1 - rate), 0.0)) + ROOMS
    return max(0, math.floor(mean - spread)), min(samples, math.ceil(mean + spread + ROOMS))


def _around(samples: int, rate: float) -> tuple[Tensor, Tensor]:
    """Counts of a binomial that matter, and their log-probabilities."""
    low, high = _ends(samples, rate)
    counts = torch.arange(low, high + 1)
    return counts, log_binomial(samples, rate, counts)
