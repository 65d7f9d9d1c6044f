"""The text and the bytes of single tokens, as log-probs are reported with them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_BROKEN = "\ufffd"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SHOWN_AS_THEY_ARE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _SHOWN_AS_THEY_ARE]
BYTE_OF = {chr(byte): byte for byte in _SHOWN_AS_THEY_ARE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""The byte that each letter in a name of a byte-level vocabulary (GPT-2's) stands for."""


class Word(NamedTuple):
    """A token's text and its bytes, None where those cannot be told.

    The text of bytes that are no whole characters is ``bytes:`` and these, escaped, so that no two tokens read alike.
    """

    text: str
    bytes: list[int] | None


def reader(tokenizer: Any) -> Callable[[int], Word]:
    """Return a function from a token's id to its word, leading space and all.

    Tokens are decoded behind another one, since some tokenizers drop the space that a text begins with.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    skipped = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))

    @functools.cache
    def read(token: int) -> Word:
        text = tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)[skipped:]
        if _BROKEN not in text:
            return Word(text, list(text.encode()))
        raw = _bytes(tokenizer.convert_ids_to_tokens(token))
        if raw is None:
            return Word(text, None)
        return Word("bytes:" + "".join(chr(b) if 0x20 <= b < 0x7F else f"\\x{b:02x}" for b in raw), raw)

    return read


def _bytes(name: str) -> list[int] | None:
    """Return the bytes that a token's name stands for, in a vocabulary of bytes or one that falls back to them."""
    if fallback := _FALLBACK.fullmatch(name):
        return [int(fallback[1], 16)]
    found = [BYTE_OF.get(letter) for letter in name]
    return [byte for byte in found if byte is not None] if None not in found else None
