"""Half precision only where the machine computes in it, and the same when a training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import offramp
from offramp.train import loop
from offramp.train.checkpoint import read_checkpoint
from offramp.train.precision import fastest_precision


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"avx512_bf16": True, "avx2": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
        ({"bf16": True, "neon": True}, "bf16-mixed"),
        ({"avx512_f": True, "avx512_bf16": False}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_by_the_instructions_of_the_processor(
    known: dict[str, bool], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert fastest_precision("cpu") == wanted


def test_a_torch_that_cannot_tell_trains_in_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fastest_precision("cpu") == "32-true"


def test_a_training_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(3)
    ]
    model = offramp.attach(backbone, data[0][0], exits=["0"])
    asked = []

    def fastest(accelerator: str) -> str:
        asked.append(accelerator)
        return "bf16-mixed"

    monkeypatch.setattr(loop, "fastest_precision", fastest)
    given = {"epochs": 2, "checkpoint": tmp_path, "accelerator": "cpu", "progress": False}
    offramp.fit(model, data, precision="auto", **given)
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found.run["precision"] == "bf16-mixed"
    monkeypatch.setattr(loop, "fastest_precision", lambda _: "32-true")
    offramp.fit(model, data, precision="auto", **given)  # another machine: it is not refused
    assert asked == ["cpu"]
