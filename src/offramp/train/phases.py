"""A phase of training, and a plan of several: what is trained, by what, for how long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from numbers import Integral
from operator import index
from typing import Any, overload

from offramp.errors import DataError
from offramp.train.objectives import CrossEntropy, Objective, check_objective
from offramp.train.weights import Weights, check_weights

__all__ = ["Phase", "Plan"]


_EXAMPLES = {
    "stages": "stages=(0, 1)",
    "heads": "heads=(0,)",
    "exits": "exits=(0, 1)",
    "turns": "turns=((2,), (0, 1, 2))",
}


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
            equilibrium, Li et al., ICCV 2019: its factors telescope to this division. Adam
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
        """Tuples of what was given, and a check of what can be checked without a model."""
        check_weights(self.weights)
        check_objective(self.objective, f"Phase {self.name!r}")
        for kind in ("stages", "heads", "exits"):
            object.__setattr__(self, kind, self._indices(kind, getattr(self, kind)))
        turns = self.turns if isinstance(self.turns, Iterable) else (self.turns,)
        turns = tuple(self._indices("turns", turn) for turn in turns)
        object.__setattr__(self, "turns", turns)
        if not self.exits:
            raise DataError(f"Phase {self.name!r} supervises no exit. Name at least one in exits=.")
        stray = sorted({k for turn in self.turns for k in turn} - set(self.exits))
        if stray:
            raise DataError(
                f"Phase {self.name!r} takes turns with exits {stray}, which are not among its "
                f"exits {list(self.exits)}."
            )

    def _indices(self, kind: str, given: Iterable[int]) -> tuple[int, ...]:
        """Indices as a tuple, each once: sets of exits are keys while training."""
        try:
            indices = tuple(map(index, given))
        except TypeError as error:
            raise DataError(
                f"Phase {self.name!r} has {given!r} in {kind}=. Expected indices counted from 0, "
                f"such as {_EXAMPLES[kind]}."
            ) from error
        if len(set(indices)) < len(indices):
            what = {"stages": "a stage", "heads": "a head"}.get(kind, "an exit")
            raise DataError(
                f"Phase {self.name!r} names {what} twice: {list(indices)}. Name each once; how "
                "much an exit counts is for weights=."
            )
        return indices

    def supervised(self, step: int) -> tuple[int, ...]:
        """The exits whose losses are minimised in step ``step`` of this phase, counted from 0."""
        return self.turns[step % len(self.turns)] if self.turns else self.exits

    def check(self, num_exits: int) -> None:
        """Refuse stages, heads and exits that a model with ``num_exits`` exits does not have.

        Raises:
            DataError: an index is out of range, nothing is trained, the supervised exits reach
                nothing that is, or no epoch is left.
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
        for exits in self.turns or (self.exits,):
            if not any(self._reached(k) for k in exits):
                raise DataError(
                    f"Phase {self.name!r} trains nothing that exits {list(exits)} learn by: exit k "
                    "reaches the stages up to k and head k. Supervise a later exit, or train an "
                    "earlier part."
                )
        if not isinstance(self.epochs, Integral) or self.epochs < 1:
            raise DataError(
                f"Phase {self.name!r} has {self.epochs} epochs. Expected a whole number, at least "
                "1."
            )

    def _reached(self, k: int) -> bool:
        """Whether the loss of exit ``k`` depends on anything that is trained."""
        return k in self.heads or any(stage <= k for stage in self.stages)

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


def _ranges(indices: Sequence[int]) -> str:
    if len(indices) > 2 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}"
    return ",".join(map(str, indices))


def _text(value: object) -> str:
    """As it would be written: defaults of a dataclass are left out, as are a string's quotes."""
    if isinstance(value, str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        told = [
            f"{f.name}={_text(getattr(value, f.name))}"
            for f in fields(value)
            if _differ(getattr(value, f.name), _default(f))
        ]
        return f"{type(value).__name__}({', '.join(told)})"
    if callable(value) and hasattr(value, "__name__"):
        return f"{value.__name__}()"
    return repr(value)


def _differ(value: object, default: object) -> bool:
    """Whether a field is worth telling. Arrays, which compare item by item, always are."""
    try:
        return bool(value != default)
    except (RuntimeError, ValueError):
        return True


def _default(field: Field[Any]) -> object:
    """What a field is unless it is given; of one that has to be given, a mark like no value."""
    return field.default_factory() if field.default_factory is not MISSING else field.default
