"""What a network that always runs to its end spoils or wastes (Kaya et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offramp.errors import DataError

__all__ = ["Overthinking", "overthinking"]


@dataclass(frozen=True)
class Overthinking:
    """Shares of all samples.

    Attributes:
        destructive: an earlier exit was right and the end is wrong.
        rescued: destructive, and the policy's answer is right.
        lost: the end is right and the policy's answer is wrong, the price of leaving early. The
            accuracy of the policy is that of the end, plus ``rescued``, less ``lost``, where every
            answer is that of one exit; an ensemble or a vote may be right where no exit is.
        wasteful: the policy's answer is right, and so was an exit before the one that it took.
        wasteful_full: the end is right, and so was an earlier exit: what the whole network wastes,
            which is ``wasteful`` where nothing leaves early.
        oracle_accuracy: some exit is right: what a perfect choice of exits would reach.
    """

    destructive: float
    rescued: float
    lost: float
    wasteful: float
    wasteful_full: float
    oracle_accuracy: float


def overthinking(right: Tensor, exit: Tensor, answered: Tensor) -> Overthinking:
    """Measure it.

    Args:
        right: (E, N) bool, whether each exit is right about each sample; the last is the end.
        exit: (N,) int64, the exit that the policy took.
        answered: (N,) bool, whether the policy's answer is right.

    Returns:
        The shares of all N samples.

    Raises:
        DataError: shapes that do not fit, no samples, or an exit that is none of the E.
    """
    shapes = [tuple(value.shape) for value in (right, exit, answered)]
    if right.ndim != 2 or not right.numel() or not shapes[0][1:] == shapes[1] == shapes[2]:
        raise DataError(
            "Overthinking takes right (E, N), exit (N,) and answered (N,) with E and N >= 1, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}."
        )
    if not bool(((exit >= 0) & (exit < len(right))).all()):
        raise DataError(
            f"Overthinking takes exits from 0 to {len(right) - 1}, the rows of right, got "
            f"{int(exit.min())} to {int(exit.max())}."
        )
    end, early = right[-1], right[:-1].any(dim=0)
    # Exits strictly before the one taken: the count of right ones there, per sample.
    before = right.long().cumsum(dim=0) - right.long()
    waited = before.gather(0, exit[None])[0] > 0
    destructive = early & ~end

    def share(mask: Tensor) -> float:
        return float(mask.double().mean())

    return Overthinking(
        destructive=share(destructive),
        rescued=share(destructive & answered),
        lost=share(end & ~answered),
        wasteful=share(waited & answered),
        wasteful_full=share(early & end),
        oracle_accuracy=share(right.any(dim=0)),
    )
