"""attach() and MultiExitModel."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from offramp.build.batch import as_call
from offramp.build.flow import count_macs
from offramp.build.heads import TokenHead
from offramp.build.model import HEAD_SHARE, MultiExitModel, attach
from offramp.errors import DataError, HeadError, OfframpError, PlaceError
from tests.networks import ResidualCNN, example_of, make

KINDS = ["cnn", "mlp", "encoder"]


def run(model, kind, batch=6, seed=2):
    args, kwargs = as_call(example_of(kind, batch, seed))
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_all_exits_and_the_backbone_s_own(kind):
    backbone = make(kind)
    model = attach(backbone, example_of(kind), exits=3)
    outputs = run(model.eval(), kind)
    assert model.num_exits == len(outputs) == 4
    assert len(model.heads) == len(model.places) == 3
    assert all(z.shape == (6, model.num_classes) for z in outputs)
    own = run(backbone, kind)
    assert torch.equal(outputs.final, own["logits"] if isinstance(own, dict) else own)
    assert outputs.output is not None
    for k, place in enumerate(model.places):
        feature = by_hand(backbone, place, kind)
        if kind != "encoder":
            torch.testing.assert_close(outputs[k], model.heads[k](feature))


def by_hand(backbone, place, kind):
    seen = []
    handle = backbone.get_submodule(place).register_forward_hook(lambda m, a, out: seen.append(out))
    run(backbone, kind)
    handle.remove()
    return seen[0]


def test_the_backbone_is_not_edited(kind):
    backbone = make(kind).train()
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    children = list(backbone.named_modules())
    parameters = list(backbone.named_parameters())
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    model = attach(backbone, example_of(kind))
    assert torch.equal(torch.rand(2), expected)  # the random state is as it was
    assert model.backbone is backbone
    assert all(m.training for m in backbone.modules())
    assert list(backbone.named_modules()) == children
    assert all(
        p is q for (_, p), (_, q) in zip(parameters, backbone.named_parameters(), strict=True)
    )
    assert list(backbone.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    keys = [k for k in model.state_dict() if k.startswith("backbone.")]
    assert keys == [f"backbone.{k}" for k in state]
    assert all(k.startswith(("backbone.", "heads.")) for k in model.state_dict())


def test_hooks_are_on_the_tapped_modules_alone_and_detach_removes_them(kind):
    backbone = make(kind)
    model = attach(backbone, example_of(kind))
    hooked = [p for p, m in backbone.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert sorted(hooked) == sorted(model.places)
    assert model.detach() is backbone
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    with pytest.raises(PlaceError, match="No feature came from .* or the model was detached"):
        run(model, kind)
    run(backbone, kind)


def test_nothing_is_captured_when_the_backbone_runs_by_itself():
    backbone = make("mlp")
    model = attach(backbone, example_of("mlp"))
    before = [set(vars(m)) for m in model.modules()]
    run(backbone, "mlp")
    run(model, "mlp")
    assert [set(vars(m)) for m in model.modules()] == before
    outputs = run(model, "mlp")
    assert len(outputs) == 4


def test_threads_do_not_disturb_each_other():
    backbone = make("cnn")
    model = attach(backbone, example_of("cnn")).eval()
    expected = {n: run(model, "cnn", n).stack() for n in (2, 3, 5)}
    wrong = []

    def work(n):
        for _ in range(20):
            if not torch.allclose(run(model, "cnn", n).stack(), expected[n], atol=1e-6):
                wrong.append(n)
            run(backbone, "cnn", n + 1)

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_copy_is_independent(kind):
    model = attach(make(kind), example_of(kind)).eval()
    twin = copy.deepcopy(model)
    expected = run(model, kind).stack()
    assert torch.equal(run(twin, kind).stack(), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(run(model, kind).stack(), expected)
    assert not torch.equal(run(twin, kind).stack(), expected)
    twin.detach()
    assert not any(m._forward_hooks for m in twin.modules())
    assert torch.equal(run(model, kind).stack(), expected)
    again = copy.deepcopy(model)
    model.detach()
    assert torch.equal(run(again, kind).stack(), expected)


def test_two_models_on_one_backbone():
    backbone = make("cnn")
    one = attach(backbone, example_of("cnn"), exits=1).eval()
    two = attach(backbone, example_of("cnn"), exits=["layer1", "layer2.0"]).eval()
    assert len(run(one, "cnn")) == 2
    assert len(run(two, "cnn")) == 3
    one.detach()
    assert len(run(two, "cnn")) == 3


def test_state_dict_goes_round(kind):
    model = attach(make(kind), example_of(kind))
    torch.manual_seed(1)
    other = attach(make(kind, seed=5), example_of(kind))
    assert not torch.equal(run(other.eval(), kind).stack(), run(model.eval(), kind).stack())
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, kind).stack(), run(model, kind).stack())


def test_heads_are_reproducible():
    def heads(seed):
        torch.manual_seed(seed)
        return torch.cat(
            [p.flatten() for p in attach(make("cnn"), example_of("cnn")).heads.parameters()]
        )

    assert torch.equal(heads(4), heads(4))
    assert not torch.equal(heads(4), heads(5))


@pytest.mark.parametrize("name", KINDS)
def test_it_exports_with_all_exits(name):
    model = attach(make(name), example_of(name)).eval()
    example = example_of(name)
    tensors = list(example.values()) if isinstance(example, dict) else [example]
    wrapped = Positional(model, list(example) if isinstance(example, dict) else None)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        wrapped, tuple(tensors), dynamic_shapes=(tuple({0: batch} for _ in tensors),)
    )
    more = example_of(name, 9, 3)
    more = tuple(more.values()) if isinstance(more, dict) else (more,)
    with torch.no_grad():
        expected, found = wrapped(*more), program.module()(*more)
    assert len(found) == 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Positional(nn.Module):
    def __init__(self, model: MultiExitModel, names: list[str] | None) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        if self.names is None:
            return self.model(*tensors).logits
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def test_exit_outputs_come_out_of_an_exported_program():
    model = attach(make("mlp"), example_of("mlp")).eval()
    program = torch.export.export(model, (example_of("mlp"),)).module()
    outputs = program(example_of("mlp"))
    assert type(outputs).__name__ == "ExitOutputs"
    assert torch.equal(outputs.stack(), model(example_of("mlp")).stack())


def test_labels_give_a_loss_and_do_not_reach_the_backbone():
    model = attach(make("encoder"), {**example_of("encoder"), "labels": torch.zeros(4).long()})
    labels = torch.tensor([0, 2, 1, 0])
    outputs = model(**example_of("encoder"), labels=labels)
    each = [nn.functional.cross_entropy(z, labels) for z in outputs]
    torch.testing.assert_close(outputs.loss, sum(each) / 4)
    assert model(**example_of("encoder")).loss is None
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_costs_are_in_macs_with_heads_counted():
    backbone = make("cnn")
    model = attach(backbone, example_of("cnn", 5), exits=["layer1", "layer3.0"])
    x = example_of("cnn", 1)
    full = count_macs(lambda: backbone(x))
    assert model.costs.full == pytest.approx(full)
    to_layer1 = count_macs(lambda: backbone.layer1(backbone.stem(x)))
    assert model.costs.stages[0] == pytest.approx(to_layer1)
    features, _ = model.features(x)
    model.eval()
    for head, feature, cost in zip(model.heads, features, model.costs.heads, strict=False):
        assert cost == pytest.approx(count_macs(lambda: head(feature)))
        assert cost > 0
    assert model.costs.heads[-1] == 0.0
    assert model.costs.unit == "MACs"


@pytest.mark.parametrize("cost", ["macs", "params", "latency"])
def test_whatever_chose_the_places_costs_are_macs(cost):
    model = attach(make("cnn"), example_of("cnn"), cost=cost)
    assert model.costs.by == cost
    assert model.costs.full == pytest.approx(
        count_macs(lambda: model.backbone(example_of("cnn", 1)))
    )
    assert all(stage > 0 for stage in model.costs.stages)


def test_automatic_convolutions_are_cheap():
    model = attach(ResidualCNN(width=16), example_of("cnn"))
    for head, cost in zip(model.heads, model.costs.heads, strict=False):
        assert cost <= HEAD_SHARE * model.costs.full + head.classifier.weight.numel()


def test_a_mapping_of_heads():
    mine = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    heads = {"layer2": "pool", "layer1.0": mine, "layer3.0": lambda f: f.mean((2, 3))[:, :5]}
    model = attach(make("cnn"), example_of("cnn"), exits=heads).eval()
    assert model.places == ("layer1.0", "layer2", "layer3.0")
    assert model.heads[0] is mine
    assert len(run(model, "cnn")) == 4
    assert "heads.0.1.weight" in model.state_dict()


def test_a_list_of_heads_follows_the_order_of_execution():
    heads = ["pool", nn.Sequential(nn.Flatten(), nn.Linear(16 * 8 * 8, 5))]
    model = attach(make("cnn"), example_of("cnn"), exits=["layer2", "layer1"], heads=heads)
    assert model.places == ("layer1", "layer2")
    assert model.heads[1] is heads[1]


class WithAuxiliary(nn.Module):
    """Has an auxiliary classifier of its own, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.a(x))
        return self.fc(torch.relu(self.b(x))), self.aux(x)


