from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offramp.build.model import attach
from offramp.decide.policy import Policy
from offramp.errors import DataError, StageError
from offramp.run.graph import cut
from offramp.run.rows import RowAxis
from offramp.run.runner import Runner
from offramp.run.times import StageTimes
from tests.run.conftest import KINDS, case


@pytest.mark.parametrize("inner", [False, True])
def test_rows_of_a_folded_dimension(inner: bool) -> None:
    batch, parts = 5, 3
    unfolded = torch.arange(batch * parts * 2).reshape(batch, parts, 2)
    folded = (unfolded.transpose(0, 1) if inner else unfolded).reshape(batch * parts, 2)
    rows = torch.tensor([4, 1])
    taken = unfolded[rows]
    wanted = (taken.transpose(0, 1) if inner else taken).reshape(-1, 2)
    assert torch.equal(RowAxis(0, parts, inner).take(folded, rows), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_share_the_parameters_of_the_model(kind: str) -> None:
    one = case(kind)
    own = {p.data_ptr() for p in one.model.parameters()}
    staged = cut(one.model, one.example)
    for stage in staged.stages:
        assert {p.data_ptr() for p in stage.module.parameters()} <= own


def test_no_node_runs_in_two_stages() -> None:
    one = case("cnn")
    staged = cut(one.model, one.example)
    convolutions = [
        node.name
        for stage in staged.stages
        for node in stage.module.graph.nodes
        if "conv2d" in str(node.target)
    ]
    whole = sum(isinstance(m, nn.Conv2d) for m in one.model.modules())
    assert len(convolutions) == len(set(convolutions)) == whole


class Windows(nn.Module):
    """Folds windows into the batch, in either order; folded values cross the exit at ``tap``."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.inner = inner
        self.first = nn.Linear(6, 6)
        self.tap = nn.Identity()
        self.second = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def unfold(self, folded: Tensor, batch: int) -> Tensor:
        if self.inner:
            return folded.reshape(4, batch, 6).transpose(0, 1)
        return folded.reshape(batch, 4, 6)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, 6)
        batch = x.shape[0]
        folded = (x.transpose(0, 1) if self.inner else x).reshape(batch * 4, 6)
        folded = torch.relu(self.first(folded))
        early = self.tap(self.unfold(folded, batch).mean(1))
        folded = self.second(folded)
        return self.fc(self.unfold(folded, batch).mean(1) + early)


@pytest.mark.parametrize("inner", [False, True])
def test_windows_folded_into_the_batch_are_regrouped(inner: bool) -> None:
    torch.manual_seed(0)
    model = attach(Windows(inner).eval(), torch.randn(4, 4, 6), exits=["tap"])
    staged = cut(model, torch.randn(4, 4, 6))
    (axis,) = [a for a in staged.rows.values() if a is not None and a.multiple == 4]
    assert axis == RowAxis(0, 4, inner)
    x = torch.randn(16, 4, 6)
    with torch.no_grad():
        first, final = model(x)
    score = torch.softmax(first, -1).max(-1).values
    middle = float(score.sort().values[7:9].mean())
    got = Runner(model, Policy("confidence", [middle]), torch.randn(4, 4, 6))(x)
    wanted = torch.where((score >= middle)[:, None], first, final)
    assert torch.allclose(got.logits, wanted, atol=1e-5)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.gate = Gate()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gate(self.first(x)))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


def test_a_branch_on_values_is_refused_with_the_reason_and_the_way_out() -> None:
    model = attach(Branching().eval(), torch.randn(4, 12), exits=["first"])
    with pytest.raises(
        StageError, match=r"refuses this model in the module 'gate'(.|\n)*nn.Sequential"
    ):
        cut(model, torch.randn(4, 12))


class RowGate(nn.Module):
    """Branches on values, row by row: nothing that export takes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.relu() if row.sum() > 0 else row for row in x])


