"""A cascade when it runs: the previous logits cross the cut, also those of an exit that is off."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.build.model import MultiExitModel, attach
from offramp.decide.policy import Policy, replay
from offramp.decide.pruning import prune_exits
from offramp.errors import PolicyError, StageError
from offramp.run.graph import cut
from offramp.run.runner import Runner
from tests.networks import example_of, make
from tests.run.conftest import KINDS, rows_of

OFF = math.inf
PATTERNS = {"all on": (1, 1, 1), "first off": (0, 1, 1), "middle off": (1, 0, 1), "last": (0, 0, 1)}


@cache
def cascaded(kind: str) -> MultiExitModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = attach(make(kind), example_of(kind, 5), exits=3, cascade=True).eval()
        for name, linear in model.heads.named_modules():
            if isinstance(linear, nn.Linear):
                own = 6.0 if kind == "cnn" and not name.endswith("link") else 0.3
                nn.init.normal_(linear.weight, std=own)
    return model


def eager(kind: str, x: Tensor | dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(cascaded(kind)(**x) if isinstance(x, dict) else cascaded(kind)(x))


def thresholds_of(kind: str, pattern: str) -> list[float]:
    """Such that about half of the rows leave at each exit that is on."""
    logits = eager(kind, example_of(kind, 64, seed=2))[:-1]
    scores = [torch.softmax(z, -1).max(-1).values for z in logits]
    on = PATTERNS[pattern]
    return [float(s.median()) if o else OFF for s, o in zip(scores, on, strict=True)]


def check(result: object, kind: str, x: Tensor | dict[str, Tensor], limits: list[float]) -> None:
    """Against the model itself, row by row: the exit where the score reaches the threshold."""
    logits = eager(kind, x)
    for row, (exit, answer) in enumerate(zip(result.exit, result.logits, strict=True)):
        scores = [float(torch.softmax(z[row], -1).max()) for z in logits[:-1]]
        if min(abs(s - t) for s, t in zip(scores, limits, strict=True)) < 1e-4:
            continue
        leaves = [k for k, (s, t) in enumerate(zip(scores, limits, strict=True)) if s >= t]
        assert int(exit) == (leaves or [3])[0]
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(torch.as_tensor(answer), logits[int(exit)][row], **close)


@pytest.mark.parametrize(
    ("engine", "kind", "pattern"),
    [
        *(("torch", "mlp", pattern) for pattern in PATTERNS),
        ("onnxruntime", "mlp", "middle off"),
        ("torch", "cnn", "middle off"),
        ("torch", "encoder", "middle off"),
        pytest.param("onnxruntime", "cnn", "middle off", marks=pytest.mark.slow),
        pytest.param("onnxruntime", "encoder", "all on", marks=pytest.mark.slow),
        pytest.param("onnxruntime", "encoder", "middle off", marks=pytest.mark.slow),
    ],
)
def test_every_sample_gets_what_the_model_says(engine: str, kind: str, pattern: str) -> None:
    limits = thresholds_of(kind, pattern)
    policy = Policy("confidence", limits)
    runner = Runner(cascaded(kind), policy, example_of(kind, 5), engine=engine)
    x = example_of(kind, 64, seed=2)
    result = runner(x)
    check(result, kind, x, limits)
    assert len(result.exit.unique()) >= 2  # or the equality would say little
    for row in range(3):
        alone = runner(rows_of(x, slice(row, row + 1)))
        assert alone.exit[0] == result.exit[row]
        torch.testing.assert_close(alone.logits[0], result.logits[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("mlp", "all on"),
        ("mlp", "middle off"),
        pytest.param("encoder", "middle off", marks=pytest.mark.slow),
    ],
)
def test_the_file_answers_as_the_model(kind, pattern, tmp_path):
    limits = thresholds_of(kind, pattern)
    policy = Policy("confidence", limits)
    offramp.export(cascaded(kind), policy, example_of(kind, 5), tmp_path / "net.offramp")
    x = example_of(kind, 64, seed=2)
    check(offramp.load(tmp_path / "net.offramp")(x), kind, x, limits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_previous_logits_are_a_live_value(kind: str) -> None:
    staged = cut(cascaded(kind), example_of(kind, 5))
    x = example_of(kind, 5)
    values = dict(zip(staged.inputs, staged.call.tensors, strict=True))
    previous: list[Tensor] = []
    for stage, logits in zip(staged.stages, eager(kind, x), strict=True):
        own = [values[name] for name in stage.inputs]
        if stage.exit in (1, 2):
            assert any(v.shape == previous[-1].shape and torch.equal(v, previous[-1]) for v in own)
        with torch.no_grad():
            got, *made = stage.module(*own)
        values.update(zip(stage.outputs, made, strict=True))
        torch.testing.assert_close(got, logits)
        previous.append(got)


def test_a_head_behind_an_exit_that_is_off_runs_once_where_it_is_needed() -> None:
    """Dropping exit 1 moves its head into the stage of exit 2; dropping 2 as well drops it."""

    def products(exits: list[int]) -> int:
        stages = cut(cascaded("mlp"), example_of("mlp", 5), exits).stages
        nodes = [node for stage in stages for node in stage.module.graph.nodes]
        return sum(str(node.target) == "aten.linear.default" for node in nodes)

    every = products([0, 1, 2])
    assert products([0, 2]) == every
    assert products([0]) == every - 4  # two heads and their links


class RowGate(nn.Module):
    """Branches on values, which export refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.relu() if row.sum() > 0 else row for row in x])


