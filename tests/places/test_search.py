"""plan(): where exits pay, and where none does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import offramp
from offramp.build.flow import count_macs
from offramp.errors import DataError, HeadError, PlaceError, PolicyError
from offramp.places.dense import attach_densely
from offramp.places.search import plan
from tests.networks import example_of, make

QUICK = {"progress": False, "epochs": 8}


def loader_of(x, y, size=50):
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


class Early(nn.Module):
    """Its first block has the answer; the others hand it on, dearly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 64) for _ in range(6))
        self.fc = nn.Linear(8, 3, bias=False)
        nn.init.zeros_(self.fc.weight)
        self.fc.weight.data[:, :3] = 5 * torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def easy(samples=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, 8, generator=generator), torch.arange(samples) % 3
    x[torch.arange(samples), y] += 3  # most are told apart easily
    return x, x[:, :3].argmax(1)


class Late(nn.Module):
    """The parity of eight signs, which only its end makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 64) for _ in range(4))
        self.end = Parity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.end(x)


class Parity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2, bias=False)
        self.work = nn.Linear(8, 64)
        self.fc.weight.data = torch.tensor([[5.0], [-5.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.sign().prod(1, keepdim=True)) + 0 * self.work(x)[:, :2]


@pytest.fixture(scope="module")
def early():
    return plan(Early(), torch.randn(4, 8), loader_of(*easy()), **QUICK)


def test_where_an_early_block_has_the_answer_an_exit_stands_there(early):
    assert early.exits[0] == "blocks.0"
    assert early.value < 0.5
    assert early.value_fresh < 0.5 < early.without
    first = early.planned[0]
    assert first.fraction == pytest.approx(2 * 8 * 64 / (6 * 2 * 8 * 64 + 24))
    assert first.brings > 0.05
    assert first.brings_fresh > 0.05
    for point in early.operating:
        assert point.cost_ratio < 0.5
        assert point.accuracy > early.full_accuracy - point.drop - 0.06
        assert sum(point.shares) == pytest.approx(1)
    assert f"{len(early.exits)} exit" in early.verdict
    assert "pay" in early.verdict


def test_where_features_are_useless_before_the_end_no_exit_pays():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 8, generator=generator)
    found = plan(Late(), x[:4], loader_of(x, (x.sign().prod(1) < 0).long()), **QUICK)
    assert found.exits == found.heads == ()
    assert found.full_accuracy == 1
    assert found.verdict.startswith("No exit pays. The best found, blocks.")
    assert found.operating == ()
    assert found.value_fresh == found.without
    assert "No exit pays" in str(found)


@pytest.mark.parametrize("kind", ["cnn", "mlp", "encoder"])
def test_every_kind_of_input(kind):
    """The backbone's own answers are the labels, so that it counts as trained."""
    backbone, loader = make(kind), []
    nn.init.normal_(backbone.fc.weight)
    for seed in range(8):
        x = example_of(kind, 50, seed)
        with torch.no_grad():
            out = backbone(**x) if isinstance(x, dict) else backbone(x)
        logits = out["logits"] if isinstance(out, dict) else out
        if not loader:  # all classes about as often
            backbone.fc.bias.data -= logits.mean(0)
            logits = logits - logits.mean(0)
        labels = logits.argmax(1)
        loader.append({**x, "labels": labels} if isinstance(x, dict) else (x, labels))
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    found = plan(backbone, example_of(kind), loader, worth=0.0, progress=False, epochs=2)
    assert found.samples == (240, 80, 80)
    assert found.full_accuracy == 1
    assert not any(m._forward_hooks for m in backbone.modules())
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    json.dumps(found.to_json(), allow_nan=False)


def test_the_plan_hands_over_to_attach(early):
    backbone, (x, y) = Early(), easy(400, seed=7)
    fresh = offramp.attach(backbone, x[:4], exits=early.exits, heads=early.heads)
    shapes = [[tuple(p.shape) for p in head.parameters()] for head in fresh.heads]
    assert shapes == [[tuple(p.shape) for p in head.parameters()] for head in early.trained]
    shares = [cost / fresh.costs.full for cost in fresh.costs.heads[:-1]]
    assert shares == pytest.approx([exit.head_share for exit in early.planned])
    fresh.detach()
    model = offramp.attach(backbone, x[:4], exits=early.exits, heads=early.trained)
    point = early.operating[-1]
    policy = offramp.Policy("confidence", point.thresholds)
    report = offramp.evaluate(offramp.record(model, [(x, y)], progress=False), policy)
    assert report.cost_ratio == pytest.approx(point.cost_ratio, abs=0.1)
    assert report.early.accuracy > 0.9


