from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.build.batch import unpack
from offramp.build.model import MultiExitModel, attach
from offramp.errors import DataError
from offramp.train.exit_module import ExitModule, Standing
from offramp.train.freezing import trained_parts
from offramp.train.loop import fit
from offramp.train.phases import Phase
from offramp.train.schemes import Alternating, Heads, Joint, Layerwise
from tests.networks import example_of, make
from tests.train.tiny import data_of, digests, loader_of, model_of, parts


def test_layerwise_phases_divide_the_model() -> None:
    model = model_of()
    seen: list[str] = []
    for phase in Layerwise().plan(4, 4):
        seen += trained_parts(model, phase).parameters
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())


def test_joint_trains_everything_and_heads_only_heads() -> None:
    model = model_of()
    (joint,) = Joint().plan(4, 1)
    assert set(trained_parts(model, joint).parameters) == {n for n, _ in model.named_parameters()}
    assert trained_parts(model, joint).modules == frozenset(model.modules()) - {model.heads}
    (heads,) = Heads().plan(4, 1)
    found = trained_parts(model, heads)
    assert set(found.parameters) == {
        n for n, _ in model.named_parameters() if n.startswith("heads")
    }
    assert not found.modules & set(model.backbone.modules())


def test_what_a_phase_trains_runs_in_training_mode_and_nothing_else() -> None:
    model = model_of()
    phase = Layerwise().plan(4, 4)[1]
    trained = trained_parts(model, phase)
    trained.set_modes()
    on = {name for name, module in model.named_modules() if module.training}
    assert on == {
        *("backbone.blocks.1", *(f"backbone.blocks.1.{i}" for i in range(4))),
        *(n for n, m in model.named_modules() if n == "heads.1" or n.startswith("heads.1.")),
    }


@pytest.mark.parametrize("kind", ["cnn", "mlp", "encoder"])
def test_every_part_belongs_to_one_phase(kind: str) -> None:
    model = attach(make(kind), example_of(kind), exits=2)
    names: list[str] = []
    for phase in Layerwise().plan(3, 3):
        names += trained_parts(model, phase).parameters
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_flags_and_gradients_are_as_before_afterwards() -> None:
    model = model_of().train()
    model.backbone.fc.bias.requires_grad_(False)
    model.backbone.blocks[2].eval()
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    with trained_parts(model, Layerwise().plan(4, 4)[0]).only():
        assert sum(p.requires_grad for p in model.backbone.parameters()) == 4
        model(torch.randn(4, 6)).stack().sum().backward()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_what_the_user_froze_stays_frozen() -> None:
    model = model_of()
    for parameter in model.backbone.blocks[0].parameters():
        parameter.requires_grad_(False)
    (joint,) = Joint().plan(4, 1)
    trained = trained_parts(model, joint)
    assert not parts(model)["stage 0"] & set(trained.parameters)
    trained.set_modes()
    assert not model.backbone.blocks[0][1].training
    assert model.backbone.blocks[1][1].training


class NormEval(nn.Sequential):
    """Keeps the statistics of its first normalisation, as detectors do."""

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        self[1].eval()
        return self


def test_the_backbone_may_keep_a_part_in_evaluation_mode() -> None:
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)]
    backbone = NormEval(*layers, nn.Linear(8, 3))
    model = attach(backbone, torch.randn(4, 6), exits=["1"])
    fit(model, loader_of(), epochs=1, progress=False)
    assert int(backbone[1].num_batches_tracked) == 0
    assert int(backbone[3].num_batches_tracked) == 5
    with trained_parts(model, Heads().plan(2, 1)[0]).only():
        assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_alone_are_frozen_with_what_is_around_them(frozen: bool) -> None:
    norms = [nn.Sequential(nn.BatchNorm1d(8, affine=False)), nn.BatchNorm1d(8, affine=False)]
    backbone = nn.Sequential(nn.Linear(6, 8), norms[0], nn.ReLU(), norms[1], nn.Linear(8, 3))
    model = attach(backbone, torch.randn(4, 6), exits=["2"])
    backbone.requires_grad_(not frozen)
    before = digests(backbone)
    fit(model, loader_of(), epochs=1, progress=False)
    moved = {name for name, value in digests(backbone).items() if value != before[name]}
    assert moved == (set() if frozen else set(before))


def test_what_a_head_shares_with_the_backbone_is_frozen_with_it() -> None:
    norm = nn.BatchNorm1d(8)
    backbone = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 3))
    heads = [nn.Sequential(norm, nn.Dropout(), nn.Linear(8, 3))]
    model = attach(backbone, torch.randn(4, 6), exits=["0"], heads=heads)
    trained = trained_parts(model, Heads().plan(2, 1)[0])
    assert set(trained.parameters) == {"heads.0.2.weight", "heads.0.2.bias"}
    with trained.only():
        assert [module.training for module in heads[0]] == [False, True, True]


def test_nothing_left_to_train_is_an_error() -> None:
    model = model_of().requires_grad_(False)
    with pytest.raises(DataError, match="'joint' has nothing to train: all its parameters have"):
        trained_parts(model, Joint().plan(4, 1)[0])


def test_a_part_that_never_ran_belongs_to_one_phase() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8))
            self.fc = nn.Linear(8, 3)
            self.only_in_training = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.blocks(x))

    model = attach(Spare().eval(), torch.randn(4, 6), exits=["blocks.0", "blocks.1"])
    plan = Layerwise().plan(3, 3)
    spare = "backbone.only_in_training.weight"
    assert sum(spare in trained_parts(model, phase).parameters for phase in plan) == 1


