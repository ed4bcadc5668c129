"""Train, calibrate and judge a system of the zoo; what was done is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.analyse.report import Report, evaluate
from offramp.build.batch import fingerprints, unpack
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.decide.record import record
from offramp.decide.trace import Trace
from offramp.errors import DataError, TrainingError
from offramp.files import replaced
from offramp.train.checkpoint import FILE_NAME
from offramp.train.data import distinct
from offramp.train.loop import fit
from offramp.train.phases import Phase
from offramp.train.schemes import Scheme
from offramp.zoo.images import Batches, Images, open_images
from offramp.zoo.kept import KIND, TENSORS, write
from offramp.zoo.recipe import Recipe

__all__ = [
    "EXAMPLE",
    "Outcome",
    "digest",
    "judge",
    "keep",
    "note",
    "plain_phases",
    "refuse_drop",
    "remember",
    "run",
    "train",
]

TOLERANCE = 0.01  # a loss of accuracy that the verdict accepts in any case, as a share
EXAMPLE = 4  # calibration samples that are kept with a model


@dataclass(frozen=True)
class Outcome:
    """A trained system.

    Attributes:
        model: in evaluation mode.
        policy: chosen on the calibration samples.
        calibration: trace of these.
        test: trace of the test samples.
        report: what the policy does on the test samples.
    """

    model: MultiExitModel
    policy: Policy
    calibration: Trace
    test: Trace
    report: Report


def run(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    epochs: int | None = None,
    seed: int = 0,
    max_accuracy_drop: float = 0.0,
    progress: bool = True,
) -> Outcome:
    """Train a system, choose its thresholds and judge it, each on samples of their own.

    Interrupted, the same call goes on; done, it reads what it has kept. A tenth of the training
    images is for calibration.

    Args:
        recipe: of the system.
        data: folder with the files.
        out: folder for checkpoint, model, traces, policy and report.
        epochs: instead of the recipe's.
        seed: of weights, shuffling and the draw of the calibration samples.
        max_accuracy_drop: what the thresholds may cost on the calibration samples, as a share; the
            verdict accepts as much, and no less than 0.01.
        progress: show a bar on standard error.

    Raises:
        DataError: the files are missing or damaged, or the drop is no share.
        TrainingError: ``out`` holds another training.
        Infeasible: no thresholds lose so little.
    """
    refuse_drop(max_accuracy_drop)
    images = open_images(recipe.data, data, seed=seed)
    model = train(recipe, images, out, epochs=epochs, seed=seed, progress=progress)
    traces = [
        record(model, _batches(images, part), source=f"{recipe.data} ({name})", progress=progress)
        for name, part in (("calibration", images.calibration), ("test", images.test))
    ]
    policy = recipe.choose(traces[0], max_accuracy_drop)
    report = judge(traces[1], policy, out, max_accuracy_drop, seed)
    return keep(Outcome(model, policy, traces[0], traces[1], report), out)


def train(
    recipe: Recipe,
    images: Images,
    out: Path,
    *,
    epochs: int | None = None,
    seed: int = 0,
    scheme: Scheme | Sequence[Phase] | None = None,
    progress: bool = True,
) -> MultiExitModel:
    """The trained network of a recipe, in evaluation mode.

    A training that ``out`` holds goes on; one that is done is read.

    Args:
        recipe: of the system.
        images: to train on.
        out: folder for the checkpoint and the model, which :func:`offramp.zoo.restoring.restore`
            reads.
        epochs: instead of the recipe's.
        seed: of weights and shuffling.
        scheme: instead of the recipe's.
        progress: show a bar on standard error.

    Raises:
        TrainingError: ``out`` holds another training, or weights without its checkpoint.
    """
    x, y = images.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = recipe.build(int(y.max()) + 1)
    _note(recipe, images, out)
    # Convolutions are about twice as fast on a processor where the channels come last.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit(
        model,
        Batches(images.normalise(x), y, recipe.batch, recipe.pad, flip=recipe.flip),
        scheme=recipe.scheme if scheme is None else scheme,
        epochs=recipe.epochs if epochs is None else epochs,
        optimizer=recipe.optimizer,
        precision=recipe.precision,
        seed=seed,
        checkpoint=out,
        progress=progress,
    )
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    remember(model, _batches(images, images.train))
    about = {
        "kind": KIND,
        "system": recipe.name,
        "classes": model.num_classes,
        "preprocessing": images.preprocessing(),
    }
    write(model, out, about, images.normalise(images.calibration[0][:EXAMPLE]))
    return model.eval()


def remember(model: MultiExitModel, batches: Iterable[Any]) -> None:
    """Tell a model which samples it was trained on, as they are without shifts and cuts.

    Training saw them shifted, mirrored or cut; recorded, they come as they are.
    """
    seen = [fingerprints(unpack(batch)) for batch in batches]
    model.training_fingerprints = distinct(model.training_fingerprints, *seen)


def _note(recipe: Recipe, images: Images, out: Path) -> None:
    """Keep what a training is made of that its checkpoint does not know, and compare it."""
    weights = out / TENSORS
    if weights.is_file() and not (out / FILE_NAME).is_file():
        raise TrainingError(
            f"{weights} is there without {FILE_NAME}, the checkpoint that says how it was trained. "
            "Choose another folder, or move it away to train anew."
        )
    now = {
        "recipe": recipe.name,
        "training images (sha256)": digest(images.train),
        "batch": recipe.batch,
        "pad": recipe.pad,
        "flip": recipe.flip,
    }
    note(out, now)


def note(out: Path, now: Mapping[str, object]) -> None:
    """Keep what a training is made of beside its checkpoint; refuse one that is made of other.

    Args:
        out: folder of the checkpoint.
        now: names and values that JSON can hold; those that are not named are not compared.

    Raises:
        TrainingError: the training that ``out`` holds differs in one of them, or what was kept of
            it is damaged.
    """
    path, kept = out / "recipe.json", dict(now)
    if (out / FILE_NAME).is_file() and path.is_file():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise TrainingError(
                f"{path} is damaged: expected the JSON object that says what the training in {out} "
                "is made of. Choose another folder, or remove this one to train anew."
            )
        different = [name for name in now if before.get(name) != now[name]]
        if different:
            name = different[0]
            raise TrainingError(
                f"{out} holds another training: {name} was {before.get(name)} and is now "
                f"{now[name]}. Choose another folder, or remove this one to train anew."
            )
        kept = {**before, **kept}
    with replaced(path) as part:
        part.write_text(json.dumps(kept, indent=1), "utf-8")


def digest(tensors: Iterable[Tensor]) -> str:
    """The sha256 of tensors, as hexadecimal text."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


