"""Running ensembles: what the exits so far would answer together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp.decide.criteria.base import Criterion, State
from offramp.errors import PolicyError

__all__ = ["ArithmeticEnsemble", "GeometricEnsemble", "ProductOfExperts"]

FLOOR = 1e-12  # keeps logarithms finite
LEAST = 1e-3  # a logit below it counts as it, so that its logarithm is steady
OUTSIDE = 30.0  # logits below the best of the support: a probability of 1e-13


class ArithmeticEnsemble(Criterion):
    """The mean of the exits' probabilities so far (Qendro et al., 2021, Early exit ensembles).

    Leaves with the logarithm of the mean; the score is its largest probability.
    """

    name: ClassVar[str] = "arithmetic"
    stateful: ClassVar[bool] = True
    combines: ClassVar[bool] = True

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> log mean probability, its largest (B,), the sum of probabilities (B, C)."""
        own = logits.softmax(dim=-1)
        total = own if not state else state[0] + own
        mean = total / (exit + 1)
        return (mean + FLOOR).log(), mean.amax(dim=-1), (total,)


class GeometricEnsemble(Criterion):
    """A weighted geometric mean of the exits so far (Wołczyk et al., 2021, ZTW, equation 4).

    ``p_k(c) ~ prod_{j<=k} p_j(c)^{w_kj}``. Uniform weights unless they are fitted:
    :func:`offramp.decide.fitting.fit_ensemble` finds them on a trace by maximum likelihood. (The
    paper's class biases are left out: they fit the calibration set's class shares.)

    Args:
        weights: K rows for K exits, the last included; row k has the weights of exits 0..k.

    Raises:
        PolicyError: rows of the wrong length, or (when it runs) not as many as exits.
    """

    name: ClassVar[str] = "geometric"
    stateful: ClassVar[bool] = True
    combines: ClassVar[bool] = True

    def __init__(self, weights: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__()
        self.weights = None if weights is None else [list(map(float, row)) for row in weights]
        self.exits = None if self.weights is None else len(self.weights)
        for k, row in enumerate(self.weights or []):
            if len(row) != k + 1:
                raise PolicyError(
                    f"Row {k} of the ensemble's weights must have {k + 1} numbers, one for each "
                    f"exit up to it, got {len(row)}."
                )

    def config(self) -> dict[str, Any]:
        """The weights."""
        return {"weights": self.weights}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> joint log-probabilities, the largest probability, all log-probabilities."""
        own = logits.log_softmax(dim=-1)
        seen = own[:, None] if not state else torch.cat([state[0], own[:, None]], dim=1)
        if self.weights is None:
            joint = seen.mean(dim=1)
        else:
            row = torch.tensor(self.weights[exit], dtype=own.dtype, device=own.device)
            joint = (seen * row.view(1, -1, 1)).sum(dim=1)
        joint = joint.log_softmax(dim=-1)
        return joint, joint.amax(dim=-1).exp(), (seen,)


class ProductOfExperts(Criterion):
    """Exits that rule classes out, one after the other.

    Jazbec et al., 2023, Towards anytime classification in early-exit architectures by enforcing
    conditional monotonicity.

    ``"relu"`` is their equation 5: ``p_k(c) ~ prod_{j<=k} max(f_j(c), 0)^(1 / (k + 1))`` on the
    logits f: an exit rules out the classes whose logit is not above zero, for good; where
    everything is ruled out, the exit's own softmax answers.

    ``"uniform"`` (Allingham and Nalisnick, 2022) has experts that only say which classes are
    possible, those with at least a given probability: the support shrinks from exit to exit, so the
    score, one over its size, and with it the probability of every class that is still possible,
    never fall. An exit that would leave nothing is not heard.

    Args:
        expert: ``"relu"`` or ``"uniform"``.
        level: for ``"uniform"``, the probability, relative to the largest, below which a class is
            ruled out.

    Raises:
        PolicyError: another expert, or a level outside (0, 1).
    """

    name: ClassVar[str] = "product"
    stateful: ClassVar[bool] = True
    combines: ClassVar[bool] = True

    def __init__(self, expert: str = "relu", level: float = 0.05) -> None:
        super().__init__()
        if expert not in ("relu", "uniform"):
            raise PolicyError(f"expert must be 'relu' or 'uniform', got {expert!r}.")
        if not 0 < level < 1:
            raise PolicyError(f"level must lie strictly between 0 and 1, got {level}.")
        self.expert, self.level = expert, level

    def config(self) -> dict[str, Any]:
        """The expert and its level."""
        return {"expert": self.expert, "level": self.level}

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> joint logits, the score (B,), the product and the support so far (B, C)."""
        if self.expert == "uniform":
            return self._uniform(logits, state)
        own = logits.clamp(min=LEAST).log()
        possible = (logits > 0).to(logits.dtype)
        if state:
            own, possible = own + state[0], possible * state[1]
        joint = own / (exit + 1)
        joint = torch.where(possible > 0, joint, joint - OUTSIDE)
        alive = possible.sum(dim=-1, keepdim=True) > 0
        joint = torch.where(alive, joint, logits).log_softmax(dim=-1)
        return joint, joint.amax(dim=-1).exp(), (own, possible)

    def _uniform(self, logits: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        relative = logits.log_softmax(dim=-1)
        relative = (relative - relative.amax(dim=-1, keepdim=True)).exp()
        possible = (relative >= self.level).to(logits.dtype)
        if state:
            both = possible * state[0]
            possible = torch.where(both.sum(dim=-1, keepdim=True) > 0, both, state[0])
        inside = logits.masked_fill(possible == 0, -torch.inf).amax(dim=-1, keepdim=True)
        joint = torch.where(possible > 0, logits, torch.minimum(logits, inside - OUTSIDE))
        return joint, 1 / possible.sum(dim=-1), (possible,)
