from __future__ import annotations

import numpy as np
import pytest
import torch

from offramp.analyse.overthinking import overthinking
from offramp.errors import DataError


def by_hand(right, exit, answered):
    """Sample by sample, in words of the paper."""
    names = ("destructive", "rescued", "lost", "wasteful", "wasteful_full", "oracle_accuracy")
    counts = dict.fromkeys(names, 0)
    exits, samples = right.shape
    for n in range(samples):
        early, end = any(right[:-1, n]), right[-1, n]
        counts["destructive"] += early and not end
        counts["rescued"] += early and not end and answered[n]
        counts["lost"] += end and not answered[n]
        counts["wasteful"] += answered[n] and any(right[k, n] for k in range(exits) if k < exit[n])
        counts["wasteful_full"] += early and end
        counts["oracle_accuracy"] += early or end
    return {name: count / samples for name, count in counts.items()}


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_hand_loop(seed):
    rng = np.random.default_rng(seed)
    right = rng.random((4, 60)) < 0.6
    exit = rng.integers(0, 4, 60)
    answered = right[exit, np.arange(60)]
    found = overthinking(*map(torch.from_numpy, (right, exit, answered)))
    for name, share in by_hand(right, exit, answered).items():
        assert getattr(found, name) == pytest.approx(share), name


def test_accuracy_is_that_of_the_end_plus_rescued_less_lost():
    rng = np.random.default_rng(9)
    right = rng.random((3, 200)) < 0.7
    exit = rng.integers(0, 3, 200)
    answered = right[exit, np.arange(200)]
    found = overthinking(*map(torch.from_numpy, (right, exit, answered)))
    assert answered.mean() == pytest.approx(right[-1].mean() + found.rescued - found.lost)


def test_never_leaving_wastes_what_the_full_network_does():
    right = torch.from_numpy(np.random.default_rng(2).random((3, 200)) < 0.5)
    found = overthinking(right, torch.full((200,), 2), right[-1])
    assert found.wasteful == found.wasteful_full > 0


def test_shapes_that_do_not_fit():
    right, exit = torch.ones(2, 3) > 0, torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match=r"got \(2, 3\), \(4,\) and \(4,\)"):
        overthinking(right, torch.zeros(4), torch.ones(4) > 0)
    with pytest.raises(DataError, match=r"got \(2, 3\), \(3,\) and \(1,\)"):
        overthinking(right, exit, torch.ones(1) > 0)


@pytest.mark.parametrize("bad", [-1, 2])
def test_an_exit_that_there_is_not(bad):
    exit = torch.tensor([0, bad, 1])
    with pytest.raises(DataError, match=f"exits from 0 to 1.* got {min(bad, 0)} to {max(bad, 1)}"):
        overthinking(torch.ones(2, 3) > 0, exit, torch.ones(3) > 0)
