"""Train gates on a trace."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from offramp.decide import gains as worth
from offramp.decide.criteria import Criterion, LearnedGate
from offramp.decide.defaults import usual_defaults
from offramp.decide.fitting import refuse_training
from offramp.decide.scored import Scored, score
from offramp.decide.trace import Trace
from offramp.errors import PolicyError, TraceError

__all__ = ["fit_gates"]

STEPS, WARM = 240, 60  # of training for the objective, and before it for being right
RATE = 0.01
DECAY = 0.05
SHARP = (3.0, 12.0)  # log-odds of leaving for one unit of score, first and last: soft, then hard
PRICES = (0.01, 10.0)  # of the full cost, in accuracy
DUAL = 0.1  # how fast the price follows the budget
HELD = 0.3  # of the samples say when to stop
LEAST = 10  # samples: fewer leave too little on either side of that
LOOK = 10  # steps between looks at them
LEVELS = 49  # shared thresholds that a look tries
HARD = 1e6  # log-odds for one unit of score that leave nothing to chance
SURE = 2.0  # standard errors by which training for the objective has to be better on held samples


@usual_defaults()
def fit_gates(
    trace: Trace,
    *,
    max_cost: float | None = None,
    price: float | None = None,
    inner: str | Criterion = "confidence",
    hidden: int = 16,
    seed: int = 0,
) -> LearnedGate:
    """Gates that maximise accuracy minus the price of cost, on a trace.

    Each gate first learns whether its exit is right (logistic regression, a proper start). Then
    decisions are softened to probabilities: the chance of leaving at exit k is ``sigmoid(g_k)``
    times that of not having left before, and the expected ``accuracy - price * cost`` under them is
    maximised over all gates together, by Adam. Gains are smoothed as for the search of thresholds.
    What this finds takes the place of the start only where it is better by two standard errors on
    samples that are held out: with thresholds searched afterwards, the start is hard to beat. With
    a budget instead of a price, the price rises while the expected cost is above it and falls while
    it is below. Calibrate thresholds afterwards, as for any criterion.

    Args:
        trace: of samples that training never saw; without labels, gates aim at agreement.
        max_cost: the budget that the gates are made for, as a share of the full backbone's cost.
        price: of the full cost, in accuracy; instead of ``max_cost``.
        inner: the rule whose logits and score the gates look at.
        hidden: width of each gate.
        seed: of the gates' first weights.

    Raises:
        PolicyError: neither or both of ``max_cost`` and ``price``, or no auxiliary exit.
        TraceError: the trace is of training data, or has fewer than 10 samples.
    """
    if (max_cost is None) == (price is None):
        raise PolicyError("fit_gates needs either max_cost= or price=, and not both.")
    refuse_training(trace, "Gates")
    if trace.num_samples < LEAST:
        raise TraceError(
            f"Gates are trained on some samples and stopped by others, so at least {LEAST} are "
            f"needed; this trace has {trace.num_samples}. Record more, or use 'confidence'."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = LearnedGate(trace.num_exits, hidden, inner)
    seen = _look(trace, gate)
    gate.center.copy_(seen.mean(1))
    gate.spread.copy_(seen.std(1, correction=0).clamp(min=1e-3))
    scored = score(trace, gate.inner)
    gains = worth.smoothed(trace, scored)
    with torch.enable_grad():
        _train(gate, seen, gains, scored, (max_cost, price))
    gate.fitted_on = (trace.samples, *gate.inner.fitted_on)
    return gate.eval()


def _look(trace: Trace, gate: LearnedGate) -> Tensor:
    """(E - 1, N, F) features of every sample at every auxiliary exit."""
    out = []
    state: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for k in range(trace.num_exits - 1):
            _, features, state = gate.look(trace.logits[k], state, k)
            out.append(features)
    return torch.stack(out)


def _train(
    gate: LearnedGate,
    seen: Tensor,
    gains: Tensor,
    scored: Scored,
    aim: tuple[float | None, float | None],
) -> None:
    """Maximise the expected gain minus price times cost."""
    budget, price = aim
    inputs = (seen - gate.center[:, None]) / gate.spread[:, None]
    held = torch.arange(seen.shape[1]) % round(1 / HELD) == 0
    costs = scored.exit_costs(torch.zeros(scored.num_exits - 1)).float()
    solver = torch.optim.AdamW(gate.gates.parameters(), lr=RATE, weight_decay=DECAY)
    taught, gained = inputs[:, ~held], gains[:, ~held]
    for _ in range(WARM):
        loss = functional.binary_cross_entropy_with_logits(_odds(gate, taught), gained[:-1])
        _step(solver, loss)
    paid = 0.3 if price is None else price
    outside = (inputs[:, held], gains[:, held], costs)
    with torch.no_grad():
        level = _level(_odds(gate, outside[0]), *outside[1:], budget, paid)
        for unit in gate.gates:
            unit.get_parameter("line.bias").sub_(level)
        left = _leaving(_odds(gate, outside[0]), 0.0)
    kept = copy.deepcopy(gate.gates.state_dict())
    for step in range(STEPS):
        sharp = SHARP[0] + (SHARP[1] - SHARP[0]) * step / STEPS
        gain, cost = _expected(_odds(gate, taught), gained, costs, sharp)
        _step(solver, paid * cost - gain)
        if budget is not None:
            # In its logarithm, so that the price stays positive and moves by its own measure.
            over = max(min(float(cost.detach()) / budget - 1, 1.0), -1.0)
            paid = min(max(paid * math.exp(DUAL * over), PRICES[0]), PRICES[1])
        if step % LOOK == LOOK - 1:
            with torch.no_grad():
                odds = _odds(gate, outside[0])
                leaves = _leaving(odds, _level(odds, *outside[1:], budget, paid))
            if _surely_better(leaves, left, *outside[1:], paid):
                left, kept = leaves, copy.deepcopy(gate.gates.state_dict())
    gate.gates.load_state_dict(kept)


def _step(solver: torch.optim.Optimizer, loss: Tensor) -> None:
    solver.zero_grad()
    loss.backward()
    solver.step()


def _odds(gate: LearnedGate, inputs: Tensor) -> Tensor:
    """(E - 1, n) scores of all gates."""
    return torch.stack([unit(x) for unit, x in zip(gate.gates, inputs, strict=True)])


def _expected(odds: Tensor, gains: Tensor, costs: Tensor, sharp: float) -> tuple[Tensor, Tensor]:
    """Gain and cost if leaving were a matter of chance."""
    chance = (sharp * odds).sigmoid()
    left = torch.cat([torch.ones_like(chance[:1]), (1 - chance).cumprod(0)])
    leaving = left * torch.cat([chance, torch.ones_like(chance[:1])])
    return (leaving * gains).sum(0).mean(), leaving.mean(1) @ costs


def _level(odds: Tensor, gains: Tensor, costs: Tensor, budget: float | None, price: float) -> float:
    """The best of shared thresholds on the scores: within the budget, or at the price."""
    levels = odds.flatten().quantile(torch.linspace(0, 1, LEVELS))
    points = [_expected(odds - level, gains, costs, HARD) for level in levels]
    gain, cost = (torch.stack(column).numpy() for column in zip(*points, strict=True))
    if budget is None:
        return float(levels[int((gain - price * cost).argmax())])
    return float(np.interp(budget, np.maximum.accumulate(cost), levels.numpy()))


def _leaving(odds: Tensor, level: float) -> Tensor:
    """(n,) the exit that each sample takes."""
    reach = torch.cat([odds >= level, torch.ones_like(odds[:1], dtype=torch.bool)])
    return reach.int().argmax(dim=0)


def _surely_better(new: Tensor, old: Tensor, gains: Tensor, costs: Tensor, price: float) -> bool:
    """Whether leaving at the new exits is worth more than at the old ones, beyond chance."""
    value = gains - price * costs[:, None]
    gained = (value.gather(0, new[None]) - value.gather(0, old[None])).double().flatten()
    error = float(gained.std(correction=0)) / len(gained) ** 0.5
    return bool(float(gained.mean()) > SURE * error)
