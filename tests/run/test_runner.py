from __future__ import annotations

import math
import threading
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from offramp.build.model import attach
from offramp.decide.policy import Policy
from offramp.errors import DataError, EqualityError, OfframpError, PolicyError
from offramp.run.chain import Link
from offramp.run.engines import Torch
from offramp.run.proof import TOLERANCE
from offramp.run.rows import RowAxis
from offramp.run.runner import Runner
from offramp.run.times import Line, StageTimes
from tests.networks import example_of, make
from tests.run.conftest import KINDS, case, rows_of, whole

ENGINES = ("torch", "onnxruntime")


@cache
def runner_of(kind: str, engine: str = "torch", criterion: str = "confidence") -> Runner:
    one = case(kind)
    return Runner(one.model, Policy(criterion, [0.5, 0.5]), one.example, engine=engine)


def with_thresholds(runner: Runner, thresholds: list[float]) -> Runner:
    """The same stages under other thresholds, without cutting again."""
    policy = Policy(runner.policy.criterion, thresholds)
    links = [
        Link(k.exit, t, k.inputs, k.outputs, k.rows, k.live)
        for k, t in zip(runner._links, [*thresholds, -math.inf], strict=True)
    ]
    made = Runner.of_links(
        runner.engine, links, runner._calls, policy, runner.costs, runner.places, runner.call, 1.0
    )
    made.times = StageTimes.none()  # compact always: no timing decides what a test tests
    return made


def by_hand(logits: list[Tensor], thresholds: list[float]) -> tuple[list[int], list[Tensor]]:
    """The oracle: row by row, exit by exit."""
    exits, answers = [], []
    for row in range(len(logits[0])):
        for k, value in enumerate(logits):
            score = torch.softmax(value[row], -1).max()
            if k == len(logits) - 1 or score >= thresholds[k]:
                exits.append(k)
                answers.append(value[row])
                break
    return exits, answers


