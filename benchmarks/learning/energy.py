"""Energy of an answer: an estimate from multiply-accumulates and bytes.

The figures of a 45 nm chip (Horowitz, "Computing's energy problem", ISSCC 2014): a multiplication
and an addition in float32 take 3.7 and 0.9 pJ, 32 bits from memory 640 pJ, 64 bits from a cache of
1 MB 100 pJ. Today's chips take less of each, in other proportions, so that only ratios count here.
Every weight comes from memory once for a single image, every activation is written to a cache and
read again.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.build.model import MultiExitModel

__all__ = ["estimate", "readable"]

PICOJOULES = {"mac": 4.6, "byte of a weight": 160.0, "byte of an activation": 12.5}
COUNTERS = Path("/sys/class/powercap")

Row = dict[str, Any]


def readable(folder: Path = COUNTERS) -> bool:
    """Whether this machine says what energy it has used (RAPL)."""
    for counter in folder.glob("*/energy_uj"):
        try:
            counter.read_text("utf-8")
        except OSError:
            continue
        return True
    return False


def estimate(model: MultiExitModel, example: Tensor, operating: Row) -> Row:
    """Microjoules of an answer at batch 1, without exits and with.

    Args:
        model: the network with its exits; what it has learned does not matter.
        example: (B, ...) images.
        operating: ``shares`` of the samples that leave at each exit, (E,), the last included; and
            ``heads``, (E - 1,): at what share of the samples each of them runs. A head whose exit
            is off does not; in a row that does not say so, exits at which nobody leaves are off.
    """
    stages, heads = _parts(model, example)
    shares = operating["shares"]
    reached = [sum(shares[k:]) for k in range(model.num_exits)]
    ran = operating.get("heads") or [r if s else 0.0 for r, s in zip(reached, shares, strict=True)]
    full = sum(_picojoules(part) for part in stages)
    early = sum(r * _picojoules(part) for r, part in zip(reached, stages, strict=True))
    early += sum(r * _picojoules(part) for r, part in zip(ran, heads, strict=False))
    return {
        "plain_microjoules": 1e-6 * full,
        "exits_microjoules": 1e-6 * early,
        "ratio": early / full,
        "macs_share": sum(_macs_share(stages)),
    }


def _parts(model: MultiExitModel, example: Tensor) -> tuple[list[Row], list[Row]]:
    """MACs, weights and activations of every stage and every head."""
    modules = {}
    for k in range(model.num_exits):
        modules |= {module: ("stage", k) for _, module in model.stage_modules(k)}
    for k, head in enumerate(model.heads):
        modules |= {module: ("head", k) for module in head.modules()}
    values: dict[tuple[str, int], int] = defaultdict(int)

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        values[modules[module]] += output[0].numel()

    leaves = [m for m in modules if not any(True for _ in m.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    with torch.no_grad():
        model.eval()(example)
    for hook in hooks:
        hook.remove()
    costs, last = model.costs, model.num_exits - 1
    weights = [sum(p.numel() for _, p in model.stage_parameters(k)) for k in range(last + 1)]
    of_heads = [sum(p.numel() for p in head.parameters()) for head in model.heads]
    stages = [
        {"macs": costs.stages[k], "weights": weights[k], "values": values["stage", k]}
        for k in range(last + 1)
    ]
    heads = [
        {"macs": costs.heads[k], "weights": of_heads[k], "values": values["head", k]}
        for k in range(last)
    ]
    return stages, heads


def _picojoules(part: Row) -> float:
    moved = 4 * PICOJOULES["byte of a weight"] * part["weights"]
    moved += 2 * 4 * PICOJOULES["byte of an activation"] * part["values"]
    return float(PICOJOULES["mac"] * part["macs"] + moved)


def _macs_share(stages: list[Row]) -> list[float]:
    """Of the estimate of the whole network, what its multiply-accumulates are, by stage."""
    full = sum(_picojoules(part) for part in stages)
    return [PICOJOULES["mac"] * part["macs"] / full for part in stages]
