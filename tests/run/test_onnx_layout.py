"""Shortcuts that ONNX Runtime adds within the convolution before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from offramp.run.onnx_layout import keep_in_blocks

CHANNELS, ADDED = 16, 16


class Block(nn.Module):
    """A residual block; what is added is made by a function."""

    def __init__(self, shortcut: Callable[[Tensor], Tensor], stride: int, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(CHANNELS, width, 3, stride, 1)
        self.two = nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.two(torch.relu(self.one(x))) + self.shortcut(x))
        return functional.avg_pool2d(y, 2)


def exported(block: nn.Module) -> onnx.ModelProto:
    program = torch.export.export(
        block.eval(),
        (torch.randn(3, CHANNELS, 8, 8),),
        dynamic_shapes=({0: Dim("batch", min=1)},),
        strict=False,
    )
    return torch.onnx.export(program, dynamo=True, verbose=False, opset_version=18).model_proto


def kernels(model: onnx.ModelProto, path: Path) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """The session, and the operators that it executes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, [node.op_type for node in onnx.load(path).graph.node]


def padded(x: Tensor) -> Tensor:
    return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, ADDED // 4, ADDED - ADDED // 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("shortcut", "stride", "width", "begins"),
    [(padded, 2, CHANNELS + ADDED, []), (lambda x: x, 1, CHANNELS, ["x"])],
    ids=["pixels left out and channels added", "the map that a stage begins with"],
)
def test_it_is_added_within_the_convolution_and_exact(
    shortcut: Callable[[Tensor], Tensor],
    stride: int,
    width: int,
    begins: Sequence[str],
    tmp_path: Path,
) -> None:
    block = Block(shortcut, stride, width)
    model = exported(block)
    _, before = kernels(model, tmp_path / "before.onnx")
    keep_in_blocks(model, begins)
    session, after = kernels(model, tmp_path / "after.onnx")
    assert "Add" in before
    assert not {"Add", "Relu", "Pad"} & set(after)
    for rows in (0, 1, 3):
        x = torch.randn(rows, CHANNELS, 8, 8)
        got = session.run(None, {"x": x.numpy()})[0]
        want = block(x) if rows else torch.zeros(0, width, *got.shape[2:])
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)


OTHERS = {
    "not zeros": lambda x: functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8), value=1.0),
    "pixels added, too": lambda x: functional.pad(x[:, :, 1::2, :6:2], (0, 1, 0, 0, 8, 8)),
    "another first pixel": lambda x: functional.pad(x[:, :, 1::2, ::2], (0, 0, 0, 0, 8, 8)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_shortcuts_stay_as_they_are(name: str) -> None:
    model = exported(Block(OTHERS[name], 2, CHANNELS + ADDED))
    before = model.SerializeToString()
    keep_in_blocks(model, ["x"])
    assert model.SerializeToString() == before


@pytest.mark.filterwarnings("ignore")
def test_a_map_that_no_convolution_is_added_to_stays_as_it_is() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.one(x)) + x

    model = exported(Scaled(lambda x: x, 1, CHANNELS))
    before = model.SerializeToString()
    keep_in_blocks(model, ["x"])
    assert model.SerializeToString() == before
