"""The main job on real data, end to end: what ``offramp demo`` runs.

Handwritten digits (the 1,797 images of scikit-learn's ``load_digits``, brought to 1×32×32), a
residual network with three exits, and three sets of samples that have none in common: one trains
the network, one sets the thresholds, one measures.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from offramp.analyse.plot import picture
from offramp.analyse.report import Report, evaluate
from offramp.build.model import MultiExitModel, attach
from offramp.decide.calibrate import calibrate
from offramp.decide.policy import Policy, replay
from offramp.decide.record import record
from offramp.decide.trace import Trace
from offramp.files import replaced
from offramp.run.engines import OnnxRuntime
from offramp.run.runner import Runner
from offramp.run.timing import compare
from offramp.train.loop import fit
from offramp.zoo.kept import KIND, write
from offramp.zoo.resnet import cifar_resnet
from offramp.zoo.restoring import RESNET

__all__ = ["QUICK", "Digits", "Settings", "digits", "run"]

PACKAGES = ("offramp", "torch", "lightning", "numpy", "onnx", "onnxruntime", "scikit-learn")


@dataclass(frozen=True)
class Settings:
    """What the demo does.

    Attributes:
        depth: layers of the residual network.
        width: channels of its first group.
        epochs: of joint training.
        batch: samples a training step.
        rate: peak learning rate.
        max_accuracy_drop: what the thresholds may cost on the calibration samples, as a share.
        timed: test samples that are timed, at most.
        seconds: spent on measuring time, for each batch size.
    """

    depth: int = 14
    width: int = 16
    epochs: int = 6
    batch: int = 16
    rate: float = 0.01
    max_accuracy_drop: float = 0.0025
    timed: int = 500
    seconds: float = 6.0


QUICK = Settings(depth=14, width=4, epochs=3, timed=64, seconds=0.2)


@dataclass(frozen=True)
class Digits:
    """Three disjoint parts of the digits, each (images (N, 1, 32, 32), labels (N,))."""

    train: TensorDataset
    calibration: TensorDataset
    test: TensorDataset


def digits(seed: int = 0, sizes: tuple[int, int] = (897, 400)) -> Digits:
    """The digits, standardised and split at random.

    Args:
        seed: of the split.
        sizes: samples for training and for calibration; the others test.
    """
    from sklearn.datasets import load_digits

    pixels, truth = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    images = functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(truth).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, calibration = sizes
    parts = (order[:train], order[train : train + calibration], order[train + calibration :])
    # Mean and deviation of the training part alone: the others are not looked at.
    mean, deviation = images[parts[0]].mean(), images[parts[0]].std()
    images = (images - mean) / deviation
    return Digits(*(TensorDataset(images[part], labels[part]) for part in parts))


def run(
    out: Path,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Do the main job and write everything under ``out``.

    Args:
        out: folder for ``report.json``, ``report.html``, ``frontier.png``, ``model.json``,
            ``model.safetensors``, ``policy.json`` and the traces.
        seed: of the split, the weights and the training.
        settings: what to do; by default what the documents report.
        progress: show progress bars.
        say: told what begins, as one line of text each.

    Returns:
        The report, with measured times.
    """
    todo = settings or Settings()
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    data = digits(seed)
    model = _trained(data.train, todo, seed, progress, say)
    _keep(model, data.calibration, todo, out)

    say("recording what every exit says on samples that training never saw")
    calibration = record(model, _batches(data.calibration), source="calibration", progress=False)
    test = record(model, _batches(data.test), source="test", progress=False)
    calibration.save(out / "calibration.safetensors")
    test.save(out / "trace.safetensors")
    policy = calibrate(calibration, "confidence", max_accuracy_drop=todo.max_accuracy_drop)
    policy.save(out / "policy.json")

    say("cutting the network at its exits for ONNX Runtime, and measuring on the test samples")
    measured = _measured(model, policy, test, data.test, todo)
    report = evaluate(test, policy, seed=seed).with_measurements(
        **measured,
        versions=_versions(),
        seed=seed,
        settings=vars(todo),
        seconds=round(time.perf_counter() - began, 1),
    )
    _write(out, report)
    return report


