"""What exits learn by: objectives, which wrap each other.

*Objectives* are callables ``(outputs, labels, exits) -> (K, B)`` that give one term per supervised
exit and sample. The loop takes the mean over samples and the weighted sum over exits. They wrap
each other, so ``Matched(Distill(CrossEntropy(label_smoothing=0.1)))`` needs no new class, and a
plain function of the same signature does as well. In a loop of one's own, an :class:`ExitLoss`
makes one number of any of them::

    objective = ExitLoss(Distill(temperature=4.0), weights=[0.3, 0.6, 1.0])
    loss = objective(model(x), y)

``outputs`` and ``labels`` are as in :mod:`offramp.train.losses`, whose functions are used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from offramp.errors import DataError, unknown_name
from offramp.train.losses import (
    Teacher,
    boosted,
    chosen_exits,
    distillation,
    leave_shares,
    sample_losses,
    weighted_sum,
)

__all__ = [
    "Boosting",
    "CrossEntropy",
    "Distill",
    "ExitLoss",
    "ExitsSoFar",
    "Matched",
    "Objective",
    "check_objective",
    "judged_outputs",
    "nested",
    "without_others",
]


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


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy of each exit with the labels.

    Attributes:
        label_smoothing: share of the target that is spread evenly over the classes.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 0 <= self.label_smoothing <= 1:
            raise DataError(
                f"Expected a label smoothing from 0 to 1, but got {self.label_smoothing}. "
                "It is the share of the target that is spread evenly over the classes, such as 0.1."
            )

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``; see :func:`sample_losses`."""
        return sample_losses(outputs, labels, exits, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class Distill:
    """Another objective, mixed with distillation from the network's own best answer.

    ``(1 - a) * objective + a * T^2 KL``; see :func:`distillation`. The last exit keeps the plain
    objective when it is the teacher, as it has nothing to learn from itself. Where the objective
    inside is or wraps :class:`Boosting`, teacher and pupils answer by the running sums too.

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
        check_objective(self.objective, "Distill")
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
        chosen = chosen_exits(outputs, exits)
        hard = self.objective(outputs, labels, chosen)
        answers = _answers(self.objective, outputs)
        soft = distillation(answers, chosen, teacher=self.teacher, temperature=self.temperature)
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

    def __post_init__(self) -> None:
        """Check the settings."""
        check_objective(self.objective, "Boosting")

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
    ECCV 2022); here the weights follow from the exits' confidence instead of a second network: from
    that of the running sums, where the objective inside is or wraps :class:`Boosting`.

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
        check_objective(self.objective, "Matched")
        if not 0 <= self.floor <= 1:
            raise DataError(f"Expected a floor from 0 to 1, but got {self.floor}.")

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``."""
        chosen = chosen_exits(outputs, exits)
        shares = leave_shares(_answers(self.objective, outputs), self.sharpness)[chosen]
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

    def __post_init__(self) -> None:
        """Check the settings."""
        check_objective(self.objective, "ExitsSoFar")

    def __call__(
        self, outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        """Terms ``(K, B)``."""
        chosen = chosen_exits(outputs, exits)
        return self.objective([outputs[k] for k in range(max(chosen) + 1)], labels, chosen)


def judged_outputs(objective: Objective, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a network answers that learns by ``objective``: its logits, or their running sums.

    Args:
        objective: of the phase. Where it is or wraps :class:`Boosting`, the answers are the sums.
        outputs: ``E`` tensors ``(B, C)``.

    Returns:
        ``E`` tensors ``(B, C)``; sums are without gradient.
    """
    with torch.no_grad():
        return _answers(objective, outputs)


def _answers(objective: Objective, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """As :func:`judged_outputs`, with gradients."""
    sums = any(isinstance(part, Boosting) for part in nested(objective))
    return boosted(outputs) if sums else outputs


def nested(objective: object) -> Iterator[object]:
    """An objective and those that it wraps, from the outside in."""
    while objective is not None:
        yield objective
        objective = getattr(objective, "objective", None)


def check_objective(objective: object, whose: str) -> None:
    """Refuse what cannot be an objective, where it is given.

    Args:
        objective: what came.
        whose: what it was given to, for the error.

    Raises:
        DataError: it is a class, or nothing that can be called.
    """
    if isinstance(objective, type):
        name = objective.__name__
        raise DataError(f"{whose} got the class {name} as its objective. Make one: {name}().")
    if not callable(objective):
        raise DataError(
            f"{whose} got {objective!r} as its objective. Expected one such as CrossEntropy(), "
            "Distill(), Boosting() or Matched(), or a function (outputs, labels, exits) -> (K, B)."
        )


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

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_objective(self.objective, "ExitLoss")
        if isinstance(self.weights, str) or callable(self.weights):
            raise DataError(
                f"ExitLoss got weights={self.weights!r}. Expected one number per exit; those of a "
                'name come from exit_weights: weights=exit_weights("linear", model.num_exits).'
            )

    def __call__(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss.

        Args:
            outputs: ``E`` tensors ``(B, C)``.
            labels: ``(B,)`` integers.

        Returns:
            A scalar.

        Raises:
            DataError: the number of weights is not the number of exits, or labels are floats.
        """
        return weighted_sum(self.objective(outputs, labels).mean(1), self.weights)
