from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

from offramp.analyse import evaluate
from offramp.build.batch import fingerprints, unpack
from offramp.build.digest import digest
from offramp.build.model import attach
from offramp.decide import Policy, Trace, calibrate
from offramp.decide.provenance import of_another_network
from offramp.decide.record import record
from offramp.errors import DataError, TraceError
from offramp.run.artifact import export
from offramp.run.runner import Runner
from tests.networks import example_of, make


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return attach(make("mlp"), example_of("mlp", 4), exits=2)


def batches(count=3, size=6, labels=True):
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        x = torch.randn(size, 12, generator=generator)
        y = torch.randint(0, 4, (size,), generator=generator)
        out.append((x, y) if labels else x)
    return out


def test_records_what_the_model_says(model):
    trace = record(model, batches(), progress=False)
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    model.eval()
    with torch.no_grad():
        direct = torch.stack(list(model(x)))
    torch.testing.assert_close(trace.logits, direct)
    assert torch.equal(trace.labels, y)
    assert trace.stage_costs.tolist() == list(model.costs.stages)
    assert trace.head_costs.tolist() == list(model.costs.heads)
    assert trace.places == (*model.places, "backbone")
    assert trace.source == "unknown"


def test_inputs_alone_and_mappings(model):
    assert record(model, batches(labels=False), progress=False).labels is None
    named = [{"x": x, "labels": y} for x, y in batches()]
    trace = record(model, named, progress=False, source="calibration")
    assert torch.equal(trace.logits, record(model, batches(), progress=False).logits)
    assert trace.source == "calibration"


def test_modes_come_back_and_no_gradient_is_kept(model):
    model.train()
    model.heads[0].eval()
    trace = record(model, batches(), progress=False)
    assert model.training
    assert model.backbone.training
    assert not model.heads[0].training
    assert not trace.logits.requires_grad
    model.eval()


def test_stops_after_so_many(model):
    trace = record(model, batches(), progress=False, max_samples=8)
    assert trace.num_samples == 8
    assert torch.equal(trace.labels, torch.cat([y for _, y in batches()])[:8])


def test_inputs_are_known_at_any_batch_size(model, tmp_path):
    trace = record(model, batches(), path=tmp_path / "t.safetensors", progress=False)
    rows = [(x[k : k + 1], y[k : k + 1]) for x, y in batches() for k in range(6)]
    assert torch.equal(record(model, rows, progress=False).inputs, trace.inputs)
    assert len(trace.inputs.unique()) == 18
    assert torch.equal(Trace.load(tmp_path / "t.safetensors").inputs, trace.inputs)


def test_training_samples_are_recognised(model):
    marks = torch.cat([fingerprints(unpack(batch)) for batch in batches()])
    model.training_fingerprints = marks.sort().values
    try:
        assert record(model, batches(), source="mine", progress=False).source == "training"
        other = [(x + 1, y) for x, y in batches()]
        assert record(model, other, source="mine", progress=False).source == "mine"
        runner = Runner(model, Policy("confidence", [0.9, 0.9]), batches()[0][0])
        assert record(runner, batches(), source="mine", progress=False).source == "training"
    finally:
        model.training_fingerprints = torch.empty(0, dtype=torch.int64)


def test_thresholds_of_another_network_are_noticed(model, tmp_path):
    x = torch.cat([x for x, _ in batches()])
    trace = record(model, batches(), path=tmp_path / "t.safetensors", progress=False)
    assert Trace.load(tmp_path / "t.safetensors").network == trace.network
    policy = calibrate(trace, max_cost=0.9)
    assert tuple(Policy.from_json(policy.to_json()).provenance["data"]["network"]) == trace.network
    Runner(model, policy, x)  # no warning
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.heads[0].classifier.bias += 1e-3
    with pytest.warns(UserWarning, match="another network"):
        Runner(trained, policy, x)
    with pytest.warns(UserWarning, match="another network"):
        export(trained, policy, x, tmp_path / "made")
    fresh = [(x + 1, y) for x, y in batches()]
    with pytest.warns(UserWarning, match="another network"):
        report = evaluate(record(trained, fresh, progress=False), policy)
    assert "another network" in report.notes[0]
    assert not evaluate(record(model, fresh, progress=False), policy).notes


def test_a_network_without_some_of_its_exits_is_no_other(tmp_path):
    torch.manual_seed(0)
    whole = attach(make("mlp"), example_of("mlp", 4), exits=2)
    kept = record(whole, batches(), progress=False).keep_exits([1])
    policy = calibrate(kept, max_cost=0.9)
    places, heads = [whole.places[1]], [whole.heads[1]]
    fewer = attach(whole.detach(), example_of("mlp", 4), exits=places, heads=heads)
    Runner(fewer, policy, example_of("mlp", 4))  # no warning
    assert not of_another_network(
        record(fewer, batches(), progress=False).network, policy.provenance
    )


@pytest.mark.parametrize("kind", ["wrapped", "last", "copied"])
def test_a_network_is_known_in_any_form(kind):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 700, 3), nn.Flatten(), nn.Linear(700, 2))
    other = copy.deepcopy(network)
    if kind == "wrapped":
        other = nn.ModuleDict({"module": other})
    elif kind == "last":
        other = other.to(memory_format=torch.channels_last)
    assert digest(other) == digest(network)
    assert digest(other.to(torch.float16)) != digest(network)


