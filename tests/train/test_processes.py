"""Two processes on one machine (gloo) end with the parameters of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from offramp.build.model import MultiExitModel
from offramp.train.losses import cross_entropy
from offramp.train.objectives import Distill
from offramp.train.schemes import Alternating, Layerwise, Mixed, Scheme, as_plan
from tests.train.tiny import data_of, plain_model_of

BATCH = 16  # of both processes together

SCHEMES: dict[str, Scheme] = {
    "mixed-distill": Mixed(Distill(), weights="linear"),
    "layerwise": Layerwise(),
    "alternating": Alternating(),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def loader_for(processes: int, rank: int) -> DataLoader[tuple[Tensor, ...]]:
    """The share of one process; together the shares are the batches of one process."""
    data = TensorDataset(*data_of(64))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    return DataLoader(data, BATCH // processes, sampler=sampler)


def plain_loop(processes: int, rank: int) -> tuple[MultiExitModel, dict[str, float]]:
    model = plain_model_of()
    ready = DistributedDataParallel(model) if processes > 1 else model
    optimizer = sgd(model.parameters())
    for _ in range(3):
        for x, y in loader_for(processes, rank):
            loss = cross_entropy(ready(x), y, [0.5, 0.5, 1.0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, {}


def with_lightning(
    scheme: Scheme, processes: int, rank: int
) -> tuple[MultiExitModel, dict[str, float]]:
    import lightning.pytorch as pl  # here, as half of the time of a process goes into it
    from lightning.pytorch.strategies import DDPStrategy

    from offramp.train import ExitLogger, ExitModule

    model = plain_model_of()
    logged: dict[str, float] = {}
    for phase in as_plan(scheme, model.num_exits, epochs=3):
        turns = bool(phase.turns)
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=turns)
        trainer = pl.Trainer(
            max_epochs=phase.epochs,
            accelerator="cpu",
            devices=processes,
            strategy=strategy if processes > 1 else "auto",
            callbacks=[ExitLogger()],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = loader_for(processes, rank)
        trainer.fit(ExitModule(model, phase, optimizer=sgd), loader, loader)
        logged |= {f"{phase.name}/{k}": float(v) for k, v in trainer.callback_metrics.items()}
    return model, logged


RUNS: dict[str, Callable[[int, int], tuple[MultiExitModel, dict[str, float]]]] = {
    "plain": plain_loop,
    **{
        name: lambda processes, rank, scheme=scheme: with_lightning(scheme, processes, rank)
        for name, scheme in SCHEMES.items()
    },
}


def run_as(rank: int, folder: Path, names: list[str]) -> None:
    """One of two processes: some runs, one after the other."""
    store = (folder / "store").as_uri()
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name in names:
        model, logged = RUNS[name](2, rank)
        save_file(model.state_dict(), folder / f"{name}.{rank}.safetensors")
        (folder / f"{name}.{rank}.json").write_text(json.dumps(logged))
        distributed.barrier()
        if not distributed.is_initialized():
            raise RuntimeError("A Trainer has ended what it did not begin.")
    distributed.destroy_process_group()


def two_processes(folder: Path, names: list[str]) -> Path:
    """What two processes wrote."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "src")])
    started = []
    for rank in range(2):
        code = (
            "import pathlib, sys; from tests.train.test_processes import run_as;"
            f"run_as({rank}, pathlib.Path(sys.argv[1]), sys.argv[2:])"
        )
        environment = {"PYTHONPATH": path, "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
        started.append(
            subprocess.Popen(  # noqa: S603
                [sys.executable, "-W", "ignore", "-c", code, str(folder), *names],
                env=os.environ | environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said[0] + said[1]
    return folder


def test_two_processes_end_where_one_ends(tmp_path: Path) -> None:
    check("plain", two_processes(tmp_path, ["plain"]))


@pytest.fixture(scope="module")
def with_lightning_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_processes(tmp_path_factory.mktemp("processes"), list(SCHEMES))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_two_processes_of_lightning_end_where_one_ends(
    name: str, with_lightning_results: Path
) -> None:
    check(name, with_lightning_results)


def check(name: str, results: Path) -> None:
    """Both wrote the same parameters, those of one process, and logged what it logs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on small trainings
        model, logged = RUNS[name](1, 0)
    first, second = (load_file(results / f"{name}.{rank}.safetensors") for rank in range(2))
    before = plain_model_of().state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-5, msg=key)
        assert (value - before[key]).abs().max() > 1e-3, key
    for rank in range(2):
        told = json.loads((results / f"{name}.{rank}.json").read_text())
        assert told == pytest.approx(logged, abs=1e-5)
