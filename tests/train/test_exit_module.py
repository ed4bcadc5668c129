"""The user's own Lightning Trainer."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from offramp.build.batch import fingerprints, unpack
from offramp.errors import DataError, TrainingError
from offramp.train.exit_logger import ExitLogger
from offramp.train.exit_module import ExitModule
from offramp.train.loop import fit
from offramp.train.losses import cross_entropy
from offramp.train.objectives import Boosting, CrossEntropy, Distill, Matched, Objective
from offramp.train.phases import Phase
from offramp.train.schemes import Alternating, Joint, Layerwise, Mixed, as_plan
from offramp.train.weights import exit_weights
from tests.train.tiny import data_of, digests, loader_of, model_of, plain_model_of

pytestmark = [
    # Advice of Lightning on larger trainings than these, and a part of torch that it calls.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def trainer_of(**settings: Any) -> pl.Trainer:
    """A Trainer that writes nothing unless asked to."""
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**(options | settings))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def batches_of(batch: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """In a fixed order; Lightning takes a list of batches for a list of loaders."""
    return loader_of(batch=batch, shuffle=False)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(
    "scheme",
    [
        Joint(Distill(), weights="growing", equilibrium=True),
        Joint(weights="learned"),
        Mixed(Distill(temperature=2.0), weights="linear"),
        Layerwise(),
        Alternating(),
    ],
    ids=lambda scheme: type(scheme).__name__,
)
def test_every_phase_ends_where_fit_ends(scheme: Any) -> None:
    fitted = model_of(dropout=0.0)
    own = copy.deepcopy(fitted)
    fit(fitted, batches_of(), scheme=scheme, epochs=4, optimizer=sgd, progress=False)
    for phase in as_plan(scheme, own.num_exits, epochs=4):
        module = ExitModule(own, phase, optimizer=sgd)
        trainer_of(max_epochs=phase.epochs).fit(module, batches_of())
    assert_same_weights(own, fitted)
    assert torch.equal(own.training_fingerprints, fitted.training_fingerprints)


def test_the_default_is_joint_with_the_optimizer_of_fit() -> None:
    fitted = model_of(dropout=0.0)
    own = copy.deepcopy(fitted)
    fit(fitted, batches_of(), epochs=2, lr=0.01, progress=False)
    trainer_of().fit(ExitModule(own, lr=0.01), batches_of())
    assert_same_weights(own, fitted)


def test_accumulated_and_clipped_by_the_trainer() -> None:
    fitted = model_of(dropout=0.0)
    own = copy.deepcopy(fitted)
    settings: dict[str, Any] = {"optimizer": sgd, "schedule": "constant"}
    fit(fitted, batches_of(4), epochs=2, accumulate=2, clip=0.5, progress=False, **settings)
    trainer = trainer_of(accumulate_grad_batches=2, gradient_clip_val=0.5)
    trainer.fit(ExitModule(own, **settings), batches_of(4))
    assert_same_weights(own, fitted)


def test_the_default_optimizer_is_clipped_in_mixed_precision() -> None:
    fitted = plain_model_of()
    own = copy.deepcopy(fitted)
    fit(fitted, batches_of(), epochs=2, clip=0.1, precision="bf16-mixed", progress=False)
    trainer = trainer_of(precision="bf16-mixed", gradient_clip_val=0.1)
    trainer.fit(ExitModule(own), batches_of())
    assert_same_weights(own, fitted)


class Kept(pl.Callback):
    """What was logged, epoch for epoch."""

    def __init__(self) -> None:
        self.train: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.train.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def test_loss_and_accuracy_of_every_exit_are_logged() -> None:
    model = model_of(dropout=0.0)
    history = fit(
        copy.deepcopy(model),
        batches_of(),
        epochs=2,
        optimizer=sgd,
        validation=loader_of(24, 10, seed=1, shuffle=False),
        progress=False,
    )
    kept = Kept()
    trainer = trainer_of(callbacks=[ExitLogger(), kept])
    module = ExitModule(model, optimizer=sgd)
    trainer.fit(module, batches_of(), loader_of(24, 10, seed=1, shuffle=False))
    for row, logged in zip(history, kept.train, strict=True):
        expected = {}
        for k in range(4):
            expected[f"train/exit_{k}/loss"] = row.train_loss[k]
            expected[f"train/exit_{k}/accuracy"] = row.train_accuracy[k]
            expected[f"val/exit_{k}/loss"] = row.val_loss[k]
            expected[f"val/exit_{k}/accuracy"] = row.val_accuracy[k]
        assert logged == pytest.approx(expected, rel=1e-5)
    (tested,) = trainer.test(module, loader_of(24, 10, seed=1, shuffle=False), verbose=False)
    with torch.no_grad():
        x, y = data_of(24, seed=1)
        hits = [(z.argmax(1) == y).double().mean().item() for z in model.eval()(x)]
    assert [tested[f"test/exit_{k}/accuracy"] for k in range(4)] == pytest.approx(hits)


def test_an_exit_that_is_not_supervised_has_no_training_loss() -> None:
    kept = Kept()
    model = model_of()
    trainer = trainer_of(max_epochs=1, callbacks=[ExitLogger(), kept])
    trainer.fit(ExitModule(model, Layerwise().plan(4, 4)[1]), batches_of())
    losses = [name for name in kept.train[0] if name.endswith("loss")]
    assert losses == ["train/exit_1/loss"]
    assert "train/exit_3/accuracy" in kept.train[0]


@pytest.mark.parametrize("error", [None, RuntimeError("stop")])
def test_what_was_frozen_is_thawed(error: Exception | None) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
            assert "backbone.blocks.0.0.weight" in frozen
            if error is not None:
                raise error

    model = model_of()
    before = digests(model)
    module = ExitModule(model, Layerwise().plan(4, 4)[1])
    trainer = trainer_of(max_epochs=1, callbacks=[Stop()])
    if error is None:
        trainer.fit(module, batches_of())
    else:
        with pytest.raises(RuntimeError, match="stop"):
            trainer.fit(module, batches_of())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert len(model.training_fingerprints) == (40 if error is None else 8)
    moved = {name for name, value in digests(model).items() if value != before[name]}
    assert moved
    assert all(name.startswith(("backbone.blocks.1.", "heads.1.")) for name in moved)


def test_samples_are_remembered() -> None:
    model = model_of()
    trainer_of().fit(ExitModule(model), loader_of())
    expected = fingerprints(unpack(data_of())).sort().values
    assert torch.equal(model.training_fingerprints, expected)


def test_samples_are_remembered_in_checkpoints(tmp_path: Path) -> None:
    """Also those of an epoch that is not over."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    trainer = trainer_of(callbacks=[Save()])
    trainer.fit(ExitModule(model_of()), batches_of())
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    again = model_of()
    trainer_of(max_epochs=3).fit(
        ExitModule(again), batches_of(), ckpt_path=str(tmp_path / "late.ckpt"), weights_only=False
    )
    everyone = fingerprints(unpack(data_of()))
    assert torch.equal(again.training_fingerprints, everyone.sort().values)
    early = torch.load(tmp_path / "early.ckpt", weights_only=False)
    first = early["offramp_training_fingerprints"]
    assert torch.equal(first, everyone[:16].sort().values)


