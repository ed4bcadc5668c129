"""The commands, called as a user calls them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offramp
from offramp.analyse.report import Report
from offramp.cli import main
from offramp.cli.app import _HERE, _exits
from offramp.cli.deploy import class_names
from offramp.cli.factories import backbone_of
from offramp.cli.saved import load_model
from offramp.decide.policy import Policy
from offramp.decide.record import record
from offramp.decide.trace import Trace
from offramp.demo import QUICK, digits
from offramp.demo import run as run_demo
from offramp.errors import ArtifactError, DataError, PolicyError
from offramp.run.artifact import load
from offramp.run.runner import Runner
from tests.networks import example_of, make

HERE = "tests.test_cli"


def network():
    return make("mlp"), example_of("mlp")


def bare():
    return make("mlp")


def _loader(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(160, 12, generator=generator)
    labels = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()
    return DataLoader(TensorDataset(inputs, labels), batch_size=32)


def train():
    return _loader(1)


def calibration():
    return _loader(2)


def held_out():
    return _loader(3)


def nothing():
    return []


def not_a_network():
    return 3


def other_example():
    return make("mlp"), torch.randn(4, 11)


def other_width():
    return [(torch.randn(4, 11), torch.zeros(4, dtype=torch.long))]


def call(capsys, *arguments):
    """Run a command; what it printed as JSON."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in (*arguments, "--json")])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    """Run a command that fails; its message."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return " ".join(printed.err.split())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with pytest.raises(SystemExit) as ended:
        main(
            ["fit", f"{HERE}:network", "--data", f"{HERE}:train", "--out", str(folder)]
            + ["--exits", "2", "--epochs", "4", "--lr", "0.01", "--json"]
        )
    assert ended.value.code == 0
    return folder


def test_from_fit_to_evaluate(fitted, tmp_path, capsys):
    traces = {}
    for name in ("calibration", "held_out"):
        traces[name] = tmp_path / f"{name}.safetensors"
        loader = f"{HERE}:{name}"
        said = call(capsys, "record", fitted, "--data", loader, "--out", traces[name])
        assert said["samples"] == 160
        assert said["fingerprint"] == Trace.load(traces[name]).fingerprint
    policy = tmp_path / "policy.json"
    said = call(
        capsys, "calibrate", traces["calibration"], "--max-accuracy-drop", 0.02, "--out", policy
    )
    assert said == Policy.load(policy).to_json()
    html, plot = tmp_path / "r.html", tmp_path / "r.png"
    report = call(capsys, "evaluate", traces["held_out"], policy, "--html", html, "--plot", plot)
    assert set(report) >= {"full", "early", "exits", "cost_ratio", "verdict"}
    assert html.read_text().startswith("<!doctype html>")
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["evaluate", str(traces["held_out"]), str(policy)])
    assert report["verdict"].split(":")[0] in capsys.readouterr().out


@pytest.fixture(scope="module")
def artifact(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    policy = Policy("confidence", [0.5, 0.5])
    policy.save(folder / "policy.json")
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(SystemExit) as ended:
        main(
            ["export", str(fitted), str(folder / "policy.json"), "--out", str(folder / "net")]
            + ["--classes", str(folder / "classes.txt"), "--preprocessing", '{"mean": [0.5]}']
            + ["--stages", "--json"]
        )
    assert ended.value.code == 0
    return folder / "net"


def test_export_writes_what_it_says(fitted, artifact, tmp_path, capsys):
    told = {"mean": [0.25]}
    (tmp_path / "p.json").write_text(json.dumps(told))
    policy = artifact.parent / "policy.json"
    said = call(
        capsys, "export", fitted, policy, "--out", tmp_path / "net", "--classes", "a, b,c,d",
        "--preprocessing", tmp_path / "p.json",
    )  # fmt: skip
    assert said["classes"] == list("abcd")
    assert said["preprocessing"] == told
    assert set(said["sha256"]) == {"model.onnx", "policy.json", "training.safetensors"}
    assert said["proof"]["rows"] >= 1000
    assert call(capsys, "verify", tmp_path / "net") == said
    model, x = load_model(fitted)[0], example_of("mlp", 32, seed=3)
    wanted = Runner(model, Policy.load(policy), x)(x)
    assert torch.equal(load(tmp_path / "net")(x).exit, wanted.exit)


def test_exits_that_are_off_are_kept_when_asked(fitted, tmp_path, capsys):
    policy = tmp_path / "policy.json"
    Policy("confidence", [float("inf"), 0.5]).save(policy)
    out = tmp_path / "net"
    said = call(capsys, "export", fitted, policy, "--out", out)
    assert [step["exit"] for step in said["steps"]] == [1, 2]
    said = call(capsys, "export", fitted, policy, "--out", out, "--all-exits")
    assert [step["exit"] for step in said["steps"]] == [0, 1, 2]


def test_verify_shows_what_an_artifact_holds(artifact, capsys):
    said = call(capsys, "verify", artifact)
    assert said["classes"] == list("abcd")
    assert said["preprocessing"] == {"mean": [0.5]}
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(artifact)])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, digest in said["sha256"].items():
        assert name in shown
        assert digest in shown
    assert "stages/2.onnx" in shown
    assert "inputs: 0: float32 (batch, 12)" in shown
    assert shown.rstrip().endswith("intact")


