"""One set of tests for all engines: whatever executes the stages, the answers are the model's."""

from __future__ import annotations

import math
import shutil
import threading
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from offramp.build.model import MultiExitModel, attach
from offramp.decide.policy import Policy
from offramp.decide.record import record
from offramp.errors import DataError, EqualityError, OfframpError, StageError
from offramp.run.engines import OnnxRuntime, OpenVINO, Torch
from offramp.run.proof import TOLERANCE
from offramp.run.runner import Runner
from offramp.run.times import Line, StageTimes
from tests.networks import example_of
from tests.run.conftest import KINDS, case, rows_of, whole

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")

NAMES = ("torch", "onnxruntime", "openvino")
MIXED = "mixed"  # each exit is taken by about as many as stay


def _cases() -> list[object]:
    """Every engine on every kind of network; of those that compile, the quickest and slow ones."""
    slow = [pytest.param(("inductor", kind), marks=pytest.mark.slow) for kind in ("cnn", "encoder")]
    found = [(name, kind) for name in NAMES for kind in KINDS]
    return [*found, ("auto", "cnn"), ("inductor", "mlp"), *slow]


every = pytest.mark.parametrize("engine_kind", _cases(), ids=lambda one: "-".join(one))


@cache
def _made(engine: str, kind: str, criterion: str) -> Runner:
    one = case(kind)
    return Runner(one.model, Policy(criterion, [0.5, 0.5]), one.example, engine=engine)


def runner_of(
    engine_kind: tuple[str, str],
    thresholds: list[float] | str = MIXED,
    criterion: str = "confidence",
) -> Runner:
    """A runner that always compacts: no timing decides what a test tests."""
    engine, kind = engine_kind
    if engine == "openvino":
        pytest.importorskip("openvino")
    if engine == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is no g++")
    if thresholds == MIXED:
        thresholds = medians(kind)
    made = _made(engine, kind, criterion)
    runner = made.under(Policy(made.policy.criterion, thresholds))
    runner.times = StageTimes.none()
    return runner


@cache
def medians(kind: str) -> list[float]:
    """Thresholds midway between two scores in the middle of a batch, at each exit."""
    found = []
    for logits in whole(case(kind), example_of(kind, 64, seed=2))[:-1]:
        scores = torch.softmax(logits, -1).max(-1).values.sort().values
        gaps = scores[24:40].diff()
        at = 24 + int(gaps.argmax())
        found.append(float(scores[at] + scores[at + 1]) / 2)
    return found


