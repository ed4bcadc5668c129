"""All stages in one call answer as one after the other does, and as the model does."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.build.model import attach
from offramp.decide.policy import Policy
from offramp.errors import DataError, EqualityError, StageError
from offramp.run import onnx_rule, runner
from offramp.run.artifact import export, load
from offramp.run.engines import OnnxRuntime, StepCalls
from offramp.run.rows import RowAxis
from offramp.run.runner import Runner
from offramp.run.times import StageTimes
from tests.networks import example_of
from tests.run.conftest import KINDS, case, whole

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")


@cache
def made(kind: str, criterion: str = "confidence") -> Runner:
    one = case(kind)
    with pytest.MonkeyPatch.context() as patch:  # no timing decides what a test tests
        patch.setattr(runner, "compare", lambda ways, **_: dict.fromkeys(ways, 1.0))
        return Runner(
            one.model, Policy(criterion, [0.5, 0.5]), one.example, engine=OnnxRuntime(threads=1)
        )


def both(kind: str, thresholds: list[float], criterion: str = "confidence") -> tuple[Runner, ...]:
    """In one call, and stage by stage."""
    ways = []
    for in_one_call in (True, False):
        way = made(kind, criterion).under(Policy(criterion, thresholds))
        way.in_one_call, way.times = in_one_call, StageTimes.none()
        ways.append(way)
    return tuple(ways)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_one_call_answers_as_stage_by_stage(kind: str, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 7, 33]))
    thresholds = data.draw(st.lists(st.floats(0.2, 1.01), min_size=2, max_size=2))
    x = example_of(kind, size, data.draw(st.integers(0, 999)))
    scores = [torch.softmax(v, -1).max(-1).values for v in whole(case(kind), x)[:-1]]
    near = [(s - t).abs() <= 1e-4 for s, t in zip(scores, thresholds, strict=True)]
    clear = ~(near[0] | near[1])
    at_once, stepwise = both(kind, thresholds)
    got, wanted = at_once(x), stepwise(x)
    assert torch.equal(got.exit[clear], wanted.exit[clear])
    for name in ("logits", "score", "prediction"):
        torch.testing.assert_close(
            getattr(got, name)[clear], getattr(wanted, name)[clear], rtol=1e-5, atol=1e-5
        )
    if clear.all():
        assert at_once.stats == stepwise.stats


def test_state_of_a_criterion_crosses_too() -> None:
    x = example_of("mlp", 33, 5)
    at_once, stepwise = both("mlp", [1.0, 1.0], "patience")
    got, wanted = at_once(x), stepwise(x)
    assert torch.equal(got.exit, wanted.exit)
    assert len(got.exit.unique()) > 1, "all at one exit would say little"


def test_arrays_come_back_for_arrays() -> None:
    x = example_of("cnn", 5, 1)
    assert isinstance(x, Tensor)
    (at_once, _) = both("cnn", [0.6, 0.6])
    arrays, tensors = at_once(x.numpy()), at_once(x)
    assert isinstance(arrays.logits, np.ndarray)
    for name in ("logits", "score", "prediction", "exit"):
        np.testing.assert_array_equal(getattr(arrays, name), getattr(tensors, name).numpy())


def test_a_row_after_another_is_answered_as_it_would_be_alone(tmp_path: Path) -> None:
    """What came before opens a shorter way; it is taken by rows of the same kind alone."""
    (one, stepwise) = both("cnn", [0.6, 0.6])
    x = example_of("cnn", 6, 3)
    assert isinstance(x, Tensor)
    rows = [x[k : k + 1] for k in range(6)]
    np.save(tmp_path / "rows.npy", x.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for k, row in enumerate(rows):
        wanted = stepwise(row)
        for other in (row.numpy(), row, mapped[k : k + 1], row.numpy(), np.asfortranarray(row)):
            got = one(other)
            assert isinstance(got.logits, Tensor if isinstance(other, Tensor) else np.ndarray)
            assert int(got.exit[0]) == int(wanted.exit[0])
            np.testing.assert_allclose(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert one.stats.samples == 5 * len(rows)
    assert one.stats.exits == tuple(5 * count for count in stepwise.stats.exits)
    with pytest.raises(DataError, match="expected float32"):
        one(rows[0].numpy().astype(np.float64))
    with pytest.raises(DataError, match="expected float32"):
        one(rows[0].numpy().astype(">f4"))
    one.in_one_call = False
    assert one(rows[0].numpy()).exit.tolist() == stepwise(rows[0]).exit.tolist()


def test_other_thresholds_are_taken_by_rows_that_came_before() -> None:
    x = example_of("cnn", 1, 3)
    assert isinstance(x, Tensor)
    (one, _) = both("cnn", [2.0, 2.0])
    for _ in range(3):
        assert one(x.numpy()).exit.tolist() == [2]
    leaves = one.under(Policy("confidence", [-1.0, 2.0]))
    for _ in range(3):
        assert leaves(x.numpy()).exit.tolist() == [0]
        assert one(x.numpy()).exit.tolist() == [2]


@pytest.mark.parametrize("size", [1, 5])
def test_calls_that_were_made_for_other_thresholds_are_given_these(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "compare", lambda ways, **_: dict.fromkeys(ways, 1.0))
    one, x = made("cnn"), example_of("cnn", size, 3)
    for limits, exit in ([-1.0, 2.0], 0), ([2.0, -1.0], 1), ([2.0, 2.0], 2):
        pairs = zip(one._links, [*limits, -math.inf], strict=True)
        links = [replace(link, threshold=limit) for link, limit in pairs]
        policy = Policy("confidence", limits)
        other = Runner.of_links(
            one.engine, links, one._calls, policy, one.costs, one.places, one.call, 1.0
        )
        assert other.in_one_call
        assert other(x).exit.tolist() == [exit] * size


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(size: int, bad: float) -> None:
    x = example_of("cnn", size, 1)
    assert isinstance(x, Tensor)
    x[-1].view(-1)[3] = bad
    (at_once, _) = both("cnn", [-math.inf, -math.inf])
    good = example_of("cnn", size, 1)
    assert isinstance(good, Tensor)
    for _ in range(2):  # the second time by the way that the first has opened
        with pytest.raises(DataError, match=f"row {size - 1} .* not finite"):
            at_once(x.numpy())
        at_once(good.numpy())
    with pytest.raises(DataError, match=f"row {size - 1} .* not finite"):
        at_once(x)


def test_large_values_are_finite() -> None:
    """Their sum is not: they are looked at one by one then."""
    (at_once, _) = both("mlp", [-math.inf, -math.inf])
    x = torch.full_like(example_of("mlp", 2, 0), 3e37)
    first = torch.isfinite(whole(case("mlp"), x)[0]).all()
    if first:
        assert at_once(x).exit.tolist() == [0, 0]
    else:
        with pytest.raises(DataError, match="overflows"):
            at_once(x)
    assert not math.isfinite(float(x.sum() * 1e3))


def test_stages_are_loaded_again_when_they_are_wanted() -> None:
    one, x = made("cnn"), example_of("cnn", 3, 1)
    assert isinstance(one._calls, StepCalls)
    one._calls.release()
    exits = [result.logits for result in one.anytime(x)]
    for got, wanted in zip(exits, whole(case("cnn"), x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    one._calls.release()
    assert one(x, deadline_ms=1e6).exit.shape == (3,)


def test_the_slower_way_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "compare", lambda ways, **_: dict.fromkeys(ways, 1.0))
    mlp = case("mlp")
    one = Runner(mlp.model, Policy("confidence", [0.5, 0.5]), mlp.example, engine="onnxruntime")
    for slower, picked in ((0.5, True), (1.04, True), (1.5, False)):
        times = {"whole": slower, "stepwise": 1.0}
        monkeypatch.setattr(runner, "compare", lambda ways, times=times, **_: times)
        one.measure()
        assert one.in_one_call is picked
        assert (one._whole is not None) is picked, "both would take the memory twice"


def test_a_wrong_graph_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the wrong rows going on, no runner is made."""
    take = onnx_rule._Rule._take

    def upside_down(self: onnx_rule._Rule, value: str, axis: RowAxis | None, at: int) -> str:
        turned = [self._constant([k]) for k in (-1, -1000, 0, -1)]  # from, to, axis, step
        return take(self, self._add("Slice", [value, *turned]), axis, at)

    monkeypatch.setattr(onnx_rule._Rule, "_take", upside_down)
    one = case("mlp")
    with pytest.raises(EqualityError, match="in one call"):
        Runner(one.model, Policy("confidence", [0.5, 0.5]), one.example, engine="onnxruntime")


