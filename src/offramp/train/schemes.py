"""How the exits learn: schemes, each a list of phases that can be read and printed.

A phase says what is trained (stages of the backbone, heads), which exits are supervised, by which
objective, and for how many epochs. All else is frozen. :func:`offramp.train.loop.fit` runs any list
of phases; a scheme only writes the list::

    print(Mixed(Distill(temperature=4.0), weights="linear").plan(num_exits=4, epochs=20))

Stage ``k`` of the backbone lies between exit ``k - 1`` and exit ``k``; exit ``E - 1`` is the
backbone's own output, so there are ``E`` stages and ``E - 1`` heads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import ClassVar, overload

from offramp.errors import DataError, unknown_name
from offramp.train.objectives import CrossEntropy, Objective
from offramp.train.weights import Weights, check_weights

__all__ = [
    "SCHEMES",
    "Alternating",
    "Heads",
    "Joint",
    "Layerwise",
    "Mixed",
    "Phase",
    "Plan",
    "Scheme",
    "Separate",
    "as_plan",
]


@dataclass(frozen=True)
class Phase:
    """One stretch of training in which the same parts are trained.

    Attributes:
        name: shown in progress, history and errors.
        stages: stages of the backbone that are trained.
        heads: auxiliary heads that are trained.
        exits: exits whose losses are minimised.
        epochs: passes over the loader.
        objective: what is minimised, per exit and sample.
        weights: how much each exit counts; see :func:`offramp.train.weights.exit_weights`.
        equilibrium: divide each stage's gradient by the number of supervised exits that it serves,
            so that early stages, which sum many gradients, move no more than late ones. (Gradient
            equilibrium, Li et al., ICCV 2019, eq. 2: its factors telescope to this division. Adam
            and its kin undo any such scale; use it with SGD.)
        turns: sets of exits that are supervised in turn, one a step, instead of all ``exits``.
        lr_scale: factor on the learning rate.
        share: this phase's part of the epochs of the whole scheme, relative to the others.
    """

    name: str
    stages: tuple[int, ...]
    heads: tuple[int, ...]
    exits: tuple[int, ...]
    epochs: int = 1
    objective: Objective = field(default_factory=CrossEntropy)
    weights: Weights = "uniform"
    equilibrium: bool = False
    turns: tuple[tuple[int, ...], ...] = ()
    lr_scale: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_weights(self.weights)
        if not self.exits:
            raise DataError(f"Phase {self.name!r} supervises no exit. Name at least one in exits=.")
        stray = sorted({k for turn in self.turns for k in turn} - set(self.exits))
        if stray:
            raise DataError(
                f"Phase {self.name!r} takes turns with exits {stray}, which are not among its "
                f"exits {list(self.exits)}."
            )

    def supervised(self, step: int) -> tuple[int, ...]:
        """The exits whose losses are minimised in step ``step`` of this phase, counted from 0."""
        return self.turns[step % len(self.turns)] if self.turns else self.exits

    def check(self, num_exits: int) -> None:
        """Refuse stages, heads and exits that a model with ``num_exits`` exits does not have.

        Raises:
            DataError: an index is out of range, nothing is trained, or no epoch is left.
        """
        for kind, indices, count in (
            ("stages", self.stages, num_exits),
            ("heads", self.heads, num_exits - 1),
            ("exits", self.exits, num_exits),
        ):
            wrong = [index for index in indices if not 0 <= index < count]
            if wrong:
                raise DataError(
                    f"Phase {self.name!r} names {kind} {wrong}, but the model has {count} {kind}, "
                    "counted from 0."
                )
        if not self.stages and not self.heads:
            raise DataError(
                f"Phase {self.name!r} trains nothing. Name stages of the backbone or heads; a "
                "model without auxiliary exits has no heads."
            )
        if self.epochs < 1:
            raise DataError(f"Phase {self.name!r} has {self.epochs} epochs. Expected at least 1.")

    def row(self, num_exits: int) -> tuple[str, str, str, str, str]:
        """Name, epochs, what is trained, what is supervised, and how: as words."""
        trains = []
        if self.stages:
            whole = len(self.stages) == num_exits
            trains.append("backbone" if whole else f"stages {_ranges(self.stages)}")
        if self.heads:
            trains.append(f"heads {_ranges(self.heads)}")
        exits = " | ".join(_ranges(turn) for turn in self.turns) or _ranges(self.exits)
        how = [_text(self.objective)]
        if len(self.exits) > 1:
            how.append(f"weights {_text(self.weights)}")
        if self.equilibrium:
            how.append("gradient equilibrium")
        if self.lr_scale != 1.0:
            how.append(f"lr x {self.lr_scale:g}")
        return self.name, str(self.epochs), ", ".join(trains), exits, ", ".join(how)


@dataclass(frozen=True)
class Plan(Sequence[Phase]):
    """The phases of one training, with all numbers filled in. A sequence; prints as a table.

    Attributes:
        title: what the plan is, in a line.
        phases: in the order in which they run.
        num_exits: ``E`` of the model it is for.
    """

    title: str
    phases: tuple[Phase, ...]
    num_exits: int

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)

    @overload
    def __getitem__(self, index: int) -> Phase: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Phase, ...]: ...
    def __getitem__(self, index: int | slice) -> Phase | tuple[Phase, ...]:
        """The phase at ``index``."""
        return self.phases[index]

    def __len__(self) -> int:
        """Number of phases."""
        return len(self.phases)

    def __iter__(self) -> Iterator[Phase]:
        """Phases in order."""
        return iter(self.phases)

    def __str__(self) -> str:
        """The table of phases."""
        rows = [("phase", "epochs", "trains", "exits", "objective")]
        rows += [phase.row(self.num_exits) for phase in self.phases]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"{self.title} ({self.num_exits} exits)", *lines])


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to train exits, for any number of them. Not for direct use: take one of its kinds.

    Attributes:
        objective: what is minimised at each supervised exit.
    """

    objective: Objective = field(default_factory=CrossEntropy)

    summary: ClassVar[str]

    @abstractmethod
    def phases(self, num_exits: int) -> list[Phase]:
        """The phases for a model with ``num_exits`` exits; only their shares of epochs count."""

    def plan(self, num_exits: int, epochs: int) -> Plan:
        """The phases with ``epochs`` divided among them by their shares, each at least one.

        Raises:
            DataError: there are fewer epochs than phases.
        """
        drafts = self.phases(num_exits)
        counts = _divide(epochs, [draft.share for draft in drafts], type(self).__name__)
        phases = tuple(
            replace(draft, epochs=count) for draft, count in zip(drafts, counts, strict=True)
        )
        return Plan(f"{type(self).__name__}: {self.summary}", phases, num_exits)


