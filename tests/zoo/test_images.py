from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import offramp
from offramp.build.batch import fingerprints, unpack
from offramp.cli.app import main
from offramp.errors import DataError, TrainingError
from offramp.zoo.images import Batches, Images, open_images, read_idx, read_tar
from offramp.zoo.running import judge, run, train
from offramp.zoo.systems import SYSTEMS, system
from offramp.zoo.text import TEXT
from tests.traces import make_trace


def idx(values):
    values = np.asarray(values, np.uint8)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def write_mnist(folder, samples=40):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", samples), ("t10k", 12)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 255, (count, 28, 28))
        images[np.arange(count), labels] = 255
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def test_idx_is_read_plain_and_compressed(tmp_path):
    values = np.arange(24).reshape(2, 3, 4)
    for name, raw in (("a", idx(values)), ("b", gzip.compress(idx(values)))):
        (tmp_path / name).write_bytes(raw)
        assert torch.equal(read_idx(tmp_path / name), torch.tensor(values, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x89PNG....", "not an IDX file"),
        (idx(np.zeros((2, 3)))[:-1], r"announces \[2, 3\] and holds 5 bytes, not 6"),
        (gzip.compress(idx([1, 2, 3]))[:-9], "cannot be decompressed"),
        (gzip.compress(idx([1, 2, 3]))[:10] + b"\xff" * 20, "cannot be decompressed"),
    ],
    ids=["foreign", "short", "cut off", "damaged"],  # compressed bytes have the time in them
)
def test_a_damaged_file_is_named(tmp_path, raw, text):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(DataError, match=text):
        read_idx(tmp_path / "x")


def test_the_three_parts_share_no_sample(tmp_path):
    (tmp_path / "inner").mkdir()
    write_mnist(tmp_path / "inner")
    images = open_images("mnist", tmp_path, held_out=0.25)
    assert images.train[0].shape == (30, 1, 28, 28)
    assert images.calibration[0].shape == (10, 1, 28, 28)
    assert len(images.test[0]) == 12
    rows = {bytes(x.numpy()) for part in (images.train, images.calibration) for x in part[0]}
    assert len(rows) == 40
    flat = images.normalise(images.train[0])
    assert abs(float(flat.mean())) < 1e-4
    assert float(flat.std()) == pytest.approx(1, abs=1e-3)


def test_one_of_two_files_may_be_compressed(tmp_path):
    write_mnist(tmp_path)
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        packed = tmp_path / f"{name}.gz"
        (tmp_path / name).write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert len(open_images("mnist", tmp_path).test[1]) == 12


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        for part in ("train", "val"):
            for k, name in enumerate(("ant", "bee")):
                for number in range(2):
                    buffer = io.BytesIO()
                    Image.new("RGB", (8, 8), (200 * k, 0, 0)).save(buffer, "JPEG")
                    member = tarfile.TarInfo(f"root/{part}/{name}/{number}.JPEG")
                    member.size = buffer.tell()
                    buffer.seek(0)
                    archive.addfile(member, buffer)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_images_of_an_archive_get_the_number_of_their_class(tmp_path, packed):
    path = write_tar(tmp_path / "tiny-imagenet-20.tar")
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    for x, y in read_tar(path):
        assert x.shape == (4, 3, 8, 8)
        assert y.tolist() == [0, 0, 1, 1]
        assert (x[:, 0].float().mean((1, 2)) > 100).tolist() == [False, False, True, True]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["header", "between files", "in a header", "in a file"])
def test_an_archive_that_is_cut_off_or_damaged_is_not_a_shorter_one(tmp_path, damage, packed):
    path = write_tar(tmp_path / "x.tar")
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].offset
    raw = path.read_bytes()
    cut = {"between files": last, "in a header": last + 100, "in a file": last + 600}.get(damage)
    raw = raw[:cut] if cut else raw[:last] + b"x" * 512 + raw[last + 512 :]
    path.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(DataError, match=r"x\.tar cannot be read as an archive of images"):
        read_tar(path)


def test_a_compressed_archive_that_is_cut_off_is_named(tmp_path):
    path = write_tar(tmp_path / "x.tar")
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"x\.tar cannot be read as an archive of images"):
        read_tar(path)


def test_shifted_images_are_windows_of_the_image():
    torch.manual_seed(0)
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(20, 1, 8, 8)
    ((moved, _),) = Batches(x, torch.zeros(20), 20, pad=1, flip=True)
    inside = moved[:, 0, 2:6, 2:6]
    steps = inside[:, :, 1:] - inside[:, :, :-1]
    assert set(steps.unique().tolist()) == {-1.0, 1.0}  # mirrored and not
    assert {1.0, -1.0} >= {float(s.unique()) for s in steps}
    assert set((inside[:, 1:] - inside[:, :-1]).unique().tolist()) == {8.0}


