"""What a system of the literature is made of, so that one function trains them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.decide.trace import Trace
from offramp.train.optimizers import OptimizerFactory
from offramp.train.schemes import Joint, Scheme

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A network with its exits, how they learn, and how their thresholds are chosen.

    Attributes:
        name: of the system.
        paper: authors, title, year.
        summary: one line, for lists.
        build: makes the network for a number of classes.
        data: a key of :data:`offramp.zoo.images.DATA`.
        choose: from a trace of calibration samples and the accuracy that may be lost to a policy.
        scheme: how it is trained.
        epochs: that two cores can do; papers train for longer.
        batch: samples a step.
        optimizer: as :func:`offramp.fit` takes it.
        pad: pixels by which training images are shifted at the most.
        flip: whether they are mirrored.
        precision: as :func:`offramp.fit` takes it.
    """

    name: str
    paper: str
    summary: str
    build: Callable[[int], MultiExitModel]
    data: str
    choose: Callable[[Trace, float], Policy]
    optimizer: OptimizerFactory
    scheme: Scheme = field(default_factory=Joint)
    epochs: int = 10
    batch: int = 128
    pad: int = 0
    flip: bool = False
    precision: str = "32-true"
