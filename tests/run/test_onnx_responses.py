"""Local response normalisation is written out; what only looks like it is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from offramp.run.onnx_responses import write_out_responses

pytestmark = pytest.mark.filterwarnings("ignore")


def exported(module: nn.Module, x: Tensor) -> onnx.ModelProto:
    program = torch.export.export(
        module.eval(), (x,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
    )
    made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=20)
    assert made is not None
    return made.model_proto


def run(model: onnx.ModelProto, x: Tensor) -> np.ndarray:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(found)


def kinds(model: onnx.ModelProto) -> list[str]:
    """Of the operators that the output needs."""
    made = {name: node for node in model.graph.node for name in node.output}
    found, pending = {}, [value.name for value in model.graph.output]
    while pending:
        name = pending.pop()
        if name in made and name not in found:
            found[name] = made[name].op_type
            pending += made[name].input
    return list(found.values())


@pytest.mark.parametrize(("size", "beta"), [(2, 0.75), (5, 0.75), (9, 0.6)])
def test_response_normalisation_of_maps(size: int, beta: float) -> None:
    x = 30 * torch.randn(3, 7, 4, 5, generator=torch.Generator().manual_seed(size))
    norm = nn.LocalResponseNorm(size, alpha=1e-2, beta=beta, k=1.5)
    model = exported(norm, x)
    write_out_responses(model)
    found = kinds(model)
    assert "AveragePool" not in found
    assert ("Pow" in found) == (beta == 0.6)
    for rows in (1, 3):
        np.testing.assert_allclose(run(model, x[:rows]), norm(x[:rows]), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 7, 5), (3, 7, 4, 3, 2)])
def test_response_normalisation_of_sequences_and_volumes(shape: tuple[int, ...]) -> None:
    x = 30 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norm = nn.LocalResponseNorm(3, alpha=1e-2, beta=0.75, k=2.0)
    model = exported(norm, x)
    write_out_responses(model)
    assert {"AveragePool", "Pow"}.isdisjoint(kinds(model))
    np.testing.assert_allclose(run(model, x), norm(x), rtol=2e-6, atol=1e-6)


class Mean(nn.Module):
    """Over neighbours, of which the padding, the window or the scale is another one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        pads = {"rows": (0, 0, 1, 1, 0, 0), "value": (0, 0, 0, 0, 1, 1)}
        y = functional.pad(
            x.unsqueeze(1),
            pads.get(self.kind, (0, 0, 0, 0, 1, 1)),
            value=1.0 if self.kind == "value" else 0.0,
        )
        window = (1, 3, 1) if self.kind == "rows" else (3, 1, 1)
        y = functional.avg_pool3d(y, window, stride=(2, 1, 1) if self.kind == "stride" else 1)
        y = y.squeeze(1)
        return y * x if self.kind == "product" else y * 2.0 - 1.0


@pytest.mark.parametrize("kind", ["rows", "value", "stride", "product", "plain"])
def test_other_means_stay_what_they_are(kind: str) -> None:
    x = torch.randn(3, 7, 4, 5, generator=torch.Generator().manual_seed(0))
    module = Mean(kind)
    model = exported(module, x)
    write_out_responses(model)
    assert ("AveragePool" in kinds(model)) == (kind in ("rows", "value", "stride"))
    np.testing.assert_allclose(run(model, x), module(x), rtol=1e-5, atol=1e-6)


class Seen(nn.Module):
    """The mean is read twice, once as it is."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pad(x.unsqueeze(1), (0, 0, 0, 0, 1, 1))
        y = functional.avg_pool3d(y, (3, 1, 1), stride=1).squeeze(1)
        return y * 2.0 + y


def test_a_mean_that_is_read_twice_is_not_scaled() -> None:
    x = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(0))
    model = exported(Seen(), x)
    write_out_responses(model)
    np.testing.assert_allclose(run(model, x), Seen()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", [0.75, 0.25, 0.5, 2.0, -0.75])
def test_powers(exponent: float) -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.pow(exponent)

    x = torch.tensor([[0.0, 1e-30, 0.3, 7.0, 1e30, torch.inf, -1.0, torch.nan]])
    x = x.repeat(2, 1)
    model = exported(Power(), x)
    write_out_responses(model)
    assert ("Pow" in kinds(model)) == (exponent in (2.0, -0.75))
    wanted = x.pow(exponent)
    np.testing.assert_allclose(run(model, x), wanted, rtol=3e-7)
