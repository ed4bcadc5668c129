"""ResNet-56 with early exits, distilled from their own ensemble: what races earlyon.

    python benchmarks/trained.py --data DIR --out runs/trained

It starts from the published weights for lossless CIFAR-10 and goes on with Fashion-MNIST (images
padded to 32x32, the one channel three times). It is kept as ``fashion_mnist.safetensors`` and made
once: about half an hour on one core that multiplies bfloat16.
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
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

import offramp
from benchmarks.subjects import resnet56
from benchmarks.traces import augment, batches, fashion, normalise
from offramp.build.model import MultiExitModel
from offramp.train.objectives import Distill
from offramp.train.schemes import Joint

__all__ = ["DATA", "ready", "test_images", "trained_resnet56"]

DATA = "Fashion-MNIST"
EXITS = [0.15, 0.4]  # shares of the cost
EPOCHS, BATCH, RATE, SEED = 9, 128, 0.05, 0
PAD = 2  # pixels by which images are shifted at the most


def ready(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 as the network takes it: (N, 3, 32, 32)."""
    x = normalise(images)
    if x.shape[1] == 1:
        x = functional.pad(x, (2, 2, 2, 2), value=float(x.min())).expand(-1, 3, -1, -1)
    return x.contiguous()


class _Images:
    """Shuffled, augmented batches of the training images, anew every epoch."""

    def __init__(self, images: dict[str, Tensor]) -> None:
        self.x, self.y = images["train_x"], images["train_y"]

    def __len__(self) -> int:
        return len(self.x) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches(self.x, self.y, BATCH):
            yield augment(ready(x), PAD), y


def trained_resnet56(data: Path, out: Path) -> MultiExitModel:
    """The network, trained if it was not before."""
    torch.manual_seed(SEED)
    model = offramp.attach(resnet56(data), torch.randn(4, 3, 32, 32), exits=EXITS)
    kept = out / "fashion_mnist.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model.eval()
    # Twice as fast where the processor has its channels last.
    model.to(memory_format=torch.channels_last)
    sgd = partial(torch.optim.SGD, lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    offramp.fit(
        model,
        _Images(fashion()),
        scheme=Joint(Distill(teacher="ensemble")),
        epochs=EPOCHS,
        optimizer=sgd,
        precision="auto",
        seed=SEED,
        checkpoint=out / "fashion_mnist",
        progress=sys.stderr.isatty(),
    )
    model.to(memory_format=torch.contiguous_format)
    part = kept.with_suffix(".part")
    save_file(model.state_dict(), part)
    part.replace(kept)
    return model.eval()


def test_images() -> tuple[Tensor, Tensor]:
    """Images (10000, 3, 32, 32) as the network takes them, and labels."""
    images = fashion()
    return ready(images["test_x"]), images["test_y"]


def main() -> None:
    """Train it if it is missing, and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/trained"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = trained_resnet56(given.data, given.out)
    x, y = test_images()
    loader = list(zip(x.split(500), y.split(500), strict=True))
    trace = offramp.record(model, loader, progress=False)
    print((trace.logits.argmax(2) == trace.labels).double().mean(1).tolist())


if __name__ == "__main__":
    main()
