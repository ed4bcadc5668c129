"""fit(): run the phases of a scheme on Lightning, and be able to go on after an interruption."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from offramp.build.batch import fingerprints
from offramp.build.model import MultiExitModel
from offramp.errors import DataError, TrainingError
from offramp.train.checkpoint import (
    FILE_NAME,
    Checkpoint,
    Position,
    load_model_state,
    load_optimizer_state,
    optimizer_state,
    read_checkpoint,
    refuse_broken,
    refuse_unsavable,
    write_checkpoint,
)
from offramp.train.data import Census, EpochLoader, distinct, preserved_randomness
from offramp.train.history import EpochRow, History
from offramp.train.meter import Meter
from offramp.train.optimizers import (
    DEFAULT_LR,
    WEIGHER,
    OptimizerFactory,
    Schedule,
    adamw,
    check_optimizer,
    may_fuse,
    named_parameters,
    optimizer_of,
    schedule_of,
)
from offramp.train.phases import Phase
from offramp.train.precision import AUTO, fastest_precision, known_precision
from offramp.train.progress import ProgressLine
from offramp.train.schemes import Scheme, as_plan

if TYPE_CHECKING:
    from offramp.train.phase_module import PhaseModule

__all__ = ["Session", "Settings", "fit"]

_DEFAULT = "AdamW, lr="  # how a checkpoint tells of the default optimiser


@dataclass(frozen=True)
class Settings:
    """What holds for all phases of a training; see :func:`fit`."""

    seed: int
    optimizer: OptimizerFactory
    schedule: Schedule
    precision: str
    accumulate: int
    clip: float | None
    accelerator: str
    folder: Path | None
    every: int | None
    run: dict[str, Any]


@dataclass
class Session:
    """A training on its way.

    Attributes:
        position: what comes next.
        last_checkpoint: the newest checkpoint, if there is one.
        pending: a checkpoint that was read and is not yet fully put back.
    """

    model: MultiExitModel
    history: History
    settings: Settings
    loader: EpochLoader
    validation: EpochLoader | None
    line: ProgressLine
    position: Position = field(default_factory=Position)
    last_checkpoint: Path | None = None
    pending: Checkpoint | None = None

    def run(self) -> None:
        """All phases that are left."""
        from offramp.train.phase_module import PhaseModule, run_epochs

        plan = self.history.plan
        while self.position.phase < len(plan):
            index = self.position.phase
            phase = plan[index]
            module = PhaseModule(self, phase)
            with module.trained.only():
                self.loader.epoch = self.position.epochs_done
                self.loader.skip = self.position.step
                if self.loader.skip:  # a shorter epoch takes a Trainer of its own
                    run_epochs(module, 1)
                if self.position.phase == index:
                    run_epochs(module, phase.epochs - self.position.epoch)

    def step_done(self, module: PhaseModule, *, last: bool) -> None:
        """Move the position on; write a checkpoint every ``settings.every`` steps."""
        at, settings = self.position, self.settings
        self.position = Position(at.phase, at.epoch, at.step + 1, at.epochs_done)
        due = settings.every and self.position.step % settings.every == 0
        if due and not last and self.position.step % settings.accumulate == 0:
            self._save(module)

    def epoch_done(self, module: PhaseModule, row: EpochRow) -> None:
        """Move the position on, keep the row, and write a checkpoint."""
        at = self.position
        ended = at.epoch + 1 == self.history.plan[at.phase].epochs
        self.position = Position(
            at.phase + 1 if ended else at.phase, 0 if ended else at.epoch + 1, 0, at.epochs_done + 1
        )
        self.loader.epoch, self.loader.skip = self.position.epochs_done, 0
        self.history.rows.append(row)
        self.line.epoch(row)
        if at.epochs_done == 0:
            self.keep_fingerprints(warn=True)
        self._save(module)

    def keep_fingerprints(self, *, warn: bool = False) -> None:
        """Tell the model which samples it has seen."""
        census = self.loader.census
        if census is not None:
            seen = census.close() if warn else census.hashes
            self.model.training_fingerprints = distinct(self.model.training_fingerprints, seen)

    def restore_epoch(self, meter: Meter) -> None:
        """Put back the sums and the random state of an epoch that was interrupted."""
        if self.pending is None:
            return
        meter.load_state(self.pending.part("meter"))
        states = self.pending.part("random")
        torch.set_rng_state(states.pop("cpu"))
        for index, state in states.items():
            torch.cuda.set_rng_state(state, int(index))
        self.pending = None

    def optimizer_for(self, module: PhaseModule) -> Optimizer:
        """The optimiser of a phase; it and learned weights as they were when interrupted."""
        phase, weigher = module.phase, module.weigher
        make = self.settings.optimizer
        optimizer, names = optimizer_of(make, phase, module.trained, weigher)
        if self.pending is not None and self.pending.optimizer:
            tensors = self.pending.part("optimizer")
            load_optimizer_state(optimizer, names, tensors, self.pending.optimizer)
            if weigher is not None:
                weigher.load_state_dict(self.pending.part(WEIGHER))
        if not self.position.step:  # all is put back; a later phase must not see it again
            self.pending = None
        return optimizer

    def _save(self, module: PhaseModule) -> None:
        if self.settings.folder is None:
            return
        refuse_broken(self.model)
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors["fingerprints"] = self.model.training_fingerprints
        optimizer: dict[str, Any] = {}
        if self.position.epoch or self.position.step:
            parameters = named_parameters(module.trained, module.weigher)
            names = {id(parameter): name for name, parameter in parameters.items()}
            if module.weigher is not None:
                tensors |= {k: p for k, p in parameters.items() if k.startswith(f"{WEIGHER}/")}
            state, optimizer = optimizer_state(module.optimizer, names)
            tensors |= {f"optimizer/{name}": value for name, value in state.items()}
        if self.position.step:
            tensors |= {f"meter/{name}": value for name, value in module.meter.state().items()}
            tensors["random/cpu"] = torch.get_rng_state()
            if module.device.type == "cuda":
                index = torch.cuda.current_device()
                tensors[f"random/{index}"] = torch.cuda.get_rng_state(index)
        rows = [row.to_dict() for row in self.history.rows]
        checkpoint = Checkpoint(self.settings.run, self.position, rows, tensors, optimizer)
        self.last_checkpoint = write_checkpoint(self.settings.folder, checkpoint)


def fit(
    model: MultiExitModel,
    loader: Iterable[Any],
    *,
    scheme: str | Scheme | Sequence[Phase] = "joint",
    epochs: int = 10,
    validation: Iterable[Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    lr: float | None = None,
    schedule: str | Schedule = "cosine",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    precision: str | int = "32-true",
    accumulate: int = 1,
    clip: float | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> History:
    """Train the exits of a model, in place, by the phases of a scheme.

    The same seed, data and settings give the same weights to the bit, on one machine, whether
    training ran through or was interrupted and went on. Shuffling is seeded for every epoch, also
    where the loader brings a generator of its own. (Not covered: ``persistent_workers`` with random
    augmentation; ``precision="16-mixed"``, whose loss scale starts anew; and going on within an
    epoch with a model that draws from numpy or Python's ``random``, whose states are not kept.) The
    global random state is as before afterwards. The model ends in evaluation mode, on the device it
    was on.

    Samples of the first epoch are remembered as ``model.training_fingerprints``, so that a later
    ``record`` knows training data when it sees them.

    Args:
        model: from :func:`offramp.attach`.
        loader: yields ``(input, label)`` batches, or mappings with the key ``labels``; can be
            walked once per epoch. Labels are ``(B,)`` integers.
        scheme: a name in :data:`offramp.train.schemes.SCHEMES`, a scheme, or a list of phases.
        epochs: passes over the loader, of all phases together; a list of phases has its own.
        validation: batches that are judged after every epoch and never trained on.
        optimizer: function from the list of trained parameters to an optimiser; by default AdamW.
            It is called once in every phase.
        lr: learning rate of the default optimiser, 0.001 if not given.
        schedule: ``"cosine"``, ``"constant"``, or a function from the part of the phase that is
            done, in [0, 1), to the factor on the learning rate. Where the loader has no length, the
            factor stands still over an epoch, at that of the epoch's middle.
        seed: of shuffling, augmentation and dropout.
        checkpoint: folder for a checkpoint, written at the end of every epoch. Without one,
            no file is written at all.
        checkpoint_every: write one every so many steps, too, where there is a folder for it.
        resume: go on from the checkpoint in the folder, if there is one. Settings have to be the
            same, but for ``clip`` and ``lr``, which may change on the way, with a warning.
        precision: of Lightning's Trainer: ``"32-true"``, ``"bf16-mixed"`` or ``"16-mixed"``;
            ``"auto"``: ``"bf16-mixed"`` where the machine multiplies bfloat16 by itself, else
            ``"32-true"``. A training that goes on stays with what it began in.
        accumulate: batches of which a step takes the mean gradient. The last step of an epoch takes
            those that are left, where the loader has a length.
        clip: largest norm of the gradient.
        accelerator: of Lightning's Trainer, such as ``"cpu"``.
        progress: show a progress bar on standard error.

    Returns:
        Loss and accuracy of every exit in every epoch.

    Raises:
        DataError: the loader, the labels or the settings are not what was expected, or the
            validation data are among the training data.
        TrainingError: the loss is no longer finite, or the checkpoint is not of this training.
    """
    if not isinstance(model, MultiExitModel):
        raise DataError(
            f"fit trains a MultiExitModel, but got a {type(model).__name__}. "
            "Give it exits first: model = offramp.attach(backbone, example)."
        )
    check_optimizer(optimizer, lr)
    plan = as_plan(scheme, model.num_exits, epochs)
    train = EpochLoader(loader, seed=seed, num_classes=model.num_classes, select=model.select)
    rate = DEFAULT_LR if lr is None else lr
    folder = None if checkpoint is None else Path(checkpoint)
    seed = int(seed)
    _check_settings(accumulate, clip, checkpoint_every, lr)
    precision = known_precision(precision)
    if folder is not None:
        refuse_unsavable(model)
    found = read_checkpoint(folder) if resume and folder is not None else None
    if precision == AUTO:
        precision = found.run["precision"] if found else fastest_precision(accelerator)
    settings = Settings(
        seed=seed,
        optimizer=optimizer or partial(adamw, lr=rate, fused=may_fuse(precision, clip)),
        schedule=schedule_of(schedule),
        precision=precision,
        accumulate=accumulate,
        clip=clip,
        accelerator=accelerator,
        folder=folder,
        every=checkpoint_every,
        run={
            "plan": re.sub(r" at 0x[0-9a-f]+", "", str(plan)),
            "batches per epoch": train.length,
            "seed": seed,
            "optimizer": _name(optimizer) if optimizer else f"{_DEFAULT}{rate:g}",
            "schedule": _name(schedule),
            "precision": precision,
            "accumulate": accumulate,
            "clip": clip,
        },
    )
    device = next(model.parameters()).device
    with preserved_randomness(), torch.inference_mode(False), torch.enable_grad():
        judge = None
        if validation is not None:
            judge = EpochLoader(
                validation,
                seed=seed,
                num_classes=model.num_classes,
                role="validation",
                select=model.select,
            )
        session = Session(model, History(plan), settings, train, judge, ProgressLine(False, 0))
        _resume(session, found)
        found = None  # its tensors are freed when the session has put them back
        _take_census(session)
        done = session.position.epochs_done
        try:
            with ProgressLine(progress, plan.epochs, done) as session.line:
                session.run()
        finally:
            session.keep_fingerprints()
            model.to(device)
    model.eval()
    return session.history


def _resume(session: Session, found: Checkpoint | None) -> None:
    folder = session.settings.folder
    if found is None or folder is None:
        return
    run, path = session.settings.run, str(folder / FILE_NAME)
    finished = found.position.phase == len(session.history.plan)
    for name, now in run.items():
        was = found.run.get(name)
        if was == now:
            continue
        if finished or not _size_of_steps(name, was, now):
            raise TrainingError(
                f"The checkpoint {path!r} is of another training: {name} was\n{was}\nand is now\n"
                f"{now}\nUse the same settings to go on, another folder, or resume=False to start "
                "anew."
            )
        warnings.warn(
            f"The training of the checkpoint {path!r} goes on with another setting: {name} was "
            f"{was} and is now {now}.",
            stacklevel=3,
        )
    load_model_state(session.model, found.part("model"))
    model = session.model
    model.training_fingerprints = distinct(
        model.training_fingerprints, found.tensors["fingerprints"]
    )
    session.history.rows = [EpochRow.from_dict(row) for row in found.rows]
    session.position = found.position
    session.last_checkpoint = folder / FILE_NAME
    session.pending = found


def _size_of_steps(name: str, was: object, now: object) -> bool:
    """Whether a setting may change on the way: what is turned down after a loss that broke."""
    return name == "clip" or all(str(value).startswith(_DEFAULT) for value in (was, now))


def _take_census(session: Session) -> None:
    """Look at the validation samples, so that none of them is trained on unnoticed."""
    hashes = None
    if session.validation is not None:
        hashes = torch.cat([fingerprints(batch) for batch in session.validation])
    census = Census(hashes)
    census.compare(session.model.training_fingerprints)
    if session.position.epochs_done == 0:
        session.loader.census = census


def _name(value: object) -> str:
    """What a function is called, and the plain values that it was given beforehand."""
    if isinstance(value, str):
        return value
    if isinstance(value, partial):
        words = [*map(_told, value.args), *(f"{k}={_told(v)}" for k, v in value.keywords.items())]
        return f"{_name(value.func)}({', '.join(words)})"
    return getattr(value, "__qualname__", type(value).__name__)


def _told(value: object) -> str:
    """A value that is the same in every process; of anything else, what it is."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_told, value))})"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else type(value).__name__


def _check_settings(
    accumulate: int, clip: float | None, every: int | None, lr: float | None
) -> None:
    """Refuse settings that would do nothing, or break in the midst of an epoch."""
    if accumulate < 1:
        raise DataError(f"accumulate={accumulate}: expected 1 or more batches a step.")
    if clip is not None and not clip > 0:
        raise DataError(f"clip={clip}: expected a norm above 0, the largest the gradient may have.")
    if lr is not None and not 0 < lr < math.inf:
        raise DataError(f"lr={lr}: expected a learning rate above 0, such as 0.001.")
    if every is not None and every < 1:
        raise DataError(f"checkpoint_every={every}: expected 1 or more steps.")
