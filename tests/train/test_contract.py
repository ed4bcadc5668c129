"""What every scheme keeps, each by itself and composed: one table, one set of promises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import offramp
from offramp.train.history import History
from offramp.train.loop import fit
from offramp.train.objectives import Boosting, CrossEntropy, Distill, Matched
from offramp.train.phases import Phase
from offramp.train.schemes import (
    SCHEMES,
    Alternating,
    Heads,
    Joint,
    Layerwise,
    Mixed,
    Scheme,
    Separate,
    as_plan,
)
from tests.train.test_freezing_bytes import Optimizers, after_each_phase, violations
from tests.train.tiny import Breaking, data_of, digests, loader_of, model_of

COMPOSED: dict[str, Scheme] = {
    "alternating, distilled": Alternating(Distill(), equilibrium=True),
    "heads, distilled": Heads(Distill(temperature=2.0)),
    "joint, boosted": Joint(Boosting()),
    "joint, in equilibrium": Joint(weights="inverse", equilibrium=True),
    "joint, learned weights": Joint(weights="learned"),
    "joint, matched and distilled": Joint(Matched(Distill(CrossEntropy(0.1))), weights="cost"),
    "joint, rising weights": Joint(weights=lambda epoch: [0.1 * (epoch + 1)] * 3 + [1.0]),
    "layerwise, matched": Layerwise(Matched()),
    "mixed, distilled": Mixed(Distill(temperature=4.0), weights="linear"),
    "separate, by an ensemble": Separate(Distill(teacher="ensemble"), weights="growing"),
}
CASES: dict[str, Scheme] = {name: SCHEMES[name]() for name in SCHEMES} | COMPOSED

every_scheme = pytest.mark.parametrize("scheme", CASES.values(), ids=list(CASES))


class Stop(Exception):
    pass


def train(model: Any, loader: Any, **settings: Any) -> History:
    options = {"progress": False, "accelerator": "cpu", "seed": 3} | settings
    return fit(model, loader, **options)


def answers(model: Any, scheme: Scheme, x: torch.Tensor) -> list[torch.Tensor]:
    """The classes of each exit, read as they were trained: boosted exits answer by their sum."""
    with torch.no_grad():
        logits = torch.stack(list(model.eval()(x)))
    if isinstance(scheme.objective, Boosting):
        logits = logits.cumsum(0)
    return list(logits.argmax(-1))


def test_every_scheme_of_the_library_is_in_the_table() -> None:
    assert set(SCHEMES) < set(CASES)
    assert {type(scheme) for scheme in COMPOSED.values()} == set(SCHEMES.values())


@every_scheme
def test_it_trains(scheme: Scheme) -> None:
    model = model_of(dropout=0.0)
    if isinstance(scheme, Heads):  # on a backbone that has learned something
        first = [Phase("backbone", (0, 1, 2, 3), (), (3,), epochs=12)]
        train(model, loader_of(256, 32), scheme=first, lr=0.02)
    x, y = data_of(64, seed=1)
    history = train(model, loader_of(256, 32), scheme=scheme, epochs=24, lr=0.02)
    assert len(history) == 24
    for k in {k for phase in history.plan for k in phase.exits}:
        accuracy = (answers(model, scheme, x)[k] == y).float().mean()
        assert accuracy > 0.7, k


@every_scheme
def test_it_resumes_to_the_same_bytes(scheme: Scheme, tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return loader_of()

    settings: dict[str, Any] = {"scheme": scheme, "epochs": 4}
    whole = model_of()
    expected = train(whole, loader(), **settings)
    for batches in (3, 9):  # in the midst of the first epoch, and of a later one
        with pytest.raises(Stop):
            train(
                model_of(),
                Breaking(loader(), batches, Stop()),
                checkpoint=tmp_path,
                checkpoint_every=2,
                **settings,
            )
    model = model_of()
    history = train(model, loader(), checkpoint=tmp_path, checkpoint_every=2, **settings)
    assert digests(model) == digests(whole)
    assert history.rows == expected.rows
    assert torch.equal(model.training_fingerprints, whole.training_fingerprints)


@every_scheme
def test_it_freezes_what_it_says(scheme: Scheme) -> None:
    model = model_of()
    plan = as_plan(scheme, 4, 4)
    states = after_each_phase(model, loader_of(), plan, optimizer=Optimizers["adamw"])
    moved, still = violations(model, plan, states)
    assert moved == set()
    assert still == set()


@every_scheme
def test_it_prints_its_phases(scheme: Scheme) -> None:
    plan = as_plan(scheme, 4, 4)
    assert len(str(plan).splitlines()) == 2 + len(plan)
    assert str(as_plan(copy.deepcopy(scheme), 4, 4)) == str(plan)


@pytest.mark.parametrize("name", ["layerwise", "mixed, distilled"])
def test_it_exports(name: str, tmp_path: Path) -> None:
    check_export(CASES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - {"layerwise", "mixed, distilled"}))
def test_every_other_one_exports(name: str, tmp_path: Path) -> None:
    check_export(CASES[name], tmp_path)


def check_export(scheme: Scheme, folder: Path) -> None:
    """The file answers as the model does, sample by sample."""
    model = model_of()
    train(model, loader_of(), scheme=scheme, epochs=4)
    x, y = data_of(30, seed=2)
    trace = offramp.record(model, [(x, y)])
    policy = offramp.Policy("confidence", [0.5, 0.5, 0.5])
    offramp.export(model, policy, x[:4], folder / "net.offramp")
    result = offramp.load(folder / "net.offramp")(x)
    exits = torch.as_tensor(result.exit)
    logits = torch.as_tensor(result.logits)
    expected = trace.logits[exits, torch.arange(len(x))]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
