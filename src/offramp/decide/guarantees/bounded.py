"""Tests of "the mean loss is above a bound" for losses with many values between two limits."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from offramp.decide.guarantees.exact import log_binomial

__all__ = ["betting_log_wealth", "bets", "hoeffding_bentkus", "mixed"]

BETS = 24  # in the mixture: neighbours are near enough that little is lost between them
LEAST = 1e-3  # of the largest bet


def bets(bound: float, low: float, high: float) -> Tensor:
    """The bets that are mixed, (BETS,) float64: shares of what may be staked.

    A bet b on losses L multiplies wealth by ``1 + b (bound - L)``, which stays positive for
    ``b < 1 / (high - bound)``.

    Args:
        bound: of the mean loss, between the limits.
        low: the least that a loss can be.
        high: the most.
    """
    del low
    most = 0.999 / (high - bound)
    return most * torch.logspace(math.log10(LEAST), 0, BETS, dtype=torch.float64)


def betting_log_wealth(losses: Tensor, bound: float, stakes: Tensor) -> Tensor:
    """What each sample adds to the logarithm of each bet's wealth.

    Where the mean loss is the bound or more, the expected wealth of each bet, and of their mean, is
    at most 1, so that it reaches 1 / error with at most that probability (Waudby-Smith and Ramdas,
    2024, Estimating means of bounded random variables by betting, proposition 2, with a mixture of
    constant bets in place of a predictable one: it needs no order of the samples, so one prefix sum
    serves a whole path of thresholds).

    Args:
        losses: (...,) float64.
        bound: of the mean.
        stakes: (K,) from :func:`bets`.

    Returns:
        (K, ...) float64.
    """
    shape = (-1,) + (1,) * losses.ndim
    return (stakes.view(shape) * (bound - losses.double())).log1p()


def mixed(log_wealth: Tensor) -> Tensor:
    """The logarithm of the mean wealth, from (K, ...) logarithms to (...)."""
    return log_wealth.logsumexp(dim=0) - math.log(log_wealth.shape[0])


def hoeffding_bentkus(mean: Tensor, samples: int, bound: float, low: float, high: float) -> Tensor:
    """Hoeffding and Bentkus' p-value (Bates et al., 2021, theorem 4; Angelopoulos et al., 2021, 1).

    ``min(exp(-n h(m, a)), e P(Binomial(n, a) <= ceil(n m)))`` with m and a the mean loss and the
    bound brought to [0, 1], and h the Bernoulli divergence.

    Args:
        mean: observed mean losses, any shape.
        samples: n.
        bound: of the true mean.
        low: the least that a loss can be.
        high: the most.

    Returns:
        float64 of the same shape.
    """
    seen = ((mean.double() - low) / (high - low)).clamp(0, 1)
    goal = (bound - low) / (high - low)
    if goal >= 1:
        return torch.zeros_like(seen)
    left = torch.minimum(seen, torch.tensor(goal, dtype=torch.float64))
    divergence = torch.xlogy(left, left / goal) + torch.xlogy(1 - left, (1 - left) / (1 - goal))
    hoeffding = (-samples * divergence).exp()
    # A mean that is a whole number of losses must not be rounded up by its last bit.
    index = (seen * samples - 1e-9).ceil().clamp(0, samples).long()
    bentkus = (1 + _tails(samples, goal)[index]).exp()
    return torch.minimum(hoeffding, bentkus).clamp(max=1)


@lru_cache(maxsize=8)
def _tails(samples: int, rate: float) -> Tensor:
    """Ln P(Binomial(samples, rate) <= k) for k from 0, (samples + 1,) float64."""
    return log_binomial(samples, rate, torch.arange(samples + 1)).logcumsumexp(0)
