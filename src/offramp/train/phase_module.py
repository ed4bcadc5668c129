"""One phase of fit(): reproducible, with a checkpoint after every epoch."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.optim import Optimizer

from offramp.build.batch import Batch
from offramp.errors import DataError
from offramp.train.data import derive_seed
from offramp.train.exit_module import ExitModule, Standing
from offramp.train.history import EpochRow
from offramp.train.phases import Phase

if TYPE_CHECKING:
    from offramp.train.loop import Session

__all__ = ["PhaseModule", "run_epochs"]


class PhaseModule(ExitModule):
    """Steps and epochs of one phase of a session, which freezes and thaws and keeps the position.

    Args:
        session: the training that this phase is part of.
        phase: what to do.
    """

    def __init__(self, session: Session, phase: Phase) -> None:
        super().__init__(session.model, phase)
        self.session = session
        self.optimizer: Optimizer = session.optimizer_for(self)
        self._started = 0.0

    def setup(self, stage: str) -> None:
        """The session has frozen what the phase does not train."""

    def teardown(self, stage: str) -> None:
        """The session will thaw it."""

    def configure_optimizers(self) -> Optimizer:
        """The optimiser is made once for the phase, as its state outlives a Trainer."""
        return self.optimizer

    def on_train_start(self) -> None:
        """Fused optimisers count their steps on the device; Lightning leaves the count behind."""
        for group in self.optimizer.param_groups:
            if group.get("fused") or group.get("capturable"):
                for parameter in group["params"]:
                    state = self.optimizer.state.get(parameter, {})
                    if isinstance(state.get("step"), Tensor):
                        state["step"] = state["step"].to(parameter.device)

    def on_train_epoch_start(self) -> None:
        """Randomness, modes, weights and sums of a new epoch, or those of an interrupted one."""
        session, position = self.session, self.session.position
        self._started = time.perf_counter()
        torch.manual_seed(derive_seed(session.settings.seed, "model", position.epochs_done))
        self.start_epoch(position.epoch, self.phase.epochs)
        if position.step:
            session.restore_epoch(self.meter)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The learning rate of this step follows from the position alone.

        Batches whose gradients are summed up count as one, so that they equal a large batch. Where
        the loader has no length, all of an epoch is trained at the rate of its middle.
        """
        epoch, step, length, joined = self.standing(batch_idx)
        within = (step // joined) / math.ceil(length / joined) if length else 0.5
        factor = self.session.settings.schedule((epoch + within) / self.phase.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch.

        Lightning divides it by the batches of a step. The last step of an epoch may have fewer: its
        gradient is made the mean over those it has.
        """
        loss = super().training_step(batch, batch_idx)
        _, step, length, joined = self.standing(batch_idx)
        left = length % joined
        return loss * (joined / left) if left and step >= length - left else loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ANN401
        """Count the step, and keep it if it is time."""
        session = self.session
        session.step_done(self, last=bool(self.trainer.is_last_batch))
        share = session.position.step / (session.loader.length or session.position.step + 1)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        session.line.step(self.phase.name, session.position.epochs_done, share, loss)

    def on_train_epoch_end(self) -> None:
        """Close the epoch: its row, its checkpoint."""
        if self.meter.samples == 0:
            raise DataError("The training loader yields no batch.")
        self.refuse_broken_loss()
        judged = self.val_meter.samples > 0
        row = EpochRow(
            phase=self.phase.name,
            epoch=self.session.position.epochs_done + 1,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            train_loss=self.meter.losses,
            train_accuracy=self.meter.accuracies,
            val_loss=tuple(v or 0.0 for v in self.val_meter.losses) if judged else (),
            val_accuracy=self.val_meter.accuracies if judged else (),
            seconds=time.perf_counter() - self._started,
        )
        self.session.epoch_done(self, row)

    def standing(self, batch_idx: int) -> Standing:
        """Where the session stands: an epoch that was interrupted goes on in its midst."""
        position = self.session.position
        length, joined = self.session.loader.length or 0, self.session.settings.accumulate
        return Standing(position.epoch, position.step, length, joined)

    def last_good_checkpoint(self) -> str | None:
        """The session's."""
        kept = self.session.last_checkpoint
        return str(kept) if kept else None

    def smaller_steps(self) -> str:
        """As arguments of fit(), which goes on with them."""
        return "call fit again with a smaller lr= or with clip=1.0"


def run_epochs(module: PhaseModule, epochs: int) -> None:
    """Train a phase for ``epochs`` more epochs.

    Raises:
        KeyboardInterrupt: as it came; Lightning by itself would end the process.
    """
    settings, session = module.session.settings, module.session
    with _quiet(), _interruptible():
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator=settings.accelerator,
            devices=1,
            precision=settings.precision,  # type: ignore[arg-type]
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            inference_mode=False,  # what a model caches while validating may be used in training
            use_distributed_sampler=False,
        )
        trainer.fit(module, train_dataloaders=session.loader, val_dataloaders=session.validation)


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice: it is about a Trainer that the user never sees."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            # Lightning up to 2.6 calls a part of torch that is deprecated since 2.12.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Undo what Lightning does at Ctrl+C: it ignores the signal from then on, and exits."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
