"""Recipes of papers: what they are made of, the goals that they keep, what is claimed of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.learning.runs import Keep
from benchmarks.learning.settings import SETTINGS
from benchmarks.systems import recipes
from benchmarks.systems.recipes import AGAINST, RUNS, keeps, measure_recipes, not_below
from benchmarks.zoo_tables import ZOO_TABLES
from offramp.analyse import paired_difference
from offramp.decide import Criterion, Policy, Trace, criterion, fit_ensemble, replay
from offramp.errors import Infeasible
from offramp.train import Boosting, CrossEntropy, Heads, Joint, Matched
from offramp.train.objectives import boosted
from offramp.zoo.recipes import PAPERS, papers
from tests.traces import make_trace

STRENGTHS = (1.5, 2.5, 3.5, 4.5, 6.0)
BUDGETED = [name for name, recipe in PAPERS.items() if recipe.control is None]
CONTROLLED = [name for name, recipe in PAPERS.items() if recipe.control is not None]


SAMPLES = 600


def five_exits(samples: int, seed: int = 0) -> Trace:
    return make_trace(samples, strengths=STRENGTHS, seed=seed)


@pytest.fixture(scope="module")
def calibration() -> Trace:
    return five_exits(SAMPLES)


@pytest.fixture(scope="module")
def fresh() -> Trace:
    """So many that its mean risk is the true one."""
    return five_exits(30_000, seed=1)


@cache
def prepared(name: str, goal: float = 0.5) -> tuple[Criterion, Trace]:
    """Gates take seconds to fit."""
    return PAPERS[name].prepare(five_exits(SAMPLES), goal)


def test_schemes_are_those_of_the_papers():
    schemes = {name: recipe.scheme for name, recipe in PAPERS.items()}
    assert schemes == {
        "ztw": Heads(CrossEntropy()),
        "eenet": Heads(),
        "jei-dnn": Heads(),
        "boosted": Joint(Boosting()),
        "l2w-den": Joint(Matched()),
        "calm": Heads(),
        "fast-yet-safe": Heads(),
    }
    assert [name for name, recipe in PAPERS.items() if recipe.cascade] == ["ztw"]
    assert CONTROLLED == ["calm", "fast-yet-safe"]
    # What is measured was trained as the recipe says.
    for name, recipe in PAPERS.items():
        setting = SETTINGS[RUNS[name]]
        assert (setting.scheme, setting.cascade) == (recipe.scheme, recipe.cascade)


def test_criteria_are_those_of_the_papers(calibration: Trace):
    rules = {name: prepared(name)[0] for name in PAPERS}
    assert {name: rule.name for name, rule in rules.items()} == {
        "ztw": "geometric",
        "eenet": "gate",
        "jei-dnn": "gate",
        "boosted": "geometric",
        "l2w-den": "confidence",
        "calm": "margin",
        "fast-yet-safe": "confidence",
    }
    assert [name for name, rule in rules.items() if rule.combines] == ["ztw", "boosted"]
    fitting, _ = calibration.split(0.3, seed=0)
    assert rules["ztw"].config() == fit_ensemble(fitting).config()


def test_boosted_leaves_with_the_sums_that_were_trained(calibration: Trace):
    rule, _ = prepared("boosted")
    state: tuple[torch.Tensor, ...] = ()
    for k, total in enumerate(boosted(list(calibration.logits))):
        logits, score, state = rule(calibration.logits[k], state, k)
        torch.testing.assert_close(logits, total.log_softmax(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score, total.softmax(1).amax(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PAPERS)
def test_what_fits_the_criterion_chooses_no_threshold(name: str):
    rule, rest = prepared(name)
    fitted = bool(rule.fitted_on)
    assert fitted == (name in ("ztw", "eenet", "jei-dnn"))
    assert rest.num_samples == (SAMPLES * 7 // 10 if fitted else SAMPLES)
    assert all(samples.overlap(rest) == 0 for samples in rule.fitted_on)


@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_is_kept_and_used(name: str, calibration: Trace):
    policy = PAPERS[name].choose(calibration, 0.5)
    _, rest = prepared(name)
    decided = replay(rest, policy)
    cost = float(decided.cost.mean()) / rest.full_cost
    assert 0.4 < cost <= 0.5 + 1e-9
    assert policy.provenance["target"] == {"max_cost": 0.5}
    first = float((rest.logits[0].argmax(1) == rest.labels).double().mean())
    assert float((decided.prediction == rest.labels).double().mean()) > first


def test_a_budget_below_the_first_exit_cannot_be_kept(calibration: Trace):
    with pytest.raises(Infeasible, match="a mean cost of at most 0.1"):
        PAPERS["l2w-den"].choose(calibration, 0.1)


def test_gates_are_fitted_for_a_budget_or_for_its_price(monkeypatch, calibration: Trace):
    """EENet's follow the budget; JEI-DNN's a price, the less the more may be spent."""
    seen = []

    def fit(trace: Trace, **aim: float) -> Criterion:
        assert trace.num_samples == round(0.3 * SAMPLES)
        seen.append(aim)
        return criterion("confidence")

    monkeypatch.setattr(papers, "fit_gates", fit)
    for name in ("eenet", "jei-dnn"):
        for budget in (0.3, 0.6, 1.2):
            PAPERS[name].prepare(calibration, budget)
    assert seen[:3] == [{"max_cost": budget} for budget in (0.3, 0.6, 1.2)]
    low, middle, high = (aim["price"] for aim in seen[3:])
    assert low > middle > high == 0.01  # beyond the full cost nothing is gained


def risk_of(name: str, policy: Policy, trace: Trace) -> float:
    answers, full = replay(trace, policy).prediction, trace.logits[-1].argmax(1)
    if name == "calm":
        return float((answers != full).double().mean())
    right, whole = answers == trace.labels, full == trace.labels
    return float(whole.double().mean() - right.double().mean())


@pytest.mark.parametrize("name", CONTROLLED)
def test_the_risk_is_kept_and_tolerating_more_is_cheaper(
    name: str, calibration: Trace, fresh: Trace
):
    costs = []
    for tolerated in (0.08, 0.12, 0.2):
        policy = PAPERS[name].choose(calibration, tolerated, delta=0.2)
        assert policy.provenance["promise"]["confidence"] == pytest.approx(0.8)
        assert policy.provenance["promise"]["bound"] == pytest.approx(tolerated)
        assert risk_of(name, policy, fresh) <= tolerated
        costs.append(float(replay(fresh, policy).cost.mean()))
    assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_smaller_delta_is_dearer(name: str, calibration: Trace, fresh: Trace):
    policies = [PAPERS[name].choose(calibration, 0.12, delta=delta) for delta in (0.01, 0.3)]
    sure, bold = (float(replay(fresh, policy).cost.mean()) for policy in policies)
    assert sure > bold


def test_not_below_by_hand():
    """Four images; at the second budget one is gained and two are lost by half."""
    one = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.5, 0.5, 0.0]])
    other = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.5]])
    found = not_below(one, other, (0.25, 0.5))
    assert not found["holds"]
    assert found["at"] == 0.5
    assert found["points"] == pytest.approx(-12.5)  # (1 - 1.5) / 4
    # Gained 1, lost 1.5, which rounds to an even 2.
    assert found["interval"] == [100 * end for end in paired_difference(1, 2, 4)]
    assert [row["points"] for row in found["all"]] == pytest.approx([25.0, -12.5])
    assert not_below(one[:1], other[:1], (0.25,))["holds"]
    assert not_below(one[:1], one[:1], (0.25,))["holds"]


def row(tolerated: float, risk: float, cost: float) -> dict[str, object]:
    interval = [risk - 0.004, risk + 0.002]
    about = {"risk": risk, "interval": interval, "cost": cost}
    return {"tolerated": tolerated, "found": True, **about}


def test_keeps_by_hand():
    good = [row(0.01, 0.008, 0.9), row(0.02, 0.019, 0.7), row(0.05, 0.03, 0.5)]
    found = keeps(good)
    assert found["holds"]
    assert found["at"] == 0.02  # where the risk is nearest to what is tolerated
    assert found["points"] == pytest.approx(0.1)
    assert found["interval"] == pytest.approx([-0.1, 0.5])
    assert not keeps([good[0], row(0.02, 0.021, 0.7)])["holds"]  # the risk is larger
    dearer = keeps([good[0], row(0.02, 0.01, 0.95)])
    assert not dearer["holds"]
    assert dearer["points"] == pytest.approx(0.2)
    assert not keeps([{"tolerated": 0.01, "found": False}])["holds"]
    assert keeps([{"tolerated": 0.005, "found": False}, *good])["holds"]


def saved(folder: Path, names: list[str]) -> Keep:
    """Runs that never were, of exits that see the label through noise."""
    for name in names:
        at = folder / "fashion_resnet20" / name / "seed0"
        at.mkdir(parents=True)
        five_exits(600).save(at / "held.safetensors")
        five_exits(500, seed=1).save(at / "test.safetensors")
        (at / "run.json").write_text("{}", "utf-8")
    return Keep(folder, folder)


def test_runs_that_are_not_done_are_left_out_and_named(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(recipes, "POINTS", 4)
    result = measure_recipes(saved(tmp_path, ["plain", "matched"]))
    assert [found["recipe"] for found in result["recipes"]] == ["l2w-den"]
    assert result["recipes"][0]["verdict"] is None  # joint training is not there to compare with
    assert list(result["missing"]) == ["heads", "joint", "ztw", "boosting"]
    shown = ZOO_TABLES["zoo.recipes"]({"systems": {"recipes": result}})
    assert "Not trained yet, and so left out: " in shown
    assert "ztw |" not in shown
    empty = measure_recipes(Keep(tmp_path / "none", tmp_path / "none"))
    assert ZOO_TABLES["zoo.recipes"]({"systems": {"recipes": empty}}) == "Not measured yet."
    assert ZOO_TABLES["zoo.recipes"]({"systems": {}}) == "Not measured yet."


@pytest.mark.slow
def test_all_are_measured(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(recipes, "POINTS", 6)
    result = measure_recipes(saved(tmp_path, ["plain", "joint", *dict.fromkeys(RUNS.values())]))
    rows = {found["recipe"]: found for found in result["recipes"]}
    assert list(rows) == list(PAPERS)
    assert not result["missing"]
    test = five_exits(500, seed=1)
    full = float((test.logits[-1].argmax(1) == test.labels).double().mean())
    plain, heads, joint = result["references"]
    assert plain["at"]["1.0"]["accuracy"] == pytest.approx(full)
    assert heads["at"] == joint["at"]  # the same exits
    # Confidence on the exits that joint training is said to have, compared with itself.
    assert rows["l2w-den"]["verdict"]["points"] == 0
    for name, (_, budgets) in AGAINST.items():
        verdict = rows[name]["verdict"]
        reference = heads["at"]
        gains = [
            rows[name]["at"][str(b)]["accuracy"] - reference[str(b)]["accuracy"] for b in budgets
        ]
        assert verdict["points"] == pytest.approx(100 * min(gains))
    for name in CONTROLLED:
        accuracies = [rows[name]["at"][key]["accuracy"] for key in ("0.25", "0.5", "1.0")]
        assert accuracies == sorted(accuracies)
    assert "| ztw |" in ZOO_TABLES["zoo.recipes"]({"systems": {"recipes": result}})


def test_margin_is_what_the_library_has():
    """CALM's softmax response: the two largest probabilities apart."""
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    _, score, _ = criterion("margin")(logits, (), 0)
    best = logits.softmax(1).sort(descending=True).values[0]
    assert float(score[0]) == pytest.approx(float(best[0] - best[1]))