def judge(test: Trace, policy: Policy, out: Path, drop: float, seed: int) -> Report:
    """The report on a policy whose thresholds were allowed so large a drop; kept in ``out``."""
    report = evaluate(test, policy, tolerance=max(TOLERANCE, drop), seed=seed)
    content = report.to_json()
    with replaced(out / "report.json") as part:
        part.write_text(content, "utf-8")
    return report


def keep(made: Outcome, out: Path) -> Outcome:
    """Write what was chosen, once it is judged, and the traces that it was chosen and judged on."""
    made.calibration.save(out / "calibration.safetensors")
    made.test.save(out / "test.safetensors")
    made.policy.save(out / "policy.json")
    return made


def refuse_drop(drop: float) -> None:
    """Refuse what is no loss of accuracy, before anything is trained.

    Raises:
        DataError: it is not from 0 to 1.
    """
    if not 0 <= drop <= 1:
        raise DataError(
            f"max_accuracy_drop={drop}: expected a share of the samples from 0 to 1; half a point "
            "of accuracy is 0.005."
        )


def plain_phases(num_exits: int, epochs: int) -> list[Phase]:
    """The backbone trained by its own loss alone: what the system is compared with."""
    return [Phase("plain", tuple(range(num_exits)), (), (num_exits - 1,), epochs)]


def _batches(images: Images, part: tuple[Tensor, Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    x, y = part
    return Batches(images.normalise(x), y, 500)
