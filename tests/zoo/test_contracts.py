"""What every network of the zoo has to pass: as built, each sample as alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import offramp
from offramp.decide.policy import replay
from offramp.decide.trace import Trace
from offramp.zoo.branchynet import b_alexnet, b_lenet, b_resnet
from offramp.zoo.inception import inception_v1
from offramp.zoo.msdnet import msdnet
from offramp.zoo.shallow_deep import sdn_mobilenet, sdn_resnet, sdn_vgg16, sdn_wide_resnet

SMALL = {
    "b-lenet": (b_lenet, (1, 28, 28)),
    "b-alexnet": (b_alexnet, (3, 32, 32)),
    "b-resnet": (partial(b_resnet, 8), (3, 32, 32)),
    "inception-v1": (partial(inception_v1, 4, size=64, width=1 / 16), (3, 64, 64)),
    "sdn-vgg16": (partial(sdn_vgg16, 4, width=8), (3, 32, 32)),
    "sdn-resnet": (partial(sdn_resnet, 4, depth=14, width=4), (3, 32, 32)),
    "sdn-wide-resnet": (
        partial(sdn_wide_resnet, 4, depth=14, widening=2, width=4),
        (3, 32, 32),
    ),
    "sdn-mobilenet": (partial(sdn_mobilenet, 4, width=4), (3, 32, 32)),
    "msdnet": (partial(msdnet, 4, (1, 1, 2), width=4, growth=2), (3, 32, 32)),
}
FULL = {
    "b-resnet110": (b_resnet, (3, 32, 32)),
    "msdnet-full": (msdnet, (3, 32, 32)),
    "inception-v1-full": (partial(inception_v1, 20), (3, 224, 224)),
}


def made(build, shape):
    torch.manual_seed(0)
    model = build()
    for module in model.modules():  # small weights would make all samples alike
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    model.eval()
    x = torch.randn(max(6, model.num_exits + 2), *shape)  # some are left at the last exit
    with torch.no_grad():  # untrained heads say the same of every sample: let them differ
        for k, exit in enumerate(model(x).logits[:-1]):
            scale = 4 / exit.std(0).mean()
            weight, bias = list(model.heads[k].parameters())[-2:]
            weight.mul_(scale)
            bias.sub_(exit.mean(0)).mul_(scale)
    return model, x


def mixed_policy(model, x):
    """Thresholds between two neighbours' scores, so that some leave at every exit."""
    with torch.no_grad():
        logits = model(x).stack()
    best = logits.softmax(-1).amax(-1)
    thresholds = []
    left = torch.ones(len(x), dtype=torch.bool)
    for scores in best[:-1]:
        ordered = scores[left].sort().values
        middle = float(ordered[-2:].mean() if len(ordered) > 1 else ordered[0])
        thresholds.append(middle)
        left &= scores < middle
    zeros = torch.zeros(len(logits))
    trace = Trace(logits, None, torch.ones(len(logits)), zeros)
    policy = offramp.Policy("confidence", thresholds)
    return policy, replay(trace, policy)


def check(build, shape, engine, tolerance):
    model, x = made(build, shape)
    policy, replayed = mixed_policy(model, x)
    runner = offramp.Runner(model, policy, x, engine=engine)
    whole = runner(x)
    exits = torch.as_tensor(whole.exit)
    assert exits.unique().numel() >= 2
    assert torch.equal(exits, replayed.exit)
    logits = torch.as_tensor(whole.logits)
    tolerance *= max(1.0, float(replayed.logits.abs().max()))  # relative to the largest
    torch.testing.assert_close(logits, replayed.logits, rtol=0, atol=tolerance)
    for k in range(len(x)):
        alone = runner(x[k : k + 1])
        assert int(alone.exit[0]) == int(exits[k])
        torch.testing.assert_close(
            torch.as_tensor(alone.logits)[0], logits[k], rtol=0, atol=tolerance
        )
    last = runner.under(offramp.Policy("confidence", [1.1] * (model.num_exits - 1)))
    with torch.no_grad():
        full = model.backbone(x)
    torch.testing.assert_close(torch.as_tensor(last(x).logits), full, rtol=0, atol=tolerance)
    return model, policy, x


def check_export(build, shape, folder):
    model, x = made(build, shape)
    policy, replayed = mixed_policy(model, x)
    offramp.export(model, policy, x, folder)  # compares the file with the model before it returns
    answers = offramp.load(folder)(x)
    assert torch.equal(torch.as_tensor(answers.exit), replayed.exit)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", SMALL)
def test_runs_as_built_and_each_sample_as_alone(name, engine):
    check(*SMALL[name], engine, 1e-5 if engine == "torch" else 1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_is_exported_and_proven(name, tmp_path):
    check_export(*SMALL[name], tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size(name, tmp_path):
    check(*FULL[name], "torch", 1e-5)
    check_export(*FULL[name], tmp_path / name)
