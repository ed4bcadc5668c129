"""How much each exit counts: by name, as numbers, as a function of the epoch, or learned.

Named weights are scaled so that the largest is one. Where that is the last exit, its loss counts
as in plain training, and a learning rate that suits the backbone still suits it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from offramp.errors import DataError, unknown_name

__all__ = ["WEIGHT_NAMES", "LearnedWeights", "Weights", "check_weights", "exit_weights"]

Weights = str | Sequence[float] | Callable[[int], Sequence[float]]

WEIGHT_NAMES = ("uniform", "linear", "inverse", "cost", "growing", "learned")

# The weight from which Shallow-Deep Networks let the internal classifiers grow.
_SDN_START = 0.01


def check_weights(weights: Weights) -> None:
    """Refuse unknown names before any training starts.

    Raises:
        DataError: ``weights`` is a name that is not known, or one number.
    """
    if isinstance(weights, str):
        if weights not in WEIGHT_NAMES:
            raise DataError(unknown_name("weights", weights, WEIGHT_NAMES))
    elif not callable(weights):
        _numbers(weights)


def exit_weights(
    weights: Weights,
    num_exits: int,
    *,
    stage_costs: Sequence[float] | None = None,
    epoch: int = 0,
    epochs: int = 1,
) -> tuple[float, ...]:
    """The weight of every exit in one epoch.

    * ``"uniform"``: 1 (BranchyNet's and MSDNet's plain sum);
    * ``"linear"``: ``(k + 1) / E``, later exits count more (PABEE, Zhou et al., NeurIPS 2020);
    * ``"inverse"``: ``1 / (k + 1)``, earlier exits count more;
    * ``"cost"``: the share of the backbone's cost that is spent when the exit is reached;
    * ``"growing"``: exits but the last grow evenly over the epochs from 0.01 to their ``"cost"``
      (Shallow-Deep Networks, Kaya et al., ICML 2019);
    * ``"learned"``: 1; see :class:`LearnedWeights`, which takes over in training.

    Args:
        weights: a name, ``E`` numbers, or a function of the epoch that returns ``E`` numbers.
        num_exits: ``E``, the backbone's own exit included.
        stage_costs: ``E`` costs of the backbone between consecutive exits, in any unit.
        epoch: which epoch of the phase, counted from 0.
        epochs: how many epochs the phase has.

    Returns:
        ``E`` numbers, none below 0.

    Raises:
        DataError: an unknown name, another number of weights, or weights that are negative, not
            finite, or all zero.
    """
    check_weights(weights)
    if not isinstance(weights, str):
        return _given(weights(epoch) if callable(weights) else weights, num_exits)
    if weights in ("uniform", "learned"):
        return (1.0,) * num_exits
    if weights == "linear":
        return tuple((k + 1) / num_exits for k in range(num_exits))
    if weights == "inverse":
        return tuple(1 / (k + 1) for k in range(num_exits))
    if stage_costs is None or len(stage_costs) != num_exits:
        raise DataError(
            f"Weights {weights!r} need the cost of each of the {num_exits} stages. Pass "
            "stage_costs=model.costs.stages, or choose 'uniform' or 'linear'."
        )
    total = sum(stage_costs)
    shares = tuple(spent / total for spent in accumulate(stage_costs))
    if weights == "cost":
        return shares
    done = epoch / max(epochs - 1, 1)
    grown = tuple(_SDN_START + (share - _SDN_START) * done for share in shares[:-1])
    return (*grown, 1.0)


class LearnedWeights(nn.Module):
    """Weights that follow from each exit's own uncertainty, learned with the network.

    ``L = sum_k w_k (exp(-s_k) L_k + s_k)`` with one free ``s_k`` per exit: for cross entropies,
    Kendall et al., "Multi-task learning using uncertainty to weigh losses" (CVPR 2018)
    up to the constant. An exit that cannot be learned well counts less.

    Args:
        num_exits: ``E``.
    """

    def __init__(self, num_exits: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(num_exits))

    def forward(self, losses: Tensor, weights: Tensor, exits: Sequence[int]) -> Tensor:
        """The loss of a step.

        Args:
            losses: ``(K,)`` mean loss of each supervised exit.
            weights: ``(K,)`` fixed factors.
            exits: indices of the supervised exits.

        Returns:
            A scalar.
        """
        log_variance = self.log_variance[list(exits)]
        return (weights * (torch.exp(-log_variance) * losses + log_variance)).sum()


def _given(values: Sequence[float], num_exits: int) -> tuple[float, ...]:
    given = _numbers(values)
    if len(given) != num_exits:
        raise DataError(
            f"{len(given)} weights were given for {num_exits} exits. Give one weight per exit; "
            "the last is the backbone's own."
        )
    if any(not math.isfinite(value) or value < 0 for value in given) or not any(given):
        raise DataError(
            f"Weights must be finite, not negative, and not all zero, but got {list(given)}."
        )
    return given


def _numbers(values: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"Got weights {values!r}. Expected one number per exit, such as [0.5, 1.0], a function "
            f"of the epoch that returns them, or a name: {', '.join(WEIGHT_NAMES)}."
        ) from error
