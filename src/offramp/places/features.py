"""One pass of the frozen backbone: what heads need of some rows, and other rows set aside."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.build.asking import named_inputs, wanted_inputs
from offramp.build.batch import Batch, fingerprints
from offramp.build.outputs import find_logits
from offramp.build.watch import as_found
from offramp.errors import DataError
from offramp.places.dense import Dense
from offramp.places.progress import shown
from offramp.train.data import EpochLoader

__all__ = ["Features", "HeldOut", "gather", "held_out_rows", "record_held_out", "spread"]

HELD_SHARE = 0.4  # of the rows, where no loader of held-out samples is given
MEMORY = 2 << 30  # bytes of condensed features; fewer rows are taken where more were needed


@dataclass
class Features:
    """What the heads of all candidates read, for the rows that they are trained on.

    Attributes:
        condensed: tensors (N, ...); candidates that condense alike share one.
        index: for each candidate, which of them is its.
        labels: (N,) int64.
        marks: (N,) int64 fingerprints of the rows.
        seconds: that the backbone ran, per row.
        population: how many samples one pass of the whole loader has, as far as it can tell.
    """

    condensed: list[Tensor]
    index: list[int]
    labels: Tensor
    marks: Tensor
    seconds: float
    population: int


@dataclass
class HeldOut:
    """What every candidate says on rows that no head was trained on.

    Attributes:
        logits: (K + 1, N, C) float32 on the CPU: the K candidates, and the backbone.
        labels: (N,) int64.
    """

    logits: Tensor
    labels: Tensor


@dataclass
class _Pile:
    """Tensors of some batches, to be joined."""

    index: list[int] = field(default_factory=list)
    parts: list[list[Tensor]] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    marks: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the backbone, for each batch

    def add(self, dense: Dense, batch: Batch) -> None:
        started = time.perf_counter()
        features, _, named = _run(dense, batch)
        if any(feature.device.type not in ("cpu", "meta") for feature in features):
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - started)
        condensed = [
            _condense(dense, k, features[candidate.place], named)
            for k, candidate in enumerate(dense.candidates)
        ]
        if not self.parts:
            self.index = _shared(dense, condensed)
            self.parts = [[] for _ in range(max(self.index) + 1)]
        for k, part in enumerate(self.parts):
            part.append(condensed[self.index.index(k)])
        self.labels.append(_labels(batch))
        self.marks.append(fingerprints(batch))

    def bytes_per_row(self) -> float:
        rows = sum(map(len, self.labels))
        return sum(t.nbytes for part in self.parts for t in part) / max(rows, 1)

    def features(self, population: int) -> Features:
        try:
            condensed = [torch.cat(part) for part in self.parts]
        except RuntimeError as error:
            raise DataError(
                f"Features of different batches cannot be joined: {error}. Their sizes differ from "
                "batch to batch; give a loader whose samples are all of one size."
            ) from error
        labels, marks = torch.cat(self.labels), torch.cat(self.marks)
        skipped = int(len(self.labels) > 1)  # the first batch warms up
        seconds = sum(self.seconds[skipped:]) / max(1, sum(map(len, self.labels[skipped:])))
        return Features(condensed, self.index, labels, marks, seconds, population)


def gather(
    dense: Dense,
    loader: Iterable[Any],
    *,
    samples: int,
    divide: bool,
    seed: int,
    progress: bool,
) -> tuple[Features, list[Batch]]:
    """Walk a loader once; run the backbone on some of its rows, and set others aside.

    Where the loader has more than ``samples`` rows, batches are taken evenly spread over it.

    Args:
        dense: the backbone and its candidates.
        loader: yields inputs and labels.
        samples: how many rows to take at most, those set aside included.
        divide: whether to set rows aside.
        seed: of the loader's order, and of which rows are set aside.
        progress: show a bar on a terminal.

    Returns:
        The features of the rows to train on, and the inputs of those that were set aside.

    Raises:
        DataError: labels are missing or wrong, there is no batch, or samples are of many sizes.
    """
    read = EpochLoader(loader, seed=seed, num_classes=dense.model.num_classes, role="search")
    generator = torch.Generator().manual_seed(seed)
    pile, aside = _Pile(), list[Batch]()
    share = HELD_SHARE if divide else 0.0
    wanted, taken, set_aside, seen, population, stride = samples, 0, 0, 0, 0, 1.0
    for number, batch in enumerate(shown(read, "features", read.length, progress)):
        if taken >= wanted and read.length is not None:
            break
        seen += batch.size  # to the end, where the loader cannot tell how long it is
        if taken >= wanted or int((number + 1) / stride) == int(number / stride):
            continue
        rows = torch.randperm(batch.size, generator=generator)[: wanted - taken]
        taken += len(rows)
        held = round(share * taken) - set_aside  # in sum, also where batches are small
        set_aside += held
        if held:
            aside.append(batch.rows(rows[:held].sort().values))
        if len(rows) > held:
            pile.add(dense, batch.rows(rows[held:].sort().values))
        if number == 0:
            fit = MEMORY / max(pile.bytes_per_row(), 1.0) / (1 - share)
            wanted = max(min(samples, int(fit)), taken)
            population = _population(loader, read.length, batch.size)
            stride = max(1.0, population / wanted)
    return pile.features(max(seen, population)), aside


def _population(loader: Iterable[Any], batches: int | None, size: int) -> int:
    """How many samples a loader has, as far as it can tell without being walked."""
    samples = (batches or 0) * size
    data = getattr(loader, "dataset", None)
    return min(samples, len(data)) if isinstance(data, Sized) else samples


def held_out_rows(batches: Iterable[Batch], marks: Tensor) -> Iterator[Batch]:
    """The rows that are not among those with the fingerprints ``marks`` (N,), batch by batch.

    Each comes once: copies of it would be in both of the halves that are made of them.
    """
    for batch in batches:
        own = fingerprints(batch)
        fresh = (~torch.isin(own, marks) & _first_of_its_kind(own)).nonzero().flatten()
        marks = torch.cat([marks, own])
        if len(fresh) == batch.size:
            yield batch
        elif len(fresh):
            yield batch.rows(fresh)


def _first_of_its_kind(marks: Tensor) -> Tensor:
    """(N,) bool: no earlier one is the same."""
    found = torch.zeros(len(marks), dtype=torch.bool)
    found[torch.from_numpy(np.unique(marks.numpy(), return_index=True)[1])] = True
    return found


def spread(loader: EpochLoader, most: int, seed: int) -> Iterator[Batch]:
    """Batches of about ``most`` rows, drawn from all of a loader that can tell how long it is.

    The first rows of one that is sorted would be those of a few classes.
    """
    generator = torch.Generator().manual_seed(seed)
    population, seen, taken = 0, 0, 0
    for batch in loader:
        population = population or _population(loader.loader, loader.length, batch.size)
        seen += batch.size
        share = min(1.0, most / population) if population else 1.0
        wanted = min(batch.size, round(seen * share) - taken)
        taken += wanted
        rows = torch.randperm(batch.size, generator=generator)[:wanted].sort().values
        if wanted:
            yield batch if wanted == batch.size else batch.rows(rows)


def record_held_out(dense: Dense, batches: Iterable[Batch], most: int, progress: bool) -> HeldOut:
    """The logits of every candidate, and the backbone's, on ``most`` rows that were set aside.

    Raises:
        DataError: there is none.
    """
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in shown(_up_to(batches, most), "recording", None, progress):
        features, final, named = _run(dense, batch)
        with torch.no_grad():
            said = [
                candidate.head.eval().classify(
                    _condense(dense, k, features[candidate.place], named)
                )
                for k, candidate in enumerate(dense.candidates)
            ]
        logits.append(torch.stack([z.float().cpu() for z in (*said, final)]))
        labels.append(_labels(batch).cpu())
    if not logits:
        raise DataError(
            "No row is left to judge exits on: all held-out samples are among those that the heads "
            "were trained on. Give a loader of other samples: held_out=."
        )
    return HeldOut(torch.cat(logits, dim=1), torch.cat(labels))


def _up_to(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    for batch in batches:
        if batch.size >= most:
            yield batch if batch.size == most else batch.rows(torch.arange(most))
            return
        most -= batch.size
        yield batch


def _run(dense: Dense, batch: Batch) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Features, the backbone's logits, and the inputs by name; the backbone is left as found."""
    model = dense.model
    parameter = next(model.backbone.parameters(), None)
    if parameter is not None:
        batch = batch.to(parameter.device)
    with as_found(model.backbone):
        features, output = model.features(*batch.args, **batch.kwargs)
        named = named_inputs(model.backbone, batch.args, batch.kwargs)
    return features, find_logits(output, model._logits), named


def _condense(dense: Dense, k: int, feature: Tensor, named: dict[str, Tensor]) -> Tensor:
    head = dense.candidates[k].head
    with torch.no_grad():
        return head.condense(feature, **wanted_inputs(head, feature, named)).float()


def _shared(dense: Dense, condensed: list[Tensor]) -> list[int]:
    """For each candidate, the number of its tensor; equal ones at a place are one."""
    index: list[int] = []
    for k, tensor in enumerate(condensed):
        same = [
            index[j]
            for j in range(k)
            if dense.candidates[j].place == dense.candidates[k].place
            and condensed[j].shape == tensor.shape
            and torch.equal(condensed[j], tensor)
        ]
        index.append(same[0] if same else max(index, default=-1) + 1)
    return index


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:  # the loader has checked; this is for readers and type checkers
        raise DataError("A batch has no labels.")
    return batch.labels