def test_auxiliary_outputs_can_be_taken_as_exits():
    net, x = WithAuxiliary().eval(), torch.randn(4, 6)
    by_place = attach(net, x, exits={"aux": "identity"})
    by_module = attach(net, x, exits={"a": lambda f: net.aux(torch.relu(f))})
    with torch.no_grad():
        logits, aux = net(x)
        assert torch.equal(by_place(x)[0], aux)
        assert torch.equal(by_place(x).final, logits)
        assert torch.equal(by_module(x)[0], aux)


def test_logits_by_a_function():
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make("mlp")

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.body(x)}

    model = attach(Scores(), example_of("mlp"), logits=lambda out: out["scores"])
    assert run(model, "mlp").final.shape == (6, 4)
    with pytest.raises(DataError, match="Pass logits="):
        attach(Scores(), example_of("mlp"))


def test_masks_reach_the_pooled_heads():
    model = attach(make("encoder"), example_of("encoder")).eval()
    assert all(isinstance(head, TokenHead) for head in model.heads)
    example = example_of("encoder", 2)
    example["attention_mask"][0] = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0])
    changed = {**example, "input_ids": example["input_ids"].clone()}
    changed["input_ids"][0, 5:] = 7
    short = {key: value[:1, :5] for key, value in example.items()}
    with torch.no_grad():
        expected = model(**example).stack()
        torch.testing.assert_close(model(**changed).stack(), expected)
        torch.testing.assert_close(model(**short).stack(), expected[:, :1])
        positional = model(example["input_ids"], example["attention_mask"]).stack()
    torch.testing.assert_close(positional, expected)