def test_a_sequential_model_that_export_refuses_runs_on_eager_torch() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(12, 8), RowGate(), nn.Linear(8, 8), nn.Linear(8, 3))
    model = attach(backbone.eval(), torch.randn(4, 12), exits=["1", "2"])
    for linear in [m for m in model.heads.modules() if isinstance(m, nn.Linear)]:
        nn.init.normal_(linear.weight)
    x = torch.randn(33, 12)
    with torch.no_grad():
        logits = list(model(x))
    scores = [torch.softmax(v, -1).max(-1).values for v in logits[:2]]
    thresholds = [float(s.median()) + 1e-4 for s in scores]
    result = Runner(model, Policy("confidence", thresholds), torch.randn(4, 12))(x)
    wanted = torch.where(
        scores[0] >= thresholds[0], 0, torch.where(scores[1] >= thresholds[1], 1, 2)
    )
    assert torch.equal(result.exit, wanted)
    assert len(wanted.unique()) == 3
    rows = torch.arange(33)
    assert torch.allclose(result.logits, torch.stack(logits)[wanted, rows], atol=1e-5)
    with pytest.raises(StageError, match="in the module '1'"):
        Runner(model, Policy.final(), torch.randn(4, 12), engine="onnxruntime")


def test_an_example_of_one_is_refused() -> None:
    one = case("mlp")
    with pytest.raises(DataError, match="at least two samples"):
        cut(one.model, torch.randn(1, 12))


class Masked(nn.Module):
    """Attention by heads that are folded into the batch; the mask is made once, for both layers."""

    def __init__(self, fold: str) -> None:
        super().__init__()
        self.fold = fold
        self.first, self.tap, self.second = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def mask(self, keep: Tensor) -> Tensor:
        if self.fold == "outer, bool":  # as nn.MultiheadAttention takes it
            return (~keep)[:, None, :].repeat_interleave(2, 0)
        if self.fold == "outer, infinite":
            return (
                torch.zeros(keep.shape)
                .masked_fill(~keep, -torch.inf)[:, None]
                .repeat_interleave(2, 0)
            )
        return (~keep)[:, None, :].repeat(2, 1, 1)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = x.reshape(batch, length, 2, width // 2)
        inner = self.fold == "inner, bool"
        heads = heads.permute(2, 0, 1, 3) if inner else heads.permute(0, 2, 1, 3)
        folded = heads.reshape(2 * batch, length, width // 2)
        scores = folded @ folded.transpose(1, 2)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(mask, -1e9)
        else:
            scores = scores + mask
        folded = scores.softmax(-1) @ folded
        if inner:
            return folded.reshape(2, batch, length, -1).permute(1, 2, 0, 3).reshape(x.shape)
        return folded.reshape(batch, 2, length, -1).permute(0, 2, 1, 3).reshape(x.shape)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = self.mask(keep)
        x = self.tap(x + self.attend(self.first(x), mask))
        return self.fc((x + self.attend(self.second(x), mask)).mean(1))


@pytest.mark.parametrize("fold", ["inner, bool", "outer, bool", "outer, infinite"])
@pytest.mark.parametrize("padded", [False, True])
def test_an_example_without_padding_does_not_hide_whose_mask_it_is(fold: str, padded: bool) -> None:
    torch.manual_seed(0)
    keep = torch.ones(6, 5, dtype=torch.bool)
    if padded:
        keep[1, 3:] = keep[2, 1:] = False
    example = {"x": torch.randn(6, 5, 6), "keep": keep}
    model = attach(Masked(fold).eval(), example, exits=["tap"])
    x = torch.randn(6, 5, 6)
    lengths = torch.tensor([5, 1, 3, 2, 4, 1])
    given = {"x": x, "keep": torch.arange(5) < lengths[:, None]}
    with torch.no_grad():
        early, last = model(**given).logits
    confident = early.softmax(-1).amax(-1)
    policy = Policy("confidence", [float(confident.sort().values[3:5].mean())])
    runner = Runner(model, policy, example)
    runner.times = StageTimes.none()  # it always compacts
    result = runner(**given)
    wanted = torch.where((result.exit == 0)[:, None], early, last)
    assert len(result.exit.unique()) == 2
    assert torch.allclose(result.logits, wanted, atol=1e-5)


class Given(Masked):
    """The mask comes as numbers: 1 or above is a token, or 1 is padding."""

    def __init__(self, kind: str) -> None:
        super().__init__("inner, bool")
        self.kind = kind

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return super().forward(x, keep == 0 if self.kind == "padding" else keep > 0)

    def as_given(self, keep: Tensor) -> Tensor:
        return (~keep).long() if self.kind == "padding" else keep.float()


@pytest.mark.parametrize("kind", ["tokens", "padding"])
@pytest.mark.parametrize("padded", [None, 3, 5], ids=["nowhere", "fourth", "last"])
def test_masks_of_numbers_and_a_padded_row_anywhere_tell_the_order(
    kind: str, padded: int | None
) -> None:
    torch.manual_seed(0)
    keep = torch.ones(6, 5, dtype=torch.bool)
    if padded is not None:
        keep[padded, 2:] = False
    backbone = Given(kind).eval()
    example = {"x": torch.randn(6, 5, 6), "keep": backbone.as_given(keep)}
    model = attach(backbone, example, exits=["tap"])
    keep = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 1])[:, None]
    given = {"x": torch.randn(6, 5, 6), "keep": backbone.as_given(keep)}
    with torch.no_grad():
        early, last = model(**given).logits
    confident = early.softmax(-1).amax(-1)
    policy = Policy("confidence", [float(confident.sort().values[2:4].mean())])
    runner = Runner(model, policy, example)
    runner.times = StageTimes.none()  # it always compacts
    result = runner(**given)
    assert len(result.exit.unique()) == 2
    wanted = torch.where((result.exit == 0)[:, None], early, last)
    assert torch.allclose(result.logits, wanted, atol=1e-5)


