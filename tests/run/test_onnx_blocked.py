"""Rows are taken from maps in the layout that the engine has them in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from offramp.build.model import MultiExitModel, attach
from offramp.decide.policy import Policy
from offramp.run import engines, runner
from offramp.run.chain import chain
from offramp.run.engines import OnnxRuntime
from offramp.run.graph import cut
from offramp.run.onnx import convert
from offramp.run.onnx_blocked import take_in_blocks
from offramp.run.onnx_rule import join
from offramp.run.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore")


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.two(self.one(x).relu())).relu()


def network(channels: int) -> MultiExitModel:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        Residual(channels),
        Residual(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 5),
    )
    return attach(backbone.eval(), example(), exits=["1"])


def example(rows: int = 9) -> Tensor:
    return 2 * torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def middle(model: MultiExitModel) -> float:
    """A threshold at which some of the example leave and some go on."""
    with torch.no_grad():
        scores = model.eval()(example())[0].softmax(1).amax(1).sort().values
    return float(scores[3:5].mean())


def optimised(channels: int, path: Path) -> tuple[bytes, onnx.ModelProto]:
    """As a runner has it, and as ONNX Runtime writes what it makes of it."""
    model = network(channels)
    steps = chain(cut(model, example(), [0, 1]), Policy("confidence", [0.5]), 2)
    joined = join(convert(steps), [step.link for step in steps], [True]).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(joined, options)
    return joined, onnx.load(path)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_the_same_bits_without_a_change_of_layout(tmp_path: Path) -> None:
    joined, model = optimised(32, tmp_path / "model.onnx")
    before = kinds(model)
    if not before["ReorderInput"]:
        pytest.skip("this processor has no layout in blocks")
    assert take_in_blocks(model)
    after = kinds(model)
    assert after["Compress"] == before["Compress"] == 1
    assert after["ReorderInput"] < before["ReorderInput"]
    assert after["ReorderOutput"] < before["ReorderOutput"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    ways = [
        onnxruntime.InferenceSession(joined),
        onnxruntime.InferenceSession(model.SerializeToString(), options),
    ]
    given = [value.name for value in ways[0].get_inputs()]
    some = False
    for rows, limit in ((1, 9.0), (9, 9.0), (9, middle(network(32))), (9, -9.0)):
        limits = {v.name: np.float32(limit) for v in ways[0].get_overridable_initializers()}
        assert len(limits) == 1
        feed = {given[0]: example()[:rows].numpy(), **{k: np.array(v) for k, v in limits.items()}}
        one, other = (way.run(None, feed) for way in ways)
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        some |= 0 < len(one[2]) < rows
    assert some, "all or none would not show which rows are taken"


def test_channels_that_do_not_fill_a_block_stay_as_they_are(tmp_path: Path) -> None:
    _, model = optimised(24, tmp_path / "model.onnx")
    before = model.SerializeToString()
    assert not take_in_blocks(model)
    assert model.SerializeToString() == before


def test_a_map_that_somebody_else_reads_in_the_plain_layout_is_kept(tmp_path: Path) -> None:
    _, model = optimised(32, tmp_path / "model.onnx")
    if not kinds(model)["ReorderInput"]:
        pytest.skip("this processor has no layout in blocks")
    (taken,) = (node for node in model.graph.node if node.op_type == "Compress")
    model.graph.node.append(onnx.helper.make_node("Relu", [taken.output[0]], ["other"]))
    before = model.SerializeToString()
    assert not take_in_blocks(model)
    assert model.SerializeToString() == before


def test_what_is_read_inside_of_a_branch_is_not_touched(tmp_path: Path) -> None:
    _, model = optimised(32, tmp_path / "model.onnx")
    (taken,) = (node for node in model.graph.node if node.op_type == "Compress")
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [taken.output[0]], ["inner"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)],
    )
    model.graph.node.append(
        onnx.helper.make_node("If", ["asked"], ["out"], then_branch=inner, else_branch=inner)
    )
    before = model.SerializeToString()
    assert not take_in_blocks(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("room", ["enough", "none", "for one"])
def test_a_runner_has_it_where_there_is_room(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "compare", lambda ways, **_: dict.fromkeys(ways, 1.0))
    changed = []

    def noted(model: onnx.ModelProto) -> bool:
        changed.append(take_in_blocks(model))
        return changed[-1]

    monkeypatch.setattr("offramp.run.onnx_blocked.take_in_blocks", noted)
    if room == "for one":
        monkeypatch.setattr(onnx, "save", lambda *_: Path("/dev/full").write_text("x" * 9999))
    if room == "none":
        made = OnnxRuntime._made

        def full(self: OnnxRuntime, model: bytes | str, options: object) -> object:
            if getattr(options, "optimized_model_filepath", ""):
                raise engines.StageError("no space left on device")
            return made(self, model, options)

        monkeypatch.setattr(OnnxRuntime, "_made", full)
    model, x = network(32), example()
    policy = Policy("confidence", [middle(model)])
    one = Runner(model, policy, x, engine=OnnxRuntime(threads=1))
    assert one.in_one_call
    assert len(changed) == (room != "none")
    with torch.no_grad():
        wanted = model.eval()(x)
    got = one(x)
    assert 0 < int((got.exit == 0).sum()) < len(x)
    for row, exit in enumerate(got.exit.tolist()):
        torch.testing.assert_close(got.logits[row], wanted[exit][row], rtol=1e-4, atol=1e-5)
