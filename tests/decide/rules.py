"""Every criterion of the library, ready to run on four exits and five classes."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.decide.criteria import (
    Agreement,
    Criterion,
    Energy,
    Entropy,
    GeometricEnsemble,
    LearnedGate,
    Patience,
    PowerEntropy,
    ProductOfExperts,
    Tempered,
    Voting,
    criterion,
    known,
)
from offramp.decide.trace import Trace

EXITS, CLASSES = 4, 5

WEIGHTS = [[1.2], [0.3, 0.9], [0.1, 0.2, 1.1], [0.0, -0.1, 0.4, 0.8]]


def gate(inner: str = "confidence") -> LearnedGate:
    """A gate with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return LearnedGate(EXITS, 6, inner)


def every_rule() -> dict[str, Criterion]:
    """Each built-in criterion by its defaults, and the variants that change what runs."""
    rules = {name: criterion(name) for name in known() if name not in ("gate", "tempered")}
    rules = {name: rule for name, rule in rules.items() if type(rule).__module__.startswith("offr")}
    return rules | {
        "entropy in nats": Entropy(unit="nats"),
        "patience of outputs": Patience(tolerance=0.8),
        "power entropy of one half": PowerEntropy(0.5),
        "energy at 2": Energy(2.0),
        "weighted agreement": Agreement(weighted=True),
        "weighted votes": Voting([0.5, 1.0, 1.5, 2.0]),
        "weighted geometric": GeometricEnsemble(WEIGHTS),
        "uniform experts": ProductOfExperts("uniform", 0.2),
        "tempered": Tempered("confidence", [0.7, 1.0, 1.6, 2.0]),
        "tempered ensemble": Tempered("arithmetic", [0.7, 1.0, 1.6, 2.0]),
        "gate": gate(),
        "gate on an ensemble": gate("geometric"),
    }


def random_logits(rows: int, seed: int = 0, exits: int = EXITS, classes: int = CLASSES) -> Tensor:
    """(E, N, C): later exits are surer."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1, 3, exits)[:, None, None]
    return torch.randn(exits, rows, classes, generator=generator) * scale


def random_trace(
    rows: int = 400, seed: int = 0, exits: int = EXITS, classes: int = CLASSES, head: float = 0.02
) -> Trace:
    """A trace whose later exits are righter, with heads that cost something."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    hard = torch.rand(rows, generator=generator)
    logits = torch.randn(exits, rows, classes, generator=generator)
    skill = torch.linspace(0.5, 3.0, exits)[:, None] * (1.5 - hard)
    logits[:, torch.arange(rows), labels] += skill
    heads = torch.full((exits,), head)
    heads[-1] = 0
    return Trace(1.5 * logits, labels, torch.ones(exits) / exits, heads, source="test")
