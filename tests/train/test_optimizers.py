from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from offramp.errors import DataError
from offramp.train.optimizers import adamw, constant, cosine, schedule_of


def test_matrices_decay_and_vectors_do_not() -> None:
    weight, bias = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))
    optimizer = adamw([weight, bias], lr=0.1)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decays[id(weight)] > 0
    assert decays[id(bias)] == 0
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert len(adamw([weight]).param_groups) == 1


def test_it_descends_as_adamw_does() -> None:
    """Against a hand-written first step: p (1 - lr wd) - lr sign(g)."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = adamw([weight], lr=0.1)
    weight.grad = torch.tensor([[0.5, -3.0]])
    optimizer.step()
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.05) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)


@given(done=st.floats(0, 1, exclude_max=True))
def test_cosine_stays_between_0_and_1(done: float) -> None:
    assert 0 <= cosine(done) <= 1
    assert constant(done) == 1


def test_cosine_rises_and_falls() -> None:
    values = [cosine(step / 100) for step in range(100)]
    top = values.index(max(values))
    assert 2 < top < 8
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert values[-1] < 0.001


def test_schedules_by_name_or_as_they_are() -> None:
    assert schedule_of("cosine") is cosine
    assert schedule_of(constant) is constant
    with pytest.raises(DataError, match="Unknown schedule 'constnat'. Did you mean 'constant'"):
        schedule_of("constnat")
