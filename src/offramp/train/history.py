"""What happened in training: a row per epoch, a column per exit. Prints as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload

from offramp.train.phases import Plan

__all__ = ["EpochRow", "History"]


@dataclass(frozen=True)
class EpochRow:
    """One epoch.

    Attributes:
        phase: name of the phase.
        epoch: number of the epoch over all phases, counted from 1.
        lr: learning rate of the first parameter group in the last step.
        train_loss: mean loss of each exit over the epoch, in nats for cross entropy; ``None`` for
            an exit that was not supervised.
        train_accuracy: share of samples that each exit classified rightly while it trained.
        val_loss: mean cross entropy of each exit on the validation data; empty without any.
        val_accuracy: likewise.
        seconds: wall time, validation included.
    """

    phase: str
    epoch: int
    lr: float
    train_loss: tuple[float | None, ...]
    train_accuracy: tuple[float, ...]
    val_loss: tuple[float, ...] = ()
    val_accuracy: tuple[float, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EpochRow:
        """Inverse of :meth:`to_dict`, lists taken for tuples."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)


@dataclass
class History(Sequence[EpochRow]):
    """All epochs of a training, and the plan they followed. A sequence of :class:`EpochRow`.

    Attributes:
        plan: the phases.
        rows: one for each epoch.
    """

    plan: Plan
    rows: list[EpochRow] = field(default_factory=list)

    @overload
    def __getitem__(self, index: int) -> EpochRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[EpochRow]: ...
    def __getitem__(self, index: int | slice) -> EpochRow | list[EpochRow]:
        """The row at ``index``."""
        return self.rows[index]

    def __len__(self) -> int:
        """Number of epochs."""
        return len(self.rows)

    def __iter__(self) -> Iterator[EpochRow]:
        """Rows in order."""
        return iter(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: the plan as text, and the rows."""
        return {"plan": str(self.plan), "epochs": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        """The table: per epoch and exit the accuracy (of validation, where there is any)."""
        judged = any(row.val_accuracy for row in self.rows)
        kind = "validation" if judged else "training"
        exits = [f"exit {k}" for k in range(self.plan.num_exits - 1)] + ["backbone"]
        cells = [["epoch", "phase", "loss", *exits, "seconds"]]
        for row in self.rows:
            accuracies = row.val_accuracy if judged else row.train_accuracy
            loss = sum(value for value in row.train_loss if value is not None)
            cells.append(
                [str(row.epoch), row.phase, f"{loss:.4f}"]
                + [f"{100 * value:.2f} %" for value in accuracies]
                + [f"{row.seconds:.1f}"]
            )
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(map(str.rjust, line, widths)) for line in cells]
        return "\n".join([f"{self.plan.title}; {kind} accuracy", *lines])
