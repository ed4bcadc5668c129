"""What a search for places found, and what it rests on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

__all__ = ["SCHEMA", "Operating", "PlacePlan", "PlannedExit", "SearchCost"]

SCHEMA = 1


@dataclass(frozen=True)
class PlannedExit:
    """One exit of a plan. Costs are shares of the backbone's.

    Attributes:
        place: as :func:`offramp.attach` takes it.
        head: name of the head.
        fraction: what of the backbone is spent when the exit is reached.
        head_share: what the head costs.
        brings: by how much the mean cost at equal accuracy rises without it, on the samples that
            the exits were chosen on; ``None`` where nothing was measured.
        brings_fresh: the same on samples that no choice was made on.
    """

    place: str
    head: str
    fraction: float
    head_share: float
    brings: float | None = None
    brings_fresh: float | None = None


@dataclass(frozen=True)
class Operating:
    """What the planned exits do, under one threshold for one tolerated drop, on fresh samples.

    Attributes:
        drop: of accuracy that was tolerated where the thresholds were chosen.
        thresholds: the same for each exit, for the heads that the search trained. Calibrate those
            of a model that you train; thresholds of their own may do better.
        cost_ratio: mean cost, heads included, as a share of the backbone's.
        accuracy: share of the samples answered right.
        shares: of the samples that leave at each exit, the backbone's own output last.
    """

    drop: float
    thresholds: tuple[float, ...]
    cost_ratio: float
    accuracy: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class SearchCost:
    """What the search took, beside training the backbone once.

    Attributes:
        macs: multiply-accumulates of the search: the backbone's passes, and heads forward and
            backward.
        seconds: that it took here.
        training_macs: of 10 epochs of the backbone on the same loader, at three times a pass.
        training_seconds: estimated from how long the search's passes of the backbone took.
    """

    macs: float
    seconds: float
    training_macs: float
    training_seconds: float

    @property
    def below_training(self) -> bool:
        """Whether the search was cheaper, in both."""
        return self.macs < self.training_macs and self.seconds < self.training_seconds


@dataclass(frozen=True)
class PlacePlan:
    """Where exits go, and of which size. Made by :func:`offramp.plan`; prints as a table.

    ::

        plan = offramp.plan(backbone, example, loader)
        model = offramp.attach(backbone, example, exits=plan.exits, heads=plan.heads)

    Attributes:
        method: ``"search"`` or ``"percentiles"``.
        planned: the exits in order of execution; none where no exit pays.
        operating: what they do at each tolerated drop of accuracy.
        value: mean cost over the tolerated drops on the samples that the exits were chosen on.
        value_fresh: the same on fresh samples.
        without: on fresh samples, that of no exit: of answering some samples by guessing.
        worth: what an exit had to bring.
        full_accuracy: of the backbone on the fresh samples.
        samples: how many rows the heads were trained on, exits were chosen on, and fresh ones.
        candidates: how many heads at how many places.
        tried: how many subsets were looked at.
        exact: whether these were all there are.
        cost: of the search.
        verdict: what comes of it, in words.
        trained: the planned heads as the search trained them, in place of ``heads``; with
            ``operating``'s thresholds they need no more training.
    """

    method: str
    planned: tuple[PlannedExit, ...]
    verdict: str
    operating: tuple[Operating, ...] = ()
    value: float | None = None
    value_fresh: float | None = None
    without: float | None = None
    worth: float | None = None
    full_accuracy: float | None = None
    samples: tuple[int, int, int] = (0, 0, 0)
    candidates: tuple[int, int] = (0, 0)
    tried: int = 0
    exact: bool = True
    cost: SearchCost | None = None
    trained: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def exits(self) -> tuple[str, ...]:
        """Their places, for ``attach(..., exits=plan.exits)``; empty where no exit pays."""
        return tuple(exit.place for exit in self.planned)

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of their heads, for ``attach(..., heads=plan.heads)``."""
        return tuple(exit.head for exit in self.planned)

    def to_json(self) -> dict[str, Any]:
        """All of it but the trained heads, as JSON can hold it."""
        plain = {
            "schema": SCHEMA,
            "kind": "places",
            "exits": list(self.exits),
            "heads": list(self.heads),
            **asdict(replace(self, trained=())),  # which would be copied, to be left out
        }
        del plain["trained"]
        if self.cost is not None:
            plain["cost"]["below_training"] = self.cost.below_training
        for point in plain["operating"]:  # as in a policy's JSON, which knows no infinity
            point["thresholds"] = [t if math.isfinite(t) else str(t) for t in point["thresholds"]]
        return plain

    def __str__(self) -> str:
        """The table."""
        from offramp.places.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:  # noqa: ANN401
        """For a terminal."""
        from offramp.places.table import render

        return render(self)
