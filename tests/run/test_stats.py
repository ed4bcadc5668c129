"""What a runner counts: noted in passing, counted when it is asked for or has grown long."""

from __future__ import annotations

from offramp.build.cost import ExitCosts
from offramp.run.stats import NOTED, Tally


def test_batches_are_counted_whether_or_not_they_are_asked_for():
    tally = Tally(ExitCosts((1.0, 2.0, 3.0), (0.5, 0.5, 0.0), "MACs", "macs"), (0, 1, 2))
    batches = 2 * NOTED + 5
    for turn in range(batches):
        tally.add([0, turn % 3], missed=turn % 2)
        assert len(tally._new) <= NOTED
    at = [sum(turn % 3 == k for turn in range(batches)) for k in range(3)]
    for _ in range(2):  # asking changes nothing
        stats = tally.stats()
        assert stats.exits == (batches + at[0], at[1], at[2])
        assert stats.samples == 2 * batches
        assert stats.survivors == (2 * batches, at[1] + at[2], at[2])
        assert stats.missed == batches // 2
