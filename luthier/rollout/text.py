"""The text edge of sampling: conversations become prompts here, and sampled tokens become text.

Everything between is token ids. Left out on purpose: the rendering itself (``data.chat``), and the search for stop
texts that ends a completion, which is the engine's; here the stop text is only kept out of what is shown.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from luthier.data import chat
from luthier.data.chat import Rendering
from luthier.data.schemas import RowError
from luthier.rollout.engine import Completion
from luthier.types import Conversation

Message = Mapping[str, Any]

_MARK = "\ufdd0"
"""Stands for a reply: a code point that Unicode keeps out of texts."""
_BROKEN = "\ufffd"
"""What decoders put for bytes that are not (yet) a character."""
_CONTEXT = 4
"""Tokens decoded again before new ones: at least the last character, which has four bytes at most."""


def encode(
    tokenizer: Any, how: Rendering, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[int]:
    """Return the prompt that asks for the next message of a conversation.

    With ``how.use_chat_template`` off it is the contents joined as text, to go on with as they are. Raises UserError
    where there is no chat template, and ``schemas.RowError`` where it cannot render these messages.
    """
    conversation = Conversation(tuple(map(dict, messages)), None if tools is None else tuple(tools))
    rendered = chat.to_prompt(tokenizer, conversation, how)
    return _ids(tokenizer, rendered.text, bos=rendered.bos)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a raw text, after BOS where the tokenizer puts one before texts."""
    return _ids(tokenizer, text, bos=True)


