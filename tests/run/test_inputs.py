"""What must not be given to a runner: refused by name, and the runner goes on."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp.build.model import attach
from offramp.decide.policy import Policy
from offramp.errors import DataError, OfframpError, StageError
from offramp.run.artifact import export, load
from offramp.run.runner import Runner
from offramp.run.times import MEMORY, StageTimes, rows_in_memory
from tests.networks import example_of
from tests.run.conftest import case, rows_of
from tests.run.test_select import graphs
from tests.run.test_select import made as graph_model

ENGINES = ("torch", "onnxruntime", "openvino")


@cache
def _made(kind: str, engine: str) -> Runner:
    one = case(kind)
    return Runner(one.model, Policy("confidence", [0.5, 0.5]), one.example, engine=engine)


def runner_of(kind: str, engine: str) -> Runner:
    if engine == "openvino":
        pytest.importorskip("openvino")
    made = _made(kind, engine)
    fresh = made.under(made.policy)
    fresh.times = StageTimes.none()
    return fresh


def spoilt(value: float) -> Tensor:
    """Five images, the fourth with one bad value."""
    x = example_of("cnn", 5)
    x[3, 1, 2, 3] = value
    return x


IMAGES = {
    "dtype": (torch.zeros(2, 3, 16, 16, dtype=torch.float64), "expected float32 .* got float64"),
    "half": (torch.zeros(2, 3, 16, 16, dtype=torch.float16), "expected float32 .* got float16"),
    "bytes": (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "expected float32 .* got uint8"),
    "rank": (torch.zeros(3, 16, 16), r"shape \(batch, 3, 16, 16\), got .* \(3, 16, 16\)"),
    "channels": (torch.zeros(2, 1, 16, 16), r"got float32 of shape \(2, 1, 16, 16\)"),
    "layout": (torch.zeros(2, 16, 16, 3), r"got float32 of shape \(2, 16, 16, 3\)"),
    "size": (torch.zeros(2, 3, 16, 17), r"got float32 of shape \(2, 3, 16, 17\)"),
    "scalar": (torch.tensor(1.0), r"got float32 of shape \(\)"),
    "empty": (torch.zeros(0, 3, 16, 16), "empty batch; pass at least one row"),
    "nan": (spoilt(math.nan), "row 3 .1 of 5 rows. are not finite: the input has NaN or infinite"),
    "infinite": (spoilt(math.inf), "row 3 .1 of 5 rows. are not finite: the input has NaN"),
    "mapping": ({"x": torch.zeros(2, 3, 16, 16)}, "the structure .* but the example had"),
    "two": ((torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)), "the structure"),
    "list": ([[0.0] * 16], "the structure"),
    "text": ("image.png", "the structure"),
    "nothing": (None, "the structure"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", IMAGES)
def test_a_bad_image_is_named_and_the_next_is_answered(engine: str, what: str) -> None:
    given, text = IMAGES[what]
    runner = runner_of("cnn", engine)
    x = example_of("cnn", 4)
    wanted = runner(x)
    runner.reset()
    with pytest.raises(DataError, match=text):
        runner(given)
    assert runner.stats.samples == 0
    assert torch.equal(runner(x).logits, wanted.logits)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["dtype", "rank", "channels", "empty", "nan", "infinite"])
def test_a_bad_array_is_named_alike(engine: str, what: str) -> None:
    given, text = IMAGES[what]
    with pytest.raises(DataError, match=text):
        runner_of("cnn", engine)(given.numpy())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input_ids": torch.zeros(2, 9)}, "'input_ids': expected int64 .* got float32"),
        ({"input_ids": torch.zeros(2, 9, dtype=torch.int32)}, "'input_ids': .* got int32"),
        ({"attention_mask": torch.ones(2, 8, dtype=torch.int64)}, r"'attention_mask': .*\(2, 8\)"),
        ({"attention_mask": torch.ones(3, 9, dtype=torch.int64)}, "different numbers of rows"),
        ({"attention_mask": None}, "the structure"),
        ({"token_type_ids": torch.ones(2, 9, dtype=torch.int64)}, "the structure"),
    ],
)
def test_bad_text_is_named(engine: str, change: dict[str, object], text: str) -> None:
    with pytest.raises(DataError, match=text):
        runner_of("encoder", engine)({**example_of("encoder", 2), **change})


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
@pytest.mark.parametrize("wrong", [10**6, -1, -100])
def test_tokens_outside_of_the_vocabulary_are_refused(engine: str, wrong: int) -> None:
    """ONNX Runtime would count negative ones from the end, and OpenVINO answer for any."""
    x = example_of("encoder", 2)
    x["input_ids"][1, 0] = wrong
    runner = runner_of("encoder", engine)
    for batch in (x, {name: value[1:] for name, value in x.items()}):
        with pytest.raises(DataError, match=rf"'input_ids' has values from .*{abs(wrong)}"):
            runner(batch)
        with pytest.raises(DataError, match="'input_ids' has values from"):
            runner(batch, deadline_ms=1e4)


@pytest.mark.parametrize("policy", [Policy("patience", [0.0, 0.0]), Policy("confidence", [-9, 0])])
def test_a_row_that_is_not_finite_does_not_leave_early_unseen(policy: Policy) -> None:
    """Rules that count would let it go at once, and so do thresholds that everything reaches."""
    one = case("cnn")
    runner = Runner(one.model, policy, one.example)
    with pytest.raises(DataError, match="row 3"):
        runner(spoilt(math.nan))
    with pytest.raises(DataError, match="row 0 .1 of 1 rows"):
        runner(spoilt(math.nan)[3:4])


def test_graphs_that_are_not_finite_are_named_too() -> None:
    runner = Runner(graph_model(), Policy("confidence", [0.5, 0.5]), graphs())
    x = graphs(seed=4)
    x["x"][-1, 0] = math.nan  # a node of the last graph
    with pytest.raises(DataError, match="row 32 .1 of 33 rows. .* NaN or infinite values in 'x'"):
        runner(x)
    x["x"][-1] = 3e38
    with pytest.raises(DataError, match="row 5 .1 of 6 rows. .* the model overflows"):
        runner(x)


class Missing(nn.Module):
    """Tells NaN in its input from numbers by itself, as tables have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.nan_to_num(0.0))))


