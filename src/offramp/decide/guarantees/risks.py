"""What can be promised about: losses of leaving early, sample by sample and exit by exit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from offramp.decide.criteria import Criterion
from offramp.decide.scored import Scored, score
from offramp.decide.trace import Trace
from offramp.errors import PolicyError, TraceError

__all__ = ["RISKS", "Loss", "Risk", "losses"]

Loss = Callable[[Tensor, Tensor], Tensor]

RISKS = ("accuracy gap", "brier gap", "disagreement", "error rate")


@dataclass(frozen=True)
class Risk:
    """A loss with limits.

    Attributes:
        name: one of the built-in ones, or that of a function.
        low: the least that the loss can be; below 0 where leaving early can be a gain.
        high: the most.
        whole: whether it only takes whole values, so that exact tests serve.
        words: what a mean of it is, in words, for the promise.
        function: a user's loss, of logits (B, C) and labels (B,), or ``None``.
    """

    name: str
    low: float
    high: float
    whole: bool
    words: str
    function: Loss | None = None

    @classmethod
    def named(cls, name: str) -> Risk:
        """A built-in risk.

        Raises:
            PolicyError: an unknown one.
        """
        table = {
            "accuracy gap": cls(name, -1, 1, True, "accuracy lost against the full network"),
            "disagreement": cls(name, 0, 1, True, "share of answers unlike the full network's"),
            "error rate": cls(name, 0, 1, True, "share of wrong answers"),
            "brier gap": cls(name, -2, 2, False, "Brier score added to the full network's"),
        }
        if name not in table:
            raise PolicyError(f"Unknown risk {name!r}. Known: {', '.join(RISKS)}, or a function.")
        return table[name]

    @classmethod
    def own(cls, function: Loss, limits: tuple[float, float]) -> Risk:
        """A user's loss.

        Args:
            function: of logits (B, C) and labels (B,) the loss of each sample (B,).
            limits: the least and the most that it can be.

        Raises:
            PolicyError: limits that are none.
        """
        low, high = map(float, limits)
        if not low < high:
            raise PolicyError(f"loss_limits must be (least, most) of the loss, got {limits}.")
        name = getattr(function, "__name__", type(function).__name__)
        return cls(name, low, high, False, f"mean of the loss {name!r}", function)


def losses(trace: Trace, rule: Criterion, risk: Risk) -> tuple[Scored, Tensor]:
    """Scores, and the loss of leaving at each exit.

    Returns:
        The scored trace, and (E, N) float64.

    Raises:
        TraceError: the loss needs labels, and there are none.
        PolicyError: the loss left its limits.
    """
    full = trace.logits[-1].argmax(dim=1)
    if risk.name == "disagreement":
        scored = score(trace, rule)
        return scored, (scored.predictions != full).double()
    if trace.labels is None:
        raise TraceError(
            f"A promise about the {risk.name} needs labels, and this trace has none. Without "
            f"labels, agreement with the full network can be promised: min_agreement=."
        )
    if risk.name == "accuracy gap":
        scored = score(trace, rule)
        right = (scored.predictions == trace.labels).double()
        return scored, (full == trace.labels).double() - right
    if risk.name == "error rate":
        scored = score(trace, rule)
        return scored, (scored.predictions != trace.labels).double()
    if risk.name == "brier gap":
        scored = score(trace, rule, _brier)
        whole = _brier(trace.logits[-1], trace.labels).double()
        return scored, _kept(scored) - whole
    scored = score(trace, rule, risk.function)
    values = _kept(scored)
    if float(values.min()) < risk.low or float(values.max()) > risk.high:
        raise PolicyError(
            f"The loss {risk.name!r} was said to lie between {risk.low} and {risk.high}, but takes "
            f"values from {float(values.min()):.4g} to {float(values.max()):.4g}: a promise needs "
            f"limits that hold for every sample."
        )
    return scored, values


def _brier(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance of the probabilities from the truth, 0 to 2 (Brier, 1950)."""
    probs = logits.softmax(dim=1)
    own = probs.gather(1, labels[:, None]).squeeze(1)
    return (probs**2).sum(dim=1) - 2 * own + 1


def _kept(scored: Scored) -> Tensor:
    if scored.losses is None:  # pragma: no cover - asked for above
        raise PolicyError("No losses were computed.")
    return scored.losses
