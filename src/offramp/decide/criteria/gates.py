"""A small network per exit that decides on what is known there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offramp.decide.criteria.base import (
    Criterion,
    State,
    criterion,
    criterion_from_json,
    criterion_to_json,
)
from offramp.errors import PolicyError

__all__ = ["Gate", "LearnedGate"]

FEATURES = 9
LOWEST = -12.0  # log-probabilities below it are as good as it


class Gate(nn.Module):
    """A line through the features, and a small correction that begins at nothing.

    Args:
        hidden: width of the correction's one hidden layer.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.line = nn.Linear(FEATURES, 1)
        self.inner, self.outer = nn.Linear(FEATURES, hidden), nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,)."""
        bent: Tensor = self.outer(torch.tanh(self.inner(features)))
        straight: Tensor = self.line(features)
        return (straight + bent).squeeze(1)


class LearnedGate(Criterion):
    """How much better it is to stop than to go on, by a small network for each exit.

    A gate sees what is known at its exit: the three largest log-probabilities, the entropy, the
    score of an inner rule, how many earlier exits named the same class, what probability they gave
    it, and how sure the exit before was (Ilhan et al., 2024, EENet, section 3.2; Regol et al.,
    2024,
    JEI-DNN). It is trained on a trace by :func:`offramp.decide.gating.fit_gates` for accuracy minus
    the price of going on; untrained, it is of no use.

    Args:
        exits: E, the last included.
        hidden: width of each gate's hidden layer.
        inner: the rule whose logits and score the gates look at: a name or an instance. With an
            ensemble, the gates decide about the ensemble's answers.

    Raises:
        PolicyError: fewer than two exits, or not as many as those that the inner rule or (when it
            runs) the network has.
    """

    name: ClassVar[str] = "gate"
    stateful: ClassVar[bool] = True

    def __init__(self, exits: int, hidden: int = 16, inner: str | Criterion = "confidence") -> None:
        super().__init__()
        if exits < 2:
            raise PolicyError(f"Gates need a network of at least 2 exits, got {exits}.")
        self.inner = criterion(inner)
        self.inner.check_exits(exits)
        self.exits: int = exits
        self.hidden = hidden
        self.combines = self.inner.combines  # type: ignore[misc]
        self.fitted_on = self.inner.fitted_on
        self.gates = nn.ModuleList(Gate(hidden) for _ in range(exits - 1))
        # Features are brought to mean 0 and spread 1, as on the trace of the fit.
        self.register_buffer("center", torch.zeros(exits - 1, FEATURES))
        self.register_buffer("spread", torch.ones(exits - 1, FEATURES))
        self.center: Tensor
        self.spread: Tensor

    def config(self) -> dict[str, Any]:
        """Exits, width and the inner rule."""
        inner = criterion_to_json(self.inner)
        return {"exits": self.exits, "hidden": self.hidden, "inner": inner}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Criterion:
        """Build from what :meth:`config` returned."""
        return cls(config["exits"], config["hidden"], criterion_from_json(config["inner"]))

    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """(B, C) -> inner logits, the gate's score (B,), and what later gates look at."""
        out, features, after = self.look(logits, state, exit)
        if exit == self.exits - 1:
            return out, features[:, 0], after
        scaled = (features - self.center[exit]) / self.spread[exit]
        return out, self.gates[exit](scaled), after

    def look(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """What is known at an exit.

        Returns:
            The logits to leave with (B, C), the features (B, 9), the state.
        """
        out, score, inner = self.inner(logits, state[3:] if state else (), exit)
        logs = out.log_softmax(dim=-1)
        probs = logs.exp()
        said = logs.argmax(dim=-1, keepdim=True)
        named = torch.zeros_like(probs).scatter(1, said, 1.0)
        votes, given, before = state[:3] if state else (named * 0, probs * 0, probs[:, :1] * 0)
        count = max(exit, 1)
        top = logs.clamp(min=LOWEST).topk(min(3, logs.shape[-1]), dim=-1).values
        if top.shape[1] < 3:
            top = torch.cat([top, top[:, -1:].expand(-1, 3 - top.shape[1])], dim=1)
        sure = top[:, :1]
        entropy = -(probs * logs.clamp(min=LOWEST)).sum(dim=-1, keepdim=True)
        features = torch.cat(
            [
                top,
                # The odds of the answer: it keeps apart what probabilities near 1 do not.
                sure - (1 - probs.gather(1, said)).clamp(min=math.exp(LOWEST)).log(),
                entropy,
                score[:, None],
                votes.gather(1, said) / count,
                given.gather(1, said) / count,
                before,
            ],
            dim=1,
        )
        return out, features, (votes + named, given + probs, sure, *inner)
