"""What DeeBERT, PABEE, BERxiT and ElasticBERT do, as a scheme and a way to choose thresholds."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from offramp.build.batch import as_call
from offramp.build.cost import profile
from offramp.build.model import MultiExitModel, attach
from offramp.decide.calibrate import calibrate
from offramp.decide.criteria import Criterion, criterion
from offramp.decide.fitting import fit_apart
from offramp.decide.gating import fit_gates
from offramp.decide.policy import Policy
from offramp.decide.trace import Trace
from offramp.errors import PlaceError
from offramp.train.schemes import Alternating, Heads, Joint, Scheme

__all__ = ["TEXT", "TextSystem", "attach_to_layers", "layers_of", "truncated"]


@dataclass(frozen=True)
class TextSystem:
    """A way to train exits of an encoder and to leave by them.

    Attributes:
        name: of the system.
        paper: authors, title, year.
        summary: one line, for lists.
        scheme: how the exits learn.
        rule: makes the criterion from samples that choose no threshold.
        tuned: whether it starts from an encoder that is fine-tuned without exits, which the first
            of two stages does.
        head: what reads a layer, as in :func:`attach_to_layers`.
    """

    name: str
    paper: str
    summary: str
    scheme: Scheme
    rule: Callable[[Trace], Criterion]
    tuned: bool = False
    head: str = "token"

    def choose(
        self, trace: Trace, max_accuracy_drop: float, *, than: Trace | None = None, seed: int = 0
    ) -> Policy:
        """The cheapest thresholds that lose so little, on the samples that choose them.

        Args:
            trace: of calibration samples.
            max_accuracy_drop: as a share.
            than: what the network to compare with says of the same samples, in the same order; the
                last exit itself where ``None``.
            seed: of what is set aside for the rule.

        Raises:
            Infeasible: there are none.
        """
        rule, rest = fit_apart(trace, self.rule, seed=seed)
        # Of the other network, the same samples.
        full = rest if than is None else fit_apart(than, lambda _: rule, seed=seed)[1]
        right = torch.as_tensor(full.logits[-1].argmax(1) == full.labels)
        wanted = float(right.double().mean()) - max_accuracy_drop
        return calibrate(rest, rule, min_accuracy=max(0.0, wanted))


def _named(name: str) -> Callable[[Trace], Criterion]:
    return lambda trace: criterion(name)


def _gated(trace: Trace) -> Criterion:
    return fit_gates(trace, max_cost=0.5)


TEXT: dict[str, TextSystem] = {
    system.name: system
    for system in (
        TextSystem(
            "deebert", "Xin et al., DeeBERT (ACL 2020)",
            "heads on the fine-tuned, frozen encoder; entropy", Heads(), _named("entropy"),
            tuned=True,
        ),
        TextSystem(
            "pabee", "Zhou et al., BERT loses patience (NeurIPS 2020)",
            "jointly, weights growing with depth; patience", Joint(weights="linear"),
            _named("patience"),
        ),
        TextSystem(
            "berxit", "Xin et al., BERxiT (EACL 2021)",
            "steps on the last exit and on all in turn; learned gates", Alternating(), _gated,
        ),
        TextSystem(
            "elasticbert", "Liu et al., ElasticBERT (NAACL 2022)",
            "jointly, equal weights; entropy", Joint(), _named("entropy"),
        ),
    )
}  # fmt: skip


def layers_of(encoder: nn.Module) -> list[str]:
    """The paths of the layers: the longest list of modules of one class.

    Raises:
        PlaceError: there is no list of two or more.
    """
    found: dict[str, nn.ModuleList] = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and len(set(map(type, module))) == 1
    }
    if not found:
        raise PlaceError(
            f"{type(encoder).__name__} has no list of layers of one class. Name the exits: "
            "attach(encoder, example, exits=[...])."
        )
    name = max(found, key=lambda name: len(found[name]))
    return [f"{name}.{k}" for k in range(len(found[name]))]


def attach_to_layers(
    encoder: nn.Module, example: Mapping[str, object], head: str = "token"
) -> MultiExitModel:
    """An exit after every layer but the last.

    Args:
        encoder: a classifier, such as ``BertForSequenceClassification``; or one whose layers share
            their weights, as ALBERT's, and are calls of one module.
        example: inputs of at least two samples, by name.
        head: ``"token"`` reads the first token, ``"pool"`` the mean of those that count.

    Raises:
        PlaceError: the encoder has neither a list of layers nor a module that runs repeatedly.
    """
    try:
        layers = layers_of(encoder)
    except PlaceError:
        layers = _calls_of_one(encoder, example)
        if not layers:
            raise
    return attach(encoder, example, exits=layers[:-1], heads=head)


def _calls_of_one(encoder: nn.Module, example: Mapping[str, object]) -> list[str]:
    """The calls of the module that costs most of those that run repeatedly, the outermost."""
    found = profile(encoder, *as_call(example))
    spent: dict[str, float] = defaultdict(float)
    for call in found.calls:
        spent[call.path] += call.cost
    repeated = [path for path in spent if len(found.calls_of(path)) > 1]
    if not repeated:
        return []
    # What costs the same lies within; calls are in the order in which they began.
    return [found.name(call) for call in found.calls_of(max(repeated, key=spent.__getitem__))]


def truncated(encoder: nn.Module, layers: int) -> nn.Module:
    """A copy with the first layers alone: what an encoder that is simply shorter can do.

    Args:
        encoder: a classifier.
        layers: how many stay.
    """
    shorter = copy.deepcopy(encoder)
    path = layers_of(shorter)[0].rpartition(".")[0]
    owner, _, name = path.rpartition(".")
    kept = list(shorter.get_submodule(path).children())[:layers]
    setattr(shorter.get_submodule(owner), name, nn.ModuleList(kept))
    return shorter
