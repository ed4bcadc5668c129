"""Random weights that tell one sample from another, whatever a network is initialised with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["redraw", "sharpen"]

SMALL = 1e-3  # a scale of this size or less hides the branch that it multiplies
WANTED = 0.05  # deviation of logits between samples
CENTRED = 0.5  # share of the channel's mean that batch norm takes away
STRONGEST = 50.0  # more would show rounding errors instead of the samples


@torch.no_grad()
def redraw(model: nn.Module, run: Callable[[], object]) -> nn.Module:
    """Draw anew what is initialised to nothing, and disturb what is initialised to the identity.

    Zero weights (heads, last layers of branches) and the tiny scales of branches would make all
    samples alike, and equality would say nothing. Batch norm gets the statistics of some samples,
    disturbed a little: those it starts with (0 and 1) let the signal die away in deep networks.

    Args:
        model: the network.
        run: calls it on some samples.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if parameter.abs().max() > SMALL:
            continue
        if parameter.ndim > 1 and parameter.abs().max() == 0:
            inputs = parameter[0].numel()
            parameter.normal_(std=min(0.5, inputs**-0.5))
        elif "bias" in name:
            parameter.normal_(std=0.02)
        else:
            parameter.uniform_(0.2, 0.6)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    model.eval()
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return model


def _take_statistics(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
    """Statistics near those of ``x`` (B, C, ...), that blow up no channel which hardly varies.

    What all samples share is removed in part, and all channels are scaled alike: else each layer
    would raise rounding errors as much as it raises what tells the samples apart.
    """
    (x,) = inputs
    dims = [d for d in range(x.ndim) if d != 1]
    mean = CENTRED * x.mean(dims)
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    power = float((x - mean.view(shape)).square().mean()) + 1e-12
    norm.running_mean.copy_(mean + 0.05 * power**0.5 * torch.randn_like(mean))
    norm.running_var.copy_(power * torch.empty_like(mean).uniform_(0.8, 1.2))


@torch.no_grad()
def sharpen(model: nn.Module, classes: int, run: Callable[[], object]) -> None:
    """Scale and centre the last linear layers where their logits hardly differ between samples.

    Args:
        model: with classifiers that are linear layers or convolutions of ``classes`` outputs.
        classes: their width.
        run: calls the model on some samples.
    """
    seen: dict[nn.Module, Tensor] = {}
    last = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == classes
    ]
    hooks = [m.register_forward_hook(lambda m, _, out: seen.update({m: out})) for m in last]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for module, logits in seen.items():
        channel = 1 if isinstance(module, nn.Conv2d) else logits.ndim - 1
        dims = tuple(d for d in range(logits.ndim) if d != channel)
        factor = float((WANTED / logits.std(0).mean().clamp(min=1e-9)).clamp(1.0, STRONGEST))
        if factor > 1.0:
            if module.bias is not None:
                module.bias.copy_((module.bias - logits.mean(dims)) * factor)
            module.weight.mul_(factor)
