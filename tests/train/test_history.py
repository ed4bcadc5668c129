from __future__ import annotations

import json

from offramp.train.history import EpochRow, History
from offramp.train.schemes import Layerwise


def row(epoch: int, judged: bool = False) -> EpochRow:
    val = {"val_loss": (1.0, 2.0), "val_accuracy": (0.25, 0.75)} if judged else {}
    return EpochRow("exit 0", epoch, 0.1, (0.5, None), (0.5, 0.125), seconds=1.25, **val)


def test_rows_survive_json() -> None:
    for judged in (False, True):
        made = row(3, judged)
        assert EpochRow.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_time_is_not_part_of_what_happened() -> None:
    fast, slow = row(1), EpochRow.from_dict(row(1).to_dict() | {"seconds": 9.0})
    assert fast == slow


def test_the_table_shows_what_there_is() -> None:
    history = History(Layerwise().plan(2, 2), [row(1), row(2)])
    lines = str(history).splitlines()
    assert lines[0] == "Layerwise: each exit with its layers, then frozen; training accuracy"
    assert lines[1].split() == ["epoch", "phase", "loss", "exit", "0", "backbone", "seconds"]
    assert lines[2].split() == ["1", "exit", "0", "0.5000", "50.00", "%", "12.50", "%", "1.2"]
    judged = str(History(history.plan, [row(1, judged=True)])).splitlines()
    assert judged[0].endswith("validation accuracy")
    assert "75.00 %" in judged[2]


def test_it_is_a_sequence() -> None:
    history = History(Layerwise().plan(2, 2), [row(1), row(2)])
    assert len(history) == 2
    assert history[-1].epoch == 2
    assert history[:1] == [row(1)]
    assert [each.epoch for each in history] == [1, 2]
    assert json.loads(json.dumps(history.to_dict()))["epochs"][1]["epoch"] == 2