@pytest.mark.parametrize(
    "settings", [{"max_epochs": 3}, {"max_steps": 13}, {"max_steps": 13, "max_epochs": 9}]
)
def test_growing_weights_follow_the_trainer(settings: dict[str, Any]) -> None:
    """Thirteen steps of five an epoch are three epochs."""
    seen: list[tuple[float, ...]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module._weights)

    (phase,) = Joint(weights="growing").phases(4)
    trainer = trainer_of(callbacks=[Look()], **({"max_epochs": None} | settings))
    trainer.fit(ExitModule(model_of(), phase), batches_of())
    costs = model_of().costs.stages
    by_hand = [
        exit_weights("growing", 4, stage_costs=costs, epoch=epoch, epochs=3) for epoch in range(3)
    ]
    assert by_hand[0] != by_hand[1] != by_hand[2]
    assert [seen[0], seen[4], seen[5], seen[10]] == [by_hand[k] for k in (0, 0, 1, 2)]


@pytest.mark.parametrize(
    ("objective", "sums"),
    [(Boosting(), True), (Matched(Boosting()), True), (CrossEntropy(), False)],
    ids=["boosting", "wrapped", "plain"],
)
def test_what_is_measured_is_what_is_answered(objective: Objective, sums: bool) -> None:
    """Without a step that moves the weights, so that it can be counted afterwards."""
    model = plain_model_of()
    still = partial(torch.optim.SGD, lr=0.0)
    history = fit(
        model,
        batches_of(),
        scheme=Joint(objective),
        epochs=1,
        optimizer=still,
        validation=loader_of(24, 24, seed=1, shuffle=False),
        progress=False,
    )
    (row,) = history
    for (x, y), accuracies in (
        (data_of(), row.train_accuracy),
        (data_of(24, seed=1), row.val_accuracy),
    ):
        with torch.no_grad():
            logits = model(x).stack()
        answers = logits.cumsum(0) if sums else logits
        hits = (answers.argmax(-1) == y).float().mean(1)
        assert list(accuracies) == pytest.approx(hits.tolist())
    losses = [float(nn.functional.cross_entropy(z, y)) for z in answers]
    assert list(row.val_loss) == pytest.approx(losses, rel=1e-5)
    assert float((logits.cumsum(0).argmax(-1) != logits.argmax(-1)).float().mean()) > 0


