"""A loop of one's own with the library's objectives, and fit() against it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import DataError
from offramp.train.loop import fit
from offramp.train.losses import cross_entropy
from offramp.train.objectives import Boosting, CrossEntropy, Distill, ExitLoss, Matched, Objective
from offramp.train.schemes import Joint
from offramp.train.weights import exit_weights
from tests.train.tiny import data_of, loader_of, model_of, plain_model_of


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def assert_same_weights(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, msg=name, **tolerance)


@pytest.mark.parametrize(
    "inner",
    [
        CrossEntropy(label_smoothing=0.1),
        Distill(temperature=4.0),
        Distill(CrossEntropy(0.1), teacher="ensemble", weight=0.3),
        Boosting(),
        Matched(Distill()),
    ],
    ids=["smoothed", "distill", "ensemble", "boosting", "matched-distill"],
)
def test_a_plain_loop_ends_where_fit_ends(inner: Objective) -> None:
    fitted = model_of(dropout=0.0)
    model = copy.deepcopy(fitted).train()
    scheme = Joint(inner, weights="linear")
    settings: dict[str, Any] = {"optimizer": sgd, "schedule": "constant", "progress": False}
    fit(fitted, loader_of(shuffle=False), scheme=scheme, epochs=3, **settings)
    objective = ExitLoss(inner, weights=exit_weights("linear", model.num_exits))
    optimizer = sgd(model.parameters())
    for _ in range(3):
        for x, y in loader_of(shuffle=False):
            loss = objective(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_weights(fitted, model)


def test_the_loss_is_the_weighted_sum_of_means() -> None:
    x, y = data_of(8)
    outputs = plain_model_of()(x)
    torch.testing.assert_close(ExitLoss()(outputs, y), cross_entropy(outputs, y))
    weights = [0.5, 0.0, 2.0]
    terms = Distill()(outputs, y).detach()
    by_hand = sum(w * float(row.mean()) for w, row in zip(weights, terms, strict=True))
    assert ExitLoss(Distill(), weights)(outputs, y).item() == pytest.approx(by_hand, rel=1e-6)
    with pytest.raises(DataError, match=r"Weights of shape \(2,\) do not fit 3 exits"):
        ExitLoss(weights=[1.0, 1.0])(outputs, y)


def test_the_loss_of_the_model_itself_is_the_mean_over_the_exits() -> None:
    x, y = data_of(8)
    outputs = plain_model_of()(x, labels=y)
    assert outputs.loss is not None
    torch.testing.assert_close(outputs.loss, ExitLoss()(outputs, y) / len(outputs))


@pytest.mark.parametrize("scheme", [Joint(), Joint(Distill(), weights="linear")], ids=str)
def test_accumulated_gradients_equal_one_large_batch(scheme: Joint) -> None:
    small, large = plain_model_of(), plain_model_of()
    start = copy.deepcopy(large)
    settings: dict[str, Any] = {"scheme": scheme, "epochs": 3, "optimizer": sgd, "progress": False}
    fit(small, loader_of(batch=5, shuffle=False), accumulate=4, **settings)
    fit(large, loader_of(batch=20, shuffle=False), **settings)
    moved = [(large.get_parameter(n) - p).abs().max() for n, p in start.named_parameters()]
    assert min(moved) > 1e-3
    assert_same_weights(small, large, rtol=0, atol=1e-6)


def test_half_precision_is_autocast() -> None:
    fitted = plain_model_of()
    model = copy.deepcopy(fitted)
    whole = copy.deepcopy(fitted)
    settings: dict[str, Any] = {"optimizer": sgd, "schedule": "constant", "progress": False}
    types: set[torch.dtype] = set()

    def noted(
        outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        types.update(logits.dtype for logits in outputs)
        return CrossEntropy()(outputs, labels, exits)

    loader = loader_of(shuffle=False)
    fit(fitted, loader, scheme=Joint(noted), epochs=3, precision="bf16-mixed", **settings)
    fit(whole, loader, epochs=3, accelerator="cpu", **settings)
    optimizer = sgd(model.parameters())
    for _ in range(3):
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert types == {torch.bfloat16}
    assert {p.dtype for p in fitted.parameters()} == {torch.float32}
    assert_same_weights(fitted, model)
    differences = [
        (a - b).abs().max() for a, b in zip(fitted.parameters(), whole.parameters(), strict=True)
    ]
    assert 0 < max(differences) < 0.05
