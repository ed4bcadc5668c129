"""What many promises about the same samples share, computed once."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from offramp.decide.criteria import Criterion
from offramp.decide.guarantees.paths import Path, learn_path
from offramp.decide.guarantees.risks import Risk, losses
from offramp.decide.guarantees.sweep import Changes, Sweep
from offramp.decide.scored import Scored
from offramp.decide.trace import Trace
from offramp.errors import TraceError

__all__ = ["Ground"]

CHOOSING = 0.4  # of the samples choose the learned path, the rest test it


class Ground:
    """Calibration samples under one criterion, their groups, and a learned path.

    Args:
        trace: calibration samples.
        rule: the criterion.
        path: a trace of other samples to choose the path on; a part of ``trace`` is set aside for
            it otherwise.
        seed: of that part.

    Raises:
        TraceError: the traces have different numbers of exits, or share samples.
    """

    def __init__(
        self, trace: Trace, rule: Criterion, path: Trace | None = None, seed: int = 0
    ) -> None:
        if path is not None and path.num_exits != trace.num_exits:
            raise TraceError(
                f"The trace for the path has {path.num_exits} exits, the calibration trace "
                f"{trace.num_exits}: record both from the same model."
            )
        shared = path.samples.overlap(trace) if path is not None else 0
        if shared:
            raise TraceError(
                f"The trace for the path holds {shared} of the {trace.num_samples} samples that "
                "the promise is tested on, which would void it: give other samples, or none, and "
                "some of these are set aside."
            )
        self.trace, self.rule, self.other, self.seed = trace, rule, path, seed
        self._losses: dict[str, tuple[Scored, Tensor]] = {}
        self._costs: dict[tuple[float, ...], float] = {}
        self._changes: dict[str, Changes] = {}
        self._paths: dict[bool, Path | None] = {}

    @cached_property
    def groups(self) -> list[Tensor]:
        """(N,) bool masks: the samples for which a promise has to hold each."""
        if self.trace.groups is None:
            return [torch.ones(self.trace.num_samples, dtype=torch.bool)]
        return [self.trace.groups == value for value in self.trace.groups.unique()]

    @cached_property
    def smallest(self) -> int:
        """The size of the smallest group."""
        return min(int(rows.sum()) for rows in self.groups)

    @cached_property
    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.trace.num_samples, generator=generator)

    @cached_property
    def aside(self) -> int:
        """How many samples choose the path."""
        return 0 if self.other is not None else round(CHOOSING * self.trace.num_samples)

    @cached_property
    def testing(self) -> list[Tensor]:
        """The groups without the samples that choose the path."""
        rows = torch.ones(self.trace.num_samples, dtype=torch.bool)
        rows[self._order[: self.aside]] = False
        return [group & rows for group in self.groups]

    def losses(self, risk: Risk) -> tuple[Scored, Tensor]:
        """Scores, and the loss of leaving at each exit, (E, N) float64."""
        if risk.name not in self._losses:
            self._losses[risk.name] = losses(self.trace, self.rule, risk)
        return self._losses[risk.name]

    def cost(self, thresholds: Tensor) -> float:
        """The mean cost under thresholds (E - 1,)."""
        key = tuple(thresholds.tolist())
        if key not in self._costs:
            scored, _ = next(iter(self._losses.values()))
            self._costs[key] = scored.cost(thresholds)
        return self._costs[key]

    @cached_property
    def sweep(self) -> Sweep:
        """The settings of one shared threshold."""
        scored, _ = next(iter(self._losses.values()))
        return Sweep.of(scored)

    def changes(self, risk: Risk) -> Changes:
        """What the shared threshold does to a loss as it falls."""
        if risk.name not in self._changes:
            _, values = self.losses(risk)
            self._changes[risk.name] = self.sweep.changes(values)
        return self._changes[risk.name]

    def path(self, labelled: bool) -> Path | None:
        """The learned path, to be tested; ``None`` where there are too few samples.

        Args:
            labelled: whether to aim at accuracy rather than at agreement.
        """
        if labelled not in self._paths:
            settings = self.settings(labelled)
            scored, _ = next(iter(self._losses.values()))
            self._paths[labelled] = Path(settings, scored, self.testing) if settings else None
        return self._paths[labelled]

    def settings(self, labelled: bool) -> list[Tensor]:
        """Settings from the dearest to the cheapest; none where there are too few samples."""
        few = self.aside < 2 and self.other is None
        if few or any(not bool(group.any()) for group in self.testing):
            return []
        chooser = self.other or self.trace.subset(self._order[: self.aside])
        return learn_path(chooser, self.rule, labelled, self.seed)