class Between(nn.Module):
    """Samples lie between heads and windows: neither together nor in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tap, self.second = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = (keep > 0).reshape(-1, 2).repeat(2, 1).float()  # (2 · B · 2, 2)
        x = self.tap(self.weighed(torch.tanh(self.first(x)), mask))
        return self.fc(self.weighed(torch.tanh(self.second(x)), mask).mean(1))

    def weighed(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask.reshape(2, x.shape[0], 4).mean(0)[:, :, None]


@pytest.mark.parametrize("padded", [False, True])
def test_samples_folded_in_between_are_refused(padded: bool) -> None:
    keep = torch.ones(6, 4)
    if padded:
        keep[2, 1:] = 0
    example = {"x": torch.randn(6, 4, 6), "keep": keep}
    model = attach(Between().eval(), example, exits=["tap"])
    with pytest.raises(StageError, match="neither together nor in turn"):
        cut(model, example)


class Numbered(nn.Module):
    """Rows are numbered once; the numbers are read before and after the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tap, self.second = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        number = torch.arange(x.shape[0])
        x = torch.tanh(self.first(x))
        x = self.tap(x + x[number, last][:, None])
        x = torch.tanh(self.second(x))
        return self.fc(x[number, last])


def test_row_numbers_are_those_of_the_rows_that_are_left() -> None:
    torch.manual_seed(0)
    example = {"x": torch.randn(6, 5, 6), "last": torch.tensor([4, 0, 2, 1, 3, 4])}
    model = attach(Numbered().eval(), example, exits=["tap"])
    with torch.no_grad():
        early, last = model(**example).logits
    confident = early.softmax(-1).amax(-1)
    policy = Policy("confidence", [float(confident.sort().values[3:5].mean())])
    for engine in ("torch", "onnxruntime"):
        runner = Runner(model, policy, example, engine=engine)
        runner.times = StageTimes.none()
        result = runner(**example)
        wanted = torch.where((result.exit == 0)[:, None], early, last)
        assert torch.allclose(result.logits, wanted, atol=1e-5)


