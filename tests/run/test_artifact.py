from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from offramp.decide.policy import Policy
from offramp.errors import ArtifactError, EqualityError, OfframpError
from offramp.run import artifact
from offramp.run.artifact import MANIFEST, MODEL, POLICY, export, load, verify
from offramp.run.runner import Runner
from tests.networks import example_of
from tests.run.conftest import case


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = case("encoder")
    path = tmp_path_factory.mktemp("artifact") / "encoder.offramp"
    names = ["bad", "fair", "good"]
    return export(one.model, Policy("patience", [0.0, 1.0]), one.example, path, classes=names)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy.offramp"))


@pytest.mark.parametrize("thresholds", [None, [0.0, 0.0], [9.0, 1.0], [9.0, 9.0]])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_plain_onnxruntime_answers_as_the_runner(
    made: Path, size: int, thresholds: list[float] | None
) -> None:
    one, x = case("encoder"), example_of("encoder", size, seed=8)
    session = onnxruntime.InferenceSession(made / MODEL)
    feed = {name: value.numpy() for name, value in x.items()}
    if thresholds is not None:
        feed["thresholds"] = np.array(thresholds, np.float32)
    logits, prediction, exit, score = session.run(None, feed)
    wanted = Runner(one.model, Policy("patience", thresholds or [0.0, 1.0]), one.example)(x)
    assert exit.tolist() == wanted.exit.tolist()
    assert prediction.tolist() == wanted.prediction.tolist()
    assert np.allclose(logits, wanted.logits, atol=1e-4)
    assert np.allclose(score, wanted.score)


def test_a_loaded_runner_answers_as_the_file(made: Path) -> None:
    x = example_of("encoder", 16, seed=3)
    runner = load(made)
    session = onnxruntime.InferenceSession(made / MODEL)
    logits, _, exit, _ = session.run(None, {name: value.numpy() for name, value in x.items()})
    result = runner(**x)
    assert result.exit.tolist() == exit.tolist()
    assert np.allclose(result.logits, logits, atol=1e-5)
    for got, wanted in zip(runner.all_exits(**x), case("encoder").model(**x), strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)


def test_the_manifest_tells_what_a_client_needs(made: Path) -> None:
    manifest = verify(made)
    assert manifest["classes"] == ["bad", "fair", "good"]
    assert [entry["name"] for entry in manifest["inputs"]] == ["attention_mask", "input_ids"]
    assert manifest["proof"]["rows"] >= 1000
    assert manifest["proof"]["batches"] == [1, 7, 32]
    assert Policy.load(made / POLICY).thresholds == (0.0, 1.0)


@pytest.mark.parametrize("part", [MODEL, POLICY, MANIFEST])
def test_one_flipped_byte_is_refused_by_name(copy: Path, part: str) -> None:
    raw = bytearray((copy / part).read_bytes())
    for at in np.linspace(0, len(raw) - 1, 7).astype(int):
        raw[at] ^= 1
        (copy / part).write_bytes(raw)
        with pytest.raises(ArtifactError, match=part):
            load(copy)
        raw[at] ^= 1
    (copy / part).write_bytes(raw)
    load(copy)


@pytest.mark.parametrize("part", [MODEL, POLICY, MANIFEST])
def test_a_cut_off_or_missing_part_is_refused_by_name(copy: Path, part: str) -> None:
    raw = (copy / part).read_bytes()
    (copy / part).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ArtifactError, match=part):
        load(copy)
    (copy / part).unlink()
    with pytest.raises(ArtifactError, match=part):
        load(copy)


def test_a_later_schema_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_bytes(artifact._sealed({**manifest, "schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99.*Update offramp"):
        load(copy)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact of offramp"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="is no artifact of offramp. Choose another path"):
        export(case("mlp").model, Policy.final(), case("mlp").example, tmp_path)


def test_damaged_files_always_give_the_own_error(copy: Path) -> None:
    rng = np.random.default_rng(0)
    manifest = (copy / MANIFEST).read_bytes()
    for _ in range(1000):
        raw = bytearray(manifest)
        for _ in range(int(rng.integers(1, 20))):
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
        (copy / MANIFEST).write_bytes(raw[: int(rng.integers(1, len(raw) + 1))])
        if bytes(raw) == manifest:
            continue
        with pytest.raises(OfframpError):
            artifact._manifest(copy)


def test_a_file_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = case("mlp")
    connect = artifact.connect

    def broken(*args: object) -> object:
        model = connect(*args)
        for node in model.graph.node:
            if node.op_type == "GreaterOrEqual":
                node.op_type = "Less"
        return model

    monkeypatch.setattr(artifact, "connect", broken)
    with pytest.raises(EqualityError, match="Nothing was written"):
        export(one.model, Policy("confidence", [0.5, 0.5]), one.example, tmp_path / "a.offramp")
    assert list(tmp_path.iterdir()) == []


def test_exits_that_are_off_leave_no_trace_in_the_file(tmp_path: Path) -> None:
    one = case("mlp")
    path = export(one.model, Policy.final(), one.example, tmp_path / "a.offramp")
    session = onnxruntime.InferenceSession(path / MODEL)
    assert [value.name for value in session.get_inputs()] == ["0"]
    assert b"heads" not in (path / MODEL).read_bytes()
    result = load(path)(one.example)
    with torch.no_grad():
        assert torch.allclose(result.logits, one.backbone(one.example), atol=1e-5)
