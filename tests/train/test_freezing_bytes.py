"""Frozen means: not one byte of parameters or statistics changes. And the test can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offramp.build.model import MultiExitModel, attach
from offramp.train import freezing
from offramp.train.freezing import Trained
from offramp.train.loop import fit
from offramp.train.phases import Phase, Plan
from offramp.train.schemes import Layerwise, as_plan
from tests.networks import example_of, make
from tests.train.tiny import digests, loader_of, model_of, parts

Optimizers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
}


def after_each_phase(
    model: MultiExitModel, loader: Any, plan: Plan, **settings: Any
) -> list[dict[str, str]]:
    """Hashes of the model before training and after each phase.

    Training is reproducible, so the first k phases alone end where the whole passes after k; a last
    check makes sure of that.
    """
    states = [digests(model)]
    for count in range(1, len(plan) + 1):
        part = copy.deepcopy(model)
        part.training_fingerprints = torch.empty(0, dtype=torch.int64)
        fit(part, loader, scheme=list(plan[:count]), progress=False, accelerator="cpu", **settings)
        states.append(digests(part))
    return states


def violations(
    model: MultiExitModel, plan: Plan, states: list[dict[str, str]]
) -> tuple[set[str], set[str]]:
    """Names that changed although they were frozen, and parts that stood still although trained."""
    named = parts(model)
    moved, still = set(), set()
    for phase, before, after in zip(plan, states[:-1], states[1:], strict=True):
        changed = {name for name in before if before[name] != after[name]}
        trained = [f"stage {k}" for k in phase.stages] + [f"head {k}" for k in phase.heads]
        allowed = set().union(*(named[part] for part in trained))
        moved |= {f"{phase.name}: {name}" for name in changed - allowed}
        still |= {f"{phase.name}: {part}" for part in trained if not named[part] & changed}
    return moved, still


@pytest.mark.parametrize("optimizer", sorted(Optimizers))
def test_no_byte_of_a_frozen_part_changes(optimizer: str) -> None:
    """For every scheme, see tests/train/test_contract.py."""
    model = model_of()
    plan = as_plan("layerwise", 4, 4)
    states = after_each_phase(model, loader_of(), plan, optimizer=Optimizers[optimizer])
    moved, still = violations(model, plan, states)
    assert moved == set()
    assert still == set()


@pytest.mark.parametrize("kind", ["cnn", "encoder"])
def test_no_byte_changes_on_a_residual_network_and_a_transformer(kind: str) -> None:
    classes = 5 if kind == "cnn" else 3
    torch.manual_seed(0)
    model = attach(make(kind), example_of(kind), exits=2)
    batches = [(example_of(kind, 6, seed), torch.arange(6) % classes) for seed in (5, 6)]
    plan = Layerwise().plan(3, 3)
    moved, still = violations(model, plan, after_each_phase(model, batches, plan))
    assert moved == set()
    assert still == set()


def test_every_trained_statistic_does_move() -> None:
    """Else the tests above would compare what never changes."""
    model = model_of()
    plan = Layerwise().plan(4, 4)
    states = after_each_phase(model, loader_of(), plan)
    for k in range(4):
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            name = f"backbone.blocks.{k}.1.{buffer}"
            assert states[k][name] != states[k + 1][name], name
            assert states[k + 1][name] == states[-1][name], name


def all_in_training_mode(trained: Trained) -> None:
    trained.model.train()


def test_forgetting_the_evaluation_mode_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trained, "set_modes", all_in_training_mode)
    model = model_of()
    plan = Layerwise().plan(4, 4)
    moved, _ = violations(model, plan, after_each_phase(model, loader_of(), plan))
    assert "exit 1: backbone.blocks.0.1.running_mean" in moved
    assert "exit 0: backbone.blocks.3.1.running_var" in moved


def test_training_what_should_be_frozen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def belongs(name: str, stages: dict[str, int], phase: Phase) -> bool:
        return name not in stages or stages[name] <= max(phase.stages)

    monkeypatch.setattr(freezing, "_belongs", belongs)
    model = model_of()
    plan = Layerwise().plan(4, 4)
    moved, _ = violations(model, plan, after_each_phase(model, loader_of(), plan))
    assert "exit 1: backbone.blocks.0.0.weight" in moved


def test_a_running_average_that_is_not_updated_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trained, "set_modes", lambda trained: trained.model.eval())
    model = model_of()
    plan = Layerwise().plan(4, 4)
    states = after_each_phase(model, loader_of(), plan)
    assert (
        states[0]["backbone.blocks.0.1.running_mean"]
        == states[-1]["backbone.blocks.0.1.running_mean"]
    )


def test_a_frozen_backbone_answers_as_before() -> None:
    model = model_of().eval()
    x = torch.randn(6, 6)
    with torch.no_grad():
        before = model(x)
    fit(model, loader_of(), scheme="heads", epochs=2, progress=False, accelerator="cpu")
    with torch.no_grad():
        after = model(x)
    assert torch.equal(before.final, after.final)
    assert not torch.equal(before[0], after[0])


def test_the_optimizer_of_a_phase_knows_nothing_of_the_ones_before() -> None:
    held: list[set[int]] = []

    def noted(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        held.append({id(p) for p in parameters})
        return torch.optim.AdamW(parameters, lr=0.01)

    model = model_of()
    fit(model, loader_of(), scheme="layerwise", epochs=4, optimizer=noted, progress=False)
    assert len(held) == 4
    assert sum(map(len, held)) == len(set().union(*held)) == len(list(model.parameters()))