def test_what_is_not_finite_in_the_example_is_allowed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 6)
    example[1, 2] = math.nan
    model = attach(Missing().eval(), example, exits=["first"])
    policy = Policy("confidence", [2.0])
    wanted = Runner(model, policy, example)(example)
    assert wanted.logits.isfinite().all()
    loaded = load(export(model, policy, example, tmp_path / "a.offramp"))
    assert torch.allclose(loaded(example).logits, wanted.logits, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["cnn", "encoder"])
@pytest.mark.parametrize("arrays", [False, True])
def test_more_rows_than_memory_holds_are_run_in_pieces(
    engine: str, kind: str, arrays: bool
) -> None:
    runner, x = runner_of(kind, engine), example_of(kind, 23)
    if arrays:
        x = {k: v.numpy() for k, v in x.items()} if isinstance(x, dict) else x.numpy()
    at_once = runner(x)
    runner.reset()
    runner.max_batch = 5
    pieces = runner(x)
    assert isinstance(pieces.logits, np.ndarray) == arrays
    assert pieces.exit.tolist() == at_once.exit.tolist()
    assert np.allclose(pieces.logits, at_once.logits, atol=1e-5)
    assert runner.stats.samples == 23
    runner.max_batch = 1
    assert runner(rows_of(x, slice(0, 3))).exit.tolist() == at_once.exit.tolist()[:3]


def test_what_fits_into_memory_is_told_by_what_is_free() -> None:
    cpu = torch.device("cpu")
    assert rows_in_memory(1e30, cpu) == 1  # one row at a time, whatever it takes
    assert rows_in_memory(1e6, cpu) > rows_in_memory(1e8, cpu) > 1
    assert rows_in_memory(0, cpu) > 1e6


