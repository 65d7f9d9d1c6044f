"""Which characters of a rendered conversation are trained.

Where the template marks them by ``{% generation %}``, its marks are taken. Otherwise a reply is what rendering one more
message adds: it begins where the rendering of the messages before it, with the generation prompt, ends, and it ends
where the rendering up to and with it ends. Both must be true prefixes of the whole rendering, or the row is refused,
with one exception: a template may open a conversation's last reply with a block that holds no text (Qwen3's empty
``<think>`` block) and leave it out of earlier ones.

Left out on purpose: guessing replies from the template's source or from role markers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from luthier.data.schemas import RowError
from luthier.types import Conversation

Span = tuple[int, int]

_MARK = re.compile(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})")
_MARK_END = re.compile(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})")
OPENED, CLOSED = "\ufdd0", "\ufdd1"
"""Code points that Unicode keeps out of texts."""
_BRACKETS = f"{{% macro luthier_mark() %}}{OPENED}{{{{ caller() }}}}{CLOSED}{{% endmacro %}}\n"
_EMPTY_BLOCKS = re.compile(r"(?:\s|<[^<>]*>)*")
_REMEDY = (
    "Give a template that marks replies with {% generation %}...{% endgeneration %} (chat_template_path=...), or set "
    "sft_train_on_completion_only=false to train on the whole conversation."
)


class TemplateRefused(RowError):
    """The template failed on a conversation; the cause is the template's own exception."""


def render(
    tokenizer: Any, template: str, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, prompt: bool = False
) -> str:
    """Return the text of ``messages``, with the generation prompt if ``prompt``. Raises TemplateRefused."""
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except Exception as error:
        # A template is a program from elsewhere: whatever it raises is the answer it gives for this conversation.
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateRefused(
            "",
            f"the chat template fails on this conversation (roles: {roles}): {error}. Change the row, rewrite it with "
            "formatting_func_path=..., or give another template with chat_template_path=....",
        ) from error


def trained_spans(tokenizer: Any, template: str, conversation: Conversation, text: str) -> tuple[Span, ...]:
    """Return the trained (start, end) character spans of ``text``, the rendering of the whole conversation.

    Spans are in order and do not overlap. Raises RowError where the template does not let them be told.
    """
    messages, context = conversation.messages, conversation.prompt_messages

    def prefix(count: int, prompt: bool = False) -> str:
        return render(tokenizer, template, messages[:count], conversation.tools, prompt)

    if _MARK.search(template):
        spans = _marked(tokenizer, template, conversation, text)
        if not context:
            return spans
        trained_from = _common_start(text, prefix(context, prompt=True), context)
        return tuple((max(start, trained_from), end) for start, end in spans if end > trained_from)
    specials = tuple(tokenizer.all_special_tokens)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= context]
    spans = [_reply(text, messages, index, prefix) for index in replies]
    return tuple((start, _without_newline(text, start, end, specials)) for start, end in spans)


def trains_header(tokenizer: Any, template: str, conversation: Conversation, text: str, spans: Sequence[Span]) -> bool:
    """Return whether a reply's span begins with more than the reply, as the template has no generation prompt.

    A template may do without one where replies follow at once on what is before them (Mistral's ``[/INST]``).
    """
    if _MARK.search(template):
        return False
    messages, context = conversation.messages, conversation.prompt_messages
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= context]
    for index, (start, end) in zip(replies, spans, strict=True):
        if text[start:end].lstrip().startswith(messages[index]["content"].strip()):
            continue
        before = messages[: max(index, 1)]
        plain = render(tokenizer, template, before, conversation.tools)
        if plain == render(tokenizer, template, before, conversation.tools, prompt=True):
            return True
    return False


def _marked(tokenizer: Any, template: str, conversation: Conversation, text: str) -> tuple[Span, ...]:
    """Return the marked spans, by rendering once more with each mark turned into a macro that brackets what it holds.

    Transformers counts the characters before a mark while it renders, which is wrong inside macros and captured blocks.
    """
    if OPENED in text or CLOSED in text:
        raise RowError("", f"the text holds {OPENED!r} or {CLOSED!r}, which are no characters. Remove them.")
    source = _BRACKETS + _MARK_END.sub(r"\1endcall\2", _MARK.sub(r"\1call luthier_mark()\2", template))
    bracketed = render(tokenizer, source, conversation.messages, conversation.tools)
    spans, start, length, depth = [], 0, 0, 0
    for piece in re.split(f"([{OPENED}{CLOSED}])", bracketed):
        if piece == OPENED:
            start = start if depth else length
            depth += 1
        elif piece == CLOSED:
            depth -= 1
            if not depth:
                spans.append((start, length))
        else:
            length += len(piece)
    if bracketed.replace(OPENED, "").replace(CLOSED, "") != text:
        raise RowError(
            "",
            "the chat template cuts or measures text inside its {% generation %} marks, so they cannot be followed. "
            "Move the marks to where the text is printed, or set sft_train_on_completion_only=false.",
        )
    return tuple(spans)


def _reply(text: str, messages: Sequence[dict[str, Any]], index: int, prefix: Callable[..., str]) -> Span:
    """Return the span of the reply ``messages[index]`` in ``text``."""
    last = index == len(messages) - 1
    upto = text if last else prefix(index + 1)
    if index:
        start = _common_start(text, prefix(index, prompt=True), index)
    else:
        # Nothing can be rendered before a conversation's first message: find the generation prompt it opens with.
        opened = prefix(1, prompt=True)
        header = opened[len(prefix(1)) :]
        start = text.find(header) + len(header)
        if not opened.startswith(prefix(1)) or not 0 <= text.find(header) <= start <= len(upto):
            raise RowError("", f"the conversation begins with a reply, whose start cannot be told. {_REMEDY}")
    if text.startswith(upto):
        return start, len(upto)
    return start, _rewritten_end(text, upto, start, index)


def _common_start(text: str, prefix: str, index: int) -> int:
    if text.startswith(prefix):
        return len(prefix)
    raise RowError("", _not_a_prefix(text, prefix, f"what comes before message {index + 1}"))


def _rewritten_end(text: str, upto: str, start: int, index: int) -> int:
    """Return where a reply ends that is rendered without an empty block once further messages follow it."""
    if upto.startswith(text[:start]):
        reply = upto[start:]
        empty = _EMPTY_BLOCKS.match(reply)
        for cut in range(1, (empty.end() if empty else 0) + 1):
            if cut < len(reply) and text.startswith(reply[cut:], start):
                return start + len(reply) - cut
    raise RowError("", _not_a_prefix(text, upto, f"message {index + 1}"))


def _not_a_prefix(text: str, prefix: str, what: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), min(len(text), len(prefix)))
    alone, whole = prefix[same : same + 30], text[same : same + 30]
    return (
        f"the chat template rewrites earlier turns: {what} renders as {alone!r} by itself and as {whole!r} in the "
        f"whole conversation, so the replies cannot be told apart by comparing renderings. {_REMEDY}"
    )


def _without_newline(text: str, start: int, end: int, specials: tuple[str, ...]) -> int:
    """Leave out the white space after a reply's end token: generation has stopped there."""
    stripped = text[start:end].rstrip()
    return start + len(stripped) if specials and stripped.endswith(specials) else end
