"""Fifteen architectures, one of each kind, through the whole path (see benchmarks/coverage.py)."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.architectures import ARCHITECTURES
from benchmarks.passage import take_through

# name -> whether its ONNX file is compared here, too, or among the slow tests
SAMPLE = {
    "test_byobnet": True,  # cnn
    "inception_next_atto": False,
    "dla34": False,  # branches
    "torchvision_swin": False,  # windowed
    "mobilevit_xxs": False,  # hybrid
    "mixer_s32_224": False,  # mixer
    "hf_bert": True,
    "hf_vit": False,
    "hf_wav2vec2": False,
    "hf_videomae": False,
    "hf_llama": False,
    "dense_gcn": False,
    "lstm": True,
    "mlp": True,
    "tabular_transformer": False,
}
NEEDS = {"transformers": "transformers", "torch_geometric": "torch_geometric", "timm": "timm",
         "torchvision": "torchvision"}  # fmt: skip


def passes(name: str, *, onnx: bool) -> None:
    one = ARCHITECTURES[name]
    if one.source in NEEDS and importlib.util.find_spec(NEEDS[one.source]) is None:
        pytest.skip(f"{one.source} is not installed")
    row = take_through(one, onnx=onnx)
    assert row.reason == ""
    assert row.placed
    assert row.staged
    assert row.equal
    assert row.per_sample
    assert len(set(row.exits)) == 4  # exits were mixed: all of them were taken
    assert row.onnx == onnx


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_of_each_kind(name: str) -> None:
    passes(name, onnx=SAMPLE[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, quick in SAMPLE.items() if not quick])
def test_the_file_of_an_architecture_of_each_kind(name: str) -> None:
    passes(name, onnx=True)


def test_the_list_is_long_enough() -> None:
    sources = [one.source for one in ARCHITECTURES.values()]
    assert len(sources) >= 115
    assert sources.count("timm") >= 70
