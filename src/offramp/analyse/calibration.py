"""Whether an exit is as sure as it is right."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import DataError

__all__ = ["expected_calibration_error"]


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The expected calibration error of the softmax confidence (Guo et al., 2017, equation 5).

    Samples are put into bins of equal width by the probability of the class they are given;
    ``sum_b (n_b / N) |accuracy_b - confidence_b|``.

    Args:
        logits: (N, C).
        labels: (N,) int64.
        bins: how many bins between 0 and 1.

    Returns:
        The error, from 0 to 1.

    Raises:
        DataError: shapes that do not fit, no samples, or fewer than one bin.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise DataError(
            f"A calibration error takes logits (N, C) and labels (N,) with N >= 1, got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if bins < 1:
        raise DataError(f"A calibration error needs one bin or more, got bins={bins}.")
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    gap = (predicted == labels).double() - confidence
    # Bins are (lower, upper], as in the paper: a confidence of exactly 1 falls into the last.
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, gap)
    return float(sums.abs().sum() / len(labels))