def _trained(
    data: TensorDataset,
    todo: Settings,
    seed: int,
    progress: bool,
    say: Callable[[str], None],
) -> MultiExitModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = cifar_resnet(**_network(todo))
        model = attach(backbone, data.tensors[0][:2], exits=3)
    places = ", ".join(model.places)
    say(f"training a residual network of {todo.depth} layers with exits after {places}")
    loader = DataLoader(data, batch_size=todo.batch, shuffle=True)
    with _one_thread():
        fit(
            model,
            loader,
            scheme="joint",
            epochs=todo.epochs,
            lr=todo.rate,
            seed=seed,
            progress=progress,
        )
    return model


def _network(todo: Settings) -> dict[str, int]:
    return {"depth": todo.depth, "in_channels": 1, "width": todo.width}


def _keep(model: MultiExitModel, calibration: TensorDataset, todo: Settings, out: Path) -> None:
    """Write the model, so that every command takes the folder for one."""
    about = {
        "kind": KIND,
        "system": RESNET,
        "classes": model.num_classes,
        "network": _network(todo),
        "places": list(model.places),
    }
    write(model, out, about, calibration.tensors[0][:2])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread.

    The steps are so small that a second one helps little, and slows them a lot where another
    program wants its core; and sums do not depend on how many cores there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(data: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(data, batch_size=128)


def _measured(
    model: MultiExitModel, policy: Policy, trace: Trace, data: TensorDataset, todo: Settings
) -> dict[str, Any]:
    """Time per sample on the test samples, and whether the runner decides as the replay does."""
    example, images = data.tensors[0][:2], data.tensors[0].numpy()
    engine = OnnxRuntime()
    runners = {
        "full": Runner(model, Policy.final(), example, engine=engine),
        "early": Runner(model, policy, example, engine=engine),
    }
    answers = [runners["early"](images[start : start + 64]) for start in range(0, len(images), 64)]
    decided = replay(trace, policy)
    same = (np.concatenate([a.exit for a in answers]) == decided.exit.numpy()) & (
        np.concatenate([a.prediction for a in answers]) == decided.prediction.numpy()
    )
    times: dict[str, Any] = {"engine": engine.name, "threads": engine.threads}
    for size in (1, 64):
        times[f"batch_{size}"] = _times(runners, images[: todo.timed], size, todo.seconds)
    return {"time": times, "agreement": float(same.mean())}


def _times(
    runners: dict[str, Runner], images: NDArray[np.float32], size: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds per sample: medians of walks over all images, the candidates in turn.

    A walk over all of them, and not the median sample, because the mean is what a user pays: most
    samples leave early, and the median would be one of those.
    """
    batches = [images[start : start + size] for start in range(0, len(images), size)]

    def walk(runner: Runner) -> Callable[[], object]:
        return lambda: [runner(batch) for batch in batches]

    candidates = {name: walk(runner) for name, runner in runners.items()}
    medians = compare(candidates, repeats=30, warmup=1, seconds=seconds)
    each = {name: milliseconds / len(images) for name, milliseconds in medians.items()}
    return {
        "full_ms": each["full"],
        "early_ms": each["early"],
        "speedup": each["full"] / each["early"],
        "exits_ms": _by_exit(runners["early"], size),
    }


def _by_exit(runner: Runner, size: int) -> list[float | None]:
    """Milliseconds per sample to come to each exit but the last: the sum of its stages' times."""
    runner.measure(batch=size)
    active = runner.policy.active(runner.num_exits)
    found: list[float | None] = []
    total, position = 0.0, 0
    for runs in active:
        if runs:
            total += runner.times.stage(position, size)
            position += 1
        found.append(1e3 * total / size if runs else None)
    return found


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def _write(out: Path, report: Report) -> None:
    _put(out / "report.json", report.to_json().encode())
    _put(out / "report.html", report.to_html().encode())
    _put(out / "frontier.png", picture(report))


def _put(path: Path, content: bytes) -> None:
    with replaced(path) as part:
        part.write_bytes(content)
