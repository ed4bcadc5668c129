"""The interface of every rule, and the register in which a name finds its class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offramp.decide.samples import Samples
from offramp.errors import PolicyError, unknown_name

__all__ = ["Criterion", "State", "criterion", "criterion_from_json", "criterion_to_json", "known"]

State = tuple[Tensor, ...]

_REGISTER: dict[str, type[Criterion]] = {}


class Criterion(nn.Module):
    """From the logits of one exit to a score: the higher, the readier to stop.

    A subclass sets ``name`` and defines :meth:`forward`; that registers it. One with constructor
    arguments also returns them from :meth:`config`. The same module is simulated on a trace,
    executed by the runner and exported to ONNX, so its forward must trace: plain tensor operations,
    nothing in place, no Python branch on the values of a tensor. Branching on ``exit`` is fine,
    because each exit is traced on its own.

    Attributes:
        name: how strings name it.
        stateful: whether exits pass state on. Every exit of a stateful rule runs, also where its
            threshold is ``+inf``.
        combines: whether the logits that leave are not those of the exit alone (an ensemble).
        exits: E of the networks that its parameters are for, the last exit included; ``None`` where
            they are for any.
        fitted_on: the samples that its parameters were fitted on, so that nothing is promised about
            the same ones; not kept in files.
    """

    name: ClassVar[str]
    stateful: ClassVar[bool] = False
    combines: ClassVar[bool] = False
    exits: int | None = None
    fitted_on: tuple[Samples, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return  # abstract in between
        held = _REGISTER.get(cls.name)
        # The same class defined anew (a notebook cell run twice) replaces itself.
        if held is not None and _whole_name(held) != _whole_name(cls):
            raise PolicyError(
                f"The criterion name {cls.name!r} already belongs to {_whole_name(held)}; "
                f"{_whole_name(cls)} needs a name of its own."
            )
        _REGISTER[cls.name] = cls

    @abstractmethod
    def forward(self, logits: Tensor, state: State, exit: int) -> tuple[Tensor, Tensor, State]:
        """Score one exit.

        Args:
            logits: (B, C) of this exit.
            state: what the exit before handed on, each tensor with the batch at dimension 0;
                ``()`` at the first exit.
            exit: the index of this exit.

        Returns:
            The logits (B, C) to leave with, the score (B,), and the state for the next exit.
        """

    def check_exits(self, num_exits: int) -> None:
        """Refuse a network that its parameters are not for.

        Args:
            num_exits: E of the network, the last exit included.

        Raises:
            PolicyError: they are for another number of exits.
        """
        if isinstance(self.exits, int) and self.exits != num_exits:
            raise PolicyError(
                f"The criterion {self.name!r} has parameters for a network of {self.exits} exits, "
                f"and this one has {num_exits}: fit it on a trace of this network."
            )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Criterion:
        """Build from what :meth:`config` returned."""
        return cls(**config)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())


def _whole_name(kind: type[Criterion]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def known() -> list[str]:
    """The names of all criteria that are defined, sorted."""
    return sorted(_REGISTER)


def criterion(value: str | Criterion) -> Criterion:
    """The criterion that a string names, or the instance itself.

    Raises:
        PolicyError: an unknown name (the known ones and the nearest are in the text), a criterion
            that cannot be had by name alone, or something else altogether.
    """
    if isinstance(value, Criterion):
        return value
    if isinstance(value, type) and issubclass(value, Criterion):
        raise PolicyError(f"Expected a criterion, got its class: write {value.__name__}(...).")
    if not isinstance(value, str):
        raise PolicyError(
            f"A criterion is a name or an instance of Criterion, got {type(value).__name__}."
        )
    if value not in _REGISTER:
        raise PolicyError(unknown_name("criterion", value, known()))
    try:
        return _REGISTER[value]()
    except TypeError as error:
        raise PolicyError(
            f"The criterion {value!r} cannot be had by name alone ({error}): build it first and "
            f"give the instance."
        ) from error


def criterion_to_json(rule: Criterion) -> dict[str, Any]:
    """Name, arguments and tensors of a criterion, as JSON can hold them."""
    tensors = {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "data": value.tolist()}
        for name, value in rule.state_dict().items()
    }
    return {"name": rule.name, "config": rule.config(), "tensors": tensors}


def criterion_from_json(data: Mapping[str, Any]) -> Criterion:
    """The criterion that :func:`criterion_to_json` described.

    Raises:
        PolicyError: its name is unknown (a rule of your own must be imported first), or its
            arguments or tensors do not fit.
    """
    name = str(data.get("name"))
    if name not in _REGISTER:
        text = unknown_name("criterion", name, known())
        raise PolicyError(f"{text} A criterion of your own must be imported before it is loaded.")
    try:
        rule = _REGISTER[name].from_config(data.get("config", {}))
        tensors = {
            key: torch.tensor(value["data"], dtype=getattr(torch, value["dtype"]))
            for key, value in data.get("tensors", {}).items()
        }
        rule.load_state_dict(tensors)
    except (TypeError, KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise PolicyError(f"The description of criterion {name!r} does not fit: {error}") from error
    return rule.eval()