def test_a_head_may_ask_for_inputs_of_the_backbone():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 3)

        def forward(self, feature: Tensor, input_ids: Tensor) -> Tensor:
            return self.fc((feature * input_ids[..., None]).mean(1))

    model = attach(make("encoder"), example_of("encoder"), exits={"blocks.1": Weighted()})
    assert run(model, "encoder")[0].shape == (6, 3)


class SparseGraph(nn.Module):
    """Nodes (N, 4) of a batch of graphs, told apart by ``batch`` (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.fc(pool(x, batch))


def pool(x: Tensor, batch: Tensor) -> Tensor:
    return torch.zeros(int(batch.max()) + 1, x.shape[1]).index_add(0, batch, x)


class GraphHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, feature: Tensor, batch: Tensor) -> Tensor:
        return self.fc(pool(feature, batch))


def test_what_is_not_batch_first_comes_in_through_select():
    def select(inputs, rows):
        return inputs

    example = {"x": torch.randn(7, 4), "batch": torch.tensor([0, 0, 0, 1, 1, 2, 2])}
    exits = {"layers.0": GraphHead(), "layers.1": GraphHead()}
    model = attach(SparseGraph(), example, exits=exits, select=select)
    assert model.select is select
    assert [z.shape for z in model(**example)] == [(3, 3)] * 3
    with pytest.raises(HeadError, match=r"into \(7, 3\); expected \(3, 3\): 3 samples"):
        attach(SparseGraph(), example, exits=["layers.0"], select=select)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(kind(8, 8, batch_first=True) for _ in range(3))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x, _ = layer(x)
        return self.fc(x[:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_tapped_at_their_sequence(kind):
    example = torch.randint(0, 20, (4, 6))
    model = attach(Recurrent(kind), example, exits=2)
    assert model.places == ("layers.0", "layers.1")
    features, _ = model.features(example)
    assert [f.shape for f in features] == [(4, 6, 8)] * 2


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.relu(self.block(x))
        return self.fc(x)


def test_calls_of_a_shared_module_are_kept_apart():
    net, x = Shared(), torch.randn(3, 8)
    model = attach(net, x, exits={"block@0": "linear", "block@2": "linear", "fc@0": "identity"})
    assert model.places == ("block@0", "block@2", "fc")
    (first, third, _), _ = model.features(x)
    y = net.block(x)
    assert torch.equal(first, y)
    for _ in range(2):
        y = net.block(torch.relu(y))
    assert torch.equal(third, y)
    assert Counter(m is net.block for m in model.modules())[True] == 1


class WritesOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.fc = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.a(x)))


def test_a_feature_that_is_written_over_is_kept():
    net, x = WritesOver(), torch.randn(3, 8)
    model = attach(net, x, exits=["a"])
    (feature,), _ = model.features(x)
    assert torch.equal(feature, net.a(x))
    assert (feature < 0).any()
    model(x)[0].sum().backward()


@pytest.mark.parametrize("shape", [(2, 3, 4, 12, 12), (2, 4, 12, 12, 3)])
def test_video(shape):
    last = shape[-1] == 3

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.movedim(-1, 1)

    layers = [nn.Sequential(nn.Conv3d(a, b, 3), nn.ReLU()) for a, b in [(3, 8), (8, 8)]]
    body = nn.Sequential(*layers[:1], nn.Conv3d(8, 8, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    net = nn.Sequential(Turn() if last else nn.Identity(), body, nn.Linear(8, 4))
    model = attach(net, torch.randn(shape), exits=1).eval()
    assert [z.shape for z in model(torch.randn(shape))] == [(2, 4)] * 2


def test_a_backbone_in_half_precision():
    net = make("cnn").to(torch.bfloat16)
    model = attach(net, example_of("cnn").to(torch.bfloat16))
    assert {p.dtype for p in model.heads.parameters()} == {torch.bfloat16}
    assert model(example_of("cnn").to(torch.bfloat16)).final.dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [1, 0])
def test_an_example_of_one(batch):
    with pytest.raises(DataError, match="Expected at least 2 samples"):
        attach(make("cnn"), example_of("cnn", 1)[:batch])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"exits": {"layer1": nn.Sequential(nn.Flatten(), nn.Linear(2048, 7))}},
            r"head at 'layer1' \(Sequential\) turns .* \(2, 8, 16, 16\) into \(2, 7\); expected "
            r"\(2, 5\): 2 samples and the backbone's 5 classes",
        ),
        ({"exits": {"layer1": nn.Linear(3, 5)}}, "head at 'layer1' .* fails on its feature"),
        ({"exits": {"layer1": 5}}, "head at 'layer1' is of type 'int'. Expected a name"),
        ({"exits": {"layer1": lambda f: "five"}}, "into str; expected"),
        ({"exits": {"layer1": "pol"}}, "Unknown head 'pol'. Did you mean 'pool'"),
        ({"heads": ["pool"]}, "one head for each of the 3 exits, got 1"),
        ({"heads": 4}, "one head for each of the 3 exits, got int"),
        ({"exits": {"layer1": "pool"}, "heads": "pool"}, "heads is given too"),
        ({"num_classes": 9}, "num_classes=9 and the backbone's logits have 5 classes"),
    ],
)
def test_bad_heads(arguments, text):
    backbone = make("cnn").train()
    with pytest.raises(HeadError, match=text):
        attach(backbone, example_of("cnn"), **arguments)
    assert not any(m._forward_hooks for m in backbone.modules())
    assert backbone.training


def test_a_failed_attach_leaves_no_trace():
    backbone = make("cnn").train()
    for exits in (["nowhere"], 99, [1.5]):
        with pytest.raises(OfframpError):
            attach(backbone, example_of("cnn"), exits=exits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert all(m.training for m in backbone.modules())


def test_a_module_that_runs_in_evaluation_alone():
    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.fc(x if self.training else self.extra(x))

    model = attach(Shy(), torch.randn(3, 4), exits=["extra"])
    with pytest.raises(PlaceError, match="No feature came from 'extra' in this pass"):
        model.train()(torch.randn(3, 4))


def test_fingerprints_are_no_part_of_the_state():
    model = attach(make("mlp"), example_of("mlp"))
    assert model.training_fingerprints.dtype == torch.int64
    assert model.training_fingerprints.numel() == 0
    assert not any("fingerprint" in key for key in model.state_dict())


class Tokens(nn.Module):
    """torch's own encoder, with the mask that makes it nest its tensors in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 3), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=mask == 0)
        return self.fc(hidden[:, 0])


