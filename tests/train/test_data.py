from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from offramp.build.batch import Batch, fingerprints
from offramp.errors import DataError
from offramp.train.data import (
    Census,
    DataRandomness,
    EpochLoader,
    check_labels,
    derive_seed,
    distinct,
    preserved_randomness,
)
from offramp.train.loop import fit
from tests.train.tiny import Breaking, data_of, digests, loader_of, model_of


def order(loader: EpochLoader) -> list[int]:
    """Labels in the order they came; here each sample has its own."""
    found: list[int] = []
    for batch in loader:
        assert batch.labels is not None
        found += batch.labels.tolist()
    return found


def numbered(count: int = 20, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(
        TensorDataset(torch.zeros(count, 2), torch.arange(count)), batch_size=4, **options
    )


def epoch_loader(loader: Any, **options: Any) -> EpochLoader:
    return EpochLoader(loader, **({"seed": 0, "num_classes": 20} | options))


@given(parts=st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4))
def test_seeds_depend_on_their_parts_alone(parts: list[Any]) -> None:
    assert derive_seed(*parts) == derive_seed(*parts)
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) != derive_seed(*parts, 0)


def test_data_randomness_is_a_stream_of_its_own() -> None:
    torch.manual_seed(1)
    outside = [torch.rand(()).item() for _ in range(3)]
    torch.manual_seed(1)
    mixed, inside = [], []
    stream = DataRandomness(7)
    for _ in range(3):
        mixed.append(torch.rand(()).item())
        with stream:
            inside.append(torch.rand(()).item())
    assert mixed == outside
    generator = torch.Generator().manual_seed(7)
    assert inside == [torch.rand((), generator=generator).item() for _ in range(3)]


def test_random_states_are_preserved_whatever_happens() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = draw()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with pytest.raises(ZeroDivisionError), preserved_randomness():
        _ = draw()[0] / 0
    assert draw() == expected


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": True, "generator": torch.Generator()},
        {"sampler": RandomSampler(range(20), generator=torch.Generator())},
        {"sampler": DistributedSampler(range(20), num_replicas=2, rank=0)},  # type: ignore[arg-type]
    ],
    ids=["shuffle", "generator", "sampler", "distributed"],
)
def test_the_order_depends_on_seed_and_epoch_alone(options: dict[str, Any]) -> None:
    loader = epoch_loader(numbered(**options))
    first = order(loader)
    assert order(loader) == first
    loader.epoch = 1
    second = order(loader)
    assert second != first
    loader.epoch = 0
    assert order(loader) == first
    if "sampler" not in options or isinstance(options["sampler"], RandomSampler):
        assert order(epoch_loader(numbered(**options), seed=1)) != first


@given(skip=st.integers(0, 5))
def test_skipping_leaves_the_rest_of_the_epoch(skip: int) -> None:
    loader = epoch_loader(numbered(shuffle=True))
    whole = order(loader)
    loader.skip = skip
    assert len(loader) == 5 - skip
    assert order(loader) == whole[4 * skip :]


def test_a_loader_without_length_has_none() -> None:
    loader = epoch_loader(iter([]))
    assert loader.length is None
    with pytest.raises(TypeError, match="The training loader has no length"):
        len(loader)


