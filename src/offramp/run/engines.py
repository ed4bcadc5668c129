"""How one stage is executed.

An engine takes a stage with its criterion, a plain module of tensors to tensors, and returns a
function over arrays of its own kind. It knows nothing of exits; the runner knows nothing of it.
"""

from __future__ import annotations

import importlib.util
import itertools
import mmap
import os
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor

from offramp.errors import DataError, MissingExtra, OfframpError, StageError, unknown_name
from offramp.run.rows import RowAxis

if TYPE_CHECKING:
    import onnx

    from offramp.run.chain import Link, Step

__all__ = [
    "Array",
    "Engine",
    "Inductor",
    "OnnxEngine",
    "OnnxRuntime",
    "OpenVINO",
    "StepCall",
    "StepCalls",
    "Torch",
    "engine_of",
    "sent",
    "tensor_of",
]

Array = Any  # a torch tensor or a numpy array, by the engine
StepCall = Callable[[Sequence[Array]], list[Array]]


class Engine(ABC):
    """Executes steps, and moves rows of the arrays that it computes on."""

    name: ClassVar[str]
    exact: ClassVar[bool] = False  # whether it computes the bits that eager torch computes
    device: torch.device = torch.device("cpu")  # where it computes

    @abstractmethod
    def load(self, steps: Sequence[Step]) -> Sequence[StepCall]:
        """Make steps executable: for each a function from its inputs to its outputs, as arrays."""

    @abstractmethod
    def array(self, value: Tensor | np.ndarray) -> Array:
        """The engine's own kind of array of a value, without a copy where possible."""

    def check(  # noqa: B027 - most engines take all that torch takes
        self, names: Sequence[str], values: Sequence[Tensor | np.ndarray]
    ) -> None:
        """Raise a DataError for inputs of a model that would be taken for something else."""

    def index(self, rows: np.ndarray) -> Array:
        """Rows (R,) as :meth:`take` and :meth:`scatter` want them: brought to a device once."""
        return rows

    @abstractmethod
    def take(self, value: Array, axis: RowAxis, index: Array) -> Array:
        """The part of ``value`` that belongs to the samples of an :meth:`index` of R rows."""

    @abstractmethod
    def host(self, value: Array) -> np.ndarray:
        """The value as a numpy array; the one point of synchronisation with a device."""

    def wait(self, value: Array) -> None:  # noqa: B027 - most engines compute at once
        """Return once ``value`` has been computed; only a device needs to wait."""

    def bucket(self, rows: int) -> int:
        """The batch size, ``rows`` or more, at which a step runs when ``rows`` are wanted."""
        return rows

    def trim(self, call: StepCall, inputs: Sequence[Array]) -> None:  # noqa: B027
        """Give back memory that earlier calls left behind, by a call on a small batch."""

    @abstractmethod
    def scatter(self, out: Array | None, value: Array, index: Array, samples: int) -> Array:
        """Write ``value`` (R, ...) at an :meth:`index` of R rows of ``out`` (samples, ...).

        ``out`` is made when it is ``None``.
        """


class _TorchArrays(Engine):
    """Engines that compute on torch tensors."""

    def serve(self, device: torch.device) -> None:
        """Compute there from now on.

        Raises:
            OfframpError: another runner has this engine, on another device.
        """
        if "device" in self.__dict__ and self.device != device:
            raise OfframpError(
                f"This engine serves a runner on {self.device}, and cannot serve one on {device} "
                f"as well. Give each its own, or the name: engine={self.name!r}."
            )
        self.device = device

    def array(self, value: Tensor | np.ndarray) -> Tensor:
        if not isinstance(value, Tensor):
            value = tensor_of(value)
        return sent(value, self.device)

    def wait(self, value: Tensor) -> None:
        if value.is_cuda:
            torch.cuda.synchronize(value.device)

    def bucket(self, rows: int) -> int:
        """On a device, powers of two: few shapes to choose kernels for and to keep memory of."""
        return rows if self.device.type == "cpu" else 1 << max(0, rows - 1).bit_length()

    def index(self, rows: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(rows), self.device)

    def take(self, value: Tensor, axis: RowAxis, index: Tensor) -> Tensor:
        # A network may lie on several devices.
        return axis.take(value, index.to(value.device))

    def host(self, value: Tensor) -> np.ndarray:
        return (value.detach() if value.requires_grad else value).cpu().numpy()

    def scatter(self, out: Tensor | None, value: Tensor, index: Tensor, samples: int) -> Tensor:
        if out is None:
            out = value.new_empty((samples, *value.shape[1:]))
        out[index.to(value.device)] = value
        return out


