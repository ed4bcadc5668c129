"""Where the exits of a trained network go: :func:`plan`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offramp.build.batch import Batch
from offramp.build.model import attach
from offramp.build.outputs import LogitsFunction
from offramp.decide.criteria import Criterion
from offramp.decide.criteria import criterion as named
from offramp.errors import DataError, PolicyError, unknown_name
from offramp.places.checks import check_devices, check_rows, check_settings, check_trained
from offramp.places.dense import Dense, attach_densely
from offramp.places.features import (
    Features,
    HeldOut,
    gather,
    held_out_rows,
    record_held_out,
    spread,
)
from offramp.places.judging import Terms, judged
from offramp.places.learning import learn
from offramp.places.result import PlacePlan, PlannedExit, SearchCost
from offramp.train.data import EpochLoader, preserved_generators, preserved_randomness

__all__ = ["METHODS", "plan"]

METHODS = ("percentiles", "search")
DROPS = (0.0, 0.005, 0.01, 0.02)
TRAINING_EPOCHS = 10  # of the backbone, which the search has to be cheaper than
BACKWARD = 3  # forward and backward take three times the forward pass


def plan(
    backbone: nn.Module,
    example: Any,  # noqa: ANN401
    loader: Iterable[Any] | None = None,
    *,
    method: str = "search",
    exits: int | None = None,
    heads: str | Sequence[str] | None = None,
    held_out: Iterable[Any] | None = None,
    drops: Sequence[float] = DROPS,
    worth: float = 0.01,
    criterion: str | Criterion = "confidence",
    samples: int = 8_000,
    epochs: int = 20,
    logits: LogitsFunction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PlacePlan:
    """Where the exits of a trained backbone pay, and how large their heads should be.

    ``"percentiles"`` places them evenly over the cost and looks at no data. ``"search"`` puts heads
    of several sizes at every place that the automatic placement knows, trains them on the frozen
    backbone, whose features are computed once, and judges subsets of them on rows that no head was
    trained on: by the mean, over tolerated drops of accuracy, of the least cost that keeps it, all
    heads that run counted. It may find that no exit pays.

    Three parts of the data share no sample: one for the heads, one to choose exits and thresholds
    on, and one that all figures but ``brings`` come from. Where the backbone was trained on the
    loader, it is righter there than elsewhere, which speaks against leaving early: give
    ``held_out``.

    Args:
        backbone: a trained classifier. It is not changed.
        example: as for :func:`offramp.attach`.
        loader: yields inputs and labels; for a search.
        method: ``"search"`` or ``"percentiles"``.
        exits: with percentiles, how many (3); in a search, how many at most.
        heads: name or names of the heads to try at each place, such as ``("pool", "conv:32")``; by
            default two or three sizes of the kind that suits the feature.
        held_out: yields inputs and labels that neither backbone nor heads were trained on; two
            fifths of the rows are set aside otherwise.
        drops: tolerated drops of accuracy, as shares.
        worth: what each exit has to bring, as a share of the backbone's cost.
        criterion: a name or an instance of one without state.
        samples: rows of each loader that the backbone runs on at most.
        epochs: passes over the kept features, to train the heads.
        logits: as for :func:`offramp.attach`.
        seed: of the division of rows, and of the heads.
        progress: show bars on a terminal.

    Raises:
        PlaceError: the backbone is no module, or has no fit place.
        HeadError: an unknown head, or none that suits some place.
        DataError: rows are too few, or of one class, or not labelled; the backbone is no better
            than guessing; it and the example lie on different devices; settings out of range.
        PolicyError: an unknown criterion, or one with state.
    """
    if method not in METHODS:
        raise DataError(unknown_name("method", method, METHODS))
    check_settings(exits, drops, worth, samples, epochs)
    check_devices(backbone, example)
    if method == "percentiles":
        if heads is not None:
            raise DataError(
                "heads= names what a search tries; method='percentiles' compares nothing. Leave "
                "it out here, and give attach(..., heads=...) the kind of head."
            )
        return _percentiles(backbone, example, exits or 3, logits)
    if loader is None:
        raise DataError(
            "A search needs labelled samples: plan(backbone, example, loader). Without any, "
            "method='percentiles' places exits by cost alone."
        )
    rule = named(criterion)
    if rule.stateful:
        raise PolicyError(
            f"Exits cannot be chosen under {rule.name!r}, whose scores change with the exits "
            "before. Search under 'confidence', and calibrate the planned exits under it."
        )
    terms = Terms(tuple(drops), worth, exits, rule, seed)
    started = time.perf_counter()
    with (
        preserved_randomness(),
        preserved_generators(loader, held_out),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        return _search(
            attach_densely(backbone, example, heads, logits),
            loader,
            held_out,
            terms,
            samples=samples,
            epochs=epochs,
            progress=progress,
            started=started,
        )


def _search(
    dense: Dense,
    loader: Iterable[Any],
    held_out: Iterable[Any] | None,
    terms: Terms,
    *,
    samples: int,
    epochs: int,
    progress: bool,
    started: float,
) -> PlacePlan:
    """One pass of the backbone, heads that learn, subsets that are judged."""
    seed, divide = terms.seed, held_out is None
    try:
        features, aside = gather(
            dense, loader, samples=samples, divide=divide, seed=seed, progress=progress
        )
        check_rows(features.labels, len(features.labels) + sum(batch.size for batch in aside))
        learn(dense, features, epochs, seed, progress)
        others: Iterable[Batch] = aside
        if held_out is not None:
            classes = dense.model.num_classes
            read = EpochLoader(held_out, seed=seed, num_classes=classes, role="held-out")
            others = spread(read, samples, seed)
        fresh = held_out_rows(others, features.marks)
        held = record_held_out(dense, fresh, samples, progress)
    finally:
        dense.model.detach()
    check_trained(held)
    found = judged(dense, held, terms)
    cost = _cost(dense, features, held, epochs, time.perf_counter() - started)
    return replace(found, samples=(len(features.labels), *found.samples[1:]), cost=cost)


def _percentiles(
    backbone: nn.Module,
    example: Any,  # noqa: ANN401
    exits: int,
    logits: LogitsFunction | None,
) -> PlacePlan:
    """Evenly over the cost, with automatic heads."""
    model = attach(backbone, example, exits=exits, logits=logits)
    model.detach()
    full = model.costs.full
    spent = torch.tensor(model.costs.stages).cumsum(0) / full
    planned = [
        PlannedExit(place, "auto", float(at), head / full)
        for place, at, head in zip(model.places, spent, model.costs.heads, strict=False)
    ]
    text = (
        f"{exits} exits evenly over the cost. No data was looked at: whether they pay is not said."
    )
    return PlacePlan("percentiles", tuple(planned), text)


def _cost(
    dense: Dense, features: Features, held: HeldOut, epochs: int, seconds: float
) -> SearchCost:
    """What the search took, and what training the backbone would."""
    full, learned, recorded = dense.model.costs.full, len(features.labels), len(held.labels)
    macs = (learned + recorded) * full
    macs += (BACKWARD * epochs * learned + recorded) * dense.head_macs
    passes = BACKWARD * TRAINING_EPOCHS * features.population
    return SearchCost(macs, seconds, passes * full, passes * features.seconds)