def by_hand(kind: str, x: object, thresholds: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle: exit and logits of each row, and whether no score is close to its threshold."""
    logits = whole(case(kind), x)
    exits = torch.full((len(logits[0]),), len(logits) - 1)
    answers = logits[-1].clone()
    clear = torch.ones(len(exits), dtype=torch.bool)
    for k in reversed(range(len(thresholds))):
        score = torch.softmax(logits[k], -1).max(-1).values
        leaves = score >= thresholds[k]
        exits[leaves], answers[leaves] = k, logits[k][leaves]
        clear &= (score - thresholds[k]).abs() > 1e-4
    return exits, answers, clear


def far(got: object, wanted: Tensor) -> float:
    """Difference relative to the largest absolute value."""
    difference = (torch.as_tensor(got) - wanted).abs().max()
    return float(difference / wanted.abs().max().clamp(min=1))


@every
def test_no_exit_taken_is_the_backbone(engine_kind: tuple[str, str]) -> None:
    one, runner = case(engine_kind[1]), runner_of(engine_kind, [math.inf, math.inf])
    for size in (1, 5, 8):
        x = example_of(one.kind, size, seed=size)
        with torch.no_grad():
            out = one.backbone(**x) if isinstance(x, dict) else one.backbone(x)
        wanted = out["logits"] if isinstance(out, dict) else out
        result = runner(x)
        assert result.exit.tolist() == [2] * size
        assert torch.equal(result.prediction, wanted.argmax(-1))
        assert far(result.logits, wanted) <= TOLERANCE[False]
        if runner.engine.exact:
            assert torch.equal(result.logits, wanted)


@every
@pytest.mark.parametrize("size", [1, 5, 8])
def test_every_sample_gets_what_it_gets_alone(engine_kind: tuple[str, str], size: int) -> None:
    kind, runner = engine_kind[1], runner_of(engine_kind)
    x = example_of(kind, size, seed=10 + size)
    exits, answers, clear = by_hand(kind, x, medians(kind))
    assert clear.any()
    result = runner(x)
    assert torch.equal(result.exit[clear], exits[clear])
    assert far(result.logits[clear], answers[clear]) <= TOLERANCE[False]
    for row in range(size):
        alone = runner(rows_of(x, slice(row, row + 1)))
        if clear[row]:
            assert alone.exit[0] == result.exit[row]
            assert far(alone.logits[0], result.logits[row]) <= 1e-5


@every
def test_all_exits_are_taken_in_these_tests(engine_kind: tuple[str, str]) -> None:
    """Otherwise the others would say little."""
    result = runner_of(engine_kind)(example_of(engine_kind[1], 64, seed=2))
    assert result.exit.unique().tolist() == [0, 1, 2]


@every
def test_rows_come_back_in_their_order(engine_kind: tuple[str, str]) -> None:
    kind, runner = engine_kind[1], runner_of(engine_kind)
    x = example_of(kind, 16, seed=9)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    clear = by_hand(kind, x, medians(kind))[2][order]
    straight, mixed = runner(x), runner(rows_of(x, order))
    assert torch.equal(straight.exit[order][clear], mixed.exit[clear])
    assert far(straight.logits[order][clear], mixed.logits[clear]) <= 1e-5


@every
def test_numpy_in_numpy_out(engine_kind: tuple[str, str]) -> None:
    runner, x = runner_of(engine_kind), example_of(engine_kind[1], 5)
    given = {k: v.numpy() for k, v in x.items()} if isinstance(x, dict) else x.numpy()
    result, wanted = runner(given), runner(x)
    for name in ("prediction", "logits", "exit", "score"):
        value, tensor = getattr(result, name), getattr(wanted, name)
        assert isinstance(value, np.ndarray)
        assert isinstance(tensor, Tensor)
        assert np.array_equal(value, tensor.numpy())
        assert value.dtype == tensor.numpy().dtype


@pytest.mark.parametrize("engine", [*NAMES, "inductor"])
def test_state_of_a_criterion_goes_along(engine: str) -> None:
    kind = "mlp" if engine == "inductor" else "encoder"
    runner = runner_of((engine, kind), [math.inf, 1.0], "patience")
    x = example_of(kind, 64, seed=5)
    logits = whole(case(kind), x)
    agree = logits[0].argmax(-1) == logits[1].argmax(-1)
    assert 0 < agree.sum() < 64
    assert torch.equal(runner(x).exit, torch.where(agree, 1, 2))


@every
def test_anytime_yields_each_exit_in_turn(engine_kind: tuple[str, str]) -> None:
    kind = engine_kind[1]
    x = example_of(kind, 5)
    results = list(runner_of(engine_kind).anytime(x))
    assert [r.exit.unique().tolist() for r in results] == [[0], [1], [2]]
    for result, wanted in zip(results, whole(case(kind), x), strict=True):
        assert far(result.logits, wanted) <= TOLERANCE[False]


@every
def test_a_deadline_takes_the_best_answer_in_time(engine_kind: tuple[str, str]) -> None:
    kind, runner = engine_kind[1], runner_of(engine_kind, [math.inf, math.inf])
    x = example_of(kind, 5)
    logits = whole(case(kind), x)
    instant, endless = Line(0.0, 0.0), Line(1e4, 0.0)
    for stages, wanted in (
        ((instant, endless, endless), 0),
        ((instant, instant, endless), 1),
        ((instant, instant, instant), 2),
    ):
        runner.times = StageTimes(stages, (instant,) * 3)
        result = runner(x, deadline_ms=1e6)
        assert result.exit.tolist() == [wanted] * 5
        assert far(result.logits, logits[wanted]) <= TOLERANCE[False]
    assert runner.stats.missed == 0
    runner(x, deadline_ms=1e-6)
    assert runner.stats.missed == 5


@every
def test_what_runs_can_be_recorded(engine_kind: tuple[str, str]) -> None:
    one = case(engine_kind[1])
    batches = [example_of(one.kind, size, seed=size) for size in (8, 3)]
    trace = record(runner_of(engine_kind), batches, progress=False)
    wanted = record(one.model, batches, progress=False)
    assert far(trace.logits, wanted.logits) <= TOLERANCE[False]
    assert torch.equal(trace.stage_costs, wanted.stage_costs)


@every
def test_eight_threads_on_one_runner(engine_kind: tuple[str, str]) -> None:
    kind, runner = engine_kind[1], runner_of(engine_kind)
    batches = [example_of(kind, 1 + i, seed=i) for i in range(8)]
    wanted = [runner(x).logits for x in batches]
    runner.reset()
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(5):
                if far(runner(batches[i]).logits, wanted[i]) > 1e-5:
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert runner.stats.samples == 5 * sum(range(1, 9))


def test_compiled_code_is_bounded() -> None:
    """One code object a stage, for one row and for more: no batch size compiles anything anew."""
    runner = runner_of(("inductor", "mlp"))
    for size in (1, 2, 64):
        runner(example_of("mlp", size, seed=size))
    before = counters["stats"]["unique_graphs"]
    for size in (3, 5, 7, 8, 17, 31, 33, 100):
        for thresholds in ([0.0, 0.0], [9.0, 9.0], medians("mlp")):
            policy = Policy(runner.policy.criterion, thresholds)
            runner.under(policy)(example_of("mlp", size, seed=size))
    assert counters["stats"]["unique_graphs"] == before


def test_a_stage_is_compiled_twice_at_most() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is no g++")
    one = case("mlp")
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    runner = Runner(one.model, Policy("confidence", [0.5, 0.5]), one.example, engine="inductor")
    for size in (1, 2, 9, 40):
        runner(example_of("mlp", size, seed=size))
    assert counters["stats"]["unique_graphs"] - before <= 2 * 3


def test_the_picked_engine_is_named(caplog: pytest.LogCaptureFixture) -> None:
    one = case("mlp")
    with caplog.at_level("INFO", logger="offramp"):
        runner = Runner(one.model, Policy.final(), one.example, engine="auto")
    assert runner.engine.name in {"torch", "onnxruntime", "openvino"}
    times = [r.args for r in caplog.records if "ms for a batch" in r.getMessage()]
    best = min(times, key=lambda args: args[1])
    assert runner.engine.name == best[0]
    assert any(r.getMessage() == f"engine {best[0]} picked" for r in caplog.records)


def test_an_engine_can_be_given_with_its_settings() -> None:
    pytest.importorskip("openvino")
    one = case("mlp")
    wanted = whole(one, one.example)[-1]
    for engine in (OnnxRuntime(threads=1), OpenVINO(threads=1)):
        runner = Runner(one.model, Policy.final(), one.example, engine=engine)
        assert runner.engine is engine
        assert engine.threads == 1
        assert far(runner(one.example).logits, wanted) <= TOLERANCE[False]


def test_one_engine_serves_one_device() -> None:
    one, engine = case("mlp"), Torch()
    Runner(one.model, Policy.final(), one.example, engine=engine)
    Runner(one.model, Policy.final(), one.example, engine=engine)
    with pytest.raises(OfframpError, match="serves a runner on cpu.* one on meta"):
        engine.serve(torch.device("meta"))


class Large(nn.Module):
    """Takes numbers of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(2, 12), nn.Linear(12, 12)
        self.last = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.hidden(self.embed((ids > 500_000).long()).sum(1)).relu())