def tensor_of(value: np.ndarray) -> Tensor:
    """An array as a tensor, which may neither run backwards nor be read-only."""
    # To numpy an array is contiguous whichever way it runs through a dimension of one entry.
    if not value.flags.writeable or any(step < 0 for step in value.strides):
        value = value.copy()
    return torch.from_numpy(np.ascontiguousarray(value))


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Where it is wanted, without waiting where that is safe.

    CUDA has read what lies in pageable memory when the call returns; of pinned memory, and of what
    comes from a device or goes to another kind of one, that cannot be said.
    """
    at_once = device.type == "cuda" and value.is_cpu and not value.is_pinned()
    return value.to(device, non_blocking=at_once)


class Torch(_TorchArrays):
    """Eager torch: the operators of the exported graph, one after the other."""

    name = "torch"
    exact = True

    def load(self, steps: Sequence[Step]) -> list[StepCall]:
        """As in :class:`Engine`."""
        self.serve(steps[0].example[0].device)
        return [self._call(step) for step in steps]

    def _call(self, step: Step) -> StepCall:
        def call(values: Sequence[Array]) -> list[Array]:
            with torch.inference_mode():
                return list(step.module(*values))

        return call


class Inductor(_TorchArrays):
    """Stages compiled by ``torch.compile``: each has code of its own, for any batch size.

    Batches of one and of more are compiled apart, so a stage is compiled twice at most. Compiling
    takes tens of seconds and a C++ compiler.
    """

    name = "inductor"

    def load(self, steps: Sequence[Step]) -> list[StepCall]:
        """As in :class:`Engine`."""
        self.serve(steps[0].example[0].device)
        return [self._call(step) for step in steps]

    def _call(self, step: Step) -> StepCall:
        # Only the stage is compiled: its forward is its own code object, so that the stages do not
        # share (and exhaust) one cache of compiled variants.
        compiled = torch.compile(step.module.stage, dynamic=True)
        whole = step.module.with_stage(compiled)

        def call(values: Sequence[Array]) -> list[Array]:
            with torch.no_grad():
                return list(whole(*values))

        return call


class _NumpyArrays(Engine):
    """Engines that compute on numpy arrays."""

    def array(self, value: Tensor | np.ndarray) -> np.ndarray:
        if not isinstance(value, Tensor):
            return value
        try:
            return (
                value.detach().cpu().numpy()
                if value.requires_grad or not value.is_cpu
                else value.numpy()
            )
        except TypeError as error:
            kind = str(value.dtype).removeprefix("torch.")
            raise StageError(
                f"The engine {self.name!r} computes on arrays of numpy, which has no {kind}. Use "
                "engine='torch', or a model in float32."
            ) from error

    def take(self, value: np.ndarray, axis: RowAxis, index: np.ndarray) -> np.ndarray:
        if axis.multiple == 1:
            return np.take(value, index, axis=axis.dim)
        return axis.take(tensor_of(value), torch.from_numpy(index)).numpy()

    def host(self, value: np.ndarray) -> np.ndarray:
        return value

    def scatter(
        self, out: np.ndarray | None, value: np.ndarray, index: np.ndarray, samples: int
    ) -> np.ndarray:
        if out is None:
            out = np.empty((samples, *value.shape[1:]), value.dtype)
        out[index] = value
        return out


class StepCalls(Sequence[StepCall]):
    """Steps made executable, whose memory can be freed until one of them is asked for again.

    Attributes:
        whole: all steps in one call, as :func:`offramp.run.onnx_rule.join` describes it; ``None``
            where the engine, or this model, has none.
        limits: the thresholds that this call has by itself.

    Args:
        load: makes them executable, now and after a release.
        whole: see above.
        limits: see above.
    """

    def __init__(
        self,
        load: Callable[[], list[StepCall]],
        whole: StepCall | None,
        limits: Sequence[float],
    ) -> None:
        self.whole = whole
        self.limits = tuple(limits)
        self._load = load
        # At once, so that an engine that cannot execute them says so here.
        self._loaded: list[StepCall] | None = load()
        self._count = len(self._loaded)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> StepCall: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepCall]: ...
    def __getitem__(self, index: int | slice) -> StepCall | list[StepCall]:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded[index]

    def release(self) -> None:
        """Free the memory that the steps take, until one is asked for again."""
        with self._lock:
            self._loaded = None


class OnnxEngine(_NumpyArrays):
    """Engines that execute ONNX."""

    joins: ClassVar[bool] = False  # whether all steps are also had in one call

    @abstractmethod
    def session(self, model: bytes) -> StepCall:
        """A function over arrays, in the order of the model's inputs and outputs."""

    def joined_session(self, model: onnx.ModelProto) -> StepCall:
        """The same for what :func:`offramp.run.onnx_rule.join` made."""
        return self.session(model.SerializeToString())

    def load(self, steps: Sequence[Step]) -> StepCalls:
        """As in :class:`Engine`."""
        from offramp.run.onnx import convert, split

        model = convert(steps)
        stages = [one.SerializeToString() for one in split(model, steps)]
        finite = [v.is_floating_point() and bool(v.isfinite().all()) for v in steps[0].example]
        return self.calls(model, steps, stages, finite)

    def calls(
        self,
        model: onnx.ModelProto,
        links: Sequence[Link],
        stages: Sequence[bytes],
        finite: Sequence[bool],
    ) -> StepCalls:
        """Converted steps, executable.

        Args:
            model: what :func:`offramp.run.onnx.convert` or :func:`~offramp.run.onnx_rule.connect`
                made.
            links: the steps.
            stages: the model of each of them.
            finite: for each input of the model, whether it has to be finite.
        """
        from offramp.run.onnx_rule import join

        kept = _put_aside(stages)

        def load() -> list[StepCall]:
            return [self.session(one) for one in kept()]

        whole = None
        selects = any(axis.of for link in links for axis in link.rows.values() if axis is not None)
        if self.joins and not selects:
            whole = self.joined_session(join(model, links, finite))
        return StepCalls(load, whole, [link.threshold for link in links[:-1]])


