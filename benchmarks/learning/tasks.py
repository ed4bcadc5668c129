"""Networks and the images that they learn, in parts that share no image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.traces import augment, cifar, fashion, normalise
from offramp.files import replaced
from offramp.zoo import cifar_resnet

__all__ = [
    "BATCH",
    "DEEP_LONG",
    "DENSE",
    "HELD_OUT",
    "LONG",
    "NARROW_LONG",
    "PARTS",
    "SHALLOW_LONG",
    "TASKS",
    "Images",
    "Task",
    "images_of",
    "quick",
]

BATCH = 128
PARTS = 4  # of a pass over the images: the epochs that schemes divide among their phases
HELD_OUT = 5000

Data = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A network, what it learns, and the budget that every scheme has.

    Attributes:
        name: of its folder.
        network: for the tables.
        data: for the tables.
        backbone: makes the network, from the folder of data.
        images: reads the images, from the folder of data: parts ``train``, ``test`` and, where
            thresholds are calibrated on images of the training set that are held out, ``held``.
        exits: fractions of the cost at which exits stand, or their places.
        heads: the kind of head at each of them.
        passes: over the training images.
        rate: the highest learning rate.
        pad: pixels by which training images are shifted at the most.
        begins: what its parameters are before.
        calibrated_on: samples that thresholds are chosen on.
        train_images: how many images there are to train on, at the most.
    """

    name: str
    network: str
    data: str
    backbone: Callable[[Path], nn.Module]
    images: Callable[[Path], Data]
    exits: tuple[float | str, ...]
    passes: int
    rate: float
    pad: int
    begins: str
    calibrated_on: str
    train_images: int = 60_000
    heads: str = "deep"

    @property
    def epochs(self) -> int:
        """Of fit: parts of passes."""
        return self.passes * PARTS


class Images:
    """Shuffled, augmented batches. One walk is a part of a pass; the next walk goes on with it.

    Attributes:
        epoch: which part of which pass comes next, set by ``fit``.
        step: batches that were fetched since the beginning of the training.
    """

    def __init__(self, data: Data, pad: int, seed: int) -> None:
        self.x, self.y, self.pad, self.seed = data["train_x"], data["train_y"], pad, seed
        self.epoch = self.step = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by ``fit`` before each walk."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, len(self.x) // (PARTS * BATCH))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done, part = divmod(self.epoch, PARTS)
        generator = torch.Generator().manual_seed(1000 * self.seed + done)
        order = torch.randperm(len(self.x), generator=generator)
        first = part * len(self) * BATCH
        for index, rows in enumerate(order[first : first + len(self) * BATCH].split(BATCH)):
            self.step = self.epoch * len(self) + index
            yield augment(normalise(self.x[rows]), self.pad), self.y[rows]


def images_of(task: Task, data: Path, kept: Path) -> Data:
    """The images of a task; decoded once, and kept in a file.

    Args:
        task: whose images.
        data: the folder of data.
        kept: folder for the file.
    """
    path = kept / f"{task.images.__name__}.safetensors"
    if not path.is_file():
        with replaced(path) as part:
            save_file(task.images(data), part)
    found = load_file(path)
    return found | {name: found[name][: task.train_images] for name in ("train_x", "train_y")}


def fashion_mnist(data: Path) -> Data:
    """Fashion-MNIST, with some of the training images held out for thresholds."""
    found = fashion()
    order = torch.randperm(len(found["train_x"]), generator=torch.Generator().manual_seed(0))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    parts = {"train": rest, "held": held}
    taken = {f"{p}_{k}": found[f"train_{k}"][rows] for p, rows in parts.items() for k in "xy"}
    return taken | {"test_x": found["test_x"], "test_y": found["test_y"]}


def cifar10_jpeg(data: Path) -> Data:
    """CIFAR-10 as JPEG. The published networks know all training images: none can be held out."""
    return cifar(data)


def _resnet20_anew(data: Path) -> nn.Module:
    return cifar_resnet(20, in_channels=1)


def _published(depth: int, file: str) -> Callable[[Path], nn.Module]:
    def make(data: Path) -> nn.Module:
        path = data / "cifar10-resnet" / file
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network = cifar_resnet(depth)
        network.load_state_dict({key.removeprefix("module."): v for key, v in state.items()})
        return network

    return make


ANEW, PUBLISHED = "drawn at random", "published weights for lossless CIFAR-10"
HELD = f"{HELD_OUT} training images, held out"
HALVES = "each half of the test images for measuring on the other"
EXITS = (0.15, 0.3, 0.45, 0.65)
# Photographs are told apart late: in between, and not before, is there something to be gained.
LATE = (0.35, 0.5, 0.6, 0.7, 0.8, 0.9)

TASKS = {
    task.name: task
    for task in (
        Task(
            "fashion_resnet20", "ResNet-20", "Fashion-MNIST", _resnet20_anew, fashion_mnist,
            EXITS, passes=3, rate=3e-3, pad=0, begins=ANEW, calibrated_on=HELD,
        ),
        Task(
            "cifar_resnet20", "ResNet-20", "CIFAR-10 (JPEG)",
            _published(20, "resnet20-12fca82f.th"), cifar10_jpeg,
            LATE, passes=8, rate=1e-3, pad=4, begins=PUBLISHED, calibrated_on=HALVES,
        ),
        Task(
            "cifar_resnet56", "ResNet-56", "CIFAR-10 (JPEG)",
            _published(56, "resnet56-4bfd9763.th"), cifar10_jpeg,
            LATE, passes=8, rate=1e-3, pad=4, begins=PUBLISHED, calibrated_on=HALVES,
        ),
    )
}  # fmt: skip

_BLOCKS = tuple(f"layer{group}.{block}" for group in (1, 2, 3) for block in range(3))

# An exit behind every block but the last: one network serves for any number of exits.
DENSE = replace(TASKS["fashion_resnet20"], name="fashion_resnet20_dense", exits=_BLOCKS[:-1])


# Schemes that train all exits at once learn slower than the plain network: does time close the gap?
LONG = replace(TASKS["fashion_resnet20"], name="fashion_resnet20_long", passes=10)
SHALLOW_LONG = replace(TASKS["cifar_resnet20"], name="cifar_resnet20_long", passes=20, rate=2e-3)
# ResNet-20 is so small that six heads as wide as elsewhere cost a quarter of it.
NARROW_LONG = replace(SHALLOW_LONG, name="cifar_resnet20_narrow", passes=30, heads="deep:32")
DEEP_LONG = replace(TASKS["cifar_resnet56"], name="cifar_resnet56_long", passes=20, rate=2e-3)


def quick(task: Task) -> Task:
    """A sample of a task that is trained in seconds, to see that everything runs."""
    return replace(task, passes=2, train_images=1024)
