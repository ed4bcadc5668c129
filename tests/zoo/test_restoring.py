"""What a run of the zoo kept is a model for every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import offramp
from offramp.cli.app import main
from offramp.decide.trace import Trace
from offramp.errors import ArtifactError
from offramp.zoo.images import open_images
from offramp.zoo.restoring import restore
from offramp.zoo.running import EXAMPLE
from tests.zoo.test_images import write_mnist


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data, and the folder of a run."""
    data = tmp_path_factory.mktemp("mnist")
    write_mnist(data)
    words = ["zoo", "run", "b-lenet", "--data", str(data), "--out", str(data / "out"), "--json"]
    main_ends([*words, "--max-accuracy-drop", "1", "--epochs", "1"])
    return data, data / "out"


def main_ends(words: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == code


def test_the_model_is_made_again(made: tuple[Path, Path]) -> None:
    data, out = made
    images = open_images("mnist", data)
    model, example = restore(out)
    assert torch.equal(example, images.normalise(images.calibration[0][:EXAMPLE]))
    x, y = images.test
    trace = offramp.record(model, [(images.normalise(x), y)], progress=False)
    kept = Trace.load(out / "test.safetensors")
    assert trace.fingerprint == kept.fingerprint
    assert torch.equal(trace.logits, kept.logits)
    x, y = images.train
    assert offramp.record(model, [(images.normalise(x), y)], progress=False).source == "training"
    about = json.loads((out / "model.json").read_text("utf-8"))["preprocessing"]
    by_hand = (x.float() / 255 - about["mean"][0]) / about["std"][0]
    torch.testing.assert_close(images.normalise(x), by_hand)


def test_it_is_exported_and_judged_by_the_commands(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = made
    policy = str(out / "policy.json")
    main_ends(["export", str(out), policy, "--out", str(tmp_path / "net"), "--json"])
    assert json.loads(capsys.readouterr().out)["num_classes"] == 10
    main_ends(["evaluate", str(out / "test.safetensors"), policy, "--json", "--tolerance", "1"])
    judged = json.loads(capsys.readouterr().out)
    assert judged == json.loads((out / "report.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system": "b-lenett"}, r"Unknown system 'b-lenett'\. Did you mean 'b-lenet'"),
        ({"classes": 7}, "'b-lenet' no longer makes the network"),
        ({"classes": "ten"}, "expected a number of classes and an example, got 'ten'"),
        ({"system": "cifar-resnet"}, r"model\.json is damaged: it lacks \['network', 'places'\]"),
        (
            {"system": "cifar-resnet", "network": {"deep": 8}, "places": []},
            "is damaged: .* unexpected keyword argument 'deep'",
        ),
        ({"kind": "model"}, "describes a model that is none of the zoo"),
        ({"schema": 2}, "has schema 2; this offramp reads up to 1"),
    ],
)
def test_what_does_not_fit_is_named(
    made: tuple[Path, Path], tmp_path: Path, change: dict[str, object], words: str
) -> None:
    about = json.loads((made[1] / "model.json").read_text("utf-8"))
    (tmp_path / "model.json").write_text(json.dumps({**about, **change}), "utf-8")
    save_file(load_file(made[1] / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=words):
        restore(tmp_path)


def test_a_folder_of_before_is_completed_by_the_same_command(made: tuple[Path, Path]) -> None:
    data, out = made
    for name in ("model.json", "test.safetensors", "calibration.safetensors"):
        (out / name).unlink()
    with pytest.raises(ArtifactError, match="that lacks a part gets it by the same command"):
        restore(out)
    before = (out / "training.safetensors").stat().st_mtime_ns
    words = ["zoo", "run", "b-lenet", "--data", str(data), "--out", str(out), "--json"]
    main_ends([*words, "--max-accuracy-drop", "1", "--epochs", "1"])
    assert (out / "training.safetensors").stat().st_mtime_ns == before
    assert restore(out)[0].num_exits == 2
