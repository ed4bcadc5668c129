"""One phase of a plan as a LightningModule. The only file that imports Lightning."""

from __future__ import annotations

import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.optim import Optimizer

from offramp.build.batch import Batch
from offramp.errors import DataError, TrainingError
from offramp.train.data import derive_seed
from offramp.train.freezing import Trained
from offramp.train.history import EpochRow
from offramp.train.meter import Meter
from offramp.train.objectives import exit_losses
from offramp.train.phases import Phase
from offramp.train.weights import LearnedWeights, exit_weights

if TYPE_CHECKING:
    from offramp.train.loop import Session

__all__ = ["PhaseModule", "run_epochs"]

# Steps between two looks at the losses where looking means waiting for the device.
_LOOK_EVERY = 25


class PhaseModule(pl.LightningModule):
    """Steps and epochs of one phase.

    Args:
        session: the training that this phase is part of.
        phase: what to do.
        trained: what is trained.
        weigher: learned weights, if the phase has them.
        optimizer: holds what is trained, and nothing else.
    """

    def __init__(
        self,
        session: Session,
        phase: Phase,
        trained: Trained,
        weigher: LearnedWeights | None,
        optimizer: Optimizer,
    ) -> None:
        super().__init__()
        self.model = session.model
        self.weigher = weigher
        self.session = session
        self.phase = phase
        self.trained = trained
        self.optimizer = optimizer
        self.meter = Meter(session.model.num_exits)
        self.val_meter = Meter(session.model.num_exits)
        self._weights: tuple[float, ...] = ()
        self._factors: dict[tuple[int, ...], Tensor] = {}
        self._started = 0.0

    def configure_optimizers(self) -> Optimizer:
        """The optimiser is made once for the phase, as its state outlives a Trainer."""
        return self.optimizer

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move a batch, and do nothing at all where it is already."""
        return batch if device.type == "cpu" else batch.to(device)

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
        self.trained.set_modes()
        seed = derive_seed(session.settings.seed, "model", position.epochs_done)
        torch.manual_seed(seed)
        self.meter.reset()
        self.val_meter.reset()
        self._weights = exit_weights(
            self.phase.weights,
            session.model.num_exits,
            stage_costs=session.model.costs.stages,
            epoch=position.epoch,
            epochs=self.phase.epochs,
        )
        self._factors.clear()
        if position.step:
            session.restore_epoch(self.meter)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """The learning rate of this step follows from the position alone."""
        position, length = self.session.position, self.session.loader.length
        within = position.step / length if length else 0.0
        factor = self.session.settings.schedule((position.epoch + within) / self.phase.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        position = self.session.position
        length = self.session.loader.length or 0
        exits = self.phase.supervised(position.epoch * length + position.step)
        labels = _labels(batch)
        try:
            outputs = self.model(*batch.args, **batch.kwargs)
        except ValueError as error:
            _explain_lone_sample(error, batch, self.phase.name, position.step)
        if len(outputs[0]) != len(labels):
            raise DataError(
                f"Batch {position.step} of the training loader has {len(labels)} labels, but the "
                f"model gives {len(outputs[0])} rows of logits. Expected one label for each row."
            )
        terms = self.phase.objective(outputs, labels, exits)
        if terms.shape != (len(exits), len(labels)):
            raise DataError(
                f"The objective of phase {self.phase.name!r} returned shape {tuple(terms.shape)}. "
                f"Expected ({len(exits)}, {len(labels)}): a term per supervised exit and sample."
            )
        losses = terms.mean(1)
        self.meter.update(exits, losses, outputs, labels)
        if losses.device.type == "cpu" or position.step % _LOOK_EVERY == 0:
            self._refuse_broken()
        weights = self._factor(exits, losses)
        if self.weigher is None:
            return torch.dot(weights, losses)
        total: Tensor = self.weigher(losses, weights, exits)
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradient equilibrium."""
        scales = self.trained.gradient_scales
        for name, scale in scales.items():
            gradient = self.trained.parameters[name].grad
            if gradient is not None:
                gradient.mul_(scale)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:  # noqa: ANN401
        """Count the step, and keep it if it is time."""
        session = self.session
        session.step_done(self, last=bool(self.trainer.is_last_batch))
        share = session.position.step / (session.loader.length or session.position.step + 1)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        session.line.step(self.phase.name, session.position.epochs_done, share, loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of every exit."""
        labels = _labels(batch)
        outputs = self.model(*batch.args, **batch.kwargs)
        losses = exit_losses(outputs, labels)
        self.val_meter.update(range(self.model.num_exits), losses, outputs, labels)

    def on_train_epoch_end(self) -> None:
        """Close the epoch: its row, its checkpoint."""
        if self.meter.samples == 0:
            raise DataError("The training loader yields no batch.")
        self._refuse_broken()
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

    def _factor(self, exits: tuple[int, ...], losses: Tensor) -> Tensor:
        if exits not in self._factors:
            chosen = [self._weights[k] for k in exits]
            self._factors[exits] = torch.tensor(chosen, dtype=losses.dtype, device=losses.device)
        return self._factors[exits]

    def _refuse_broken(self) -> None:
        broken = self.meter.broken
        if not broken:
            return
        session = self.session
        names = [*session.model.places, "the backbone's own"]
        exits = ", ".join(f"{k} ({names[k]})" for k in broken)
        kept = session.last_checkpoint
        when = "step" if self.device.type == "cpu" else "at or shortly before step"
        goes_on = (
            f"The last good checkpoint is {str(kept)!r}."
            if kept
            else "There is no checkpoint to go back to."
        )
        raise TrainingError(
            f"The loss of exit {exits} is not a number any more in phase {self.phase.name!r}, "
            f"epoch {session.position.epoch + 1}, {when} {session.position.step}. {goes_on} Are "
            "all inputs finite? If so, lower the learning rate, or clip gradients with clip=1.0."
        )


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


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:  # the loader has checked; this is for readers and type checkers
        raise DataError("A batch has no labels.")
    return batch.labels


def _explain_lone_sample(error: ValueError, batch: Batch, phase: str, step: int) -> NoReturn:
    if batch.size == 1 and "more than 1 value per channel" in str(error):
        raise DataError(
            f"Batch {step} of the training loader (phase {phase!r}) holds one sample, and batch "
            "normalisation needs at least two to train. It is the rest that the batch size leaves "
            "over: pass drop_last=True to the DataLoader, or choose another batch size."
        ) from error
    raise error
