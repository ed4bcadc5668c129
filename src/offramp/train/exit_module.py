"""One phase as a LightningModule, for a Lightning Trainer of one's own; fit() builds on it too."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from offramp.build.batch import Batch, unpack
from offramp.build.model import MultiExitModel
from offramp.errors import DataError, TrainingError
from offramp.train.data import Census, check_labels, distinct, no_batch
from offramp.train.freezing import Trained, trained_parts
from offramp.train.losses import exit_losses
from offramp.train.meter import Meter
from offramp.train.objectives import judged_outputs
from offramp.train.optimizers import (
    DEFAULT_LR,
    OptimizerFactory,
    Schedule,
    adamw,
    check_optimizer,
    may_fuse,
    optimizer_of,
    schedule_of,
)
from offramp.train.phases import Phase
from offramp.train.schemes import Joint
from offramp.train.weights import LearnedWeights, exit_weights

__all__ = ["ExitModule", "Standing"]

# Steps between two looks at the losses where looking means waiting for the device.
_LOOK_EVERY = 25

# Where a checkpoint of Lightning's keeps the samples that were trained on.
_FINGERPRINTS = "offramp_training_fingerprints"


class Standing(NamedTuple):
    """Where a phase stands: its epoch and the batch in it, counted from 0, and batches per epoch.

    ``joined`` batches make a step.
    """

    epoch: int
    step: int
    length: int
    joined: int = 1


class ExitModule(pl.LightningModule):
    """One phase of training, for a Lightning ``Trainer`` of one's own.

    ::

        trainer = lightning.pytorch.Trainer(max_epochs=10, callbacks=[ExitLogger()])
        trainer.fit(ExitModule(model), train_loader, validation_loader)

    A scheme of several phases is a module and a ``Trainer`` for each::

        for phase in as_plan("mixed", model.num_exits, epochs=10):
            lightning.pytorch.Trainer(max_epochs=phase.epochs).fit(ExitModule(model, phase), loader)

    What :func:`offramp.fit` checks and freezes is checked and frozen here, by the same code, but
    for one check: whether validation samples are among the training samples is for you to see. What
    belongs to the ``Trainer`` (devices, precision, checkpoints, seeds) is left to it. Where several
    processes train a phase that takes turns, such as ``Alternating``, they need
    ``strategy="ddp_find_unused_parameters_true"``.

    Samples of the first epoch are remembered as ``model.training_fingerprints``, also in
    checkpoints; where several processes train, those of each process in its own model.

    Args:
        model: from :func:`offramp.attach`. It is trained in place.
        phase: what is trained and by what; all exits and the backbone at once if not given. Epochs
            are the ``Trainer``'s.
        optimizer: function from the list of trained parameters to an optimiser; by default AdamW.
        lr: learning rate of the default optimiser, 0.001 if not given.
        schedule: ``"cosine"``, ``"constant"``, or a function from the part of the training that is
            done, in [0, 1), to the factor on the learning rate.

    Raises:
        DataError: the phase does not fit the model, nothing is left to train, or the settings are
            not what was expected.

    Attributes:
        meter: loss and accuracy of every exit over the training epoch so far. Where the phase's
            objective is on running sums (:class:`Boosting`), they are of the sums.
        val_meter: likewise over the last validation or test.
    """

    def __init__(
        self,
        model: MultiExitModel,
        phase: Phase | None = None,
        *,
        optimizer: OptimizerFactory | None = None,
        lr: float | None = None,
        schedule: str | Schedule = "cosine",
    ) -> None:
        super().__init__()
        if not isinstance(model, MultiExitModel):
            raise DataError(
                f"ExitModule trains a MultiExitModel, but got a {type(model).__name__}. "
                "Give it exits first: model = offramp.attach(backbone, example)."
            )
        check_optimizer(optimizer, lr)
        if phase is None:
            (phase,) = Joint().phases(model.num_exits)
        phase.check(model.num_exits)
        self.model = model
        self.phase = phase
        self.trained: Trained = trained_parts(model, phase)
        learned = isinstance(phase.weights, str) and phase.weights == "learned"
        self.weigher = LearnedWeights(model.num_exits) if learned else None
        self.meter = Meter(model.num_exits)
        self.val_meter = Meter(model.num_exits)
        self._make = optimizer
        self._lr = DEFAULT_LR if lr is None else lr
        self._schedule = schedule_of(schedule)
        self._census: Census | None = None
        self._frozen = ExitStack()
        self._weights: tuple[float, ...] = ()
        self._factors: dict[tuple[int, ...], Tensor] = {}
        self._last = Standing(0, 0, 0)
        self._supervised: set[int] = set()  # since the last step of the optimiser

    # What a Trainer asks for, in the order in which it does.

    def configure_callbacks(self) -> list[pl.Callback]:
        """What was frozen is thawed, whatever happens."""
        return [_Thaw()]

    def setup(self, stage: str) -> None:
        """Freeze what the phase does not train, before processes compare their parameters."""
        if stage == "fit":
            self._frozen.enter_context(self.trained.only())

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """The optimiser of what the phase trains, and the course of its learning rate."""
        steps = self.trainer.estimated_stepping_batches
        if self.trainer.num_training_batches == 0:
            raise no_batch("training")
        if not 1 <= steps < math.inf:  # it is -1 for epochs of a loader without a length
            raise DataError(
                "The learning rate follows the part of the training that is done, but how many "
                "steps this Trainer will take is not known: it has no end, or its loader no "
                "length. Pass max_steps= to it, or max_epochs= with a loader that has a length."
            )
        fused = may_fuse(str(self.trainer.precision), self.trainer.gradient_clip_val)
        make = self._make or partial(adamw, lr=self._lr, fused=fused)
        optimizer, _ = optimizer_of(make, self.phase, self.trained, self.weigher)
        schedule = self._schedule
        scheduler = LambdaLR(optimizer, lambda step: schedule(min(step, steps - 1) / steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:  # noqa: ANN401
        """A batch of the user's loader, understood and checked; one that is, as it is."""
        if isinstance(batch, Batch):
            return batch
        role = "training" if self.trainer.training else "validation"
        read = unpack(batch, select=self.model.select)
        labels = check_labels(read.labels, self.model.num_classes, f"A batch of the {role} loader")
        read = replace(read, labels=labels)
        if self._census is not None and self.trainer.training:
            self._census.add(read)
        return read

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move a batch, and do nothing at all where it is already."""
        return batch if device.type == "cpu" else batch.to(device)

    def on_train_epoch_start(self) -> None:
        """Modes, weights and sums of a new epoch."""
        epoch = self.trainer.current_epoch
        self._census = Census() if epoch == 0 else None
        self.start_epoch(epoch, max(self._planned_epochs(), epoch + 1))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Begin epoch ``epoch`` of the ``epochs`` of this phase."""
        self.trained.set_modes()
        self.meter.reset()
        self.val_meter.reset()
        self._weights = exit_weights(
            self.phase.weights,
            self.model.num_exits,
            stage_costs=self.model.costs.stages,
            epoch=epoch,
            epochs=epochs,
        )
        self._factors.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        epoch, step, length, joined = self._last = self.standing(batch_idx)
        # Without a length, epochs begin with one turn after the other: each may be a single step.
        begun = epoch * (math.ceil(length / joined) or 1)
        exits = self.phase.supervised(begun + step // joined)
        self._supervised.update(exits)
        labels = _labels(batch)
        try:
            outputs = self.model(*batch.args, **batch.kwargs)
        except ValueError as error:
            _explain_lone_sample(error, batch, self.phase.name, step)
        if len(outputs[0]) != len(labels):
            raise DataError(
                f"Batch {step} of the training loader has {len(labels)} labels, but the "
                f"model gives {len(outputs[0])} rows of logits. Expected one label for each row."
            )
        terms = self.phase.objective(outputs, labels, exits)
        if terms.shape != (len(exits), len(labels)):
            raise DataError(
                f"The objective of phase {self.phase.name!r} returned shape {tuple(terms.shape)}. "
                f"Expected ({len(exits)}, {len(labels)}): a term per supervised exit and sample."
            )
        losses = terms.mean(1)
        self.meter.update(exits, losses, judged_outputs(self.phase.objective, outputs), labels)
        if losses.device.type == "cpu" or step % _LOOK_EVERY == 0:
            self.refuse_broken_loss()
        weights = self._factor(exits, losses)
        if self.weigher is None:
            return torch.dot(weights, losses)
        total: Tensor = self.weigher(losses, weights, exits)
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradient equilibrium, over the exits that were supervised in this step."""
        for name, scale in self.trained.scales(self._supervised).items():
            gradient = self.trained.parameters[name].grad
            if gradient is not None:
                gradient.mul_(scale)
        self._supervised.clear()

    def on_validation_epoch_start(self) -> None:
        """New sums."""
        self.val_meter.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of every exit."""
        labels = _labels(batch)
        outputs = self.model(*batch.args, **batch.kwargs)
        outputs = judged_outputs(self.phase.objective, outputs)
        losses = exit_losses(outputs, labels)
        self.val_meter.update(range(self.model.num_exits), losses, outputs, labels)

    def on_test_epoch_start(self) -> None:
        """New sums."""
        self.val_meter.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """The last look at the losses; who was trained on."""
        self.refuse_broken_loss()
        if self._census is not None:
            self._census.close()  # warns about what looks wrong
            self._remember()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which samples were trained on so far goes with the weights."""
        seen = [] if self._census is None else [self._census.hashes]
        checkpoint[_FINGERPRINTS] = distinct(self.model.training_fingerprints, *seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Those of the checkpoint and those that the model knew are both remembered."""
        if _FINGERPRINTS in checkpoint:
            self.model.training_fingerprints = distinct(
                self.model.training_fingerprints, checkpoint[_FINGERPRINTS]
            )

    def teardown(self, stage: str) -> None:
        """Thaw what was frozen. A second call does nothing."""
        self._remember()
        self._frozen.close()

    # What fit() knows better.

    def standing(self, batch_idx: int) -> Standing:
        """Where the phase stands at a batch of this epoch."""
        length = self.trainer.num_training_batches
        known = int(length) if length != float("inf") else 0
        joined = self.trainer.accumulate_grad_batches
        return Standing(self.trainer.current_epoch, batch_idx, known, joined)

    def last_good_checkpoint(self) -> str | None:
        """The newest checkpoint, which is older than a loss that is no number."""
        keeper = self.trainer.checkpoint_callback
        found = getattr(keeper, "last_model_path", "") or getattr(keeper, "best_model_path", "")
        return found or None

    def smaller_steps(self) -> str:
        """What to do where steps are too large."""
        return "lower the learning rate, or pass gradient_clip_val=1.0 to the Trainer"

    def refuse_broken_loss(self) -> None:
        """Stop where a loss is not a finite number any more.

        Raises:
            TrainingError: it is not; phase, epoch, step and exits are named.
        """
        broken = self.meter.broken
        if not broken:
            return
        names = [*self.model.places, "the backbone's own"]
        exits = ", ".join(f"{k} ({names[k]})" for k in broken)
        kept = self.last_good_checkpoint()
        when = "step" if self.device.type == "cpu" else "at or shortly before step"
        goes_on = (
            f"The last good checkpoint is {kept!r}."
            if kept
            else "There is no checkpoint to go back to."
        )
        raise TrainingError(
            f"The loss of exit {exits} is not a number any more in phase {self.phase.name!r}, "
            f"epoch {self._last.epoch + 1}, {when} {self._last.step}. {goes_on} Are "
            f"all inputs finite? If so, {self.smaller_steps()}."
        )

    def _planned_epochs(self) -> int:
        """Epochs of this Trainer, which may end by steps too; the phase's where it cannot tell."""
        most, steps = self.trainer.max_epochs or -1, self.trainer.max_steps  # -1 is no end
        _, _, length, joined = self.standing(0)
        ends = [most] if most > 0 else []
        if steps > 0 and length:
            ends.append(math.ceil(steps / math.ceil(length / joined)))
        return min(ends, default=self.phase.epochs)

    def _remember(self) -> None:
        if self._census is not None:
            seen, self._census = self._census.hashes, None
            self.model.training_fingerprints = distinct(self.model.training_fingerprints, seen)

    def _factor(self, exits: tuple[int, ...], losses: Tensor) -> Tensor:
        if exits not in self._factors:
            chosen = [self._weights[k] for k in exits]
            self._factors[exits] = torch.tensor(chosen, dtype=losses.dtype, device=losses.device)
        return self._factors[exits]


class _Thaw(pl.Callback):
    """An error ends a Trainer without the teardown of its module; this makes up for it."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        pl_module.teardown("fit")


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