def test_what_the_search_took():
    x, y = easy(400)
    backbone = Early()
    found = plan(backbone, x[:4], loader_of(x, y), progress=False, epochs=3)
    dense = attach_densely(backbone, x[:4])
    full = count_macs(lambda: backbone(x)) / 400
    heads = [3 * 8, 32 * 8 + 32 * 3] * 5  # not behind the last block: the rest costs too little
    assert found.candidates == (10, 5)
    assert dense.head_macs == sum(heads)
    learned, *others = found.samples
    held = sum(others)
    assert (learned, held) == (240, 160)
    assert found.cost.macs == 400 * full + (3 * 3 * learned + held) * sum(heads)
    assert found.cost.training_macs == 30 * 400 * full
    assert found.cost.macs < found.cost.training_macs
    assert found.cost.training_seconds > 0
    assert found.cost.seconds > 0


def test_a_search_that_costs_more_than_training_says_so():
    x, y = easy(400)
    found = plan(Early(), x[:4], loader_of(x, y), progress=False, epochs=60)
    assert found.cost.macs > found.cost.training_macs
    assert not found.cost.below_training
    assert found.to_json()["cost"]["below_training"] is False
    assert "MORE in MACs" in " ".join(str(found).split())


def test_held_out_samples_and_other_settings():
    found = plan(
        Early(),
        torch.randn(4, 8),
        loader_of(*easy(300)),
        held_out=loader_of(*easy(200, seed=5)),
        heads=["linear"],
        exits=1,
        drops=(0.01,),
        **QUICK,
    )
    assert found.samples == (300, 100, 100)
    assert found.heads == ("linear",)
    assert [point.drop for point in found.operating] == [0.01]


def test_the_seed_makes_a_plan_again_and_leaves_the_random_state_alone(early):
    torch.manual_seed(9)
    expected = torch.rand(2)
    backbone, loader = Early(), loader_of(*easy())
    torch.manual_seed(9)
    again = plan(backbone, easy(4)[0], loader, **QUICK)
    assert torch.equal(torch.rand(2), expected)
    assert again.planned == early.planned
    assert again.operating == early.operating


def test_percentiles():
    backbone = make("cnn")
    found = plan(backbone, example_of("cnn"), method="percentiles", exits=2)
    model = offramp.attach(make("cnn"), example_of("cnn"), exits=2)
    assert found.exits == model.places
    again = offramp.attach(backbone, example_of("cnn"), exits=found.exits, heads=found.heads)
    assert again.costs == model.costs
    fractions = [exit.fraction for exit in found.planned]
    assert fractions == pytest.approx(
        [model.costs.stages[0] / model.costs.full, sum(model.costs.stages[:2]) / model.costs.full]
    )
    assert "No data was looked at" in str(found)
    assert json.loads(json.dumps(found.to_json()))["exits"] == list(found.exits)


def test_it_prints_what_it_found(early):
    text = " ".join(str(early).split())
    for k, exit in enumerate(early.planned):
        assert f"{k}: {exit.place} {exit.head}" in text
        assert f"{100 * exit.brings:.2f} {100 * exit.brings_fresh:.2f}" in text
    assert "10 heads at 5 places, trained on 360 samples" in text
    assert "10 epochs of the backbone on this loader" in text
    plain = early.to_json()
    assert plain["kind"] == "places"
    assert plain["exits"] == list(early.exits)
    assert plain["planned"][0]["brings"] == early.planned[0].brings
    assert "trained" not in plain
    json.dumps(plain, allow_nan=False)


