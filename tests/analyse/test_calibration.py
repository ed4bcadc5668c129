from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from offramp.analyse.calibration import expected_calibration_error
from offramp.errors import DataError


def by_hand(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    total = 0.0
    rows = []
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        shares = np.exp(row - row.max())
        shares /= shares.sum()
        rows.append((shares.max(), float(shares.argmax() == label)))
    for b in range(bins):
        inside = [(c, r) for c, r in rows if b / bins < c <= (b + 1) / bins]
        if inside:
            sure, right = np.mean(inside, axis=0)
            total += len(inside) / len(rows) * abs(right - sure)
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_it_is_the_hand_loop(bins):
    logits = 2 * torch.randn(200, 4)
    labels = torch.randint(0, 4, (200,))
    found = expected_calibration_error(logits, labels, bins)
    assert found == pytest.approx(by_hand(logits, labels, bins), abs=1e-12)


def test_sure_and_right_is_nought_sure_and_wrong_is_one():
    logits = torch.tensor([[1e3, 0.0], [1e3, 0.0]])
    assert expected_calibration_error(logits, torch.tensor([0, 0])) == 0
    assert expected_calibration_error(logits, torch.tensor([1, 1])) == 1


def test_honest_doubt_is_nought():
    logits = torch.tensor([[math.log(0.75), math.log(0.25)]]).repeat(4, 1)
    found = expected_calibration_error(logits, torch.tensor([0, 0, 0, 1]))
    assert found == pytest.approx(0, abs=1e-7)


def test_shapes_that_do_not_fit():
    with pytest.raises(DataError, match=r"got \(3, 2\) and \(2,\)"):
        expected_calibration_error(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))


def test_no_bins():
    with pytest.raises(DataError, match="one bin or more, got bins=0"):
        expected_calibration_error(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), bins=0)