def test_a_trainer_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    whole, first, second = (model_of(dropout=0.0) for _ in range(3))
    trainer_of(max_epochs=3).fit(ExitModule(whole, optimizer=sgd), batches_of())

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only=False)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer_of(max_epochs=3, callbacks=[Stop()]).fit(
            ExitModule(first, optimizer=sgd), batches_of()
        )
    trainer_of(max_epochs=3).fit(
        ExitModule(second, optimizer=sgd), batches_of(), ckpt_path=str(tmp_path / "own.ckpt")
    )
    assert_same_weights(second, whole)


def test_a_loss_that_is_no_number_names_the_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 7:
                batch.args[0].fill_(float("nan"))

    keeper = ModelCheckpoint(tmp_path, save_last=True)
    trainer = trainer_of(
        max_epochs=3, enable_checkpointing=True, callbacks=[keeper, Poison(), ExitLogger()]
    )
    text = (
        r"exit 0 \(blocks.0\).* in phase 'joint', epoch 2, step 2. The last good checkpoint is .*"
    )
    with pytest.raises(TrainingError, match=text) as caught:
        trainer.fit(ExitModule(model_of()), batches_of())
    assert str(tmp_path) in str(caught.value)
    assert any(path.suffix == ".ckpt" for path in tmp_path.iterdir())


def test_one_class_is_worth_a_warning() -> None:
    x, y = data_of()
    batches = DataLoader(TensorDataset(x, torch.ones_like(y)), batch_size=8)
    with pytest.warns(UserWarning, match="All labels of the training loader are 1"):
        trainer_of(max_epochs=1).fit(ExitModule(model_of()), batches)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.zeros(8), "A batch of the training loader has labels of type torch.float32"),
        (torch.full((8,), 3), "has label 3, out of range"),
    ],
)
def test_wrong_labels(labels: Tensor, text: str) -> None:
    batches = DataLoader(TensorDataset(data_of(8)[0], labels), batch_size=8)
    with pytest.raises(DataError, match=text):
        trainer_of().fit(ExitModule(model_of()), batches)
    with pytest.raises(DataError, match=text.replace("training", "validation")):
        trainer_of().fit(ExitModule(model_of()), batches_of(), batches)


def test_one_sample_left_over() -> None:
    with pytest.raises(DataError, match=r"Batch 2 .*'joint'.* holds one sample.* drop_last=True"):
        trainer_of().fit(ExitModule(model_of()), loader_of(17, 8))


def test_wrong_settings() -> None:
    with pytest.raises(DataError, match="ExitModule trains a MultiExitModel, but got a Linear"):
        ExitModule(nn.Linear(6, 3))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="lr is for the default optimizer"):
        ExitModule(model_of(), optimizer=sgd, lr=0.1)
    with pytest.raises(DataError, match="optimizer is SGD. Expected a function from the list"):
        ExitModule(model_of(), optimizer=sgd(list(model_of().parameters())))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"'p' names stages \[9\]"):
        ExitModule(model_of(), Phase("p", (9,), (), (0,)))
    with pytest.raises(DataError, match=r"is not known: it has no end.* Pass max_steps= to it"):
        trainer_of(max_epochs=-1).fit(ExitModule(model_of()), batches_of())


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples without a length."""

    def __iter__(self) -> Any:
        return iter(zip(*data_of(), strict=True))


def test_a_stream_needs_a_number_of_steps() -> None:
    done: list[float] = []

    def noted(part: float) -> float:
        done.append(part)
        return 1 - part

    with pytest.raises(DataError, match=r"or its loader no length. Pass max_steps= to it"):
        trainer_of().fit(ExitModule(model_of(), schedule=noted), DataLoader(Stream(), 8))
    assert done == []
    trainer_of(max_steps=5).fit(ExitModule(model_of(), schedule=noted), DataLoader(Stream(), 8))
    assert done[:10:2] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])  # of two groups each


def test_the_logger_wants_an_exit_module() -> None:
    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(list(self.parameters()))

    with pytest.raises(DataError, match="the Trainer got a Other"):
        trainer_of(callbacks=[ExitLogger()]).fit(Other(), batches_of())


@pytest.mark.filterwarnings("ignore:Total length of .* is zero")
def test_no_batch() -> None:
    with pytest.raises(DataError, match=r"training loader yields no batch: .*drop_last=True\?"):
        trainer_of().fit(ExitModule(model_of()), loader_of(4, 8, drop_last=True))
