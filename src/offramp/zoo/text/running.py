"""Fine-tune, calibrate and judge a text encoder with exits; what was done is not done again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from offramp.build.model import MultiExitModel
from offramp.decide.record import record
from offramp.errors import DataError, MissingExtra
from offramp.train.loop import fit
from offramp.train.optimizers import adamw
from offramp.train.phases import Phase
from offramp.train.schemes import Scheme
from offramp.zoo.images import refuse_new_classes
from offramp.zoo.kept import KIND, write
from offramp.zoo.running import (
    EXAMPLE,
    Outcome,
    digest,
    judge,
    keep,
    note,
    plain_phases,
    refuse_drop,
    remember,
)
from offramp.zoo.text.sentences import Sentences, read_tsv, tokenised
from offramp.zoo.text.systems import TextSystem, attach_to_layers

__all__ = ["bare_encoder", "fine_tune", "open_encoder", "open_sentences", "run_text"]

EPOCHS = 3
RATE = 5e-5
HEADS_RATE = 1e-3  # of heads, which begin at random and are small
LENGTH = 64  # tokens
PARTS = ("train", "dev", "test")


def run_text(
    system: TextSystem,
    data: Path,
    encoder: Path,
    out: Path,
    *,
    epochs: int | None = None,
    seed: int = 0,
    max_accuracy_drop: float = 0.0,
    progress: bool = True,
) -> Outcome:
    """Fine-tune an encoder with exits, choose its thresholds and judge it.

    Interrupted, the same call goes on; done, it reads what it has kept.

    Args:
        system: how the exits learn and are left by.
        data: folder with three files of lines ``sentence<TAB>label``, whose names end in
            ``train.tsv``, ``dev.tsv`` and ``test.tsv``; or a folder in it.
        encoder: folder with weights, configuration and ``tokenizer.json``, as transformers saves
            them.
        out: folder for checkpoint, model, traces, policy and report.
        epochs: of every stage; 3 where ``None``.
        seed: of heads, shuffling, and what is set aside for the rule.
        max_accuracy_drop: what thresholds may cost on the development sentences, as a share; the
            verdict accepts as much, and no less than 0.01.
        progress: show a bar on standard error.

    Raises:
        DataError: files are missing or damaged, or the drop is no share.
        TrainingError: ``out`` holds another training.
        MissingExtra: the package transformers is not installed.
        Infeasible: no thresholds lose so little.
    """
    refuse_drop(max_accuracy_drop)
    epochs = EPOCHS if epochs is None else epochs
    parts = open_sentences(data, encoder)
    network = open_encoder(encoder, int(parts["train"].labels.max()) + 1, seed)
    begun = digest(network.state_dict().values())
    inputs, _ = next(iter(replace(parts["dev"], size=EXAMPLE)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = attach_to_layers(network, inputs, system.head)
    train = partial(fine_tune, model, parts["train"], seed=seed, begun=begun, progress=progress)
    if system.tuned:
        train(out / "plain", plain_phases(model.num_exits, epochs), epochs)
    train(out, system.scheme, epochs)
    config: Any = network.config
    config.save_pretrained(out)  # what makes the encoder again
    about = {"kind": KIND, "system": system.name, "classes": model.num_classes}
    write(model, out, about, inputs)
    calibration, test = (
        record(model, replace(parts[part], size=64), source=f"{data} ({part})", progress=progress)
        for part in PARTS[1:]
    )
    policy = system.choose(calibration, max_accuracy_drop, seed=seed)
    report = judge(test, policy, out, max_accuracy_drop, seed)
    return keep(Outcome(model, policy, calibration, test, report), out)


def open_encoder(folder: Path, classes: int, seed: int = 0) -> nn.Module:
    """An encoder that classifies, in single precision and evaluation mode; its head is drawn anew.

    Args:
        folder: with weights and configuration, as transformers saves them. A classifier that was
            saved with them is left there: it may be for other labels.
        classes: how many the labels have.
        seed: of what is drawn.

    Raises:
        DataError: the folder holds no encoder that transformers can read.
        MissingExtra: the package transformers is not installed.
    """
    with _transformers() as package, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            bare = package.AutoModel.from_pretrained(folder, local_files_only=True)
            config = _config(package, folder, num_labels=classes)
            with torch.device("meta"):  # just to know its class
                made = type(package.AutoModelForSequenceClassification.from_config(config))
            state = bare.state_dict()
            model: nn.Module = made.from_pretrained(None, config=config, state_dict=state)
        except Exception as error:  # transformers hands on what any of its readers raises
            raise _no_encoder(folder, error) from error
    return model.float().eval()


def bare_encoder(folder: Path) -> nn.Module:
    """A classifying encoder as a configuration describes it, with weights drawn at random.

    Args:
        folder: with ``config.json``.

    Raises:
        DataError: the folder holds no configuration that transformers can read.
        MissingExtra: the package transformers is not installed.
    """
    with _transformers() as package, torch.random.fork_rng(devices=[]):
        try:
            config = _config(package, folder)
            made: nn.Module = package.AutoModelForSequenceClassification.from_config(config)
        except Exception as error:  # as above
            raise _no_encoder(folder, error) from error
    return made.float().eval()


@contextmanager
def _transformers() -> Iterator[Any]:
    """The package, which for so long shows neither its bars nor what it finds to remark."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "transformers", "A text encoder") from error
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(package: Any, folder: Path, **settings: int) -> Any:  # noqa: ANN401
    return package.AutoConfig.from_pretrained(folder, local_files_only=True, **settings)


