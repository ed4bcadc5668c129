"""Exits that see what the exit before said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.build.cascade import CascadeHead
from offramp.build.flow import count_macs
from offramp.build.heads import MapHead, TokenHead, VectorHead
from offramp.build.model import attach
from offramp.errors import HeadError
from tests.networks import example_of, make

KINDS = ["cnn", "mlp", "encoder"]


def cascaded(kind, **settings):
    """A model with three exits whose links are not zero any more."""
    torch.manual_seed(0)
    model = attach(make(kind), example_of(kind), exits=3, cascade=True, **settings).eval()
    for head in model.heads[1:]:
        nn.init.normal_(head.link.weight)
    return model


def run(model, kind, seed=2):
    x = example_of(kind, 6, seed)
    return model(**x) if isinstance(x, dict) else model(x)


def by_hand(head, feature, previous, mask):
    """As the paper has it: the last layer reads its input joined with the previous logits."""
    inner = head.head
    weight = torch.cat([inner.classifier.weight, head.link.weight], dim=1)
    if isinstance(inner, VectorHead):
        seen = feature if inner.hidden is None else torch.relu(inner.hidden(feature))
    elif isinstance(inner, TokenHead):
        kept = mask[..., None].float()
        seen = (inner.norm(feature) * kept).sum(1) / kept.sum(1)
    else:
        assert isinstance(inner, MapHead)
        seen = feature if inner.reduce is None else inner.reduce(feature)
        seen = seen.mean((2, 3))
    return functional.linear(torch.cat([seen, previous], 1), weight, inner.classifier.bias)


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        *((kind, "auto") for kind in KINDS),
        ("cnn", "pool"),
        ("cnn", "conv"),
        ("mlp", "linear"),
        ("mlp", "mlp"),
    ],
)
def test_the_last_layer_reads_the_previous_logits_too(kind, heads):
    model = cascaded(kind, heads=heads)
    x = example_of(kind, 6, seed=2)
    with torch.no_grad():
        features, _ = model.features(**x) if isinstance(x, dict) else model.features(x)
        got = run(model, kind)
    mask = x["attention_mask"] if isinstance(x, dict) else None
    for k in (1, 2):
        assert isinstance(model.heads[k], CascadeHead)
        expected = by_hand(model.heads[k], features[k], got[k - 1], mask)
        torch.testing.assert_close(got[k], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_heads_alone(kind):
    torch.manual_seed(5)
    plain = attach(make(kind), example_of(kind), exits=3).eval()
    torch.manual_seed(5)
    model = attach(make(kind), example_of(kind), exits=3, cascade=True).eval()
    assert model.cascade
    assert not plain.cascade
    with torch.no_grad():
        assert torch.equal(run(model, kind).stack(), run(plain, kind).stack())


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_s_own_output_is_untouched(kind):
    model = cascaded(kind)
    own = run(model.backbone, kind)
    assert torch.equal(run(model, kind).final, own["logits"] if isinstance(own, dict) else own)


@pytest.mark.parametrize("exit", [1, 2])
def test_no_gradient_flows_back_through_the_previous_logits(exit):
    model = cascaded("mlp")
    run(model, "mlp")[exit].sum().backward()
    for k, head in enumerate(model.heads):
        assert all((p.grad is not None) == (k == exit) for p in head.parameters())
    assert model.heads[exit].link.weight.grad.abs().sum() > 0
    # A feature's gradient is that of the head alone, the previous logits being numbers to it.
    got = {n: p.grad.clone() for n, p in model.backbone.named_parameters() if p.grad is not None}
    model.zero_grad()
    x = example_of("mlp", 6, 2)
    features, _ = model.features(x)
    model.heads[exit].head(features[exit]).sum().backward()
    assert got
    assert all(torch.equal(model.backbone.get_parameter(n).grad, g) for n, g in got.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_links_are_counted(kind):
    plain = attach(make(kind), example_of(kind), exits=3)
    model = cascaded(kind)
    link = model.num_classes**2
    assert model.costs.stages == plain.costs.stages
    expected = [plain.costs.heads[0], *(cost + link for cost in plain.costs.heads[1:3]), 0.0]
    assert list(model.costs.heads) == expected
    heads = [0.0]
    if kind == "mlp":  # and so says a count of the whole, less the backbone
        x = example_of(kind)
        heads = [(count_macs(lambda: model(x)) - count_macs(lambda: model.backbone(x))) / len(x)]
        assert sum(model.costs.heads) == pytest.approx(heads[0])


def test_a_function_and_a_module_of_one_s_own():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 3)

        def forward(self, feature: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc((feature * attention_mask[..., None]).mean(1))

    mine = Mine()
    torch.manual_seed(0)
    heads = ["pool", mine, lambda feature: feature[:, 0, :3]]
    model = attach(make("encoder"), example_of("encoder"), heads=heads, cascade=True).eval()
    assert model.heads[1].head is mine
    for head in model.heads[1:]:
        nn.init.normal_(head.link.weight)
    x = example_of("encoder", 6, 2)
    features, _ = model.features(**x)
    got = model(**x)
    alone = mine(features[1], x["attention_mask"])
    torch.testing.assert_close(got[1], alone + got[0] @ model.heads[1].link.weight.T)
    alone = features[2][:, 0, :3]
    torch.testing.assert_close(got[2], alone + got[1] @ model.heads[2].link.weight.T)


class Own(nn.Module):
    """A head that takes the previous logits as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 4)

    def forward(self, feature: Tensor, previous_logits: Tensor | None = None) -> Tensor:
        logits = self.fc(feature)
        return logits if previous_logits is None else logits * torch.sigmoid(previous_logits)