def test_the_encoder_of_torch_hands_no_nested_tensors_to_heads():
    ids, mask = torch.randint(0, 20, (4, 6)), torch.ones(4, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    net = Tokens()
    places = [f"encoder.layers.{k}" for k in range(2)]
    model = attach(net, {"ids": ids, "mask": mask}, exits=places).eval()
    with torch.no_grad():
        said = model(ids=ids, mask=mask)
    assert [z.shape for z in said.logits] == [(4, 4)] * 3
    torch.testing.assert_close(said.logits[-1], net(ids, mask))


def test_dropout_in_place_does_not_write_over_a_feature():
    net = nn.Sequential(
        nn.Linear(6, 8), nn.Dropout(0.5, inplace=True), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    x = torch.randn(5, 6)
    model = attach(net, x, exits=["0"]).train()
    features, _ = model.features(x)
    torch.testing.assert_close(features[0], net[0](x))


def test_heads_that_are_made_under_inference_mode_can_learn():
    net, x = make("cnn"), example_of("cnn", 4)
    with torch.inference_mode():
        model = attach(net, x, exits=2)
    assert not any(p.is_inference() for p in model.heads.parameters())


def test_a_module_may_return_a_dataclass():
    @dataclass
    class Said:
        hidden: Tensor
        extra: int = 0

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Said:
            return Said(self.linear(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fc = Block(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(x).hidden)

    x = torch.randn(3, 6)
    assert attach(Net(), x, exits=["block"])(x).logits[0].shape == (3, 2)


class Trained(nn.Module):
    """In training it checkpoints its second layer, or writes over its first."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.reentrant is None:
            x = functional.dropout(x, 0.5, self.training, inplace=True)
        if self.training and self.reentrant is not None:
            return self.fc(checkpoint(self.b, x, use_reentrant=self.reentrant))
        return self.fc(self.b(x))


def test_checkpointing_hands_gradients_to_an_exit_or_says_that_it_does_not():
    x = torch.randn(4, 6)
    model = attach(Trained(reentrant=False), x, exits=["b"]).train()
    model(x)[0].sum().backward()
    assert model.backbone.a.weight.grad is not None
    model = attach(Trained(reentrant=True), x, exits=["b"]).train()
    with pytest.raises(PlaceError, match="Gradients are off inside 'b'.*use_reentrant=False"):
        model(x)
    model.eval()(x)
    model.train().backbone.b.requires_grad_(False)
    model(x)[0].sum().backward()


def test_a_feature_that_training_alone_writes_over_is_refused():
    x = torch.randn(4, 6)
    model = attach(Trained(), x, exits=["a"]).train()
    with pytest.raises(PlaceError, match="The feature at 'a' was written over later in this pass"):
        model(x)
    model.eval()
    with torch.inference_mode():
        model(x)
    (feature,), _ = model.features(x)
    assert torch.equal(feature, model.backbone.a(x))


def test_one_logit_is_no_classifier():
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)), torch.randn(4, 6)
    with pytest.raises(DataError, match=r"shape \(2, 1\).*with two classes or more.*zeros_like"):
        attach(net, x, exits=["0"])
    model = attach(
        net, x, exits=["0"], logits=lambda out: torch.cat([torch.zeros_like(out), out], 1)
    )
    assert model.num_classes == 2
    torch.testing.assert_close(model(x).final.softmax(1)[:, 1], net(x).sigmoid()[:, 0])


@pytest.mark.parametrize(
    "error", [KeyError("a"), AttributeError("b"), AssertionError("c"), ZeroDivisionError("d")]
)
def test_a_head_may_fail_in_any_way(error):
    def head(feature):
        raise error

    text = f"head at 'layer1' .* fails on .* with {type(error).__name__}: "
    with pytest.raises(HeadError, match=text) as caught:
        attach(make("cnn"), example_of("cnn"), exits={"layer1": head})
    assert caught.value.__cause__ is error


def test_a_backbone_is_a_module():
    with pytest.raises(PlaceError, match="backbone is of type 'function'. Expected an nn.Module"):
        attach(lambda x: x, torch.randn(4, 6))


def test_a_measure_is_a_name():
    with pytest.raises(PlaceError, match="Unknown cost measure None. Known: latency, macs"):
        attach(make("mlp"), example_of("mlp"), cost=None)


def test_buffers_that_count_are_left_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("passes", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            x = self.first(x)
            self.passes += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return self.last(x)

    backbone = Counting().eval()
    held = (backbone.passes, backbone.mean)
    attach(backbone, torch.randn(4, 4), exits=["first"])
    assert backbone.passes is held[0]
    assert backbone.mean is held[1]
    assert float(backbone.passes) == 0
    assert not backbone.mean.any()


def test_buffers_that_grow_with_the_input_or_view_others_stay_usable():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.known = 1
            self.register_buffer("table", torch.ones(1, 8))
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("view", self.count.expand(3))
            self.register_buffer("seen", torch.empty(0))

        def forward(self, x):
            if len(x) > self.known:
                self.known = len(x)
                self.register_buffer("table", torch.ones(self.known, 8))
            self.count += 1
            self.seen.resize_(x.shape).copy_(x)
            return self.last(self.first(x) + self.table[: len(x)])

    backbone, x = Table().eval(), torch.randn(4, 4)
    model = attach(backbone, x, exits=["first"])
    assert float(backbone.count) == 0
    assert model(x).final.shape == backbone(x).shape == (4, 3)


def test_heads_are_made_outside_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        model = attach(make("cnn"), example_of("cnn"), cascade=True)
        assert torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.costs == attach(make("cnn"), example_of("cnn"), cascade=True).costs