@dataclass(frozen=True)
class Joint(Scheme):
    """All exits and the backbone at once, by a weighted sum of losses.

    BranchyNet (Teerapittayanon et al., ICPR 2016, section III-B); with ``weights="growing"``
    Shallow-Deep Networks (Kaya et al., ICML 2019); with ``weights="linear"`` PABEE (Zhou et al.,
    NeurIPS 2020).

    Attributes:
        weights: of the exits' losses.
        equilibrium: see :class:`Phase`.
    """

    weights: Weights = "uniform"
    equilibrium: bool = False
    summary: ClassVar[str] = "all exits and the backbone at once"

    def phases(self, num_exits: int) -> list[Phase]:
        """One phase."""
        return [_joint("joint", num_exits, self.objective, self.weights, self.equilibrium)]


@dataclass(frozen=True)
class Layerwise(Scheme):
    """Each exit with the layers up to it that are not yet frozen; then both are frozen.

    Phase ``k`` trains stage ``k`` and head ``k``; the last trains the remaining layers and the
    backbone's own classifier. Greedy layer-wise learning (Belilovsky et al., ICML 2019), with the
    exits kept.
    """

    summary: ClassVar[str] = "each exit with its layers, then frozen"

    def phases(self, num_exits: int) -> list[Phase]:
        """One phase for each exit, shallow to deep."""
        last = num_exits - 1
        return [
            Phase(
                f"exit {k}" if k < last else "backbone",
                stages=(k,),
                heads=(k,) if k < last else (),
                exits=(k,),
                objective=self.objective,
            )
            for k in range(num_exits)
        ]


@dataclass(frozen=True)
class Heads(Scheme):
    """Only the heads: the backbone stays as it is, to the byte.

    For a network that is already trained, whose own output must not change.

    Attributes:
        weights: of the exits' losses; heads share nothing, so this only scales their steps.
    """

    weights: Weights = "uniform"
    summary: ClassVar[str] = "heads on a frozen backbone"

    def phases(self, num_exits: int) -> list[Phase]:
        """One phase."""
        return [_heads(num_exits, self.objective, self.weights)]


@dataclass(frozen=True)
class Separate(Scheme):
    """The backbone first, then its heads, then a short joint tuning.

    Attributes:
        weights: of the exits' losses in the phases with heads.
        equilibrium: see :class:`Phase`; in the tuning.
        shares: of the epochs, for the three phases.
        tuning_lr: factor on the learning rate in the tuning.
    """

    weights: Weights = "uniform"
    equilibrium: bool = False
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    tuning_lr: float = 0.1
    summary: ClassVar[str] = "backbone, then heads, then a short joint tuning"

    def phases(self, num_exits: int) -> list[Phase]:
        """Three phases."""
        tuning = _joint("tuning", num_exits, self.objective, self.weights, self.equilibrium)
        phases = [
            _backbone(num_exits, self.objective),
            _heads(num_exits, self.objective, self.weights),
            replace(tuning, lr_scale=self.tuning_lr),
        ]
        return [replace(p, share=share) for p, share in zip(phases, self.shares, strict=True)]


