"""Multi-exit models of three kinds, made once: cutting and converting takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from offramp.build.model import MultiExitModel, attach
from tests.networks import example_of, make

KINDS = ("cnn", "mlp", "encoder")


@dataclass(frozen=True)
class Case:
    kind: str
    backbone: nn.Module
    model: MultiExitModel
    example: Tensor | dict[str, Tensor]


@cache
def case(kind: str) -> Case:
    """A model with two exits; its heads see features of unit size, so that scores differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone, example = make(kind), example_of(kind, 5)
        model = attach(backbone, example, exits=2)
        for linear in [m for m in model.heads.modules() if isinstance(m, nn.Linear)]:
            nn.init.normal_(linear.weight)
    return Case(kind, backbone, model.eval(), example)


def rows_of(x: Tensor | dict[str, Tensor], rows: slice | list[int]) -> Tensor | dict[str, Tensor]:
    """Rows of an input."""
    return {k: v[rows] for k, v in x.items()} if isinstance(x, dict) else x[rows]


def whole(case: Case, x: Tensor | dict[str, Tensor]) -> list[Tensor]:
    """Logits of every exit by the model itself."""
    with torch.no_grad():
        outputs = case.model(**x) if isinstance(x, dict) else case.model(x)
    return list(outputs.logits)
