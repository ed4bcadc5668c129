"""Parameters of criteria that are fitted on a trace: temperatures and ensemble weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offramp.decide.criteria import Criterion, GeometricEnsemble, Tempered
from offramp.decide.defaults import usual_defaults
from offramp.decide.samples import Samples
from offramp.decide.trace import Trace
from offramp.errors import TraceError

__all__ = [
    "Temperatures",
    "fit_apart",
    "fit_ensemble",
    "fit_temperatures",
    "sampled",
    "stack",
    "refuse_training",
    "usable",
]

LOWEST, HIGHEST = 0.05, 20.0  # beyond, softmax is a step or flat, and scores lose their order
ITERATIONS = 60
NEWTONS = 20
ELEMENTS = 5_000_000  # logits that a fit looks at, at most: bounds its memory
RIDGE = 1.0  # in samples: how much data it takes to move a weight from the plain mean


@dataclass(frozen=True)
class Temperatures:
    """Temperatures of all exits, and what they are good for on the samples they were fitted on.

    Attributes:
        values: E temperatures, the last exit included.
        before: E mean negative log-likelihoods at temperature 1, in nats.
        after: E of them at the fitted temperatures.
        fitted_on: those samples.
    """

    values: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    fitted_on: tuple[Samples, ...] = ()

    def apply(self, inner: str | Criterion = "confidence") -> Tempered:
        """A criterion on the tempered logits."""
        rule = Tempered(inner, self.values)
        rule.fitted_on = (*self.fitted_on, *rule.inner.fitted_on)
        return rule


@usual_defaults()
def fit_temperatures(trace: Trace) -> Temperatures:
    """The temperature of each exit that makes its probabilities likeliest (Guo et al., 2017).

    In float64, between 0.05 and 20; the negative log-likelihood is convex in 1 / T, so a bracketing
    search in ln T finds the least. The better of the fitted one and 1 is kept.

    Args:
        trace: labelled, of samples that training never saw.

    Raises:
        TraceError: no labels, or training data.
    """
    labels = usable(trace, "Temperatures")
    values, before, after = [], [], []
    for logits in trace.logits:
        plain = _nll(logits, labels, 1.0)
        fitted = _least(logits, labels)
        tempered = _nll(logits, labels, fitted)
        better = tempered < plain
        values.append(fitted if better else 1.0)
        before.append(plain)
        after.append(tempered if better else plain)
    return Temperatures(tuple(values), tuple(before), tuple(after), (trace.samples,))


@usual_defaults()
def fit_ensemble(trace: Trace) -> GeometricEnsemble:
    """A geometric ensemble whose weights are the likeliest (Wołczyk et al., 2021, section 3.2).

    For each exit, one weight for it and for every exit before it, by penalised maximum likelihood
    in float64 (a convex problem). The penalty pulls to "this exit alone" and is worth one sample.

    Args:
        trace: labelled, of samples that training never saw.

    Raises:
        TraceError: no labels, or training data.
    """
    usable(trace, "An ensemble")
    logs, labels = sampled(trace)
    weights = []
    for k in range(trace.num_exits):
        own = torch.zeros(k + 1, dtype=torch.float64)
        own[k] = 1.0
        weights.append(stack(logs[: k + 1], labels, own).tolist())
    rule = GeometricEnsemble(weights)
    rule.fitted_on = (trace.samples,)
    return rule


def fit_apart(
    trace: Trace, fit: Callable[[Trace], Criterion], share: float = 0.3, seed: int = 0
) -> tuple[Criterion, Trace]:
    """A criterion, and samples for its thresholds on which it was not fitted.

    Thresholds that are chosen on the samples that fitted the criterion find it better than it is.

    Args:
        trace: of calibration samples.
        fit: makes the criterion from a trace, such as :func:`fit_ensemble`; what it fits says so
            in its ``fitted_on``.
        share: of the samples that it is given.
        seed: of which they are.

    Returns:
        The criterion and the other samples; all of them where it fitted nothing.

    Raises:
        TraceError: a share that is not between 0 and 1, or leaves no sample on one side.
    """
    fitting, rest = trace.split(share, seed=seed)
    rule = fit(fitting)
    return rule, rest if rule.fitted_on else trace


def refuse_training(trace: Trace, what: str) -> None:
    """Refuse a trace of training data.

    Raises:
        TraceError: it is one.
    """
    if trace.source == "training":
        raise TraceError(
            f"{what} must not be fitted on a trace of training data: the exits are surer there "
            f"than they will ever be again. Record held-out samples instead."
        )


def usable(trace: Trace, what: str) -> Tensor:
    """The labels of a trace that something may be fitted on.

    Raises:
        TraceError: no labels, or training data.
    """
    refuse_training(trace, what)
    if trace.labels is None:
        raise TraceError(f"{what} can only be fitted on a trace with labels; this one has none.")
    return trace.labels


def _nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Mean negative log-likelihood in nats, summed in float64."""
    total = 0.0
    step = max(1, ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        scaled = logits[part].double() / temperature
        total += float(functional.cross_entropy(scaled, labels[part], reduction="sum"))
    return total / len(logits)


def _least(logits: Tensor, labels: Tensor) -> float:
    """The best temperature, by golden section in its logarithm."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(LOWEST), math.log(HIGHEST)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = (_nll(logits, labels, math.exp(x)) for x in (left, right))
    for _ in range(ITERATIONS):
        if high - low < 1e-6:
            break
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = _nll(logits, labels, math.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = _nll(logits, labels, math.exp(right))
    return math.exp((low + high) / 2)


def sampled(trace: Trace) -> tuple[Tensor, Tensor]:
    """Log-probabilities (E, n, C) float64 and labels (n,) of so many samples as memory allows."""
    labels = usable(trace, "A stack")
    exits, samples, classes = trace.logits.shape
    rows = max(1, min(samples, ELEMENTS // (exits * classes)))
    chosen = torch.linspace(0, samples - 1, rows, dtype=torch.float64).long()
    return trace.logits[:, chosen].double().log_softmax(dim=2), labels[chosen]


def stack(logs: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """The softmax of weighted log-probabilities that makes the labels likeliest.

    By damped Newton steps: the problem is convex and has one unknown for each exit.

    Args:
        logs: (K, n, C) float64 log-probabilities of K exits.
        labels: (n,) int64.
        start: (K,) float64, the weights to begin with and to be pulled to.

    Returns:
        (K,) float64.
    """
    weights, pull = start.clone(), RIDGE / len(labels)
    truth = logs.gather(2, labels.view(1, -1, 1).expand(len(logs), -1, 1)).squeeze(2).mean(1)

    def joint(at: Tensor) -> Tensor:
        mixed: Tensor = torch.tensordot(at, logs, dims=1)
        return mixed

    def objective(at: Tensor) -> float:
        fit = joint(at).logsumexp(1).mean() - at @ truth
        return float(fit + pull * ((at - start) ** 2).sum())

    value = objective(weights)
    for _ in range(NEWTONS):
        chance = joint(weights).softmax(1)
        means = (chance * logs).sum(2)
        slope = means.mean(1) - truth + 2 * pull * (weights - start)
        flat = (logs * chance).flatten(1) @ logs.flatten(1).T / len(labels)
        curve = flat - means @ means.T / len(labels) + 2 * pull * torch.eye(len(logs)).double()
        step = torch.linalg.solve(curve, slope)
        damping = 1.0
        while (tried := objective(weights - damping * step)) > value and damping > 1e-3:
            damping /= 2
        if value - tried < 1e-9:
            break
        weights, value = weights - damping * step, tried
    return weights
