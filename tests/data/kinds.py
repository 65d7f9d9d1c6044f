"""Tokenizers of several kinds, by name."""

from __future__ import annotations

import functools

import pytest
from folders import smollm2
from tokenizers import decoders
from toy import byte_level, metaspace, wrap

import tiny
from luthier.checkpoint import gguf_tokenizer


def llama_like():
    """SentencePiece's way: a space before every text, dropped again by the decoder; bytes for what is unknown."""
    backend = metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return wrap(backend)


@functools.cache
def tokenizer(name: str):
    makers = {
        "byte-level": lambda: wrap(byte_level()),
        "bytes": tiny.tokenizer,
        "byte fallback": lambda: wrap(metaspace()),
        "llama-like": llama_like,
        "smollm2": lambda: gguf_tokenizer.build(smollm2()),
    }
    return makers[name]()


NAMES = pytest.mark.parametrize("name", ["byte-level", "bytes", "byte fallback", "llama-like", "smollm2"])
