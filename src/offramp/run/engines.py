"""How one stage is executed.

An engine takes a stage with its criterion, a plain module of tensors to tensors, and returns a
function over arrays of its own kind. It knows nothing of exits; the runner knows nothing of it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import OfframpError, unknown_name
from offramp.run.chain import Step
from offramp.run.stages import RowAxis

__all__ = ["Array", "Engine", "OnnxRuntime", "StepCall", "Torch", "engine_of"]

Array = Any  # a torch tensor or a numpy array, by the engine
StepCall = Callable[[Sequence[Array]], list[Array]]


class Engine(ABC):
    """Executes steps, and moves rows of the arrays that it computes on."""

    name: ClassVar[str]
    exact: ClassVar[bool] = False  # whether it computes the bits that eager torch computes

    @abstractmethod
    def load(self, steps: Sequence[Step]) -> list[StepCall]:
        """Make steps executable: for each a function from its inputs to its outputs, as arrays."""

    @abstractmethod
    def array(self, value: Tensor | np.ndarray) -> Array:
        """The engine's own kind of array of a value, without a copy where possible."""

    @abstractmethod
    def take(self, value: Array, axis: RowAxis, rows: np.ndarray) -> Array:
        """The part of ``value`` that belongs to the samples ``rows`` (R,)."""

    @abstractmethod
    def host(self, value: Array) -> np.ndarray:
        """The value as a numpy array; the one point of synchronisation with a device."""

    @abstractmethod
    def scatter(self, out: Array | None, value: Array, rows: np.ndarray, samples: int) -> Array:
        """Write ``value`` (R, ...) at ``rows`` of ``out`` (samples, ...), made when ``None``."""


class _TorchArrays(Engine):
    """Engines that compute on torch tensors."""

    device: torch.device = torch.device("cpu")

    def array(self, value: Tensor | np.ndarray) -> Tensor:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
        return tensor.to(self.device)

    def take(self, value: Tensor, axis: RowAxis, rows: np.ndarray) -> Tensor:
        return axis.take(value, torch.from_numpy(rows).to(value.device))

    def host(self, value: Tensor) -> np.ndarray:
        return value.cpu().numpy()

    def scatter(
        self, out: Tensor | None, value: Tensor, rows: np.ndarray, samples: int
    ) -> Tensor:
        if out is None:
            out = value.new_empty((samples, *value.shape[1:]))
        out[torch.from_numpy(rows).to(value.device)] = value
        return out


class Torch(_TorchArrays):
    """Eager torch: the operators of the exported graph, one after the other."""

    name = "torch"
    exact = True

    def load(self, steps: Sequence[Step]) -> list[StepCall]:
        self.device = steps[0].example[0].device
        return [self._call(step.module) for step in steps]

    def _call(self, module: nn.Module) -> StepCall:
        def call(values: Sequence[Array]) -> list[Array]:
            with torch.inference_mode():
                return list(module(*values))

        return call


class _NumpyArrays(Engine):
    """Engines that compute on numpy arrays."""

    def array(self, value: Tensor | np.ndarray) -> np.ndarray:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else value

    def take(self, value: np.ndarray, axis: RowAxis, rows: np.ndarray) -> np.ndarray:
        if axis.multiple == 1:
            return np.take(value, rows, axis=axis.dim)
        return axis.take(torch.from_numpy(value), torch.from_numpy(rows)).numpy()

    def host(self, value: np.ndarray) -> np.ndarray:
        return value

    def scatter(
        self, out: np.ndarray | None, value: np.ndarray, rows: np.ndarray, samples: int
    ) -> np.ndarray:
        if out is None:
            out = np.empty((samples, *value.shape[1:]), value.dtype)
        out[rows] = value
        return out


class OnnxRuntime(_NumpyArrays):
    """ONNX Runtime on the CPU, one session a stage, all on one thread pool.

    Args:
        threads: threads of the pool; default: one for each core. The pool belongs to the process,
            so the first engine made with more than one thread sizes it for all.
    """

    name = "onnxruntime"
    _pool: ClassVar[int | None] = None

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))

    def load(self, steps: Sequence[Step]) -> list[StepCall]:
        from offramp.run.onnx import convert, split

        return [self.session(m.SerializeToString()) for m in split(convert(steps), steps)]

    def session(self, model: bytes | str) -> StepCall:
        """A function over arrays from an ONNX model, its bytes or its path."""
        import onnxruntime

        session = onnxruntime.InferenceSession(
            model, self.options(), providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_inputs()]

        def call(values: Sequence[Array]) -> list[Array]:
            return list(session.run(None, dict(zip(names, values, strict=True))))

        return call

    def options(self) -> Any:  # noqa: ANN401
        """Session options: the shared pool, and quiet."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.threads == 1:  # no pool at all
            options.intra_op_num_threads = 1
            return options
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


_ENGINES: dict[str, type[Engine]] = {"torch": Torch, "onnxruntime": OnnxRuntime}


def engine_of(engine: str | Engine) -> Engine:
    """The engine of that name, or the instance itself.

    Raises:
        OfframpError: an unknown name; the known ones and the nearest are named.
    """
    if isinstance(engine, Engine):
        return engine
    if engine not in _ENGINES:
        raise OfframpError(unknown_name("engine", engine, list(_ENGINES)))
    return _ENGINES[engine]()
