"""A small network with everything that freezing can get wrong, and data for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from offramp.build.model import MultiExitModel, attach

CLASSES = 3
FEATURES = 6


class NormNet(nn.Module):
    """(B, 6) -> (B, 3): four blocks with batch normalisation and dropout."""

    def __init__(self, width: int = 8, depth: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        sizes = [FEATURES] + [width] * depth
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(dropout))
                for a, b in zip(sizes[:-1], sizes[1:], strict=True)
            )
        )
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x))


def model_of(exits: Any = ("blocks.0", "blocks.1", "blocks.2"), **settings: Any) -> MultiExitModel:
    """A fresh model; always the same weights for the same settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        example = torch.randn(4, FEATURES)
        places = list(exits) if isinstance(exits, Sequence) else exits
        return attach(NormNet(**settings), example, exits=places)


def data_of(samples: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (N, 6) and labels (N,) that a linear layer can nearly tell."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))).argmax(1)
    return x, y


def loader_of(
    samples: int = 40, batch: int = 8, seed: int = 0, **options: Any
) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches of :func:`data_of`."""
    options = {"shuffle": True} | options
    return DataLoader(TensorDataset(*data_of(samples, seed)), batch_size=batch, **options)


class Breaking:
    """A loader that raises after ``batches`` batches, counted over all epochs."""

    def __init__(self, inner: Any, batches: int, error: BaseException) -> None:
        self.inner, self.left, self.error = inner, batches, error

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        for item in self.inner:
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield item


def digests(model: nn.Module) -> dict[str, str]:
    """Name of each parameter and buffer -> hash of its bytes."""
    return {
        name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, value in model.state_dict().items()
    }


def parts(model: MultiExitModel) -> dict[str, set[str]]:
    """``"stage k"`` and ``"head k"`` -> names of their parameters and buffers."""
    found: dict[str, set[str]] = {}
    for k in range(model.num_exits):
        found[f"stage {k}"] = {
            f"backbone.{path}.{name}" if path else f"backbone.{name}"
            for path, module in model.stage_modules(k)
            for name, _ in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
        }
    for k, head in enumerate(model.heads):
        found[f"head {k}"] = {f"heads.{k}.{name}" for name in head.state_dict()}
    return found


def plain_model_of(exits: Sequence[str] = ("1", "3")) -> MultiExitModel:
    """A fresh model without normalisation or dropout: samples do not see each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
        backbone = nn.Sequential(*layers, nn.Linear(8, CLASSES))
        return attach(backbone, torch.randn(4, FEATURES), exits=list(exits))
