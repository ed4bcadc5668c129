from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from torch import Tensor

from offramp.errors import DataError
from offramp.train.losses import (
    boosted,
    cross_entropy,
    distillation,
    exit_accuracy,
    exit_losses,
    leave_shares,
    sample_losses,
)
from offramp.train.objectives import (
    Boosting,
    CrossEntropy,
    Distill,
    ExitLoss,
    ExitsSoFar,
    Matched,
    Objective,
)


def case(
    exits: int = 3, batch: int = 5, classes: int = 4, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = [
        torch.randn(batch, classes, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(exits)
    ]
    return outputs, torch.randint(0, classes, (batch,), generator=generator)


def by_hand(logits: Tensor, labels: Tensor) -> list[float]:
    """Cross entropy per sample, with scipy and a loop."""
    rows = log_softmax(logits.detach().numpy(), axis=1)
    return [-float(row[label]) for row, label in zip(rows, labels.tolist(), strict=True)]


@given(
    exits=st.integers(1, 5),
    batch=st.integers(1, 6),
    classes=st.integers(2, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_losses_equal_a_hand_loop(exits: int, batch: int, classes: int, seed: int) -> None:
    outputs, labels = case(exits, batch, classes, seed)
    expected = np.array([by_hand(logits, labels) for logits in outputs])
    np.testing.assert_allclose(sample_losses(outputs, labels).detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(exit_losses(outputs, labels).detach(), expected.mean(1), rtol=1e-10)
    weights = [0.5 * k + 0.1 for k in range(exits)]
    total = sum(w * row.mean() for w, row in zip(weights, expected, strict=True))
    assert cross_entropy(outputs, labels, weights).item() == pytest.approx(total)
    assert cross_entropy(outputs, labels).item() == pytest.approx(expected.mean(1).sum())


def test_accuracy_of_each_exit() -> None:
    outputs, labels = case()
    expected = [(logits.argmax(1) == labels).double().mean().item() for logits in outputs]
    assert exit_accuracy(outputs, labels).tolist() == pytest.approx(expected)


def test_weights_of_another_number_are_refused() -> None:
    outputs, labels = case()
    with pytest.raises(DataError, match=r"Weights of shape \(2,\) do not fit 3 exits"):
        cross_entropy(outputs, labels, [1.0, 2.0])


def test_an_exit_that_is_not_there_is_refused() -> None:
    outputs, labels = case()
    with pytest.raises(DataError, match="There is no exit 3: the outputs hold 3 exits"):
        sample_losses(outputs, labels, [0, 3])


@pytest.mark.parametrize(
    "objective",
    [
        CrossEntropy(),
        CrossEntropy(0.1),
        Distill(),
        Distill(teacher="ensemble"),
        Boosting(),
        Matched(),
        Distill(Boosting()),
        Distill(Boosting(), teacher="ensemble"),
        Matched(Boosting()),
    ],
    ids=repr,
)
def test_every_objective_reaches_the_supervised_exits_alone(objective: CrossEntropy) -> None:
    outputs, labels = case(4)
    terms = objective(outputs, labels, [1])
    assert terms.shape == (1, 5)
    terms.sum().backward()
    touched = [k for k, logits in enumerate(outputs) if logits.grad is not None]
    assert touched == [1]
    everything = objective(outputs, labels)
    assert everything.shape == (4, 5)
    assert torch.equal(everything[1], terms[0])


def test_label_smoothing_equals_its_definition() -> None:
    outputs, labels = case(1)
    rows = log_softmax(outputs[0].detach().numpy(), axis=1)
    hard = np.array(by_hand(outputs[0], labels))
    expected = 0.8 * hard + 0.2 * -rows.mean(1)
    np.testing.assert_allclose(CrossEntropy(0.2)(outputs, labels)[0].detach(), expected)


@pytest.mark.parametrize("teacher", ["last", "ensemble"])
def test_distillation_equals_the_formula(teacher: str) -> None:
    outputs, labels = case(3)
    temperature, weight = 2.5, 0.3
    tempered = [softmax(z.detach().numpy() / temperature, axis=1) for z in outputs]
    target = tempered[-1] if teacher == "last" else np.mean(tempered, axis=0)
    got = Distill(teacher=teacher, temperature=temperature, weight=weight)(outputs, labels)  # type: ignore[arg-type]
    for k in range(3):
        hard = np.array(by_hand(outputs[k], labels))
        soft = (target * np.log(target / tempered[k])).sum(1) * temperature**2
        alone = teacher == "last" and k == 2
        expected = hard if alone else (1 - weight) * hard + weight * soft
        np.testing.assert_allclose(got[k].detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_teacher_learns_nothing_from_its_pupils() -> None:
    outputs, _ = case(2)
    distillation(outputs, [0]).sum().backward()
    assert outputs[0].grad is not None
    assert outputs[1].grad is None


def test_equal_logits_have_nothing_to_distil() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)
    assert distillation([logits, logits]).abs().max().item() < 1e-12


def test_boosting_adds_up_and_stops_gradients_at_earlier_exits() -> None:
    outputs, labels = case(3)
    sums = boosted(outputs)
    assert torch.allclose(sums[2], outputs[0] + outputs[1] + outputs[2])
    Boosting()(outputs, labels, [2]).sum().backward()
    assert [z.grad is not None for z in outputs] == [False, False, True]


@given(seed=st.integers(0, 99), exits=st.integers(1, 5), sharpness=st.floats(0.1, 50))
@settings(max_examples=30, deadline=None)
def test_every_sample_leaves_once(seed: int, exits: int, sharpness: float) -> None:
    outputs, _ = case(exits, 6, 3, seed)
    shares = leave_shares(outputs, sharpness)
    assert shares.shape == (exits, 6)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(6, dtype=torch.float64))


def test_matched_gives_sure_samples_to_the_early_exit() -> None:
    sure = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
    outputs = [sure, torch.zeros(2, 2)]
    labels = torch.tensor([0, 0])
    plain = CrossEntropy()(outputs, labels)
    factor = Matched(floor=0.0)(outputs, labels) / plain
    assert factor[0, 0] > factor[0, 1]
    assert factor[1, 1] > factor[1, 0]
    torch.testing.assert_close(factor.mean(1), torch.ones(2))
    torch.testing.assert_close(Matched(floor=1.0)(outputs, labels), plain)


def test_objectives_wrap_each_other() -> None:
    outputs, labels = case(3)
    got = Matched(Distill(Boosting(CrossEntropy(0.1))), floor=1.0)(outputs, labels)
    sums = np.cumsum([logits.detach().numpy() for logits in outputs], axis=0)
    target = softmax(sums[2] / 3.0, axis=1)
    for k in range(3):
        rows = log_softmax(sums[k], axis=1)
        hard = -0.9 * rows[range(5), labels] - 0.1 * rows.mean(1)
        soft = 9.0 * (target * np.log(target / softmax(sums[k] / 3.0, axis=1))).sum(1)
        expected = hard if k == 2 else 0.5 * hard + 0.5 * soft
        np.testing.assert_allclose(got[k].detach(), expected, rtol=1e-9, atol=1e-12)


def test_what_is_around_boosting_learns_by_the_sums() -> None:
    outputs, labels = case(3)
    Distill(Boosting(), weight=1.0, temperature=1.0)(outputs, labels, [1]).sum().backward()
    first, own, last = (logits.detach().numpy() for logits in outputs)
    # The slope of a divergence, by hand: what is answered minus what is taught.
    expected = softmax(first + own, axis=1) - softmax(first + own + last, axis=1)
    assert outputs[1].grad is not None
    np.testing.assert_allclose(outputs[1].grad, expected, rtol=1e-9, atol=1e-12)
    shares = torch.stack(list(Matched(Boosting(), floor=0.0)(outputs, labels)))
    sums = [logits.detach() for logits in boosted(outputs)]
    torch.testing.assert_close(shares.detach(), Matched(floor=0.0)(sums, labels))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"teacher": "lst"}, "Unknown teacher 'lst'. Did you mean 'last'"),
        ({"temperature": 0.0}, "temperature above 0, but got 0.0"),
        ({"weight": 1.5}, "weight from 0 to 1, but got 1.5"),
    ],
)
def test_wrong_settings_of_distillation(settings: dict[str, object], text: str) -> None:
    with pytest.raises(DataError, match=text):
        Distill(**settings)  # type: ignore[arg-type]


