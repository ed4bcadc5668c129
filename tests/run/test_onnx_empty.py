"""What cannot compute on zero rows as it is exported, and must in a flat file."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.export import Dim

from offramp.run import onnx_guards
from offramp.run.onnx_empty import allow_empty
from offramp.run.onnx_guards import RECURRENT, guard, unguard


class First(nn.Module):
    """A recurrent layer without its last states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def exported(module: nn.Module, *shape: int) -> onnx.ModelProto:
    program = torch.export.export(
        module.eval(),
        (torch.randn(3, *shape),),
        dynamic_shapes=({0: Dim("batch", min=1)},),
        strict=False,
    )
    return torch.onnx.export(program, dynamo=True, verbose=False, opset_version=18).model_proto


def answer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it also logs what it raises
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 5, batch_first=True),
        nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True),
        nn.GRU(4, 5, batch_first=True),
    ],
    ids=["lstm", "two layers both ways", "gru"],
)
def test_recurrent_layers_take_any_number_of_rows(layer: nn.Module) -> None:
    module = First(layer)
    model = exported(module, 6, 4)
    guard(model, RECURRENT)
    width = module(torch.zeros(1, 6, 4)).shape[-1]
    for rows in (0, 1, 4):
        x = torch.randn(rows, 6, 4)
        got = answer(model, x.numpy())
        assert got.shape == (rows, 6, width)
        if rows:
            np.testing.assert_allclose(got, module(x).detach().numpy(), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_group_norm_takes_any_number_of_rows() -> None:
    module = nn.GroupNorm(2, 6)
    model = exported(module, 6, 4, 4)
    allow_empty(model)
    for rows in (0, 1, 4):
        x = torch.randn(rows, 6, 4, 4)
        got = answer(model, x.numpy())
        assert got.shape == (rows, 6, 4, 4)
        if rows:
            np.testing.assert_allclose(got, module(x).detach().numpy(), atol=1e-5)


def test_a_reshape_that_depends_on_the_batch_stays_as_it_is() -> None:
    sizes = helper.make_tensor("sizes", TensorProto.INT64, [2], [0, -1])
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "sizes"], ["y"])],
        "open",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, "batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, None])],
        [sizes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    before = model.SerializeToString()
    allow_empty(model)
    assert model.SerializeToString() == before


POOLS = {
    "mean": nn.AvgPool2d(2),
    "mean of overlapping windows": nn.AvgPool2d(3, 2, 1),
    "mean without the border": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "largest": nn.MaxPool2d(3, 2, 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", POOLS)
def test_pools_take_any_number_of_rows_in_every_engine(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    pool = POOLS[name]
    model = exported(pool, 6, 8, 8)
    allow_empty(model)
    x = np.zeros((0, 6, 8, 8), np.float32)
    assert len(answer(model, x)) == 0  # ONNX Runtime needs no guard
    guard(model, onnx_guards.POOLS)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    for rows in (0, 1, 4):
        x = torch.randn(rows, 6, 8, 8)
        for got in (answer(model, x.numpy()), compiled([x.numpy()])[0]):
            assert got.shape == (rows, 6, *pool(torch.zeros(1, 6, 8, 8)).shape[2:])
            if rows:
                np.testing.assert_allclose(got, pool(x).numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mean", "largest"])
def test_what_always_has_rows_is_left_as_it_is(name: str) -> None:
    model = exported(POOLS[name], 6, 8, 8)
    before = model.SerializeToString()
    allow_empty(model, [model.graph.input[0].name])
    guard(model, onnx_guards.POOLS, {model.graph.output[0].name})
    assert model.SerializeToString() == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(2)), (6, 8, 8)),
        (First(nn.LSTM(4, 5, batch_first=True)), (6, 4)),
    ],
    ids=["pools", "recurrent"],
)
def test_a_guard_is_taken_out_again(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = exported(module, *shape)
    nodes = [node.SerializeToString() for node in model.graph.node]
    for _ in range(2):
        guard(model, onnx_guards.POOLS | RECURRENT)
        assert "Pad" in [node.op_type for node in model.graph.node]
        x = torch.randn(3, *shape)
        np.testing.assert_allclose(answer(model, x.numpy()), module(x).detach().numpy(), atol=1e-6)
        unguard(model)
        assert [node.SerializeToString() for node in model.graph.node] == nodes
    onnx.checker.check_model(model)


@pytest.mark.filterwarnings("ignore")
def test_a_guard_that_was_changed_stays() -> None:
    model = exported(POOLS["largest"], 6, 8, 8)
    guard(model, onnx_guards.POOLS)
    (pool,) = [node for node in model.graph.node if node.op_type == "MaxPool"]
    between = helper.make_node("Identity", [pool.input[0]], ["between"])
    pool.input[0] = "between"
    place = [node.op_type for node in model.graph.node].index("MaxPool")
    model.graph.node.insert(place, between)
    before = model.SerializeToString()
    unguard(model)
    assert model.SerializeToString() == before
    guard(model, onnx_guards.POOLS)  # nor is it guarded again
    assert model.SerializeToString() == before
