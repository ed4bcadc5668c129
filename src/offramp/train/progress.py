"""One line that tells how far training is. Redrawn a few times a second, whatever a step takes."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from offramp.train.history import EpochRow

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ProgressLine"]

_INTERVAL = 0.2  # seconds between two drawings


class ProgressLine:
    """A context that draws a bar over all epochs on standard error, or nothing.

    Args:
        shown: draw at all.
        epochs: of all phases.
        done: epochs that were done before.
    """

    def __init__(self, shown: bool, epochs: int, done: int = 0) -> None:
        self._shown = shown
        self._epochs = epochs
        self._done = float(done)
        self._drawn = 0.0
        self._text = ""
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressLine:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),  # a phase may be named "[a]"
                console=Console(stderr=True),
                auto_refresh=False,
            )
            task = self._bar.add_task("", total=self._epochs)
            self._bar.update(task, completed=self._done)
            self._bar.start()
        return self

    def step(self, phase: str, epoch: int, share: float, loss: Tensor) -> None:
        """One more batch.

        Args:
            phase: name of the phase.
            epoch: epochs done over all phases.
            share: part of this epoch that is done.
            loss: scalar; read only when the line is redrawn.
        """
        now = time.monotonic()
        if self._bar is None or now - self._drawn < _INTERVAL:
            return
        self._drawn = now
        text = f"epoch {epoch + 1}/{self._epochs}, {phase}, loss {float(loss):.3f}{self._text}"
        self._draw(epoch + share, text)

    def epoch(self, row: EpochRow) -> None:
        """One more epoch; its accuracies stay on the line during the next."""
        if self._bar is None:
            return
        kind = "validation" if row.val_accuracy else "training"
        accuracies = " ".join(f"{100 * a:.1f}" for a in row.val_accuracy or row.train_accuracy)
        self._text = f", {kind} accuracy {accuracies} %"
        self._draw(row.epoch, f"epoch {row.epoch}/{self._epochs}, {row.phase}{self._text}")

    def _draw(self, done: float, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text, refresh=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
