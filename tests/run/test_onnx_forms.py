"""Operators that the exporter takes in one form only."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from offramp.run.onnx_forms import bring_into_form


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias) + q


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias_of_each", [True, False])
@pytest.mark.parametrize("between", [(), (2,), (2, 4), (2, 3, 4)], ids=["3", "4", "5", "6"])
def test_attention_over_any_number_of_dimensions(
    between: tuple[int, ...], bias_of_each: bool
) -> None:
    batch = Dim("batch", min=1)
    bias = torch.randn(3, *between, 5, 5) if bias_of_each else torch.randn(5, 5)
    example = (*(torch.randn(3, *between, 5, 8) for _ in range(3)), bias)
    program = torch.export.export(
        Attention(),
        example,
        dynamic_shapes=(*({0: batch},) * 3, {0: batch} if bias_of_each else None),
        strict=False,
    )
    bring_into_form(program)
    torch.testing.assert_close(program.module()(*example), Attention()(*example))
    model = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=18).model_proto
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for rows in (0, 1, 2):
        given = [value[:rows] if value is not bias or bias_of_each else bias for value in example]
        names = [value.name for value in session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        (got,) = session.run(None, feed)
        np.testing.assert_allclose(got, Attention()(*given).numpy(), atol=1e-6)


class Twice(nn.Module):
    """Two layers under one mask."""

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        attend = functional.scaled_dot_product_attention
        x = attend(x, y, y, attn_mask=mask)
        return attend(x, y, x.new_ones(y.shape) + y, attn_mask=mask, scale=0.7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_may_look_at_nothing_gets_zeros(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 6, 8, generator=generator)
    y = torch.randn(4, 2, 5, 8, generator=generator)
    mask = torch.rand(4, 1, 6, 5, generator=generator) < 0.5
    mask[0, :, 2], mask[3] = False, False
    if kind == "float":
        mask = torch.where(mask, torch.randn(mask.shape, generator=generator), -torch.inf)
    wanted = Twice()(x, y, mask)
    assert (wanted[3] == 0).all()
    assert (wanted[0, :, 2] == 0).all()
    batch = Dim("batch", min=1)
    program = torch.export.export(
        Twice(), (x, y, mask), dynamic_shapes=({0: batch},) * 3, strict=False
    )
    bring_into_form(program)
    targets = [node.target for node in program.graph.nodes]
    of_mask = torch.ops.aten.amax.default if kind == "bool" else torch.ops.aten.any.dim
    assert targets.count(of_mask) == 1  # shared by both layers
    torch.testing.assert_close(program.module()(x, y, mask), wanted)
    model = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=20).model_proto
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = (value.numpy() for value in (x, y, mask))
    names = (value.name for value in session.get_inputs())
    (got,) = session.run(None, dict(zip(names, given, strict=True)))
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6)
    if kind == "float":  # what is not a number is not hidden
        mask[1, 0, 3] = torch.nan
        assert program.module()(x, y, mask)[1, :, 3].isnan().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_masked_keys_do_not_count_however_large_scores_are(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 10 if dtype == torch.float16 else 100
    x, y = (size * torch.randn(3, 2, 4, 8, generator=generator, dtype=dtype) for _ in range(2))
    mask = torch.rand(3, 1, 4, 4, generator=generator) < 0.5
    mask[0, :, 1] = False
    program = torch.export.export(Twice(), (x, y, mask), strict=False)
    bring_into_form(program)
    got = program.module()(x, y, mask)
    # Of what is written out, scores are rounded to the type, which eager torch does later.
    tolerance = {"rtol": 0.05, "atol": 3.0} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(got, Twice()(x, y, mask), **tolerance)
    assert (got[0, :, 1] == 0).all()


class Standardised(nn.Module):
    """A layer norm, its weight and bias applied after it, as in heads for tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        found = functional.layer_norm(x, (6,), eps=0.1)
        weight = self.weight[:1] if self.kind == "one weight" else self.weight
        weighed = found * weight + self.bias
        return weighed + found if self.kind == "read twice" else weighed


@pytest.mark.parametrize("kind", ["alone", "one weight", "read twice"])
def test_a_layer_norm_gets_its_weight_and_bias(kind: str) -> None:
    x = torch.randn(4, 6)
    module = Standardised(kind)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
    )
    bring_into_form(program)
    kinds = {node.target for node in program.graph.nodes}
    assert (torch.ops.aten.mul.Tensor in kinds) is (kind != "alone")
    torch.testing.assert_close(program.module()(x), module(x))