@pytest.mark.parametrize("part", ["model.onnx", "policy.json", "manifest.json", "stages/1.onnx"])
def test_verify_names_the_damaged_part(artifact, tmp_path, capsys, part):
    copy = shutil.copytree(artifact, tmp_path / "copy")
    raw = bytearray((copy / part).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / part).write_bytes(raw)
    for command in (("verify",), ("verify", "--json"), ("bench",)):
        message = refused(capsys, *command, copy)
        assert message.startswith("error: ")
        assert part in message


def test_bench_times_every_mix_at_every_size(artifact, capsys):
    arguments = ["bench", artifact, "--seconds", 0.2, "--threads", 1]
    said = call(capsys, *arguments, "--data", f"{HERE}:held_out")
    assert (said["engine"], said["threads"]) == ("onnxruntime", 1)
    assert {"offramp", "torch", "onnxruntime"} <= set(said["versions"])
    rows = {(row["mix"], row["batch"]): row for row in said["rows"]}
    mixes = ("as calibrated", "nobody leaves", "all at the first exit")
    assert set(rows) == {(mix, size) for mix in mixes for size in (1, 8, 32, 64)}
    for (mix, size), row in rows.items():
        assert row["ms"] > 0
        assert sum(row["exits"]) == size
        if mix != "as calibrated":
            assert row["exits"][0 if "first" in mix else 2] == size
    x = next(iter(held_out()))[0]
    wanted = load(artifact)(x[torch.arange(64) % 32]).exit
    assert rows["as calibrated", 64]["exits"] == torch.bincount(wanted, minlength=3).tolist()
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    shown = " ".join(capsys.readouterr().out.split())
    assert "batch 64" in shown
    assert "all at the first exit" in shown
    assert "On random numbers; as calibrated, of 64 there left at each exit: " in shown


def test_bench_on_another_engine(artifact, capsys):
    pytest.importorskip("openvino")
    said = call(capsys, "bench", artifact, "--seconds", 0.1, "--engine", "openvino")
    assert said["engine"] == "openvino"


def test_an_artifact_can_be_recorded(fitted, artifact, tmp_path, capsys):
    traces = []
    for folder in (artifact, fitted):
        trace = tmp_path / f"{len(traces)}.safetensors"
        call(capsys, "record", folder, "--data", f"{HERE}:held_out", "--out", trace)
        traces.append(Trace.load(trace))
    deployed, model = traces
    assert torch.allclose(deployed.logits, model.logits, atol=1e-4)
    assert torch.equal(deployed.labels, model.labels)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("export", "{model}", "{policy}", "--out", "{out}/net", "--classes", "a,b"),
            "2 class names for a model of 4 classes",
        ),
        (
            ("export", "{model}", "{policy}", "--out", "{out}", "--preprocessing", "mean"),
            "--preprocessing 'mean' cannot be read as JSON",
        ),
        (
            ("export", "{model}", "{policy}", "--out", "{out}", "--preprocessing", "[1]"),
            "is a JSON list; expected an object",
        ),
        (("export", "{model}", "{out}/no.json", "--out", "{out}"), "There is no policy at"),
        (("export", "{out}", "{policy}", "--out", "{out}/net"), "does not hold a model"),
        (("export", "{model}", "{policy}", "--out", "{model}"), "is no artifact of offramp"),
        (("verify", "{out}"), "is no artifact of offramp: it has no manifest.json"),
        (("bench", "{out}"), "is no artifact of offramp"),
        (("bench", "{artifact}", "--engine", "onnxruntim"), "Did you mean 'onnxruntime'?"),
        (("bench", "{artifact}", "--threads", "0"), "--threads 0: expected 1 or more"),
        (("bench", "{artifact}", "--data", f"{HERE}:nothing"), "The loader yields nothing"),
    ],
)
def test_what_cannot_be_deployed_is_one_message(
    fitted, artifact, tmp_path, capsys, arguments, text
):
    places = {
        "model": fitted,
        "policy": artifact.parent / "policy.json",
        "artifact": artifact,
        "out": tmp_path,
    }
    message = refused(capsys, *(word.format(**places) for word in arguments))
    assert message.startswith("error: ")
    assert text in message


