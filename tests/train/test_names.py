from __future__ import annotations

import subprocess
import sys

import pytest

from offramp import train


def test_all_is_sorted_and_complete() -> None:
    constants = sorted(name for name in train.__all__ if name.isupper())
    classes = sorted(name for name in train.__all__ if name[0].isupper() and not name.isupper())
    functions = sorted(name for name in train.__all__ if name[0].islower())
    assert train.__all__ == constants + classes + functions
    assert set(train._HOMES) == set(train.__all__) == set(dir(train))


@pytest.mark.parametrize("name", train.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(getattr(train, name), "__name__", name) == name


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ExitModul'"):
        _ = train.ExitModul


def test_objectives_need_no_lightning_and_no_extra() -> None:
    code = "import sys, offramp.train as t; t.ExitLoss; t.HuggingFaceModule; print(*sys.modules)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"lightning", "transformers", "accelerate"} & set(done.stdout.split())
