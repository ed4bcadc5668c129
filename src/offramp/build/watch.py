"""Watching a pass: hooks on every module for its duration, and a backbone left as found."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offramp.build.attention import plain_attention
from offramp.build.flow import FlowRecorder
from offramp.build.layout import ChannelUse, channel_made, channel_use
from offramp.build.outputs import tensors_in
from offramp.build.unchanged import buffers_kept, without_autocast

__all__ = ["ClockWatch", "FlowWatch", "Seen", "SeenTensor", "Watch", "as_found"]


@dataclass(frozen=True)
class SeenTensor:
    """One tensor of an output: what is kept of it after the pass."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: int | None = None


@dataclass
class Seen:
    """What was seen of one call of one module; instants are seconds or operations."""

    path: str
    index: int
    kind: str
    depth: int
    parent: int
    order: int = -1
    tensors: list[SeenTensor] = field(default_factory=list)
    began: int = 0
    ended: int = 0
    before: float = 0.0
    after: float = 0.0
    uses: ChannelUse | None = None
    makes: ChannelUse | None = None


class Watch:
    """Hooks on every module, from construction to the end of the ``with`` block.

    Attributes:
        calls: what was seen, in the order in which the calls began.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.calls: list[Seen] = []
        self._open: list[int] = []
        self._times: dict[str, int] = {}
        self._ended = 0
        self._handles: list[Any] = []
        for path, module in backbone.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            before, after = self._hooks(path)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(after))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def restart(self) -> None:
        """Forget what was seen."""
        self.calls, self._open, self._times, self._ended = [], [], {}, 0

    def began(self, call: Seen, module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        """What to note when a call begins."""

    def ended(self, call: Seen, module: nn.Module, output: Any) -> None:  # noqa: ANN401
        """What to note when a call ends: the shapes."""
        call.tensors = [SeenTensor(tuple(t.shape), t.dtype, t.device) for t in tensors_in(output)]

    def _hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
            index = self._times.get(path, 0)
            self._times[path] = index + 1
            parent = self._open[-1] if self._open else -1
            call = Seen(path, index, type(module).__name__, len(self._open), parent)
            self._open.append(len(self.calls))
            self.calls.append(call)
            self.began(call, module, (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            call = self.calls[self._open.pop()]
            call.order = self._ended
            self._ended += 1
            self.ended(call, module, output)

        return before, after


class FlowWatch(Watch):
    """Notes operations and values; the recorder must be active during the pass."""

    def __init__(self, backbone: nn.Module, recorder: FlowRecorder) -> None:
        super().__init__(backbone)
        self.recorder = recorder

    def began(self, call: Seen, module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        """Work done so far, and how the module takes its first input."""
        call.began, call.before = self.recorder.time, self.recorder.flops
        taken = tensors_in(inputs)
        if taken:
            value = self.recorder.value_of(taken[0])
            call.uses = channel_use(module, tuple(taken[0].shape), value)

    def ended(self, call: Seen, module: nn.Module, output: Any) -> None:  # noqa: ANN401
        """Work done so far, and the tensors that came out, the first one's channels too."""
        call.ended, call.after = self.recorder.time, self.recorder.flops
        call.tensors = [
            SeenTensor(tuple(t.shape), t.dtype, t.device, self.recorder.value_of(t))
            for t in tensors_in(output)
        ]
        if call.tensors:
            first = call.tensors[0]
            call.makes = channel_made(module, first.shape, first.value)


class ClockWatch(Watch):
    """Notes instants, after the work of the device is done."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        on_accelerator = any(p.device.type not in ("cpu", "meta") for p in backbone.parameters())
        self._wait = torch.accelerator.synchronize if on_accelerator else _nothing

    def began(self, call: Seen, module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        """The instant."""
        self._wait()
        call.before = time.perf_counter()

    def ended(self, call: Seen, module: nn.Module, output: Any) -> None:  # noqa: ANN401
        """The instant."""
        self._wait()
        call.after = time.perf_counter()


def _nothing() -> None:
    """On a CPU there is nothing to wait for."""


@contextlib.contextmanager
def as_found(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; flags, buffers, random state as they were."""
    flags = [(module, module.training) for module in backbone.modules()]
    places = {p.device for p in backbone.parameters()}
    devices = sorted((place for place in places if place.type == "cuda"), key=str)
    backbone.eval()
    try:
        with (
            plain_attention(),
            buffers_kept(backbone),
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            without_autocast(backbone),
        ):
            yield
    finally:
        for module, training in flags:
            module.training = training
