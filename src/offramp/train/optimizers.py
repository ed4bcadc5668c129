"""The optimiser and the course of its learning rate, where the user names none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from offramp.errors import DataError, unknown_name
from offramp.train.freezing import Trained
from offramp.train.phases import Phase
from offramp.train.weights import LearnedWeights

__all__ = [
    "DEFAULT_LR",
    "WEIGHER",
    "OptimizerFactory",
    "Schedule",
    "adamw",
    "check_optimizer",
    "constant",
    "cosine",
    "may_fuse",
    "named_parameters",
    "optimizer_of",
    "schedule_of",
]

OptimizerFactory = Callable[[list[Parameter]], Optimizer]
Schedule = Callable[[float], float]

DEFAULT_LR = 1e-3

WEIGHER = "weigher"  # prefix of the names of learned weights

_WEIGHT_DECAY = 0.05
_WARMUP = 0.05


def adamw(
    parameters: Iterable[Parameter], lr: float = DEFAULT_LR, *, fused: bool = True
) -> Optimizer:
    """AdamW; matrices and filters decay, biases and scales do not.

    Decoupled weight decay (Loshchilov and Hutter, ICLR 2019) of 0.05. On CPU and CUDA all
    parameters are updated by one fused kernel: for small networks on a CPU the difference is felt
    in every step.

    Args:
        parameters: what is trained.
        lr: learning rate.
        fused: by one kernel, where there is one; see :func:`may_fuse`.
    """
    chosen = list(parameters)
    groups = [
        {"params": [p for p in chosen if p.dim() > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in chosen if p.dim() <= 1], "weight_decay": 0.0},
    ]
    able = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in chosen)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=fused and able)


def may_fuse(precision: str, clip: float | None) -> bool:
    """Whether a fused optimiser can train so.

    A fused one undoes the scale of mixed precision inside its step. Gradients have to be clipped
    after that and before the step, so Lightning refuses to.

    Args:
        precision: of Lightning's Trainer, such as ``"bf16-mixed"``.
        clip: largest norm of the gradient; ``None`` or 0 where none is clipped.
    """
    return not (clip and precision.endswith("-mixed"))


def cosine(done: float) -> float:
    """Half a cosine down to zero, after a linear rise over the first 5 % (SGDR, ICLR 2017).

    Args:
        done: part of the phase that is done, in ``[0, 1)``.

    Returns:
        Factor on the learning rate, in ``[0, 1]``.
    """
    rise = min(1.0, (done + 1e-3) / _WARMUP)
    return rise * 0.5 * (1 + math.cos(math.pi * done))


def constant(done: float) -> float:
    """The learning rate as it is."""
    del done
    return 1.0


_SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine}


def schedule_of(schedule: str | Schedule) -> Schedule:
    """The schedule of a name, or the function that was given.

    Raises:
        DataError: an unknown name, or neither a name nor a function.
    """
    if not isinstance(schedule, str):
        if not callable(schedule):
            raise DataError(
                f"schedule={schedule!r}: expected {' or '.join(map(repr, _SCHEDULES))}, or a "
                "function from the part that is done, in [0, 1), to the factor on the learning "
                "rate. For a rate that stays, pass 'constant'."
            )
        return schedule
    if schedule not in _SCHEDULES:
        raise DataError(unknown_name("schedule", schedule, sorted(_SCHEDULES)))
    return _SCHEDULES[schedule]


def check_optimizer(optimizer: OptimizerFactory | None, lr: float | None) -> None:
    """Refuse what cannot make an optimiser, and a learning rate that none would follow.

    Raises:
        DataError: ``optimizer`` is no function, or ``lr`` is given with it.
    """
    if optimizer is not None and not callable(optimizer):
        came = repr(optimizer) if isinstance(optimizer, str) else type(optimizer).__name__
        raise DataError(
            f"optimizer is {came}. Expected a function from the list of trained parameters to an "
            "optimiser, as each phase makes its own: "
            "optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
        )
    if optimizer is not None and lr is not None:
        raise DataError("lr is for the default optimizer. Set it in your own, and leave lr out.")


def named_parameters(trained: Trained, weigher: LearnedWeights | None) -> dict[str, Parameter]:
    """What one phase trains: of the model, and learned weights below :data:`WEIGHER`."""
    learned = dict(weigher.named_parameters()) if weigher is not None else {}
    return trained.parameters | {f"{WEIGHER}/{name}": p for name, p in learned.items()}


def optimizer_of(
    make: OptimizerFactory, phase: Phase, trained: Trained, weigher: LearnedWeights | None
) -> tuple[Optimizer, dict[int, str]]:
    """The optimiser of one phase at the phase's learning rate, and names by ``id(parameter)``.

    Raises:
        DataError: the optimiser holds parameters that the phase does not train.
    """
    parameters = named_parameters(trained, weigher)
    optimizer = make(list(parameters.values()))
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = group["lr"] * phase.lr_scale
        if any(id(parameter) not in names for parameter in group["params"]):
            raise DataError(
                f"The optimizer holds parameters that phase {phase.name!r} does not train. "
                "Give a function that takes the list of parameters and returns an optimiser "
                "of these alone: optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
            )
    return optimizer, names