def test_integers_that_openvino_would_cut_are_refused() -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    small, edge = {"ids": torch.randint(10**6, (6, 5))}, 2**31
    model = attach(Large().eval(), small, exits=["hidden"]).eval()
    policy = Policy("confidence", [0.4])
    runner = Runner(model, policy, small, engine="openvino")
    plain = Runner(model, policy, small)
    for value in (edge - 1, -edge):
        given = small["ids"].clone()
        given[2, 3] = value
        assert torch.allclose(runner(ids=given).logits, plain(ids=given).logits, atol=1e-4)
    for value in (edge, -edge - 1, 2**40):
        given[2, 3] = value
        with pytest.raises(DataError, match=f"'ids' has values .*{value}.*engine='onnxruntime'"):
            runner(ids=given)
        with pytest.raises(DataError, match="OpenVINO keeps 32 bits"):
            runner(ids=given.numpy())
        with pytest.raises(DataError, match="OpenVINO keeps 32 bits"):
            next(runner.anytime(ids=given))
    with pytest.raises(DataError, match="OpenVINO keeps 32 bits"):
        Runner(model, policy, {"ids": given}, engine="openvino")


def precise(dtype: torch.dtype) -> tuple[MultiExitModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 12).to(dtype)
    net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    return attach(net.to(dtype), x, exits=["0"]).eval(), x


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_numpy_does_not_know_is_refused_by_name(engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    model, x = precise(torch.bfloat16)
    with pytest.raises(StageError, match="bfloat16"):
        Runner(model, Policy("confidence", [0.5]), x, engine=engine)


def test_auto_passes_over_engines_that_cannot_take_the_example() -> None:
    model, x = precise(torch.bfloat16)
    assert Runner(model, Policy("confidence", [0.5]), x, engine="auto").engine.name == "torch"


def test_auto_passes_over_engines_that_answer_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def first(names: list[str], load: object, *args: object) -> tuple[object, object]:
        engine = OnnxRuntime() if "onnxruntime" in names else Torch()
        tried.append(engine.name)
        return engine, load(engine)  # type: ignore[operator]

    def prove(made: Runner, *args: object) -> None:
        if not made.engine.exact or wrong:
            raise EqualityError("differs")

    monkeypatch.setattr("offramp.run.runner.fastest", first)
    monkeypatch.setattr("offramp.run.runner.prove", prove)
    model, x = precise(torch.float32)
    wrong = False
    runner = Runner(model, Policy("confidence", [0.5]), x, engine="auto")
    assert runner.engine.name == "torch"
    assert tried == ["onnxruntime", "torch"]
    wrong = True  # also torch: it is the model
    with pytest.raises(EqualityError):
        Runner(model, Policy("confidence", [0.5]), x, engine="auto")
