"""Losses over a sequence of exits: pure functions of logits and labels, usable in anybody's loop.

Everywhere ``outputs`` is what a multi-exit model returns, or any sequence of ``E`` logits tensors
of shape ``(B, C)``, the last being the backbone's own; ``labels`` is ``(B,)`` int64 with values in
``[0, C)``. In a plain loop one function is all it takes, or an :class:`ExitLoss` of any objective::

    loss = cross_entropy(model(x), y, weights=[0.3, 0.6, 1.0])

    objective = ExitLoss(Distill(temperature=4.0), weights=[0.3, 0.6, 1.0])
    loss = objective(model(x), y)

Schemes use *objectives*: callables ``(outputs, labels, exits) -> (K, B)`` that give one term per
supervised exit and sample. The loop takes the mean over samples and the weighted sum over exits.
Objectives wrap each other, so ``Matched(Distill(CrossEntropy(label_smoothing=0.1)))`` needs no
new class, and a plain function of the same signature does as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import DataError, unknown_name

__all__ = [
    "Boosting",
    "CrossEntropy",
    "Distill",
    "ExitLoss",
    "ExitsSoFar",
    "Matched",
    "Objective",
    "boosted",
    "cross_entropy",
    "distillation",
    "exit_accuracy",
    "exit_losses",
    "judged_outputs",
    "leave_shares",
    "sample_losses",
    "without_others",
]

Teacher = Literal["last", "ensemble"]


class Objective(Protocol):
    """What a phase minimises: one term for every supervised exit and sample."""

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms of the loss.

        Args:
            outputs: ``E`` tensors ``(B, C)``.
            labels: ``(B,)`` int64.
            exits: indices of the ``K`` supervised exits; all of them when ``None``. Backward must
                reach no other exit, so that what is not supervised costs nothing.

        Returns:
            ``(K, B)``.
        """
        ...


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
    chosen = _chosen(outputs, exits)
    if labels.shape != outputs[-1].shape[:1]:
        raise DataError(
            f"Expected labels of shape ({len(outputs[-1])},), a class number for each row, but got "
            f"{tuple(labels.shape)}. For probabilities as targets, write an objective of your own."
        )
    return F.cross_entropy(
        _stacked(outputs, chosen),
        labels.expand(len(chosen), -1),
        reduction="none",
        label_smoothing=label_smoothing,
    )


