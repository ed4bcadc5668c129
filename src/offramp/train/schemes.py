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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import ClassVar

from offramp.errors import DataError, unknown_name
from offramp.train.objectives import (
    CrossEntropy,
    Distill,
    ExitsSoFar,
    Objective,
    check_objective,
    nested,
    without_others,
)
from offramp.train.phases import Phase, Plan
from offramp.train.weights import Weights

__all__ = [
    "SCHEMES",
    "Alternating",
    "Heads",
    "Joint",
    "Layerwise",
    "Mixed",
    "Scheme",
    "Separate",
    "as_plan",
]


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to train exits, for any number of them. Not for direct use: take one of its kinds.

    Attributes:
        objective: what is minimised at each supervised exit.
    """

    objective: Objective = field(default_factory=CrossEntropy)

    summary: ClassVar[str]

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_objective(self.objective, type(self).__name__)

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

    BranchyNet (Teerapittayanon et al., ICPR 2016); with ``weights="growing"``
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
    exits kept. An objective that looks at other exits sees those that are trained by then, so that
    the last of them cannot be a teacher: ``Distill`` needs ``teacher="ensemble"`` here.
    """

    summary: ClassVar[str] = "each exit with its layers, then frozen"

    def __post_init__(self) -> None:
        """Refuse a teacher who is never there."""
        super().__post_init__()
        if any(isinstance(part, Distill) and part.teacher == "last" for part in nested(self)):
            raise DataError(
                "Layerwise got Distill with teacher='last'. Each exit is the last there is while "
                "it is trained, and no later exit can teach it. Pass Distill(teacher='ensemble'), "
                "by which exits learn from earlier ones, or leave Distill out."
            )

    def phases(self, num_exits: int) -> list[Phase]:
        """One phase for each exit, shallow to deep."""
        last, objective = num_exits - 1, self.objective
        if without_others(objective) is not objective:
            objective = ExitsSoFar(objective)
        return [
            Phase(
                f"exit {k}" if k < last else "backbone",
                stages=(k,),
                heads=(k,) if k < last else (),
                exits=(k,),
                objective=objective,
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

    The backbone alone learns by what is left of the objective without other exits, which are not
    trained by then.

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
        return _shared(phases, self.shares, "Separate")


@dataclass(frozen=True)
class Mixed(Scheme):
    """The backbone first, then everything jointly.

    "Mixed" in Kubaty et al., "How to train your multi-exit model?" (2025). The backbone alone
    learns by what is left of the objective without other exits.

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
        return _shared(phases, self.shares, "Mixed")


@dataclass(frozen=True)
class Alternating(Scheme):
    """Steps on the backbone's own loss and steps on all exits' losses, in turn.

    BERxiT (Xin et al., EACL 2021).

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
        DataError: an unknown name, neither a scheme nor phases, too few epochs, or phases that do
            not fit the model.
    """
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise DataError(unknown_name("scheme", scheme, sorted(SCHEMES)))
        scheme = SCHEMES[scheme]()
    if isinstance(scheme, Scheme):
        plan = scheme.plan(num_exits, epochs)
    else:
        plan = Plan("Given phases", _given(scheme), num_exits)
    if not plan.phases:
        raise DataError("The scheme has no phase. Give at least one.")
    for phase in plan:
        phase.check(num_exits)
    return plan


def _given(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """Phases as they were given, after a look at what came instead."""
    if isinstance(phases, type) and issubclass(phases, Scheme):
        name = phases.__name__
        raise DataError(f"scheme is the class {name}. Pass a scheme, made by {name}().")
    if isinstance(phases, Phase):
        raise DataError(f"scheme is the phase {phases.name!r} alone. Pass a list of it: [phase].")
    if not isinstance(phases, Iterable):
        raise DataError(
            f"scheme is of type {type(phases).__name__!r}. Expected a name, one of "
            f"{', '.join(SCHEMES)}, a scheme such as Joint(), or a list of phases."
        )
    given = tuple(phases)
    for item in given:
        if not isinstance(item, Phase):
            raise DataError(
                f"scheme holds a {type(item).__name__}. Expected phases alone; schemes are joined "
                "by their phases: [*Joint().plan(exits, epochs), *Heads().plan(exits, epochs)]."
            )
    return given


def _shared(phases: list[Phase], shares: Sequence[float], name: str) -> list[Phase]:
    """The phases with their shares of the epochs."""
    if len(shares) != len(phases):
        raise DataError(
            f"{name} has {len(phases)} phases, but shares={tuple(shares)} has {len(shares)}. "
            "Give one share of the epochs for each phase."
        )
    return [replace(phase, share=share) for phase, share in zip(phases, shares, strict=True)]


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
    own = without_others(objective)
    return Phase("backbone", tuple(range(num_exits)), (), (last,), objective=own)


def _heads(num_exits: int, objective: Objective, weights: Weights) -> Phase:
    if num_exits < 2:
        raise DataError(
            "A model without auxiliary exits has no heads to train. Attach exits first."
        )
    heads = tuple(range(num_exits - 1))
    return Phase("heads", (), heads, heads, objective=objective, weights=weights)


def _divide(epochs: int, shares: Sequence[float], name: str) -> list[int]:
    """Whole epochs by the largest remainder, each phase at least one."""
    if not isinstance(epochs, Integral):
        raise DataError(f"epochs={epochs!r}: expected a whole number of passes over the loader.")
    if epochs < len(shares):
        raise DataError(
            f"{name} has {len(shares)} phases and needs at least one epoch for each, but "
            f"epochs={epochs}. Pass epochs={len(shares)} or more."
        )
    if any(share <= 0 for share in shares):
        raise DataError(f"Shares of epochs must be above 0, but {name} has {list(shares)}.")
    exact = [epochs * share / sum(shares) for share in shares]
    counts = [max(1, math.floor(value)) for value in exact]
    while sum(counts) != epochs:
        gaps = [want - have for want, have in zip(exact, counts, strict=True)]
        if sum(counts) < epochs:
            counts[gaps.index(max(gaps))] += 1
        else:
            counts[gaps.index(min(g for g, c in zip(gaps, counts, strict=True) if c > 1))] -= 1
    return counts