def test_every_error_is_of_the_library() -> None:
    runner = runner_of("cnn", "torch")
    for given, _ in IMAGES.values():
        with pytest.raises(OfframpError):
            runner(given)


def test_reversed_arrays_are_cut_into_pieces_and_named() -> None:
    runner, x = runner_of("cnn", "torch"), example_of("cnn", 7).numpy()[:, :, ::-1]
    wanted = runner(x.copy())
    runner.max_batch = 3
    assert np.allclose(runner(x).logits, wanted.logits, atol=1e-5)
    bad = x.copy()
    bad[4, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="row 4"):
        runner(bad[:, :, ::-1])
    runner.max_batch = 100
    with pytest.raises(DataError, match="row 4"):
        runner(bad[:, :, ::-1])


def reversed_in_memory(kind: str) -> dict[str, np.ndarray]:
    """Arrays that run backwards; the last of one row, which numpy calls contiguous all the same."""
    x = example_of(kind, 7).numpy()
    return {"rows": x[::-1], "columns": x[..., ::-1], "one row": x[:1][::-1]}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["rows", "columns", "one row", "read-only"])
@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_arrays_in_any_memory_are_answered(engine: str, what: str) -> None:
    runner = runner_of("mlp", engine)
    x = reversed_in_memory("mlp").get(what)
    if x is None:
        x = example_of("mlp", 7).numpy().copy()
        x.flags.writeable = False
    wanted = runner(x.copy())
    assert np.allclose(runner(x).logits, wanted.logits, atol=1e-6)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("most", [2, 100])
def test_graphs_in_any_memory_are_answered(engine: str, most: int) -> None:
    runner = _graphs(engine)
    plain = graphs(5)
    arrays = {name: value.numpy() for name, value in plain.items()}
    flipped = {**arrays, "x": arrays["x"][:, ::-1]}
    wanted = runner(**{**arrays, "x": flipped["x"].copy()})
    runner.max_batch = most
    got = runner(**flipped)
    assert np.array_equal(got.exit, wanted.exit)
    assert np.allclose(got.logits, wanted.logits, atol=1e-5)
    wanted = _graphs(engine)(**plain)
    recorded = {**plain, "x": plain["x"].clone().requires_grad_()}
    got = runner(**recorded)
    assert torch.equal(got.exit, wanted.exit)
    assert torch.allclose(got.logits, wanted.logits, atol=1e-5)


@cache
def _made_of_graphs(engine: str) -> Runner:
    return Runner(graph_model(), Policy("confidence", [0.5, 0.45]), graphs(), engine=engine)


def _graphs(engine: str) -> Runner:
    """One that compacts at every exit."""
    made = _made_of_graphs(engine)
    fresh = made.under(made.policy)
    fresh.times = StageTimes.none()
    return fresh


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_graphs_without_edges_are_a_batch_and_no_graphs_are_none(engine: str) -> None:
    runner = _graphs(engine)
    bare = {
        "x": torch.randn(3, 5),
        "edges": torch.empty(2, 0, dtype=torch.int64),
        "batch": torch.tensor([0, 1, 1]),
        "graphs": torch.arange(2),
    }
    with torch.no_grad():
        wanted = list(graph_model()(**bare))
    result = runner(**bare)
    for row, exit in enumerate(result.exit.tolist()):
        assert torch.allclose(result.logits[row], wanted[exit][row], atol=1e-5)
    none = {**bare, "x": bare["x"][:0], "batch": bare["batch"][:0], "graphs": bare["graphs"][:0]}
    with pytest.raises(DataError, match="'graphs' is an empty batch"):
        runner(**none)


