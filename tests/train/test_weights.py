from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import DataError
from offramp.train.weights import WEIGHT_NAMES, LearnedWeights, check_weights, exit_weights


def test_named_weights() -> None:
    assert exit_weights("uniform", 4) == (1, 1, 1, 1)
    assert exit_weights("learned", 3) == (1, 1, 1)
    assert exit_weights("linear", 4) == (0.25, 0.5, 0.75, 1)
    assert exit_weights("inverse", 4) == pytest.approx((1, 1 / 2, 1 / 3, 1 / 4))
    assert exit_weights("cost", 3, stage_costs=[1, 1, 2]) == (0.25, 0.5, 1)


def test_growing_weights_end_at_the_cost() -> None:
    def at(epoch: int) -> tuple[float, ...]:
        return exit_weights("growing", 3, stage_costs=[1, 1, 2], epoch=epoch, epochs=5)

    assert at(0) == pytest.approx((0.01, 0.01, 1))
    assert at(2) == pytest.approx((0.13, 0.255, 1))
    assert at(4) == pytest.approx((0.25, 0.5, 1))
    assert exit_weights("growing", 3, stage_costs=[1, 1, 2]) == pytest.approx((0.01, 0.01, 1))


@given(
    name=st.sampled_from(WEIGHT_NAMES),
    exits=st.integers(1, 8),
    epochs=st.integers(1, 9),
    data=st.data(),
)
def test_named_weights_are_between_0_and_1(
    name: str, exits: int, epochs: int, data: st.DataObject
) -> None:
    epoch = data.draw(st.integers(0, epochs - 1))
    costs = [float(k + 1) for k in range(exits)]
    found = exit_weights(name, exits, stage_costs=costs, epoch=epoch, epochs=epochs)
    assert len(found) == exits
    assert all(0 < weight <= 1 for weight in found)
    assert max(found) == 1


def test_given_weights_and_functions_of_the_epoch() -> None:
    assert exit_weights([0.3, 2], 2) == (0.3, 2.0)
    assert exit_weights(lambda epoch: [epoch, 1], 2, epoch=7) == (7.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ("lineal", "Unknown weights 'lineal'. Did you mean 'linear'"),
        ([1.0], "1 weights were given for 2 exits"),
        ([1.0, -1.0], "not negative, and not all zero"),
        ([0.0, 0.0], "not all zero"),
        ([1.0, math.nan], "must be finite"),
        (lambda epoch: [1.0], "1 weights were given for 2 exits"),
        ("cost", "need the cost of each of the 2 stages"),
    ],
)
def test_wrong_weights(weights: object, text: str) -> None:
    with pytest.raises(DataError, match=text):
        exit_weights(weights, 2)  # type: ignore[arg-type]


def test_check_accepts_what_is_not_a_name() -> None:
    check_weights([1.0])
    check_weights(lambda epoch: [1.0])


def test_learned_weights_settle_at_the_inverse_of_the_loss() -> None:
    """At its minimum exp(-s) L + s has exp(s) = L, so the weight is 1 / L."""
    weigher = LearnedWeights(3)
    losses = torch.tensor([2.0, 0.5])
    optimizer = torch.optim.SGD(weigher.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        weigher(losses, torch.ones(2), [0, 2]).backward()
        optimizer.step()
    weights = torch.exp(-weigher.log_variance).tolist()
    assert weights == pytest.approx([0.5, 1.0, 2.0], rel=1e-4)
