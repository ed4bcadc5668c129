"""Auxiliary classifiers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.build.flow import count_macs
from offramp.build.heads import (
    HEADS,
    FunctionHead,
    MapHead,
    TokenHead,
    VectorHead,
    asked_inputs,
    make_head,
)
from offramp.errors import HeadError

FEATURES = {
    "vector": ((4, 12), None),
    "tokens": ((4, 9, 12), None),
    "sequence of channels": ((4, 12, 40), "NCL"),
    "map": ((4, 12, 10, 10), None),
    "map, channels last": ((4, 10, 10, 12), None),
    "video": ((4, 12, 4, 10, 10), None),
    "video, channels last": ((4, 4, 10, 10, 12), "NTHWC"),
}


MAPS = ("conv", "deep")  # they take no vectors


@pytest.mark.parametrize(
    ("name", "shape", "layout"),
    [
        pytest.param(name, *feature, id=f"{name}-{kind}")
        for name in ("auto", "pool", "conv", "deep")
        for kind, feature in FEATURES.items()
        if kind != "vector" or name not in MAPS
    ],
)
def test_a_head_for_every_feature(name, shape, layout):
    feature = torch.randn(shape)
    head = make_head(name, feature, 7, layout=layout).eval()
    logits = head(feature)
    assert logits.shape == (4, 7)
    assert torch.isfinite(logits).all()
    alone = torch.cat([head(row) for row in feature.split(1)])
    torch.testing.assert_close(alone, logits)


@pytest.mark.parametrize(("shape", "layout"), FEATURES.values(), ids=FEATURES.keys())
def test_heads_export_with_any_batch(shape, layout):
    feature = torch.randn(shape)
    head = make_head("auto", feature, 7, layout=layout).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(head, (feature,), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(9, *shape[1:])
    torch.testing.assert_close(program(more), head(more))


def test_channels_last_is_channels_first_turned():
    first = torch.randn(2, 6, 10, 10)
    torch.manual_seed(3)
    one = make_head("conv", first, 5, layout="NCHW").eval()
    torch.manual_seed(3)
    two = make_head("conv", first.permute(0, 2, 3, 1), 5, layout="NHWC").eval()
    torch.testing.assert_close(two(first.permute(0, 2, 3, 1)), one(first))


def test_what_auto_chooses():
    assert isinstance(make_head("auto", torch.zeros(2, 5), 3), VectorHead)
    assert isinstance(make_head("auto", torch.zeros(2, 7, 5), 3), TokenHead)
    conv = make_head("auto", torch.zeros(2, 5, 8, 8), 3)
    assert isinstance(conv, MapHead)
    assert conv.reduce is not None


def test_vectors_get_one_or_two_linear_layers():
    one, two = (make_head(n, torch.zeros(2, 64), 3) for n in ("linear", "mlp"))
    linear = [[m for m in h.modules() if isinstance(m, nn.Linear)] for h in (one, two)]
    assert [len(layers) for layers in linear] == [1, 2]
    assert make_head("mlp:9", torch.zeros(2, 64), 3).hidden.out_features == 9


@pytest.mark.parametrize(
    ("name", "shape", "layout"),
    [
        pytest.param(name, *feature, id=f"{name}-{kind}")
        for name in ("auto", "pool", "conv", "deep", "mlp")
        for kind, feature in FEATURES.items()
        if kind not in {"mlp": [*FEATURES][2:]}.get(name, ["vector"] * (name in MAPS))
    ],
)
def test_condensing_takes_no_parameters_and_little_space(name, shape, layout):
    feature = torch.randn(shape)
    head = make_head(name, feature, 7, layout=layout).eval()
    condensed = head.condense(feature)
    assert not condensed.requires_grad
    assert condensed.numel() <= feature.numel()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(head.condense(feature), condensed)
    assert torch.equal(head.classify(condensed), head(feature))


def test_tokens_are_the_norm_of_their_mean():
    head = make_head("pool", torch.zeros(2, 6, 8), 3).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    tokens, mask = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    mean = torch.stack([tokens[0, :3].mean(0), tokens[1].mean(0)])
    torch.testing.assert_close(head(tokens, mask), head.classifier(head.norm(mean)))


def test_a_width_by_name():
    assert make_head("conv:16", torch.zeros(2, 64, 8, 8), 3).reduce[1].out_channels == 16
    assert make_head("mlp:24", torch.zeros(2, 6, 8), 3).hidden.out_features == 24
    tight = make_head("conv:48", torch.zeros(2, 64, 28, 28), 3, budget=10)
    assert tight.reduce[1].out_channels == 48  # what was asked for, at the lowest resolution
    assert tight.condense(torch.zeros(2, 64, 28, 28)).shape == (2, 64, 2, 2)
    for name in ("pool:3", "conv:0", "mlp:", "mlp:x"):
        with pytest.raises(HeadError, match=f"head '{name}' has no width.*'conv:32'"):
            make_head(name, torch.zeros(2, 3), 2)
    with pytest.raises(HeadError, match="Unknown head 'con'. Did you mean 'conv'"):
        make_head("con:32", torch.zeros(2, 3, 4, 4), 2)


def test_a_deep_head_halves_the_positions_twice():
    feature = torch.randn(2, 16, 32, 32)
    head = make_head("deep:24", feature, 3).eval()
    assert head.condense(feature) is feature
    assert head.reduce(feature).shape == (2, 24, 8, 8)
    assert make_head("deep", feature, 3).reduce[-3].out_channels == 32
    with pytest.raises(HeadError, match="'deep' takes maps and the feature has shape"):
        make_head("deep", torch.zeros(2, 3), 2)


def test_a_masked_mean_sees_no_padding():
    head = make_head("pool", torch.zeros(2, 6, 8), 3).eval()
    tokens = torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    logits = head(tokens, mask)
    torch.testing.assert_close(logits[:1], head(tokens[:1, :4]))
    torch.testing.assert_close(logits[1:], head(tokens[1:]))
    tokens[0, 4:] = 1e3
    torch.testing.assert_close(head(tokens, mask), logits)
    assert torch.isfinite(head(tokens, torch.zeros(2, 6))).all()


def test_the_class_token_is_the_first():
    head = make_head("token", torch.zeros(2, 6, 8), 3).eval()
    tokens = torch.randn(2, 6, 8)
    changed = tokens.clone()
    changed[:, 1:] = 0
    assert torch.equal(head(tokens), head(changed))


@pytest.mark.parametrize("budget", [100, 40_000, 200_000, 500_000, None])
def test_a_convolution_stays_in_its_budget(budget):
    feature = torch.randn(2, 64, 28, 28)
    head = make_head("conv", feature, 10, budget=budget).eval()
    macs = count_macs(lambda: head(feature)) / 2
    classifier = head.classifier.in_features * 10
    if budget is None:
        assert macs - classifier > 500_000
    else:
        assert macs - classifier <= budget
    assert (head.reduce is None) == (budget == 100)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 14, 17, 35, 56])
def test_odd_sizes(size):
    feature = torch.randn(2, 4, size, size + 1)
    assert make_head("conv", feature, 3, layout="NCHW").eval()(feature).shape == (2, 3)


def test_type_and_device_follow_the_feature():
    head = make_head("auto", torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16), 3)
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    meta = make_head("auto", torch.zeros(2, 5, device="meta"), 3)
    assert next(meta.parameters()).device.type == "meta"


def test_the_seed_makes_heads_again():
    def weights():
        torch.manual_seed(11)
        return [p.clone() for p in make_head("auto", torch.zeros(2, 4, 8, 8), 3).parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


def test_identity_and_functions():
    logits = torch.randn(2, 3)
    assert make_head("identity", logits, 3)(logits) is logits
    assert torch.equal(FunctionHead(lambda t: t * 2)(logits), logits * 2)


def test_what_a_head_asks_for():
    class Graph(nn.Module):
        def forward(self, x, batch, *rest, weight=None, **others):
            return x

    assert asked_inputs(Graph()) == ("batch", "weight")
    assert asked_inputs(nn.Linear(2, 2)) == ()
    assert asked_inputs(TokenHead(4, 2)) == ("attention_mask",)


def test_bad_heads():
    with pytest.raises(HeadError, match="Unknown head 'lineer'. Did you mean 'linear'"):
        make_head("lineer", torch.zeros(2, 3), 2)
    with pytest.raises(HeadError, match=r"shape \(2,\) has 1 dimensions; heads are known for"):
        make_head("auto", torch.zeros(2), 2)
    with pytest.raises(HeadError, match=r"'linear' takes vectors \(B, D\) and .* \(2, 3, 4\)"):
        make_head("linear", torch.zeros(2, 3, 4), 2)
    with pytest.raises(HeadError, match=r"'token' takes token sequences \(B, T, D\)"):
        make_head("token", torch.zeros(2, 3), 2)
    with pytest.raises(HeadError, match="'conv' takes maps"):
        make_head("conv", torch.zeros(2, 3), 2)
    assert sorted(HEADS) == list(HEADS)


def test_a_module_is_no_name():
    with pytest.raises(HeadError, match="head of type 'Linear' came where a name was expected"):
        make_head(nn.Linear(3, 2), torch.zeros(2, 3), 2)
