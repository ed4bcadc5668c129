"""ResNet-56 with two exits, trained jointly on CIFAR-10 (JPEG): what the runtime is timed on.

    python benchmarks/trained.py --data DIR --out runs/trained

It starts from the published weights of lossless CIFAR-10, and is kept as ``resnet56.safetensors``,
made once: about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import offramp
from benchmarks.subjects import EXITS, resnet56
from benchmarks.traces import augment, batches, cifar, normalise
from offramp.build.model import MultiExitModel

__all__ = ["EPOCHS", "test_images", "trained_resnet56"]

EPOCHS, BATCH, RATE, SEED = 2, 128, 0.05, 0


class _Images:
    """Shuffled, augmented batches of the training images, anew every epoch."""

    def __init__(self, images: dict[str, Tensor]) -> None:
        self.x, self.y = images["train_x"], images["train_y"]

    def __len__(self) -> int:
        return len(self.x) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches(self.x, self.y, BATCH):
            yield augment(normalise(x), 4), y


def trained_resnet56(data: Path, out: Path) -> MultiExitModel:
    """The network, trained if it was not before."""
    torch.manual_seed(SEED)
    model = offramp.attach(resnet56(data), torch.randn(4, 3, 32, 32), exits=EXITS)
    kept = out / "resnet56.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model.eval()
    sgd = partial(torch.optim.SGD, lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    offramp.fit(
        model,
        _Images(cifar(data)),
        scheme="joint",
        epochs=EPOCHS,
        optimizer=sgd,
        seed=SEED,
        progress=sys.stderr.isatty(),
    )
    out.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    save_file(model.state_dict(), part)
    part.replace(kept)
    return model.eval()


def test_images(data: Path) -> tuple[Tensor, Tensor]:
    """Images (10000, 3, 32, 32) as the network takes them, and labels."""
    images = cifar(data)
    return normalise(images["test_x"]), images["test_y"]


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/trained"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = trained_resnet56(given.data, given.out)
    x, y = test_images(given.data)
    loader = list(zip(x.split(500), y.split(500), strict=True))
    trace = offramp.record(model, loader, progress=False)
    print((trace.logits.argmax(2) == trace.labels).double().mean(1).tolist())


if __name__ == "__main__":
    main()