@dataclass(frozen=True)
class Mixed(Scheme):
    """The backbone first, then everything jointly.

    "Mixed" in Kubaty et al., "How to train your multi-exit model?" (2024).

    Attributes:
        weights: of the exits' losses in the joint phase.
        equilibrium: see :class:`Phase`; in the joint phase.
        shares: of the epochs, for the two phases.
    """

    weights: Weights = "uniform"
    equilibrium: bool = False
    shares: tuple[float, float] = (0.5, 0.5)
    summary: ClassVar[str] = "backbone, then all exits jointly"

    def phases(self, num_exits: int) -> list[Phase]:
        """Two phases."""
        phases = [
            _backbone(num_exits, self.objective),
            _joint("joint", num_exits, self.objective, self.weights, self.equilibrium),
        ]
        return [replace(p, share=share) for p, share in zip(phases, self.shares, strict=True)]


@dataclass(frozen=True)
class Alternating(Scheme):
    """Steps on the backbone's own loss and steps on all exits' losses, in turn.

    BERxiT (Xin et al., EACL 2021, section 3.2).

    Attributes:
        weights: of the exits' losses in the steps on all exits.
        equilibrium: see :class:`Phase`.
    """

    weights: Weights = "uniform"
    equilibrium: bool = False
    summary: ClassVar[str] = "steps on the last exit and on all exits in turn"

    def phases(self, num_exits: int) -> list[Phase]:
        """One phase with two turns."""
        joint = _joint("alternating", num_exits, self.objective, self.weights, self.equilibrium)
        return [replace(joint, turns=((num_exits - 1,), joint.exits))]


SCHEMES: dict[str, type[Scheme]] = {
    "alternating": Alternating,
    "heads": Heads,
    "joint": Joint,
    "layerwise": Layerwise,
    "mixed": Mixed,
    "separate": Separate,
}


def as_plan(scheme: str | Scheme | Sequence[Phase], num_exits: int, epochs: int) -> Plan:
    """The plan of a scheme given by name, as an instance, or as a list of phases.

    Args:
        scheme: a name in :data:`SCHEMES`, a :class:`Scheme`, or phases with their own epochs.
        num_exits: ``E`` of the model.
        epochs: of all phases together; a list of phases has its own instead.

    Raises:
        DataError: an unknown name, too few epochs, or phases that do not fit the model.
    """
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise DataError(unknown_name("scheme", scheme, sorted(SCHEMES)))
        scheme = SCHEMES[scheme]()
    if isinstance(scheme, Scheme):
        plan = scheme.plan(num_exits, epochs)
    else:
        plan = Plan("Given phases", tuple(scheme), num_exits)
    if not plan.phases:
        raise DataError("The scheme has no phase. Give at least one.")
    for phase in plan:
        phase.check(num_exits)
    return plan


def _joint(
    name: str, num_exits: int, objective: Objective, weights: Weights, equilibrium: bool
) -> Phase:
    everything = tuple(range(num_exits))
    return Phase(
        name,
        stages=everything,
        heads=everything[:-1],
        exits=everything,
        objective=objective,
        weights=weights,
        equilibrium=equilibrium,
    )


def _backbone(num_exits: int, objective: Objective) -> Phase:
    last = num_exits - 1
    return Phase("backbone", tuple(range(num_exits)), (), (last,), objective=objective)


def _heads(num_exits: int, objective: Objective, weights: Weights) -> Phase:
    if num_exits < 2:
        raise DataError("A model without auxiliary exits has no heads to train. Attach exits first.")
    heads = tuple(range(num_exits - 1))
    return Phase("heads", (), heads, heads, objective=objective, weights=weights)


def _divide(epochs: int, shares: Sequence[float], name: str) -> list[int]:
    """Whole epochs by the largest remainder, each phase at least one."""
    if epochs < len(shares):
        raise DataError(
            f"{name} has {len(shares)} phases and needs at least one epoch for each, but "
            f"epochs={epochs}. Pass epochs={len(shares)} or more."
        )
    if any(share <= 0 for share in shares):
        raise DataError(f"Shares of epochs must be above 0, but {name} has {list(shares)}.")
    spare = epochs - len(shares)
    exact = [spare * share / sum(shares) for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: spare - sum(counts)]:
        counts[index] += 1
    return [count + 1 for count in counts]


def _ranges(indices: Sequence[int]) -> str:
    if len(indices) > 2 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}"
    return ",".join(map(str, indices))


def _text(value: object) -> str:
    """As it would be written: defaults of a dataclass are left out, as are a string's quotes."""
    if isinstance(value, str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        plain = type(value)()
        told = [
            f"{f.name}={_text(getattr(value, f.name))}"
            for f in fields(value)
            if getattr(value, f.name) != getattr(plain, f.name)
        ]
        return f"{type(value).__name__}({', '.join(told)})"
    if callable(value) and hasattr(value, "__name__"):
        return f"{value.__name__}()"
    return repr(value)
