"""Pure functions of logits and labels over a sequence of exits, usable in anybody's loop.

Everywhere ``outputs`` is what a multi-exit model returns, or any sequence of ``E`` logits tensors
of shape ``(B, C)``, the last being the backbone's own; ``labels`` is ``(B,)`` int64 with values in
``[0, C)``. In a plain loop one function is all it takes::

    loss = cross_entropy(model(x), y, weights=[0.3, 0.6, 1.0])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import DataError

__all__ = [
    "Teacher",
    "boosted",
    "chosen_exits",
    "cross_entropy",
    "distillation",
    "exit_accuracy",
    "exit_losses",
    "leave_shares",
    "sample_losses",
    "weighted_sum",
]

Teacher = Literal["last", "ensemble"]


def sample_losses(
    outputs: Sequence[Tensor],
    labels: Tensor,
    exits: Sequence[int] | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of every exit for every sample.

    Args:
        outputs: ``E`` tensors ``(B, C)``.
        labels: ``(B,)`` int64.
        exits: indices of ``K`` exits; all of them when ``None``.
        label_smoothing: share of the target that is spread evenly over the classes.

    Returns:
        ``(K, B)`` in nats.
    """
    chosen = chosen_exits(outputs, exits)
    if labels.shape != outputs[-1].shape[:1]:
        raise DataError(
            f"Expected labels of shape ({len(outputs[-1])},), a class number for each row, but got "
            f"{tuple(labels.shape)}. For probabilities as targets, write an objective of your own."
        )
    return F.cross_entropy(
        _stacked(outputs, chosen),
        _class_numbers(labels).expand(len(chosen), -1),
        reduction="none",
        label_smoothing=label_smoothing,
    )


def exit_losses(
    outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
) -> Tensor:
    """Mean cross entropy of every exit: ``(K,)`` in nats."""
    numbers = _class_numbers(labels)
    return torch.stack(
        [F.cross_entropy(_full(outputs[k]), numbers) for k in chosen_exits(outputs, exits)]
    )