def fine():
    return {"backbone": Early(), "example": torch.randn(4, 8), "loader": loader_of(*easy(300))}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"loader": loader_of(*easy(100))}, "100 samples were looked at .*expected 200"),
        ({"loader": None}, "A search needs labelled samples.*method='percentiles'"),
        ({"loader": []}, "The search loader yields no batch"),
        (
            {"loader": [(easy(300)[0], torch.ones(300, dtype=torch.long))]},
            "All labels that were seen are 1: with one class there is nothing",
        ),
        ({"loader": [(easy(300)[0], torch.rand(300))]}, "labels of type torch.float32"),
        (
            {"loader": [(easy(300)[0], torch.arange(300).flip(0) // 100)]},
            r"answers .* right, which is no better than .* it looks untrained",
        ),
        ({"held_out": loader_of(*easy(20, seed=3))}, "20 held-out samples are left, too few"),
        ({"held_out": loader_of(*easy(300))}, "No row is left to judge exits on"),
        ({"backbone": Early().to("meta")}, "backbone lies on meta and the example on cpu"),
        (
            {"backbone": Early().to("meta"), "example": torch.randn(4, 8, device="meta")},
            "The backbone lies on 'meta' and has no values",
        ),
        ({"method": "serch"}, "Unknown method 'serch'. Did you mean 'search'"),
        ({"exits": 0}, "exits=0: expected 1 or more"),
        ({"epochs": 0}, "epochs=0: expected 1 or more"),
        ({"drops": ()}, r"drops=\(\): expected one or more shares"),
        ({"drops": (1.5,)}, r"drops=\(1.5,\): expected"),
        ({"worth": -0.1}, "worth=-0.1: expected a share"),
        ({"worth": float("nan")}, "worth=nan: expected a share"),
        ({"worth": None}, "worth=None: expected a share"),
        ({"drops": ("a",)}, r"drops=\('a',\): expected one or more shares"),
        ({"samples": 1e3}, "samples=1000.0: expected 1 or more, a whole number"),
        ({"epochs": None}, "epochs=None: expected 1 or more, a whole number"),
        ({"exits": 1.5}, "exits=1.5: expected 1 or more, a whole number"),
        ({"exits": ["1"]}, r"exits=\['1'\]: expected 1 or more, a whole number"),
        ({"method": None}, "Unknown method None. Known: percentiles, search"),
    ],
)
def test_bad_input(changed, text):
    given = {**fine(), **changed}
    with pytest.raises(DataError, match=text):
        plan(
            given.pop("backbone"),
            given.pop("example"),
            given.pop("loader"),
            progress=False,
            **given,
        )


def test_a_criterion_with_state():
    with pytest.raises(PolicyError, match="Exits cannot be chosen under 'patience'"):
        plan(**fine(), criterion="patience")


def test_the_first_token_and_the_mean_are_two_heads():
    dense = attach_densely(make("encoder"), example_of("encoder", 4), heads=("token", "pool"))
    assert {c.name for c in dense.candidates} == {"token", "pool"}


def test_it_learns_where_gradients_are_off_and_leaves_the_loader_s_generator(early):
    x, y = easy()
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    loader = DataLoader(TensorDataset(x, y), 50, shuffle=True, generator=generator)
    with torch.inference_mode():
        found = plan(Early(), x[:4], loader, **QUICK)
    assert found.exits
    assert torch.equal(generator.get_state(), state)


def test_percentiles_compare_no_heads():
    with pytest.raises(DataError, match="heads= names what a search tries"):
        plan(Early(), torch.randn(4, 8), method="percentiles", heads=("mlp",))


def test_heads_are_names():
    for heads in ([nn.Linear(8, 3)], ["linear", nn.Linear(8, 3)]):
        with pytest.raises(HeadError, match="head of type 'Linear' came where a name was"):
            plan(**fine(), heads=heads)
    with pytest.raises(HeadError, match="Unknown head 'lineer'. Did you mean 'linear'"):
        plan(**fine(), heads=("linear", "lineer"))
    dense = attach_densely(Early(), torch.randn(4, 8), heads="linear")
    assert {candidate.name for candidate in dense.candidates} == {"linear"}


def test_a_backbone_is_a_module():
    with pytest.raises(PlaceError, match="backbone is of type 'function'. Expected an nn.Module"):
        plan(**{**fine(), "backbone": lambda x: x})
