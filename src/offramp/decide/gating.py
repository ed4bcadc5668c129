"""Train gates on a trace."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offramp.decide import gains as worth
from offramp.decide.criteria import Criterion, LearnedGate
from offramp.decide.fitting import usable
from offramp.decide.scored import Scored, score
from offramp.decide.trace import Trace
from offramp.errors import PolicyError

__all__ = ["fit_gates"]

STEPS = 300
RATE = 0.02
DECAY = 0.01
SHARP = 20.0  # how much of the gain, in log-odds of leaving: soft decisions become hard ones
PRICES = (0.01, 10.0)  # of the full cost, in accuracy
DUAL = 0.05  # how fast the price follows the budget


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

    Decisions are softened to probabilities while training: the chance of leaving at exit k is
    ``sigmoid(g_k)`` times that of not having left before, and the expected ``accuracy - price *
    cost`` under them is maximised over all gates together, by Adam. Gains are smoothed as for the
    search of thresholds. With a budget instead of a price, the price rises while the expected cost
    is above it and falls while it is below. Calibrate thresholds afterwards, as for any criterion.

    Args:
        trace: of samples that training never saw; without labels, gates aim at agreement.
        max_cost: the budget that the gates are made for, as a share of the full backbone's cost.
        price: of the full cost, in accuracy; instead of ``max_cost``.
        inner: the rule whose logits and score the gates look at.
        hidden: width of each gate.
        seed: of the gates' first weights.

    Raises:
        PolicyError: neither or both of ``max_cost`` and ``price``, or no auxiliary exit.
        TraceError: the trace is of training data.
    """
    if (max_cost is None) == (price is None):
        raise PolicyError("fit_gates needs either max_cost= or price=, and not both.")
    if trace.labels is not None:
        usable(trace, "Gates")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = LearnedGate(trace.num_exits, hidden, inner)
    seen = _look(trace, gate)
    gate.center.copy_(seen.mean(1))
    gate.spread.copy_(seen.std(1).clamp(min=1e-3))
    scored = score(trace, gate.inner)
    gains = worth.smoothed(trace, scored)
    with torch.enable_grad():
        _train(gate, seen, gains, scored, (max_cost, price))
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
    costs = scored.exit_costs(torch.zeros(scored.num_exits - 1)).float()
    solver = torch.optim.AdamW(gate.gates.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, 2 * RATE, STEPS)
    paid = 0.5 if price is None else price
    for _ in range(STEPS):
        going = [unit(x).squeeze(1) for unit, x in zip(gate.gates, inputs, strict=True)]
        chance = torch.stack([SHARP * value for value in going]).sigmoid()
        left = torch.cat([torch.ones_like(chance[:1]), (1 - chance).cumprod(0)])
        leaving = left * torch.cat([chance, torch.ones_like(chance[:1])])
        gain, cost = (leaving * gains).sum(0).mean(), leaving.mean(1) @ costs
        solver.zero_grad()
        (paid * cost - gain).backward()
        solver.step()
        schedule.step()
        if budget is not None:
            # In its logarithm, so that the price stays positive and moves by its own measure.
            over = float(cost.detach()) / budget - 1
            paid = min(max(paid * math.exp(DUAL * max(min(over, 1.0), -1.0)), PRICES[0]), PRICES[1])