def test_an_artifact_answers_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = case("encoder"), example_of("encoder", 9, 4)
    scores = [torch.softmax(v, -1).max(-1).values for v in whole(one, x)[:-1]]
    middle = [float(s.sort().values[3:5].mean()) for s in scores]
    assert len({*middle}) == 2
    policy = Policy("confidence", middle)
    path = export(one.model, policy, one.example, tmp_path / "a.offramp")
    monkeypatch.setattr(runner, "compare", lambda ways, **_: dict.fromkeys(ways, 1.0))
    loaded = load(path, OnnxRuntime(threads=1))
    assert loaded.in_one_call
    wanted = Runner(one.model, policy, one.example)(x)
    got = loaded(x)
    assert torch.equal(got.exit, wanted.exit)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def test_a_loaded_artifact_needs_its_folder_no_more(tmp_path: Path) -> None:
    one, x = case("mlp"), example_of("mlp", 2, 0)
    path = export(one.model, Policy("confidence", [0.5, 0.5]), one.example, tmp_path / "a.offramp")
    loaded = load(path)
    assert isinstance(loaded._calls, StepCalls)
    loaded._calls.release()
    shutil.rmtree(path)
    first = next(loaded.anytime(x))
    torch.testing.assert_close(first.logits, whole(one, x)[0], rtol=1e-4, atol=1e-4)


