from __future__ import annotations

import pytest
import torch

from offramp.train.meter import Meter


def test_means_are_over_samples_not_over_batches() -> None:
    meter = Meter(2)
    outputs = [torch.eye(3), torch.eye(3).flip(0)]
    meter.update((0, 1), torch.tensor([1.0, 2.0]), outputs, torch.tensor([0, 1, 2]))
    small = [logits[:1] for logits in outputs]
    meter.update((0, 1), torch.tensor([5.0, 6.0]), small, torch.tensor([2]))
    assert meter.losses == pytest.approx((2.0, 3.0))
    assert meter.accuracies == pytest.approx((3 / 4, 2 / 4))
    assert meter.samples == 4


def test_an_exit_counts_when_it_was_supervised() -> None:
    meter = Meter(3)
    outputs = [torch.eye(2)] * 3
    labels = torch.tensor([0, 1])
    meter.update((2,), torch.tensor([4.0]), outputs, labels)
    meter.update((0, 2), torch.tensor([1.0, 2.0]), outputs, labels)
    assert meter.losses == (1.0, None, 3.0)
    assert meter.accuracies == (1.0, 1.0, 1.0)


def test_what_broke_once_stays_broken_until_reset() -> None:
    meter = Meter(3)
    outputs, labels = [torch.eye(2)] * 3, torch.tensor([0, 1])
    meter.update((0, 1, 2), torch.tensor([1.0, float("nan"), float("inf")]), outputs, labels)
    meter.update((0, 1, 2), torch.ones(3), outputs, labels)
    assert meter.broken == [1, 2]
    meter.reset()
    assert meter.broken == []
    assert meter.losses == (None, None, None)


def test_state_is_put_back() -> None:
    meter, other = Meter(2), Meter(2)
    args = (torch.tensor([0.3]), [torch.eye(2)] * 2, torch.tensor([0, 0]))
    meter.update((1,), *args)
    other.load_state({name: value.clone() for name, value in meter.state().items()})
    for each in (meter, other):
        each.update((1,), *args)
    assert other.losses == meter.losses
    assert other.accuracies == meter.accuracies
    assert other.samples == meter.samples == 4


def test_it_keeps_no_graph() -> None:
    meter = Meter(1)
    loss = torch.tensor([1.0], requires_grad=True)
    meter.update((0,), loss * 2, [torch.eye(2)], torch.tensor([0, 1]))
    assert not meter.state()["loss"].requires_grad