def test_gradient_equilibrium_is_the_rescaling_of_the_paper() -> None:
    """Li et al. (2019) scale what flows back: at tap k, the trunk's part by (E-1-k)/(E-k) and the
    head's by 1/(E-k). Done here with hooks on the gradients themselves, as an oracle."""
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    model = model_of(dropout=0.0)
    trained = trained_parts(model, Joint(equilibrium=True).plan(4, 1)[0])

    def loss(outputs: list[Tensor]) -> Tensor:
        return torch.stack([nn.functional.cross_entropy(z, y) for z in outputs]).sum()

    loss(model(x).logits).backward()
    scaled = {
        name: p.grad * trained.scales(range(4)).get(name, 1.0)
        for name, p in trained.parameters.items()
        if p.grad is not None
    }
    model.zero_grad()

    def scale(value: Tensor, factor: float) -> Tensor:
        return value * factor + (value * (1 - factor)).detach()

    outputs, value, exits = [], x, 4
    for k, block in enumerate(model.backbone.blocks):
        value = block(value)
        if k < 3:
            outputs.append(model.heads[k](scale(value, 1 / (exits - k))))
            value = scale(value, (exits - 1 - k) / (exits - k))
    outputs.append(model.backbone.fc(value))
    loss(outputs).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(scaled[name], p.grad, msg=name)


def test_equilibrium_counts_the_supervised_exits_alone() -> None:
    model = model_of()
    phase = Phase("p", (0, 1, 2, 3), (0, 1, 2), (1, 3), equilibrium=True)
    scales = trained_parts(model, phase).scales({1, 3})
    assert {scales.get(f"backbone.blocks.{k}.0.weight") for k in (0, 1)} == {0.5}
    assert "backbone.blocks.2.0.weight" not in scales
    assert trained_parts(model, Alternating().plan(4, 1)[0]).scales(range(4)) == {}


def test_equilibrium_counts_the_exits_of_the_turn() -> None:
    """Steps on the last exit alone serve no other: their gradients are left as they are."""
    (phase,) = Alternating(equilibrium=True).phases(4)
    module = ExitModule(model_of(dropout=0.0), phase)
    module.standing = lambda index: Standing(0, index, 2)  # type: ignore[method-assign]
    module.start_epoch(0, 1)
    weight = module.model.backbone.blocks[0][0].weight
    batch = unpack(data_of(8))
    for step, served in enumerate((1, 4)):
        weight.grad = None
        module.training_step(batch, step).backward()
        plain = weight.grad.clone()
        module.on_before_optimizer_step(torch.optim.SGD([weight]))
        torch.testing.assert_close(weight.grad, plain / served)


def on_in(model: MultiExitModel, phase: Phase) -> set[str]:
    """Names in the backbone of what runs in training mode."""
    trained_parts(model, phase).set_modes()
    return {name for name, module in model.backbone.named_modules() if module.training}


def flat(dropout: float = 0.5) -> MultiExitModel:
    torch.manual_seed(0)
    blocks = [[nn.Linear(a, 8), nn.ReLU(), nn.Dropout(dropout)] for a in (6, 8)]
    backbone = nn.Sequential(*blocks[0], *blocks[1], nn.Linear(8, 3))
    return attach(backbone, torch.randn(4, 6), exits=["2", "5"])


def test_dropout_of_a_flat_network_is_active_in_its_stage() -> None:
    model = flat()
    layers = [{"0", "1", "2"}, {"3", "4", "5"}, {"6"}]
    assert [on_in(model, phase) for phase in Layerwise().plan(3, 3)] == layers
    assert on_in(model, Heads().plan(3, 1)[0]) == set()
    assert on_in(model, Joint().plan(3, 1)[0]) == {"", *map(str, range(7))}
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    assert on_in(model, Joint().plan(3, 1)[0]) == set()


def test_layerwise_trains_a_flat_network_with_its_dropout() -> None:
    ends = []
    for dropout in (0.0, 0.9):
        model = flat(dropout)
        fit(model, loader_of(), scheme="layerwise", epochs=3, progress=False, accelerator="cpu")
        ends.append(digests(model))
    assert {name for name in ends[0] if ends[0][name] == ends[1][name]} == set()


class Shared(nn.Module):
    """One dropout and one activation for all blocks; a dropout that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.spare, self.last = nn.Dropout(), nn.Dropout(), nn.Dropout()
        act = nn.ReLU()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, 8), act, nn.Sequential(nn.Dropout())) for a in (6, 8, 8)
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x) if k == 2 else self.drop(block(x))
        return self.fc(self.last(self.spare(x) if self.training else x))


def test_dropout_of_several_stages_is_active_where_all_are_trained() -> None:
    """It first runs after the first exit, and then after the second."""
    model = attach(Shared(), torch.randn(4, 6), exits=["blocks.0", "blocks.1"])
    block = [{f"blocks.{k}", f"blocks.{k}.0", f"blocks.{k}.2", f"blocks.{k}.2.0"} for k in range(3)]
    plan = Layerwise().plan(3, 3)
    assert [on_in(model, phase) for phase in plan] == [
        block[0],
        block[1],
        block[2] | {"last", "fc"},
    ]
    late = Phase("late", (1, 2), (1,), (1, 2))
    assert on_in(model, late) == {*block[1], *block[2], "drop", "last", "fc"}
    everything = {name for name, _ in model.backbone.named_modules()}
    assert on_in(model, Joint().plan(3, 1)[0]) == everything


def test_dropout_after_the_exit_of_its_block_belongs_to_the_next_stage() -> None:
    backbone = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Dropout()), nn.Linear(8, 3))
    model = attach(backbone, torch.randn(4, 6), exits=["0.0"])
    plan = Layerwise().plan(2, 2)
    assert [on_in(model, phase) for phase in plan] == [{"0", "0.0"}, {"0.1", "1"}]