def test_wrong_floor() -> None:
    with pytest.raises(DataError, match="floor from 0 to 1, but got -1"):
        Matched(floor=-1)


def test_uniform_logits_cost_log_of_the_classes() -> None:
    loss = exit_losses([torch.zeros(2, 8)], torch.tensor([1, 2]))
    assert loss.item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "objective",
    [
        CrossEntropy(0.1),
        Distill(),
        Distill(teacher="ensemble"),
        Boosting(),
        Matched(Distill(CrossEntropy())),
    ],
    ids=str,
)
def test_mixed_precision_is_summed_in_full(objective: Objective, half: torch.dtype) -> None:
    """Logits come in half precision there, and targets need not."""
    outputs = [logits.detach().to(half) for logits in case()[0]]
    labels = case()[1]
    terms = objective([outputs[0], *(logits.float() for logits in outputs[1:])], labels)
    assert terms.dtype == torch.float32
    full = objective([logits.float() for logits in outputs], labels)
    assert torch.equal(objective(outputs, labels), full)
    assert torch.equal(terms, full)


def test_labels_are_class_numbers() -> None:
    outputs = [torch.zeros(4, 3)] * 2
    with pytest.raises(DataError, match=r"Expected labels of shape \(4,\).*but got \(4, 3\)"):
        CrossEntropy()(outputs, torch.full((4, 3), 1 / 3))


