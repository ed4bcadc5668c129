"""What training with exits takes beyond training the plain network: time of a step, and memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import offramp
from benchmarks.learning.settings import PLAIN, SETTINGS
from benchmarks.learning.tasks import BATCH, TASKS, Task
from offramp.build.model import MultiExitModel
from offramp.train.optimizers import adamw
from offramp.train.precision import AUTO, fastest_precision

__all__ = ["TIMED", "measure_memory", "measure_steps"]

TIMED = ("joint", "joint_distill")
HEADS = "heads alone"
SHAPES = {"Fashion-MNIST": (1, 28, 28), "CIFAR-10 (JPEG)": (3, 32, 32)}

Row = dict[str, Any]


class Clocked:
    """The same few batches again and again; notes when each of them is fetched.

    Attributes:
        times: processor seconds from one fetch to the next, so that others on the machine do not
            count; those of the first walk are left out: in it, ``fit`` remembers the samples.
    """

    def __init__(self, task: Task, steps: int) -> None:
        shape = SHAPES[task.data]
        generator = torch.Generator().manual_seed(0)
        self.batch = (
            torch.randn(BATCH, *shape, generator=generator),
            torch.randint(0, 10, (BATCH,), generator=generator),
        )
        self.steps, self.epoch = steps, 0
        self.times: list[float] = []

    def set_epoch(self, epoch: int) -> None:
        """Called by ``fit`` before each walk."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        before = None
        for _ in range(self.steps):
            now = time.process_time()
            if before is not None and self.epoch:
                self.times.append(now - before)
            before = now
            yield self.batch


def _half() -> torch.autocast:
    """As ``fit`` computes here by itself."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fastest_precision("cpu") == "bf16-mixed")


def by_hand(network: nn.Module, loader: Clocked) -> None:
    """The plain network in the shortest loop there is: two walks, nothing counted or kept."""
    network.train().to(memory_format=torch.channels_last)
    optimizer = adamw(network.parameters())
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            with _half():
                logits = network(x)
            loss = functional.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def by_fit(model: MultiExitModel, loader: Clocked, setting: str) -> None:
    """All exits, by ``fit``: two walks."""
    model.to(memory_format=torch.channels_last)
    offramp.fit(
        model,
        loader,
        scheme=SETTINGS[setting].scheme,
        epochs=2,
        precision=AUTO,
        progress=False,
    )


def heads_by_hand(model: MultiExitModel, loader: Clocked) -> None:
    """The heads alone, on features that are there already: what their arithmetic takes."""
    model.train().to(memory_format=torch.channels_last)
    features = []
    taps = [model.backbone.get_submodule(place) for place in model.places[: len(model.heads)]]
    hooks = [
        t.register_forward_hook(lambda _, __, out: features.append(out.detach())) for t in taps
    ]
    with torch.no_grad(), _half():
        model.backbone(loader.batch[0])
    for hook in hooks:
        hook.remove()
    features = [feature.requires_grad_() for feature in features]
    optimizer = adamw(model.heads.parameters())
    for epoch in range(2):
        loader.set_epoch(epoch)
        for _, y in loader:
            with _half():
                logits = [head(x) for head, x in zip(model.heads, features, strict=True)]
            loss = torch.stack([functional.cross_entropy(z.float(), y) for z in logits]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def candidates(task: Task, data: Path) -> dict[str, Any]:
    """What is compared: functions of a loader."""
    network = task.backbone(data)
    example = Clocked(task, 1).batch[0][:4]
    model = offramp.attach(task.backbone(data), example, exits=list(task.exits), heads=task.heads)
    made = {PLAIN: partial(by_hand, network), HEADS: partial(heads_by_hand, model)}
    return made | {name: partial(by_fit, model, setting=name) for name in TIMED}


def measure_steps(task: Task, data: Path, rounds: int, steps: int) -> list[Row]:
    """Time of a step with exits, beside that of the plain network, in turn in one process.

    Args:
        task: the network; its images are replaced by random ones, which take the same time.
        data: the folder of data.
        rounds: how often each comes on.
        steps: of each walk.
    """
    compared = candidates(task, data)
    clocks = {name: Clocked(task, steps) for name in compared}
    for _ in range(rounds):
        for name, call in compared.items():
            call(clocks[name])
    model = compared[TIMED[0]].args[0]
    share = sum(model.costs.heads) / model.costs.full
    took = {name: median(clock.times) for name, clock in clocks.items()}
    return [
        {
            "task": task.name,
            "setting": name,
            "steps": len(clocks[name].times),
            "plain_ms": 1e3 * took[PLAIN],
            "exits_ms": 1e3 * took[name],
            "ratio": took[name] / took[PLAIN],
            "heads_share_of_macs": share,
            "heads_share_of_time": took[HEADS] / took[PLAIN],
            "ratio_less_heads": took[name] / took[PLAIN] - share,
        }
        for name in TIMED
    ]


def measure_memory(task: Task, data: Path) -> list[Row]:
    """The most memory that training takes, each candidate in a process of its own."""
    peaks = {}
    for name in (PLAIN, *TIMED):
        command = [sys.executable, "-m", "benchmarks.learning.steps", task.name, name, str(data)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"The measuring process failed:\n{done.stderr}")
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    return [
        {
            "task": task.name,
            "setting": name,
            "plain_mb": peaks[PLAIN],
            "exits_mb": peaks[name],
            "ratio": peaks[name] / peaks[PLAIN],
        }
        for name in TIMED
    ]


def _resident(key: str) -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _peak(task: Task, name: str, data: Path) -> float:
    """MB beyond what is resident once everything is imported."""
    import lightning.pytorch  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = _resident("VmRSS")
    candidates(task, data)[name](Clocked(task, 3))
    return _resident("VmHWM") - before


if __name__ == "__main__":
    wanted, setting, folder = sys.argv[1:]
    print(json.dumps(_peak(TASKS[wanted], setting, Path(folder))))
