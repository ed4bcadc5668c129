"""A rule, its thresholds and where they come from; and what they would do to a trace."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.decide.criteria import (
    Criterion,
    Entropy,
    criterion,
    criterion_from_json,
    criterion_to_json,
)
from offramp.decide.defaults import usual_defaults
from offramp.decide.trace import Trace
from offramp.errors import PolicyError
from offramp.files import replaced

__all__ = ["Decisions", "Policy", "replay"]

SCHEMA = 1
CHUNK = 1 << 13  # rows at a time: what fits a processor's cache


@dataclass(frozen=True, eq=False)
class Policy:
    """When to stop: a criterion, a threshold per exit but the last, and their provenance.

    Exit k is taken where ``score >= thresholds[k]``, compared in the score's own type (float32);
    ``+inf`` switches an exit off. The last exit, the backbone's own output, always accepts.

    Args:
        criterion: a name or an instance.
        thresholds: E - 1 numbers, or ``None`` never to leave early.
        provenance: where they come from: data, target, achieved, promise. JSON-able.
        nats: the thresholds of ``"entropy"`` as BranchyNet gives them, in nats: exit k is taken
            where the entropy is at most ``nats[k]``. Instead of ``thresholds``.

    Raises:
        PolicyError: an unknown criterion, thresholds that are not numbers, ``nats`` for another
            criterion.
    """

    criterion: Criterion
    thresholds: tuple[float, ...] | None
    provenance: Mapping[str, Any]

    def __init__(
        self,
        criterion: str | Criterion = "confidence",
        thresholds: Sequence[float] | None = None,
        provenance: Mapping[str, Any] | None = None,
        *,
        nats: Sequence[float] | None = None,
    ) -> None:
        rule, chosen = _resolve(criterion, thresholds, nats)
        object.__setattr__(self, "criterion", rule)
        object.__setattr__(self, "thresholds", chosen)
        object.__setattr__(self, "provenance", dict(provenance or {}))

    @classmethod
    def final(cls) -> Policy:
        """The policy that never leaves early."""
        return cls("confidence", None)

    def thresholds_for(self, num_exits: int) -> tuple[float, ...]:
        """The thresholds for a network of ``num_exits`` exits, the last not counted.

        Returns:
            E - 1 numbers.

        Raises:
            PolicyError: this policy, or its criterion, is for another number of exits.
        """
        self.criterion.check_exits(num_exits)
        if self.thresholds is None:
            return (math.inf,) * (num_exits - 1)
        if len(self.thresholds) != num_exits - 1:
            raise PolicyError(
                f"This policy has {len(self.thresholds)} thresholds, so it is for a network of "
                f"{len(self.thresholds) + 1} exits (the last has none); this one has {num_exits}. "
                f"Calibrate on a trace of this network."
            )
        return self.thresholds

    def active(self, num_exits: int) -> tuple[bool, ...]:
        """For each auxiliary exit, whether its head has to run.

        One that is switched off need not, unless later exits want its state.
        """
        thresholds = self.thresholds_for(num_exits)
        always = self.criterion.stateful and self.thresholds is not None
        return tuple(always or value < math.inf for value in thresholds)

    def describe(self) -> str:
        """One sentence: the rule, where its thresholds come from, and what is promised."""
        if self.thresholds is None:
            return "Nothing leaves early: every sample runs through the whole network."
        shown = ", ".join("off" if v == math.inf else f"{v:.4g}" for v in self.thresholds)
        origin = self.provenance.get("summary", "set by hand, so nothing is promised")
        return f"Stop at the first exit whose {self.criterion.name} reaches [{shown}]; {origin}."

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON can hold it; infinite thresholds become text."""
        thresholds: list[float | str] | None = None
        if self.thresholds is not None:
            thresholds = [v if math.isfinite(v) else str(v) for v in self.thresholds]
        return {
            "schema": SCHEMA,
            "kind": "policy",
            "criterion": criterion_to_json(self.criterion),
            "thresholds": thresholds,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Policy:
        """The policy that :meth:`to_json` wrote.

        Raises:
            PolicyError: not a policy, one of a later schema, or one that does not hang together.
        """
        if not isinstance(data, Mapping) or data.get("kind") != "policy":
            raise PolicyError("This JSON is not a policy of offramp (its 'kind' is not 'policy').")
        if not isinstance(data.get("schema"), int) or data["schema"] > SCHEMA:
            raise PolicyError(
                f"The policy has schema {data.get('schema')!r}; this offramp reads up to {SCHEMA}. "
                f"Update offramp, or calibrate again."
            )
        missing = [key for key in ("criterion", "thresholds") if key not in data]
        if missing:
            raise PolicyError(f"The policy lacks {missing}: the file is damaged.")
        criterion, provenance = data["criterion"], data.get("provenance", {})
        if not isinstance(criterion, Mapping) or not isinstance(provenance, Mapping):
            raise PolicyError(
                "A policy's criterion and provenance are JSON objects, as Policy.save writes them, "
                f"got {type(criterion).__name__} and {type(provenance).__name__}: the file was "
                "edited or is damaged."
            )
        return cls(criterion_from_json(criterion), data["thresholds"], provenance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON."""
        content = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        with replaced(Path(path)) as part:
            part.write_text(content, "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy that :meth:`save` wrote.

        Raises:
            PolicyError: the file is missing, is not JSON, or is not a policy.
        """
        source = Path(path)
        try:
            data = json.loads(source.read_text("utf-8"))
        except FileNotFoundError:
            raise PolicyError(f"There is no policy at {source}.") from None
        except (OSError, ValueError) as error:
            raise PolicyError(f"{source} is not a policy, or is cut off: {error}") from error
        return cls.from_json(data)


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a policy does to each sample of a trace.

    Attributes:
        exit: (N,) int64, the exit that was taken.
        prediction: (N,) int64, the class there.
        logits: (N, C) float32, the logits that leave.
        score: (N,) float32, the score at the exit taken.
        cost: (N,) float64, the stages and heads that ran, in the trace's unit.
    """

    exit: Tensor
    prediction: Tensor
    logits: Tensor
    score: Tensor
    cost: Tensor


@usual_defaults()
def replay(trace: Trace, policy: Policy) -> Decisions:
    """What the policy does to each sample of the trace, in one vectorised pass.

    A sample is scored only at the exits that it reaches, as at run time.

    Raises:
        PolicyError: the policy, or its criterion, is for another number of exits.
    """
    thresholds = policy.thresholds_for(trace.num_exits)
    active = policy.active(trace.num_exits)
    samples = trace.num_samples
    exit = torch.empty(samples, dtype=torch.int64)
    logits = torch.empty(samples, trace.num_classes)
    score = torch.empty(samples)
    rule = policy.criterion
    with torch.inference_mode():
        for start in range(0, samples, CHUNK):
            part = slice(start, min(start + CHUNK, samples))
            block = trace.logits[:, part]
            exit[part], logits[part], score[part] = _decide(block, rule, thresholds, active)
        prediction = logits.argmax(dim=1)
        cost = trace.exit_costs(active)[exit]
    return Decisions(exit, prediction, logits, score, cost)


def _decide(
    block: Tensor, rule: Criterion, thresholds: Sequence[float], active: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Exit, logits and score of each row of ``block`` (E, B, C); leavers leave the batch."""
    exits, rows, classes = block.shape
    taken = torch.full((rows,), exits - 1)
    kept_logits, kept_score = block.new_empty(rows, classes), block.new_empty(rows)
    alive = torch.arange(rows)
    state: tuple[Tensor, ...] = ()
    for k in range(exits):
        last = k == exits - 1
        if not (last or active[k]):
            continue
        here = block[k] if len(alive) == rows else block[k, alive]
        logits, score, state = rule(here, state, k)
        if score.dtype != torch.float32:
            score = score.float()  # as at run time
        leave = torch.ones_like(alive, dtype=torch.bool) if last else score >= thresholds[k]
        gone = alive[leave]
        taken[gone], kept_logits[gone], kept_score[gone] = k, logits[leave], score[leave]
        stay = ~leave
        alive, state = alive[stay], tuple(value[stay] for value in state)
        if not len(alive):
            break
    return taken, kept_logits, kept_score


def _resolve(
    rule: str | Criterion, thresholds: Sequence[float] | None, nats: Sequence[float] | None
) -> tuple[Criterion, tuple[float, ...] | None]:
    """The criterion and its thresholds, checked."""
    if nats is not None:
        if thresholds is not None:
            raise PolicyError("Give thresholds or nats, not both.")
        if rule != "entropy" and not isinstance(rule, Entropy):
            raise PolicyError("nats are thresholds of the criterion 'entropy' alone.")
        return Entropy(unit="nats"), tuple(-value for value in _numbers(nats))
    return criterion(rule), None if thresholds is None else _numbers(thresholds)


def _numbers(values: Sequence[float]) -> tuple[float, ...]:
    """Thresholds as floats, NaN refused: nothing compares with it, so its exit would be off."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise PolicyError(
            f"Thresholds are a sequence of numbers, one for each exit but the last, got {values!r}."
        ) from error
    if any(math.isnan(value) for value in numbers):
        raise PolicyError(f"Thresholds cannot be NaN, got {list(numbers)}; math.inf switches off.")
    return numbers
