"""Artifacts that were cut off, edited or mixed up: always refused, and the part is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.decide.policy import Policy
from offramp.errors import ArtifactError, OfframpError
from offramp.run import artifact
from offramp.run.artifact import MANIFEST, MODEL, POLICY, TRAINING, export, load, verify
from tests.run.conftest import case

PARTS = (MODEL, POLICY, MANIFEST, TRAINING, "stages/0.onnx", "stages/1.onnx", "stages/2.onnx")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = case("mlp")
    model = copy_of(one.model)
    model.training_fingerprints = torch.arange(9)
    path = tmp_path_factory.mktemp("artifact") / "mlp.offramp"
    return export(model, Policy("patience", [0.0, 1.0]), one.example, path, stages=True)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy.offramp"))


@pytest.mark.parametrize("part", PARTS)
def test_one_flipped_byte_is_refused_by_name(copy: Path, part: str) -> None:
    raw = bytearray((copy / part).read_bytes())
    for at in np.linspace(0, len(raw) - 1, 7).astype(int):
        raw[at] ^= 1
        (copy / part).write_bytes(raw)
        for check in (load, verify):
            with pytest.raises(ArtifactError, match=part):
                check(copy)
        raw[at] ^= 1
    (copy / part).write_bytes(raw)
    load(copy)


@pytest.mark.parametrize("part", PARTS)
def test_a_cut_off_or_missing_part_is_refused_by_name(copy: Path, part: str) -> None:
    raw = (copy / part).read_bytes()
    for size in (0, 1, len(raw) // 2, len(raw) - 1):
        (copy / part).write_bytes(raw[:size])
        with pytest.raises(ArtifactError, match=part):
            load(copy)
    (copy / part).unlink()
    with pytest.raises(ArtifactError, match=part):
        load(copy)
    (copy / part).mkdir()
    with pytest.raises(ArtifactError, match=part):
        load(copy)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_artifact_is_refused_by_name(
    copy: Path, part: str, tmp_path: Path
) -> None:
    one = case("mlp")
    other = export(one.model, Policy("patience", [0.0, 2.0]), one.example, tmp_path / "other")
    if part in (POLICY, MODEL):
        shutil.copy(other / part, copy / part)
        with pytest.raises(ArtifactError, match=part):
            load(copy)
    elif part == MANIFEST:  # it is sound by itself, but its sums are not those of these parts
        shutil.copy(other / part, copy / part)
        with pytest.raises(ArtifactError, match=MODEL):
            load(copy)
    else:
        shutil.copy(copy / MODEL, copy / part)
        with pytest.raises(ArtifactError, match=part):
            load(copy)


@pytest.mark.parametrize("schema", [99, "2", None, 1.5])
def test_another_schema_is_refused(copy: Path, schema: object) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_bytes(artifact._sealed({**manifest, "schema": schema}))
    with pytest.raises(ArtifactError, match=f"schema {schema!r}.*reads up to 1. Update offramp"):
        load(copy)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="no artifact of offramp"):
            load(folder)
    (tmp_path / MANIFEST).write_text('{"name": "somebody else\'s"}')
    with pytest.raises(ArtifactError, match="is not the manifest of an offramp artifact"):
        load(tmp_path)
    file = tmp_path / "file.onnx"
    file.write_bytes(b"onnx")
    with pytest.raises(ArtifactError, match="no artifact of offramp"):
        load(file)
    one = case("mlp")
    with pytest.raises(ArtifactError, match="is no artifact of offramp. Choose another path"):
        export(one.model, Policy.final(), one.example, file)
    assert file.read_bytes() == b"onnx"


def test_an_engine_that_executes_no_onnx_is_refused(made: Path) -> None:
    with pytest.raises(ArtifactError, match="'torch' does not execute. Use 'onnxruntime' or"):
        load(made, "torch")


# -- fuzzing ---------------------------------------------------------------------------------------


def _flip(raw: bytearray, rng: np.random.Generator) -> None:
    raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))


def _scatter(raw: bytearray, rng: np.random.Generator) -> None:
    for at in rng.integers(len(raw), size=int(rng.integers(2, 40))):
        raw[int(at)] = int(rng.integers(256))


def _cut(raw: bytearray, rng: np.random.Generator) -> None:
    del raw[int(rng.integers(len(raw))) :]


def _lose(raw: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(raw)))
    del raw[start : start + int(rng.integers(1, 100))]


def _repeat(raw: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(raw)))
    raw[start:start] = raw[start : start + int(rng.integers(1, 100))] or b"x"


def _blank(raw: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(raw)))
    raw[start : start + 64] = b"\0" * len(raw[start : start + 64])


def _nest(raw: bytearray, rng: np.random.Generator) -> None:
    raw[:] = b"[" * int(rng.integers(1, 100_000))


DAMAGE: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    _flip, _scatter, _cut, _lose, _repeat, _blank, _nest,
)  # fmt: skip


def test_a_thousand_damaged_artifacts_all_give_the_own_error(copy: Path) -> None:
    rng = np.random.default_rng(0)
    whole = {part: (copy / part).read_bytes() for part in PARTS}
    begin, damaged = time.perf_counter(), 0
    while damaged < 1000:
        part = PARTS[damaged % len(PARTS)]
        raw = bytearray(whole[part])
        DAMAGE[int(rng.integers(len(DAMAGE)))](raw, rng)
        if raw == whole[part]:
            continue
        (copy / part).write_bytes(raw)
        with pytest.raises(ArtifactError) as raised:
            load(copy)
        assert part in str(raised.value)
        (copy / part).write_bytes(whole[part])
        damaged += 1
    assert time.perf_counter() - begin < 60
    load(copy)


def _places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The paths of all values inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inside:
        found.append((*path, key))
        if isinstance(part, dict | list):
            found.extend(_places(part, (*path, key)))
    return found


STRANGE = (None, -1, 0, 10**9, 1e308, "x", [], {}, True, [[]], "../../x")


def test_a_forged_manifest_is_no_crash_either(copy: Path) -> None:
    """With a seal that fits: what it says is used, and must be caught where it makes no sense."""
    rng = np.random.default_rng(0)
    sound = (copy / MANIFEST).read_text()
    refused = 0
    for _ in range(150):
        manifest = json.loads(sound)
        places = [path for path in _places(manifest) if path[0] not in ("kind", "seal")]
        *way, last = places[int(rng.integers(len(places)))]
        holder = manifest
        for key in way:
            holder = holder[key]
        if rng.random() < 0.3:
            del holder[last]
        else:
            holder[last] = STRANGE[int(rng.integers(len(STRANGE)))]
        (copy / MANIFEST).write_bytes(artifact._sealed(manifest))
        try:
            load(copy)
        except OfframpError:
            refused += 1
    assert refused > 30


def test_forged_parts_are_no_crash_either(copy: Path) -> None:
    rng = np.random.default_rng(1)
    sound = json.loads((copy / MANIFEST).read_text())
    whole = {part: (copy / part).read_bytes() for part in PARTS if part != MANIFEST}
    refused = 0
    for turn in range(100):
        part = list(whole)[turn % len(whole)]
        raw = bytearray(whole[part])
        for _ in range(3):
            _flip(raw, rng)
        (copy / part).write_bytes(raw)
        sums = {**sound["sha256"], part: hashlib.sha256(raw).hexdigest()}
        (copy / MANIFEST).write_bytes(artifact._sealed({**sound, "sha256": sums}))
        try:
            load(copy)
        except OfframpError:
            refused += 1
        (copy / part).write_bytes(whole[part])
    assert refused > 10
