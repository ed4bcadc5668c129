from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from offramp.decide import Trace
from offramp.errors import TraceError
from tests.decide.rules import random_trace


def test_keeps_what_it_was_given_and_counts():
    trace = random_trace(30)
    assert (trace.num_exits, trace.num_samples, trace.num_classes) == (4, 30, 5)
    assert trace.logits.dtype == torch.float32
    assert trace.stage_costs.dtype == torch.float64
    assert trace.places == ("exit 0", "exit 1", "exit 2", "backbone")
    assert trace.full_cost == pytest.approx(1.0)


def test_exit_costs_are_stages_and_the_heads_that_ran():
    trace = Trace(torch.zeros(3, 2, 2), None, [4, 3, 2], [0.5, 0.25, 0])
    assert trace.exit_costs().tolist() == [4.5, 7.75, 9.75]
    assert trace.exit_costs([False, True]).tolist() == [4.0, 7.25, 9.25]
    with pytest.raises(TraceError, match="2 auxiliary exits of the trace, got 3"):
        trace.exit_costs([True] * 3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"logits": torch.zeros(3, 4)}, "none of them 0, got shape \\(3, 4\\)"),
        ({"logits": torch.zeros(4, 0, 5)}, "none of them 0"),
        ({"labels": torch.zeros(7)}, "labels of a trace must be one integer for each of the 30"),
        ({"labels": torch.full((30,), 5)}, "must lie in 0..4 .* from 5 to 5"),
        ({"labels": torch.full((30,), -1)}, "from -1 to -1"),
        ({"labels": torch.full((30,), 0.5)}, "with fractions"),
        ({"groups": torch.zeros(3)}, "groups of a trace"),
        ({"stage_costs": torch.ones(3)}, "one number for each of the 4 exits"),
        ({"stage_costs": torch.tensor([1.0, -1, 1, 1])}, "not negative"),
        ({"stage_costs": torch.zeros(4)}, "sum to 0"),
        ({"head_costs": torch.ones(4)}, "head_costs\\[-1\\] must be 0"),
        ({"places": ("a", "b")}, "2 places were given"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    with pytest.raises(TraceError, match=text):
        replace(random_trace(30), **change)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_found(bad):
    logits = random_trace(30).logits.clone()
    logits[2, 7, 3] = bad
    with pytest.raises(TraceError, match=r"exit 2 are NaN or infinite in 1 of 30 .*rows: \[7\]"):
        replace(random_trace(30), logits=logits)


def test_file_and_back(tmp_path):
    trace = replace(random_trace(30), groups=torch.arange(30) % 3, source="here", cost_unit="ms")
    trace.save(tmp_path / "a" / "t.safetensors")
    back = Trace.load(tmp_path / "a" / "t.safetensors")
    for name in ("logits", "labels", "groups", "stage_costs", "head_costs"):
        assert torch.equal(getattr(trace, name), getattr(back, name))
    assert (back.source, back.cost_unit, back.places) == ("here", "ms", trace.places)
    assert back.fingerprint == trace.fingerprint
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["t.safetensors"]


def test_foreign_missing_and_later_files(tmp_path):
    with pytest.raises(TraceError, match="There is no trace at"):
        Trace.load(tmp_path / "none")
    save_file({"x": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(TraceError, match="but not a trace of offramp"):
        Trace.load(tmp_path / "x")
    about = {"kind": "trace", "schema": 99}
    save_file({"x": torch.zeros(2)}, tmp_path / "y", metadata={"offramp": json.dumps(about)})
    with pytest.raises(TraceError, match="schema 99; this offramp reads up to 1"):
        Trace.load(tmp_path / "y")


def test_a_changed_file_is_found(tmp_path):
    path = tmp_path / "t"
    random_trace(30).save(path)
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1  # in the last of the logits
    path.write_bytes(bytes(raw))
    with pytest.raises(TraceError, match="damaged|NaN|labels"):
        Trace.load(path)


def test_split_parts_the_samples():
    trace = replace(random_trace(40), groups=torch.arange(40))
    one, two = trace.split(0.25, seed=3)
    assert one.num_samples == 10
    assert sorted([*one.groups.tolist(), *two.groups.tolist()]) == list(range(40))
    again, _ = trace.split(0.25, seed=3)
    assert torch.equal(one.groups, again.groups)
    with pytest.raises(TraceError, match="leaves one part empty"):
        trace.split(1.0)


def test_a_fingerprint_is_of_contents():
    trace = random_trace(30)
    labels = trace.labels.clone()
    labels[0] = (labels[0] + 1) % 5
    prints = {trace.fingerprint, replace(trace, labels=labels).fingerprint}
    prints |= {replace(trace, labels=None).fingerprint, random_trace(30, seed=1).fingerprint}
    assert len(prints) == 4
    assert replace(trace, source="other").fingerprint == trace.fingerprint


def test_kept_exits_cost_what_they_did():
    trace = Trace(torch.zeros(4, 2, 2), None, [1, 2, 3, 4], [0.1, 0.2, 0.3, 0])
    kept = trace.keep_exits([2, 0])
    assert kept.stage_costs.tolist() == [1, 5, 4]
    assert kept.head_costs.tolist() == [0.1, 0.3, 0]
    assert kept.places == ("exit 0", "exit 2", "backbone")
    assert trace.keep_exits([]).num_exits == 1
    with pytest.raises(TraceError, match=r"are 0\.\.2; got \[3\]"):
        trace.keep_exits([3])


@pytest.mark.parametrize("name", ["head_costs", "groups", "inputs"])
def test_changed_costs_and_groups_are_found(tmp_path, name):
    trace = random_trace(20)
    path = tmp_path / "a.safetensors"
    replace(trace, groups=torch.arange(20) % 2, inputs=torch.arange(20)).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
    tensors[name] = tensors[name].flip(0)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=about)
    with pytest.raises(TraceError, match="its costs, groups or inputs are not those"):
        Trace.load(path)


@pytest.mark.parametrize("missing", ["stage_costs", "places", "schema"])
def test_a_file_that_lacks_a_part_is_refused(tmp_path, missing):
    path = tmp_path / "a.safetensors"
    random_trace(20).save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["offramp"])
    tensors.pop(missing, None)
    about.pop(missing, None)
    save_file(tensors, path, metadata={"offramp": json.dumps(about)})
    with pytest.raises(TraceError, match=missing):
        Trace.load(path)
