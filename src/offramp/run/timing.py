"""Measured time: candidates in turn in one run, medians, so that only ratios need be trusted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["compare"]


def compare(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    warmup: int = 3,
    seconds: float | None = None,
    block: int = 1,
) -> dict[str, float]:
    """Median wall time of each candidate.

    They are run in turn, round by round, so that whatever else the machine does falls on all.

    Args:
        candidates: what to time, by name.
        repeats: how many rounds.
        warmup: rounds that are not counted.
        seconds: stop after this time even if rounds are left (at least three are run).
        block: calls of a candidate in a row. With more than one, the first of them is not counted:
            caches hold then what they hold in service, not what another candidate left there.

    Returns:
        Milliseconds by name.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup):
        for run in candidates.values():
            run()
    start = time.perf_counter()
    for done in range(repeats):
        if seconds is not None and done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in candidates.items():
            for call in range(block):
                begin = time.perf_counter()
                run()
                if call or block == 1:
                    times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}
