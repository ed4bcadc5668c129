"""The policy of thresholds that keep a promise, and the sentence that says what is promised."""

from __future__ import annotations

import torch

from offramp.decide.criteria import Criterion
from offramp.decide.goals import Goal
from offramp.decide.guarantees import Promise, promised
from offramp.decide.guarantees.promise import Kept
from offramp.decide.policy import Policy
from offramp.decide.provenance import provenance
from offramp.decide.trace import Trace
from offramp.errors import Infeasible, TraceError

__all__ = ["kept_policy"]


def kept_policy(trace: Trace, rule: Criterion, goal: Goal, promise: Promise) -> Policy:
    """The cheapest policy that keeps the promise.

    Raises:
        Infeasible: there is none, or too few samples to say so; it tells how many would do.
        TraceError: the criterion was fitted on some of these samples.
    """
    shared = max((samples.overlap(trace) for samples in rule.fitted_on), default=0)
    if shared:
        raise TraceError(
            f"The criterion {rule.name!r} was fitted on {shared} of the {trace.num_samples} "
            f"samples that the promise is about to be tested on, which would void it. Fit it on "
            f"one part and calibrate on the other: fitting, calibration = trace.split(0.3)."
        )
    kept = promised(trace, rule, promise)
    about = provenance(trace, kept.scored, kept.thresholds)
    about["method"] = f"promise, {kept.way}"
    about["target"] = {goal.name: goal.value, "confidence": promise.confidence}
    sentence = _sentence(trace, kept, promise)
    about["promise"] = {
        "risk": promise.risk.name,
        "bound": promise.bound,
        "confidence": promise.confidence,
        "test": kept.tests,
        "per_group": trace.groups is not None,
        "sentence": sentence,
    }
    about["summary"] = sentence
    policy = Policy(rule, kept.thresholds.tolist(), about)
    if kept.way == "none" and kept.needed is not None:
        raise Infeasible(_too_few(trace, promise, kept.needed), policy)
    if not kept.possible and kept.way == "none":
        end = kept.losses[-1]
        raise Infeasible(
            f"{goal.words.capitalize()} cannot be promised: already where nobody leaves early the "
            f"{promise.risk.words} is {float(end.mean()):.4f} on {len(end)} samples, which is not "
            f"surely below {promise.bound:g}. Ask for less, or record more samples.",
            policy,
        )
    return policy


def _sentence(trace: Trace, kept: Kept, promise: Promise) -> str:
    """What is promised, over what randomness, and what would void it."""
    each = " for each group" if trace.groups is not None else ""
    what = f"the {promise.risk.words} is at most {promise.bound:g}{each} on new samples"
    if isinstance(promise.confidence, str):
        chance = f"on average over draws of such {trace.num_samples} calibration samples"
    else:
        chance = (
            f"with probability {promise.confidence:g} over the draw of the {trace.num_samples} "
            f"calibration samples ({trace.source})"
        )
    shown = torch.unique(kept.thresholds)
    nobody = "nobody leaves early, so " if bool((shown == torch.inf).all()) else ""
    return (
        f"{nobody}{chance}, {what} that are drawn independently from the same source; void if new "
        f"samples come from elsewhere, if the network, its numerics or the thresholds are changed, "
        f"or if these samples had a part in training it or in choosing the criterion or the exits"
    )


def _too_few(trace: Trace, promise: Promise, needed: int) -> str:
    smallest, where = trace.num_samples, "the trace has"
    if trace.groups is not None:
        sizes = {int(g): int((trace.groups == g).sum()) for g in trace.groups.unique()}
        group = min(sizes, key=lambda key: sizes[key])
        smallest, where = sizes[group], f"group {group} has"
    return (
        f"{where[0].upper()}{where[1:]} {smallest} samples, too few to promise that the "
        f"{promise.risk.words} is at most {promise.bound:g} with confidence "
        f"{promise.confidence}: even without a single loss at least {needed} are needed. Record "
        f"more, or ask for less."
    )