def test_a_saved_model_comes_back(fitted):
    model, example = load_model(fitted)
    again, _ = load_model(fitted)
    assert len(model.training_fingerprints) == 160
    assert not model.training
    for one, other in zip(model(example).logits, again(example).logits, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(model.backbone.fc.weight, make("mlp").fc.weight)


def test_a_saved_cascade_comes_back(tmp_path, capsys):
    arguments = ["fit", f"{HERE}:network", "--data", f"{HERE}:train", "--out", tmp_path]
    call(capsys, *arguments, "--exits", 2, "--epochs", 1, "--cascade")
    model, example = load_model(tmp_path)
    assert model.cascade
    link = model.heads[1].link.weight
    assert torch.equal(link, load_file(tmp_path / "model.safetensors")["heads.1.link.weight"])
    assert link.abs().sum() > 0
    logits = model(example)
    torch.testing.assert_close(
        logits[1], model.heads[1].head(model.features(example)[0][1]) + logits[0] @ link.T
    )


def trained():
    """The network, and its own answers as labels, about as many of each class."""
    torch.manual_seed(0)
    net, x = make("mlp"), torch.randn(400, 12)
    torch.nn.init.normal_(net.fc.weight)
    with torch.no_grad():
        net.fc.bias -= net(x).mean(0)
    return net, x


def trained_network():
    return trained()[0], example_of("mlp")


def its_answers():
    net, x = trained()
    return DataLoader(TensorDataset(x, net(x).argmax(1)), batch_size=50)


def test_from_plan_to_fit(tmp_path, capsys):
    path, folder = tmp_path / "plan.json", tmp_path / "model"
    network, data = f"{HERE}:trained_network", ("--data", f"{HERE}:its_answers")
    said = call(capsys, "plan", network, *data, "--worth", 0, "--exits", 2, "--out", path)
    assert json.loads(path.read_text()) == said
    assert said["samples"] == [240, 80, 80]
    assert 1 <= len(said["exits"]) <= 2
    said["heads"] = ["mlp:9"] * len(said["exits"])
    path.write_text(json.dumps(said))
    call(capsys, "fit", network, *data, "--plan", path, "--out", folder, "--epochs", 1)
    model, _ = load_model(folder)
    assert list(model.places) == said["exits"]
    assert [head.hidden.out_features for head in model.heads] == [9] * len(said["exits"])
    with pytest.raises(SystemExit):
        main(["plan", network, *data, "--worth", "0", "--heads", "linear, mlp:5"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "10 heads at 5 places" in shown or "8 heads at 4 places" in shown


def test_a_plan_by_cost_alone(capsys):
    said = call(capsys, "plan", f"{HERE}:network", "--exits", 2)
    assert said["method"] == "percentiles"
    assert len(said["exits"]) == 2
    assert said["planned"][0]["brings"] is None


def test_what_is_no_plan(tmp_path, capsys):
    path = tmp_path / "plan.json"
    words = ("fit", f"{HERE}:network", "--data", f"{HERE}:train", "--out", tmp_path, "--plan", path)
    assert "does not hold a plan" in refused(capsys, *words)
    for content, text in (
        ({"kind": "policy"}, "is not a plan"),
        ({"kind": "places", "schema": 99}, "has schema 99; this offramp reads up to 1"),
        ({"kind": "places", "schema": 1, "exits": []}, "has no exits, since none pays there"),
    ):
        path.write_text(json.dumps(content))
        assert text in refused(capsys, *words)


def test_recording_the_training_data_is_found_out(fitted, tmp_path, capsys):
    trace = tmp_path / "t.safetensors"
    said = call(capsys, "record", fitted, "--data", f"{HERE}:train", "--out", trace)
    assert said["source"] == "training"
    message = refused(capsys, "calibrate", trace, "--max-accuracy-drop", 0.1)
    assert "recorded from data that the model was trained on" in message


def test_inspect_shows_cost_candidates_and_exits(capsys):
    said = call(capsys, "inspect", f"{HERE}:network", "--exits", "3")
    assert said["total"] == 12 * 32 + 4 * 32 * 32 + 32 * 4
    assert [row["place"] for row in said["exits"]][-1] == "backbone"
    assert sum(call_["exit"] is not None for call_ in said["calls"]) == 3
    assert sum(row["stage_macs"] for row in said["exits"]) == said["total"]
    with pytest.raises(SystemExit):
        main(["inspect", f"{HERE}:network"])
    shown = capsys.readouterr().out
    assert shown.count("●") == 3 + 1  # and the legend
    assert "◂ 50%" in shown
    assert "3: backbone" in shown


def test_inspect_by_places(capsys):
    said = call(capsys, "inspect", f"{HERE}:bare", "--shape", "12", "--exits", "blocks.1,blocks.3")
    assert [row["place"] for row in said["exits"]] == ["blocks.1", "blocks.3", "backbone"]


@pytest.mark.parametrize(
    ("text", "exits"),
    [
        ("3", 3),
        ("0.25,0.5", [0.25, 0.5]),
        ("-3,-1", [-3, -1]),
        ("a.1, b", ["a.1", "b"]),
        ("0.1,1.0", ["0.1", "1.0"]),
        ("0,1", ["0", "1"]),
        ("1,", ["1"]),
        (".1", [0.1]),
    ],
)
def test_exits_as_words(text, exits):
    """Modules of the network are called 0, 0.0, 0.1, 1, 1.0."""
    parts = (nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.ReLU()))
    assert _exits(text, nn.Sequential(*parts)) == exits


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nocolon",), "not of the form module:factory"),
        (("no_such_module:f",), "No module named 'no_such_module'"),
        ((f"{HERE}:netwrk",), "Did you mean 'network'?"),
        ((f"{HERE}:not_a_network",), "made a int. Expected a torch.nn.Module"),
        ((f"{HERE}:bare",), "give the shape of one sample: --shape 3x32x32"),
        ((f"{HERE}:bare", "--shape", "3,32"), "--shape '3,32' is not of the form 3x32x32"),
        ((f"{HERE}:network", "--exits", "blocks.11"), "blocks.1"),
        ((f"{HERE}:bare", "--shape", "3x5"), "samples of --shape 3x5 fails with RuntimeError"),
        ((f"{HERE}:other_example",), f"the example of '{HERE}:other_example' fails with RuntimeEr"),
        (("torch.nn:Linear",), "'torch.nn:Linear' cannot be called without arguments: missing a"),
    ],
)
def test_bad_words_are_one_message(capsys, arguments, text):
    message = refused(capsys, "inspect", *arguments)
    assert message.startswith("error: ")
    assert text in message


