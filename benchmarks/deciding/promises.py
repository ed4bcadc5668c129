"""Do promises hold, and what do they cost: draws from populations whose risk is known exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from benchmarks.deciding.rivals import Rivals
from offramp.decide import Trace, criterion
from offramp.decide.guarantees import Promise, Risk, promised
from offramp.decide.guarantees.ground import CHOOSING, Ground
from offramp.decide.guarantees.paths import learn_path
from offramp.decide.guarantees.risks import losses
from offramp.decide.guarantees.sweep import Sweep
from offramp.decide.scored import Scored

__all__ = ["Population", "check", "summarise"]

RULE = criterion("confidence")
EPSILONS = (0.01, 0.02, 0.05)
CONFIDENCES = (0.9, 0.95)
BOUNDS = {
    "accuracy gap": ("score", "betting", "hoeffding-bentkus"),
    "disagreement": ("clopper-pearson", "betting"),
}
PATHS = 20  # learned on samples of their own, as many as are set aside from a calibration set
SURE = 0.999  # what chance allows: a binomial count is above it once in a thousand cells
OURS = "offramp"

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Population:
    """Samples that calibration sets are drawn from; their mean loss is the true risk.

    Attributes:
        trace: all of them.
        size: of a calibration set.
        again: whether a sample may be drawn twice; without, calibration sets are halves of a real
            trace, and less random than the promise allows for.
    """

    trace: Trace
    size: int
    again: bool

    @cached_property
    def losses(self) -> dict[str, tuple[Scored, Tensor]]:
        """Scores, and losses (E, N) by risk."""
        return {name: losses(self.trace, RULE, Risk.named(name)) for name in BOUNDS}

    @cached_property
    def scored(self) -> Scored:
        """The scores alone."""
        return self.losses["accuracy gap"][0]

    @cached_property
    def sweep(self) -> Sweep:
        """All shared thresholds."""
        return Sweep.of(self.scored)

    @cached_property
    def totals(self) -> dict[str, Tensor]:
        """Mean loss, and mean cost, at every shared threshold."""
        size = self.trace.num_samples
        found = {
            name: self.sweep.totals(values) / size for name, (_, values) in self.losses.items()
        }
        costs = self.scored.exit_costs(torch.zeros(self.trace.num_exits - 1))
        found["cost"] = self.sweep.totals(costs[:, None].expand(-1, size)) / size
        found["cost"][0] = 1.0  # nobody leaves, so that no head runs
        return found

    @cached_property
    def rising(self) -> Tensor:
        """The levels, negated, so that they can be searched."""
        return -self.sweep.levels

    def truth(self, risk: str, thresholds: Tensor) -> tuple[float, float]:
        """The true risk and the mean cost under thresholds."""
        if bool((thresholds == thresholds[0]).all()):
            place = int(torch.searchsorted(self.rising, -thresholds[:1], right=True))
            place = 0 if float(thresholds[0]) == torch.inf else place
            return float(self.totals[risk][place]), float(self.totals["cost"][place])
        key = (risk, *thresholds.tolist())
        if key not in self._known:
            taken = self.scored.exits(thresholds)
            risky = float(self.losses[risk][1].gather(0, taken[None]).mean())
            self._known[key] = risky, self.scored.cost(thresholds)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], tuple[float, float]]:
        return {}

    def rows(self, generator: torch.Generator, size: int | None = None) -> Tensor:
        """The rows of one calibration set."""
        size, whole = size or self.size, self.trace.num_samples
        if self.again:
            return torch.randint(0, whole, (size,), generator=generator)
        return torch.randperm(whole, generator=generator)[:size]


class Drawn(Ground):
    """A calibration set whose scores are the population's, and a path from samples apart.

    What the library would compute anew for each draw is taken over: scores, and the learned path,
    which costs a second. There are ``PATHS`` of them, each learned on as many samples as would have
    been set aside; the test still sees only the part of the calibration set that would be left.
    """

    def __init__(self, population: Population, rows: Tensor, path: list[Tensor], seed: int) -> None:
        super().__init__(population.trace.subset(rows), RULE, seed=seed)
        for name, (scored, values) in population.losses.items():
            self._losses[name] = scored.subset(rows), values[:, rows]
        self._given = path

    def settings(self, labelled: bool) -> list[Tensor]:
        """The path that was given."""
        return self._given


def check(
    populations: dict[str, Population],
    draws: int,
    say: Say,
    every: int = 4,
    epsilons: Sequence[float] = EPSILONS,
    paths: int = PATHS,
) -> tuple[list[Row], list[Row]]:
    """Validity of every bound, and cost beside rivals.

    Args:
        populations: by name.
        draws: calibration sets of each.
        say: takes progress.
        every: which of the draws the slow rivals see.
        epsilons: bounds on the risk.
        paths: how many learned paths are taken in turn.

    Returns:
        One row for each population, risk, bound, epsilon and confidence; and one for each
        population, method, epsilon and confidence.
    """
    valid, dear = [], []
    for name, population in populations.items():
        learned = _paths(population, paths)
        generator = torch.Generator().manual_seed(1)
        seen: dict[tuple[Any, ...], list[tuple[float, float, bool]]] = defaultdict(list)
        costs: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
        for draw in range(draws):
            rows = population.rows(generator)
            ground = Drawn(population, rows, learned[draw % len(learned)], seed=draw)
            rivals = Rivals(ground, slow=draw % every == 0)
            for epsilon in epsilons:
                for confidence in CONFIDENCES:
                    at = (epsilon, confidence)
                    for risk, bounds in BOUNDS.items():
                        for bound in bounds:
                            promise = Promise(Risk.named(risk), epsilon, confidence, bound)
                            kept = promised(ground.trace, RULE, promise, ground)
                            true = population.truth(risk, kept.thresholds)
                            seen[risk, bound, *at].append((*true, kept.way == "learned"))
                            if bound == "score":
                                costs[OURS, *at].append(true)
                    for method, threshold in rivals.at(*at).items():
                        thresholds = torch.full((population.trace.num_exits - 1,), threshold)
                        true = population.truth("accuracy gap", thresholds)
                        costs[method, *at].append(true)
        valid += [_validity(name, population, *key, found) for key, found in seen.items()]
        dear += [_cost(name, *key, found) for key, found in costs.items()]
        say(f"promises: {name}, {draws} draws")
    return valid, dear


def summarise(valid: list[Row], dear: list[Row]) -> dict[str, Any]:
    """The flat figures of both tables."""
    methods = {row["method"] for row in dear}
    unsafe = {row["method"] for row in dear if row["violations"] > row["allowed"]}
    safe = sorted(methods - unsafe - {OURS})
    cells = {(row["population"], row["epsilon"], row["confidence"]) for row in dear}
    cost = {_cell(row): row["cost"] for row in dear}
    over = [
        cost[*cell, OURS] / min(cost[*cell, method] for method in safe) for cell in sorted(cells)
    ]
    return {
        "violations_excess": sum(row["violations"] > row["allowed"] for row in valid),
        "violations_cells": len(valid),
        "violations_of_offramp_in_cost_table": int(OURS in unsafe),
        "valid_methods": ", ".join(safe),
        "methods_that_violate": ", ".join(sorted(unsafe)),
        "cost_over_cheapest_valid": max(over),
        "cost_over_cheapest_valid_mean": sum(over) / len(over),
    }


def _cell(row: Row) -> tuple[Any, ...]:
    return row["population"], row["epsilon"], row["confidence"], row["method"]


def _paths(population: Population, count: int) -> list[list[Tensor]]:
    if population.trace.num_exits <= 2:
        return [[]]  # one threshold: there is nothing to choose
    generator = torch.Generator().manual_seed(0)
    size = round(CHOOSING * population.size)
    return [
        learn_path(population.trace.subset(population.rows(generator, size)), RULE, True, seed)
        for seed in range(count)
    ]


def _validity(
    name: str,
    population: Population,
    risk: str,
    bound: str,
    epsilon: float,
    confidence: float,
    found: list[tuple[float, float, bool]],
) -> Row:
    draws = len(found)
    return {
        "population": name,
        "size": population.size,
        "risk": risk,
        "bound": bound,
        "epsilon": epsilon,
        "confidence": confidence,
        "draws": draws,
        "violations": sum(true > epsilon + 1e-12 for true, _, _ in found),
        "allowed": int(binom.ppf(SURE, draws, 1 - confidence)),
        "cost": sum(cost for _, cost, _ in found) / draws,
        "learned": sum(learned for _, _, learned in found) / draws,
    }


def _cost(
    name: str, method: str, epsilon: float, confidence: float, found: list[tuple[float, float]]
) -> Row:
    draws = len(found)
    return {
        "population": name,
        "method": method,
        "epsilon": epsilon,
        "confidence": confidence,
        "draws": draws,
        "violations": sum(true > epsilon + 1e-12 for true, _ in found),
        "allowed": int(binom.ppf(SURE, draws, 1 - confidence)),
        "cost": sum(cost for _, cost in found) / draws,
    }
