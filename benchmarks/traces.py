"""Train two multi-exit networks and record what their exits say on the test sets.

    python benchmarks/traces.py --data DIR --out runs/traces

Writes ``fashion_mnist.safetensors`` and ``cifar10_jpeg.safetensors`` (traces of all 10,000 test
images), and beside each a JSON with the settings, the versions and the accuracy of every exit. What
exists is kept. One thread: about half an hour on one core of a small server.

Fashion-MNIST is read from Debian's package ``dataset-fashion-mnist``; CIFAR-10 (JPEG) and the
ResNet-20 that is fine-tuned on it from ``--data``.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import platform
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Recipe:
    """How one network is trained."""

    data: str
    exits: tuple[str, ...]
    epochs: int
    lr: float
    pad: int
    batch: int = 128
    weight_decay: float = 5e-4
    seed: int = 0


RECIPES = {
    "fashion_mnist": Recipe(
        "Fashion-MNIST",
        ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.5", "blocks.6"),
        epochs=5, lr=0.1, pad=2,
    ),
    "cifar10_jpeg": Recipe(
        "CIFAR-10 (JPEG)",
        ("layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1"),
        epochs=3, lr=0.05, pad=4,
    ),
}  # fmt: skip


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.more = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        half = self.more // 2
        return functional.relu(y + functional.pad(short, (0, 0, 0, 0, half, self.more - half)))


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10, with the parameter names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, 10)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class SmallResNet(nn.Module):
    """Eight residual blocks behind a stem of stride 2, for 28x28 images."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        sizes = [width, width, width, 2 * width, 2 * width, 2 * width, *[4 * width] * 3]
        self.blocks = nn.Sequential(
            *(Block(a, b, 1 if a == b else 2) for a, b in zip(sizes, sizes[1:], strict=False))
        )
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 28, 28) -> (B, 10)."""
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))


def fashion(folder: Path = FASHION) -> dict[str, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,), train and test."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: apt-get install dataset-fashion-mnist")
    out = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        out[f"{part}_x"] = torch.tensor(np.frombuffer(pixels, np.uint8, offset=16)).reshape(
            -1, 1, 28, 28
        )
        out[f"{part}_y"] = torch.tensor(np.frombuffer(labels, np.uint8, offset=8)).long()
    return out


def cifar(data: Path) -> dict[str, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,), train and test, in the archive's order."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(data / "cifar10-jpeg" / "CIFAR-10-images.tar.gz") as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                part, label = Path(member.name).parts[-3:-1]
                raw = archive.extractfile(member)
                pixels = np.asarray(Image.open(io.BytesIO(raw.read())).convert("RGB"))
                found[part].append((label, pixels))
    names = sorted({label for label, _ in found["test"]})
    out = {}
    for part, rows in found.items():
        images = torch.from_numpy(np.stack([pixels for _, pixels in rows]))
        out[f"{part}_x"] = images.permute(0, 3, 1, 2).contiguous()
        out[f"{part}_y"] = torch.tensor([names.index(label) for label, _ in rows])
    return out


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels to what the networks take; colour by ImageNet's figures, as ResNet-20 was."""
    x = images.float() / 255
    if images.shape[1] == 1:
        return (x - 0.2860) / 0.3530
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    return (x - mean) / torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def augment(x: Tensor, pad: int) -> Tensor:
    """Random flips, and one random shift for each of eight parts of the batch."""
    flip = torch.rand(len(x)) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    size = x.shape[-1]
    wide = functional.pad(x, (pad,) * 4)
    parts = []
    for piece in wide.chunk(8):
        top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
        parts.append(piece[:, :, top : top + size, left : left + size])
    return torch.cat(parts)


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch; the last, smaller batch is left out."""
    for rows in torch.randperm(len(x)).split(size):
        if len(rows) == size:
            yield x[rows], y[rows]


def train(model: nn.Module, data: dict[str, Tensor], recipe: Recipe) -> None:
    """Joint training, every exit with the same weight, in plain PyTorch."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest}]
    optimiser = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    steps = recipe.epochs * (len(data["train_x"]) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, steps, pct_start=0.25)
    model.train()
    for epoch in range(recipe.epochs):
        started, total, count = time.perf_counter(), 0.0, 0
        for x, y in batches(data["train_x"], data["train_y"], recipe.batch):
            outputs = model(augment(normalise(x), recipe.pad))
            loss = sum(functional.cross_entropy(logits, y) for logits in outputs) / len(outputs)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total, count = total + float(loss.detach()), count + 1
        took = time.perf_counter() - started
        print(
            f"{recipe.data}: epoch {epoch + 1}, loss {total / count:.4f}, {took:.0f} s", flush=True
        )


def backbone_of(name: str, data: Path) -> nn.Module:
    """The network to start from."""
    if name == "fashion_mnist":
        return SmallResNet()
    path = data / "cifar10-resnet" / "resnet20-12fca82f.th"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network = ResNet20()
    network.load_state_dict({key.removeprefix("module."): v for key, v in state.items()})
    return network


def make(name: str, data: Path, out: Path) -> Path:
    """Train, record and write one trace, unless it is there."""
    from offramp.build.model import attach
    from offramp.decide import record

    target = out / f"{name}.safetensors"
    if target.is_file():
        return target
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    images = fashion() if name == "fashion_mnist" else cifar(data)
    example = normalise(images["train_x"][:4])
    model = attach(backbone_of(name, data), example, exits=list(recipe.exits))
    started = time.perf_counter()
    train(model, images, recipe)
    rows = zip(images["test_x"].split(500), images["test_y"].split(500), strict=True)
    loader = [(normalise(x), y) for x, y in rows]
    trace = record(model, loader, source=f"test set of {recipe.data}", progress=False)
    right = (trace.logits.argmax(2) == trace.labels).double().mean(1)
    about = {
        "recipe": asdict(recipe),
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
        "accuracy": [round(value, 4) for value in right.tolist()],
        "stage_macs": trace.stage_costs.tolist(),
        "head_macs": trace.head_costs.tolist(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    trace.save(target)
    target.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    return target


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/traces"))
    parser.add_argument("--only", choices=sorted(RECIPES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        if arguments.only in (None, name):
            print(make(name, arguments.data, arguments.out), flush=True)


if __name__ == "__main__":
    main()
