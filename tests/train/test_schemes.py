from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import DataError
from offramp.train.loop import fit
from offramp.train.objectives import Boosting, CrossEntropy, Distill, Matched, Objective
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
from tests.train.tiny import loader_of, plain_model_of


def test_joint_is_one_phase_over_everything() -> None:
    (phase,) = Joint(weights="linear").plan(4, 7)
    assert phase.stages == phase.exits == (0, 1, 2, 3)
    assert phase.heads == (0, 1, 2)
    assert (phase.epochs, phase.weights) == (7, "linear")


def test_layerwise_trains_each_part_once_and_ends_with_the_backbone() -> None:
    plan = Layerwise().plan(4, 8)
    assert [phase.stages for phase in plan] == [(0,), (1,), (2,), (3,)]
    assert [phase.heads for phase in plan] == [(0,), (1,), (2,), ()]
    assert [phase.exits for phase in plan] == [(0,), (1,), (2,), (3,)]
    assert [phase.epochs for phase in plan] == [2, 2, 2, 2]


def test_heads_leave_the_backbone() -> None:
    (phase,) = Heads().plan(3, 2)
    assert (phase.stages, phase.heads, phase.exits) == ((), (0, 1), (0, 1))


def test_backbone_comes_first_in_mixed_and_separate() -> None:
    mixed = Mixed(shares=(0.75, 0.25)).plan(3, 8)
    assert [(p.name, p.epochs) for p in mixed] == [("backbone", 6), ("joint", 2)]
    separate = Separate().plan(3, 10)
    assert [(p.name, p.epochs) for p in separate] == [("backbone", 6), ("heads", 2), ("tuning", 2)]
    assert separate[2].lr_scale == 0.1
    assert separate[0].exits == (2,)
    assert separate[1].stages == ()


def test_alternating_takes_turns() -> None:
    (phase,) = Alternating().plan(3, 1)
    assert [phase.supervised(step) for step in range(3)] == [(2,), (0, 1, 2), (2,)]


def test_a_single_exit_is_plain_training() -> None:
    for name in ("joint", "layerwise", "mixed", "alternating"):
        plan = as_plan(name, 1, 4)
        assert {phase.exits for phase in plan} == {(0,)}


@given(name=st.sampled_from(sorted(SCHEMES)), exits=st.integers(2, 9), epochs=st.integers(1, 60))
def test_all_epochs_are_spent_and_every_part_is_trained(name: str, exits: int, epochs: int) -> None:
    scheme = SCHEMES[name]()
    count = len(scheme.phases(exits))
    if epochs < count:
        with pytest.raises(DataError, match=f"has {count} phases and needs at least one epoch"):
            scheme.plan(exits, epochs)
        return
    plan = as_plan(scheme, exits, epochs)
    assert plan.epochs == epochs
    assert all(phase.epochs >= 1 for phase in plan)
    assert {k for phase in plan for k in phase.heads} == set(range(exits - 1))
    if name != "heads":
        assert {k for phase in plan for k in phase.stages} == set(range(exits))


def test_a_scheme_is_composed_and_prints_as_it_is_written() -> None:
    plan = Mixed(Distill(CrossEntropy(0.1), temperature=4.0), weights="linear").plan(4, 20)
    text = str(plan)
    assert text.splitlines()[0] == "Mixed: backbone, then all exits jointly (4 exits)"
    assert "Distill(objective=CrossEntropy(label_smoothing=0.1), temperature=4.0)" in text
    assert "weights linear" in text
    assert "backbone, heads 0-2" in text
    assert "0-3" in text


def test_every_plan_prints_its_phases() -> None:
    lines = str(Layerwise().plan(3, 3)).splitlines()
    assert lines[1].split() == ["phase", "epochs", "trains", "exits", "objective"]
    assert lines[2].split() == [
        "exit",
        "0",
        "1",
        "stages",
        "0,",
        "heads",
        "0",
        "0",
        "CrossEntropy()",
    ]
    assert lines[4].split()[:4] == ["backbone", "1", "stages", "2"]

    def rising(epoch: int) -> list[float]:
        return [epoch, 1.0]

    text = str(Joint(weights=rising, equilibrium=True).plan(2, 1))
    assert "weights rising(), gradient equilibrium" in text
    assert " 1 | 0,1 " in str(Alternating().plan(2, 1))
    assert "lr x 0.1" in str(Separate().plan(2, 3))