def cross_entropy(
    outputs: Sequence[Tensor], labels: Tensor, weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Weighted sum of the exits' cross entropies.

    ``L = sum_k w_k * CE(logits_k, y)``: the joint loss of BranchyNet (Teerapittayanon et al.,
    ICPR 2016).

    Args:
        outputs: ``E`` tensors ``(B, C)``.
        labels: ``(B,)`` int64.
        weights: ``E`` weights; all one when ``None``.

    Returns:
        A scalar.

    Raises:
        DataError: the number of weights is not the number of exits.
    """
    return weighted_sum(exit_losses(outputs, labels), weights)


def exit_accuracy(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Share of the samples that each exit classifies rightly: ``(E,)`` float."""
    hits = torch.stack([logits.argmax(-1) for logits in outputs]) == labels
    return hits.float().mean(1)


def distillation(
    outputs: Sequence[Tensor],
    exits: Sequence[int] | None = None,
    *,
    teacher: Teacher = "last",
    temperature: float = 3.0,
) -> Tensor:
    """Divergence of each exit from the network's own best answer.

    ``T^2 * KL(softmax(t / T) || softmax(z_k / T))``: distillation between the exits of one network
    (Phuong and Lampert, "Distillation-based training for multi-exit architectures", ICCV 2019).
    The teacher gets no gradient.

    Args:
        outputs: ``E`` tensors ``(B, C)``.
        exits: indices of ``K`` exits; all of them when ``None``.
        teacher: ``"last"``, the backbone's own logits, or ``"ensemble"``, the mean of all exits'
            tempered probabilities.
        temperature: ``T > 0``; larger is softer.

    Returns:
        ``(K, B)`` in nats; exactly zero for the last exit when it is the teacher.
    """
    chosen, last = chosen_exits(outputs, exits), len(outputs) - 1
    taught = _stacked(outputs, chosen)
    with torch.no_grad():
        teachers = [last] if teacher == "last" else list(range(last + 1))
        teaching = taught if teachers == chosen else _stacked(outputs, teachers)
        target = torch.softmax(teaching / temperature, 1).mean(0)
        negative_entropy = torch.special.xlogy(target, target).sum(0)
    # A class that is masked by -inf has neither target nor probability; their product is no number.
    logs = torch.log_softmax(taught / temperature, 1).masked_fill(target == 0, 0.0)
    cross = -(target * logs).sum(1)
    divergence: Tensor = temperature**2 * (cross + negative_entropy)
    if teacher == "last" and last in chosen:
        itself = torch.tensor([[k == last] for k in chosen], device=divergence.device)
        divergence = divergence.masked_fill(itself, 0.0)
    return divergence


def boosted(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Running sums of the exits' logits, each exit correcting the ones before.

    ``F_k = z_k + stop_gradient(F_{k-1})``: Boosted Dynamic Neural Networks (Yu et al., AAAI 2023).
    What is trained so must be decided on the same running sums.

    Args:
        outputs: ``E`` tensors ``(B, C)``.

    Returns:
        ``E`` tensors ``(B, C)``.
    """
    sums: list[Tensor] = []
    for logits in outputs:
        own = _full(logits)
        sums.append(own + sums[-1].detach() if sums else own)
    return sums


def leave_shares(outputs: Sequence[Tensor], sharpness: float = 10.0) -> Tensor:
    """How likely each sample is to leave at each exit, judged by the exits' confidence.

    A sample stops at exit ``k`` with ``g_k = sigmoid(sharpness * (c_k - mean c_k))``, where ``c_k``
    is its largest softmax probability; the last exit takes the rest. So
    ``p_k = g_k * prod_{j<k} (1 - g_j)``, and every column sums to one.

    Args:
        outputs: ``E`` tensors ``(B, C)``.
        sharpness: how sudden the decision is; the limit is a hard threshold at the batch mean.

    Returns:
        ``(E, B)`` without gradient.
    """
    with torch.no_grad():
        remaining = torch.ones_like(_full(outputs[0])[:, 0])
        rows = []
        for logits in outputs[:-1]:
            confidence = torch.softmax(_full(logits), -1).amax(-1)
            gate = torch.sigmoid(sharpness * (confidence - confidence.mean()))
            rows.append(remaining * gate)
            remaining = remaining * (1 - gate)
        return torch.stack([*rows, remaining])


def weighted_sum(losses: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """Sum of the exits' losses ``(E,)``, each times its weight where there are any."""
    if weights is None:
        return losses.sum()
    factors = torch.as_tensor(weights, dtype=losses.dtype, device=losses.device)
    if factors.shape != losses.shape:
        raise DataError(
            f"Weights of shape {tuple(factors.shape)} do not fit {len(losses)} exits. "
            f"Give one weight per exit, the last being the backbone's own."
        )
    return (factors * losses).sum()


def _stacked(outputs: Sequence[Tensor], exits: Sequence[int]) -> Tensor:
    """(K, C, B): one operator for all exits, which goes over samples faster than over classes."""
    return torch.stack([_full(outputs[k]).mT for k in exits])


def _class_numbers(labels: Tensor) -> Tensor:
    """Labels of any integer type as the one that torch takes."""
    if not (labels.is_floating_point() or labels.is_complex()):
        return labels.long()
    if labels.dim() == 1:
        raise DataError(
            f"Labels of type {labels.dtype} came to a loss. Expected integers, a class number for "
            "each row: convert them with labels.long()."
        )
    return labels  # probabilities of the classes, which some losses of torch take


def _full(logits: Tensor) -> Tensor:
    """Logits of mixed precision in the precision that losses are summed in."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def chosen_exits(outputs: Sequence[Tensor], exits: Sequence[int] | None) -> list[int]:
    """The supervised exits, all where none are named; one that is not there is refused."""
    count = len(outputs)
    if exits is None:
        return list(range(count))
    wrong = [k for k in exits if not 0 <= k < count]
    if wrong:
        raise DataError(
            f"There is no exit {wrong[0]}: the outputs hold {count} exits, counted from 0; "
            f"the last, {count - 1}, is the backbone's own."
        )
    return list(exits)
