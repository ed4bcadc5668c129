from __future__ import annotations

import copy
import math
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from offramp.build.batch import fingerprints, unpack
from offramp.build.model import attach
from offramp.errors import DataError
from offramp.train.loop import fit
from offramp.train.losses import cross_entropy, sample_losses
from offramp.train.objectives import CrossEntropy
from offramp.train.phases import Phase
from offramp.train.schemes import SCHEMES, Alternating, Joint, Layerwise
from tests.networks import example_of, make
from tests.train.tiny import Breaking, data_of, digests, loader_of, model_of, plain_model_of


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def quick(model: Any, loader: Any, **settings: Any) -> Any:
    """fit without a progress bar, on the CPU."""
    return fit(model, loader, **({"progress": False, "accelerator": "cpu"} | settings))


def batches_of(batch: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Batches in a fixed order."""
    x, y = data_of()
    return list(zip(x.split(batch), y.split(batch), strict=True))


# Independent oracles: the same training as a plain loop.


def test_joint_equals_a_plain_loop() -> None:
    fitted = model_of(dropout=0.0)
    plain = copy.deepcopy(fitted)
    weights = [0.3, 0.6, 0.8, 1.0]
    quick(
        fitted,
        batches_of(),
        scheme=Joint(weights=weights),
        epochs=3,
        optimizer=sgd,
        schedule="constant",
    )
    plain.train()
    optimizer = sgd(list(plain.parameters()))
    for _ in range(3):
        for x, y in batches_of():
            optimizer.zero_grad()
            cross_entropy(plain(x), y, weights).backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], value, msg=name)


def test_layerwise_equals_a_plain_loop() -> None:
    fitted = model_of(dropout=0.0)
    plain = copy.deepcopy(fitted)
    quick(
        fitted,
        batches_of(),
        scheme="layerwise",
        epochs=8,
        optimizer=sgd,
        schedule=lambda done: 1 - done,
    )
    plain.eval()
    for k in range(4):
        block = plain.backbone.blocks[k]
        head = plain.heads[k] if k < 3 else plain.backbone.fc
        block.train()
        head.train()
        optimizer = sgd([*block.parameters(), *head.parameters()])
        step = 0
        for _ in range(2):
            for x, y in batches_of():
                optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 10)
                with torch.no_grad():
                    for earlier in plain.backbone.blocks[:k]:
                        x = earlier(x)
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(block(x)), y).backward()
                optimizer.step()
                step += 1
        block.eval()
        head.eval()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], value, msg=name)


def test_gradients_are_summed_up_and_clipped_as_asked() -> None:
    fitted = model_of(dropout=0.0)
    plain = copy.deepcopy(fitted)
    settings: dict[str, Any] = {"optimizer": sgd, "schedule": "constant", "epochs": 1}
    quick(fitted, batches_of(4), accumulate=2, clip=0.5, **settings)
    plain.train()
    optimizer = sgd(list(plain.parameters()))
    for step, (x, y) in enumerate(batches_of(4), 1):
        (cross_entropy(plain(x), y) / 2).backward()
        if step % 2 == 0:
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], value, msg=name)


def test_the_last_step_is_the_mean_of_the_batches_that_are_left() -> None:
    """Seven batches, four a step: the second step has three."""
    fitted = plain_model_of()
    plain = copy.deepcopy(fitted)
    batches = batches_of(6)
    assert [len(y) for _, y in batches] == [6, 6, 6, 6, 6, 6, 4]
    quick(fitted, batches, accumulate=4, optimizer=sgd, schedule="constant", epochs=2)
    optimizer = sgd(list(plain.parameters()))
    for _ in range(2):
        for joined in (batches[:4], batches[4:]):
            optimizer.zero_grad()
            torch.stack([cross_entropy(plain(x), y) for x, y in joined]).mean().backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], value, msg=name)


def test_weights_may_follow_the_epoch() -> None:
    seen: list[int] = []

    def rising(epoch: int) -> list[float]:
        seen.append(epoch)
        return [float(epoch), 0.0, 0.0, 1.0]

    fitted = model_of(dropout=0.0)
    before = digests(fitted)
    quick(fitted, batches_of(), scheme=Joint(weights=rising), epochs=1, optimizer=sgd)
    assert seen == [0]
    same = {name for name, value in digests(fitted).items() if value == before[name]}
    assert "heads.0.weight" not in same  # weight decay moves it although its weight is 0
    plain = copy.deepcopy(model_of(dropout=0.0)).train()
    optimizer = sgd(list(plain.parameters()))
    fitted = model_of(dropout=0.0)
    quick(
        fitted,
        batches_of(),
        scheme=Joint(weights=rising),
        epochs=3,
        optimizer=sgd,
        schedule="constant",
    )
    assert seen == [0, 0, 1, 2]
    for epoch in range(3):
        for x, y in batches_of():
            optimizer.zero_grad()
            cross_entropy(plain(x), y, [float(epoch), 0.0, 0.0, 1.0]).backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], value, msg=name)


def test_gradient_equilibrium_scales_before_the_step() -> None:
    fitted = model_of(dropout=0.0)
    plain = copy.deepcopy(fitted).train()
    settings: dict[str, Any] = {"epochs": 1, "schedule": "constant"}
    descent = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    quick(fitted, batches_of(40), scheme=Joint(equilibrium=True), optimizer=descent, **settings)
    ((x, y),) = batches_of(40)
    cross_entropy(plain(x), y).backward()
    for name, parameter in plain.named_parameters():
        stage = next(
            (
                k
                for k in range(4)
                if name.removeprefix("backbone.") in dict(plain.stage_parameters(k))
            ),
            3,
        )
        factor = 1 / (4 - stage) if name.startswith("backbone") else 1.0
        assert parameter.grad is not None
        expected = parameter.detach() - 0.1 * factor * parameter.grad
        torch.testing.assert_close(
            dict(fitted.named_parameters())[name].detach(), expected, msg=name
        )


# What every scheme keeps.


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_gradients_are_switched_off(without: Any) -> None:
    model, plain = model_of(), model_of()
    with without():
        quick(model, loader_of(), epochs=1)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (without is torch.inference_mode)
    quick(plain, loader_of(), epochs=1)
    assert digests(model) == digests(plain)


def test_the_model_is_left_ready_for_use() -> None:
    model = model_of().train()
    flags = [p.requires_grad for p in model.parameters()]
    quick(model, loader_of(), scheme="layerwise", epochs=4)
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_randomness_of_others_is_left_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr, index]
    quick(model_of(), loader_of(), epochs=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert random.getstate() == states[2]


def test_no_file_is_written_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick(model_of(), loader_of(), epochs=1, validation=loader_of(16, seed=1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_progress_is_drawn_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    quick(model_of(), loader_of(), epochs=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 2/2" in err
    assert "joint" in err


def test_importing_does_not_import_lightning() -> None:
    code = "import sys, offramp.train.loop; print('lightning' in sys.modules)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# Reproducible.


def test_the_same_seed_gives_the_same_bytes_whatever_the_global_seed() -> None:
    runs = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        model = model_of()
        history = quick(model, loader_of(), epochs=2, seed=5)
        runs.append((digests(model), history.rows))
    assert runs[0] == runs[1]
    model = model_of()
    quick(model, loader_of(), epochs=2, seed=6)
    assert digests(model) != runs[0][0]


def test_validation_does_not_change_what_is_learned() -> None:
    with_it, without = model_of(), model_of()
    quick(with_it, loader_of(), epochs=2, validation=loader_of(16, seed=1))
    quick(without, loader_of(), epochs=2)
    assert digests(with_it) == digests(without)


def test_a_loader_with_its_own_generator_is_reproducible_too() -> None:
    runs = []
    for state in (1, 2):
        model = model_of()
        generator = torch.Generator().manual_seed(state)
        quick(model, loader_of(generator=generator), epochs=2)
        runs.append(digests(model))
    assert runs[0] == runs[1]


# What the history says.


def test_history_holds_what_happened() -> None:
    model = model_of(dropout=0.0)
    validation = loader_of(24, 10, seed=1, shuffle=False)
    history = quick(model, loader_of(), scheme="layerwise", epochs=5, validation=validation)
    assert [row.phase for row in history] == ["exit 0", "exit 0", "exit 1", "exit 2", "backbone"]
    assert [row.epoch for row in history] == [1, 2, 3, 4, 5]
    assert [[loss is not None for loss in row.train_loss] for row in history[1:3]] == [
        [True, False, False, False],
        [False, True, False, False],
    ]
    x, y = data_of(24, seed=1)
    with torch.no_grad():
        outputs = model(x)
    expected = [(z.argmax(1) == y).double().mean().item() for z in outputs]
    assert history[-1].val_accuracy == pytest.approx(expected)
    losses = [nn.functional.cross_entropy(z, y).item() for z in outputs]
    assert history[-1].val_loss == pytest.approx(losses, rel=1e-5)
    lines = str(history).splitlines()
    assert lines[0].endswith("validation accuracy")
    columns = "epoch  phase  loss  exit 0  exit 1  exit 2  backbone  seconds"
    assert lines[1].split() == columns.split()
    assert f"{100 * expected[3]:.2f} %" in lines[-1]
    assert len(history.to_dict()["epochs"]) == 5


def test_the_first_row_counts_the_batches_as_they_were_seen() -> None:
    model = model_of(dropout=0.0)
    plain = copy.deepcopy(model).train()
    still = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    history = quick(model, batches_of(), epochs=1, optimizer=still)
    losses, hits = torch.zeros(4), torch.zeros(4)
    for x, y in batches_of():
        outputs = plain(x)
        losses += torch.stack([nn.functional.cross_entropy(z, y) for z in outputs]).detach() / 5
        hits += torch.stack([(z.argmax(1) == y).sum() for z in outputs])
    assert history[0].train_loss == pytest.approx(losses.tolist(), rel=1e-5)
    assert history[0].train_accuracy == pytest.approx((hits / 40).tolist())


# Loaders of many kinds.


def test_mappings_and_masks() -> None:
    model = attach(make("encoder"), example_of("encoder"), exits=2)
    x: Any = example_of("encoder", 16)
    items = [x | {"labels": torch.arange(16) % 3}]
    history = quick(model, items, epochs=2)
    assert len(history) == 2


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Has no length."""

    def __iter__(self) -> Any:
        return iter(zip(*data_of(), strict=True))


def test_a_loader_without_a_length() -> None:
    loader = DataLoader(Stream(), batch_size=8)
    model = model_of()
    plain = model_of()
    quick(model, loader, epochs=3, schedule="constant")
    quick(plain, batches_of(), epochs=3, schedule="constant")
    assert digests(model) == digests(plain)


def test_without_a_length_an_epoch_is_trained_at_the_rate_of_its_middle() -> None:
    asked: list[float] = []

    def noted(part: float) -> float:
        asked.append(part)
        return 1 - part

    history = quick(model_of(), DataLoader(Stream(), 20), epochs=2, schedule=noted, lr=0.1)
    assert asked == [0.25, 0.25, 0.75, 0.75]
    assert [row.lr for row in history] == pytest.approx([0.075, 0.025])


def test_workers() -> None:
    model = model_of()
    # Not forked off a process in which engines have threads of their own.
    loader = loader_of(num_workers=1, multiprocessing_context="forkserver")
    quick(model, loader, epochs=1)
    plain = model_of()
    quick(plain, loader_of(), epochs=1)
    assert digests(model) == digests(plain)


def test_samples_are_remembered() -> None:
    model = model_of()
    loader = loader_of()
    quick(model, loader, epochs=2)
    expected = fingerprints(unpack(data_of())).sort().values
    assert torch.equal(model.training_fingerprints, expected)
    quick(model, loader_of(8, seed=3), epochs=1)
    assert len(model.training_fingerprints) == 48


def test_half_precision() -> None:
    model = model_of()
    history = quick(model, loader_of(), epochs=1, precision="bf16-mixed")
    assert all(loss is not None and math.isfinite(loss) for loss in history[0].train_loss)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_objective_may_be_a_plain_function() -> None:
    def doubled(
        outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        return 2 * sample_losses(outputs, labels, exits)

    still = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    twice = quick(
        model_of(dropout=0.0), batches_of(), scheme=Joint(doubled), epochs=1, optimizer=still
    )
    once = quick(model_of(dropout=0.0), batches_of(), epochs=1, optimizer=still)
    for a, b in zip(twice[0].train_loss, once[0].train_loss, strict=True):
        assert a == pytest.approx(2 * b)


def test_learned_weights_are_learned() -> None:
    held: list[nn.Parameter] = []

    def keep(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        held.append(parameters[-1])
        return torch.optim.SGD(parameters, lr=0.1)

    quick(model_of(), loader_of(), scheme=Joint(weights="learned"), epochs=2, optimizer=keep)
    assert held[0].shape == (4,)
    assert (held[0] != 0).all()


def test_alternating_supervises_in_turn() -> None:
    calls: list[tuple[int, ...]] = []

    def noted(
        outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        calls.append(tuple(exits or ()))
        return sample_losses(outputs, labels, exits)

    scheme = SCHEMES["alternating"](noted)
    quick(model_of(), batches_of(), scheme=scheme, epochs=2)
    assert calls == [(3,), (0, 1, 2, 3)] * 5


# A user's own loop.


def test_ten_lines_of_plain_pytorch() -> None:
    model = model_of(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model.train()
    for _ in range(20):
        for x, y in loader_of(128, 32):
            loss = cross_entropy(model(x), y, weights=[0.3, 0.5, 0.7, 1.0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    x, y = data_of(64, seed=1)
    assert all((logits.argmax(1) == y).float().mean() > 0.7 for logits in model(x))


# Bad input.


class Labels(Dataset[tuple[Tensor, Any]]):
    """Data with labels as they are given."""

    def __init__(self, labels: Tensor) -> None:
        self.x, self.labels = data_of(len(labels))[0], labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.x[index], self.labels[index]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.zeros(8), r"Batch 0 of the training loader has labels of type torch.float32"),
        (torch.full((8,), 3), r"has label 3, out of range: the backbone has 3 classes"),
        (torch.full((8,), -1), r"has label -1, out of range"),
        (torch.zeros(8, 1, dtype=torch.int64), r"has labels of shape \(8, 1\). Expected \(B,\)"),
    ],
)
def test_wrong_labels(labels: Tensor, text: str) -> None:
    with pytest.raises(DataError, match=text):
        quick(model_of(), DataLoader(Labels(labels), batch_size=8), epochs=1)


def test_wrong_label_in_validation_is_found_before_training() -> None:
    model = model_of()
    before = digests(model)
    validation = DataLoader(Labels(torch.full((8,), 7)), batch_size=8)
    with pytest.raises(DataError, match="Batch 0 of the validation loader has label 7"):
        quick(model, loader_of(), epochs=1, validation=validation)
    assert digests(model) == before


def test_no_labels() -> None:
    with pytest.raises(DataError, match="Batch 0 of the training loader has no labels"):
        quick(model_of(), [data_of()[0]], epochs=1)


def test_no_batch() -> None:
    with pytest.raises(DataError, match="The training loader yields no batch: its length is 0"):
        quick(model_of(), [], epochs=1)
    with pytest.raises(DataError, match="yields no batch: its length is 0"):
        quick(model_of(), loader_of(4, 8, drop_last=True), epochs=1)


def test_a_generator_can_be_walked_only_once() -> None:
    with pytest.raises(DataError, match="yields no batch in epoch 2. A generator"):
        quick(model_of(), iter(batches_of()), epochs=2)
    with pytest.raises(DataError, match="yields no batch in epoch 1"):
        quick(model_of(), iter([]), epochs=2)


def test_one_sample_left_over_for_batch_normalisation() -> None:
    with pytest.raises(DataError, match=r"Batch 2 .* holds one sample.* drop_last=True"):
        quick(model_of(), loader_of(17, 8), epochs=1)
    quick(model_of(), loader_of(17, 8), scheme="heads", epochs=1)  # nothing normalises here


def test_one_class_is_worth_a_warning() -> None:
    labels = torch.ones(16, dtype=torch.int64)
    with pytest.warns(UserWarning, match="All labels of the training loader are 1"):
        quick(model_of(), DataLoader(Labels(labels), batch_size=8), epochs=2)


def test_validating_on_training_data_is_refused() -> None:
    with pytest.raises(
        DataError, match="shares samples with the training loader: at least 8 of its 16"
    ):
        quick(
            model_of(), loader_of(shuffle=False), epochs=1, validation=loader_of(16, shuffle=False)
        )


def test_validating_on_data_of_an_earlier_training_is_refused() -> None:
    model = model_of()
    quick(model, loader_of(), epochs=1)
    with pytest.raises(DataError, match="shares samples"):
        quick(model, loader_of(seed=1), epochs=1, validation=loader_of())


def test_a_few_shared_samples_are_worth_a_warning() -> None:
    x, y = data_of(200, seed=1)
    x[0] = data_of()[0][0]
    validation = DataLoader(TensorDataset(x, y), batch_size=50)
    with pytest.warns(UserWarning, match="1 of the 200 validation samples are also"):
        quick(model_of(), loader_of(), epochs=1, validation=validation)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scheme": "jiont"}, "Unknown scheme 'jiont'. Did you mean 'joint'"),
        ({"epochs": 0}, "needs at least one epoch"),
        ({"schedule": "cosin"}, "Unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"optimizer": sgd, "lr": 0.1}, "lr is for the default optimizer"),
        ({"scheme": Joint(weights=[1.0])}, "1 weights were given for 4 exits"),
        ({"scheme": [Phase("p", (9,), (), (0,))]}, "'p' names stages"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'. Expected a function from the list of trained"),
        (
            {"optimizer": sgd([nn.Parameter(torch.ones(1))])},
            "optimizer is SGD. Expected a function",
        ),
        ({"schedule": None}, "schedule=None: expected 'constant' or 'cosine', or a function"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        quick(model_of(), loader_of(), **settings)


def test_a_backbone_alone_is_not_enough() -> None:
    with pytest.raises(DataError, match="fit trains a MultiExitModel, but got a Linear"):
        quick(nn.Linear(6, 3), loader_of())


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    model = model_of()
    everything = lambda _: sgd(list(model.parameters()))  # noqa: E731
    with pytest.raises(DataError, match="holds parameters that phase 'exit 0' does not train"):
        quick(model, loader_of(), scheme=Layerwise(), epochs=4, optimizer=everything)


def test_an_objective_of_the_wrong_shape_is_refused() -> None:
    def scalar(
        outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        return sample_losses(outputs, labels, exits).mean()

    with pytest.raises(DataError, match=r"returned shape \(\). Expected \(4, 8\)"):
        quick(model_of(), batches_of(), scheme=Joint(scalar), epochs=1)


def test_labels_that_are_not_one_per_row() -> None:
    x, y = data_of(8)
    with pytest.raises(DataError, match="has 6 labels, but the model gives 8 rows"):
        quick(model_of(), [(x, y[:6])], epochs=1)


def test_control_c_comes_through() -> None:
    model = model_of()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        quick(model, Breaking(loader_of(), 3, KeyboardInterrupt()), epochs=1)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_phase_may_take_smaller_steps() -> None:
    phases = [Phase("a", (0,), (0,), (0,)), Phase("b", (0,), (0,), (0,), lr_scale=0.1)]
    history = quick(model_of(), loader_of(), scheme=phases, schedule="constant", lr=0.5)
    assert [row.lr for row in history] == pytest.approx([0.5, 0.05])


def test_every_epoch_draws_its_own_dropout() -> None:
    seeds: list[int] = []

    def noted(
        outputs: Sequence[Tensor], labels: Tensor, exits: Sequence[int] | None = None
    ) -> Tensor:
        seeds.append(torch.initial_seed())
        return sample_losses(outputs, labels, exits)

    quick(model_of(), loader_of(40, 40), scheme=Layerwise(noted), epochs=6)
    assert len(seeds) == len(set(seeds)) == 6


def test_each_exit_has_its_own_loss_in_whatever_order_they_are_named() -> None:
    found = []
    for exits in ((0, 1, 2, 3), (2, 0, 3, 1)):
        model = model_of(dropout=0.0)
        phase = Phase("p", (0, 1, 2, 3), (0, 1, 2), exits)
        found.append(quick(model, loader_of(shuffle=False), scheme=[phase]).rows[0].train_loss)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"accumulate": 0}, "accumulate=0: expected 1 or more"),
        ({"lr": -1.0}, "lr=-1.0: expected a learning rate above 0"),
        ({"clip": -1.0}, "clip=-1.0: expected a norm above 0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0: expected 1 or more"),
    ],
)
def test_settings_that_would_do_nothing(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        quick(model_of(), loader_of(), **settings)


def test_turns_are_of_steps_also_where_several_batches_make_one() -> None:
    seen: list[tuple[int, ...]] = []

    def noted(outputs: Any, labels: Tensor, exits: Any = None) -> Tensor:
        seen.append(tuple(exits))
        return CrossEntropy()(outputs, labels, exits)

    quick(model_of(), batches_of()[:5], scheme=Alternating(noted), epochs=2, accumulate=2)
    steps = [seen[0:2], seen[2:4], seen[4:5], seen[5:7], seen[7:9], seen[9:10]]
    assert all(len(set(step)) == 1 for step in steps)
    assert [len(step[0]) for step in steps] == [1, 4, 1, 4, 1, 4]


@pytest.mark.parametrize("batch", [40, 20, 14])
def test_turns_go_on_from_epoch_to_epoch_without_a_length(batch: int) -> None:
    """Also where an epoch is a single step: else no head would ever be trained."""
    calls: list[tuple[int, ...]] = []

    def noted(outputs: Any, labels: Tensor, exits: Any = None) -> Tensor:
        calls.append(tuple(exits))
        return CrossEntropy()(outputs, labels, exits)

    loader = DataLoader(Stream(), batch_size=batch)
    quick(model_of(), loader, scheme=Alternating(noted), epochs=4)
    steps = math.ceil(40 / batch)
    assert [len(exits) for exits in calls[::steps]] == [1, 4, 1, 4]


def test_weights_may_be_an_array() -> None:
    model, plain = model_of(), model_of()
    weights: Any = np.array([0.25, 0.5, 0.75, 1.0])
    quick(model, batches_of(), scheme=Joint(weights=weights), epochs=1)
    quick(plain, batches_of(), scheme=Joint(weights="linear"), epochs=1)
    assert digests(model) == digests(plain)
