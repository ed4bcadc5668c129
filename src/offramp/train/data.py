"""Batches for training: reproducible order, checked labels, samples that can be recognised.

Data draw their randomness (shuffling, augmentation) from a stream of their own, seeded for every
epoch. So an epoch sees the same batches whether training was interrupted before it or not, and
whatever the model itself draws for dropout.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.build.batch import Batch, fingerprints, unpack
from offramp.errors import DataError

__all__ = [
    "Census",
    "DataRandomness",
    "EpochLoader",
    "check_labels",
    "derive_seed",
    "distinct",
    "no_batch",
    "preserved_generators",
    "preserved_randomness",
]

# Above this share of validation samples that are also training samples, validating is refused.
# Below, it is a few duplicates, which published data sets have, and is worth a warning.
SHARED_LIMIT = 0.01


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all ``parts``, and on nothing else."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def distinct(*hashes: Tensor) -> Tensor:
    """All different values of some ``(N,)`` int64 tensors, sorted."""
    return torch.from_numpy(np.unique(torch.cat(hashes).numpy()))


def no_batch(role: str) -> DataError:
    """The error for the ``role`` loader whose length is 0."""
    return DataError(
        f"The {role} loader yields no batch: its length is 0. Is the data set empty, or smaller "
        "than one batch with drop_last=True?"
    )


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the global generators of torch, numpy and Python as they were."""
    devices = range(torch.cuda.device_count()) if _cuda_in_use() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def preserved_generators(*loaders: Any) -> Iterator[None]:  # noqa: ANN401
    """Leave the generators that loaders bring along as they were."""
    found = {id(g): g for loader in loaders for g in map(_generator, _owners(loader)) if g}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


class DataRandomness:
    """A context in which torch's global generator is a stream of its own, starting from a seed.

    It can be entered many times: each time the stream goes on where it stopped, and outside of it
    the generator never notices. Swapping torch's state takes microseconds; numpy's takes a quarter
    of a millisecond, so numpy and Python are seeded once and not kept apart: data code draws from
    them, models do not.
    """

    def __init__(self, seed: int) -> None:
        self._outer = torch.get_rng_state()
        self._inner = torch.Generator().manual_seed(seed).get_state()
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def __enter__(self) -> None:
        self._outer = torch.get_rng_state()
        torch.set_rng_state(self._inner)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inner = torch.get_rng_state()
        torch.set_rng_state(self._outer)