def test_names_that_differ_by_a_dot_are_not_mixed_up() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
            self.f_1, self.tap, self.fc = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.tap(torch.tanh(self.f_1(self.f(x))))))

    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = attach(Alike().eval(), x, exits=["tap"])
    runner = Runner(model, Policy("confidence", [2.0]), x)
    with torch.no_grad():
        assert torch.equal(runner(x).logits, model.backbone(x))


class Rescaled(nn.Sequential):
    """Does something of its own before its children."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 255 if x.max() > 2 else x)


def hooked(kind: str) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(12, 8), RowGate(), nn.Linear(8, 3))
    if kind == "before":
        net.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    else:
        net.register_forward_hook(lambda module, args, output: output * 2)
    return net


@pytest.mark.parametrize("kind", ["forward", "before", "behind"])
def test_a_sequential_model_that_does_more_than_its_children_is_not_cut_by_hand(kind: str) -> None:
    layers = nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    backbone = Rescaled(*layers) if kind == "forward" else hooked(kind)
    model = attach(backbone.eval(), torch.rand(4, 12), exits=["1"])
    with pytest.raises(StageError, match="torch.export refuses this model"):
        Runner(model, Policy.final(), torch.rand(4, 12))


class Twofold(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu(), -x


class Joined(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


def test_tuples_between_children_are_cut_by_hand_where_no_exit_is() -> None:
    torch.manual_seed(0)
    layers = Twofold(), Joined(), RowGate(), nn.Linear(12, 8), nn.Linear(8, 3)
    x = torch.rand(4, 12)
    model = attach(nn.Sequential(*layers).eval(), x, exits=["3"])
    with torch.no_grad():
        wanted = model.backbone(x)
    assert torch.equal(Runner(model, Policy("confidence", [2.0]), x)(x).logits, wanted)
    model = attach(nn.Sequential(*layers).eval(), x, exits=["0"])
    with pytest.raises(StageError, match="at children that return one tensor"):
        Runner(model, Policy("confidence", [2.0]), x)


class Attention(nn.Module):
    """Products of activations, written by letters."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.einsum("bqd,bkd->bqk", self.q(x), x).softmax(-1)
        return torch.einsum("bqk,bkd->bqd", weights, x)


def test_einsum_computes_nothing_where_nobody_is_left() -> None:
    """ONNX Runtime's kernel ends the process there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Attention(), nn.Flatten(), nn.Linear(40, 5))
    x = torch.randn(9, 5, 8)
    model = attach(net.eval(), x, exits=["0"])
    staged = cut(model, x)
    targets = [str(node.target) for stage in staged.stages for node in stage.module.graph.nodes]
    assert not [target for target in targets if "einsum" in target]
    with torch.no_grad():
        wanted = net(x)
    assert torch.equal(Runner(model, Policy("confidence", [2.0]), x)(x).logits, wanted)
    runner = Runner(model, Policy("confidence", [2.0]), x, engine="onnxruntime")
    torch.testing.assert_close(runner(x).logits, wanted, atol=1e-5, rtol=1e-5)
    assert runner.under(Policy("confidence", [0.0]))(x).exit.tolist() == [0] * 9


class Sorted(nn.Module):
    """Rows in the order of their lengths, and back again, by numbers made before the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tap, self.second = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        order = length.argsort()
        back = order.argsort()
        x = self.tap(self.first(x[order])[back])
        return self.fc(torch.tanh(self.second(x[order]))[back])


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_rows_that_are_addressed_by_number_behind_an_exit_are_refused(engine: str) -> None:
    torch.manual_seed(0)
    example = {"x": torch.randn(9, 6), "length": torch.arange(9, 0, -1)}
    model = attach(Sorted().eval(), example, exits=["tap"])
    with pytest.raises(StageError, match="addresses rows by numbers that were made before it"):
        Runner(model, Policy("confidence", [0.5]), example, engine=engine)