def test_a_foreign_folder(tmp_path):
    with pytest.raises(ArtifactError, match="does not hold a model"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(ArtifactError, match="does not hold a model"):
        load_model(tmp_path)


def test_a_damaged_model(fitted, tmp_path):
    (tmp_path / "model.json").write_bytes((fitted / "model.json").read_bytes())
    whole = (fitted / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="does not hold a model"):
        load_model(tmp_path)


def test_a_network_that_is_no_longer_the_same(fitted, tmp_path):
    about = json.loads((fitted / "model.json").read_text())
    about["network"] = "tests.networks:MLP"
    about["shape"] = "12"
    tensors = (fitted / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(tensors)
    (tmp_path / "model.json").write_text(json.dumps(about))
    assert load_model(tmp_path)[0].num_exits == 3  # the same class, so it fits
    about["places"] = about["places"][:1]
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(ArtifactError, match="no longer makes the network"):
        load_model(tmp_path)


def test_a_trace_that_is_missing(capsys, tmp_path):
    message = refused(capsys, "evaluate", tmp_path / "no", tmp_path / "no.json")
    assert "There is no trace at" in message


def test_a_network_without_example_is_refused():
    with pytest.raises(DataError, match="gave no example"):
        backbone_of(f"{HERE}:bare")


def test_digits_are_disjoint_and_repeat_by_seed():
    data = digits(seed=3)
    sizes = [len(part) for part in (data.train, data.calibration, data.test)]
    assert sizes == [897, 400, 500]
    images = torch.cat([p.tensors[0] for p in (data.train, data.calibration, data.test)])
    assert images.shape == (1797, 1, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == 1797
    assert abs(float(data.train.tensors[0].mean())) < 1e-5
    assert torch.equal(digits(seed=3).test.tensors[0], data.test.tensors[0])
    assert not torch.equal(digits(seed=4).test.tensors[1], data.test.tensors[1])


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[object, Report, list[str]]:
    out = tmp_path_factory.mktemp("demo")
    said: list[str] = []
    report = run_demo(out, settings=QUICK, progress=False, say=said.append)
    return out, report, said


def test_the_demo_writes_all_it_promises(demo):
    out, report, said = demo
    data = json.loads((out / "report.json").read_text())
    assert data == report.to_dict()
    for name in ("full", "early"):
        assert set(data[name]) >= {"accuracy", "interval"}
    for row in data["exits"]:
        assert set(row) >= {"place", "cost", "share", "accuracy", "accuracy_taken"}
    assert data["agreement"] == 1.0
    assert data["time"]["engine"] == "onnxruntime"
    for batch in ("batch_1", "batch_64"):
        assert set(data["time"][batch]) >= {"full_ms", "early_ms", "speedup"}
        assert len(data["time"][batch]["exits_ms"]) == 3
    assert set(data["overthinking"]) >= {"destructive", "rescued", "oracle_accuracy"}
    assert set(data) >= {"cost_ratio", "verdict", "versions", "seed"}
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert Policy.load(out / "policy.json").provenance
    assert Trace.load(out / "trace.safetensors").num_samples == 500
    assert Trace.load(out / "calibration.safetensors").num_samples == 400
    assert "backbone.conv1.weight" in load_file(out / "model.safetensors")
    assert (out / "report.html").stat().st_size > 10_000
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert any("training" in line for line in said)


def test_the_demo_leaves_a_model(demo):
    out, _, _ = demo
    model, example = load_model(out)
    assert example.shape == (2, 1, 32, 32)
    again = record(model, DataLoader(digits().test, batch_size=128), progress=False)
    assert again.fingerprint == Trace.load(out / "trace.safetensors").fingerprint
    data = DataLoader(digits().train, batch_size=128)
    assert record(model, data, progress=False).source == "training"


def test_the_demo_shows_time_beside_cost(demo):
    _, report, _ = demo
    assert "ms, batch 1" in str(report)
    assert "ms, batch 64" in str(report)


@pytest.mark.parametrize("part", ["schema", "network", "training_fingerprints"])
def test_a_model_that_lacks_a_part(fitted, tmp_path, part):
    about = json.loads((fitted / "model.json").read_text())
    tensors = load_file(fitted / "model.safetensors")
    about.pop(part, None)
    tensors.pop(part, None)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(ArtifactError, match=part):
        load_model(tmp_path)


def test_what_is_in_the_way_is_told_before_the_training(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    data = f"--data={HERE}:never"
    message = refused(capsys, "fit", f"{HERE}:network", data, f"--out={tmp_path / 'file'}")
    assert "File exists" in message


def never():
    raise AssertionError("data were loaded")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", f"{HERE}:network", f"--held-out={HERE}:held_out"], "which needs --data"),
        (["plan", f"{HERE}:network", "--heads=pool"], "which needs --data"),
        (
            ["fit", f"{HERE}:network", f"--data={HERE}:train", "--out=x", "--plan=p", "--exits=2"],
            "leave out --exits, or --plan",
        ),
        (["inspect", "./mynets.py:make"], "./mynets.py:make"),
        (["zoo", "run", "b-lenet", "--data=x", "--encoder=y"], "leave out --encoder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(capsys, arguments, text):
    assert text in refused(capsys, *arguments)


def test_names_of_classes_from_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffa \nb\n\n".encode())
    assert class_names(str(path)) == ["a", "b"]
    with pytest.raises(DataError, match="There is no file .*nams.txt"):
        class_names(str(tmp_path / "nams.txt"))


class Tied(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 4))
        self[2].weight = self[0].weight


def tied():
    return Tied(), torch.randn(4, 12)


def test_weights_that_are_shared_are_kept(tmp_path, capsys):
    out = tmp_path / "model"
    data = ["--data", f"{HERE}:train"]
    call(capsys, "fit", f"{HERE}:tied", *data, "--out", out, "--exits", "1,", "--epochs", 1)
    backbone = load_model(out)[0].backbone
    assert backbone[2].weight is backbone[0].weight
    about = json.loads((out / "model.json").read_text())
    (out / "model.json").write_text(json.dumps(about | {"shape": 3}))
    with pytest.raises(ArtifactError, match="network and shape are texts"):
        load_model(out)


def test_many_names_of_classes_are_no_file(tmp_path):
    names = [f"class number {k}" for k in range(100)]
    assert class_names(",".join(names)) == names
    (tmp_path / "names").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as text"):
        class_names(str(tmp_path / "names"))


def test_a_folder_for_a_policy_or_a_trace(fitted, tmp_path, capsys):
    with pytest.raises(PolicyError, match="is not a policy"):
        Policy.load(tmp_path)
    data = f"--data={HERE}:calibration"
    message = refused(capsys, "record", fitted, data, f"--out={tmp_path}")
    assert "is a folder" in message


def test_data_that_the_network_does_not_take_are_named(fitted, tmp_path, capsys):
    network, data = f"{HERE}:network", f"--data={HERE}:other_width"
    for words in (
        ("fit", network, data, f"--out={tmp_path / 'model'}", "--epochs=1"),
        ("record", fitted, data, f"--out={tmp_path / 't.safetensors'}"),
        ("plan", network, data),
    ):
        message = refused(capsys, *words)
        assert f"{HERE}:other_width" in message
        assert "fails with RuntimeError: mat1 and mat2 shapes cannot be multiplied" in message


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
@pytest.mark.parametrize("command", ["demo", "evaluate", "plan", "fit", "zoo run"])
def test_a_seed_that_is_none_is_refused_before_the_work(command, seed, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--seed", seed])
    assert ended.value.code == 2
    assert "Invalid value for '--seed'" in capsys.readouterr().err


def test_the_largest_seed_will_do(tmp_path, capsys):
    words = ["--data", f"{HERE}:train", "--out", tmp_path, "--epochs", 1, "--exits", 1]
    call(capsys, "fit", f"{HERE}:network", *words, "--seed", 2**63 - 1)
    digits(seed=2**63 - 1)


def test_levels_below_none_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", f"{HERE}:network", "--depth", "-1"])
    assert ended.value.code == 2
    assert "Invalid value for '--depth'" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0, -1, "nan"])
def test_no_time_to_measure_in_is_refused(artifact, seconds, capsys):
    assert "expected a time above 0" in refused(capsys, "bench", artifact, f"--seconds={seconds}")


def test_a_step_may_be_clipped(tmp_path, capsys):
    words = ["--data", f"{HERE}:train", "--epochs", 1, "--exits", 1]
    for name, clip in (("free", []), ("clipped", ["--clip", 1e-6])):
        call(capsys, "fit", f"{HERE}:network", *words, *clip, "--out", tmp_path / name)
    free, clipped = (load_file(tmp_path / n / "model.safetensors") for n in ("free", "clipped"))
    assert any(not torch.equal(free[name], value) for name, value in clipped.items())


def test_messages_name_options_and_not_arguments(fitted, tmp_path, capsys):
    Policy("confidence", [math.inf, 0.5]).save(tmp_path / "policy.json")
    call(capsys, "export", fitted, tmp_path / "policy.json", "--out", tmp_path / "net")
    data = f"--data={HERE}:held_out"
    message = refused(capsys, "record", tmp_path / "net", data, f"--out={tmp_path / 't'}")
    assert "`offramp export --all-exits`" in message
    assert "exits='all'" not in message


@pytest.mark.parametrize("name", [".", "there"])
def test_a_folder_in_the_place_of_a_file_is_one_message(
    fitted, tmp_path, capsys, monkeypatch, name
):
    data = f"--data={HERE}:held_out"
    call(capsys, "record", fitted, data, "--out", tmp_path / "trace")
    Policy("confidence", [0.5, 0.5]).save(tmp_path / "policy")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    for words in (
        ("calibrate", "trace", "--max-cost=0.9", "--out", name),
        ("evaluate", "trace", "policy", "--html", name),
    ):
        assert f"error: {name} is a folder; expected the name of a file" in refused(capsys, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "there", "trace"]


class Writes(nn.Linear):
    """Its inputs are scaled where they are."""

    def forward(self, x):
        return super().forward(x.mul_(2))


def writes():
    return Writes(12, 4), example_of("mlp")


def test_the_example_is_as_the_factory_made_it():
    assert torch.equal(backbone_of(f"{HERE}:writes")[1], example_of("mlp"))


@pytest.mark.parametrize("argument", list(_HERE))
def test_arguments_that_are_named_otherwise_here_are_in_messages(argument: str) -> None:
    texts = (path.read_text("utf-8") for path in Path(offramp.__file__).parent.rglob("*.py"))
    assert sum(argument in text for text in texts) > 1  # not only where it is replaced
