"""Networks cut short: found where later exits are no better, left alone where they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from offramp.decide import calibrate, replay
from offramp.decide.calibrate import _Task
from offramp.decide.criteria import criterion
from offramp.decide.gains import smoothed
from offramp.decide.methods.cuts import Cuts
from offramp.decide.methods.families import geometric
from offramp.decide.methods.landscape import shares
from offramp.decide.methods.search import Search
from offramp.decide.methods.turn import turn
from offramp.decide.ranks import Ranks
from offramp.decide.scored import measure, score
from tests.decide.rules import random_trace


def spoilt(share, rows=3000, seed=0):
    """The last exit says what the one before says, but for a share of rows that it gets wrong."""
    trace = random_trace(rows, seed)
    logits = trace.logits.clone()
    logits[-1] = logits[-2]
    right = (logits[-1].argmax(1) == trace.labels).nonzero().flatten()
    rows_ = right[: round(share * rows)]
    logits[-1, rows_, (trace.labels[rows_] + 1) % trace.num_classes] = 40.0
    return replace(trace, logits=logits)


def searching(trace):
    scored = score(trace, criterion("confidence"))
    return Search(scored, lambda rows: smoothed(trace, scored, rows))


def test_a_cut_is_taken_where_it_is_better_by_more_than_chance():
    search = searching(spoilt(0.2))
    known, _ = search._starts(0.9)
    chosen = search._or_cut(known, 0.9)
    before = search.land.each(known.log_odds, known.on).mean()
    assert search.land.each(chosen.log_odds, chosen.on).mean() > before + 0.02
    cost, _ = search.land.means(chosen.log_odds[None], chosen.on)
    assert abs(float(cost[0]) - 0.9) < 0.01  # and the budget is spent
    assert search._or_cut(chosen, 0.9) is chosen  # no other cut is better


def test_less_is_spent_only_where_that_is_surely_better():
    """Nobody leaves early, or all at the exit before the last."""
    for share, wanted in ((0.001, False), (0.2, True)):  # three rows are chance, 600 are not
        task = _Task(spoilt(share), criterion("confidence"), "search", "cost", 0)
        gain = measure(task.scored, task.off(), task.right)[1]
        found = task._or_alone(task.off(), gain, 1.0)
        assert bool((found < torch.inf).any()) == wanted


def test_what_spoils_answers_is_left_out():
    """Hardly anybody goes to the end, and that is better than to stop everybody before it."""
    trace = spoilt(0.2)
    decided = replay(trace, calibrate(trace, max_cost=0.95))
    assert float((decided.exit == 3).double().mean()) < 0.03
    alone = (trace.logits.argmax(2) == trace.labels).double().mean(1)
    assert float((decided.prediction == trace.labels).double().mean()) > float(alone.max()) + 0.005


def test_a_cut_line_is_geometric_on_the_shorter_network():
    trace = random_trace(2000)
    scored = score(trace, criterion("confidence"))
    cuts = list(Cuts(scored, Ranks(scored.scores[:-1])).at(0.4))
    alone, lines = cuts[:3], cuts[3:]
    assert [on.tolist() for _, on in alone] == np.eye(3, dtype=bool).tolist()
    log_odds, on = lines[-1]
    assert on.tolist() == [True, True, True]
    assert shares(log_odds)[-1] > 0.999  # whoever comes to the end of the line leaves there
    # The same thresholds as MSDNet's on the network that ends there.
    part = replace(
        scored,
        scores=scored.scores[:3],
        predictions=scored.predictions[:3],
        stages=scored.stages[:3],
        heads=scored.heads[:3],
    )
    wanted = turn(part, geometric(part, part.scores), 0.4)
    found = Ranks(scored.scores[:-1]).thresholds(torch.from_numpy(shares(log_odds)))[:2]
    reached = Ranks(scored.scores[:2])
    assert torch.allclose(reached.reaching(found), reached.reaching(wanted), atol=2e-3)
