"""Loss and accuracy of every exit in the logs of a Lightning Trainer."""

from __future__ import annotations

import lightning.pytorch as pl

from offramp.errors import DataError
from offramp.train.exit_module import ExitModule
from offramp.train.meter import Meter

__all__ = ["ExitLogger"]


class ExitLogger(pl.Callback):
    """Logs ``train/exit_<k>/loss`` and ``train/exit_<k>/accuracy`` at the end of every epoch.

    Likewise with ``val`` and ``test``. Losses are in nats for cross entropy, accuracies in [0, 1];
    exits count from 0, the last being the backbone's own. So a checkpoint can follow the exit that
    matters: ``ModelCheckpoint(monitor="val/exit_0/accuracy", mode="max")``. An exit that the phase
    does not supervise has no training loss. Where several processes train, the mean over them is
    logged.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be logged, before any training.

        Raises:
            DataError: the module is no :class:`ExitModule`.
        """
        _checked(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the training epoch."""
        module = _checked(pl_module)
        _log(module, "train", module.meter)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the validation."""
        module = _checked(pl_module)
        _log(module, "val", module.val_meter)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the test."""
        module = _checked(pl_module)
        _log(module, "test", module.val_meter)


def _checked(module: pl.LightningModule) -> ExitModule:
    if not isinstance(module, ExitModule):
        raise DataError(
            f"ExitLogger logs what an ExitModule measures, but the Trainer got a "
            f"{type(module).__name__}. Train offramp.train.ExitModule(model), or derive your "
            "module from it."
        )
    return module


def _log(module: ExitModule, stage: str, meter: Meter) -> None:
    values: dict[str, float] = {}
    for k, (loss, accuracy) in enumerate(zip(meter.losses, meter.accuracies, strict=True)):
        if loss is not None:
            values[f"{stage}/exit_{k}/loss"] = loss
        values[f"{stage}/exit_{k}/accuracy"] = accuracy
    module.log_dict(values, batch_size=meter.samples, sync_dist=True)