def test_phases_can_be_given() -> None:
    phases = [Phase("mine", (0,), (0,), (0,), epochs=3)]
    plan = as_plan(phases, 2, epochs=99)
    assert plan.epochs == 3
    assert plan[0] is phases[0]
    assert plan[:1] == (phases[0],)
    assert len(plan) == 1


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        ("layer-wise", "Unknown scheme 'layer-wise'. Did you mean 'layerwise'"),
        ([], "The scheme has no phase"),
        ([Phase("p", (5,), (), (0,))], r"'p' names stages \[5\], but the model has 3 stages"),
        ([Phase("p", (0,), (2,), (0,))], r"'p' names heads \[2\], but the model has 2 heads"),
        ([Phase("p", (0,), (), (3,))], r"'p' names exits \[3\], but the model has 3 exits"),
        ([Phase("p", (), (), (0,))], "'p' trains nothing"),
        ([Phase("p", (0,), (), (0,), epochs=0)], "'p' has 0 epochs"),
        (Mixed(shares=(0.0, 1.0)), "Shares of epochs must be above 0"),
        (Mixed(shares=(1, 1, 1)), r"Mixed has 2 phases, but shares=\(1, 1, 1\) has 3"),  # type: ignore[arg-type]
        (Joint, r"scheme is the class Joint. Pass a scheme, made by Joint\(\)"),
        (Phase("p", (0,), (), (0,)), "scheme is the phase 'p' alone. Pass a list of it"),
        ([Joint(), Layerwise()], "scheme holds a Joint. Expected phases alone"),
        (3, "scheme is of type 'int'. Expected a name, one of alternating, heads"),
        ([Phase("p", (2,), (), (0,))], r"'p' trains nothing that exits \[0\] learn by"),
        ([Phase("p", (), (1,), (0, 1), turns=((1,), (0,)))], r"nothing that exits \[0\] learn by"),
        ([Phase("p", (0,), (), (0,), epochs=1.5)], "'p' has 1.5 epochs. Expected a whole"),  # type: ignore[arg-type]
        (
            Joint(weights=1.0),
            r"Got weights 1.0. Expected one number per exit, such as \[0.5, 1.0\]",
        ),  # type: ignore[arg-type]
        (Joint(weights=np.array(1.0)), "Expected one number per exit"),  # type: ignore[arg-type]
    ],
)
def test_wrong_schemes(scheme: object, text: str) -> None:
    with pytest.raises(DataError, match=text):
        as_plan(scheme, 3, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["joint", "mixed"])
def test_epochs_are_whole(scheme: str) -> None:
    with pytest.raises(DataError, match=r"epochs=2.5: expected a whole number of passes"):
        as_plan(scheme, 3, 2.5)  # type: ignore[arg-type]


def test_wrong_phases() -> None:
    with pytest.raises(DataError, match="'p' supervises no exit"):
        Phase("p", (0,), (), ())
    with pytest.raises(DataError, match=r"'p' takes turns with exits \[1\]"):
        Phase("p", (0,), (), (0,), turns=((0,), (1,)))
    with pytest.raises(DataError, match="Unknown weights 'unifrom'"):
        Phase("p", (0,), (), (0,), weights="unifrom")
    with pytest.raises(DataError, match="has no heads to train"):
        as_plan("heads", 1, 1)


def test_an_exit_is_named_once() -> None:
    with pytest.raises(DataError, match=r"'p' names an exit twice: \[1, 1\]"):
        Phase("p", (0,), (0,), (1, 1))
    with pytest.raises(DataError, match=r"'p' names an exit twice: \[0, 0\]"):
        Phase("p", (0,), (0,), (0, 1), turns=((1,), (0, 0)))
    with pytest.raises(DataError, match=r"'p' names a stage twice: \[0, 0, 1\]"):
        Phase("p", (0, 0, 1), (0,), (1,))
    with pytest.raises(DataError, match=r"'p' names a head twice: \[0, 0\]"):
        Phase("p", (0,), (0, 0), (1,))


