"""The networks whose time is measured, with two auxiliary exits, and the exits their rows take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.vision_packages import prepare
from offramp.build.model import MultiExitModel, attach
from offramp.decide.policy import Policy
from offramp.run.engines import Engine
from offramp.run.runner import Runner
from offramp.zoo import cifar_resnet

__all__ = [
    "EXITS",
    "MIXES",
    "NEVER",
    "SMALL",
    "SUBJECTS",
    "Subject",
    "on_host",
    "policy_for",
    "resnet56",
    "thresholds_for",
]

EXITS = 2
NEVER = 2.0  # no confidence reaches it, and it is finite: heads and scores are still computed
MIXES = {"50/25/25": (0.5, 0.25), "100/0/0": (1.0, 0.0), "0/0/100": (0.0, 0.0)}

Rows = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A network as it is measured.

    Attributes:
        name: for the tables.
        backbone: makes it, from the folder of data.
        inputs: makes that many input rows.
        device: where both are.
    """

    name: str
    backbone: Callable[[Path | None], nn.Module]
    inputs: Callable[[int], Rows]
    device: str = "cpu"

    def rows(self, count: int) -> Rows:
        """That many input rows, on the device."""
        made = self.inputs(count)
        if isinstance(made, dict):
            return {name: value.to(self.device) for name, value in made.items()}
        return made.to(self.device)

    def arrays(self, rows: Rows, engine: Engine) -> Any:
        """The rows as the kind of array that the engine computes on."""
        if isinstance(rows, dict):
            return {name: engine.array(value) for name, value in rows.items()}
        return engine.array(rows)

    def model(self, data: Path | None) -> MultiExitModel:
        """With two exits at a third and two thirds of its cost."""
        torch.manual_seed(0)
        backbone = self.backbone(data).eval().to(self.device)
        model = attach(backbone, self.rows(4), exits=EXITS).eval()
        for linear in [m for m in model.heads.modules() if isinstance(m, nn.Linear)]:
            nn.init.normal_(linear.weight)  # so that the scores of rows differ
        return model


def thresholds_for(scores: Sequence[np.ndarray], shares: Sequence[float]) -> list[float]:
    """Thresholds at which just these shares of the very rows that are timed leave.

    Args:
        scores: of every auxiliary exit, each (B,).
        shares: of all rows, that leave at each of these exits.
    """
    left = np.arange(len(scores[0]))
    found = []
    for score, share in zip(scores, shares, strict=True):
        count = round(share * len(score))
        order = left[np.argsort(-score[left], kind="stable")]
        if count == 0:
            found.append(NEVER)
        elif count == len(order):
            found.append(float(score[order].min()) - 1.0)
        else:
            found.append(float(score[order[count - 1]] + score[order[count]]) / 2)
        left = order[count:]
        if not len(left):  # nobody comes to the later ones
            found += [NEVER] * (len(scores) - len(found))
            break
    return found


def on_host(values: Any) -> np.ndarray:
    """A tensor of any device, or an array, as an array."""
    found: np.ndarray = torch.as_tensor(values).cpu().numpy()
    return found


def policy_for(runner: Runner, rows: Any, shares: Sequence[float]) -> Policy:
    """The policy by which these shares of the rows leave, on the runner's own engine."""
    scores = [answer.score for answer in runner.anytime(rows)][:-1]
    return Policy("confidence", thresholds_for([on_host(s) for s in scores], shares))


def resnet56(data: Path | None) -> nn.Module:
    """ResNet-56 for CIFAR-10 with the published weights, where they are at hand."""
    network = cifar_resnet(56)
    if data is not None:
        path = data / "cifar10-resnet" / "resnet56-4bfd9763.th"
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({key.removeprefix("module."): v for key, v in state.items()})
    return network


def _resnet18(_: Path | None) -> nn.Module:
    prepare()
    from torchvision.models import resnet18

    return resnet18(num_classes=100)


def _text_encoder(_: Path | None) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8000,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
        num_labels=4,
    )
    return BertForSequenceClassification(config)


def _images(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))


def _tokens(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 8000, (rows, 128), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _small(_: Path | None) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(5)]
    return nn.Sequential(*blocks, nn.Linear(32, 10))


SMALL = Subject("perceptron_32", _small, _images(32))

SUBJECTS = {
    one.name: one
    for one in (
        Subject("resnet18_64px", _resnet18, _images(3, 64, 64)),
        Subject("resnet56_cifar", resnet56, _images(3, 32, 32)),
        Subject("text_encoder_128", _text_encoder, _tokens),
    )
}