def _put_aside(models: Sequence[bytes]) -> Callable[[], list[bytes]]:
    """Keep models on the disk rather than in memory, as long as what reads them is kept."""
    sizes = [len(model) for model in models]
    ends = list(itertools.accumulate(sizes))
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        try:
            file.writelines(models)
            file.flush()
        except OSError:
            file.close()
            raise
    except OSError:  # no room, or no folder that can be written to
        held = list(models)
        return lambda: held

    def read() -> list[bytes]:
        # Not by seeking: processes that were forked share the place where a file is read.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return [content[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    weakref.finalize(read, file.close)
    return read


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not every system has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OnnxRuntime(OnnxEngine):
    """ONNX Runtime on the CPU, one session a stage.

    Args:
        threads: threads of each session; default: one for each core. They sleep between stages,
            so that the threads of one session do not take the cores from the next.
    """

    name = "onnxruntime"
    joins = True

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or _cores()

    def session(self, model: bytes) -> StepCall:
        """As in :class:`OnnxEngine`."""
        return _Session(self._made(model, self._options()))

    def joined_session(self, model: onnx.ModelProto) -> StepCall:
        """As in :class:`OnnxEngine`; rows are taken from maps in the layout that they have."""
        raw = model.SerializeToString()
        if any(node.op_type == "Conv" for node in model.graph.node):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    return _Session(self._in_blocks(raw, f"{folder}/model.onnx"))
            except Exception:  # noqa: S110
                # No room for the file, say. Nothing is lost without it: the model is loaded as it
                # is, and if it was the model that failed, it fails here again and is told.
                pass
        return self.session(raw)

    def _in_blocks(self, model: bytes, path: str) -> Any:  # noqa: ANN401
        import onnx
        import onnxruntime

        from offramp.run.onnx_blocked import take_in_blocks

        options = self._options()
        options.optimized_model_filepath = path
        session = self._made(model, options)
        optimised = onnx.load(path)
        if not take_in_blocks(optimised):
            return session
        onnx.save(optimised, path)
        del session, optimised  # not both are held in memory
        options = self._options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._made(path, options)

    def _options(self) -> Any:  # noqa: ANN401
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        # A plan of the memory for every size of a batch would be kept beside what the arena holds.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if _one_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        return options

    def _made(self, model: bytes | str, options: Any) -> Any:  # noqa: ANN401
        import onnxruntime

        try:
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no base but this
            raise _cannot("ONNX Runtime", error) from error

    def trim(self, call: StepCall, inputs: Sequence[Array]) -> None:
        """As in :class:`Engine`."""
        if isinstance(call, _Session):
            call.trim(inputs)