def test_statistics_tell_networks_apart_and_counts_do_not():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = digest(network)
    network[1].num_batches_tracked += 1
    assert digest(network) == before
    network[1].running_mean += 1
    assert digest(network) != before


class Interrupted(Exception):
    pass


class Counting(nn.Module):
    """Counts the batches that run through a model."""

    def __init__(self, model, stop_after=None):
        super().__init__()
        self.inner, self.calls, self.stop_after = model, 0, stop_after
        self.costs, self.places, self.num_exits = model.costs, model.places, model.num_exits

    def forward(self, x):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise Interrupted
        return self.inner(x)


def test_takes_up_where_it_stopped(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["offramp.decide.record"], "SHARD_BYTES", 1)
    path = tmp_path / "t.safetensors"
    with pytest.raises(Interrupted):
        record(Counting(model, stop_after=2), batches(), path=path, progress=False)
    assert not path.exists()
    second = Counting(model)
    trace = record(second, batches(), path=path, progress=False)
    assert second.calls == 1
    assert torch.equal(trace.logits, record(model, batches(), progress=False).logits)
    assert torch.equal(Trace.load(path).logits, trace.logits)
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_was_recorded_before_an_interruption_is_kept(model, tmp_path):
    """However little it was; but not where the data are at fault."""
    path = tmp_path / "t.safetensors"
    with pytest.raises(Interrupted):
        record(Counting(model, stop_after=2), batches(), path=path, progress=False)
    again = Counting(model)
    record(again, batches(), path=path, progress=False)
    assert again.calls == 1
    path.unlink()
    mixed = [*batches(1), *batches(1, labels=False)]
    with pytest.raises(DataError, match="labels for some batches"):
        record(model, mixed, path=path, progress=False)
    with pytest.raises(DataError, match="yielded no samples"):
        record(model, [], path=path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_recording_is_written_as_time_goes_by(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["offramp.decide.record"], "SHARD_SECONDS", 0.0)
    seen = []

    class Looking(Counting):
        def forward(self, x):
            seen.append(len(list(tmp_path.glob(".t.safetensors.shards/*.safetensors"))))
            return super().forward(x)

    record(Looking(model), batches(), path=tmp_path / "t.safetensors", progress=False)
    assert seen == [0, 1, 2]


def test_a_recording_of_what_has_other_exits_is_not_mixed_in(model, tmp_path):
    """Of a model that is no module, there are no parameters to compare."""

    class Plain:
        def __init__(self, costs, stop_after=None):
            self.model = Counting(model, stop_after)
            self.costs, self.places, self.num_exits = costs, model.places, model.num_exits

        def __call__(self, x):
            return self.model(x)

    path, other = tmp_path / "t.safetensors", dataclasses.replace(model.costs, unit="other")
    with pytest.raises(Interrupted):
        record(Plain(model.costs, stop_after=2), batches(), path=path, progress=False)
    with pytest.raises(TraceError, match="recording of another model"):
        record(Plain(other), batches(), path=path, progress=False)


def test_fewer_than_were_recorded_before_are_cut(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["offramp.decide.record"], "SHARD_BYTES", 1)
    path = tmp_path / "t.safetensors"
    with pytest.raises(Interrupted):
        record(Counting(model, stop_after=2), batches(), path=path, progress=False)
    trace = record(Counting(model), batches(), path=path, progress=False, max_samples=6)
    assert trace.num_samples == 6
    assert torch.equal(trace.labels, batches()[0][1])


def test_another_order_or_model_is_not_mixed_in(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["offramp.decide.record"], "SHARD_BYTES", 1)
    path = tmp_path / "t.safetensors"
    with pytest.raises(Interrupted):
        record(Counting(model, stop_after=2), batches(), path=path, progress=False)
    with pytest.raises(TraceError, match=r"samples 0\.\.5 are not those"):
        record(Counting(model), batches()[::-1], path=path, progress=False)
    torch.manual_seed(1)
    other = attach(make("mlp"), example_of("mlp", 4), exits=2)
    other.heads[0].state_dict()[next(iter(other.heads[0].state_dict()))].add_(1)
    with pytest.raises(TraceError, match="recording of another model"):
        record(Counting(other), batches(), path=path, progress=False)


def test_what_a_loader_may_not_do(model):
    with pytest.raises(DataError, match="yielded no samples"):
        record(model, [], progress=False)
    with pytest.raises(DataError, match="labels for some batches and none for others"):
        record(model, [*batches(1), *batches(1, labels=False)], progress=False)
    soft = [(x, torch.zeros(6, 4)) for x, _ in batches()]
    with pytest.raises(DataError, match="one class index for each sample"):
        record(model, soft, progress=False)
    nan = [(x * torch.nan, y) for x, y in batches()]
    with pytest.raises(TraceError, match="NaN or infinite in 18 of 18"):
        record(model, nan, progress=False)


def test_a_model_that_gives_other_exits_than_it_says(model):
    liar = Counting(model)
    liar.num_exits = 7
    with pytest.raises(TraceError, match="says it has 7 exits, but gave 3"):
        record(liar, batches(), progress=False)