def test_labels_come_out_as_int64() -> None:
    assert check_labels(torch.tensor([0, 1], dtype=torch.uint8), 2, "It").dtype == torch.int64
    for kind in (torch.uint16, torch.uint32, torch.uint64):
        labels = check_labels(torch.tensor([0, 1], dtype=kind), 2, "It")
        assert labels.dtype == torch.int64
        assert labels.tolist() == [0, 1]
    assert check_labels(torch.tensor([True, False]), 2, "It").tolist() == [1, 0]
    assert check_labels(torch.empty(0, dtype=torch.int64), 2, "It").shape == (0,)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (None, "It has no labels. Training needs"),
        (torch.zeros(2), "It has labels of type torch.float32. Expected integers: .* from 0 to 2"),
        (torch.zeros(2, dtype=torch.complex64), "labels of type torch.complex64"),
        (torch.tensor(1), r"labels of shape \(\)"),
        (torch.tensor([[1], [2]]), r"labels of shape \(2, 1\). .*squeeze\(1\)"),
        (torch.tensor([0, 3]), "It has label 3, out of range: the backbone has 3 classes"),
        (torch.tensor([-100, 2]), "It has label -100, out of range"),
        (torch.tensor([7, 2], dtype=torch.uint32), "It has label 7, out of range"),
    ],
)
def test_wrong_labels(labels: Tensor | None, text: str) -> None:
    with pytest.raises(DataError, match=text):
        check_labels(labels, 3, "It")


def test_census_counts_the_samples_of_the_first_epoch_alone() -> None:
    census = Census()
    loader = epoch_loader(loader_of(40), census=census)
    loader.skip = 3  # those that are skipped were trained on before
    list(loader)
    expected = distinct(fingerprints(Batch((data_of(40)[0],))))
    assert torch.equal(census.close(), expected)
    loader.epoch = 1
    loader.loader = loader_of(40, seed=2)
    list(loader)
    assert torch.equal(census.hashes, expected)
    assert Census().hashes.shape == (0,)


def test_sharing_is_counted_over_batches_and_once_per_sample() -> None:
    x, y = data_of(300)
    census = Census(fingerprints(Batch((x,))))
    for _ in range(2):
        census.add(Batch((x[:3],), {}, y[:3]))
    with pytest.raises(DataError, match="at least 4 of its 300 distinct samples were trained on"):
        census.add(Batch((x[3:4],), {}, y[3:4]))


def test_distinct_sorts_and_merges() -> None:
    a, b = torch.tensor([3, -1, 3]), torch.tensor([7, -1])
    assert distinct(a, b).tolist() == [-1, 3, 7]


class Claims:
    """A loader whose length is not the number of its batches."""

    def __init__(self, length: int, batches: int = 5, seed: int = 0) -> None:
        self.length, self.batches, self.seed = length, batches, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return islice(loader_of(80, seed=self.seed, shuffle=False), self.batches)


def trained(loader: Any, **settings: Any) -> tuple[Any, Any]:
    model = model_of()
    options = {"progress": False, "accelerator": "cpu", "epochs": 2} | settings
    return model, fit(model, loader, **options)


def test_fewer_batches_than_the_length_are_told_of() -> None:
    """The last step and the validation do not come."""
    text = "promised 6 batches by its length before epoch 1, but 5 came"
    with pytest.warns(UserWarning, match=text):
        _, history = trained(Claims(6), validation=loader_of(16, seed=1), epochs=1)
    assert history[0].val_loss == ()


def test_other_lengths_do_no_harm() -> None:
    """That of a training loader is then the size of an epoch; validation sees what there is."""
    model, history = trained(Claims(3), validation=Claims(9, batches=2, seed=1))
    _, expected = trained(Claims(3, batches=3), validation=loader_of(16, seed=1))
    assert len(model.training_fingerprints) == 24
    assert [row.train_loss for row in history] == [row.train_loss for row in expected]
    for row, wanted in zip(history, expected, strict=True):
        assert row.val_loss == pytest.approx(wanted.val_loss)


def test_the_length_is_of_a_whole_epoch_also_where_training_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(RuntimeError, match="stop"):
        trained(Breaking(Claims(5), 7, RuntimeError("stop")), **settings)
    model, _ = trained(Claims(5), **settings)
    assert digests(model) == digests(trained(Claims(5))[0])
    with pytest.raises(RuntimeError, match="stop"):
        trained(Breaking(Claims(6, 6), 8, RuntimeError("stop")), resume=False, **settings)
    with pytest.warns(UserWarning, match="promised 6 batches by its length before epoch 2, but 5"):
        trained(Claims(6), **settings)
