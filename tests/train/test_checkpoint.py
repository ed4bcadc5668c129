"""The file alone; tests/train/test_resume.py has what it is for."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from offramp.errors import TrainingError
from offramp.train.checkpoint import (
    FILE_NAME,
    Checkpoint,
    Position,
    load_model_state,
    load_optimizer_state,
    optimizer_state,
    read_checkpoint,
    refuse_broken,
    write_checkpoint,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tied = torch.randn(3)
    tensors = {
        "model/a": tied,
        "model/b": tied,
        "model/step": torch.tensor(7),
        "meter/hits": torch.empty(0, dtype=torch.int64),
        "model/view": torch.randn(4, 3).T,
    }
    rows = [{"loss": 0.1 + 0.2, "accuracy": [1 / 3], "none": None}]
    made = Checkpoint({"seed": 3}, Position(1, 2, 3, 4), rows, tensors, {"groups": [{"lr": 0.1}]})
    folder = tmp_path / "deep" / "er"
    assert write_checkpoint(folder, made) == folder / FILE_NAME
    found = read_checkpoint(folder)
    assert found is not None
    assert (found.run, found.position, found.rows) == (made.run, made.position, made.rows)
    assert found.optimizer == made.optimizer
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())
    assert set(found.part("model")) == {"a", "b", "step", "view"}
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Not what another one may be writing just now."""
    left, young = (tmp_path / f".{FILE_NAME}.{number}.part" for number in (1, 2))
    for path in (left, young):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    write_checkpoint(tmp_path, Checkpoint({}, Position(), [], {"model/a": torch.ones(2)}))
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME, young.name}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None


def test_there_is_no_code_in_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint({}, Position(), [], {"model/a": torch.ones(2)}))
    data = (tmp_path / FILE_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert data[8 : 8 + length].strip().startswith(b"{")
    assert data[8 + length :] == torch.ones(2).numpy().tobytes()


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam]
)
def test_an_optimizer_goes_on_as_if_nothing_had_been(kind: type[torch.optim.SGD]) -> None:
    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.arange(3.0))
        return parameter, kind([parameter], lr=0.1)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = parameter.detach() * 0.3 + 1
        optimizer.step()

    first, optimizer = made()
    step(first, optimizer)
    tensors, plain = optimizer_state(optimizer, {id(first): "p"})
    second, fresh = made()
    second.data.copy_(first.data)
    load_optimizer_state(fresh, {id(second): "p"}, tensors, plain)
    for _ in range(3):
        step(first, optimizer)
        step(second, fresh)
    assert torch.equal(first, second)


def test_a_model_with_other_tensors_is_refused() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(
        TrainingError, match=r"1 tensors differ, the first is 'bias': absent in the"
    ):
        load_model_state(model, {"weight": torch.zeros(3, 2)})
    with pytest.raises(TrainingError, match=r"'weight': \(3, 4\) in the checkpoint, \(3, 2\) in"):
        load_model_state(model, {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)})


def test_only_parameters_must_be_finite() -> None:
    model = nn.Linear(2, 3)
    model.register_buffer("mask", torch.full((2,), -math.inf))
    refuse_broken(model)
    model.bias.data[1] = math.nan
    with pytest.raises(TrainingError, match="The parameter 'bias' is no longer finite"):
        refuse_broken(model)


class Mastered(torch.optim.Optimizer):
    """Keeps a float32 copy of a bfloat16 parameter, and counts."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("master", parameter.detach().float())
            state["count"] = state.get("count", torch.zeros((), dtype=torch.int64)) + 1
            state["master"] = state["master"] - 0.001 * state["count"]
            parameter.data.copy_(state["master"])


def test_what_an_optimizer_keeps_has_its_own_type() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Mastered([parameter])
    optimizer.step()
    tensors, plain = optimizer_state(optimizer, {id(parameter): "p"})
    again = nn.Parameter(parameter.detach().clone())
    other = Mastered([again])
    load_optimizer_state(other, {id(again): "p"}, tensors, plain)
    for key, value in optimizer.state[parameter].items():
        found = other.state[again][key]
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
        assert found.data_ptr() != value.data_ptr()