def test_a_head_that_asks_for_the_previous_logits_is_given_them():
    heads = [Own(), Own()]
    model = attach(make("mlp"), example_of("mlp"), exits=2, heads=heads, cascade=True)
    assert list(model.heads) == heads
    x = example_of("mlp", 6, 2)
    features, _ = model.features(x)
    got = model(x)
    assert torch.equal(got[0], heads[0].fc(features[0]))
    assert torch.equal(got[1], heads[1].fc(features[1]) * torch.sigmoid(got[0]))
    got[1].sum().backward()
    assert heads[0].fc.weight.grad is None
    without = attach(make("mlp"), example_of("mlp"), exits=2, heads=heads)
    assert torch.equal(without(x)[1], heads[1].fc(features[1]))


def test_a_head_that_cannot_do_without_stands_at_no_first_exit():
    class Needs(Own):
        def forward(self, feature: Tensor, previous_logits: Tensor) -> Tensor:
            return super().forward(feature, previous_logits)

    with pytest.raises(HeadError, match="fails on its feature .*'previous_logits'"):
        attach(make("mlp"), example_of("mlp"), exits=2, heads=[Needs(), "linear"], cascade=True)
    attach(make("mlp"), example_of("mlp"), exits=2, heads=["linear", Needs()], cascade=True)


def test_a_mask_over_other_tokens_is_still_of_no_use():
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(50, 8), nn.Linear(8, 3)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.first(self.embed(input_ids)[:, :4])
            return self.fc(self.last(x).mean(1))

    model = attach(Halving(), example_of("encoder"), exits=["first", "last"], cascade=True)
    assert isinstance(model.heads[1].head, TokenHead)
    assert run(model, "encoder")[1].shape == (6, 3)


def test_half_precision_and_state():
    net = make("cnn").to(torch.bfloat16)
    model = attach(net, example_of("cnn").to(torch.bfloat16), cascade=True)
    assert {p.dtype for p in model.heads.parameters()} == {torch.bfloat16}
    assert model(example_of("cnn").to(torch.bfloat16))[2].dtype == torch.bfloat16
    one, two = cascaded("cnn"), attach(make("cnn"), example_of("cnn"), cascade=True).eval()
    assert "heads.1.link.weight" in one.state_dict()
    two.load_state_dict(one.state_dict())
    assert torch.equal(run(one, "cnn").stack(), run(two, "cnn").stack())


@pytest.mark.parametrize("kind", KINDS)
def test_stages_of_the_backbone_are_what_they_are_without(kind):
    plain, model = attach(make(kind), example_of(kind)), cascaded(kind)
    for k in range(4):
        names = [name for name, _ in plain.stage_parameters(k)]
        assert [name for name, _ in model.stage_parameters(k)] == names
