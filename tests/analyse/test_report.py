from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest

from offramp.analyse import evaluate
from offramp.analyse.plot import picture
from offramp.decide import Policy, calibrate
from offramp.decide.fitting import fit_ensemble
from offramp.decide.policy import replay
from offramp.decide.trace import Trace
from offramp.errors import DataError, PolicyError
from tests.traces import make_trace

POLICY = Policy("confidence", [0.9, 0.9, 0.9])
TIME = {
    "engine": "onnxruntime",
    "threads": 2,
    "batch_1": {"full_ms": 3.0, "early_ms": 1.5, "speedup": 2.0, "exits_ms": [0.5, 1.0, 2.0]},
    "batch_64": {"full_ms": 2.0, "early_ms": 1.0, "speedup": 2.0},
}


@pytest.fixture(scope="module")
def report():
    return evaluate(make_trace(), POLICY)


def test_the_numbers_are_those_of_the_replay(report):
    trace = make_trace()
    decisions = replay(trace, POLICY)
    right = decisions.prediction == trace.labels
    assert report.early.accuracy == pytest.approx(float(right.double().mean()))
    assert report.full.accuracy == float(
        (trace.logits[-1].argmax(1) == trace.labels).double().mean()
    )
    assert report.difference[0] == pytest.approx(report.early.accuracy - report.full.accuracy)
    assert report.cost_ratio == pytest.approx(float(decisions.cost.mean()) / 4)
    low, high = report.cost_interval
    assert low < report.cost_ratio < high
    expected = binomtest(int(right.sum()), 300).proportion_ci(method="wilson")
    assert report.early.interval == pytest.approx((expected.low, expected.high))
    for k, row in enumerate(report.exits):
        here = decisions.exit == k
        assert row.share == pytest.approx(float(here.double().mean()))
        assert row.accuracy_taken == pytest.approx(float(right[here].double().mean()))
        every = trace.logits[k].argmax(1) == trace.labels
        assert row.accuracy == pytest.approx(float(every.double().mean()))
    assert [row.cost for row in report.exits] == pytest.approx([1.05, 2.1, 3.15, 4.15])


def test_a_dead_exit_costs_nothing():
    found = evaluate(make_trace(), Policy("confidence", [0.9, math.inf, 0.9]))
    assert [row.cost for row in found.exits] == pytest.approx([1.05, 2.05, 3.1, 4.1])
    assert found.exits[1].share == 0
    assert found.exits[1].accuracy_taken is None


def test_never_leaving_is_the_full_network():
    found = evaluate(make_trace(), Policy.final())
    assert found.cost_ratio == 1
    assert found.difference[0] == 0
    assert found.verdict.text.startswith("Do not bother: the saving is 0.0 % of the cost")


@pytest.mark.parametrize("exits", [3, 5, 9])
def test_never_leaving_costs_no_more_where_costs_are_fractions(exits):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(exits, 40, 3, generator=generator)
    heads = torch.cat([torch.full((exits - 1,), 0.1), torch.zeros(1)])
    for _ in range(20):
        stages = torch.rand(exits, generator=generator, dtype=torch.float64)
        trace = Trace(logits, torch.zeros(40, dtype=torch.long), stages, heads)
        found = evaluate(trace, Policy("confidence", [math.inf] * (exits - 1)), resamples=10)
        assert found.cost_ratio == 1
        assert found.cost_interval == (1, 1)
        assert found.verdict.text.startswith("Do not bother: the saving is 0.0 % of the cost")


def test_a_verdict_is_by_what_was_measured_last():
    report = evaluate(make_trace(), POLICY, tolerance=0.5)
    slow = {"engine": "e", "threads": 1, "batch_1": {"speedup": 0.5}}
    mixed = {**slow, "batch_64": {"speedup": 2.0}}
    assert report.verdict.worth_it
    assert report.verdict == report.estimate
    slower = report.with_measurements(time=slow)
    assert not slower.verdict.worth_it
    assert slower.with_measurements(time=slow).verdict == slower.verdict
    assert slower.with_measurements(agreement=1.0).verdict == slower.verdict
    again = slower.with_measurements(time=mixed)
    assert again.verdict == report.with_measurements(time=mixed).verdict
    assert again.verdict.worth_it
    assert slower.with_measurements(time=TIME).verdict == report.estimate


def test_json_holds_what_is_promised(report):
    measured = report.with_measurements(time=TIME, agreement=1.0, versions={"torch": "x"}, seed=0)
    data = json.loads(measured.to_json())
    assert data == measured.to_dict()
    for name in ("full", "early"):
        assert set(data[name]) >= {"accuracy", "interval"}
    for row in data["exits"]:
        assert set(row) >= {"place", "cost", "share", "accuracy", "accuracy_taken"}
    assert set(data["overthinking"]) >= {"destructive", "rescued", "oracle_accuracy"}
    assert set(data) >= {"cost_ratio", "time", "agreement", "verdict", "versions", "seed"}
    assert isinstance(data["verdict"], str)
    assert "time" not in report.to_dict()


def test_the_table_shows_every_row(report):
    text = str(report.with_measurements(time=TIME, agreement=1.0))
    lines = text.splitlines()
    for start in ("full network", "exit 0: exit 0", "exit 3: backbone", "early exits", "hindsight"):
        assert sum(line.strip().startswith(start) for line in lines) >= 1, start
    assert "2.00 times as fast at batch 1, 2.00 times as fast at batch 64" in text
    assert "same exit and class for 100.00 % of the samples" in text
    assert "Verdict: " in text
    assert f"{100 * report.early.accuracy:.2f}" in text
    assert "ms, batch 1" not in str(report)


