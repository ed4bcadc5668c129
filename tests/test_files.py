"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offramp.files import replaced


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.txt"
    for content in ("one", "two"):
        with replaced(path) as part:
            part.write_text(content, "utf-8")
            assert not path.exists() or path.read_text("utf-8") == "one"
        assert path.read_text("utf-8") == content
    assert [left.name for left in path.parent.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("begun", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path: Path, begun: bool) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("before", "utf-8")

    def write() -> None:
        with replaced(path) as part:
            if begun:
                part.write_text("half", "utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    with pytest.raises(FileNotFoundError), replaced(path):
        pass  # nothing was written
    assert path.read_text("utf-8") == "before"
    assert [left.name for left in tmp_path.iterdir()] == ["kept.txt"]


def test_names_may_be_as_long_as_they_may(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 255)
    with replaced(path) as part:
        part.write_text("one", "utf-8")
    assert path.read_text("utf-8") == "one"


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    with replaced(path) as one:
        one.write_text("one", "utf-8")
        with replaced(path) as two:
            two.write_text("two", "utf-8")
        assert path.read_text("utf-8") == "two"
    assert path.read_text("utf-8") == "one"


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_whoever_may_read_new_files_may_read_it(tmp_path: Path, mask: int) -> None:
    """Also where what writes it would keep it to its owner."""
    before = os.umask(mask)
    try:
        with replaced(tmp_path / "tensors") as part:
            assert not part.exists()
            save_file({"x": torch.zeros(2)}, part)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "tensors").stat().st_mode) == 0o666 & ~mask
