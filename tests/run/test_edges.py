"""What plausible models and programs do at the edges of the runtime."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp import Policy, Runner, attach, export, load
from offramp.errors import DataError, EqualityError, StageError
from offramp.run import engines, onnx, proof
from offramp.run.graph import cut, shared_by_rows
from tests.run.conftest import case


class Placed(nn.Module):
    """Something made of the input by a function, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 8), nn.Linear(8, 4)

    def prepared(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.prepared(x))))


class Writing(Placed):
    def prepared(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 0.25
        return x


class Logarithm(Placed):
    def prepared(self, x: Tensor) -> Tensor:
        return torch.log(x + 1e-6)


class Category(Placed):
    """A table whose last column is a category, as a number."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = nn.Embedding(5, width)

    def prepared(self, x: Tensor) -> Tensor:
        return x + self.table(x[:, -1].long())


def table(rows: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 6, generator=generator)
    x[:, -1] = torch.randint(5, (rows,), generator=generator).float()
    return x


@pytest.mark.parametrize("kind", [Writing, Logarithm, Category])
def test_what_a_model_does_to_its_input_is_exported(kind: type[Placed], tmp_path: Path) -> None:
    """It may write there, and take only what is positive, or whole."""
    torch.manual_seed(0)
    network = kind(6).eval()
    model = attach(network, table(), exits=["a"])
    path = export(model, Policy("confidence", [0.5]), table(), tmp_path / "a", exits="all")
    runner = load(path)
    with torch.no_grad():
        wanted = network(table().clone())
    found = runner.under(Policy("confidence", [2.0]))(table())
    torch.testing.assert_close(found.logits, wanted, atol=1e-4, rtol=1e-4)


def test_rows_of_a_proof_are_of_what_the_example_holds() -> None:
    source = table()
    made = proof.variations([source], 200)[0]
    assert bool((made >= source.amin(0)).all())
    assert bool((made <= source.amax(0)).all())
    assert set(made[:, -1].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert len(made.unique(dim=0)) == 200


def test_all_parts_of_a_batch_come_as_late_as_the_last() -> None:
    one = case("mlp")
    runner = Runner(one.model, Policy("confidence", [2.0, 2.0]), one.example)
    runner.max_batch = 2
    first, calls = runner._calls[0], list(runner._calls)

    def slow(values: list[Tensor]) -> list[Tensor]:
        time.sleep(0.02)
        return list(first(values))

    runner._calls = [slow, *calls[1:]]
    x = one.example.repeat(2, 1)
    runner(x, deadline_ms=50.0)  # five parts, of which the first would be in time
    assert runner.stats.samples == len(x)
    assert runner.stats.missed == len(x)


@pytest.mark.parametrize("deadline", [float("nan"), "soon", [5.0]])
def test_a_deadline_is_a_number(deadline: object) -> None:
    one = case("mlp")
    runner = Runner(one.model, Policy("confidence", [2.0, 2.0]), one.example)
    with pytest.raises(DataError, match="deadline_ms is a number of milliseconds"):
        runner(one.example, deadline_ms=deadline)  # type: ignore[arg-type]
    for number in (np.float32(1e4), np.int64(10_000), torch.tensor(1e4)):
        runner(one.example, deadline_ms=number)  # type: ignore[arg-type]
    assert runner.stats.missed == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of threads: the children read, and end
def test_processes_that_were_forked_read_what_was_put_aside() -> None:
    """They share the place at which a file is read."""
    models = [bytes([k]) * (200_000 + k) for k in range(4)]
    read = engines._put_aside(models)
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            os._exit(int(any(read() != models for _ in range(200))))
        children.append(child)
    own = all(read() == models for _ in range(200))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert own


def test_weights_beyond_a_file_of_onnx_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case("mlp")
    monkeypatch.setattr(onnx, "MOST_BYTES", 100)
    policy = Policy("confidence", [0.5, 0.5])
    with pytest.raises(StageError, match="a file of ONNX holds 0.0 GB. Use engine='torch'"):
        Runner(one.model, policy, one.example, engine="onnxruntime")
    assert Runner(one.model, policy, one.example, engine="auto").engine.name == "torch"


def test_an_artifact_knows_the_entries_of_embeddings(tmp_path: Path) -> None:
    one = case("encoder")
    x = one.example
    assert isinstance(x, dict)
    runner = load(export(one.model, Policy("confidence", [0.5, 0.5]), x, tmp_path / "a"))
    last = {**x, "input_ids": torch.full_like(x["input_ids"], 49)}
    assert len(runner(last).exit) == len(last["input_ids"])
    for wrong in (-1, 50):
        bad = {name: value[:1].clone() for name, value in x.items()}
        bad["input_ids"][0, 0] = wrong
        with pytest.raises(DataError, match=r"'input_ids' has .* the entries 0\.\.49"):
            runner(bad)


class Mean(nn.Module):
    """One number for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class Mixing(Placed):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mean = Mean()

    def prepared(self, x: Tensor) -> Tensor:
        return x - self.mean(x)


def test_a_module_that_returns_one_number_hides_no_mixing() -> None:
    torch.manual_seed(0)
    model = attach(Mixing(6), table(6), exits=["a"])
    with pytest.raises(EqualityError, match="the first module that differs is 'a'"):
        Runner(model, Policy("confidence", [0.5]), table(6))


class Reshaped(nn.Module):
    """Tokens that reach the embedding in another shape and type, and numbers that reach none."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        found = self.table(ids.view(-1, 4).long().clone()).mean(1) / lengths
        return self.b(torch.relu(self.a(found)))


def test_entries_are_known_behind_other_shapes() -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (6, 2, 2), dtype=torch.int32)
    lengths = torch.randint(1, 9, (6, 1))
    model = attach(Reshaped(), (ids, lengths), exits=["a"])
    runner = Runner(model, Policy("confidence", [0.5]), (ids, lengths), engine="onnxruntime")
    assert runner.call.entries == {0: 7}
    assert len(runner(ids, lengths + 100).exit) == 6
    ids[2, 1, 0] = -1
    with pytest.raises(DataError, match="from -1 to"):
        runner(ids, lengths)


class Asked(Reshaped):
    """Whether there is something at all: a type with room for two values."""

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(ids.bool().int(), lengths)


def test_conversions_to_narrow_types_say_nothing_of_entries() -> None:
    torch.manual_seed(0)
    example = torch.randint(-9, 99, (6, 2, 2)), torch.ones(6, 1)
    model = attach(Asked(), example, exits=["a"])
    runner = Runner(model, Policy("confidence", [0.5]), example, engine="onnxruntime")
    assert runner.call.entries == {}
    assert len(runner(*example).exit) == 6


def test_values_that_are_not_finite_spoil_no_column_of_a_proof() -> None:
    source = torch.rand(8, 3)
    source[0, 0], source[1, 1], source[:, 2] = torch.nan, torch.inf, torch.nan
    made = proof.variations([source], 400)[0]
    for column, bad in ((0, made[:, 0].isnan()), (1, made[:, 1].isinf())):
        assert 0 < int(bad.sum()) < 200
        known = source[:, column][source[:, column].isfinite()]
        assert float(made[~bad, column].max()) <= float(known.max())
    assert bool(made[:, 2].isnan().all())


class Sometimes(Placed):
    """Divides by the mean of the whole batch where that is large, which it is in no example."""

    def prepared(self, x: Tensor) -> Tensor:
        return torch.where(x.mean() > 5, x / x.max(0).values, x)


def test_rows_that_are_mixed_on_other_inputs_only_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = attach(Sometimes(6), table(6), exits=["a"])
    told = "aten.mean.default in .* makes one value of all rows of a batch"
    with pytest.warns(UserWarning, match=told):
        Runner(model, Policy("confidence", [0.5]), table(6))
    with pytest.warns(UserWarning, match=told):
        export(model, Policy("confidence", [0.5]), table(6), tmp_path / "a")


class Alike(Placed):
    """What looks as if it were made of all rows, and takes nothing but their type and number."""

    def prepared(self, x: Tensor) -> Tensor:
        number = torch.arange(x.shape[0]).float().mean() * 0
        of_a_row = x[0].new_ones(6) + torch.zeros_like(x[:1, 0]) + torch.ones_like(x[0]).cumsum(0)
        return (
            x + x.new_zeros(6) + torch.ones(6).type_as(x) + torch.ones(6).to(x) + number + of_a_row
        )


def test_types_and_numbers_of_rows_mix_nothing() -> None:
    torch.manual_seed(0)
    model = attach(Alike(6), table(6), exits=["a"])
    assert shared_by_rows(cut(model, table(6))) == ""


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.EmbeddingBag(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.table(ids))))


def test_entries_of_bags_are_known() -> None:
    torch.manual_seed(0)
    ids = torch.randint(7, (6, 4))
    model = attach(Bag(), ids, exits=["a"])
    runner = Runner(model, Policy("confidence", [0.5]), ids)
    assert runner.call.entries == {0: 7}
    ids[2, 1] = -1
    with pytest.raises(DataError, match="from -1 to"):
        runner(ids)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.b = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.layer(self.a(x)).mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_kernels_may_round_as_their_type_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 6, 16).to(dtype)
    model = attach(Encoder().eval().to(dtype), x, exits=["a"])
    with torch.no_grad():
        wanted = model(x)
    found = Runner(model, Policy("confidence", [2.0]), x)(x).logits
    assert float((found - wanted.final).abs().max()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.float16, 2**-8)]
)
def test_engines_may_differ_by_roundings_of_the_type(dtype: torch.dtype, allowed: float) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.PReLU()).to(dtype)
    network[1].to(torch.bfloat16)  # one coarse number beside the others
    assert proof.between_engines(network) == allowed
    assert proof.between_engines(nn.ReLU()) == 1e-4
