"""What a phase trains is trained, and nothing else moves.

Three things can move a network that was meant to stand still: the optimiser (weight decay and
momentum act even where the gradient is zero), the running statistics of normalisation layers, and
dropout. So what a phase does not train gets no gradient, is never given to the optimiser, and runs
in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.nn import Parameter

from offramp.build.model import MultiExitModel
from offramp.build.ownership import owns_state
from offramp.errors import DataError
from offramp.train.phases import Phase

__all__ = ["Trained", "trained_parts"]

_FROZEN = "all its parameters have requires_grad=False. Call requires_grad_() on what should learn."
_NO_PARAMETERS = (
    "what it trains has no parameters. Prototype heads do not learn by gradient but take the means "
    "of classes: offramp.train.fit_prototypes(model, loader)."
)


@dataclass(frozen=True)
class Trained:
    """The parts of a model that one phase trains.

    Attributes:
        parameters: name in the model -> parameter; none of them was frozen by the user.
        modules: modules that run in training mode, unless the model's own ``train`` leaves them
            out. All others run in evaluation mode.
        stages: with gradient equilibrium, parameter name -> the stage that it belongs to.
    """

    model: MultiExitModel
    parameters: dict[str, Parameter]
    modules: frozenset[nn.Module]
    stages: dict[str, int]

    def set_modes(self) -> None:
        """Training mode for the trained modules, evaluation mode for all others.

        A backbone may keep parts of itself in evaluation mode by a ``train`` of its own.
        """
        self.model.train()
        for module in self.model.modules():
            module.training = module.training and module in self.modules

    def scales(self, exits: Collection[int]) -> dict[str, float]:
        """Factors on gradients, by name, where they are not 1, when ``exits`` were supervised."""
        served = {name: sum(k >= own for k in exits) for name, own in self.stages.items()}
        return {name: 1 / count for name, count in served.items() if count > 1}

    @contextmanager
    def only(self) -> Iterator[None]:
        """Gradients for the trained parameters alone; what was asked for before, afterwards."""
        chosen = {id(parameter) for parameter in self.parameters.values()}
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in chosen)
            self.set_modes()
            yield
        finally:
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)
                parameter.grad = None
            for module, mode in modes:
                module.training = mode


def trained_parts(model: MultiExitModel, phase: Phase) -> Trained:
    """Find what ``phase`` trains in ``model``.

    Parameters that the user froze (``requires_grad=False``) stay frozen, and a module all of whose
    own parameters are so runs in evaluation mode. So does one with statistics alone, where all
    parameters of what it is part of are frozen.

    Raises:
        DataError: nothing is left to train.
    """
    stages = _stages_of_parameters(model)
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if _belongs(name, stages, phase)
    }
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not parameters:
        why = _FROZEN if named else _NO_PARAMETERS
        raise DataError(f"Phase {phase.name!r} has nothing to train: {why}")
    balanced = {name: stages[name] for name in parameters if phase.equilibrium and name in stages}
    return Trained(model, parameters, _training_modules(model, phase), balanced)


def _belongs(name: str, stages: dict[str, int], phase: Phase) -> bool:
    if name in stages:
        return stages[name] in phase.stages
    return int(name.split(".")[1]) in phase.heads  # heads.<k>.<...>


def _stages_of_parameters(model: MultiExitModel) -> dict[str, int]:
    last = model.num_exits - 1
    stages = {f"backbone.{name}": last for name, _ in model.backbone.named_parameters()}
    for k in range(last):
        stages.update({f"backbone.{name}": k for name, _ in model.stage_parameters(k)})
    return stages


def _training_modules(model: MultiExitModel, phase: Phase) -> frozenset[nn.Module]:
    last = model.num_exits - 1
    whole = len(phase.stages) == model.num_exits
    stages = {module: k for k in range(last) for _, module in model.stage_modules(k)}
    backbone, frozen = set(model.backbone.modules()), _frozen(model.backbone)
    owners = {
        module: stages.get(module, last) in phase.stages and module not in frozen
        for module in backbone
        if owns_state(module)
    }
    ran = model._stages.stateless
    stateless = {
        module: ran[path] <= set(phase.stages) and module not in frozen
        for path, module in model.backbone.named_modules()
        if path in ran
    }
    training = _settle(model.backbone, owners, stateless, inherited=whole, divided=whole)
    for k in phase.heads:
        # A module that a head shares with the backbone is the backbone's.
        training.update({*model.heads[k].modules()} - _frozen(model.heads[k]) - backbone)
    if whole:
        training.add(model)
    return frozenset(training)


def _settle(
    module: nn.Module,
    owners: dict[nn.Module, bool],
    stateless: dict[nn.Module, bool],
    *,
    inherited: bool,
    divided: bool,
) -> set[nn.Module]:
    """The modules at and below ``module`` that run in training mode.

    An owner of parameters or statistics was decided by its stage, and what is ``stateless`` without
    children (dropout) by all stages in which it runs. What is left (containers, what never ran)
    follows the owners below it, or the stateless where none are, when they agree, is ``divided``
    when they do not, and follows its parent when there are neither.
    """
    below = {owners[inner] for inner in module.modules() if inner in owners}
    below = below or {stateless[inner] for inner in module.modules() if inner in stateless}
    here = inherited if not below else divided if len(below) > 1 else below == {True}
    training = {module} if owners.get(module, stateless.get(module, here)) else set()
    for child in module.children():
        training |= _settle(child, owners, stateless, inherited=here, divided=divided)
    return training


def _frozen(module: nn.Module, around: bool = False) -> set[nn.Module]:
    """The modules at and below ``module`` that the user froze.

    Own parameters decide. What has none of its own goes by all parameters below it, and where there
    are none either, by the nearest module ``around`` it that has some.
    """
    own, below = list(module.parameters(recurse=False)), list(module.parameters())
    here = not any(parameter.requires_grad for parameter in below) if below else around
    itself = not any(parameter.requires_grad for parameter in own) if own else here
    frozen = {module} if itself else set()
    for child in module.children():
        frozen |= _frozen(child, here)
    return frozen
