"""Labelled sentences from files of a line each, as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.errors import DataError

__all__ = ["Sentences", "read_tsv", "tokenised"]


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences, as batches of what an encoder takes and the labels.

    Attributes:
        ids: (N, T) int64 tokens, filled up with padding.
        mask: (N, T) int64, 1 where a token counts.
        labels: (N,) int64.
        size: samples a batch.
        shuffled: anew for every walk; then batches are also cut to their longest sentence.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    size: int = 32
    shuffled: bool = False

    def __len__(self) -> int:
        return -(-len(self.ids) // self.size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rows = torch.randperm(len(self.ids)) if self.shuffled else torch.arange(len(self.ids))
        for part in rows.split(self.size):
            mask = self.mask[part]
            length = int(mask.sum(1).max()) if self.shuffled else mask.shape[1]
            inputs = {"input_ids": self.ids[part, :length], "attention_mask": mask[:, :length]}
            yield inputs, self.labels[part]


def read_tsv(path: Path) -> tuple[list[str], list[int]]:
    """The sentences and labels of a file with ``sentence<TAB>label`` in each line.

    Raises:
        DataError: the file is missing or not UTF-8, or a line is not of this form; it is named.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}. Expected lines of a sentence, a tab, a label.")
    texts, labels = [], []
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as such.") from error
    # A sentence may hold other characters at which splitlines() would part it.
    lines = content.removesuffix("\n").split("\n")
    for number, line in enumerate(lines if lines != [""] else [], 1):
        text, tab, label = line.rpartition("\t")
        if not tab or not label.strip().isdecimal():
            raise DataError(
                f"Line {number} of {path} is {line[:60]!r}; expected a sentence, a tab and a label "
                "that is a whole number."
            )
        texts.append(text)
        labels.append(int(label))
    if not texts:
        raise DataError(f"{path} is empty; expected lines of a sentence, a tab, a label.")
    return texts, labels


def tokenised(
    tokenizer: Any,  # noqa: ANN401 - of the package tokenizers
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    length: int = 64,
    size: int = 32,
    shuffled: bool = False,
) -> Sentences:
    """Sentences as tokens of one length, cut or filled up with padding.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        texts: N sentences.
        labels: N labels.
        length: T.
        size: samples a batch.
        shuffled: as in :class:`Sentences`.
    """
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(list(texts))
    return Sentences(
        torch.tensor([entry.ids for entry in found]),
        torch.tensor([entry.attention_mask for entry in found]),
        torch.tensor(list(labels)),
        size,
        shuffled,
    )
