"""What the exits so far say together: agreement with this one, and votes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from offramp.decide.criteria.base import Criterion, State
from offramp.errors import PolicyError

__all__ = ["Agreement", "Voting"]


class Agreement(Criterion):
    """How many of the exits so far agree with this one, itself included.

    Unlike :class:`Patience` it forgives an exit in between that said otherwise. The score counts
    them, from 1; with ``weighted`` it sums the probabilities that they gave to this exit's class,
    this one's own included (the confidence in the class, over exits; Ilhan et al., 2024, EENet,
    section 3.2, has the share of agreeing exits among its scores).

    Args:
        weighted: whether to sum probabilities rather than count.
    """

    name: ClassVar[str] = "agreement"
    stateful: ClassVar[bool] = True

    def __init__(self, weighted: bool = False) -> None:
        super().__init__()
        self.weighted = weighted

    def config(self) -> dict[str, Any]:
        """Whether probabilities are summed."""
        return {"weighted": self.weighted}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> the same logits, the score (B,) and the sums so far (B, C)."""
        said = logits.argmax(dim=-1, keepdim=True)
        voice = logits.softmax(dim=-1) if self.weighted else _one_hot(said, logits)
        total = voice if not state else state[0] + voice
        return logits, total.gather(1, said).squeeze(1), (total,)


class Voting(Criterion):
    """The class with the most votes answers, and stops when it has enough.

    Every exit so far has one vote, or the weight it is given, for the class it predicts; ties go to
    the class that the present exit finds likelier. The score is the sum of the votes for the winner
    (Sun et al., 2021, Early exiting with ensemble internal classifiers, section 3.3).

    Args:
        weights: one positive number for each exit, the last included; 1 each by default.

    Raises:
        PolicyError: weights that are not positive, or (when it runs) not as many as exits.
    """

    name: ClassVar[str] = "voting"
    stateful: ClassVar[bool] = True
    combines: ClassVar[bool] = True

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.weights = None if weights is None else tuple(float(value) for value in weights)
        if self.weights is not None and not all(value > 0 for value in self.weights):
            raise PolicyError(f"The weights of votes must be positive, got {list(self.weights)}.")
        self.exits = None if self.weights is None else len(self.weights)

    def config(self) -> dict[str, Any]:
        """The weights."""
        return {"weights": None if self.weights is None else list(self.weights)}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> logits whose softmax is the share of votes, score (B,), votes (B, C)."""
        weight = 1.0 if self.weights is None else self.weights[exit]
        vote = weight * _one_hot(logits.argmax(dim=-1, keepdim=True), logits)
        votes = vote if not state else state[0] + vote
        most = votes.amax(dim=-1, keepdim=True)
        tied = (votes >= most * (1 - ROUNDING)).to(votes.dtype)
        broken = votes + TIE * tied * logits.softmax(dim=-1)
        return (broken + FLOOR).log(), votes.amax(dim=-1), (votes,)


TIE = 1e-2  # of a vote, between those that have the most
ROUNDING = 1e-6  # by which sums of the same weights may differ
FLOOR = 1e-3  # keeps the logarithm finite


def _one_hot(said: Tensor, logits: Tensor) -> Tensor:
    """(B, 1) classes to (B, C) of the logits' type."""
    return functional.one_hot(said.squeeze(1), logits.shape[-1]).to(logits.dtype)
