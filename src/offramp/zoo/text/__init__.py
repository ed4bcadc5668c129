"""Early exits of text encoders: DeeBERT, PABEE, BERxiT and ElasticBERT's way."""

from __future__ import annotations

from offramp.zoo.text.sentences import Sentences, read_tsv, tokenised
from offramp.zoo.text.systems import TEXT, TextSystem, attach_to_layers, layers_of, truncated

__all__ = [
    "TEXT",
    "Sentences",
    "TextSystem",
    "attach_to_layers",
    "layers_of",
    "read_tsv",
    "tokenised",
    "truncated",
]