def test_lists_and_arrays_are_as_good_as_tuples() -> None:
    given: Any = ([0, 1], np.array([0]), [0, 1])
    phase = Phase("p", *given, turns=[[1], [0, 1]])  # type: ignore[arg-type]
    assert phase == Phase("p", (0, 1), (0,), (0, 1), turns=((1,), (0, 1)))
    assert hash((phase.stages, phase.heads, phase.exits, phase.turns))
    model = plain_model_of(["1"])
    fit(model, loader_of(), scheme=[phase], progress=False, accelerator="cpu")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"stages": 0}, r"has 0 in stages=. Expected indices .*, such as stages=\(0, 1\)"),
        ({"exits": ["0"]}, r"has \['0'\] in exits="),
        ({"turns": (1, (0, 1))}, r"has 1 in turns=. .* such as turns=\(\(2,\), \(0, 1, 2\)\)"),
        ({"turns": 1}, "has 1 in turns="),
    ],
)
def test_what_names_no_indices(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=f"Phase 'p' {text}"):
        Phase(**({"name": "p", "stages": (0,), "heads": (0,), "exits": (0, 1)} | settings))


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_what_is_no_objective(scheme: str) -> None:
    make: Any = SCHEMES[scheme]
    with pytest.raises(DataError, match=f"{make.__name__} got 'distill' as its objective"):
        make("distill")
    with pytest.raises(DataError, match=f"{make.__name__} got the class Distill as its objective"):
        make(Distill)
    with pytest.raises(DataError, match="Phase 'p' got 'distill' as its objective"):
        Phase("p", (0,), (), (0,), objective="distill")  # type: ignore[arg-type]


def test_an_objective_of_ones_own_prints_what_it_was_given() -> None:
    @dataclass(frozen=True)
    class Focal:
        gamma: float
        floor: float = 0.5

        def __call__(self, outputs: Any, labels: Any, exits: Any = None) -> Any:
            raise NotImplementedError

    assert "Focal(gamma=2.0)" in str(Joint(Focal(2.0)).plan(2, 1))

    @dataclass(frozen=True)
    class Balanced(Focal):
        costs: Any = None

    arrays = [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])]
    texts = [str(Joint(Balanced(2.0, costs=costs)).plan(2, 1)) for costs in arrays]
    assert "Balanced(gamma=2.0, costs=array([1., 2.]))" in texts[0]
    assert "Balanced(gamma=2.0, costs=tensor([1., 2.]))" in texts[1]
    weights: Any = np.linspace(0.5, 1, 2)
    assert "weights array([0.5, 1. ])" in str(Joint(weights=weights).plan(2, 1))


@pytest.mark.parametrize("scheme", [Mixed, Separate])
def test_the_backbone_alone_learns_from_no_untrained_head(scheme: type[Scheme]) -> None:
    own = CrossEntropy(label_smoothing=0.1)
    for around in (Distill(own, teacher="ensemble"), Boosting(own), Matched(Distill(own))):
        phases = scheme(around).phases(4)
        assert phases[0].objective == own
        assert all(phase.objective == around for phase in phases[1:])


def test_layer_by_layer_no_exit_learns_from_later_ones() -> None:
    phases = Layerwise(Distill(teacher="ensemble")).phases(4)
    outputs = list(torch.randn(4, 6, 3))
    labels = torch.randint(3, (6,))
    terms = phases[1].objective(outputs, labels, (1,))
    outputs[2:] = torch.randn(2, 6, 3)
    assert torch.equal(terms, phases[1].objective(outputs, labels, (1,)))
    outputs[0] = torch.randn(6, 3)
    assert not torch.equal(terms, phases[1].objective(outputs, labels, (1,)))
    assert Layerwise().phases(4)[1].objective == CrossEntropy()


@pytest.mark.parametrize("objective", [Distill(), Matched(Distill()), Boosting(Distill())], ids=str)
def test_layer_by_layer_the_last_exit_cannot_teach(objective: Objective) -> None:
    with pytest.raises(DataError, match=r"no later exit can teach it. .*teacher='ensemble'"):
        Layerwise(objective)
