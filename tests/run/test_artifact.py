from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from offramp.build.model import attach
from offramp.decide.criteria import Criterion
from offramp.decide.policy import Policy, replay
from offramp.decide.record import record
from offramp.errors import (
    ArtifactError,
    DataError,
    EqualityError,
    OfframpError,
    PolicyError,
    StageError,
)
from offramp.run import artifact, engines
from offramp.run.artifact import MANIFEST, MODEL, POLICY, export, load, verify
from offramp.run.runner import Runner
from tests.decide.rules import CLASSES, EXITS, every_rule
from tests.networks import MLP, example_of
from tests.run.conftest import case, whole


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = case("encoder")
    path = tmp_path_factory.mktemp("artifact") / "encoder.offramp"
    names = ["bad", "fair", "good"]
    return export(one.model, Policy("patience", [0.0, 1.0]), one.example, path, classes=names)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose heads pool, with its stages as files."""
    one = case("cnn")
    path = tmp_path_factory.mktemp("artifact") / "cnn.offramp"
    return export(one.model, Policy("confidence", [0.6, 0.6]), one.example, path, stages=True)


@cache
def eager() -> Runner:
    one = case("encoder")
    return Runner(one.model, Policy("patience", [0.0, 1.0]), one.example)


@pytest.mark.parametrize("thresholds", [None, [0.0, 0.0], [9.0, 1.0], [9.0, 9.0]])
@pytest.mark.parametrize("size", [1, 7, 32])
def test_plain_onnxruntime_answers_as_the_runner(
    made: Path, size: int, thresholds: list[float] | None
) -> None:
    x = example_of("encoder", size, seed=8)
    session = onnxruntime.InferenceSession(made / MODEL)
    feed = {name: value.numpy() for name, value in x.items()}
    if thresholds is not None:
        feed["thresholds"] = np.array(thresholds, np.float32)
    logits, prediction, exit, score = session.run(None, feed)
    wanted = eager().under(Policy("patience", thresholds or [0.0, 1.0]))(x)
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
    assert manifest["proof"]["mixes"] == ["none leave", "all leave", "mixed", "as calibrated"]
    assert manifest["proof"]["largest_relative_difference"] <= 1e-4
    assert manifest["preprocessing"] is None
    assert manifest["costs"]["stages"] == list(case("encoder").model.costs.stages)
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    assert Policy.load(made / POLICY).thresholds == (0.0, 1.0)


@pytest.mark.parametrize("thresholds", [[0.0, 0.0], [9.0, 1.0], [9.0, 9.0]])
@pytest.mark.parametrize("kind", ["cnn", "encoder"])
def test_openvino_answers_as_onnxruntime(
    made: Path, pooled: Path, kind: str, thresholds: list[float]
) -> None:
    """OpenVINO takes the default of an input for a constant: other thresholds are put there."""
    openvino = pytest.importorskip("openvino")
    path = (pooled if kind == "cnn" else made) / MODEL
    core = openvino.Core()
    model = core.read_model(path)
    default = next(op for op in model.get_ops() if op.get_friendly_name() == "thresholds")
    fresh = openvino.opset13.constant(np.array(thresholds, np.float32))
    for reader in list(default.output(0).get_target_inputs()):
        reader.replace_source_output(fresh.output(0))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    session = onnxruntime.InferenceSession(path)
    for size in (1, 7, 32):
        x = example_of(kind, size, seed=8)
        feed = {k: v.numpy() for k, v in (x if isinstance(x, dict) else {"0": x}).items()}
        wanted = session.run(None, {**feed, "thresholds": np.array(thresholds, np.float32)})
        got = compiled(feed)
        assert np.allclose(got["logits"], wanted[0], atol=1e-4)
        assert got["prediction"].tolist() == wanted[1].tolist()
        assert got["exit"].tolist() == wanted[2].tolist()
        assert np.allclose(got["score"], wanted[3], atol=1e-4)


def test_openvino_takes_the_file_as_it_is(made: Path) -> None:
    openvino = pytest.importorskip("openvino")
    feed = {k: v.numpy() for k, v in example_of("encoder", 9, seed=2).items()}
    single = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs would compute in bfloat16
    got = openvino.compile_model(made / MODEL, "CPU", single)(feed)
    wanted = onnxruntime.InferenceSession(made / MODEL).run(None, feed)
    assert np.allclose(got["logits"], wanted[0], atol=1e-4)
    assert got["exit"].tolist() == wanted[2].tolist()


def test_stages_can_be_files_of_their_own(pooled: Path) -> None:
    """A client may move the survivors itself: here by hand, in plain onnxruntime."""
    manifest = verify(pooled)
    assert set(manifest["sha256"]) == {MODEL, POLICY, *(f"stages/{k}.onnx" for k in range(3))}
    x = example_of("cnn", 8, seed=4).numpy()
    sessions = [onnxruntime.InferenceSession(pooled / f"stages/{k}.onnx") for k in range(3)]
    thresholds = [*Policy.load(pooled / POLICY).thresholds, -np.inf]
    wanted = load(pooled)(x)
    for row in range(8):
        values = dict(zip(manifest["steps"][0]["inputs"], [x[row : row + 1]], strict=True))
        steps = zip(manifest["steps"], sessions, thresholds, strict=True)
        for step, session, threshold in steps:
            names = [value.name for value in session.get_inputs()]
            given = [values[name] for name in step["inputs"]]
            answer = session.run(None, dict(zip(names, given, strict=True)))
            values.update(zip(step["outputs"], answer, strict=True))
            if values["score"][0] >= threshold:
                break
        assert step["exit"] == wanted.exit[row]
        assert np.allclose(values["logits"][0], wanted.logits[row], atol=1e-5)


def test_what_is_loaded_can_be_recorded_and_retuned(made: Path) -> None:
    batches = [example_of("encoder", 16, seed=seed) for seed in range(3)]
    runner = load(made)
    trace = record(runner, batches, progress=False)
    wanted = record(case("encoder").model, batches, progress=False)
    assert torch.allclose(trace.logits, wanted.logits, atol=1e-4)
    assert trace.places == wanted.places
    policy = Policy(runner.policy.criterion, [9.0, 1.0])
    decided = replay(trace, policy)
    retuned = runner.under(policy)
    got = [retuned(x) for x in batches]
    assert torch.equal(torch.cat([r.exit for r in got]), decided.exit)
    assert torch.equal(torch.cat([r.prediction for r in got]), decided.prediction)
    assert len(decided.exit.unique()) == 2


def test_the_faster_engine_can_be_picked(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picked = load(made, "auto")
    assert picked.engine.name in {"onnxruntime", "openvino"}
    x = example_of("encoder", 6)
    assert torch.equal(picked(**x).exit, load(made)(**x).exit)
    monkeypatch.setattr("offramp.run.artifact.ENGINES", ("tensorrt",))
    with pytest.raises(OfframpError, match="None of the engines tensorrt runs this"):
        load(made, "auto")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_is_loaded_answers_at_any_time(made: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    x = example_of("encoder", 6)
    logits = whole(case("encoder"), x)
    runner = load(made, engine).under(Policy("patience", [9.0, 9.0]))
    for exit, (result, wanted) in enumerate(zip(runner.anytime(x), logits, strict=True)):
        assert result.exit.tolist() == [exit] * 6
        assert torch.allclose(result.logits, wanted, atol=1e-4)
    assert runner(x, deadline_ms=1e6).exit.tolist() == [2] * 6
    assert runner.stats.missed == 0
    late = runner(x, deadline_ms=1e-6)  # the first stage always runs
    assert late.exit.tolist() == [0] * 6
    assert torch.allclose(late.logits, logits[0], atol=1e-4)
    assert runner.stats.missed == 6


SAMPLE = ("voting", "weighted geometric", "gate on an ensemble")  # state of each sort


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in sorted(every_rule())],
)
def test_the_file_decides_by_every_criterion(tmp_path: Path, name: str) -> None:
    rule = every_rule()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = attach(MLP(classes=CLASSES).eval(), torch.randn(4, 12), exits=EXITS - 1).eval()
        for linear in [m for m in model.heads.modules() if isinstance(m, nn.Linear)]:
            nn.init.normal_(linear.weight)
        x = torch.randn(256, 12)
    trace = record(model, [x], progress=False)
    thresholds = thresholds_between(trace.logits, rule)
    policy = Policy(rule, thresholds)
    path = export(model, policy, x[:4], tmp_path / "a.offramp")
    session = onnxruntime.InferenceSession(path / MODEL)
    logits, prediction, exit, _ = session.run(None, {"0": x.numpy()})
    wanted = replay(trace, policy)
    assert len(wanted.exit.unique()) >= 2
    assert exit.tolist() == wanted.exit.tolist()
    assert prediction.tolist() == wanted.prediction.tolist()
    assert np.allclose(logits, wanted.logits, atol=1e-4)
    loaded = load(path)
    assert type(loaded.policy.criterion) is type(rule)
    assert loaded(x).exit.tolist() == wanted.exit.tolist()


def thresholds_between(logits: Tensor, rule: Criterion) -> list[float]:
    """For each exit but the last a threshold amid its scores, as far as can be from any of them."""
    state: tuple[Tensor, ...] = ()
    found = []
    for k in range(EXITS - 1):
        _, score, state = rule(logits[k], state, k)
        values = score.detach().unique()
        if len(values) == 1:  # one vote, of one exit: nobody leaves
            found.append(float(values[0]) + 1)
            continue
        middle = values[len(values) // 3 : max(2, 2 * len(values) // 3) + 1]
        at = int(middle.diff().argmax())
        found.append(float(middle[at : at + 2].mean()))
    return found


def test_preprocessing_is_kept_for_the_client(tmp_path: Path) -> None:
    one, policy = case("mlp"), Policy("confidence", [0.5, 0.5])
    told = {"mean": [0.485, 0.456], "resize": {"short side": 256}, "channels": "RGB"}
    path = export(one.model, policy, one.example, tmp_path / "a", preprocessing=told)
    assert verify(path)["preprocessing"] == told
    for bad in ({"mean": torch.zeros(3)}, {"scale": float("nan")}):
        with pytest.raises(ArtifactError, match="preprocessing cannot be written as JSON"):
            export(one.model, policy, one.example, tmp_path / "b", preprocessing=bad)
    with pytest.raises(ArtifactError, match="2 class names for a model of 4 classes"):
        export(one.model, policy, one.example, tmp_path / "b", classes=["a", "b"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


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


class Scaled(nn.Module):
    """Takes what is no tensor, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return scale * self.last(hidden if mask is None else hidden * mask)