class _Session:
    """A session of ONNX Runtime as a function over arrays."""

    def __init__(self, session: Any) -> None:  # noqa: ANN401
        self._session = session
        # Inputs with a default (the thresholds of a file) come last, and need not be given.
        known = (*session.get_inputs(), *session.get_overridable_initializers())
        self._names = [value.name for value in known]
        self._outputs = [value.name for value in session.get_outputs()]

    def __call__(self, values: Sequence[Array]) -> list[Array]:
        given = dict(zip(self._names, values, strict=False))
        found: list[Array] = self._session.run(self._outputs, given)
        return found

    def trim(self, values: Sequence[Array]) -> None:
        """Run once, and then give back what the arena holds."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run(self._outputs, dict(zip(self._names, values, strict=False)), options)


def _cannot(what: str, error: Exception) -> StageError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return StageError(
        f"{what} cannot execute this model: {reason[:300]} Use engine='torch', another dtype, or "
        "another operator in its place."
    )


@cache
def _one_arena() -> bool:
    """Let all stages take their activations from one arena, as if they were one network.

    Each would otherwise keep the memory of its own, and find it cold in the caches.
    """
    import onnxruntime as ort

    try:
        kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
        memory = ort.OrtMemoryInfo("Cpu", kind, 0, ort.OrtMemType.DEFAULT)
        # 1: grow by what is asked for, not by doubling.
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
    except Exception:  # a build without arenas, or the program registered its own
        return False
    return True


class OpenVINO(OnnxEngine):
    """OpenVINO on the CPU, in float32.

    Args:
        threads: threads of each stage; default: one for each core.

    Raises:
        MissingExtra: the package openvino is not installed.
    """

    name = "openvino"

    def __init__(self, threads: int | None = None) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise MissingExtra("openvino", "openvino", "The engine 'openvino'")
        self.threads = threads or _cores()

    def check(self, names: Sequence[str], values: Sequence[Tensor | np.ndarray]) -> None:
        """It computes on integers in 32 bits, and would cut longer ones without a word."""
        kept = np.iinfo(np.int32)
        for name, value in zip(names, values, strict=True):
            if value.dtype not in (np.int64, torch.int64) or 0 in value.shape:
                continue
            low, high = int(value.min()), int(value.max())
            if low < kept.min or high > kept.max:
                raise DataError(
                    f"Input {name!r} has values from {low} to {high}, and OpenVINO keeps 32 bits "
                    "of an integer. Use engine='onnxruntime'."
                )

    def session(self, model: bytes) -> StepCall:
        """As in :class:`OnnxEngine`."""
        import onnx
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # some CPUs would compute in bfloat16
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            compiled = core.compile_model(core.read_model(model), "CPU", settings)
        except RuntimeError as error:
            raise _cannot("OpenVINO", error) from error
        # It drops inputs that nothing reads.
        ports = {name for port in compiled.inputs for name in port.get_names()}
        names = [value.name for value in onnx.load_from_string(model).graph.input]
        read = [i for i, name in enumerate(names) if name in ports]
        local = threading.local()  # a request serves one thread at a time

        def call(values: Sequence[Array]) -> list[Array]:
            if not hasattr(local, "request"):
                local.request = compiled.create_infer_request()
            found = local.request.infer([values[i] for i in read], share_inputs=True)
            return [np.array(found[i]) for i in range(len(compiled.outputs))]

        return call


_ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Torch, Inductor, OnnxRuntime, OpenVINO)
}


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
