"""Stages own modules and parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.build.model import attach
from tests.networks import example_of, make


@pytest.mark.parametrize("kind", ["cnn", "mlp", "encoder"])
def test_every_parameter_and_module_belongs_to_one_stage(kind):
    model = attach(make(kind), example_of(kind))
    stages = range(model.num_exits)
    names = [name for k in stages for name, _ in model.stage_parameters(k)]
    assert sorted(names) == sorted(name for name, _ in model.backbone.named_parameters())
    modules = [name for k in stages for name, _ in model.stage_modules(k)]
    owners = [
        name
        for name, module in model.backbone.named_modules()
        if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False))
    ]
    assert sorted(modules) == sorted(owners)


def test_stages_of_the_residual_network():
    model = attach(make("cnn"), example_of("cnn"), exits=["layer1.0", "layer2"])
    stages = [{name.rpartition(".")[0] for name, _ in model.stage_parameters(k)} for k in range(3)]
    assert stages[0] == {"stem"} | {f"layer1.0.{m}" for m in ("conv1", "bn1", "conv2", "bn2")}
    assert "layer1.1.conv1" in stages[1]
    assert "layer2.1.bn2" in stages[1]
    assert "layer3.0.shortcut" in stages[2]
    assert "fc" in stages[2]
    assert [{name for name, _ in model.stage_modules(k)} for k in range(3)] == stages
    assert model.stage_modules(3) == []


@pytest.mark.parametrize("kind", ["cnn", "mlp", "encoder"])
def test_an_exit_has_gradients_in_its_stages_and_nowhere_else(kind):
    model = attach(make(kind), example_of(kind)).train()
    example = example_of(kind)
    for k in range(model.num_exits):
        model.zero_grad()
        outputs = model(**example) if isinstance(example, dict) else model(example)
        outputs[k].square().sum().backward()
        for stage in range(model.num_exits):
            for name, parameter in model.stage_parameters(stage):
                assert (parameter.grad is None) == (stage > k), (k, stage, name)


class Late(nn.Module):
    """The root owns a parameter that is read at the end, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(8))
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.output = nn.Parameter(torch.randn(8, 3))
        self.unused = nn.Linear(2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x + self.position)
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return x @ self.output


def test_parameters_count_by_use_not_by_owner():
    model = attach(Late(), torch.randn(3, 8), exits=["body.1"])
    stage = {name: k for k in range(2) for name, _ in model.stage_parameters(k)}
    assert stage["position"] == 0
    assert stage["output"] == 1
    assert stage["unused.weight"] == 0
    assert stage["attention.out_proj.weight"] == 1  # read without a call of its owner
    modules = {name: k for k in range(2) for name, _ in model.stage_modules(k)}
    assert modules["attention.out_proj"] == 1
    assert modules["body.2"] == 1


def test_parameters_that_are_parts_of_one_vector():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    separate = attach(net, torch.randn(2, 4), exits=["1", "3"])
    wanted = [[name for name, _ in separate.stage_parameters(k)] for k in range(3)]
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(vector, net.parameters())
    model = attach(net, torch.randn(2, 4), exits=["1", "3"])
    assert [[name for name, _ in model.stage_parameters(k)] for k in range(3)] == wanted
