"""Interrupted and resumed equals uninterrupted, to the byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from offramp.build.model import attach
from offramp.errors import DataError, TrainingError
from offramp.train import checkpoint as checkpoint_file
from offramp.train import loop
from offramp.train.checkpoint import FILE_NAME, read_checkpoint
from offramp.train.history import History
from offramp.train.loop import fit
from offramp.train.objectives import Distill
from offramp.train.schemes import Joint, Mixed
from tests.train.tiny import Breaking, data_of, digests, loader_of, model_of


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise from every global generator that data code may use."""

    def __init__(self) -> None:
        self.x, self.y = data_of()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import numpy as np

        noise = torch.randn(6) + random.random() + float(np.random.rand())
        return self.x[index] + 0.1 * noise, self.y[index]


class Stop(Exception):
    pass


def loader(augmented: bool = True) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=8, shuffle=True) if augmented else loader_of()


def train(model: Any, data: Any, **settings: Any) -> History:
    options = {"progress": False, "accelerator": "cpu", "epochs": 4, "seed": 3} | settings
    return fit(model, data, **options)


def interrupted(folder: Path, stops: list[int], **settings: Any) -> tuple[Any, History]:
    """Train in pieces, each in a fresh model as in a fresh process."""
    for batches in stops:
        with pytest.raises(Stop):
            train(model_of(), Breaking(loader(), batches, Stop()), checkpoint=folder, **settings)
    model = model_of()
    return model, train(model, loader(), checkpoint=folder, **settings)


