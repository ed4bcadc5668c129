"""Early exits of text encoders: DeeBERT, PABEE, BERxiT and ElasticBERT's way."""

from __future__ import annotations

from offramp.zoo.text.running import (
    fine_tune,
    open_encoder,
    open_sentences,
    run_text,
)
from offramp.zoo.text.sentences import Sentences, read_tsv, tokenised
from offramp.zoo.text.systems import TEXT, TextSystem, attach_to_layers, layers_of, truncated

__all__ = [
    "TEXT",
    "Sentences",
    "TextSystem",
    "attach_to_layers",
    "fine_tune",
    "layers_of",
    "open_encoder",
    "open_sentences",
    "read_tsv",
    "run_text",
    "tokenised",
    "truncated",
]