def encode_more(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that stands behind other tokens: no BOS, and no space that begins a text."""
    # A tokenizer of SentencePiece's kind puts a space before a text. Here it is put before a line feed, if that keeps
    # its own tokens; where it does not, the tokenizer merges bytes, and has no such space.
    before, both = _ids(tokenizer, "\n", bos=False), _ids(tokenizer, f"\n{text}", bos=False)
    return both[len(before) :] if both[: len(before)] == before else _ids(tokenizer, text, bos=False)


def encode_answer(
    tokenizer: Any,
    how: Rendering,
    asked: Sequence[Message],
    tools: Sequence[Any] | None,
    answer: Sequence[Message],
    last: int | None,
) -> list[int]:
    """Return the tokens from the end of a reply up to where the next one begins, as the chat template has them.

    The template renders the messages ``asked``, a mark in the reply's place, and the messages ``answer``; what stands
    behind the mark is taken. So the reply's own tokens never become text, and are never tokenised anew. ``last`` is the
    last of them: where that is the end token, it is not said twice. Raises ``schemas.RowError`` where the template
    refuses the messages.
    """
    reply = {"role": "assistant", "content": _MARK}
    conversation = Conversation((*map(dict, asked), reply, *map(dict, answer)), None if tools is None else tuple(tools))
    rendered = chat.to_prompt(tokenizer, conversation, how).text
    if rendered.count(_MARK) != 1:
        raise RowError("", f"the chat template prints a reply {rendered.count(_MARK)} times where messages follow it.")
    ids = encode_more(tokenizer, rendered.partition(_MARK)[2])
    end = ids.index(last) if last in ids else None
    return ids if end is None or tokenizer.decode(ids[:end]).strip() else ids[end + 1 :]


def decode(tokenizer: Any, completion: Completion, stop: Sequence[str], after: Sequence[int] = ()) -> str:
    """Return the text of a completion: no end token, no special token, cut before the text in ``stop`` that ended it.

    ``after`` is the prompt where the text goes on from it, as in ``TextStream``.
    """
    return decode_tokens(tokenizer, completion.tokens_T.tolist(), completion.stopped_by, stop, after)


def decode_tokens(
    tokenizer: Any,
    ids: Sequence[int],
    stopped_by: int | str | None = None,
    stop: Sequence[str] = (),
    after: Sequence[int] = (),
) -> str:
    """Return the text of tokens as ``decode`` does: if ``stopped_by`` is a token, it is the last one."""
    stream = TextStream(tokenizer, stop, after=after)
    return stream.push(ids[:-1] if isinstance(stopped_by, int) else ids) + stream.close()


class TextStream:
    """Tokens in, text out, as it becomes certain.

    What was given out never changes: bytes of an unfinished character are held back, as is what may be the beginning of
    a text in ``stop``. Put together it is what the tokenizer decodes from all tokens at once (without special tokens),
    up to the first stop text or the first of ``stop_token_ids``; what comes after those is ignored. The work is linear
    in the number of tokens, however many come at a time.

    A tokenizer of SentencePiece's kind drops the space that a text begins with. That is right for a reply; where the
    tokens go on from a text, ``after`` is that text's tokens, and the space is kept.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        stop_token_ids: Collection[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop, self._ends = tuple(stop), frozenset(stop_token_ids)
        self._pending: list[int] = []  # tokens whose text is not certain
        self._wait = 1  # how many of them to have before looking again
        self._held = ""  # text that may be the beginning of a stop text
        self._done = False
        self._set_context(self._visible(after[-_CONTEXT:]))

    def push(self, ids: Sequence[int]) -> str:
        """Take the next tokens and return the text that is certain now."""
        if self._done:
            return ""
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        self._pending += self._visible(ids[:end])
        return self._show(self._decoded(end is not None), end is not None)

    def close(self) -> str:
        """Return the text that was held back; nothing follows it."""
        return "" if self._done else self._show(self._decoded(True), True)

    def _visible(self, ids: Sequence[int]) -> list[int]:
        """Leave out special tokens, and ids that a model has beyond its tokenizer's."""
        hidden, names = _special_ids(self._tokenizer), self._tokenizer.convert_ids_to_tokens(list(ids))
        return [token for token, name in zip(ids, names, strict=True) if name is not None and token not in hidden]

    def _set_context(self, ids: list[int]) -> None:
        self._context, self._context_length = ids, len(self._decode(ids))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""

    def _decoded(self, last: bool) -> str:
        """Return the text of the pending tokens, or nothing while it could still change."""
        pending = self._pending
        if not pending or not (
            last or (len(pending) >= self._wait and pending[-1] not in byte_tokens(self._tokenizer))
        ):
            return ""
        text = self._decode(self._context + pending)[self._context_length :]
        if text.endswith(_BROKEN) and not last:
            # A character has few bytes: soon this succeeds, or the bytes are none, and looking each time is too often.
            self._wait = len(pending) + 1 + len(pending) // 8
            return ""
        self._set_context((self._context + pending)[-_CONTEXT:])
        self._pending, self._wait = [], 1
        return text

    def _show(self, text: str, last: bool) -> str:
        """Return the text so far but for what may belong to a stop text."""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self._done = last or bool(found)
        keep = min(found) if found else len(text) if last else len(text) - _overlap(text, self._stop)
        self._held = text[keep:]
        return text[:keep]


@functools.lru_cache(maxsize=8)
def byte_tokens(tokenizer: Any) -> Mapping[int, int]:
    """Return the tokens that stand for one byte each by their names, {token: byte}.

    A run of them is decoded as a whole: where it is not all characters, all of it is broken.
    """
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = tokenizer.convert_tokens_to_ids(names)
    known = tokenizer.convert_ids_to_tokens([token or 0 for token in tokens])  # of others, the unknown token's
    return {token: byte for byte, token in enumerate(tokens) if known[byte] == names[byte]}


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of ``text`` that one of ``stop`` begins with."""
    longest = max((len(each) - 1 for each in stop), default=0)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((length for length in lengths if any(each.startswith(text[-length:]) for each in stop)), 0)


def _ids(tokenizer: Any, text: str, bos: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    before = chat.added_bos(tokenizer) if bos else []
    return ids if ids[:1] == before else before + ids


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that are no text. A tokenizer makes a table of thousands for it, so the answer is kept."""
    return frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
