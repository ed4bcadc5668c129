"""How much a network disagrees with itself on its way to the answer."""

from __future__ import annotations

from torch import Tensor

from offramp.decide.trace import Trace
from offramp.errors import TraceError

__all__ = ["confusion", "disagreement"]

ROUNDING = 1e-12  # of float64, with room: a deviation below it is none


def disagreement(trace: Trace) -> Tensor:
    """The distance of the internal classifiers from the end, summed over them.

    ``sum_k ||p_k - p_E||_1`` with the probabilities p of the E - 1 internal classifiers and of the
    network's own output: the confusion metric of Kaya et al. (2019), before it is normalised.

    Args:
        trace: what every exit said of N samples.

    Returns:
        (N,) float64, from 0 to 2 (E - 1).
    """
    probabilities = trace.logits.double().softmax(2)
    return (probabilities[:-1] - probabilities[-1]).abs().sum((0, 2))


def confusion(trace: Trace, reference: Trace) -> Tensor:
    """Confusion scores: the disagreement against what is usual; high where the answer is doubtful.

    Less the mean and divided by the deviation of the disagreement on reference samples.

    Args:
        trace: of the N samples to judge.
        reference: of other samples, such as those for calibration; same network.

    Returns:
        (N,) float64, in deviations from the mean.

    Raises:
        TraceError: the traces differ in exits or classes, or all reference samples are alike.
    """
    ours = (trace.num_exits, trace.num_classes)
    theirs = (reference.num_exits, reference.num_classes)
    if ours != theirs:
        raise TraceError(
            f"The trace has {ours[0]} exits and {ours[1]} classes, the reference {theirs[0]} and "
            f"{theirs[1]}. Record both with one network."
        )
    usual = disagreement(reference)
    mean, deviation = float(usual.mean()), float(usual.std(correction=0))
    if deviation <= ROUNDING * max(1.0, mean):
        raise TraceError(
            f"The exits disagree by {mean:g} on each of the {len(usual)} reference "
            "samples, so there is no deviation to divide by. Record more samples."
        )
    return (disagreement(trace) - mean) / deviation
