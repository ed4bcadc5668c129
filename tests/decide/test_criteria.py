"""Scores against hand formulas; state; the register."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from offramp.decide import Policy, replay
from offramp.decide.criteria import (
    Agreement,
    ArithmeticEnsemble,
    ClassMeanDistance,
    Confidence,
    Criterion,
    Energy,
    Entropy,
    GeometricEnsemble,
    LearnedGate,
    Margin,
    Patience,
    PowerEntropy,
    ProductOfExperts,
    Tempered,
    Voting,
    criterion,
    criterion_from_json,
    criterion_to_json,
)
from offramp.decide.scored import score
from offramp.decide.trace import Trace
from offramp.errors import PolicyError
from tests.decide.rules import EXITS, WEIGHTS, every_rule, random_logits, random_trace

RULES = every_rule()
LOGITS = random_logits(40)
PROBS = special.softmax(LOGITS.double().numpy(), axis=2)


def walk(rule, logits=LOGITS):
    """Logits (E, N, C) and scores (E, N) of a criterion, exit after exit."""
    state, outs, scores = (), [], []
    with torch.no_grad():
        for k in range(len(logits)):
            out, value, state = rule(logits[k], state, k)
            outs.append(out)
            scores.append(value)
    return torch.stack(outs), torch.stack(scores)


def close(actual, wanted, **more):
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=2e-5, atol=2e-6, **more)


def test_scores_of_one_exit_are_the_formulas():
    raw = LOGITS.double().numpy()
    ordered = np.sort(PROBS, axis=2)
    entropy = stats.entropy(PROBS, axis=2)
    close(walk(Confidence())[1], PROBS.max(2))
    close(walk(Entropy())[1], 1 - entropy / np.log(5))
    close(walk(Entropy("nats"))[1], -entropy)
    close(walk(Margin())[1], ordered[:, :, -1] - ordered[:, :, -2])
    close(walk(Energy())[1], special.logsumexp(raw, axis=2))
    close(walk(Energy(2.0))[1], 2 * special.logsumexp(raw / 2, axis=2))
    for alpha in (0.5, 2.0, 5.0):
        renyi = np.log((PROBS**alpha).sum(2)) / (1 - alpha)
        close(walk(PowerEntropy(alpha))[1], 1 - renyi / np.log(5))
    distances = np.abs(raw)
    wanted = 1 - distances.min(2) / distances.mean(2)
    close(walk(ClassMeanDistance(), -LOGITS.abs())[1], wanted)


def test_power_entropy_tends_to_the_entropy():
    gap = (walk(PowerEntropy(1.001))[1] - walk(Entropy())[1]).abs().max()
    assert float(gap) < 2e-3


def test_patience_is_pabees_counter():
    said = LOGITS.argmax(2)
    _, scores = walk(Patience())
    for row in range(40):
        count = 0
        for k in range(EXITS):
            count = count + 1 if k and said[k, row] == said[k - 1, row] else 0
            assert scores[k, row] == count


def test_patience_for_outputs_that_are_regressed():
    values = torch.tensor([[1.0], [1.05], [1.3], [1.32]])[:, :, None]
    _, scores = walk(Patience(tolerance=0.1), values)
    assert scores.flatten().tolist() == [0, 1, 0, 1]


def test_agreement_forgives_an_exit_in_between():
    said = LOGITS.argmax(2)
    _, scores = walk(Agreement())
    _, weighted = walk(Agreement(weighted=True))
    for k in range(EXITS):
        same = sum((said[j] == said[k]).float() for j in range(k + 1))
        assert torch.equal(scores[k], same)
        given = sum(PROBS[j, range(40), said[k]] for j in range(k + 1))
        close(weighted[k], given)


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 1.5, 2.0]])
def test_votes_are_counted(weights):
    said = LOGITS.argmax(2).numpy()
    outs, scores = walk(Voting(weights))
    for k in range(EXITS):
        for row in range(40):
            votes = np.zeros(5)
            for j in range(k + 1):
                votes[said[j, row]] += 1 if weights is None else weights[j]
            assert scores[k, row] == pytest.approx(votes.max())
            best = np.flatnonzero(votes == votes.max())
            # Ties go to the class that the present exit finds likelier.
            assert int(outs[k, row].argmax()) == max(best, key=lambda c: PROBS[k, row, c])


def test_running_means():
    outs, scores = walk(ArithmeticEnsemble())
    mean = PROBS.cumsum(0) / np.arange(1, EXITS + 1)[:, None, None]
    close(scores, mean.max(2))
    close(outs.exp(), mean)
    outs, scores = walk(GeometricEnsemble())
    logs = np.log(PROBS).cumsum(0) / np.arange(1, EXITS + 1)[:, None, None]
    close(outs.exp(), special.softmax(logs, axis=2))
    outs, scores = walk(GeometricEnsemble(WEIGHTS))
    for k in range(EXITS):
        joint = sum(w * np.log(PROBS[j]) for j, w in enumerate(WEIGHTS[k]))
        close(outs[k].exp(), special.softmax(joint, axis=1))
        close(scores[k], special.softmax(joint, axis=1).max(1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.9))
def test_uniform_experts_never_lose_confidence(seed, level):
    """Anytime monotonicity: the probability of every class still possible only grows."""
    logits = random_logits(20, seed)
    rule = ProductOfExperts("uniform", level)
    state, before, chance_before = (), torch.zeros(20), torch.zeros(20, 5)
    for k in range(EXITS):
        out, value, state = rule(logits[k], state, k)
        (possible,) = state
        chance = possible / possible.sum(1, keepdim=True)
        assert bool((value >= before).all())
        assert bool((chance >= chance_before - 1e-6)[possible > 0].all())
        assert bool((possible.gather(1, out.argmax(1, keepdim=True)) > 0).all())
        before, chance_before = value, chance


def test_relu_experts_rule_classes_out_for_good():
    logits = torch.tensor([[[2.0, 1.0, -1.0]], [[1.0, 3.0, 9.0]], [[-1.0, -1.0, -2.0]]])
    outs, scores = walk(ProductOfExperts(), logits)
    assert outs[1, 0].argmax() == 1  # 3 of (2 * 1, 1 * 3, ruled out)
    assert float(outs[1, 0, 2].exp()) < 1e-10
    assert float(outs[1, 0, 1].exp()) == pytest.approx(3**0.5 / (3**0.5 + 2**0.5), rel=1e-5)
    # Everything ruled out: the exit's own softmax answers.
    torch.testing.assert_close(outs[2], logits[2].log_softmax(1))
    assert scores.shape == (3, 1)


@pytest.mark.parametrize("inner", ["confidence", "entropy", "arithmetic", "energy"])
def test_temperature_one_is_the_identity(inner):
    plain, tempered = walk(criterion(inner)), walk(Tempered(inner, [1.0] * EXITS))
    assert torch.equal(plain[0], tempered[0])
    assert torch.equal(plain[1], tempered[1])


def test_temperature_divides_and_answers_stay():
    outs, scores = walk(Tempered("confidence", [0.5, 1.0, 2.0, 4.0]))
    assert torch.equal(outs, LOGITS)
    for k, temperature in enumerate((0.5, 1.0, 2.0, 4.0)):
        close(scores[k], special.softmax(LOGITS[k].double().numpy() / temperature, 1).max(1))


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_row_is_decided_alone(name):
    outs, scores = walk(RULES[name])
    order = torch.randperm(40)
    moved = walk(RULES[name], LOGITS[:, order])
    torch.testing.assert_close(moved[0], outs[:, order], rtol=0, atol=1e-6)
    alone = walk(RULES[name], LOGITS[:, :1])
    torch.testing.assert_close(alone[1], scores[:, :1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(RULES))
def test_json_and_back_is_the_same_rule(name):
    back = criterion_from_json(criterion_to_json(RULES[name]))
    one, two = walk(RULES[name]), walk(back)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert (back.stateful, back.combines) == (RULES[name].stateful, RULES[name].combines)


@pytest.mark.parametrize("name", sorted(RULES))
def test_scores_stay_numbers_at_the_extremes(name):
    logits = torch.zeros(EXITS, 4, 5)
    logits[:, 0, 2] = 1e4
    logits[:, 1] = -1e4
    logits[:, 2, 1:] = -300
    outs, scores = walk(RULES[name], logits)
    assert bool(torch.isfinite(scores).all())
    assert bool(torch.isfinite(outs).all())


def test_ten_lines_make_a_criterion():
    class TopRatio(Criterion):
        name = "top_ratio_of_the_test"

        def forward(self, logits, state, exit):
            best = logits.softmax(-1).topk(2, dim=-1).values
            return logits, best[:, 0] / (best[:, 0] + best[:, 1]), state

    trace = random_trace(50)
    policy = Policy("top_ratio_of_the_test", [0.9, 0.8, 0.7])
    again = Policy.from_json(policy.to_json())
    assert torch.equal(replay(trace, policy).exit, replay(trace, again).exit)
    with pytest.raises(PolicyError, match="already belongs to .*TopRatio; .*Other needs a name"):
        type("Other", (Criterion,), {"name": "top_ratio_of_the_test"})


def test_a_class_of_the_same_name_elsewhere_replaces_none():
    body = {"name": "entropy", "__module__": "mine"}
    with pytest.raises(PolicyError, match=r"softmax.Entropy; mine.Entropy needs a name of its own"):
        type("Entropy", (Criterion,), body)
    assert type(criterion("entropy")) is Entropy


def test_names_and_instances():
    assert isinstance(criterion("margin"), Margin)
    rule = Margin()
    assert criterion(rule) is rule
    with pytest.raises(PolicyError, match="Unknown criterion 'confidense'. Did you mean 'conf"):
        criterion("confidense")
    with pytest.raises(PolicyError, match="got its class: write Margin"):
        criterion(Margin)
    with pytest.raises(PolicyError, match="a name or an instance of Criterion, got int"):
        criterion(3)
    with pytest.raises(PolicyError, match="'gate' cannot be had by name alone"):
        criterion("gate")
    with pytest.raises(PolicyError, match="must be imported before it is loaded"):
        criterion_from_json({"name": "nobody's"})
    with pytest.raises(PolicyError, match="description of criterion 'entropy' does not fit"):
        criterion_from_json({"name": "entropy", "config": {"unt": "nats"}})
    with pytest.raises(PolicyError, match="must be imported before it is loaded"):
        criterion_from_json({"name": ["entropy"]})
    plain = Policy("entropy", [0.5]).to_json()
    for part, value in (("criterion", "entropy"), ("criterion", None), ("provenance", [1])):
        with pytest.raises(PolicyError, match="criterion and provenance are JSON objects"):
            Policy.from_json(plain | {part: value})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Entropy("bits"), "unit='normalised' or unit='nats', got 'bits'"),
        (lambda: PowerEntropy(1.0), "positive, finite and not 1"),
        (lambda: Energy(0.0), "must be positive, got 0.0"),
        (lambda: Patience(-1.0), "must be positive, got -1.0"),
        (lambda: Voting([1, 0]), "weights of votes must be positive"),
        (lambda: GeometricEnsemble([[1.0], [1.0]]), "Row 1 .* must have 2 numbers"),
        (lambda: ProductOfExperts("soft"), "must be 'relu' or 'uniform'"),
        (lambda: ProductOfExperts(level=1.0), "strictly between 0 and 1"),
        (lambda: Tempered("confidence", [1.0, -1.0]), "Temperatures must be positive"),
        (lambda: LearnedGate(1), "at least 2 exits, got 1"),
    ],
)
def test_arguments_that_make_no_sense(make, text):
    with pytest.raises(PolicyError, match=text):
        make()


@pytest.mark.parametrize(
    "rule",
    [
        Voting([1.0, 1.0]),
        GeometricEnsemble(WEIGHTS[:2]),
        Tempered("margin", [1.0, 1.0]),
        Tempered(GeometricEnsemble(WEIGHTS[:2]), [1.0, 1.0]),
        LearnedGate(2),
    ],
    ids=lambda rule: rule.name,
)
def test_fitted_for_another_network(rule):
    """With fewer exits and with more: what is left of the parameters is not of this network."""
    for exits in (1, 3):
        trace = Trace(torch.randn(exits, 20, 5), None, torch.ones(exits), torch.zeros(exits))
        text = f"{rule.name!r} has parameters for a network of 2 exits, and this one has {exits}"
        with pytest.raises(PolicyError, match=text):
            score(trace, rule)
        for thresholds in (None, [0.5] * (exits - 1)):
            with pytest.raises(PolicyError, match=text):
                replay(trace, Policy(rule, thresholds))


def test_an_inner_rule_for_another_network():
    with pytest.raises(PolicyError, match="of 2 exits, and this one has 3"):
        Tempered(Voting([1.0, 1.0]), [1.0] * 3)
    with pytest.raises(PolicyError, match="of 2 exits, and this one has 3"):
        LearnedGate(3, inner=Voting([1.0, 1.0]))


def test_a_criterion_that_returns_nonsense_is_named():
    class Wrong(Criterion):
        name = "wrong_of_the_test"

        def forward(self, logits, state, exit):
            return logits, logits, state

    with pytest.raises(PolicyError, match=r"'wrong_of_the_test' must return one number for each"):
        score(random_trace(20), Wrong())

    class Nan(Criterion):
        name = "nan_of_the_test"

        def forward(self, logits, state, exit):
            return logits, logits[:, 0] * torch.nan, state

    with pytest.raises(PolicyError, match="returned NaN at exit 0"):
        score(random_trace(20), Nan())


def test_a_tie_break_overrules_no_vote():
    """Two classes that are close in votes are no tie."""
    rule, state = Voting([0.300, 0.303, 0.1]), ()
    for exit, logits in enumerate(([5.0, 0, 0], [0, 5.0, 0], [2.0, -9.0, 2.2])):
        answer, score, state = rule(torch.tensor([logits]), state, exit)
    assert answer.argmax(1).tolist() == [1]
    assert float(score) == pytest.approx(0.303)
