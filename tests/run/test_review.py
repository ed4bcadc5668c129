"""What a critical reader found: each was a wrong answer, or a crash."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from offramp.build.model import MultiExitModel, attach
from offramp.decide.policy import Policy, replay
from offramp.decide.record import record
from offramp.errors import DataError, EqualityError, PolicyError, StageError
from offramp.run.artifact import export
from offramp.run.evaluating import evaluating
from offramp.run.runner import Runner
from offramp.run.times import StageTimes


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.d(self.b(self.a(x).relu()).relu()).relu())


class MixesLate(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        return self.out(self.d(h - h.mean(0, keepdim=True)).relu())


class CountsRows(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).relu())
        return self.out(self.d(h * 2 if x.shape[0] == 1 else h).relu())


def model_of(kind: Callable[[], nn.Module], example: object, exits: list[str]) -> MultiExitModel:
    torch.manual_seed(0)
    model = attach(kind(), example, exits=exits)
    for linear in [m for m in model.heads.modules() if isinstance(m, nn.Linear)]:
        nn.init.normal_(linear.weight)
    return model.eval()


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("kind", [MixesLate, CountsRows])
def test_rows_that_are_mixed_behind_an_exit_are_noticed(kind: type[Small], rows: int) -> None:
    example = torch.randn(rows, 6)
    model = model_of(kind, example, ["a"])
    with pytest.raises((EqualityError, StageError)):
        Runner(model, Policy("confidence", [0.3]), example)


def test_an_example_that_proves_nothing_is_refused() -> None:
    model = model_of(Small, torch.randn(4, 6), ["a"])
    with pytest.raises(DataError, match="all alike"):
        Runner(model, Policy("confidence", [0.3]), torch.ones(4, 6))


class Two(Small):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.b(self.a(x).relu() - 2 * self.a(y).relu()).relu())


def test_one_tensor_given_twice_stands_for_two_inputs() -> None:
    example = torch.randn(4, 6)
    model = model_of(Two, (example, example), ["b"])
    runner = Runner(model, Policy.final(), (example, example))
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    with torch.no_grad():
        assert torch.allclose(runner(x, y).logits, model.backbone(x, y), atol=1e-6)


def test_a_rule_with_state_and_no_thresholds_is_refused_where_exits_run() -> None:
    example = torch.randn(6, 6)
    model = model_of(Small, example, ["a", "b"])
    none = Policy("arithmetic", None)
    plain = Runner(model, none, example)
    with torch.no_grad():
        wanted = model.backbone(example).softmax(-1)
    assert torch.allclose(plain(example).logits.softmax(-1), wanted, atol=1e-6)
    told = replay(record(model, [example], progress=False), none)
    assert torch.allclose(plain(example).logits, told.logits, atol=1e-6)
    with pytest.raises(PolicyError, match="carries state"):
        Runner(model, none, example, exits="all")
    with pytest.raises(PolicyError, match="carries state"):
        Runner(model, Policy("arithmetic", [0.9, 0.9]), example).under(none)


class Branching(nn.Module):
    """Cannot be exported: it looks at its values."""

    def __init__(self, inside: int, outside: int, act: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inside, outside), nn.BatchNorm1d(outside)
        self.drop, self.act = nn.Dropout(0.5), act

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            x = x * 2
        return self.act(self.drop(self.norm(self.linear(x))))


def test_what_is_cut_by_hand_leaves_the_users_modules_alone() -> None:
    act, example = nn.ReLU(), torch.randn(6, 6)
    torch.manual_seed(0)
    net = nn.Sequential(Branching(6, 8, act), act, Branching(8, 8, act), act, nn.Linear(8, 5))
    model = attach(net, example, exits=["2"])
    with torch.no_grad():
        wanted = net.eval()(example)
    model.train()
    runner = Runner(model, Policy("confidence", [2.0]), example)
    assert all(module.training for module in net.modules())
    before = net[0].norm.running_mean.clone()
    assert torch.allclose(runner(example).logits, wanted, atol=1e-6)
    assert torch.equal(net[0].norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_decide_as_their_trace(dtype: torch.dtype, tmp_path: Path) -> None:
    example = torch.randn(64, 6).to(dtype)
    torch.manual_seed(0)
    model = attach(Small().to(dtype), example, exits=["a", "b"]).eval()
    x = torch.randn(500, 6).to(dtype)
    trace = record(model, [x], progress=False)
    scores = trace.logits[0].softmax(-1).max(-1).values
    policy = Policy("confidence", [float(scores.median()), 0.5])
    runner = Runner(model, policy, example)
    runner.times = StageTimes.none()
    assert (runner(x).exit == replay(trace, policy).exit).float().mean() > 0.97
    if dtype == torch.float64:
        path = export(model, policy, example, tmp_path / "double")
        session = onnxruntime.InferenceSession(path / "model.onnx")
        _, _, exit, _ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert (torch.as_tensor(exit) == replay(trace, policy).exit).float().mean() > 0.99


class Padded(nn.Module):
    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.out = nn.Linear(16, 3)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(ids), src_key_padding_mask=padding).mean(1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_fused_kernels_that_answer_otherwise_are_named(nested: bool) -> None:
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[:2, 4:] = True
    example = (torch.randint(1, 20, (4, 7)), padding)
    torch.manual_seed(0)
    model = attach(Padded(nested), example, exits=["embed"]).eval()
    if nested:
        with pytest.raises(EqualityError, match="enable_nested_tensor=False"):
            Runner(model, Policy.final(), example)
    else:
        Runner(model, Policy.final(), example)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x.flatten(1)).relu()).relu())


def test_any_strides_do() -> None:
    example = torch.randn(4, 3, 8, 8)
    model = model_of(Flat, example, ["b"])
    runner = Runner(model, Policy.final(), example)
    x = torch.randn(5, 8, 8, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert torch.allclose(runner(x).logits, model.backbone(x), atol=1e-6)
    flipped = x.numpy()[..., ::-1]
    with torch.no_grad():
        wanted = model.backbone(torch.from_numpy(flipped.copy()))
    assert np.allclose(runner(flipped).logits, wanted, atol=1e-5)


class Late(Small):
    def forward(self, x: Tensor, late: Tensor, never: Tensor) -> Tensor:
        return self.out(self.d(self.b(self.a(x).relu()).relu()).relu() + late)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_inputs_that_are_read_late_or_never(engine: str, tmp_path: Path) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    example = (torch.randn(4, 6), torch.randn(4, 8), torch.randn(4, 2))
    model = model_of(Late, example, ["a", "b"])
    runner = Runner(model, Policy("confidence", [0.4, 0.4]), example, engine=engine)
    x = (torch.randn(9, 6), torch.randn(9, 8), torch.randn(9, 2))
    trace = model(*x)
    got = runner(*x)
    for row, exit in enumerate(got.exit.tolist()):
        assert torch.allclose(got.logits[row], trace[exit][row], atol=1e-4)


class Named(Small):
    def forward(self, score: Tensor) -> Tensor:
        return super().forward(score)


def test_an_input_with_the_name_of_an_output_is_refused(tmp_path: Path) -> None:
    example = {"score": torch.randn(4, 6)}
    model = model_of(Named, example, ["a"])
    with pytest.raises(StageError, match="one name cannot stand for two"):
        export(model, Policy("confidence", [0.5]), example, tmp_path / "named")


class Writes(Small):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.3
        return super().forward(x)


def test_the_example_is_not_written_to() -> None:
    example = torch.randn(4, 6)
    before = example.clone()
    model = model_of(Writes, example.clone(), ["a"])
    with contextlib.suppress(EqualityError, StageError):  # such a network may be refused
        Runner(model, Policy("confidence", [0.5]), example)
    assert torch.equal(example, before)


def test_answers_are_ordinary_tensors() -> None:
    example = torch.randn(4, 6)
    runner = Runner(model_of(Small, example, ["a"]), Policy("confidence", [0.3]), example)
    for x in (torch.randn(1, 6), torch.randn(8, 6)):
        logits = runner(x).logits
        logits += 1
        assert not logits.is_inference()


def test_rules_that_count_are_compared_in_the_proof(tmp_path: Path) -> None:
    example = torch.randn(16, 6)
    model = model_of(Small, example, ["a", "b"])
    path = export(model, Policy("patience", [1, 1]), example, tmp_path / "patience")
    session = onnxruntime.InferenceSession(path / "model.onnx")
    x = torch.randn(200, 6)
    _, _, exit, _ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    trace = record(model, [x], progress=False)
    assert exit.tolist() == replay(trace, Policy("patience", [1, 1])).exit.tolist()
    assert len(set(exit.tolist())) > 1


def test_the_switch_of_the_fast_path_outlives_overlapping_use() -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with evaluating(nn.Linear(1, 1)):
            inside.set()
            leave.wait(10)

    was = torch.backends.mha.get_fastpath_enabled()
    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with evaluating(nn.Linear(1, 1)):
        leave.set()
        thread.join()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == was


def test_a_threshold_is_compared_alike_for_one_row_and_for_many() -> None:
    example = torch.randn(16, 6)
    model = model_of(Small, example, ["a"])
    scores = record(model, [example], progress=False).logits[0].softmax(-1).max(-1).values
    just = Runner(model, Policy("confidence", [float(scores[3])]), example)
    assert math.isclose(float(just(example).score[3]), float(scores[3]), rel_tol=1e-5)
    exits = [int(just(example[i : i + 1]).exit[0]) for i in range(16)]
    assert exits == just(example).exit.tolist()


class Halving(nn.Module):
    """Writes into what it is given, and cannot be exported: it looks at its values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.div_(2) if bool(x.abs().sum() >= 0) else x


def test_stages_that_write_into_their_input_leave_the_callers_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Halving(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    example = torch.randn(4, 6)
    before = example.clone()
    model = attach(net.eval(), example.clone(), exits=["1"])
    runner = Runner(model, Policy("confidence", [0.5]), example)
    given = example.numpy().copy()
    first, second = runner(given), runner(given)
    assert torch.equal(example, before)
    assert np.array_equal(given, before.numpy())
    assert np.array_equal(first.logits, second.logits)
