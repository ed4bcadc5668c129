"""One training: a network, a setting, a seed. Done once, and kept with what its exits say."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import offramp
from benchmarks.learning.gradients import Norms, read_norms
from benchmarks.learning.settings import PLAIN, SETTINGS, Setting
from benchmarks.learning.tasks import PARTS, Data, Images, Task, images_of
from benchmarks.traces import normalise
from benchmarks.writing import trained_on, versions
from offramp.build.model import MultiExitModel
from offramp.decide import Trace
from offramp.files import replaced
from offramp.train.checkpoint import read_checkpoint
from offramp.train.optimizers import adamw
from offramp.train.precision import AUTO

__all__ = ["PACKAGES", "SGD_RATE", "Keep", "Run", "model_of", "train"]

PACKAGES = ("torch", "lightning", "numpy", "scipy", "onnxruntime", "onnx")

ROWS = 500  # images at a time where nothing is learnt
SGD_RATE = 0.02


@dataclass(frozen=True)
class Keep:
    """Where data come from and runs are kept.

    Attributes:
        data: the folder of data.
        runs: the folder of runs.
    """

    data: Path
    runs: Path

    def images(self, task: Task) -> Data:
        """The images of a task."""
        return images_of(task, self.data, self.runs)


@dataclass(frozen=True)
class Run:
    """A training, done or to be done."""

    task: Task
    setting: Setting
    seed: int

    @property
    def before(self) -> Run | None:
        """The run whose backbone it starts from."""
        onto = self.setting.onto
        return None if onto is None else Run(self.task, SETTINGS[onto], self.seed)

    @property
    def plain(self) -> Run:
        """The run of the network without exits, of the same seed."""
        return Run(self.task, SETTINGS[PLAIN], self.seed)

    def folder(self, keep: Keep) -> Path:
        """Of its files."""
        return keep.runs / self.task.name / self.setting.name / f"seed{self.seed}"

    def done(self, keep: Keep) -> bool:
        """Whether it is finished."""
        return (self.folder(keep) / "run.json").is_file()

    def about(self, keep: Keep) -> dict[str, Any]:
        """What is known of it: settings, history, gradients."""
        found: dict[str, Any] = json.loads((self.folder(keep) / "run.json").read_text("utf-8"))
        return found

    def trace(self, keep: Keep, part: str) -> Trace:
        """What its exits say on the images of a part, ``"test"`` or ``"held"``."""
        return Trace.load(self.folder(keep) / f"{part}.safetensors")


def model_of(run: Run, keep: Keep, *, drawn: bool = False) -> MultiExitModel:
    """The network with its exits: trained, where the run is done, unless weights do not matter."""
    torch.manual_seed(run.seed)
    backbone = run.task.backbone(keep.data)
    example = normalise(keep.images(run.task)["train_x"][:4])
    places = list(run.task.exits)
    model = offramp.attach(
        backbone, example, exits=places, heads=run.task.heads, cascade=run.setting.cascade
    )
    if drawn:
        return model
    if run.done(keep):
        model.load_state_dict(load_file(run.folder(keep) / "model.safetensors"))
    elif run.before is not None:
        before = load_file(run.before.folder(keep) / "model.safetensors")
        own = {
            name.removeprefix("backbone."): value
            for name, value in before.items()
            if name.startswith("backbone.")
        }
        model.backbone.load_state_dict(own)
    return model


def train(run: Run, keep: Keep) -> bool:
    """Train, record and keep, unless that is done, or being done by another process.

    Returns:
        Whether the run is finished now.
    """
    if run.done(keep):
        return True
    if run.before is not None and not run.before.done(keep):
        return False
    with _claimed(run.folder(keep)) as ours:
        if not ours:
            return False
        if not run.done(keep):
            _train(run, keep)
    return True


def sgd(parameters: list[Parameter]) -> Optimizer:
    """For what AdamW would undo."""
    return torch.optim.SGD(parameters, lr=SGD_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _train(run: Run, keep: Keep) -> None:
    task, folder = run.task, run.folder(keep)
    data, model = keep.images(task), model_of(run, keep)
    loader = Images(data, task.pad, run.seed)
    make = sgd if run.setting.sgd else partial(adamw, lr=task.rate)
    # Twice as fast where the processor has its channels last.
    model.to(memory_format=torch.channels_last)
    history = offramp.fit(
        model,
        loader,
        scheme=run.setting.scheme,
        epochs=task.epochs,
        optimizer=Norms(make, model, loader, folder / "gradients.jsonl"),
        precision=AUTO,
        seed=run.seed,
        checkpoint=folder / "checkpoint",
        progress=False,
    )
    kept = read_checkpoint(folder / "checkpoint")
    precision = AUTO if kept is None else kept.run["precision"]  # that it began in
    model.to(memory_format=torch.contiguous_format)
    for part in ("held", "test"):
        if f"{part}_x" in data:
            source = f"{part}, {task.data}"
            _record(model, data, part, source).save(folder / f"{part}.safetensors")
    with replaced(folder / "model.safetensors") as part_file:
        save_file(model.state_dict(), part_file)
    steps = task.epochs * len(loader)
    about = {
        "processor": trained_on(),
        "versions": versions(PACKAGES),
        "precision": precision,
        "task": task.name,
        "setting": run.setting.name,
        "seed": run.seed,
        "places": list(model.places),
        "stage_macs": list(model.costs.stages),
        "head_macs": list(model.costs.heads),
        "steps": steps,
        "seconds": round(sum(row.seconds for row in history), 1),
        "train_loss": [[row.epoch, *row.train_loss] for row in list(history)[PARTS - 1 :: PARTS]],
        "gradient_norms": read_norms(folder / "gradients.jsonl", steps),
        "plan": str(history.plan),
    }
    with replaced(folder / "run.json") as part_file:
        part_file.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _record(model: MultiExitModel, data: Data, part: str, source: str) -> Trace:
    batches: Iterator[tuple[Tensor, Tensor]] = (
        (normalise(x), y)
        for x, y in zip(data[f"{part}_x"].split(ROWS), data[f"{part}_y"].split(ROWS), strict=True)
    )
    device = "cuda" if torch.cuda.is_available() else None
    return offramp.record(model, batches, source=source, device=device, progress=False)


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether this process alone works in the folder; the claim ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
