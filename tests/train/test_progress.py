from __future__ import annotations

import pytest
import torch

from offramp.train import progress
from offramp.train.history import EpochRow
from offramp.train.progress import ProgressLine


def row() -> EpochRow:
    return EpochRow("joint", 2, 0.1, (0.5, 0.4), (0.5, 0.125), (1.0, 1.0), (0.251, 0.75))


def test_the_line_tells_phase_loss_and_accuracy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    with ProgressLine(True, epochs=4, done=1) as line:
        line.epoch(row())
        line.step("joint", 2, 0.5, torch.tensor(0.1234))
    out, err = capsys.readouterr()
    assert out == ""
    assert "62 %" in err
    assert "epoch 3/4, joint, loss 0.123, validation accuracy 25.1 75.0 %" in err


def test_the_name_of_a_phase_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(True, epochs=4) as line:
        line.step("[/heads]", 0, 0.5, torch.tensor(1.0))
    assert "[/heads]" in capsys.readouterr().err


def test_a_loss_is_read_only_when_the_line_is_drawn() -> None:
    class Unread(torch.Tensor):
        def __float__(self) -> float:
            raise AssertionError("waited for the device")

    loss = torch.zeros(()).as_subclass(Unread)
    with ProgressLine(False, epochs=1) as line:
        line.step("joint", 0, 0.5, loss)
    with ProgressLine(True, epochs=1) as line:
        line.step("joint", 0, 0.1, torch.tensor(1.0))
        line.step("joint", 0, 0.2, loss)


def test_nothing_is_drawn_when_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine(False, epochs=4) as line:
        line.step("joint", 0, 0.5, torch.tensor(1.0))
        line.epoch(row())
    assert capsys.readouterr() == ("", "")
