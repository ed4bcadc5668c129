"""The cost profile on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from offramp.build.batch import as_call
from offramp.build.cost import profile
from offramp.build.tree import amount, cost_tree
from offramp.errors import PlaceError
from tests.networks import example_of, make


def lines_of(kind, exits=3, measure="macs", depth=None):
    found = profile(make(kind), *as_call(example_of(kind)), measure)
    console = Console(width=120, file=io.StringIO())
    console.print(cost_tree(found, exits, depth))
    return console.file.getvalue().splitlines()


def test_amounts():
    assert [amount(v) for v in (0, 12, 1500, 41_200_000, 1.82e9, 3e12)] == [
        "0 ",
        "12 ",
        "1.5 k",
        "41.2 M",
        "1.82 G",
        "3 T",
    ]


def test_places_candidates_and_percentiles_are_marked():
    lines = lines_of("cnn")
    assert lines[0] == "ResidualCNN  1.69 MMACs per sample, 5 classes"
    text = "\n".join(lines)
    assert text.count("●") == 3
    assert text.count("○") == 3
    assert [line.split("◂")[1].strip() for line in lines if "◂" in line] == ["25%", "50%", "75%"]
    first = next(line for line in lines if "25%" in line)
    assert "1  ResidualBlock  295 kMACs  ends at 38.1%  B×8×16×16" in first


def test_other_exits_and_measures():
    lines = lines_of("cnn", ["layer1.0.conv1"])
    assert [line for line in lines if "●" in line][0].endswith(
        "● conv1  Conv2d  147 kMACs  ends at 12.0%  B×8×16×16"
    )
    assert " kparameters per sample, 1.69 MMACs" in lines_of("cnn", measure="params")[0]
    assert " ms per sample, 1.69 MMACs" in lines_of("cnn", measure="latency")[0]
    assert "10%" in "\n".join(lines_of("mlp", [0.1, 0.9]))


def test_depth():
    assert len(lines_of("cnn", depth=1)) == 6
    assert any("conv2" in line for line in lines_of("cnn", depth=3))


def test_places_that_do_not_resolve():
    with pytest.raises(PlaceError, match="no module 'layer9'"):
        lines_of("cnn", ["layer9"])
