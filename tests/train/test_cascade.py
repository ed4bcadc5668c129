"""Schemes on a cascade: what is trained learns, what is frozen stays, and the link helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offramp
from offramp.build.model import MultiExitModel, attach
from offramp.train.loop import fit
from offramp.train.schemes import SCHEMES, as_plan
from tests.train.test_freezing_bytes import after_each_phase, violations
from tests.train.tiny import FEATURES, Breaking, NormNet, digests, loader_of


def model_of() -> MultiExitModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        places = ["blocks.0", "blocks.1", "blocks.2"]
        return attach(NormNet(), torch.randn(4, FEATURES), exits=places, cascade=True)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_frozen_links_stay_to_the_byte(scheme: str) -> None:
    model = model_of()
    plan = as_plan(scheme, 4, 4)
    states = after_each_phase(model, loader_of(), plan)
    moved, still = violations(model, plan, states)
    assert moved == set()
    assert still == set()
    links = {f"heads.{k}.link.weight" for k in (1, 2)}
    assert {name for name in links if states[0][name] == states[-1][name]} == set()


def test_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scheme": "joint", "epochs": 2, "seed": 3, "progress": False}
    whole = model_of()
    fit(whole, loader_of(), **settings)
    model = model_of()
    broken = Breaking(loader_of(), 7, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fit(model_of(), broken, checkpoint=tmp_path, checkpoint_every=2, **settings)
    fit(model, loader_of(), checkpoint=tmp_path, checkpoint_every=2, **settings)
    assert digests(model) == digests(whole)


class Forgetful(nn.Module):
    """Its second block forgets the first coordinate, which alone tells the class."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.fc = nn.Linear(2, 2)
        self.first.weight.data = torch.eye(2)
        self.second.weight.data = torch.tensor([[0.0, 1.0], [0.0, 1.0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x)))


def test_what_an_earlier_exit_knows_is_not_lost() -> None:
    x = torch.randn(600, 2)
    y = (x[:, 0] > 0).long()
    loader = DataLoader(TensorDataset(x[:400], y[:400]), batch_size=50)
    accuracy = {}
    for cascade in (False, True):
        model = attach(Forgetful(), x[:4], exits=["first", "second"], cascade=cascade)
        fit(model, loader, scheme="heads", epochs=8, lr=0.1, progress=False)
        trace = offramp.record(model, [(x[400:], y[400:])])
        accuracy[cascade] = float((trace.logits[1].argmax(1) == trace.labels).float().mean())
    assert accuracy[False] < 0.65
    assert accuracy[True] > 0.95