@pytest.mark.parametrize("kind", KINDS)
def test_no_exit_taken_is_the_backbone_bit_for_bit(kind: str) -> None:
    one, x = case(kind), example_of(kind, 5)
    result = with_thresholds(runner_of(kind), [math.inf, math.inf])(x)
    with torch.no_grad():
        out = one.backbone(**x) if isinstance(x, dict) else one.backbone(x)
    assert torch.equal(result.logits, out["logits"] if isinstance(out, dict) else out)
    assert result.exit.tolist() == [2] * 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_sample_gets_what_it_gets_alone(kind: str, engine: str, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 7, 64]))
    seed = data.draw(st.integers(0, 10_000))
    thresholds = data.draw(st.lists(st.floats(0.2, 1.01), min_size=2, max_size=2))
    x = example_of(kind, size, seed)
    runner = with_thresholds(runner_of(kind, engine), thresholds)
    result = runner(x)
    logits = whole(case(kind), x)
    exits, answers = by_hand(logits, thresholds)
    scores = torch.stack([torch.softmax(v, -1).max(-1).values for v in logits[:-1]])
    margin = (scores - torch.tensor(thresholds)[:, None]).abs().amin(0)
    clear = margin > 1e-4
    assert torch.equal(result.exit[clear], torch.tensor(exits)[clear])
    assert torch.allclose(result.logits[clear], torch.stack(answers)[clear], atol=1e-4, rtol=1e-4)
    for row in range(min(size, 3)):
        alone = runner(rows_of(x, slice(row, row + 1)))
        if clear[row]:
            assert alone.exit[0] == result.exit[row]
            assert torch.allclose(alone.logits[0], result.logits[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_does_not_matter(kind: str) -> None:
    x = example_of(kind, 16, seed=9)
    runner = with_thresholds(runner_of(kind), [0.6, 0.6])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    straight, mixed = runner(x), runner(rows_of(x, order))
    assert torch.equal(straight.exit[order], mixed.exit)
    assert torch.allclose(straight.logits[order], mixed.logits, atol=1e-5)


def test_mixed_exits_do_happen_in_these_tests() -> None:
    """Otherwise the properties above would say nothing."""
    for kind in KINDS:
        x = example_of(kind, 64, seed=2)
        scores = [torch.softmax(v, -1).max(-1).values for v in whole(case(kind), x)[:2]]
        result = with_thresholds(runner_of(kind), [float(s.median()) for s in scores])(x)
        assert len(result.exit.unique()) == 3, kind


@pytest.mark.parametrize("kind", KINDS)
def test_breaking_the_compaction_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the wrong rows must show, or the equality above would be vacuous."""
    x = example_of(kind, 32, seed=2)
    logits = whole(case(kind), x)
    thresholds = [float(torch.softmax(v, -1).max(-1).values.median()) for v in logits[:-1]]
    runner = with_thresholds(runner_of(kind), thresholds)
    good = runner(x)
    take = type(runner.engine).take

    def shifted(self: object, value: Tensor, axis: RowAxis, index: Tensor) -> Tensor:
        return take(self, value, axis, index.roll(1))

    monkeypatch.setattr(type(runner.engine), "take", shifted)
    bad = runner(x)
    assert not torch.allclose(good.logits, bad.logits, atol=1e-4)


def test_threshold_is_reached_at_equality() -> None:
    x = example_of("mlp", 4)
    score = torch.softmax(whole(case("mlp"), x)[0], -1).max(-1).values
    runner = with_thresholds(runner_of("mlp"), [float(score[0]), math.inf])
    assert runner(rows_of(x, slice(0, 4))).exit[0] == 0
    above = float(np.nextafter(np.float32(score[0]), np.float32(2)))
    assert with_thresholds(runner_of("mlp"), [above, math.inf])(x).exit[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_not_compacting_gives_the_same_answers(kind: str) -> None:
    x = example_of(kind, 24, seed=4)
    runner = with_thresholds(runner_of(kind), [0.6, 0.6])
    compacted = runner(x)
    never = StageTimes((Line(1.0, 0.0),) * 3, (Line(1.0, 1.0),) * 3)
    assert not never.compaction_pays(0, 24, 1)
    runner.times = never
    stayed = runner(x)
    assert torch.equal(compacted.exit, stayed.exit)
    assert torch.allclose(compacted.logits, stayed.logits, atol=1e-5)


class Rounded(Torch):
    """As on a device: steps run at powers of two."""

    def bucket(self, rows: int) -> int:
        return 1 << max(0, rows - 1).bit_length()


def test_batch_sizes_are_rounded_up_with_rows_that_are_answered() -> None:
    one = case("cnn")
    x = example_of("cnn", 13)
    scores = torch.softmax(whole(one, x)[0], -1).max(-1).values.sort(descending=True).values
    threshold = float(scores[7] + scores[8]) / 2  # eight leave, five stay
    runner = Runner(one.model, Policy("confidence", [threshold, 2.0]), one.example, engine="torch")
    runner.times = StageTimes.none()
    wanted = runner(x)
    runner.engine, sizes = Rounded(), []
    compact = runner._compact

    def noted(link: Link, values: dict[str, Tensor], rows: np.ndarray) -> dict[str, Tensor]:
        sizes.append(len(rows))
        return compact(link, values, rows)

    runner._compact = noted
    result = runner(x)
    assert wanted.exit.tolist().count(0) == 8
    assert sizes == [8]  # five go on, and three that are answered fill up
    assert torch.equal(result.exit, wanted.exit)
    assert torch.allclose(result.logits, wanted.logits, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_patience_carries_its_state_to_the_survivors(engine: str) -> None:
    x = example_of("encoder", 32, seed=5)
    runner = with_thresholds(runner_of("encoder", engine, "patience"), [math.inf, 1.0])
    logits = whole(case("encoder"), x)
    agree = logits[0].argmax(-1) == logits[1].argmax(-1)
    wanted = torch.where(agree, 1, 2)
    assert torch.equal(runner(x).exit, wanted)
    assert 0 < agree.sum() < 32


def test_numpy_in_numpy_out() -> None:
    x = example_of("mlp", 3).numpy()
    result = runner_of("mlp", "onnxruntime")(x)
    assert isinstance(result.logits, np.ndarray)
    assert isinstance(result.exit, np.ndarray)
    assert np.array_equal(result.prediction, result.logits.argmax(-1))


def test_statistics_count_samples_exits_survivors_and_cost() -> None:
    runner = with_thresholds(runner_of("cnn"), [0.0, 0.0])
    runner(example_of("cnn", 6))
    stats = runner.stats
    assert (stats.samples, stats.exits, stats.survivors) == (6, (6, 0, 0), (6, 0, 0))
    costs = case("cnn").model.costs
    assert stats.mean_cost == pytest.approx(costs.stages[0] + costs.heads[0])
    runner.reset()
    assert runner.stats.samples == 0


def test_exits_that_are_off_are_left_out_and_cost_nothing() -> None:
    one = case("cnn")
    runner = Runner(one.model, Policy.final(), one.example)
    runner(one.example)
    assert len(runner._links) == 1
    assert runner.stats.mean_cost == pytest.approx(sum(one.model.costs.stages))
    with pytest.raises(PolicyError, match="keeps 1 of 3 exits.*exits='all'"):
        runner.all_exits(one.example)


def test_all_exits_are_those_of_the_model() -> None:
    x = example_of("cnn", 5)
    for got, wanted in zip(runner_of("cnn").all_exits(x), whole(case("cnn"), x), strict=True):
        assert torch.equal(got, wanted)


def test_anytime_yields_each_exit_in_turn() -> None:
    x = example_of("mlp", 5)
    results = list(runner_of("mlp").anytime(x))
    assert [r.exit[0].item() for r in results] == [0, 1, 2]
    for result, wanted in zip(results, whole(case("mlp"), x), strict=True):
        assert torch.equal(result.logits, wanted)


def test_a_deadline_takes_the_best_answer_and_counts_what_came_late() -> None:
    runner = with_thresholds(runner_of("mlp"), [math.inf, math.inf])
    runner.times = StageTimes((Line(100.0, 0.0),) * 3, (Line(0.0, 0.0),) * 3)
    assert runner(example_of("mlp", 4), deadline_ms=50.0).exit.tolist() == [0] * 4
    assert runner.stats.missed == 0
    runner(example_of("mlp", 4), deadline_ms=1e-6)
    assert runner.stats.missed == 4


def test_more_rows_than_fit_are_run_in_pieces() -> None:
    x = example_of("mlp", 23)
    runner = with_thresholds(runner_of("mlp"), [0.5, 0.5])
    at_once = runner(x)
    runner.max_batch = 5
    pieces = runner(x)
    assert torch.equal(at_once.exit, pieces.exit)
    assert torch.allclose(at_once.logits, pieces.logits, atol=1e-5)


def test_a_row_is_named_by_its_place_in_the_whole_batch() -> None:
    x = example_of("mlp", 23)
    runner = with_thresholds(runner_of("mlp"), [0.5, 0.5])
    runner.max_batch = 5
    x[17] = math.nan
    with pytest.raises(DataError, match=r"values of row 17 \(1 of 23 rows\)"):
        runner(x)
    assert runner.stats.samples == 0
    x[17] = 3e38  # finite, and too large for the network
    with pytest.raises(DataError, match=r"logits of row 17 "):
        runner(x)


@pytest.mark.parametrize("engine", ENGINES)
def test_eight_threads_get_right_answers(engine: str) -> None:
    runner = with_thresholds(runner_of("mlp", engine), [0.5, 0.5])
    batches = [example_of("mlp", 1 + i, seed=i) for i in range(8)]
    wanted = [runner(x).logits for x in batches]
    runner.reset()
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.allclose(runner(batches[i]).logits, wanted[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert runner.stats.samples == 20 * sum(range(1, 9))


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(2, 12, dtype=torch.float64), "expected float32 .* got float64"),
        (torch.zeros(2, 3, 4), r"expected float32 of shape \(batch, 12\), got .*\(2, 3, 4\)"),
        (torch.zeros(2, 11), r"got float32 of shape \(2, 11\)"),
        (torch.zeros(0, 12), "empty batch; pass at least one row"),
        ({"x": torch.zeros(2, 12)}, "the structure .* but the example had"),
        (torch.full((2, 12), math.nan), "row 0 .2 of 2 rows. are not finite: the input has NaN"),
    ],
)
def test_bad_input_is_named(x: object, text: str) -> None:
    with pytest.raises(DataError, match=text):
        runner_of("mlp")(x)


def test_unknown_engine_names_the_nearest() -> None:
    one = case("mlp")
    with pytest.raises(OfframpError, match="Unknown engine 'onnxruntim'.*mean 'onnxruntime'"):
        Runner(one.model, Policy.final(), one.example, engine="onnxruntim")


class Mixing(nn.Module):
    """Subtracts the mean over the batch: no row gets alone what it gets in company."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.centre = Centre()
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.centre(self.first(x)))


class Centre(nn.Module):
    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x - self.share * x.mean(0)


def test_a_model_that_mixes_rows_is_refused_by_module() -> None:
    torch.manual_seed(0)
    model = attach(Mixing().eval(), torch.randn(4, 12), exits=["first"])
    with pytest.raises(EqualityError, match="first module that differs is 'centre'"):
        Runner(model, Policy("confidence", [0.5]), torch.randn(4, 12))


def test_a_little_mixing_is_not_taken_for_rounding() -> None:
    torch.manual_seed(0)
    backbone, example = Mixing().eval(), torch.randn(4, 12)
    backbone.centre.share = 5e-5
    model = attach(backbone, example, exits=["first"])
    with torch.no_grad():
        apart = (model(example).logits[-1][0] - model(example[:1]).logits[-1][0]).abs().max()
    assert TOLERANCE[True] < float(apart) < TOLERANCE[False]
    with pytest.raises(EqualityError, match="first module that differs is 'centre'"):
        Runner(model, Policy("confidence", [0.5]), example)


class Amplifying(nn.Module):
    """Its rounding, which depends on the batch size, comes out a thousandfold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(512, 512)
        self.last = nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(300 * torch.sin(self.first(x)))


def test_rounding_is_not_taken_for_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 512)
    model = attach(Amplifying().eval(), example, exits=["first"])
    with torch.no_grad():
        apart = (model(example).logits[-1][0] - model(example[:1]).logits[-1][0]).abs().max()
    if not apart:
        pytest.skip("this processor rounds alike in both batch sizes")
    monkeypatch.setitem(TOLERANCE, True, 0.0)  # whatever it rounds is too much
    Runner(model, Policy("confidence", [0.5]), example)
    monkeypatch.setattr("offramp.run.proof.only_rounding", lambda *_: False)
    with pytest.raises(EqualityError, match="Something mixes"):
        Runner(model, Policy("confidence", [0.5]), example)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.noise = Noise()
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.noise(self.first(x)))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_a_model_that_draws_random_numbers_is_refused_by_module() -> None:
    torch.manual_seed(0)
    model = attach(Noisy().eval(), torch.randn(4, 12), exits=["first"])
    with pytest.raises(EqualityError, match="first module that differs is 'noise'"):
        Runner(model, Policy("confidence", [0.5]), torch.randn(4, 12))


def test_a_runner_leaves_the_model_as_it_was() -> None:
    backbone = make("cnn").train()
    model = attach(backbone, example_of("cnn"), exits=2)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Runner(model, Policy("confidence", [0.5, 0.5]), example_of("cnn"))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_other_thresholds_need_no_new_stages() -> None:
    one = case("cnn")
    runner = Runner(one.model, Policy("confidence", [0.5, 0.5]), one.example)
    x = example_of("cnn", 9)
    fresh = Runner(one.model, Policy("confidence", [0.3, 0.9]), one.example)
    other = runner.under(Policy("confidence", [0.3, 0.9]))
    assert torch.equal(other(x).exit, fresh(x).exit)
    assert (other.stats.samples, runner.stats.samples) == (9, 0)
    assert runner.policy.thresholds == (0.5, 0.5)


def test_other_thresholds_of_another_rule_or_exit_are_refused() -> None:
    one = case("cnn")
    runner = Runner(one.model, Policy("confidence", [math.inf, 0.5]), one.example)
    with pytest.raises(PolicyError, match="'entropy'"):
        runner.under(Policy("entropy", [0.5, 0.5]))
    with pytest.raises(PolicyError, match="exit 0, which this runner left out"):
        runner.under(Policy("confidence", [0.5, 0.5]))


@pytest.mark.parametrize(("criterion", "cascade"), [("confidence", True), ("patience", False)])
@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_handed_out_at_any_time_may_be_written_to(
    engine: str, arrays: bool, criterion: str, cascade: bool
) -> None:
    example = torch.randn(32, 12)
    layers = [nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(3)]
    net = nn.Sequential(*layers, nn.Linear(12, 4))
    model = attach(net, example, exits=2, cascade=cascade).eval()
    for linear in [m for m in model.heads.modules() if isinstance(m, nn.Linear)]:
        nn.init.normal_(linear.weight)
    runner = Runner(model, Policy(criterion, [9.0, 9.0]), example, engine=engine)
    x = example.numpy() if arrays else example
    wanted = [(a.logits * 1, a.score * 1) for a in runner.anytime(x)]
    for answer, (logits, score) in zip(runner.anytime(x), wanted, strict=True):
        assert np.allclose(answer.logits, logits, atol=1e-6)
        assert np.allclose(answer.score, score, atol=1e-6)
        answer.logits[:] = 7
        answer.score[:] = 7


class Prior(nn.Module):
    """Has an input that is an exit's logits as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.linear = nn.Identity(), nn.Linear(12, 4)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        prior = self.given(prior)
        return self.linear(x) + prior


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [1, 5])
def test_no_answer_is_the_callers_own_array(engine: str, rows: int) -> None:
    example = (torch.randn(5, 12), torch.randn(5, 4))
    model = attach(Prior(), example, exits=["given"], heads=[nn.Identity()]).eval()
    runner = Runner(model, Policy("confidence", [-1.0]), example, engine=engine)
    x, prior = (value[:rows].clone() for value in example)
    before = prior.clone()
    for values in ((x, prior), (x.numpy(), prior.numpy())):
        runner(*values).logits[:] = 7
        runner(*values, deadline_ms=1e6).logits[:] = 7
        for answer in runner.anytime(*values):
            answer.logits[:] = 7
        runner.all_exits(*values)[0][:] = 7
        assert torch.equal(prior, before)
    recorded = runner(x, prior.clone().requires_grad_())
    assert torch.equal(recorded.logits, before)


def test_gradients_can_be_taken_of_what_is_made_of_all_exits() -> None:
    one, weight = case("mlp"), torch.ones(4, requires_grad=True)
    outputs = runner_of("mlp").all_exits(one.example)
    (outputs[0] * weight).sum().backward()
    assert weight.grad is not None