def exit_losses(
    outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
) -> Tensor:
    """Mean cross entropy of every exit: ``(K,)`` in nats."""
    return torch.stack(
        [F.cross_entropy(_full(outputs[k]), labels) for k in _chosen(outputs, exits)]
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
    return _weighted(exit_losses(outputs, labels), weights)


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
    chosen, last = _chosen(outputs, exits), len(outputs) - 1
    taught = _stacked(outputs, chosen)
    with torch.no_grad():
        teachers = [last] if teacher == "last" else list(range(last + 1))
        teaching = taught if teachers == chosen else _stacked(outputs, teachers)
        target = torch.softmax(teaching / temperature, 1).mean(0)
        negative_entropy = torch.special.xlogy(target, target).sum(0)
    cross = -(target * torch.log_softmax(taught / temperature, 1)).sum(1)
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


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy of each exit with the labels.

    Attributes:
        label_smoothing: share of the target that is spread evenly over the classes.
    """

    label_smoothing: float = 0.0

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``; see :func:`sample_losses`."""
        return sample_losses(outputs, labels, exits, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Distill:
    """Another objective, mixed with distillation from the network's own best answer.

    ``(1 - a) * objective + a * T^2 KL``; see :func:`distillation`. The last exit keeps the plain
    objective when it is the teacher, as it has nothing to learn from itself.

    Attributes:
        objective: what is mixed with.
        teacher: ``"last"`` or ``"ensemble"``.
        temperature: ``T > 0``.
        weight: ``a`` in ``[0, 1]``.
    """

    objective: Objective = field(default_factory=CrossEntropy)
    teacher: Teacher = "last"
    temperature: float = 3.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.teacher not in ("last", "ensemble"):
            raise DataError(unknown_name("teacher", str(self.teacher), ["last", "ensemble"]))
        if not self.temperature > 0:
            raise DataError(f"Expected a temperature above 0, but got {self.temperature}.")
        if not 0 <= self.weight <= 1:
            raise DataError(
                f"Expected a distillation weight from 0 to 1, but got {self.weight}. "
                "It is the share of the loss that comes from the teacher."
            )

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``."""
        chosen = _chosen(outputs, exits)
        hard = self.objective(outputs, labels, chosen)
        soft = distillation(outputs, chosen, teacher=self.teacher, temperature=self.temperature)
        share = torch.full((len(chosen), 1), self.weight, dtype=hard.dtype, device=hard.device)
        if self.teacher == "last":
            share[[k == len(outputs) - 1 for k in chosen]] = 0.0
        return torch.lerp(hard, soft, share)


@dataclass(frozen=True)
class Boosting:
    """Another objective on the running sums of logits, so that each exit learns what is left over.

    See :func:`boosted`.

    Attributes:
        objective: what is computed on the sums.
    """

    objective: Objective = field(default_factory=CrossEntropy)

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``."""
        return self.objective(boosted(outputs), labels, exits)


@dataclass(frozen=True)
class Matched:
    """Another objective, each exit trained mostly on the samples that will leave there.

    Training sees every sample at every exit, inference does not: easy samples leave early. Each
    term is multiplied by ``(1 - s) * p_k / mean p_k + s``, with ``p_k`` from :func:`leave_shares`.
    The gap is that of "Learning to Weight Samples for Dynamic Early-exiting Networks" (Han et al.,
    ECCV 2022); here the weights follow from the exits' confidence instead of a second network.

    Attributes:
        objective: what is weighted.
        floor: ``s`` in ``[0, 1]``, the share of the weight that every sample keeps at every exit.
        sharpness: how sudden leaving is.
    """

    objective: Objective = field(default_factory=CrossEntropy)
    floor: float = 0.5
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 <= self.floor <= 1:
            raise DataError(f"Expected a floor from 0 to 1, but got {self.floor}.")

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``."""
        chosen = _chosen(outputs, exits)
        shares = leave_shares(outputs, self.sharpness)[chosen]
        relative = shares / shares.mean(1, keepdim=True).clamp_min(1e-12)
        terms = self.objective(outputs, labels, chosen)
        return terms * (self.floor + (1 - self.floor) * relative)


@dataclass(frozen=True)
class ExitsSoFar:
    """Another objective that sees no exit after those that are trained.

    For phases whose later exits are not trained yet: a teacher among the exits is then made of the
    earlier ones alone.

    Attributes:
        objective: what is computed on them.
    """

    objective: Objective = field(default_factory=CrossEntropy)

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``."""
        chosen = _chosen(outputs, exits)
        return self.objective([outputs[k] for k in range(max(chosen) + 1)], labels, chosen)


def judged_outputs(objective: Objective, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a network answers that learns by ``objective``: its logits, or their running sums.

    Args:
        objective: of the phase. Where it is or wraps :class:`Boosting`, the answers are the sums.
        outputs: ``E`` tensors ``(B, C)``.

    Returns:
        ``E`` tensors ``(B, C)``; sums are without gradient.
    """
    inner: object = objective
    while inner is not None and not isinstance(inner, Boosting):
        inner = getattr(inner, "objective", None)
    if inner is None:
        return outputs
    with torch.no_grad():
        return boosted(outputs)


def without_others(objective: Objective) -> Objective:
    """What is left of an objective where one exit alone is trained, and no other is of any use.

    Distillation, boosting and matched weights look at other exits; the objective inside of them
    is left.
    """
    while isinstance(objective, Distill | Boosting | Matched):
        objective = objective.objective
    return objective


@dataclass(frozen=True)
class ExitLoss:
    """An objective as one number, for a loop of one's own: ``sum_k w_k * mean_b term_kb``.

    It is what :func:`offramp.fit` minimises where the weights do not change and are not learned.

    Attributes:
        objective: gives the terms.
        weights: ``E`` weights; all one when ``None``. Those of a name come from
            :func:`offramp.train.exit_weights`.
    """

    objective: Objective = field(default_factory=CrossEntropy)
    weights: Sequence[float] | None = None

    def __call__(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss.

        Args:
            outputs: ``E`` tensors ``(B, C)``.
            labels: ``(B,)`` int64.

        Returns:
            A scalar.

        Raises:
            DataError: the number of weights is not the number of exits.
        """
        return _weighted(self.objective(outputs, labels).mean(1), self.weights)


def _weighted(losses: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
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


def _full(logits: Tensor) -> Tensor:
    """Logits of mixed precision in the precision that losses are summed in."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _chosen(outputs: Sequence[Tensor], exits: Sequence[int] | None) -> list[int]:
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
