"""Thresholds for a goal, from a trace of samples that training never saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from offramp.decide import gains as worth
from offramp.decide.criteria import Criterion
from offramp.decide.criteria import criterion as named
from offramp.decide.defaults import usual_defaults
from offramp.decide.goals import Goal, Times, resolve, timed
from offramp.decide.guarantees import Promise, Risk
from offramp.decide.guarantees.risks import Loss, losses
from offramp.decide.methods.families import FAMILIES, Family
from offramp.decide.methods.search import Search
from offramp.decide.methods.turn import turn
from offramp.decide.policy import Policy
from offramp.decide.promising import kept_policy
from offramp.decide.provenance import provenance
from offramp.decide.scored import measure, score
from offramp.decide.trace import Trace
from offramp.errors import Infeasible, PolicyError, TraceError, unknown_name

__all__ = ["METHODS", "Point", "calibrate", "frontier"]

METHODS = ("search", *FAMILIES)

Rule = str | Criterion
Solver = Callable[[float], Tensor]  # from a budget to thresholds

SURE = 2.0  # standard errors by which thresholds that spend less have to be better
HALVINGS = 7  # of the budget, in the search for the cheapest thresholds that are good enough
GRID = 12  # budgets that are looked at where the largest is not good enough
LESS, STEPS = 0.95, 10  # of a budget, where spending all of it does not pay, again and again
SUMMED = 1e-9  # costs that differ by less are the same, summed up in another order


@dataclass(frozen=True)
class Point:
    """One point of a frontier.

    Attributes:
        policy: the thresholds.
        cost_ratio: mean cost, heads included, over that of the backbone.
        accuracy: share of the samples answered right; without labels, as the full network does.
    """

    policy: Policy
    cost_ratio: float
    accuracy: float


@usual_defaults()
def calibrate(
    trace: Trace,
    criterion: Rule = "confidence",
    *,
    max_cost: float | None = None,
    max_accuracy_drop: float | None = None,
    min_accuracy: float | None = None,
    min_agreement: float | None = None,
    max_brier_gap: float | None = None,
    max_loss: float | None = None,
    max_latency: float | None = None,
    times: Times | None = None,
    loss: Loss | None = None,
    loss_limits: tuple[float, float] | None = None,
    method: str = "search",
    confidence: float | str | None = None,
    bound: str = "auto",
    testing: str = "fixed-sequence",
    path: Trace | None = None,
    seed: int = 0,
) -> Policy:
    """The thresholds that serve a goal best on a trace.

    With a goal about cost, the most accurate thresholds within it (the most agreeing, where the
    trace has no labels); with one about answers, the cheapest that meet it. With ``confidence`` the
    goal is not only met on these samples but promised for new ones drawn like them; where the trace
    has groups, for each of them.

    Args:
        trace: of samples that training never saw.
        criterion: a name or an instance.
        max_cost: mean cost with all heads that run, as a share of the full backbone's.
        max_accuracy_drop: accuracy that may be lost against the full network, as a share.
        min_accuracy: as a share.
        min_agreement: share of the answers that must be the full network's.
        max_brier_gap: what may be added to the full network's Brier score (0 to 2).
        max_loss: bound on the mean of ``loss``.
        max_latency: mean milliseconds, by the measured ``times``.
        times: milliseconds of the stages and of the heads.
        loss: a function of logits (B, C) and labels (B,) that returns (B,); may be negative.
        loss_limits: the least and the most it can be, for every sample there may ever be.
        method: ``"search"``, or one of the baselines ``"shared"``, ``"geometric"``, ``"greedy"``,
            ``"per-exit accuracy"``, ``"quantile"``. Not looked at with ``confidence``.
        confidence: the probability, over draws of the calibration samples, with which the goal is
            to hold for new samples; ``"expectation"`` for the mean over such draws.
        bound: with ``confidence``: ``"auto"`` (exact for whole losses, betting for others),
            ``"score"``, ``"clopper-pearson"``, ``"betting"`` or ``"hoeffding-bentkus"``.
        testing: with ``confidence``: how settings with a threshold of its own for each exit are
            tested, ``"fixed-sequence"`` or ``"bonferroni"``.
        path: with ``confidence``: a trace of other samples to choose those settings on; a part of
            ``trace`` is set aside for it otherwise.
        seed: of the random parts of the samples.

    Returns:
        The policy, which says in its provenance where it comes from and what it achieved there.

    Raises:
        Infeasible: no thresholds meet the goal; carries the best that can.
        TraceError: the trace is of training data, or lacks the labels that the goal needs.
        PolicyError: an unknown criterion or method, or not exactly one goal.
    """
    rule = _rule(trace, criterion)
    given = {
        "max_cost": max_cost,
        "max_accuracy_drop": max_accuracy_drop,
        "min_accuracy": min_accuracy,
        "min_agreement": min_agreement,
        "max_brier_gap": max_brier_gap,
        "max_loss": max_loss,
        "max_latency": max_latency,
    }
    goal = resolve(trace, given)
    if method not in METHODS:
        raise PolicyError(unknown_name("method", method, METHODS))
    if confidence is not None:
        risk = goal.risk(loss, loss_limits)
        wanted = Promise(risk, goal.bound, confidence, bound, testing, path, seed)
        return kept_policy(trace, rule, goal, wanted)
    if goal.name == "max_latency":
        trace = timed(trace, times)
    watched = goal.risk(loss, loss_limits) if goal.bounds == "loss" else None
    task = _Task(trace, rule, method, goal.bounds, seed, watched)
    thresholds = _within(task, goal) if goal.bounds == "cost" else _good_enough(task, goal)
    return task.policy(thresholds, goal)


@usual_defaults()
def frontier(
    trace: Trace,
    criterion: Rule = "confidence",
    *,
    method: str = "search",
    points: int = 15,
    seed: int = 0,
) -> list[Point]:
    """The best accuracy at each cost, from the cheapest thresholds to the full network.

    Args:
        trace: of samples that training never saw.
        criterion: a name or an instance.
        method: as for :func:`calibrate`.
        points: how many budgets, evenly spread.
        seed: as for :func:`calibrate`.

    Returns:
        Points of rising cost; those that a cheaper one beats are left out.
    """
    rule = _rule(trace, criterion)
    if points < 2:
        raise PolicyError(f"A frontier has at least 2 points, got points={points}.")
    if method not in METHODS:
        raise PolicyError(unknown_name("method", method, METHODS))
    task = _Task(trace, rule, method, "cost", seed)
    low, high = task.reach()
    found: list[Point] = []
    for step in range(points):
        budget = low + (high - low) * step / (points - 1)
        thresholds = task.solve(budget)
        goal = Goal("max_cost", budget, "cost", f"a mean cost of at most {budget:.4g}")
        cost, gain = measure(task.scored, thresholds, task.right)
        if not found or (cost > found[-1].cost_ratio and gain > found[-1].accuracy):
            found.append(Point(task.policy(thresholds, goal), cost, gain))
    return found


class _Task:
    """A trace scored for one criterion, and the method that chooses thresholds on it."""

    def __init__(
        self,
        trace: Trace,
        rule: Criterion,
        method: str,
        about: str,
        seed: int,
        risk: Risk | None = None,
    ) -> None:
        self.trace, self.rule, self.method, self.seed = trace, rule, method, seed
        full = trace.logits[-1].argmax(dim=1)
        self.full = 1.0
        self.about = "agreement" if trace.labels is None else about
        if risk is not None:
            self.scored, values = losses(trace, rule, risk)
            self.right = -values.float()
        elif self.about == "agreement":
            self.scored = score(trace, rule)
            # With the backbone itself, also where the criterion's last answer is an ensemble's.
            self.right = (self.scored.predictions == full).float()
        else:
            self.scored = score(trace, rule)
            self.right = worth.correctness(trace, self.scored)
            self.full = float(torch.eq(full, cast("Tensor", trace.labels)).double().mean())
        self.solve = self._solver()

    def _solver(self) -> Solver:
        if self.scored.num_exits == 1:
            return lambda budget: torch.empty(0)
        if self.method == "search":
            smooth = self.about in ("accuracy", "cost")

            def gains(rows: Tensor) -> Tensor:
                if smooth:
                    return worth.smoothed(self.trace, self.scored, rows)
                return self.right[:, rows]

            choose: Solver = Search(self.scored, gains, self.seed).at
        else:
            family: Family = FAMILIES[self.method](self.scored, self.right)

            def choose(budget: float) -> Tensor:
                return turn(self.scored, family, budget)

        def solve(budget: float) -> Tensor:
            found = choose(budget)
            cost, gain = measure(self.scored, found, self.right)
            if cost > budget + 1e-12:  # ties can leave a method nothing within the budget
                found, gain = self.cheapest(), -math.inf
            if self.method == "search":
                found = self._or_alone(found, gain, budget)
            return found

        return solve

    def _or_alone(self, found: Tensor, gain: float, budget: float) -> Tensor:
        """The thresholds, or everyone at one exit where that spends less and is surely better."""
        best = found
        for thresholds, cost, worth_there in self.alone:
            if cost > budget + 1e-12 or worth_there <= gain:
                continue
            if math.isinf(gain) or self.surely_better(thresholds, found):
                best, gain = thresholds, worth_there
        return best

    def surely_better(self, new: Tensor, old: Tensor) -> bool:
        """Whether some thresholds gain more than others, beyond what can be chance."""
        after, before = (
            self.right.gather(0, self.scored.exits(thresholds)[None])[0].double()
            for thresholds in (new, old)
        )
        gained = after - before
        if len(gained) < 2:
            return False
        mean, error = float(gained.mean()), float(gained.std()) / len(gained) ** 0.5
        return mean > 0 and mean >= SURE * error

    @cached_property
    def alone(self) -> list[tuple[Tensor, float, float]]:
        """Everyone at one exit: thresholds, cost and gain, the last exit first."""
        aux = self.scored.num_exits - 1
        options = [self.off()]
        for k in range(aux):
            options.append(torch.full((aux,), torch.inf))
            options[-1][k] = -torch.inf
        return [(option, *measure(self.scored, option, self.right)) for option in options]

    def reach(self) -> tuple[float, float]:
        """The least cost that thresholds can have, and that of never leaving early."""
        costs = self.scored.exit_costs(self.off())
        return self.scored.cost(self.cheapest()), float(costs[-1])

    def cheapest(self) -> Tensor:
        """Everyone at the exit where that costs least; of equally cheap ones, the best."""
        return min(self.alone, key=lambda option: (option[1], -option[2]))[0]

    def off(self) -> Tensor:
        """Nobody leaves early."""
        return torch.full((self.scored.num_exits - 1,), torch.inf)

    def policy(self, thresholds: Tensor, goal: Goal) -> Policy:
        """The policy of these thresholds, with its provenance."""
        about: dict[str, Any] = provenance(self.trace, self.scored, thresholds)
        about["method"] = self.method
        about["target"] = {goal.name: goal.value}
        achieved = about["achieved"]
        kind = "agreement" if self.about == "agreement" else "accuracy"
        about["summary"] = (
            f"chosen by {self.method} on {self.trace.num_samples} samples "
            f"({self.trace.source}) for {goal.words}; there {kind} is {achieved[kind]:.4f} "
            f"at {achieved['cost_ratio']:.3f} of the full cost, and nothing is promised beyond"
        )
        return Policy(self.rule, thresholds.tolist(), about)


def _rule(trace: Trace, rule: Rule) -> Criterion:
    """The criterion, on a trace that may be calibrated on."""
    if trace.source == "training":
        raise TraceError(
            "This trace was recorded from data that the model was trained on: its exits are surer "
            "and righter there than they will ever be again. Record held-out samples instead."
        )
    return named(rule)


def _within(task: _Task, goal: Goal) -> Tensor:
    """The best thresholds within a cost."""
    scale = task.trace.full_cost if goal.name == "max_latency" else 1.0
    unit = " ms" if goal.name == "max_latency" else " of the full cost"
    budget = goal.value / scale
    least, full = task.reach()
    if budget < least * (1 - SUMMED):
        best = task.policy(task.cheapest(), goal)
        raise Infeasible(
            f"No thresholds have {goal.words}: the cheapest, everyone leaving at one exit, "
            f"cost {_no_less(least * scale)}{unit}. Add an earlier exit, or ask for no less than "
            "that.",
            best,
        )
    budget = max(least, min(budget, full))
    return (
        _no_more_than_pays(task, least, budget) if task.method == "search" else task.solve(budget)
    )


def _no_more_than_pays(task: _Task, least: float, budget: float) -> Tensor:
    """The thresholds at a budget, or at one below it where they are surely better.

    A search spends what it is given. Where later exits turn right answers wrong, that can be too
    much: the budget is lowered step by step for as long as nothing is surely lost by it.
    """
    found = best = task.solve(budget)
    gain = measure(task.scored, best, task.right)[1]
    for step in range(1, STEPS + 1):
        if LESS**step * budget <= least:
            break
        tried = task.solve(LESS**step * budget)
        if task.surely_better(best, tried):
            break
        now = measure(task.scored, tried, task.right)[1]
        if now > gain:
            best, gain = tried, now
    return best if task.surely_better(best, found) else found


def _no_less(value: float) -> str:
    """Four digits that can be asked for."""
    shown = f"{value:.4g}"
    return shown if float(shown) >= value * (1 - SUMMED) else f"{value * 1.001:.4g}"


def _good_enough(task: _Task, goal: Goal) -> Tensor:
    """The cheapest thresholds that meet a goal of accuracy or agreement."""
    floor = goal.floor(task.full) - 1e-9
    least, most = low, high = task.reach()
    found = task.off()
    best = measure(task.scored, found, task.right)
    for attempt in range(HALVINGS + 1):
        budget = (low + high) / 2 if attempt else high
        tried = task.solve(budget)
        cost, gain = measure(task.scored, tried, task.right)
        if gain >= floor:
            high = min(budget, cost)
            if best[1] < floor or cost < best[0]:
                found, best = tried, (cost, gain)
        else:
            low = budget
            if best[1] < floor and gain > best[1]:
                found, best = tried, (cost, gain)
    # Where later exits turn right answers wrong, less may reach what the whole network does not.
    for budget in torch.linspace(least, most, GRID).tolist() if best[1] < floor else ():
        tried = task.solve(budget)
        cost, gain = measure(task.scored, tried, task.right)
        if gain > best[1]:
            found, best = tried, (cost, gain)
        if gain >= floor:
            break
    if best[1] < floor:
        kind = {"loss": "a mean gain of"}.get(goal.bounds, goal.bounds)
        raise Infeasible(
            f"No thresholds reach {goal.words} on these samples: the best found has {kind} "
            f"{best[1]:.4f}, and {floor:.4f} is wanted. Train better exits, or ask for less.",
            task.policy(found, goal),
        )
    return found
