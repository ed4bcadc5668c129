"""Hugging Face's real Trainer, on the CPU, on a tiny network of theirs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import offramp
from offramp.build.model import MultiExitModel
from offramp.errors import DataError
from offramp.train.huggingface import HuggingFaceModule, exit_accuracies
from offramp.train.losses import cross_entropy
from offramp.train.objectives import Boosting, CrossEntropy, Distill, ExitLoss, Matched

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CLASSES, EXITS = 3, 3


class Texts(Dataset[dict[str, Tensor]]):
    """Token rows of which the first token tells the class; some are padded."""

    def __init__(self, samples: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(4, 32, (samples, 7), generator=generator)
        self.ids[:, 0] = 1 + torch.arange(samples) % CLASSES
        self.mask = torch.ones_like(self.ids)
        self.mask[::3, 5:] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[index],
            "attention_mask": self.mask[index],
            "labels": self.ids[index, 0] - 1,
        }


@pytest.fixture
def model() -> MultiExitModel:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = transformers.BertForSequenceClassification(config)
    rows = [Texts()[i] for i in range(4)]
    example = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask")}
    return offramp.attach(bert, example, exits=["bert.encoder.layer.0", "bert.encoder.layer.1"])


def trainer_of(module: nn.Module, folder: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "remove_unused_columns": False,
            "report_to": "none",
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 0.01,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "optim": "sgd",
        }
        | settings,
    )
    return transformers.Trainer(
        module,
        arguments,
        train_dataset=Texts(),
        eval_dataset=Texts(10, seed=1),
        compute_metrics=exit_accuracies,
    )


def test_the_trainer_takes_the_loss_of_the_exits(model: MultiExitModel, tmp_path: Path) -> None:
    plain = copy.deepcopy(model).train()
    trainer = trainer_of(
        HuggingFaceModule(model), tmp_path, num_train_epochs=1, train_sampling_strategy="sequential"
    )
    done = trainer.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    losses = []
    data = Texts()
    for start in range(0, len(data), 8):
        rows = [data[i] for i in range(start, start + 8)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        labels = batch.pop("labels")
        loss = cross_entropy(plain(**batch), labels) / EXITS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert done.training_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_accumulated_gradients_equal_one_large_batch(model: MultiExitModel, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    settings = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    trainer_of(HuggingFaceModule(model), tmp_path, **settings).train()
    trainer_of(
        HuggingFaceModule(other),
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **settings,
    ).train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)


def test_it_learns_and_evaluates_every_exit(model: MultiExitModel, tmp_path: Path) -> None:
    module = HuggingFaceModule(model, ExitLoss(Distill(), weights=[0.5, 0.5, 1.0]))
    trainer = trainer_of(
        module, tmp_path, num_train_epochs=15, optim="adamw_torch", max_grad_norm=1.0
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for k in range(EXITS):
        assert after[f"eval_exit_{k}_accuracy"] >= 0.9
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    predicted = trainer.predict(Texts(10, seed=1))
    assert predicted.predictions.shape == (10, EXITS, CLASSES)
    data = Texts(10, seed=1)
    model.eval()
    with torch.no_grad():
        own = model(input_ids=data.ids, attention_mask=data.mask)
    torch.testing.assert_close(
        torch.from_numpy(predicted.predictions), own.stack().transpose(0, 1), rtol=1e-4, atol=1e-5
    )


def test_what_the_trainer_saves_is_read_again(model: MultiExitModel, tmp_path: Path) -> None:
    whole, begun = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"save_strategy": "epoch", "save_only_model": False}
    trainer_of(HuggingFaceModule(begun), tmp_path / "a", **settings).train()
    trainer_of(HuggingFaceModule(whole), tmp_path / "b").train()
    trainer_of(HuggingFaceModule(model), tmp_path / "a", **settings).train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3")
    )
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_metrics_where_losses_are_asked_for(model: MultiExitModel, tmp_path: Path) -> None:
    plain = trainer_of(HuggingFaceModule(model), tmp_path).evaluate()
    more = trainer_of(
        HuggingFaceModule(model), tmp_path, include_for_metrics=["loss", "inputs"]
    ).evaluate()
    for k in range(EXITS):
        assert more[f"eval_exit_{k}_accuracy"] == plain[f"eval_exit_{k}_accuracy"]


class Tied(nn.Module):
    """Token rows to logits; a weight has two names, as in encoder-decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.again = nn.Embedding(32, 8)
        self.again.weight = self.embed.weight
        self.block = nn.Linear(8, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids) + self.again(input_ids)
        mixed: Tensor = (self.block(hidden) * attention_mask[..., None]).mean(1)
        return self.fc(mixed)


