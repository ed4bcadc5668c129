from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.decide.calibrate import calibrate
from offramp.decide.policy import Policy, replay
from offramp.decide.trace import Trace
from offramp.errors import Infeasible, PolicyError, TraceError


def trace_of(samples: int = 200, seed: int = 0, source: str = "calibration") -> Trace:
    """Three exits, each better than the one before."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (samples,), generator=generator)
    logits = torch.randn(3, samples, 5, generator=generator)
    for k, strength in enumerate((1.0, 2.0, 4.0)):
        logits[k, torch.arange(samples), labels] += strength
    costs, heads = torch.tensor([10.0, 10.0, 10.0]), torch.tensor([0.5, 0.5, 0.0])
    return Trace(logits, labels, costs, heads, source=source)


def by_hand(trace: Trace, thresholds: list[float]) -> tuple[list[int], list[float]]:
    exits, costs = [], []
    for row in range(trace.num_samples):
        cost = 0.0
        for k in range(3):
            cost += float(trace.stage_costs[k])
            if k == 2:
                break
            if thresholds[k] < math.inf:
                cost += float(trace.head_costs[k])
            if torch.softmax(trace.logits[k, row], -1).max() >= thresholds[k]:
                break
        exits.append(k)
        costs.append(cost)
    return exits, costs


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(st.floats(0.2, 1.1), st.just(math.inf)), min_size=2, max_size=2))
def test_replay_is_the_loop_by_hand(thresholds: list[float]) -> None:
    trace = trace_of(40)
    found = replay(trace, Policy("confidence", thresholds))
    exits, costs = by_hand(trace, thresholds)
    assert found.exit.tolist() == exits
    assert found.cost.tolist() == pytest.approx(costs)
    rows = torch.arange(40)
    assert torch.equal(found.logits, trace.logits[found.exit, rows])


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 1.0), st.floats(0.0, 0.5))
def test_a_higher_threshold_never_exits_earlier(threshold: float, more: float) -> None:
    trace = trace_of(60)
    low = replay(trace, Policy("confidence", [threshold, threshold])).exit
    high = replay(trace, Policy("confidence", [threshold + more, threshold + more])).exit
    assert (high >= low).all()


def test_a_threshold_is_reached_at_equality() -> None:
    trace = trace_of(10)
    score = torch.softmax(trace.logits[0], -1).max(-1).values
    assert replay(trace, Policy("confidence", [float(score[3]), math.inf])).exit[3] == 0
    above = float(torch.nextafter(score[3], torch.tensor(2.0)))
    assert replay(trace, Policy("confidence", [above, math.inf])).exit[3] == 2


def test_nats_are_the_entropy_of_branchynet() -> None:
    trace = trace_of(50)
    p = torch.softmax(trace.logits[0].double(), -1)
    entropy = -(p * p.log()).sum(-1)
    found = replay(trace, Policy("entropy", nats=[0.7, 0.0]))
    assert torch.equal(found.exit == 0, entropy <= 0.7)


def test_patience_counts_equal_predictions() -> None:
    trace = trace_of(50)
    found = replay(trace, Policy("patience", [math.inf, 1.0]))
    agree = trace.logits[0].argmax(-1) == trace.logits[1].argmax(-1)
    assert torch.equal(found.exit == 1, agree)


@pytest.mark.parametrize("name", ["confidence", "entropy", "margin", "patience"])
def test_a_policy_survives_its_file(name: str, tmp_path: Path) -> None:
    policy = Policy(name, [0.123456789, math.inf], {"summary": "by a test"})
    policy.save(tmp_path / "policy.json")
    again = Policy.load(tmp_path / "policy.json")
    assert again.to_json() == policy.to_json()
    (tmp_path / "policy.json").write_text((tmp_path / "policy.json").read_text()[:40])
    with pytest.raises(PolicyError, match="is not a policy, or is cut off"):
        Policy.load(tmp_path / "policy.json")


def test_a_policy_for_another_number_of_exits_is_refused() -> None:
    with pytest.raises(PolicyError, match="has 3 thresholds.*network of 4 exits.*this one has 3"):
        replay(trace_of(), Policy("confidence", [0.5, 0.5, 0.5]))


def test_calibration_keeps_the_accuracy_asked_for_and_saves_cost() -> None:
    trace = trace_of(2000)
    policy = calibrate(trace, "confidence", max_accuracy_drop=0.01)
    found = replay(trace, policy)
    full = (trace.logits[-1].argmax(-1) == trace.labels).double().mean()
    early = (found.prediction == trace.labels).double().mean()
    assert early >= full - 0.01 - 1e-9
    assert found.cost.mean() < 0.9 * trace.full_cost


def test_calibration_keeps_within_the_cost() -> None:
    trace = trace_of(2000)
    found = replay(trace, calibrate(trace, "confidence", max_cost=0.6))
    assert 0.5 < float(found.cost.mean()) / trace.full_cost <= 0.601


def test_calibration_for_agreement_needs_no_labels() -> None:
    labelled = trace_of(1000)
    trace = Trace(labelled.logits, None, labelled.stage_costs, labelled.head_costs)
    found = replay(trace, calibrate(trace, "confidence", min_agreement=0.95))
    assert (found.prediction == trace.logits[-1].argmax(-1)).double().mean() >= 0.95


def test_training_data_are_refused() -> None:
    with pytest.raises(TraceError, match="train"):
        calibrate(trace_of(source="training"), "confidence", max_accuracy_drop=0.01)


def test_what_cannot_be_met_names_the_best() -> None:
    with pytest.raises(Infeasible) as caught:
        calibrate(trace_of(), "confidence", max_cost=0.01)
    assert isinstance(caught.value.best, Policy)


def test_nan_logits_are_refused() -> None:
    trace = trace_of(10)
    logits = trace.logits.clone()
    logits[1, 2, 0] = math.nan
    with pytest.raises(TraceError, match="NaN"):
        Trace(logits, trace.labels, trace.stage_costs, trace.head_costs)


def test_a_trace_survives_its_file_and_a_cut_file_is_refused(tmp_path: Path) -> None:
    trace, path = trace_of(20), tmp_path / "trace.safetensors"
    trace.save(path)
    assert torch.equal(Trace.load(path).logits, trace.logits)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TraceError):
        Trace.load(path)
