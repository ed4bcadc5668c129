"""What every module costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.build.batch import as_call
from offramp.build.cost import ExitCosts, last_inside, profile
from offramp.errors import DataError, PlaceError
from tests.networks import example_of, make

KINDS = ["cnn", "mlp", "encoder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [2, 5])
def test_macs_are_per_sample_and_agree_with_torch(kind, batch):
    backbone = make(kind)
    args, kwargs = as_call(example_of(kind, 4))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(*args, **kwargs)
    found = profile(backbone, *as_call(example_of(kind, batch)))
    attention = 4 * 4 * 9 * 9 * 16 if kind == "encoder" else 0  # not in torch's table for CPUs
    assert found.macs == pytest.approx(counter.get_total_flops() / 2 / 4 + attention)
    assert found.total == found.macs
    assert found.calls[0].cost == pytest.approx(found.macs)


def test_macs_by_hand():
    found = profile(make("mlp"), (torch.randn(3, 12),))
    assert found.calls_of("blocks.0")[0].cost == 12 * 32
    assert found.calls_of("blocks.1")[0].cost == 32 * 32
    assert found.calls_of("blocks.1")[0].after == 12 * 32 + 32 * 32
    assert found.calls_of("fc")[0].cost == 32 * 4
    assert found.macs == 12 * 32 + 4 * 32 * 32 + 32 * 4
    assert found.num_classes == 4


def test_calls_nest_and_are_in_order():
    found = profile(make("cnn"), (example_of("cnn"),))
    assert [c.path for c in found.calls[:4]] == ["", "stem", "layer1", "layer1.0"]
    assert [c.depth for c in found.calls[:4]] == [0, 1, 1, 2]
    for call in found.calls[1:]:
        parent = found.calls[call.parent]
        assert parent.before <= call.before <= call.after <= parent.after
        assert parent.order > call.order
    last = last_inside(found.calls)
    assert last[0] == len(found.calls) - 1
    assert last[1] == 1


def test_parameters_count_once_each():
    backbone = make("cnn")
    found = profile(backbone, (example_of("cnn"),), measure="params")
    assert found.unit == "parameters"
    assert found.total == sum(p.numel() for p in backbone.parameters())
    block = backbone.get_submodule("layer2.0")
    assert found.calls_of("layer2.0")[0].cost == sum(p.numel() for p in block.parameters())
    assert found.macs == profile(backbone, (example_of("cnn"),)).macs


def test_parameters_of_modules_that_are_never_called():
    # nn.MultiheadAttention reads the weights of its output layer without calling it.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = Pooled(layer, 8, 3)
    found = profile(net, (torch.randn(2, 5, 8),), measure="params")
    assert found.total == sum(p.numel() for p in net.parameters())
    attention = found.calls_of("body.self_attn")[0]
    assert attention.cost == sum(p.numel() for p in layer.self_attn.parameters())


class Pooled(nn.Module):
    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean(1))


def test_the_fused_path_of_torch_hides_nothing():
    layers = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=True
    )
    before = torch.backends.mha.get_fastpath_enabled()
    found = profile(Pooled(layers, 8, 3).eval(), (torch.randn(2, 5, 8),))
    assert torch.backends.mha.get_fastpath_enabled() == before
    one = 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * (4 + 4)
    assert found.calls_of("body.layers.1")[0].cost == one


def test_latency_is_measured_in_order():
    found = profile(make("cnn"), (example_of("cnn", 8),), measure="latency")
    assert found.unit == "ms"
    assert 0 < found.total < 1000
    ends = [c.after for c in sorted(found.calls, key=lambda c: c.order)]
    assert ends == sorted(ends)
    assert found.calls[0].before == 0


def test_a_network_that_calls_other_modules_for_other_batches():
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if len(x) > 3 else self.a(x)

    with pytest.raises(PlaceError, match="calls other modules for the whole example"):
        profile(Fickle(), (torch.randn(5, 4),), measure="latency")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["macs", "params", "latency"])
def test_the_backbone_is_left_as_found(kind, measure):
    backbone = make(kind).train()
    backbone.fc.eval()
    modules = list(backbone.modules())
    flags = [m.training for m in modules]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    profile(backbone, *as_call(example_of(kind)), measure)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in modules] == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] == hooks
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in backbone.parameters())


def test_hooks_go_when_the_backbone_fails():
    backbone = make("mlp").train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        profile(backbone, (torch.randn(2, 5),))
    assert backbone.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_what_follows_the_batch():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.turn, self.windows = nn.Linear(4, 8), Turn(0, 1), Windows()
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:  # two steps, as many as rows are profiled
            return self.fc(self.windows(self.turn(self.first(x))).reshape(2, -1, 8)[0])

    found = profile(Mixed(), (torch.randn(5, 2, 4),))
    batched = {c.path: c.feature.batched for c in found.calls}
    assert batched["first"]
    assert not batched["turn"]
    assert not batched["windows"]
    assert batched["fc"]


class Turn(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.axes = a, b

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(*self.axes) + 0


class Windows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 8)


def test_bad_calls():
    with pytest.raises(PlaceError, match="Unknown cost measure 'mac'. Did you mean 'macs'"):
        profile(make("mlp"), (torch.randn(2, 12),), measure="mac")
    turned = Pooled(Turn(0, 1), 8, 3)
    with pytest.raises(DataError, match=r"logits have shape \(5, 3\) for a batch of 2 .* select="):
        profile(turned, (torch.randn(4, 5, 8),))
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        profile(nn.Sequential(Turn(0, 1), nn.Linear(4, 3)), (torch.randn(4, 5),))
    assert "with 3 rows of the example, taken along dimension 0" in caught.value.__notes__[0]
    with pytest.raises(PlaceError, match="'ReLU' does no multiply-accumulate that can be counted"):
        profile(nn.ReLU(), (torch.randn(2, 4),))


def test_exit_costs():
    costs = ExitCosts((4.0, 3.0, 2.0), (0.5, 0.25, 0.0))
    assert costs.full == 9.0
    assert costs.cumulative() == (4.5, 7.75, 9.75)
    assert costs.unit == "MACs"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_watched_or_counted():
    x = torch.randn(2, 4)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlaceError, match="is TorchScript, whose modules cannot be watched"):
        profile(torch.jit.trace(net, x), (x,))

    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.new_ones(4, 3)

    with pytest.raises(PlaceError, match="'Bare' has no parameters, .*Use cost='macs'"):
        profile(Bare(), (x,), measure="params")


def test_latency_of_what_is_not_batch_first():
    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.fc = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, rows: dict[str, Tensor]) -> Tensor:
            means = torch.zeros(2, 8).index_add(0, rows["graph"], self.one(rows["x"]).relu())
            return self.fc(means)

    rows = {"graph": torch.tensor([0, 1, 1]), "x": torch.randn(3, 3), "none": torch.tensor(1.0)}
    found = profile(Graphs(), (rows,), measure="latency", batch_first=False)
    assert found.total > 0
