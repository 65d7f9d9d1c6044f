"""Conversation -> token ids and an explicit loss mask.

A conversation is rendered once, as a whole, by the chat template; that text is tokenised once; and the trained spans of
characters (``spans``) are carried over to tokens by the tokenizer's offsets. A token is trained if its first character
lies in a trained span, so a token that begins in the context (say a newline merged with the reply's first) is context.

Left out on purpose: tokenising pieces and gluing them, and looking for marker tokens; both differ from what the model
sees when it is used. Special tokens written out in a conversation's own text are not escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from luthier.config import MaskKeys, TemplateKeys
from luthier.data.schemas import RowError
from luthier.data.spans import Span, TemplateRefused, render, trained_spans, trains_header
from luthier.errors import UserError
from luthier.types import Conversation, Example

_NO_REPLY = ("role", "content", "name", "weight", "train")
"""Fields of a message that say nothing to the model."""


@dataclass(frozen=True)
class Rendering:
    """How conversations become tokens. ``template`` is Jinja source, or empty for the tokenizer's own."""

    template: str = ""
    use_chat_template: bool = True
    completion_only: bool = True


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with its trained spans of characters.

    ``bos`` puts the tokenizer's BOS before it if the tokenizer adds one; ``eos`` ends it with a trained EOS.
    """

    text: str
    spans: tuple[Span, ...]
    bos: bool = False
    eos: bool = False


def rendering(keys: MaskKeys, tokenizer: Any) -> Rendering:
    """Return how ``keys`` want conversations rendered to be trained on.

    Raises UserError as ``prompt_rendering`` does, and for a tokenizer without offsets.
    """
    how = replace(prompt_rendering(keys, tokenizer), completion_only=keys.sft_train_on_completion_only)
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, from which the loss mask is made. "
            "Set tokenizer_path to a tokenizer with a tokenizer.json."
        )
    return how


def prompt_rendering(keys: TemplateKeys, tokenizer: Any) -> Rendering:
    """Return how ``keys`` want conversations rendered to be answered.

    Raises UserError for a template file that cannot be read, and a template that is not valid Jinja. A missing template
    is refused later, by the first conversation that needs one.
    """
    template = keys.chat_template or _template_file(keys.chat_template_path)
    how = Rendering(template, keys.use_chat_template)
    if how.use_chat_template and (template or tokenizer.chat_template):
        _check_syntax(tokenizer, how)
    return how


def encode(tokenizer: Any, conversations: Sequence[Conversation], how: Rendering) -> list[Example]:
    """Return the tokens and the mask of each conversation. Raises RowError (no row named) where one cannot be rendered.

    Ids equal those of Transformers' ``apply_chat_template``; nothing is truncated.
    """
    return tokenise(tokenizer, [to_text(tokenizer, conversation, how) for conversation in conversations])


def to_text(tokenizer: Any, conversation: Conversation, how: Rendering) -> Rendered:
    """Return the conversation as one text with the spans of it that are trained. Raises RowError."""
    return _checked(_rendered(tokenizer, conversation, how))


def to_prompt(tokenizer: Any, conversation: Conversation, how: Rendering) -> Rendered:
    """Return the conversation as the text that its next reply goes on from, with no spans. Raises RowError.

    Without a chat template that is the contents, joined as they are trained on.
    """
    if not how.use_chat_template:
        return _checked(replace(_joined(tokenizer, conversation, how), spans=()))
    template = _template_for(tokenizer, conversation, how)
    if "tool_calls" not in template:
        conversation = _calls_as_text(conversation)
    try:
        text = render(tokenizer, template, conversation.messages, conversation.tools, prompt=True)
    except TemplateRefused as refused:
        roles = ", ".join(message["role"] for message in conversation.messages)
        raise RowError(
            "",
            f"the chat template cannot render this conversation (roles: {roles}): {refused.__cause__}. Change its "
            "messages, or give another template with chat_template_path=....",
        ) from refused.__cause__
    return _checked(Rendered(text, ()))


def _checked(rendered: Rendered) -> Rendered:
    try:
        rendered.text.encode()
    except UnicodeEncodeError as error:
        raise RowError("", f"not valid Unicode: {error.object[error.start]!r} is half of a character.") from None
    return rendered


def _rendered(tokenizer: Any, conversation: Conversation, how: Rendering) -> Rendered:
    if conversation.text is not None:
        text = conversation.text
        return Rendered(text, ((0, len(text)),), bos=True, eos=True)
    if not how.use_chat_template:
        return _joined(tokenizer, conversation, how)
    template = _template_for(tokenizer, conversation, how)
    if "tool_calls" not in template:
        conversation = _calls_as_text(conversation)
    text = render(tokenizer, template, conversation.messages, conversation.tools)
    if not how.completion_only:
        return Rendered(text, ((0, len(text)),))
    return Rendered(text, trained_spans(tokenizer, template, conversation, text))


def tokenise(tokenizer: Any, rendered: Sequence[Rendered]) -> list[Example]:
    """Tokenise each text once and carry its spans over to tokens."""
    if not rendered:
        return []
    encoded = tokenizer(
        [item.text for item in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    bos = added_bos(tokenizer) if any(item.bos for item in rendered) else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for item, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        mask = _in_spans(np.asarray(offsets, np.int64).reshape(-1, 2)[:, 0], item.spans)
        before = bos if item.bos and ids[:1] != bos else []
        after = eos if item.eos and ids[-1:] != eos else []
        ids_T = np.array(before + ids + after, np.int32)
        mask_T = np.concatenate([np.zeros(len(before), bool), mask, np.ones(len(after), bool)])
        examples.append(Example(ids_T, mask_T))
    return examples


def end_tokens(tokenizer: Any) -> np.ndarray:
    """Return the ids that can end a turn: special tokens, but for BOS and padding where they are not also EOS."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    special -= {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    return np.array(sorted(special), np.int64)