def test_arguments_that_are_no_tensors_are_part_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = {"x": torch.randn(4, 6), "mask": None, "scale": 2.0}
    model = attach(Scaled().eval(), example, exits=["first"])
    policy = Policy("confidence", [0.9])
    path = export(model, policy, example, tmp_path / "a.offramp")
    for runner in (Runner(model, policy, example), load(path)):
        result = runner(example)
        with torch.no_grad():
            wanted = torch.stack(list(model(**example).logits))
        assert torch.allclose(result.logits, wanted[result.exit, torch.arange(4)], atol=1e-5)
        with pytest.raises(DataError, match="scale=3.0.*but the example had.*scale=2.0"):
            runner({**example, "scale": 3.0})


def test_numbers_of_numpy_are_part_of_the_file_and_what_json_cannot_hold_is_refused(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    example = {"x": torch.randn(4, 6), "mask": None, "scale": np.float64(2.0)}
    model = attach(Scaled().eval(), example, exits=["first"])
    policy = Policy("confidence", [0.9])
    loaded = load(export(model, policy, example, tmp_path / "a.offramp"))
    wanted = Runner(model, policy, example)(example)
    assert torch.allclose(loaded(example).logits, wanted.logits, atol=1e-5)
    odd = {"x": torch.randn(4, 6), "mask": None, "scale": float("inf")}
    model = attach(Scaled().eval(), odd, exits=["first"])
    with pytest.raises(ArtifactError, match="What the example has beside tensors cannot be"):
        export(model, policy, odd, tmp_path / "b.offramp")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.offramp"]


def test_a_link_goes_on_leading_to_the_newest(tmp_path: Path) -> None:
    one, policy = case("mlp"), Policy("confidence", [0.5, 0.5])
    parts = {MODEL: b"model", POLICY: b"policy"}
    artifact._write(tmp_path / "v1", parts, {"kind": artifact.KIND})
    (tmp_path / "current").symlink_to("v1")
    export(one.model, policy, one.example, tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert verify(tmp_path / "v1")["kind"] == artifact.KIND
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["current", "v1"]


def test_what_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "made"
    artifact._write(target, {MODEL: b"old"}, {})
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("the disk is gone")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        artifact._write(target, {MODEL: b"new"}, {})
    assert (target / MODEL).read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_what_it_was_trained_on_is_known_from_the_file(tmp_path: Path) -> None:
    one, x = case("mlp"), example_of("mlp", 12, seed=3)
    batches = [((part,), torch.zeros(4, dtype=torch.int64)) for part in x.split(4)]
    model = attach(one.model.backbone, one.example, exits=1)
    sources = {}
    for name, seen in (("none", 0), ("some", 8)):
        model.training_fingerprints = record(model, batches).inputs[:seen].sort().values
        path = export(model, Policy("confidence", [0.5]), one.example, tmp_path / name)
        assert (path / artifact.TRAINING).is_file() == bool(seen)
        sources[name] = record(load(path), batches, source="new").source
    assert sources == {"none": "new", "some": "training"}


def test_what_is_not_an_artifact_is_not_replaced(tmp_path: Path) -> None:
    one, policy, app = case("mlp"), Policy.final(), tmp_path / "app"
    app.mkdir()
    (app / "precious.txt").write_text("x")
    for foreign, text in (
        ('{"name": "web app"}', "is no artifact of offramp. Choose another path"),
        ("[1]", "is no artifact of offramp"),
        ('{"kind": "offramp artif', "Delete the folder if it is one, or choose another path"),
    ):
        (app / MANIFEST).write_text(foreign)
        with pytest.raises(ArtifactError, match=text):
            export(one.model, policy, one.example, app)
        assert (app / "precious.txt").read_text() == "x"
        assert (app / MANIFEST).read_text() == foreign
    (app / MANIFEST).write_text(json.dumps({"kind": artifact.KIND}))  # damaged, but one of them
    with pytest.raises(ArtifactError, match=r"beside its artifact, .*: precious\.txt\. Move"):
        export(one.model, policy, one.example, app)
    (app / "precious.txt").rename(app / MODEL)
    verify(export(one.model, policy, one.example, app))


def test_what_json_writes_otherwise_is_read_back_all_the_same(tmp_path: Path) -> None:
    one, policy = case("mlp"), Policy.final()
    labels = {i: f"class {i}" for i in range(11)}
    told = {"id2label": labels, 1: "a", "size": (3, 4)}
    path = export(
        one.model, policy, one.example, tmp_path / "a", preprocessing=told, classes=np.arange(4)
    )
    manifest = verify(path)
    assert manifest["preprocessing"] == {
        "id2label": {str(i): name for i, name in labels.items()},
        "1": "a",
        "size": [3, 4],
    }
    assert manifest["classes"] == [0, 1, 2, 3]
    with pytest.raises(ArtifactError, match="classes cannot be written as JSON"):
        export(one.model, policy, one.example, tmp_path / "b", classes=list(torch.zeros(4)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_rule_with_state_and_no_thresholds_gives_no_file_of_all_exits(tmp_path: Path) -> None:
    one, policy = case("mlp"), Policy("arithmetic", None)
    with pytest.raises(PolicyError, match="carries state"):
        export(one.model, policy, one.example, tmp_path / "a", exits="all")
    assert list(tmp_path.iterdir()) == []
    path = export(one.model, policy, one.example, tmp_path / "a")
    with torch.no_grad():
        wanted = one.backbone(one.example).softmax(-1)
    assert torch.allclose(load(path)(one.example).logits.softmax(-1), wanted, atol=1e-5)


def _positive(logits: Tensor) -> Tensor:
    return (logits > 0).sum(-1)


def _sure(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1).amax(-1)


@pytest.mark.parametrize(("score", "limit"), [(_positive, 2.5), (_sure, 0.7)])
def test_scores_of_any_type_are_compared_alike(tmp_path: Path, score: object, limit: float) -> None:
    class Own(Criterion):
        name = "own"

        def forward(
            self, logits: Tensor, state: tuple[Tensor, ...], exit: int
        ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            return logits, score(logits), state  # type: ignore[operator]

    one, x = case("mlp"), example_of("mlp", 64, seed=6)
    policy = Policy(Own(), [limit, float("inf")])
    wanted = replay(record(one.model, [x], progress=False), policy)
    assert wanted.score.dtype == torch.float32
    assert wanted.exit.unique().tolist() == [0, 2]
    first = whole(one, x)[0]
    assert torch.equal(wanted.exit == 0, score(first) >= limit)  # type: ignore[operator]
    loaded = load(export(one.model, policy, one.example, tmp_path / "a"))
    made = [Runner(one.model, policy, one.example, engine=e) for e in ("torch", "onnxruntime")]
    off = Runner(one.model, policy, one.example, exits="all")
    for runner in (loaded, *made, off):
        assert torch.equal(runner(x).exit, wanted.exit)
        assert [int(runner(x[i : i + 1]).exit) for i in range(8)] == wanted.exit[:8].tolist()


def test_nothing_but_the_artifact_is_needed_to_load_it(
    pooled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = example_of("cnn", 6)
    wanted = load(pooled)(x)
    monkeypatch.setattr(tempfile, "tempdir", str(pooled / "no such folder"))
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.delattr(os, "sched_getaffinity")
    runner = load(pooled)
    assert torch.equal(runner(x).exit, wanted.exit)
    assert torch.allclose(runner(x).logits, wanted.logits, atol=1e-5)


def test_models_without_room_on_the_disk_are_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert engines._put_aside([b"one", b"three"])() == [b"one", b"three"]

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, given: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    kept = engines._put_aside([b"one", b"three"])
    assert kept() == kept() == [b"one", b"three"]


@pytest.mark.parametrize(
    ("before", "turn", "meanwhile"),
    [
        (False, 0, "puts"),  # where nothing stood
        (True, 0, "takes"),  # what was there is just being replaced
        (True, 1, "puts"),  # where a place was just made
    ],
)
def test_writers_do_not_get_in_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, turn: int, meanwhile: str
) -> None:
    target, rename, turns = tmp_path / "made", Path.rename, [0]
    if before:
        artifact._write(target, {MODEL: b"old"}, {})

    def interrupted(self: Path, other: Path) -> Path:
        if turns[0] == turn:
            if meanwhile == "takes":
                shutil.rmtree(target)
            else:
                target.mkdir()
                (target / MODEL).write_bytes(b"another's")
        turns[0] += 1
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    artifact._write(target, {MODEL: b"own"}, {})
    assert (target / MODEL).read_bytes() == b"own"
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


def test_what_is_replaced_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, x = case("mlp"), case("mlp").example
    older = export(one.model, Policy("confidence", [0.0, 0.0]), x, tmp_path / "older")
    newer = export(one.model, Policy.final(), x, tmp_path / "newer")
    read, waiting = artifact._manifest, [True]

    def then_replaced(folder: Path) -> dict[str, object]:
        manifest = read(folder)
        if waiting.pop() if waiting else False:
            older.rename(tmp_path / "gone")
            newer.rename(older)
        return manifest

    monkeypatch.setattr(artifact, "_manifest", then_replaced)
    assert load(older)(x).exit.tolist() == [2] * len(x)


def test_files_of_others_in_an_artifact_are_not_lost(tmp_path: Path) -> None:
    one, path = case("mlp"), tmp_path / "made"
    policy = Policy("confidence", [0.5, 0.5])
    export(one.model, policy, one.example, path, stages=True)
    export(one.model, policy, one.example, path, stages=True)
    (path / "NOTES.txt").write_text("mine", "utf-8")
    (path / "stages" / "more").mkdir()
    (path / "stages" / "more" / "own.onnx").write_text("mine", "utf-8")
    words = r"made holds files beside its artifact.*: NOTES.txt, stages/more/own.onnx\. Move"
    with pytest.raises(ArtifactError, match=words):
        export(one.model, policy, one.example, path)
    assert (path / "NOTES.txt").read_text("utf-8") == "mine"
    verify(path)


class Pair(NamedTuple):
    u: Tensor
    v: Tensor


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, pair: Pair) -> Tensor:
        return self.last(torch.tanh(self.first(pair.u - pair.v)))


def test_a_structure_that_no_file_holds_is_refused_before_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = (Pair(torch.randn(4, 6), torch.randn(4, 6)),)
    model = attach(OfPairs(), example, exits=["first"])
    Runner(model, Policy.final(), example)(*example)
    monkeypatch.setattr(artifact, "convert", None)
    with pytest.raises(ArtifactError, match=r"structure of the example, .* Let the model take tup"):
        export(model, Policy.final(), example, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_network_in_half_precision_is_held_to_what_that_rounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    x = torch.randn(9, 8).half()
    model = attach(nn.Sequential(*layers).eval().half(), x, exits=["1"])
    policy = Policy("confidence", [0.3])
    Runner(model, policy, x, engine="onnxruntime")
    proof = verify(export(model, policy, x, tmp_path / "half"))["proof"]
    assert proof["tolerance"] == 4 * torch.finfo(torch.float16).eps
    assert 1e-4 < proof["largest_relative_difference"] <= proof["tolerance"]


class TimeFirst(nn.Module):
    """The samples are in dimension 1, which a select function tells."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.a, self.b = nn.LSTM(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.lstm(x)[0][-1])))


def test_what_select_takes_along_another_dimension_is_no_file_either(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 9, 6)
    model = attach(TimeFirst().eval(), x, exits=["a"], select=lambda rows, x: x[:, rows])
    with pytest.raises(StageError, match="select function of Python"):
        export(model, Policy("confidence", [0.3]), x, tmp_path / "a")
    assert not list(tmp_path.iterdir())


class Present(nn.Module):
    """The mean of what is there; of nothing there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        weight = present[:, :, None].to(x.dtype)
        mean = (x * weight).sum(1) / weight.sum(1)
        return self.b(torch.relu(self.a(mean)))


def test_rows_that_the_model_has_no_answer_to_are_not_the_files_fault(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = {"x": torch.randn(12, 3, 6), "present": torch.eye(3).bool().repeat(4, 1)}
    model = attach(Present().eval(), example, exits=["a"])
    path = export(model, Policy("confidence", [0.4]), example, tmp_path / "a")
    assert verify(path)["proof"]["rows"] >= 1000
