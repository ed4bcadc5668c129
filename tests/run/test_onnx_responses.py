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


def test_response_normalisation_of_sequences() -> None:
    x = 30 * torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    norm = nn.LocalResponseNorm(3, alpha=1e-2, beta=0.75, k=2.0)
    model = exported(norm, x)
    write_out_responses(model)
    assert "AveragePool" not in kinds(model)
    np.testing.assert_allclose(run(model, x), norm(x), rtol=2e-6, atol=1e-6)


def test_dimensions_that_are_folded_stay_folded() -> None:
    class Folded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.reshape(x.shape[0], 1, 7, 20)
            y = functional.pad(y, (0, 0, 1, 1))
            return functional.avg_pool2d(y, (3, 1), stride=1).squeeze(1).softmax(-1)

    x = torch.randn(3, 7, 4, 5, generator=torch.Generator().manual_seed(0))
    model = exported(Folded(), x)
    write_out_responses(model)
    np.testing.assert_allclose(run(model, x), Folded()(x), rtol=2e-6)


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


@pytest.mark.parametrize("exponent", [0.75, 0.25])
def test_a_power_of_what_may_be_negative_stays_one(exponent: float) -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.pow(exponent)

    model = exported(Power(), torch.ones(2, 3))
    write_out_responses(model)
    assert kinds(model) == ["Pow"]


@pytest.mark.parametrize(("beta", "roots"), [(0.25, 2), (0.5, 1)])
def test_as_many_roots_as_the_power_has_halves(beta: float, roots: int) -> None:
    x = 30 * torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    norm = nn.LocalResponseNorm(3, alpha=1e-2, beta=beta, k=2.0)
    model = exported(norm, x)
    write_out_responses(model)
    assert kinds(model).count("Sqrt") == roots
    np.testing.assert_allclose(run(model, x), norm(x), rtol=2e-6, atol=1e-6)
