"""How a network on images is trained and timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ImageConditions"]


@dataclass(frozen=True)
class ImageConditions:
    """The same for all trainings of a system.

    Attributes:
        data: folder of the images.
        runs: where trainings are kept.
        epochs: of the network with exits, and of the one without.
        seconds: of timing, for each policy and batch size.
        seed: of all.
        images: to train on, at the most.
    """

    data: Path
    runs: Path
    epochs: int
    seconds: float
    seed: int = 0
    images: int | None = None
