"""What papers on early exits propose, as a scheme, a criterion and a calibration, by their names.

Networks are not part of it: each recipe goes with any model that ``attach`` makes. What papers have
and a recipe leaves out is in ``card.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from offramp.decide.calibrate import calibrate, frontier
from offramp.decide.criteria import Criterion, GeometricEnsemble, criterion
from offramp.decide.fitting import fit_apart, fit_ensemble
from offramp.decide.gating import fit_gates
from offramp.decide.policy import Policy
from offramp.decide.trace import Trace
from offramp.train.objectives import Boosting, Matched
from offramp.train.schemes import Heads, Joint, Scheme

__all__ = ["PAPERS", "PaperRecipe"]

AROUND = 0.1  # of the full cost, on both sides of a budget: where the slope of a frontier is taken
CHEAPEST = 0.01  # of prices: there is always some reason to leave

Rule = Callable[[Trace, float], Criterion]
Control = Callable[[Trace, Criterion, float, float], Policy]


@dataclass(frozen=True)
class PaperRecipe:
    """How exits learn and how samples leave by them, as a paper has it.

    Attributes:
        name: of the recipe.
        paper: authors, title, year.
        summary: one line, for lists.
        scheme: how the exits learn.
        rule: makes the criterion for a goal, from samples that choose no threshold.
        claim: what the paper says of it, as far as one network can tell.
        cascade: whether each head also sees what the one before says, as
            ``attach(..., cascade=True)`` makes them.
        control: thresholds for a risk that is exceeded with a probability; ``None`` where they
            serve a budget.
    """

    name: str
    paper: str
    summary: str
    scheme: Scheme
    rule: Rule
    claim: str
    cascade: bool = False
    control: Control | None = None

    def prepare(self, trace: Trace, goal: float, seed: int = 0) -> tuple[Criterion, Trace]:
        """The criterion, and the samples that are left for its thresholds.

        Args:
            trace: of calibration samples.
            goal: as for :meth:`choose`.
            seed: of what is set aside where the criterion is fitted.
        """
        return fit_apart(trace, lambda fitting: self.rule(fitting, goal), seed=seed)

    def choose(self, trace: Trace, goal: float, *, delta: float = 0.1, seed: int = 0) -> Policy:
        """The policy for a goal.

        Args:
            trace: of calibration samples.
            goal: the mean cost, as a share of the backbone's; with risk control, the risk that is
                tolerated, as a share.
            delta: with risk control: the probability, over draws of the calibration samples, with
                which the risk may be exceeded on new ones.
            seed: of what is set aside where the criterion is fitted.

        Raises:
            Infeasible: there is none.
        """
        rule, samples = self.prepare(trace, goal, seed)
        if self.control is None:
            return calibrate(samples, rule, max_cost=goal)
        return self.control(samples, rule, goal, delta)


def _named(name: str) -> Rule:
    return lambda trace, goal: criterion(name)


def _ensemble(trace: Trace, budget: float) -> Criterion:
    return fit_ensemble(trace)


def _sum(trace: Trace, budget: float) -> Criterion:
    """The exits' logits summed up, as boosting trains them."""
    return GeometricEnsemble([[1.0] * (k + 1) for k in range(trace.num_exits)])


def _budgeted(trace: Trace, budget: float) -> Criterion:
    return fit_gates(trace, max_cost=budget)


def _priced(trace: Trace, budget: float) -> Criterion:
    """Gates at the price of cost that makes the budget the best choice: the frontier's slope."""
    points = frontier(trace, "confidence")
    ends = np.interp(
        (budget - AROUND, budget + AROUND),
        [point.cost_ratio for point in points],
        [point.accuracy for point in points],
    )
    return fit_gates(trace, price=max(float(ends[1] - ends[0]) / (2 * AROUND), CHEAPEST))


def _agreeing(trace: Trace, rule: Criterion, risk: float, delta: float) -> Policy:
    bound = "hoeffding-bentkus"
    return calibrate(trace, rule, min_agreement=1 - risk, confidence=1 - delta, bound=bound)


def _as_accurate(trace: Trace, rule: Criterion, risk: float, delta: float) -> Policy:
    return calibrate(trace, rule, max_accuracy_drop=risk, confidence=1 - delta, bound="betting")


PAPERS: dict[str, PaperRecipe] = {
    recipe.name: recipe
    for recipe in (
        PaperRecipe(
            "ztw", "Wołczyk et al., Zero Time Waste (NeurIPS 2021)",
            "heads in a cascade on a frozen backbone; fitted geometric ensemble",
            Heads(), _ensemble,
            "at no budget below heads that answer each for itself",
            cascade=True,
        ),
        PaperRecipe(
            "eenet",
            "Ilhan et al., Adaptive Deep Neural Network Inference Optimization with EENet "
            "(WACV 2024)",
            "any exits; exit scores learned for the budget",
            Heads(), _budgeted,
            "at no budget below confidence on the same exits",
        ),
        PaperRecipe(
            "jei-dnn",
            "Regol et al., Jointly-Learned Exit and Inference for a Dynamic Neural Network "
            "(ICLR 2024)",
            "heads on a frozen backbone; gates learned at a price of cost",
            Heads(), _priced,
            "at no budget below confidence on the same exits",
        ),
        PaperRecipe(
            "boosted", "Yu et al., Boosted Dynamic Neural Networks (AAAI 2023)",
            "jointly, each exit correcting the sum of those before; confidence of the sum",
            Joint(Boosting()), _sum,
            "at the larger budgets not below joint training",
        ),
        PaperRecipe(
            "l2w-den",
            "Han et al., Learning to Weight Samples for Dynamic Early-Exiting Networks (ECCV 2022)",
            "jointly, each exit mostly on the samples that leave there; confidence",
            Joint(Matched()), _named("confidence"),
            "at no budget below joint training",
        ),
        PaperRecipe(
            "calm", "Schuster et al., Confident Adaptive Language Modeling (NeurIPS 2022)",
            "any exits; margin, by a tested bound on answers unlike the full network's",
            Heads(), _named("margin"),
            "answers unlike the full network's are no more than tolerated; tolerating more is "
            "cheaper",
            control=_agreeing,
        ),
        PaperRecipe(
            "fast-yet-safe",
            "Jazbec et al., Fast yet Safe: Early-Exiting with Risk Control (NeurIPS 2024)",
            "any exits; confidence, by an upper confidence bound on the accuracy lost",
            Heads(), _named("confidence"),
            "accuracy lost is no more than tolerated; tolerating more is cheaper",
            control=_as_accurate,
        ),
    )
}  # fmt: skip
