from __future__ import annotations

import pytest

from offramp.analyse.baselines import Baseline
from offramp.analyse.verdict import verdict, with_time


def baseline(cost=0.3, accuracy=0.9, lead=(0.05, (0.03, 0.07))):
    return Baseline("everyone leaves at exit 0", accuracy, (0.88, 0.92), cost, lead)


GOOD = {
    "cost": 0.5,
    "cost_ratio": 0.5,
    "cost_interval": (0.48, 0.52),
    "difference": -0.001,
    "difference_interval": (-0.006, 0.004),
    "truncations": [baseline()],
    "random": baseline(cost=0.5),
    "tolerance": 0.01,
}


def test_worth_it():
    found = verdict(**GOOD)
    assert found.worth_it
    assert found.text == (
        "Worth it: it saves 50.0 % of the cost (95 % interval 48.0 % to 52.0 %) at -0.1 points of "
        "accuracy (-0.6 to +0.4)."
    )


def test_worth_it_with_a_doubt():
    found = verdict(**GOOD | {"difference_interval": (-0.02, 0.02)})
    assert found.worth_it
    assert "do not rule out a loss of more than 1.0 points" in found.text


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"cost_ratio": 0.99, "cost_interval": (0.97, 1.01)}, "which includes none"),
        ({"difference": -0.03, "difference_interval": (-0.05, -0.011)}, "surely a greater loss"),
        ({"difference": -0.02, "difference_interval": (-0.05, 0.01)}, ", a greater loss"),
        (
            {"truncations": [baseline(cost=0.5, lead=(0.002, (-0.01, 0.014)))]},
            "cutting the network off where everyone leaves at exit 0 is not shown to do worse on "
            "these samples (accuracy 90.0 % at 100.0 % of this policy's cost; the policy leads by "
            "+0.2 points, -1.0 to +1.4)",
        ),
        (
            {"random": baseline(cost=0.5, lead=(0.002, (0.0, 0.01)))},
            "leave at random is not shown to do worse on these samples (accuracy 90.0 %; the "
            "policy leads by +0.2 points, +0.0 to +1.0)",
        ),
        (
            {"cost_ratio": 1.007, "cost_interval": (1.006, 1.008)},
            "it costs 0.7 % more than the full network (95 % interval 0.6 % to 0.8 %)",
        ),
    ],
)
def test_do_not_bother(changed, text):
    found = verdict(**GOOD | changed)
    assert not found.worth_it
    assert found.text.startswith("Do not bother")
    assert text in found.text


def test_a_truncation_that_costs_more_does_not_serve():
    dearer = baseline(cost=0.51, lead=(-0.01, (-0.02, 0.0)))
    assert verdict(**GOOD | {"truncations": [dearer]}).worth_it


def timed(**speeds):
    return {"engine": "e", "threads": 1, **{k: {"speedup": v} for k, v in speeds.items()}}


def test_measured_time_has_the_last_word():
    judged = verdict(**GOOD)
    assert with_time(judged, timed(batch_1=1.5, batch_64=2.0)) == judged
    slower = with_time(judged, timed(batch_1=0.8, batch_64=0.9))
    assert not slower.worth_it
    assert "measured it is 0.80 times as fast at batch 1, 0.90 times as fast" in slower.text
    mixed = with_time(judged, timed(batch_1=0.8, batch_64=1.9))
    assert mixed.worth_it
    assert mixed.text.endswith("measured 0.80 times as fast at batch 1.")


def test_the_measure_is_named():
    assert "points of agreement" in verdict(**GOOD, measure="agreement").text
