"""The rules that are compared, fitted on calibration samples where they have something to fit."""

from __future__ import annotations

from collections.abc import Callable

from offramp.decide import (
    Agreement,
    Criterion,
    LearnedGate,
    Patience,
    ProductOfExperts,
    Trace,
    criterion,
    fit_ensemble,
    fit_gates,
    fit_temperatures,
)

__all__ = ["COMBINED", "RULES", "Rule"]

Rule = Callable[[Trace, float], Criterion]  # from calibration samples and a budget


def _named(name: str) -> Rule:
    return lambda trace, budget: criterion(name)


def _gates(trace: Trace, budget: float) -> LearnedGate:
    return fit_gates(trace, max_cost=budget)


def _gates_on_ensemble(trace: Trace, budget: float) -> LearnedGate:
    return fit_gates(trace, max_cost=budget, inner=fit_ensemble(trace))


RULES: dict[str, Rule] = {
    "confidence": _named("confidence"),
    "entropy": _named("entropy"),
    "margin": _named("margin"),
    "power entropy": _named("power_entropy"),
    "energy": _named("energy"),
    "patience": lambda trace, budget: Patience(),
    "agreement, weighted": lambda trace, budget: Agreement(weighted=True),
    "voting": _named("voting"),
    "arithmetic ensemble": _named("arithmetic"),
    "geometric ensemble": _named("geometric"),
    "geometric ensemble, fitted": lambda trace, budget: fit_ensemble(trace),
    "product of experts": lambda trace, budget: ProductOfExperts(),
    "confidence, tempered": lambda trace, budget: fit_temperatures(trace).apply("confidence"),
    "margin, tempered": lambda trace, budget: fit_temperatures(trace).apply("margin"),
    "gates": _gates,
    "gates on the fitted ensemble": _gates_on_ensemble,
}

# Gates and ensembles: what the best rule of the library is chosen from.
COMBINED = (
    "arithmetic ensemble",
    "geometric ensemble",
    "geometric ensemble, fitted",
    "product of experts",
    "gates",
    "gates on the fitted ensemble",
)