CONFIDENCES = [
    [0.95, 0.6, 0.85],
    [0.7, 0.99, 0.9],
    [0.8, 0.8, 0.8],
]  # of three exits, of two classes


def shares_by_hand(sharpness: float) -> list[list[float]]:
    """Who leaves where, in plain numbers."""
    remaining, rows = [1.0] * 3, []
    for row in CONFIDENCES[:2]:
        mean = sum(row) / 3
        gates = [1 / (1 + math.exp(-sharpness * (confidence - mean))) for confidence in row]
        rows.append([left * gate for left, gate in zip(remaining, gates, strict=True)])
        remaining = [left * (1 - gate) for left, gate in zip(remaining, gates, strict=True)]
    return [*rows, remaining]


def confident() -> list[Tensor]:
    found = torch.tensor(CONFIDENCES, dtype=torch.float64)
    return list(torch.stack([found, 1 - found], -1).log())


@pytest.mark.parametrize("sharpness", [1.0, 10.0, 40.0])
def test_shares_equal_the_formula(sharpness: float) -> None:
    expected = torch.tensor(shares_by_hand(sharpness), dtype=torch.float64)
    torch.testing.assert_close(leave_shares(confident(), sharpness), expected)


@pytest.mark.parametrize("sharpness", [1.0, 40.0])
def test_matched_leaves_as_suddenly_as_it_is_told(sharpness: float) -> None:
    outputs, labels = confident(), torch.tensor([0, 1, 0])
    shares = np.array(shares_by_hand(sharpness))
    plain = np.array([by_hand(logits, labels) for logits in outputs])
    expected = plain * (0.2 + 0.8 * shares / shares.mean(1, keepdims=True))
    got = Matched(floor=0.2, sharpness=sharpness)(outputs, labels)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("exits", [None, [0]])
@pytest.mark.parametrize("teacher", ["last", "ensemble"])
def test_classes_may_be_masked(teacher: Any, exits: list[int] | None) -> None:
    """Their logits are -inf: it is as if there were the other classes alone."""
    fewer, labels = case(3, classes=3)
    masked = [
        torch.cat([z.detach(), torch.full((5, 1), -math.inf)], 1).requires_grad_() for z in fewer
    ]
    objective = Distill(teacher=teacher)
    terms, expected = objective(masked, labels, exits), objective(fewer, labels, exits)
    torch.testing.assert_close(terms, expected)
    terms.sum().backward()
    expected.sum().backward()
    for k in exits or range(3):
        slopes, wanted = masked[k].grad, fewer[k].grad
        assert slopes is not None
        torch.testing.assert_close(slopes, torch.cat([wanted, torch.zeros(5, 1)], 1))


def test_the_backbone_alone_may_mask_classes() -> None:
    outputs, labels = case(2)
    outputs[1] = outputs[1].detach().index_fill(1, torch.tensor(3), -math.inf).requires_grad_()
    terms = Distill()(outputs, labels % 3)
    terms.sum().backward()
    assert torch.isfinite(terms).all()
    assert all(z.grad is not None and torch.isfinite(z.grad).all() for z in outputs)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, torch.int64])
def test_labels_of_any_integers(kind: torch.dtype) -> None:
    outputs, labels = case()
    expected = ExitLoss()(outputs, labels)
    assert torch.equal(ExitLoss()(outputs, labels.to(kind)), expected)
    assert torch.equal(exit_losses(outputs, labels.to(kind)), exit_losses(outputs, labels))


@pytest.mark.parametrize(
    "loss", [ExitLoss(), ExitLoss(Distill()), exit_losses], ids=["plain", "distilled", "function"]
)
def test_labels_that_are_floats(loss: Any) -> None:
    outputs, labels = case()
    with pytest.raises(DataError, match=r"Labels of type torch.float32 .* labels.long\(\)"):
        loss(outputs, labels.float())


@pytest.mark.parametrize("smoothing", [1.5, -0.1, math.nan])
def test_wrong_label_smoothing(smoothing: float) -> None:
    with pytest.raises(DataError, match=f"smoothing from 0 to 1, but got {smoothing}"):
        CrossEntropy(smoothing)


@pytest.mark.parametrize("make", [ExitLoss, Distill, Boosting, Matched, ExitsSoFar])
def test_what_is_no_objective(make: Any) -> None:
    name = make.__name__
    with pytest.raises(DataError, match=f"{name} got 'distill' as its objective. Expected one"):
        make("distill")
    with pytest.raises(DataError, match=rf"{name} got the class Distill .* Make one: Distill\(\)"):
        make(Distill)


def test_weights_of_a_name_are_not_for_a_loss() -> None:
    with pytest.raises(DataError, match=r"ExitLoss got weights='linear'.*exit_weights\(\"linear\""):
        ExitLoss(weights="linear")
    with pytest.raises(DataError, match="Expected one number per exit"):
        ExitLoss(weights=lambda epoch: [1.0])  # type: ignore[arg-type]