def _no_encoder(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"{folder} holds no encoder: {_first_line(error)} Pass the folder that save_pretrained "
        "wrote: config.json, weights, tokenizer.json."
    )


def open_sentences(data: Path, encoder: Path, most: int | None = None) -> dict[str, Sentences]:
    """The sentences to train on, to choose thresholds on, and to judge by, of 64 tokens.

    Args:
        data: as in :func:`run_text`.
        encoder: the folder whose ``tokenizer.json`` makes tokens.
        most: of each part, at the most.

    Raises:
        DataError: a file is missing or damaged, or has a label that no training sentence has.
        MissingExtra: the package transformers, and tokenizers with it, is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("tokenizers", "transformers", "A text encoder") from error
    path = encoder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"There is no {path}. Pass the folder of an encoder that has one.")
    try:
        tokenizer: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # of no class of its own
        raise DataError(
            f"{path} holds no tokenizer: {_first_line(error)} Pass the folder of an encoder whose "
            "tokenizer.json is whole."
        ) from error
    found = {}
    files = _files(data)
    for part, path in files.items():
        texts, labels = read_tsv(path)
        found[part] = tokenised(
            tokenizer, texts[:most], labels[:most], length=LENGTH, shuffled=part == "train"
        )
        refuse_new_classes(found[part].labels, path, found["train"].labels, files["train"])
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".") + "."


def _files(data: Path) -> dict[str, Path]:
    """Three files beside each other, called alike but for the part."""
    for pattern in ("*train.tsv", "*/*train.tsv"):
        for first in sorted(data.glob(pattern)):
            stem = first.name.removesuffix("train.tsv")
            found = {part: first.with_name(f"{stem}{part}.tsv") for part in PARTS}
            if all(path.is_file() for path in found.values()):
                return found
    raise DataError(
        f"There are no three files of one name that ends in train.tsv, dev.tsv and test.tsv in "
        f"{data} or a folder in it. Expected lines of a sentence, a tab, a label."
    )


def fine_tune(
    model: MultiExitModel,
    sentences: Sentences,
    out: Path,
    scheme: Scheme | Sequence[Phase],
    epochs: int,
    *,
    seed: int = 0,
    begun: str | None = None,
    progress: bool = False,
) -> MultiExitModel:
    """The model, trained, in evaluation mode; read from ``out`` where it is there.

    Args:
        model: from :func:`attach_to_layers`, say.
        sentences: to train on.
        out: folder for the checkpoint.
        scheme: as :func:`offramp.fit` takes it.
        epochs: over the sentences.
        seed: of shuffling.
        begun: the sha256 of the weights that the encoder began with, to be compared with that of
            the training in ``out``.
        progress: show a bar on standard error.

    Raises:
        TrainingError: ``out`` holds another training: of other sentences, say.
    """
    now: dict[str, object] = {
        "sentences (sha256)": digest((sentences.ids, sentences.mask, sentences.labels)),
        "batch": sentences.size,
        "shuffled": sentences.shuffled,
        "seed": seed,  # the encoder's last layer is drawn by it
    }
    note(out, now if begun is None else {**now, "encoder (sha256)": begun})
    fit(
        model,
        sentences,
        scheme=scheme,
        epochs=epochs,
        optimizer=partial(_optimizer, set(model.heads.parameters())),
        precision="auto",
        seed=seed,
        checkpoint=out,
        progress=progress,
    )
    remember(model, replace(sentences, shuffled=False))
    return model.eval()


def _optimizer(heads: set[Parameter], parameters: list[Parameter]) -> Optimizer:
    """AdamW, with a learning rate of its own for heads."""
    made = adamw(parameters, lr=RATE)
    groups = []
    for group in made.param_groups:
        own = [p for p in group["params"] if p in heads]
        rest = [p for p in group["params"] if p not in heads]
        groups.append({**group, "params": rest})
        groups.append({**group, "params": own, "lr": HEADS_RATE})
    made.param_groups = [group for group in groups if group["params"]]
    return made