def test_what_is_cut_by_hand_hands_on_no_logits_and_says_so() -> None:
    net = nn.Sequential(nn.Linear(6, 8), RowGate(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    example = torch.randn(4, 6)
    plain = attach(net, example, exits=["1", "2"])
    Runner(plain, Policy("confidence", [0.5, 0.5]), example, engine="torch")
    plain.detach()
    model = attach(net, example, exits=["1", "2"], cascade=True)
    with pytest.raises(StageError, match=r"torch\.export refuses this model"):
        Runner(model, Policy("confidence", [0.5, 0.5]), example, engine="torch")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_heads_that_later_ones_read_are_counted(pattern: str) -> None:
    model, limits = cascaded("mlp"), thresholds_of("mlp", pattern)
    x = example_of("mlp", 64, seed=2)
    policy = Policy("confidence", limits)
    trace = offramp.record(model, [(x, torch.zeros(64, dtype=torch.long))], progress=False)
    runner = Runner(model, policy, example_of("mlp", 5))
    runner(x)
    heads = model.costs.heads
    last = max((k for k, limit in enumerate(limits) if limit < OFF), default=-1)
    paid = [sum(heads[: min(k, last) + 1]) + sum(model.costs.stages[: k + 1]) for k in range(4)]
    exits = replay(trace, policy).exit
    wanted = sum(paid[int(k)] for k in exits) / 64
    assert runner.stats.mean_cost == pytest.approx(wanted)
    assert float(replay(trace, policy).cost.mean()) == pytest.approx(wanted)


def test_a_trace_knows_that_its_exits_are_in_a_cascade(tmp_path: Path) -> None:
    model = cascaded("mlp")
    batch = (example_of("mlp", 30), torch.zeros(30, dtype=torch.long))
    trace = offramp.record(model, [batch], path=tmp_path / "trace.safetensors", progress=False)
    again = offramp.Trace.load(tmp_path / "trace.safetensors")
    assert trace.cascade
    assert again.cascade
    fewer = again.keep_exits([0, 2])
    assert fewer.head_costs.tolist() == [
        trace.head_costs[0], float(trace.head_costs[1:3].sum()), 0.0
    ]  # fmt: skip
    with pytest.raises(PolicyError, match="Exits of a cascade cannot be pruned"):
        prune_exits(again, 0.9)