class Optional(nn.Module):
    """One tensor, and what may be left out or is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h if mask is None else h * mask) * scale


@pytest.mark.parametrize("kind", [Tensor.numpy, Tensor.clone])
@pytest.mark.parametrize("given", [{"mask": torch.ones(4, 8)}, {"scale": torch.tensor([1.0, 2.0])}])
def test_a_tensor_in_the_place_of_a_constant_is_refused(
    kind: Callable[[Tensor], object], given: dict[str, Tensor]
) -> None:
    example = {"x": torch.randn(4, 6), "mask": None, "scale": 2.0}
    runner = Runner(attach(Optional(), example, exits=["first"]), Policy.final(), example)
    assert len(runner(**example).exit) == 4
    other = {name: kind(value) for name, value in given.items()}
    with pytest.raises(DataError, match=r"has the structure .* but the example had \(mask=None"):
        runner(**{**example, **other})


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_arrays_are_an_example_as_tensors_are(engine: str, tmp_path: Path) -> None:
    one, policy = case("mlp"), Policy("confidence", [0.5, 0.5])
    array = one.example.numpy()[:, ::-1]
    array.flags.writeable = False
    runner, wanted = Runner(one.model, policy, array, engine=engine), runner_of("mlp", engine)
    for x in (example_of("mlp", 7), example_of("mlp", 7).numpy()):
        assert np.array_equal(runner(x).exit, wanted(x).exit)
        assert type(runner(x).logits) is type(x)
    if engine == "onnxruntime":
        made = load(export(one.model, policy, array, tmp_path / "made"))
        assert np.array_equal(made(x).exit, wanted(x).exit)


class Named(nn.Module):
    """One positional argument that is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.last(torch.tanh(self.first(batch["u"] - batch["v"])))


def test_a_mapping_may_be_the_one_argument() -> None:
    given = {"u": torch.randn(4, 6), "v": torch.randn(4, 6)}
    model = attach(Named(), (given,), exits=["first"])
    runner = Runner(model, Policy.final(), (given,))
    with torch.no_grad():
        wanted = model(given).final
    for args in ((given,), ((given,),)):  # as the model is called, and as the example was given
        assert torch.allclose(runner(*args).logits, wanted, atol=1e-6)
    with pytest.raises(DataError, match="the structure"):
        runner(**given)


@pytest.mark.skipif(not MEMORY.is_file(), reason="this system does not tell")
def test_memory_that_files_fill_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemFree:  100 kB\nMemAvailable:   4000 kB\nCached:  3900 kB\n", "ascii")
    monkeypatch.setattr("offramp.run.times.MEMORY", told)
    assert rows_in_memory(1024, torch.device("cpu")) == 2000
    told.write_text("MemFree:  100 kB\n", "ascii")  # as before Linux 3.14
    assert rows_in_memory(1024, torch.device("cpu")) > 2000


def test_labels_in_an_example_are_no_input(tmp_path: Path) -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits

    x = torch.randn(6, 6)
    batch = {"x": x, "labels": torch.zeros(6, dtype=torch.int64)}
    model = attach(Keyed().eval(), batch, exits=["net.0"])
    policy = Policy("confidence", [0.5])
    made = Runner(model, policy, batch)
    loaded = load(export(model, policy, batch, tmp_path / "made"))
    assert made.call.names == loaded.call.names == ("x",)
    for runner in (made, loaded):
        assert torch.equal(runner(**batch).prediction, made(x=x).prediction)


def test_a_runner_made_under_autocast_is_that_of_the_model(tmp_path: Path) -> None:
    one, x = case("mlp"), example_of("mlp", 9, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        made = Runner(one.model, Policy.final(), one.example)
        loaded = load(export(one.model, Policy.final(), one.example, tmp_path / "made"))
    expected = one.model.backbone(x)
    assert torch.equal(made(x).logits, expected)
    assert torch.allclose(torch.as_tensor(loaded(x).logits), expected, atol=1e-5)


def test_a_runner_is_neither_pickled_nor_copied() -> None:
    made = runner_of("mlp", "torch")
    for act in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(StageError, match="neither pickled nor copied"):
            act(made)
