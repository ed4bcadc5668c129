"""The steps that a staged model takes under a policy: each a stage and the rule at its end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.build.digest import digests
from offramp.build.model import MultiExitModel
from offramp.decide.criteria import Criterion
from offramp.decide.policy import Policy
from offramp.decide.provenance import of_another_network
from offramp.errors import PolicyError
from offramp.run.rows import RowAxis
from offramp.run.stages import StagedModel

__all__ = ["Deciding", "Link", "Step", "chain", "check_network", "check_state"]


@dataclass(frozen=True)
class Link:
    """What a runner knows of a step: what it reads and writes, and when its exit is taken.

    Attributes:
        exit: number of the exit that it ends in, counted over all exits of the model.
        threshold: rows leave where ``score >= threshold``; ``-inf`` at the last exit.
        inputs, outputs: names of what it reads and writes: values that cross cuts, state of the
            criterion, ``logits``, ``score``, and ``raw`` where the criterion combines exits.
        rows: for each of these names, where the samples lie; ``None``: no batch in it.
        live: those that later steps read, and that are compacted when rows leave.
    """

    exit: int
    threshold: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rows: dict[str, RowAxis | None]
    live: tuple[str, ...]


@dataclass(frozen=True)
class Step(Link):
    """A link that can be executed.

    Attributes:
        module: ``module(*inputs)`` returns a tuple, the outputs.
        example: one tensor for each input, of a batch of two or more.
    """

    module: Deciding
    example: tuple[Tensor, ...]

    @property
    def link(self) -> Link:
        """The step without its module."""
        return Link(self.exit, self.threshold, self.inputs, self.outputs, self.rows, self.live)


class Deciding(nn.Module):
    """A stage, and the criterion on its logits.

    Where the criterion combines exits, the head's own logits, which a trace keeps, come first.
    """

    def __init__(
        self, stage: Callable[..., Any], live: int, exit: int, criterion: Criterion
    ) -> None:
        super().__init__()
        self.stage = stage
        self.live = live
        self.exit = exit
        self.criterion = criterion

    def with_stage(self, stage: Callable[..., Any]) -> Deciding:
        """The same with another implementation of the stage."""
        return Deciding(stage, self.live, self.exit, self.criterion).eval()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """From the live values and the criterion's state to the step's outputs."""
        raw, *made = self.stage(*values[: self.live])
        if raw.dtype != torch.float32:
            raw = raw.float()  # as a trace holds it, so that all decide alike
        logits, score, state = self.criterion(raw, tuple(values[self.live :]), self.exit)
        if score.dtype != torch.float32:
            score = score.float()  # a count, say: in integers 2.5 would be a threshold of 2
        own = (raw,) if self.criterion.combines else ()
        return (*own, logits, score, *state, *made)


def chain(staged: StagedModel, policy: Policy, num_exits: int) -> list[Step]:
    """The steps of a staged model under a policy.

    Raises:
        PolicyError: the policy is for another number of exits.
    """
    thresholds = (*policy.thresholds_for(num_exits), -math.inf)
    criterion = policy.criterion.eval()
    own = ("raw",) if criterion.combines else ()
    values = dict(zip(staged.inputs, staged.call.tensors, strict=True))
    state: tuple[str, ...] = ()
    steps = []
    for position, stage in enumerate(staged.stages):
        module = Deciding(stage.module, len(stage.inputs), stage.exit, criterion).eval()
        reads = (*stage.inputs, *state)
        example = tuple(values[name] for name in reads)
        with torch.no_grad():
            outputs = module(*example)
        before, last = state, position == len(staged.stages) - 1
        count = len(outputs) - len(own) - 2 - len(stage.outputs)
        state = tuple(f"state_{stage.exit}_{i}" for i in range(count))
        writes = (*own, "logits", "score", *state, *stage.outputs)
        plain = dict.fromkeys((*own, "logits", "score", *before, *state), RowAxis())
        live = () if last else (*staged.live_after(position), *state)
        steps.append(
            Step(
                exit=stage.exit,
                threshold=thresholds[stage.exit],
                inputs=reads,
                outputs=writes,
                rows={**staged.rows, **plain},
                live=live,
                module=module,
                example=example,
            )
        )
        values.update(zip(writes, outputs, strict=True))
    return steps


def check_network(policy: Policy, model: MultiExitModel) -> None:
    """Warn of thresholds that were chosen for other weights, as before it was trained anew."""
    if of_another_network(digests(model), policy.provenance):
        warnings.warn(
            "The policy was calibrated on a trace of another network than this one (their weights "
            "differ: one was trained anew, or converted), so its thresholds, and what it "
            "promises, are not for this one. Record this network and calibrate again.",
            stacklevel=3,
        )


def check_state(policy: Policy) -> None:
    """Without thresholds no exit runs; a rule with state would be handed that of exits that do."""
    if policy.thresholds is None and policy.criterion.stateful:
        raise PolicyError(
            f"A policy of the criterion {policy.criterion.name!r}, which carries state from exit "
            "to exit, has no thresholds: it runs no exit but the last, and these stages run all. "
            "Give thresholds (math.inf for exits that nobody leaves at), or keep only the exits "
            "in use, with exits='active'."
        )
