"""ResNet-56 with early exits, distilled from their own ensemble: what races earlyon.

    python benchmarks/trained.py --data DIR --out runs/trained

Two networks, both from the published weights for lossless CIFAR-10: one goes on with CIFAR-10
(JPEG), one with Fashion-MNIST (images padded to 32x32, the one channel three times). Each is kept
as ``NAME.safetensors`` and made once: about half an hour each on one core that multiplies bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

import offramp
from benchmarks.subjects import resnet56
from benchmarks.traces import augment, batches, cifar, fashion, normalise
from offramp.build.model import MultiExitModel
from offramp.train.objectives import Distill
from offramp.train.schemes import Joint

__all__ = ["RECIPES", "Recipe", "test_images", "trained_resnet56"]

BATCH, RATE, SEED = 128, 0.05, 0


@dataclass(frozen=True)
class Recipe:
    """What is learnt, and for how long.

    Attributes:
        data: name of the data, for tables.
        images: reads them, from the folder of data.
        exits: fractions of the cost at which exits stand.
        epochs: passes over the training images.
        pad: pixels by which they are shifted at the most.
    """

    data: str
    images: Callable[[Path], dict[str, Tensor]]
    exits: tuple[float, ...]
    epochs: int
    pad: int


RECIPES = {
    "cifar10_jpeg": Recipe("CIFAR-10 (JPEG)", cifar, (1 / 3, 2 / 3), epochs=5, pad=4),
    "fashion_mnist": Recipe("Fashion-MNIST", lambda _: fashion(), (0.15, 0.4), epochs=9, pad=2),
}


def ready(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 as the network takes it: (N, 3, 32, 32)."""
    x = normalise(images)
    if x.shape[1] == 1:
        x = functional.pad(x, (2, 2, 2, 2), value=float(x.min())).expand(-1, 3, -1, -1)
    return x.contiguous()


class _Images:
    """Shuffled, augmented batches of the training images, anew every epoch."""

    def __init__(self, images: dict[str, Tensor], pad: int) -> None:
        self.x, self.y, self.pad = images["train_x"], images["train_y"], pad

    def __len__(self) -> int:
        return len(self.x) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches(self.x, self.y, BATCH):
            yield augment(ready(x), self.pad), y


def trained_resnet56(name: str, data: Path, out: Path) -> MultiExitModel:
    """The network, trained if it was not before."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    exits = list(recipe.exits)
    model = offramp.attach(resnet56(data), torch.randn(4, 3, 32, 32), exits=exits)
    kept = out / f"{name}.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model.eval()
    # Twice as fast where the processor has its channels last.
    model.to(memory_format=torch.channels_last)
    sgd = partial(torch.optim.SGD, lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    offramp.fit(
        model,
        _Images(recipe.images(data), recipe.pad),
        scheme=Joint(Distill(teacher="ensemble")),
        epochs=recipe.epochs,
        optimizer=sgd,
        precision="bf16-mixed",
        seed=SEED,
        checkpoint=out / name,
        progress=sys.stderr.isatty(),
    )
    model.to(memory_format=torch.contiguous_format)
    part = kept.with_suffix(".part")
    save_file(model.state_dict(), part)
    part.replace(kept)
    return model.eval()


def test_images(name: str, data: Path) -> tuple[Tensor, Tensor]:
    """Images (10000, 3, 32, 32) as the network takes them, and labels."""
    images = RECIPES[name].images(data)
    return ready(images["test_x"]), images["test_y"]


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/trained"))
    parser.add_argument("--only", choices=sorted(RECIPES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in [given.only] if given.only else RECIPES:
        model = trained_resnet56(name, given.data, given.out)
        x, y = test_images(name, given.data)
        loader = list(zip(x.split(500), y.split(500), strict=True))
        trace = offramp.record(model, loader, progress=False)
        print(name, (trace.logits.argmax(2) == trace.labels).double().mean(1).tolist())


if __name__ == "__main__":
    main()