def test_images_are_mirrored_without_being_shifted():
    x = torch.arange(8.0).expand(40, 1, 8, 8)
    ((moved, _),) = Batches(x, torch.zeros(40), 40, pad=0, flip=True)
    assert {tuple(row.tolist()) for row in moved[:, 0, 0]} == {
        tuple(range(8)), tuple(reversed(range(8))),
    }  # fmt: skip


@pytest.mark.parametrize("drop", [5.0, -0.1, float("nan")])
def test_a_drop_that_is_none_is_refused_before_the_training(tmp_path, drop):
    with pytest.raises(DataError, match=r"max_accuracy_drop=.*: expected a share of the samples"):
        run(system("b-lenet"), tmp_path / "nothing", tmp_path, max_accuracy_drop=drop)


def test_no_policy_is_kept_without_its_report(tmp_path, monkeypatch):
    def fails(*given, **settings):
        raise KeyboardInterrupt

    write_mnist(tmp_path)
    monkeypatch.setattr("offramp.zoo.running.evaluate", fails)
    settings = {"epochs": 1, "max_accuracy_drop": 1.0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        run(system("b-lenet"), tmp_path, tmp_path / "out", **settings)
    assert (tmp_path / "out" / "model.json").is_file()
    assert not (tmp_path / "out" / "policy.json").exists()


def test_a_class_that_training_lacks_is_refused(tmp_path):
    write_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(12, 10))))
    with pytest.raises(
        DataError, match=r"t10k-images.*\.gz has the classes \[10\], which no sample"
    ):
        open_images("mnist", tmp_path)


def test_a_class_that_is_all_drawn_for_calibration_is_refused(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(
        DataError, match=r"train-images.*drawn for calibration by the seed 0, 36 of"
    ):
        open_images("mnist", tmp_path, held_out=0.9)


def test_names_that_are_not_known():
    with pytest.raises(DataError, match="b-lenet"):
        system("b-lenett")


def test_the_command_lists_all(capsys):
    assert run_main(["zoo", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {*SYSTEMS, *TEXT}


def test_the_command_trains_and_takes_up_what_it_kept(tmp_path, capsys):
    write_mnist(tmp_path)
    out = tmp_path / "out"
    words = ["zoo", "run", "b-lenet", "--data", str(tmp_path), "--out", str(out), "--json"]
    words += ["--max-accuracy-drop", "1", "--epochs"]
    assert run_main([*words, "1"]) == 0
    first = capsys.readouterr().out
    assert (out / "report.json").read_text("utf-8") == first
    assert "a greater loss" not in json.loads(first)["verdict"]  # a drop of 1 was asked for
    checkpoint, weights = out / "training.safetensors", out / "model.safetensors"
    before = checkpoint.stat().st_mtime_ns, weights.read_bytes()
    assert run_main([*words, "1"]) == 0
    assert capsys.readouterr().out == first
    assert (checkpoint.stat().st_mtime_ns, weights.read_bytes()) == before
    assert run_main([*words, "2"]) != 0  # not answered by the shorter training
    assert "another training" in capsys.readouterr().err


def test_a_drop_that_was_asked_for_is_no_reason_not_to_bother(tmp_path):
    trace, policy = make_trace(), offramp.Policy("confidence", [0.5, 0.5, 0.5])
    strict, lax = (judge(trace, policy, tmp_path / "out", drop, seed=0) for drop in (0.0, 0.9))
    assert strict == offramp.evaluate(trace, policy)
    assert "a greater loss than the 1.0 points" in strict.verdict.text
    assert "a greater loss" not in lax.verdict.text
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8")) == lax.to_dict()


def test_a_training_is_not_taken_for_one_on_other_images(tmp_path):
    write_mnist(tmp_path)
    images, recipe = open_images("mnist", tmp_path), system("b-lenet")
    model = train(recipe, images, tmp_path / "out", epochs=1, progress=False)
    seen = fingerprints(unpack((images.normalise(images.train[0]), images.train[1])))
    assert torch.isin(seen, model.training_fingerprints).all()  # as they are, not as they moved
    others = Images((255 - images.train[0], images.train[1]), images.calibration, images.test)
    with pytest.raises(TrainingError, match=r"holds another training: training images \(sha256\)"):
        train(recipe, others, tmp_path / "out", epochs=1, progress=False)
    with pytest.raises(TrainingError, match="holds another training: flip was False"):
        train(replace(recipe, flip=True), images, tmp_path / "out", epochs=1, progress=False)
    (tmp_path / "out" / "training.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"model.safetensors is there without training"):
        train(recipe, images, tmp_path / "out", epochs=1, progress=False)


def run_main(words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code