class EpochLoader:
    """A loader whose every epoch is reproducible, and whose batches are understood and checked.

    The position is set from outside before each epoch; iterating does not change it.

    Attributes:
        loader: what the user gave: an iterable of batches that can be walked again and again.
        seed: of all epochs.
        num_classes: labels must lie below.
        role: ``"training"`` or ``"validation"``, for errors.
        epoch: number of the epoch over all phases, counted from 0.
        skip: batches that are fetched and dropped at the start of the epoch.
        census: counts the samples of epoch 0, if given.
        select: for inputs whose dimension 0 is not the batch: the function that takes rows.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        seed: int,
        num_classes: int,
        role: str = "training",
        census: Census | None = None,
        select: Callable[..., Any] | None = None,
    ) -> None:
        self.loader = loader
        self.seed = seed
        self.num_classes = num_classes
        self.role = role
        self.census = census
        self.select = select
        self.epoch = 0
        self.skip = 0
        if self.length == 0:
            raise no_batch(role)

    @property
    def length(self) -> int | None:
        """Batches of a whole epoch, or ``None`` where the loader cannot tell."""
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"The {self.role} loader has no length.")
        return max(self.length - self.skip, 0)

    def __iter__(self) -> Iterator[Batch]:
        promised = self.length  # as the Trainer asked for it: before samplers are told the epoch
        seed = derive_seed(self.seed, self.role, self.epoch)
        stream = DataRandomness(seed)
        _seed_generators(self.loader, seed, self.epoch)
        with stream:
            batches = iter(self.loader)
        index = 0
        while True:
            with stream:
                try:
                    batch = self._read(next(batches), index)
                except StopIteration:
                    break
            if self.census is not None and self.epoch == 0:
                self.census.add(batch)
            if index >= self.skip:
                yield batch
            index += 1
        if index == 0:
            raise DataError(
                f"The {self.role} loader yields no batch in epoch {self.epoch + 1}. "
                "A generator can be walked only once: give a DataLoader or a list of batches."
            )
        # The Trainer waits for the rest: for the last step of an epoch, and its validation.
        if self.role == "training" and promised is not None and index < promised:
            warnings.warn(
                f"The training loader promised {promised} batches by its length before epoch "
                f"{self.epoch + 1}, but {index} came. So that epoch is not validated, and batches "
                "that were waiting to be accumulated are left out. Lengths are guesses where an "
                "IterableDataset has one, or a sampler makes other batches in each epoch: leave "
                "__len__ out there.",
                stacklevel=2,
            )

    def _read(self, item: Any, index: int) -> Batch:  # noqa: ANN401
        batch = unpack(item, select=self.select)
        labels = check_labels(
            batch.labels, self.num_classes, f"Batch {index} of the {self.role} loader"
        )
        return replace(batch, labels=labels)


class Census:
    """Who was in the training data: hashes of its samples, and which classes they had.

    Args:
        validation: ``(V,)`` hashes of samples that must not be trained on, if there are any.
    """

    def __init__(self, validation: Tensor | None = None) -> None:
        self._validation = np.unique(validation.numpy()) if validation is not None else np.empty(0)
        self._shared: set[int] = set()
        self._hashes: list[Tensor] = []
        self._classes: set[int] = set()

    def add(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            DataError: too many samples of the validation data came by.
        """
        hashes = fingerprints(batch)
        self._hashes.append(hashes)
        if batch.labels is not None and len(self._classes) < 2:
            self._classes.update(set(batch.labels.tolist()))
        self.compare(hashes)

    def compare(self, hashes: Tensor) -> None:
        """Look for validation samples among the ``(N,)`` hashes of samples that were trained on.

        Raises:
            DataError: there are too many.
        """
        if not len(self._validation):
            return
        self._shared.update(np.intersect1d(hashes.numpy(), self._validation).tolist())
        if len(self._shared) > SHARED_LIMIT * len(self._validation):
            raise DataError(
                f"The validation loader shares samples with the training loader: at least "
                f"{len(self._shared)} of its {len(self._validation)} distinct samples were trained "
                "on. Split the data before making loaders, and leave out duplicates."
            )

    def close(self) -> Tensor:
        """Warn about what looks wrong, and return :attr:`hashes`."""
        if len(self._classes) == 1:
            warnings.warn(
                f"All labels of the training loader are {next(iter(self._classes))}: with one "
                "class there is nothing to learn. Is the data set sorted, or a subset of one "
                "class?",
                stacklevel=2,
            )
        if self._shared:
            warnings.warn(
                f"{len(self._shared)} of the {len(self._validation)} validation samples are "
                "also in the training data.",
                stacklevel=2,
            )
        return self.hashes

    @property
    def hashes(self) -> Tensor:
        """Distinct hashes of all samples so far, sorted: ``(N,)`` int64."""
        if not self._hashes:
            return torch.empty(0, dtype=torch.int64)
        return distinct(*self._hashes)


def check_labels(labels: Tensor | None, num_classes: int, whose: str) -> Tensor:
    """The labels as ``(B,)`` int64.

    Raises:
        DataError: there are none, they are not integers, not one-dimensional, or out of range.
    """
    if labels is None:
        raise DataError(
            f"{whose} has no labels. Training needs (input, label) pairs, or mappings with the key "
            "'labels' or 'label'."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"{whose} has labels of type {labels.dtype}. Expected integers: class indices from 0 "
            f"to {num_classes - 1}. Convert them with labels.long(), or one-hot rows with "
            "labels.argmax(1)."
        )
    if labels.dim() != 1:
        raise DataError(
            f"{whose} has labels of shape {tuple(labels.shape)}. Expected (B,): one class index "
            "per sample. Use labels.squeeze(1) for (B, 1), labels.argmax(1) for one-hot rows."
        )
    labels = labels.long()  # first: unsigned types have no minimum
    if labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise DataError(
                f"{whose} has label {low if low < 0 else high}, out of range: the backbone has "
                f"{num_classes} classes, so labels go from 0 to {num_classes - 1}."
            )
    return labels


def _seed_generators(loader: Any, seed: int, epoch: int) -> None:  # noqa: ANN401
    """Generators and epoch counters that the loader and its samplers bring along."""
    for owner in _owners(loader):
        generator = _generator(owner)
        if generator is not None:
            generator.manual_seed(seed)
        set_epoch = getattr(owner, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _owners(loader: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """The loader and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None)
    return loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)


def _generator(owner: Any) -> torch.Generator | None:  # noqa: ANN401
    found = getattr(owner, "generator", None)
    return found if isinstance(found, torch.Generator) else None