@pytest.mark.parametrize("stop", [0, 1, 2, 4, 5, 6, 10, 13])
def test_any_step_can_be_the_last(stop: int, tmp_path: Path) -> None:
    scheme = Mixed(Distill(), weights="growing")
    validation = loader_of(16, seed=1)
    whole = model_of()
    expected = train(whole, loader(), scheme=scheme, validation=validation)
    model, history = interrupted(
        tmp_path, [stop], scheme=scheme, validation=validation, checkpoint_every=1
    )
    assert digests(model) == digests(whole)
    assert history.rows == expected.rows


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "checkpoint_every": 1},
        {"optimizer": lambda p: torch.optim.RMSprop(p, lr=0.01), "checkpoint_every": 1},
        {"optimizer": lambda p: torch.optim.Adagrad(p, lr=0.01), "checkpoint_every": 1},
        {"scheme": Joint(weights="learned"), "checkpoint_every": 1},
        {"accumulate": 2, "checkpoint_every": 1},
        {"clip": 0.1},
        {"precision": "bf16-mixed", "checkpoint_every": 3},
    ],
    ids=["sgd", "rmsprop", "adagrad", "learned", "accumulate", "clip", "bf16"],
)
def test_whatever_is_asked_for_is_put_back(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = model_of()
    train(whole, loader(), **settings)
    model, _ = interrupted(tmp_path, [8, 4], **settings)
    assert digests(model) == digests(whole)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Has no length, so that Lightning fetches a batch ahead."""

    def __iter__(self) -> Any:
        return ((x + 0.1 * torch.randn(6), y) for x, y in zip(*data_of(), strict=True))


def test_a_loader_without_length_resumes_as_well(tmp_path: Path) -> None:
    def stream() -> Any:
        return DataLoader(Stream(), batch_size=8)

    whole = model_of()
    train(whole, stream())
    with pytest.raises(Stop):
        train(model_of(), Breaking(stream(), 8, Stop()), checkpoint=tmp_path, checkpoint_every=1)
    kept = read_checkpoint(tmp_path)
    assert kept is not None
    assert kept.position.step > 0
    model = model_of()
    train(model, stream(), checkpoint=tmp_path, checkpoint_every=1)
    assert digests(model) == digests(whole)


def test_fingerprints_are_put_back(tmp_path: Path) -> None:
    model, _ = model_of(), None
    for batches in (3, 9):
        with pytest.raises(Stop):
            train(model_of(), Breaking(loader_of(), batches, Stop()), checkpoint=tmp_path)
    train(model, loader_of(), checkpoint=tmp_path)
    whole = model_of()
    train(whole, loader_of())
    assert torch.equal(model.training_fingerprints, whole.training_fingerprints)


def test_what_is_finished_is_loaded_and_not_trained_again(tmp_path: Path) -> None:
    first = model_of()
    history = train(first, loader(), checkpoint=tmp_path)
    again = model_of()
    found = train(again, Breaking(loader(), 0, Stop()), checkpoint=tmp_path)
    assert digests(again) == digests(first)
    assert found.rows == history.rows


def test_starting_anew_when_asked(tmp_path: Path) -> None:
    train(model_of(), loader(), checkpoint=tmp_path)
    with pytest.raises(Stop):
        train(model_of(), Breaking(loader(), 0, Stop()), checkpoint=tmp_path, resume=False)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"scheme": "layerwise"}, "plan"),
        ({"epochs": 5}, "plan"),
        ({"seed": 4}, "seed"),
        ({"lr": 0.5}, "optimizer"),
        ({"schedule": "constant"}, "schedule"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    train(model_of(), loader(), checkpoint=tmp_path)
    with pytest.raises(TrainingError, match=f"is of another training: {name} was"):
        train(model_of(), loader(), checkpoint=tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr": 0.5}, "optimizer was AdamW, lr=0.001 and is now AdamW, lr=0.5"),
        ({"clip": 0.5}, "clip was None and is now 0.5"),
    ],
)
def test_a_training_that_broke_goes_on_with_smaller_steps(
    settings: dict[str, Any], text: str, tmp_path: Path
) -> None:
    quiet: dict[str, Any] = {"precision": "bf16-mixed", "schedule": "constant"}
    with pytest.raises(TrainingError, match=r"call fit again with a smaller lr= or with clip="):
        train(model_of(), Poisoned(7), checkpoint=tmp_path, **quiet)
    with pytest.warns(UserWarning, match=f"goes on with another setting: {text}"):
        history = train(model_of(), loader(), checkpoint=tmp_path, **quiet, **settings)
    now = settings.get("lr", 0.001)
    assert [row.lr for row in history] == pytest.approx([0.001, now, now, now])
    with pytest.raises(TrainingError, match="is of another training"):  # it is finished
        train(model_of(), loader(), checkpoint=tmp_path, **quiet)


def test_moments_lie_as_their_weights_do(tmp_path: Path) -> None:
    """The default optimiser is fused, and walks through memory."""
    images = torch.randn(16, 3, 8, 8)
    batches = [(images[k : k + 4], torch.arange(4) % 2) for k in range(0, 16, 4)]

    def channels_last() -> Any:
        torch.manual_seed(0)
        blocks = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()]
        net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(96, 2))
        model = attach(net, images[:2], exits=["1"])
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    through, again = channels_last(), channels_last()
    train(through, batches)
    with pytest.raises(Stop):
        train(channels_last(), Breaking(batches, 6, Stop()), checkpoint=tmp_path)
    train(again, batches, checkpoint=tmp_path)
    for one, other in zip(through.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_an_optimizer_was_given_is_told_alike_in_every_process() -> None:
    """Sets and tensors have another order, or other values, each time."""

    def made(parameters: Any, *settings: Any, lr: float) -> Any:
        return torch.optim.SGD(parameters, lr=lr)

    texts = {
        loop._name(partial(made, {torch.nn.Parameter(torch.randn(2))}, lr=0.1)) for _ in range(3)
    }
    (text,) = texts
    assert text.endswith("made(set, lr=0.1)")


def test_an_optimizer_of_other_settings_is_another_training(tmp_path: Path) -> None:
    slow, quick = (partial(torch.optim.SGD, lr=rate) for rate in (0.1, 0.2))
    train(model_of(), loader(), checkpoint=tmp_path, optimizer=slow)
    with pytest.raises(
        TrainingError, match=r"optimizer was\nSGD\(lr=0.1\)\nand is now\nSGD\(lr=0.2"
    ):
        train(model_of(), loader(), checkpoint=tmp_path, optimizer=quick)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(model_of(), loader(), checkpoint=tmp_path)
    with pytest.raises(TrainingError, match=r"of another model: \d+ tensors differ, the first is"):
        train(model_of(width=12), loader(), checkpoint=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "foreign", "later", "text"])
def test_a_damaged_or_foreign_file_is_refused(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    train(model_of(), loader(), checkpoint=tmp_path, epochs=1)
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    texts = {
        "cut": "is damaged",
        "foreign": "is not an offramp training checkpoint",
        "later": "has schema 2; this version of offramp reads schema 1",
        "text": "is damaged",
    }
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "text":
        path.write_text("hello")
    else:
        header = json.dumps({"kind": "offramp training checkpoint", "schema": 2})
        metadata = {"offramp": header} if damage == "later" else {"format": "pt"}
        save_file({"x": torch.zeros(1)}, path, metadata)
    with pytest.raises(TrainingError, match=texts[damage]):
        train(model_of(), loader(), checkpoint=tmp_path, epochs=1)


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_file.os, "fsync", full)
    with pytest.raises(TrainingError, match=r"could not be written: .*No space left on device"):
        train(model_of(), loader(), checkpoint=tmp_path)
    kept = read_checkpoint(tmp_path)
    assert kept is not None
    assert kept.position.epochs_done == 2
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    monkeypatch.undo()
    model, whole = model_of(), model_of()
    train(model, loader(), checkpoint=tmp_path)
    train(whole, loader())
    assert digests(model) == digests(whole)


def test_a_state_that_would_need_pickle_is_refused(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["odd"] = object()
            return loss

    with pytest.raises(TrainingError, match="The optimiser Odd keeps a object as 'odd'"):
        train(
            model_of(), loader(), checkpoint=tmp_path, optimizer=lambda p: Odd(p, lr=0.1), epochs=2
        )


class Extra(nn.Linear):
    """Keeps something beside its tensors."""

    def __init__(self, kept: Any) -> None:
        super().__init__(6, 3)
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def test_a_model_that_would_need_pickle_is_refused_before_training(tmp_path: Path) -> None:
    def made(kept: Any) -> Any:
        backbone = nn.Sequential(nn.Linear(6, 6), Extra(kept))
        return attach(backbone, data_of()[0][:4], exits=["0"])

    with pytest.raises(TrainingError, match=r"holds a dict as 'backbone.1._extra_state', which"):
        train(made({"a": 1}), Breaking(loader(), 0, Stop()), checkpoint=tmp_path)
    train(made({"a": 1}), loader(), epochs=1)
    train(made(torch.ones(2)), loader(), checkpoint=tmp_path, epochs=1)
    again = made(torch.zeros(2))
    train(again, Breaking(loader(), 0, Stop()), checkpoint=tmp_path, epochs=1)
    assert torch.equal(again.backbone[1].kept, torch.ones(2))


class Poisoned:
    """A loader whose inputs are not finite from some batch on."""

    def __init__(self, batches: int) -> None:
        self.inner, self.left = loader(), batches

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Any:
        for x, y in self.inner:
            self.left -= 1
            yield (x * float("nan") if self.left < 0 else x), y


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = model_of()
    text = (
        r"The loss of exit 0 \(blocks.0\), 1 \(blocks.1\), 2 \(blocks.2\), "
        r"3 \(the backbone's own\) is not a number any more in phase 'joint', "
        r"epoch 2, step 2. The last good checkpoint is"
    )
    with pytest.raises(TrainingError, match=text):
        train(model, Poisoned(7), checkpoint=tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    kept = read_checkpoint(tmp_path)
    assert kept is not None
    assert kept.position.epochs_done == 1
    whole = model_of()
    train(whole, loader())
    train(model, loader(), checkpoint=tmp_path)
    assert digests(model) == digests(whole)


def test_the_exit_that_broke_is_named() -> None:
    model = model_of()
    with torch.no_grad():
        next(model.heads[1].parameters()).fill_(float("inf"))
    with pytest.raises(
        TrainingError, match=r"exit 1 \(blocks.1\) is not a number .* epoch 1, step 0. There is no"
    ):
        train(model, loader())


def test_weights_that_broke_in_the_last_step_are_not_kept(tmp_path: Path) -> None:
    class Breaks(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            Breaks.steps += 1
            if Breaks.steps == 10:
                self.param_groups[0]["params"][0].data.fill_(float("nan"))
            return loss

    with pytest.raises(TrainingError, match=r"'backbone.blocks.0.0.weight' is no longer finite"):
        train(model_of(), loader(), checkpoint=tmp_path, optimizer=lambda p: Breaks(p, lr=0.1))
    kept = read_checkpoint(tmp_path)
    assert kept is not None
    assert kept.position.epochs_done == 1


def test_validation_that_was_trained_on_is_noticed_after_a_restart(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(model_of(), Breaking(loader_of(), 8, Stop()), checkpoint=tmp_path)
    with pytest.raises(DataError, match="shares samples with the training loader"):
        train(model_of(), loader_of(), checkpoint=tmp_path, validation=loader_of())


SCRIPT = """
import hashlib, sys, time
import torch
from tests.train.test_resume import loader
from tests.train.tiny import digests, model_of
from offramp.train.loop import fit

class Slow:
    def __init__(self, inner): self.inner = inner
    def __len__(self): return len(self.inner)
    def __iter__(self):
        for item in self.inner:
            time.sleep(0.02)
            yield item

model = model_of()
print("ready", flush=True)
fit(model, Slow(loader()), scheme="layerwise", epochs=24, seed=3, checkpoint=sys.argv[1],
    checkpoint_every=1, progress=False, accelerator="cpu")
print(sorted(digests(model).items()))
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    """kill -9, ten times; each time training comes further than the last checkpoint."""
    draw = random.Random(7)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}

    def start(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", SCRIPT, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=environment,
        )

    expected = start(tmp_path / "whole").communicate()[0]
    folder = tmp_path / "killed"
    for _ in range(10):
        process = start(folder)
        assert process.stdout is not None
        process.stdout.readline()
        file, before = folder / FILE_NAME, time.time()
        seen = file.stat().st_mtime if file.exists() else 0.0
        while time.time() - before < 60 and process.poll() is None:
            if file.exists() and file.stat().st_mtime != seen:  # it came somewhere
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.13))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not done by then
    assert start(folder).communicate()[0] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_training_on_a_device_goes_on_there(tmp_path: Path) -> None:
    whole = model_of()
    train(whole, loader(augmented=False), accelerator="cuda")
    breaking = Breaking(loader(augmented=False), 6, Stop())
    with pytest.raises(Stop):
        train(model_of(), breaking, accelerator="cuda", checkpoint=tmp_path)
    model = model_of()
    train(model, loader(augmented=False), accelerator="cuda", checkpoint=tmp_path)
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other)