class Largest(nn.Module):
    """As a criterion spells it, or nearly so."""

    def __init__(self, changed: bool) -> None:
        super().__init__()
        self.changed = changed

    def forward(self, logits: Tensor) -> Tensor:
        other = logits * 2 if self.changed else logits
        relative = (other - logits.amax(dim=-1, keepdim=True)).exp()
        return relative.sum(dim=-1).reciprocal()


@pytest.mark.parametrize("changed", [False, True])
def test_the_largest_probability_is_that_of_a_softmax(changed: bool) -> None:
    logits = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    batch = Dim("batch", min=1)
    program = torch.export.export(
        Largest(changed), (logits,), dynamic_shapes=({0: batch},), strict=False
    )
    bring_into_form(program)
    kinds = {node.target for node in program.graph.nodes}
    assert (torch.ops.aten.softmax.int in kinds) is not changed
    torch.testing.assert_close(program.module()(logits), Largest(changed)(logits))


class Block(nn.Module):
    """What a transformer does to tokens between attentions."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10, bias=bias), nn.Linear(10, 6, bias=bias)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        y = self.second(functional.gelu(self.first(x + position)))
        return self.norm(functional.dropout(y, training=False) + x) * x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [(5,), (2, 3)], ids=["3", "4"])
def test_tokens_are_flat_between_linear_layers(between: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    module, position = Block(bias), torch.randn(*between, 6, generator=generator)
    # Not contiguous, as maps whose channels were put last.
    x = torch.randn(4, 6, *between, generator=generator).movedim(1, -1)
    program = torch.export.export(
        module, (x, position), dynamic_shapes=({0: Dim("batch", min=1)}, None), strict=False
    )
    bring_into_form(program)
    ranks = {
        node.meta["val"].ndim
        for node in program.graph.nodes
        if node.target in (torch.ops.aten.linear.default, torch.ops.aten.layer_norm.default)
    }
    assert ranks == ({2} if bias else {x.ndim})  # without one there is nothing to be gained
    torch.testing.assert_close(program.module()(x, position), module(x, position))
    model = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=20).model_proto
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Gemm") == (2 if bias else 0)
    assert kinds.count("Reshape") == (3 if bias else 0)  # two sums there, the result back
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    for rows in (0, 1, 3):
        given = (x[:rows], position)
        feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        (got,) = session.run(None, feed)
        np.testing.assert_allclose(got, module(*given).detach().numpy(), atol=1e-6)


class OddLinear(nn.Module):
    """Linear layers that have no form of two dimensions, or need none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.kind == "size":
            return y + x.shape[0]
        if self.kind == "vector":
            return functional.relu(functional.linear(y, self.layer.bias)) + x[..., 0]
        return functional.relu(y).clone(memory_format=torch.channels_last) + x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["size", "vector", "channels last"])
def test_odd_linear_layers(kind: str) -> None:
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    module = OddLinear(kind)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
    )
    bring_into_form(program)
    for rows in (1, 3):
        torch.testing.assert_close(program.module()(x[:rows]), module(x[:rows]))


def test_whole_numbers_are_not_flattened() -> None:
    """An engine has no such product with a bias."""

    class Whole(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.linear(x, weight, bias)

    given = (torch.ones(3, 5, 6).int(), torch.ones(4, 6).int(), torch.ones(4).int())
    program = torch.export.export(Whole(), given, strict=False)
    bring_into_form(program)
    assert torch.ops.aten.reshape.default not in {node.target for node in program.graph.nodes}


class Sharper(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        return torch.sub(logits, top, alpha=2).exp().sum(-1).reciprocal()


def test_a_difference_of_multiples_is_no_softmax() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Sharper(), (logits,), strict=False)
    bring_into_form(program)
    torch.testing.assert_close(program.module()(logits), Sharper()(logits))


def test_a_layer_norm_takes_weights_of_its_own_type_alone() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.layer_norm(x, (6,)) * weight + bias

    given = (torch.randn(4, 6).half(), torch.rand(6), torch.rand(6))
    program = torch.export.export(Mixed(), given, strict=False)
    bring_into_form(program)
    found = program.module()(*given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Mixed()(*given))