def test_without_labels_it_is_agreement():
    found = evaluate(make_trace(labels=False), POLICY)
    assert found.measure == "agreement"
    assert found.full.accuracy == 1
    assert found.overthinking is None
    decisions = replay(make_trace(), POLICY)
    agreed = decisions.prediction == make_trace().logits[-1].argmax(1)
    assert found.early.accuracy == pytest.approx(float(agreed.double().mean()))
    low, high = found.difference[1]
    assert low < found.difference[0] < high <= 0
    assert found.exits[0].calibration_error is None
    assert "No labels" in str(found)
    assert json.loads(found.to_json())["overthinking"] is None


def test_calibrated_on_the_same_trace_warns():
    trace = make_trace()
    policy = Policy("confidence", [0.9] * 3, {"data": {"fingerprint": trace.fingerprint}})
    with pytest.warns(UserWarning, match="100% of the samples that the policy was calibrated on"):
        found = evaluate(trace, policy)
    assert "100% of the samples that the policy was calibrated on" in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(make_trace(seed=1), policy)


def test_calibrated_on_some_of_the_samples_warns():
    """Also when the policy comes from a file, and the samples in another order, and not all."""
    trace = replace(make_trace(2000), inputs=torch.arange(2000))
    policy = Policy.from_json(calibrate(trace, max_cost=0.7).to_json())
    mixed = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    for rows, share in ((mixed, 100), (mixed[:1000], 50)):
        with pytest.warns(UserWarning, match="samples that the policy was calibrated on") as caught:
            evaluate(trace.subset(rows), policy)
        assert abs(int(str(caught[0].message).partition("%")[0]) - share) <= 20
    held, rest = trace.split(0.5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(rest, calibrate(held, max_cost=0.7))


@pytest.mark.parametrize("data", ["cifar", None, {"inputs": None}, {"inputs": ["a", 2**70]}])
def test_provenance_of_ones_own_is_no_hindrance(data):
    trace = replace(make_trace(), inputs=torch.arange(300))
    assert evaluate(trace, Policy("confidence", [0.9] * 3, {"data": data})).notes == ()


def test_a_criterion_fitted_on_some_of_the_samples_warns():
    trace = make_trace()
    fitting, rest = trace.split(0.3)
    policy = Policy(fit_ensemble(fitting), [0.9] * 3)
    with pytest.warns(UserWarning, match="'geometric' was fitted on 90 of these 300 samples"):
        found = evaluate(trace, policy)
    assert "was fitted on 90" in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(rest, policy)


def test_training_data_warns():
    trace = make_trace()
    seen = Trace(trace.logits, trace.labels, trace.stage_costs, trace.head_costs, source="training")
    with pytest.warns(UserWarning, match="holds training data"):
        evaluate(seen, POLICY)


def test_a_policy_for_another_network():
    with pytest.raises(PolicyError, match="network of 2 exits"):
        evaluate(make_trace(), Policy("confidence", [0.9]))


@pytest.mark.parametrize("bad", [{"tolerance": 5}, {"resamples": 0}])
def test_settings_that_mean_nothing(bad):
    with pytest.raises(DataError, match="tolerance from 0 to 1 and at least one resample"):
        evaluate(make_trace(), POLICY, **bad)


def test_plot_returns_the_axes(report, tmp_path):
    ax = report.plot()
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert {"full network", "hindsight oracle", "early exits, 95 % intervals"} <= labels
    ax.figure.savefig(tmp_path / "a.png")
    mine = Figure().subplots()
    assert report.plot(mine) is mine
    assert "matplotlib.pyplot" not in mpl.__dict__ or not mpl.pyplot.get_fignums()


def test_the_picture_is_a_file(report):
    assert picture(report).startswith(b"\x89PNG")
    assert b"<svg" in picture(report, "svg")
    with pytest.raises(DataError, match="Unknown picture format 'pngg'. Did you mean 'png'"):
        picture(report, "pngg")


def test_html_needs_nothing_else(report):
    html = report.with_measurements(time=TIME).to_html()
    assert "data:image/png;base64," in html
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in html
    assert report.verdict.text in html


def test_html_escapes_names():
    trace = make_trace()
    places = ("<b>", "a", "b", "backbone")
    odd = Trace(trace.logits, trace.labels, trace.stage_costs, trace.head_costs, places=places)
    html = evaluate(odd, POLICY).to_html()
    assert "<b>" not in html
    assert "&lt;b&gt;" in html


def test_all_leave_at_one_exit():
    logits = torch.randn(2, 10_000, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(10_000, dtype=torch.long)
    costs = torch.tensor([123_456.0, 987_654.0]), torch.tensor([1111.0, 0.0])
    found = evaluate(Trace(logits, labels, *costs), Policy("confidence", [0.0]))
    assert found.cost_interval == (found.cost_ratio, found.cost_ratio)
    assert found.early.cost == found.truncations[0].cost == 124_567.0
    assert "not shown to do worse" in found.verdict.text
    assert "data:image/png" in found.to_html()


def test_a_loss_of_just_what_is_acceptable_is_accepted():
    logits = torch.tensor([[3.0, 0.0]]).repeat(2, 100, 1)
    logits[0, 0] = torch.tensor([0.0, 3.0])
    found = evaluate(
        Trace(logits, None, torch.ones(2), torch.zeros(2)), Policy(nats=[9.0], criterion="entropy")
    )
    assert found.difference[0] == -0.01
    assert "greater loss" not in found.verdict.text


def test_the_shares_of_overthinking_are_of_all_samples(report):
    thinking = report.overthinking
    text = " ".join(str(report).split())
    assert f"rescued {100 * thinking.rescued:.2f} % (destructive, but answered right)" in text
    assert "of which" not in text


def test_one_sample_is_enough():
    trace = make_trace().subset(torch.tensor([0]))
    assert "Verdict" in str(evaluate(trace, POLICY))
