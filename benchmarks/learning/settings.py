"""Ways to train exits, those of the literature among them, and the rules that they leave by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from offramp.decide import Criterion, GeometricEnsemble, Trace, criterion, fit_ensemble
from offramp.train import (
    Alternating,
    Boosting,
    Distill,
    Heads,
    Joint,
    Layerwise,
    Matched,
    Mixed,
    Phase,
    Scheme,
    Separate,
)

__all__ = ["COMPARED", "LEADING", "PLAIN", "PROMISING", "SETTINGS", "Setting"]

Rules = dict[str, Callable[[Trace], Criterion]]


@dataclass(frozen=True)
class Plain(Scheme):
    """The backbone alone: what it reaches without exits."""

    summary: ClassVar[str] = "the backbone alone"

    def phases(self, num_exits: int) -> list[Phase]:
        """One phase."""
        last = num_exits - 1
        return [Phase("backbone", tuple(range(num_exits)), (), (last,), objective=self.objective)]


@dataclass(frozen=True)
class BranchyNet(Scheme):
    """Joint training with the paper's weights, for any number of exits."""

    summary: ClassVar[str] = "jointly; every branch counts 1, the last exit 0.3"

    def phases(self, num_exits: int) -> list[Phase]:
        """One phase."""
        weights = (*(1.0,) * (num_exits - 1), 0.3)
        return Joint(self.objective, weights=weights).phases(num_exits)


def confidence(trace: Trace) -> Criterion:
    """The largest probability."""
    return criterion("confidence")


def summed(trace: Trace) -> Criterion:
    """The exits' logits summed up, as boosting trains them."""
    return GeometricEnsemble([[1.0] * (k + 1) for k in range(trace.num_exits)])


ANY: Rules = {"confidence": confidence, "ensemble": fit_ensemble}


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        name: of its folder.
        title: for the tables.
        scheme: how the exits learn.
        rules: how samples may leave, each made from the calibration trace; the first one also
            says what a single exit answers. Which is taken is decided on the calibration samples.
        onto: the setting whose trained backbone it starts from.
        cascade: whether an exit also sees what the one before it says.
        sgd: whether it learns by SGD instead of AdamW, which undoes any scale of a gradient.
        source: where it comes from.
    """

    name: str
    title: str
    scheme: Scheme
    rules: Rules
    onto: str | None = None
    cascade: bool = False
    sgd: bool = False
    source: str = ""


def _own(rule: str) -> Rules:
    return ANY | {rule: lambda _: criterion(rule)}


PLAIN = "plain"

# The most promising, for what takes long; and with them those that others have published.
PROMISING = (PLAIN, "ztw", "joint_distill", "heads")
COMPARED = (*PROMISING, "sdn_distill", "joint", "sdn", "branchynet", "pabee")
# Of those, what led ResNet-56 in one respect or another after a short training, or promised to.
LEADING = (PLAIN, "joint_distill", "sdn_distill", "pabee", "linear_distill")

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(PLAIN, "plain, without exits", Plain(), {"confidence": confidence}),
        Setting("joint_distill", "joint, distilled", Joint(Distill(teacher="ensemble")), ANY,
                source="Phuong and Lampert, 2019"),
        Setting("heads", "heads on the plain network", Heads(), ANY, onto=PLAIN),
        Setting("mixed_distill", "mixed, distilled", Mixed(Distill(teacher="ensemble")), ANY,
                source="Kubaty et al., 2025; Phuong and Lampert, 2019"),
        Setting("ztw", "ZTW: heads in a cascade on the plain network, ensemble", Heads(),
                {"ensemble": fit_ensemble}, onto=PLAIN, cascade=True,
                source="Wołczyk et al., 2021"),
        Setting("joint", "joint", Joint(), ANY),
        Setting("sdn", "Shallow-Deep Networks: growing weights", Joint(weights="growing"), ANY,
                source="Kaya et al., 2019"),
        Setting("sdn_distill", "growing weights, distilled from the last exit",
                Joint(Distill(teacher="last"), weights="growing"), ANY,
                source="after Kaya et al., 2019, and Zhang et al., 2019"),
        Setting("linear_distill", "linear weights, distilled from the last exit",
                Joint(Distill(teacher="last"), weights="linear"), ANY,
                source="after Zhou et al., 2020, and Zhang et al., 2019"),
        Setting("branchynet", "BranchyNet: early exits count 1, the last 0.3",
                BranchyNet(), _own("entropy"),
                source="Teerapittayanon et al., 2016"),
        Setting("pabee", "PABEE: linear weights", Joint(weights="linear"), _own("patience"),
                source="Zhou et al., 2020"),
        Setting("boosting", "joint, boosting", Joint(Boosting()), {"summed": summed},
                source="Yu et al., 2023"),
        Setting("matched", "joint, matched weights", Joint(Matched()), ANY,
                source="after Han et al., 2022"),
        Setting("separate", "separate", Separate(), ANY),
        Setting("layerwise", "layerwise", Layerwise(), ANY, source="Belilovsky et al., 2019"),
        Setting("mixed", "mixed", Mixed(), ANY, source="Kubaty et al., 2025"),
        Setting("alternating", "alternating", Alternating(), ANY, source="Xin et al., 2021"),
        Setting("equilibrium", "joint, gradient equilibrium, by SGD", Joint(equilibrium=True), ANY,
                sgd=True, source="Li et al., 2019"),
        Setting("joint_sgd", "joint, by SGD", Joint(), ANY, sgd=True),
    )
}  # fmt: skip
