"""Half precision only where the machine computes in it, and the same when a training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offramp
from offramp.errors import DataError
from offramp.train import loop
from offramp.train.checkpoint import read_checkpoint
from offramp.train.precision import fastest_precision, known_precision
from tests.train.tiny import data_of, digests, loader_of, plain_model_of

QUIET: dict[str, Any] = {"accelerator": "cpu", "progress": False}


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


@pytest.mark.parametrize("clip", [None, 1e-9])
def test_clipping_in_mixed_precision(clip: float | None) -> None:
    """AdamW moves by the rate whatever the size of the gradient, unless it is below its epsilon."""
    model = plain_model_of()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    settings: dict[str, Any] = {"precision": "bf16-mixed", "schedule": "constant", "lr": 0.01}
    offramp.fit(model, loader_of(40, 40), epochs=1, clip=clip, **settings, **QUIET)
    moved = max(
        float((now.detach() - old).abs().max())
        for now, old in zip(model.parameters(), before, strict=True)
    )
    assert (moved < 2e-3) == (clip is not None)


@pytest.mark.parametrize(
    ("given", "name"),
    [(32, "32-true"), ("32", "32-true"), ("bf16", "bf16-mixed"), (16, "16-mixed")],
)
def test_short_names_are_those_of_lightning(given: str | int, name: str) -> None:
    assert known_precision(given) == known_precision(name) == name


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true", 64, "float32"])
def test_a_precision_that_converts_the_model_is_refused(precision: str | int) -> None:
    model = plain_model_of()
    before = digests(model)
    with pytest.raises(DataError, match=f"precision={precision!r}: expected one of '32-true'"):
        offramp.fit(model, loader_of(), epochs=1, precision=precision, **QUIET)
    assert digests(model) == before


def test_another_type_is_trained_as_the_refusal_says() -> None:
    model = plain_model_of().to(torch.float64)
    x, y = data_of()
    offramp.fit(model, [(x.to(torch.float64), y)], epochs=1, **QUIET)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