def test_an_engine_that_cannot_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stages were loaded later, it would be picked, or stop everything."""

    def refuses(self: OnnxRuntime, model: bytes) -> None:
        raise StageError("cannot execute this model")

    monkeypatch.setattr(OnnxRuntime, "joins", False)
    monkeypatch.setattr(OnnxRuntime, "session", refuses)
    one = case("mlp")
    made = Runner(one.model, Policy("confidence", [0.5, 0.5]), one.example, engine="auto")
    assert made.engine.name != "onnxruntime"


def test_inputs_are_looked_at_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(runner, "check_finite", lambda given, call: looked.append(len(given)))
    for way, times in zip(both("cnn", [0.6, 0.6]), (0, 1), strict=True):
        looked.clear()
        way(example_of("cnn", 3, 1))
        assert len(looked) == times


class Recurrent(torch.nn.Module):
    """Two recurrent layers, the second behind every exit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(4, 6)
        self.one = torch.nn.LSTM(6, 6, batch_first=True)
        self.two = torch.nn.LSTM(6, 6, batch_first=True)
        self.classifier = torch.nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.embed(x))[0]
        return self.classifier(self.two(x)[0][:, -1])


@pytest.mark.parametrize("stages", [False, True])
def test_recurrent_layers_behind_an_exit_are_guarded_in_a_loaded_file(
    tmp_path: Path, stages: bool
) -> None:
    # Without their guard, ONNX Runtime ends the process where nobody is left.
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4)
    model = attach(Recurrent().eval(), x, exits=["embed", "one"])
    export(model, Policy("confidence", [0.5, 0.5]), x, tmp_path / "made", stages=stages)
    runner = load(tmp_path / "made", OnnxRuntime(threads=1))
    for limits, exit in ([-1.0, -1.0], 0), ([9.0, -1.0], 1), ([9.0, 9.0], 2):
        result = runner.under(Policy("confidence", limits))(x)
        assert result.exit.tolist() == [exit] * 6
        with torch.no_grad():
            torch.testing.assert_close(result.logits, model.eval()(x)[exit], atol=1e-5, rtol=1e-4)
