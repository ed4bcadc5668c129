"""Taking features out of a running backbone without touching it.

Hooks stay on the tapped modules from attach() to detach(), and do nothing unless this thread is
running this model: what is captured lives in thread-local storage, never on a module. A backbone
that is called by itself, in this or another thread, is as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from offramp.build.attention import plain_attention
from offramp.build.outputs import tensors_in
from offramp.errors import PlaceError

if TYPE_CHECKING:
    from offramp.build.placement import Place

__all__ = ["Taps"]

_active = threading.local()
# In evaluation their fused path calls no submodules, and hands on nested tensors.
_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Owner:
    """Identity of a model. Its hooks hold it too, and deep copies of both stay together."""


class Capture:
    """The features of one pass: place -> tensor, and its version where it is no copy."""

    def __init__(self, copies: bool) -> None:
        self.features: dict[int, Tensor] = {}
        self.versions: dict[int, int] = {}
        self.calls: dict[str, int] = {}
        self.copies = copies
        self.learns = torch.is_grad_enabled()


class TapHook:
    """Forward hook of one tapped module.

    Args:
        owner: of the model that this hook serves.
        path: of the module.
        exits: number of the call -> index of the exit there, and which tensor of the output.
        copied: exits whose feature is written over later in the pass, and so must be copied.
    """

    def __init__(
        self, owner: Owner, path: str, exits: dict[int, tuple[int, int]], copied: Sequence[int] = ()
    ) -> None:
        self.owner = owner
        self.path = path
        self.exits = exits
        self.copied = frozenset(copied)

    def __call__(self, module: Any, args: Any, output: Any) -> None:  # noqa: ANN401
        """Note the output if a capture of this owner is active in this thread."""
        capture: Capture | None = getattr(_active, "captures", {}).get(id(self.owner))
        if capture is None:
            return
        call = capture.calls.get(self.path, 0)
        capture.calls[self.path] = call + 1
        if call not in self.exits:
            return
        index, item = self.exits[call]
        tensors = tensors_in(output)
        if item >= len(tensors):
            raise PlaceError(f"The output of {self.path!r} is no tensor in this pass.")
        if capture.learns and module.training and not torch.is_grad_enabled():
            self._check_frozen(module)
        tensor = tensors[item]
        if capture.copies or index in self.copied:
            tensor = tensor.clone()
        elif capture.learns and not (torch.compiler.is_compiling() or tensor.is_inference()):
            # Compilers and inference mode know no versions.
            capture.versions[index] = tensor._version
        capture.features[index] = tensor

    def _check_frozen(self, module: nn.Module) -> None:
        """Refuse weights that are to learn where no gradient would come to them from the exit."""
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise PlaceError(
                f"Gradients are off inside {self.path!r} in a pass that trains, so that its exit "
                "would train nothing but its head. In gradient checkpointing, pass "
                "use_reentrant=False. If the module runs under no_grad on purpose, freeze it: "
                "module.requires_grad_(False)."
            )


class Taps:
    """The hooks of one model.

    Args:
        backbone: whose modules are tapped.
        places: where, in order of execution.
    """

    def __init__(self, backbone: nn.Module, places: Sequence[Place]) -> None:
        copied = [index for index, place in enumerate(places) if place.copied]
        self.owner = Owner()
        self.names = tuple(place.name for place in places)
        exits: dict[str, dict[int, tuple[int, int]]] = {}
        for index, place in enumerate(places):
            exits.setdefault(place.path, {})[place.call] = (index, place.item)
        self._handles = [
            backbone.get_submodule(path).register_forward_hook(
                TapHook(self.owner, path, calls, copied)
            )
            for path, calls in exits.items()
        ]
        modules = list(backbone.modules())
        self._fused = any(isinstance(module, _FUSED) for module in modules)
        # They write over features in training only, which the profile does not see.
        self._overwrite = [m for m in modules if isinstance(m, _DropoutNd) and m.inplace]

    def run(
        self, backbone: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Tensor], Any]:
        """Call the backbone; return the tapped features and what it returned.

        Raises:
            PlaceError: a tapped module did not run, ran without the gradients it is to learn by, or
                its output was written over.
        """
        captures: dict[int, Capture] = _active.__dict__.setdefault("captures", {})
        copies = any(module.training for module in self._overwrite)
        key, capture = id(self.owner), Capture(copies)
        outer = captures.get(key)
        captures[key] = capture
        try:
            with plain_attention() if self._fused else nullcontext():
                output = backbone(*args, **kwargs)
        finally:
            captures.pop(key)
            if outer is not None:
                captures[key] = outer
        missing = [name for k, name in enumerate(self.names) if k not in capture.features]
        if missing:
            raise PlaceError(
                f"No feature came from {', '.join(map(repr, missing))} in this pass. Either the "
                "module did not run (do training and evaluation mode of the backbone differ?) or "
                "the model was detached. Place the exit at a module that always runs."
            )
        features = [capture.features[k] for k in range(len(self.names))]
        for k, version in capture.versions.items():
            if features[k]._version != version:
                raise PlaceError(
                    f"The feature at {self.names[k]!r} was written over later in this pass, as it "
                    "was not when the exit was attached, so that the exit would see something "
                    "else. What writes in place in training alone, such as "
                    "dropout(..., inplace=True), needs inplace=False."
                )
        return features, output

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