def test_tied_weights_are_saved_and_stay_tied(tmp_path: Path) -> None:
    rows = [Texts()[i] for i in range(4)]
    example = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask")}
    model = offramp.attach(Tied(), example, exits=["block"])
    module = HuggingFaceModule(model)
    trainer_of(module, tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert torch.equal(saved["model.backbone.embed.weight"], model.backbone.embed.weight)
    assert torch.equal(saved["model.backbone.again.weight"], model.backbone.embed.weight)
    assert model.backbone.again.weight is model.backbone.embed.weight
    module.load_state_dict(saved)


def test_a_batch_without_labels_has_no_loss(model: MultiExitModel) -> None:
    batch = {"input_ids": Texts().ids[:2], "attention_mask": Texts().mask[:2]}
    assert set(HuggingFaceModule(model)(**batch)) == {"logits"}
    made = HuggingFaceModule(model)(**batch, labels=torch.tensor([0, 2]))
    assert list(made) == ["loss", "logits"]
    assert made["logits"].shape == (2, EXITS, CLASSES)


def test_a_backbone_alone_is_not_enough() -> None:
    with pytest.raises(DataError, match="HuggingFaceModule takes a MultiExitModel, but got a Lin"):
        HuggingFaceModule(nn.Linear(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [Distill(), Boosting(), Matched(), CrossEntropy()], ids=repr)
def test_an_objective_is_not_yet_a_loss(model: MultiExitModel, objective: Any) -> None:
    name = type(objective).__name__
    with pytest.raises(DataError, match=rf"got the objective {name}, .*ExitLoss\({name}\("):
        HuggingFaceModule(model, objective)


@pytest.mark.parametrize("objective", [Boosting(), Matched(Boosting()), Distill()], ids=repr)
def test_accuracies_are_of_what_is_answered(
    model: MultiExitModel, tmp_path: Path, objective: Any
) -> None:
    data = Texts(10, seed=1)
    labels = data.ids[:, 0] - 1
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        outputs = model(input_ids=data.ids, attention_mask=data.mask)
    logits = outputs.stack()
    answers = logits if isinstance(objective, Distill) else logits.cumsum(0)
    assert not torch.equal(logits.argmax(-1), logits.cumsum(0).argmax(-1))
    module = HuggingFaceModule(model, ExitLoss(objective))
    found = trainer_of(module, tmp_path, per_device_eval_batch_size=10).evaluate()
    hits = (answers.argmax(-1) == labels).double().mean(1).tolist()
    assert [found[f"eval_exit_{k}_accuracy"] for k in range(EXITS)] == pytest.approx(hits)
    assert found["eval_loss"] == pytest.approx(
        float(ExitLoss(objective)(outputs, labels)), rel=1e-5
    )
    batch = {"input_ids": data.ids, "attention_mask": data.mask, "labels": labels}
    made = module.train()(**batch)  # without dropout: the logits themselves, and the same loss
    torch.testing.assert_close(made["logits"], logits.transpose(0, 1), rtol=1e-4, atol=1e-5)
    assert made["loss"].item() == pytest.approx(found["eval_loss"], rel=1e-5)