def trains_end(example: Example, end_ids: np.ndarray) -> bool:
    """Return whether the last trained tokens include one that ends the turn (a newline may follow it)."""
    trained_T = np.flatnonzero(example.mask_T)
    return bool(np.isin(example.ids_T[trained_T[-2:]], end_ids).any())


def is_silent(conversation: Conversation) -> bool:
    """Return whether a trained reply, or a plain text, is empty: nothing but its end would be trained."""
    if conversation.text is not None:
        return not conversation.text.strip()
    replies = (m for m in conversation.messages[conversation.prompt_messages :] if m["role"] == "assistant")
    # Replies may be in other fields than their content: tool calls, or thoughts under the template's own names.
    return any(
        not message["content"].strip() and not any(value for key, value in message.items() if key not in _NO_REPLY)
        for message in replies
    )


def template_gaps(tokenizer: Any, conversation: Conversation, how: Rendering, rendered: Rendered) -> tuple[str, ...]:
    """Return what is amiss with the template on this conversation, as sentences for a warning."""
    if not how.use_chat_template or not conversation.messages:
        return ()
    template = _template_for(tokenizer, conversation, how)
    gaps = []
    if conversation.tools and "tools" not in template:
        gaps.append("the chat template does not print the `tools` column, so the model will not see it")
    if "tool_calls" not in template and any(message.get("tool_calls") for message in conversation.messages):
        gaps.append("the chat template does not know tool calls, so they are written as plain JSON")
    if how.completion_only and trains_header(tokenizer, template, conversation, rendered.text, rendered.spans):
        gaps.append(
            "the chat template ignores add_generation_prompt, so what it writes before a reply is trained with it"
        )
    return tuple(gaps)


def _in_spans(starts_T: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    edges = np.array([edge for span in spans for edge in span], np.int64)
    return np.searchsorted(edges, starts_T, side="right") % 2 == 1


def added_bos(tokenizer: Any) -> list[int]:
    """Return the BOS that the tokenizer puts before plain text, as a list of one id or none."""
    ids = tokenizer("a", return_attention_mask=False)["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def _joined(tokenizer: Any, conversation: Conversation, how: Rendering) -> Rendered:
    """Join contents as plain text, a newline between turns unless there is white space, EOS after each reply."""
    text, spans = "", []
    for number, message in enumerate(_calls_as_text(conversation).messages):
        if text and not text[-1].isspace() and not message["content"][:1].isspace():
            text += "\n"
        start = len(text)
        text += message["content"]
        if message["role"] == "assistant":
            text += tokenizer.eos_token or ""
            if number >= conversation.prompt_messages:
                spans.append((start, len(text)))
    if not how.completion_only:
        spans = [(0, len(text))]
    return Rendered(text, tuple(spans), bos=True)


def _calls_as_text(conversation: Conversation) -> Conversation:
    """Move tool calls into the content, one JSON object a line, for whatever prints contents alone."""
    if not any(message.get("tool_calls") for message in conversation.messages):
        return conversation
    messages = []
    for message in conversation.messages:
        calls = [call.get("function", call) for call in message.get("tool_calls", [])]
        lines = [json.dumps(call, ensure_ascii=False) for call in calls]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        messages.append(kept | {"content": "\n".join(filter(None, [message["content"], *lines]))})
    return Conversation(tuple(messages), conversation.tools, prompt_messages=conversation.prompt_messages)


def _template_for(tokenizer: Any, conversation: Conversation, how: Rendering) -> str:
    """Return the Jinja source: the key's, or the tokenizer's (which may hold another one for rows with tools)."""
    if how.template:
        return how.template
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, as is usual for a base model. Give one with chat_template_path=... "
            "(or chat_template=...), start from the instruction-tuned model, or set use_chat_template=false to join "
            "contents as plain text."
        )
    return tokenizer.get_chat_template(None, conversation.tools)


def _check_syntax(tokenizer: Any, how: Rendering) -> None:
    import jinja2

    probe = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    try:
        render(tokenizer, _template_for(tokenizer, Conversation(probe), how), probe, None)
    except TemplateRefused as refused:
        # A template may rightly refuse the probe; only one that does not parse can never render anything.
        if isinstance(refused.__cause__, jinja2.TemplateSyntaxError):
            line = refused.__cause__.lineno
            raise UserError(
                f"the chat template is not valid Jinja: {refused.__cause__} (line {line}). Mend it, or set another "
                "with chat_template or chat_template_path."
            ) from None


def _template_file(name: str) -> str:
    """Return the template in a ``.jinja`` file, or in the ``chat_template`` field of a JSON file."""
    if not name:
        return ""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"chat_template_path={name}: no such file. Give a .jinja file, or JSON with `chat_template`.")
    try:
        source = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template_path={name}: cannot be read: {error}. Save it as text in UTF-8.") from None
    if path.suffix != ".json":
        return source
    try:
        template = json.loads(source)["chat_template"]
    except (ValueError, KeyError, TypeError):
        template = None
    if not isinstance(template, str):
        raise UserError(f"chat_template_path={name}: no JSON object with a text field `chat_template`.")
    return template
