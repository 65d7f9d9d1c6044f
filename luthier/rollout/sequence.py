"""A completion in the making, on the host.

Left out on purpose: its place in the cache (``slots``), and its text, but for the watch for stop texts.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.rollout.engine import Alternatives, Completion, Finish, Piece, Sampling
from luthier.rollout.text import byte_tokens


@dataclass
class Sequence:
    """One sample of a request: its prompt, how it is drawn, the data of its random key, and the pieces so far.

    ``limit`` is how many tokens it may have, ``drawn`` how many it has; ``adapter`` is the number of its adapter, 0 for
    none.
    """

    request: int
    sample: int
    prompt_T: np.ndarray
    sampling: Sampling
    limit: int
    key_2: np.ndarray
    adapter: int = 0
    watch: StopTexts | None = None
    pieces: list[Piece] = field(default_factory=list)
    drawn: int = 0
    finish: Finish | None = None
    stopped_by: int | str | None = None

    @property
    def last_token(self) -> int:
        """The token that the model has not read yet."""
        return int(self.pieces[-1].tokens_T[-1] if self.pieces else self.prompt_T[-1])

    def take(self, tokens_T: np.ndarray, columns: Several[np.ndarray], ended: bool, version: int) -> Piece:
        """Add the tokens of a chunk and return them as a piece, cut where a stop text was completed.

        ``columns`` are the other fields of a chunk, row for row; ``ended`` is whether the device ended the completion;
        ``version`` is that of the weights.
        """
        found = self.watch.push(tokens_T) if self.watch else None
        count = len(tokens_T) if found is None else found[0]
        # Copied, or each piece would keep the whole chunk that it is a part of.
        tokens_T, logp_T, softmax_logp_T, ids_TA, logp_TA = (column[:count].copy() for column in (tokens_T, *columns))
        wanted = self.sampling.logprobs
        alternatives = Alternatives(ids_TA[:, :wanted], logp_TA[:, :wanted]) if wanted else None
        piece = Piece(self.request, self.sample, tokens_T, logp_T, softmax_logp_T, version, alternatives)
        self.pieces.append(piece)
        self.drawn += count
        if found is not None:
            self.finish, self.stopped_by = "stop", found[1]
        elif ended and piece.tokens_T[-1] in self.sampling.stop_token_ids:
            self.finish, self.stopped_by = "stop", int(piece.tokens_T[-1])
        elif ended:
            self.finish = "length"
        return piece

    @property
    def read(self) -> int:
        """How many tokens the model has read, all but the last one."""
        return len(self.prompt_T) - 1 + self.drawn

    def completion(self, routes_TLk: np.ndarray | None = None) -> Completion:
        """Return what was drawn, as finished; as cancelled where it was not."""

        def joined(name: str, dtype: Any) -> np.ndarray:
            return np.concatenate([np.zeros(0, dtype), *(getattr(piece, name) for piece in self.pieces)])

        alternatives = None
        if self.pieces and self.sampling.logprobs:
            parts = zip(*(piece.alternatives or () for piece in self.pieces), strict=True)
            alternatives = Alternatives(*(np.concatenate(part) for part in parts))
        return Completion(
            self.request,
            self.sample,
            joined("tokens_T", np.int32),
            joined("logp_T", np.float32),
            joined("softmax_logp_T", np.float32),
            np.repeat(np.array([piece.version for piece in self.pieces], np.int32), list(map(_size, self.pieces))),
            self.finish or "cancelled",
            self.stopped_by,
            alternatives,
            routes_TLk,
        )


def _size(piece: Piece) -> int:
    return len(piece.tokens_T)


@dataclass
class StopTexts:
    """Watches a completion for the first token that completes one of the ``texts``.

    Only the end of the completion is decoded, so that watching costs the same for each token however long it gets.
    """

    tokenizer: Any
    texts: tuple[str, ...]
    ids: list[int] = field(default_factory=list)

    def push(self, tokens_T: np.ndarray) -> tuple[int, str] | None:
        """Return how many of the new tokens lead up to and through the first stop text, and which that is."""
        before = len(self.ids)
        self.ids.extend(tokens_T.tolist())
        start = self._start(before)
        # A run of bytes that the chunk breaks off, or that breaks later, hides what was text when it had come so far.
        whole = not byte_tokens(self.tokenizer).keys() & self.ids[start:]
        if whole and self._in(self.ids[start:]) is None:
            return None
        for end in range(before + 1, len(self.ids) + 1):
            text = self._in(self.ids[self._start(end - 1) : end])
            if text is not None:
                return end - before, text
        return None

    def _start(self, end: int) -> int:
        """Return the first of the tokens before ``end`` that can be part of a stop text, with its whole character.

        A token before is looked at for each byte of the longest text.
        """
        start, bytes_ = max(0, end - max(len(text.encode()) for text in self.texts)), byte_tokens(self.tokenizer)
        for _ in range(3):  # a character has four bytes at most, of which the first is none of these
            start -= start > 0 and 0x80 <= bytes_.get(self.ids[start], 0) < 0xC0
        return start

    def _in(self, ids: list[int]) -> str | None:
        """Return the stop text that comes first in the text of these tokens."""
        decoded = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return min((text for text in self.texts if text in decoded), key=decoded.find, default=None)
