"""Prompts: rows of a dataset become what is asked, what is shown of it, and tokens.

Left out on purpose: sampling (``engine``, ``episodes``), scoring (``reward``), and prompts that are typed in or lie in
files of lines, which `luthier generate` alone reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.config import DatasetKeys, TemplateKeys
from luthier.data import chat, schemas, source
from luthier.data.rows import Rows
from luthier.data.schemas import RowError, Selection
from luthier.errors import UserError
from luthier.rollout import text
from luthier.rollout.reward import Group
from luthier.rollout.verifiers import Text
from luthier.types import Conversation

ALONE = ("prompt", "messages", "conversations", "question")
"""The columns that a prompt without an answer is read from, in this order."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and what the answer is held against.

    ``place`` names it in messages. ``messages`` are what the model answers, with their ``tools``; ``shown`` is the
    prompt for people and reward functions: messages if the row has messages, else text. ``reference`` is the text of
    the row's own answer, of ``replies`` messages; ``row`` is the whole row.
    """

    place: str
    messages: tuple[dict[str, Any], ...]
    shown: Text
    tools: tuple[dict[str, Any], ...] | None = None
    reference: str | None = None
    replies: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Alone:
    """Reads rows that hold a prompt and nothing to hold an answer against: a text or messages in ``column``."""

    column: str

    @property
    def required(self) -> tuple[str, ...]:
        """The column, as in ``Selection``."""
        return (self.column,)

    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation in ``row``. Raises RowError naming the column."""
        content = row.get(self.column)
        if not isinstance(content, str):
            return Selection("messages", (("messages", self.column), ("tools", "tools"))).read(row)
        if not content.strip():
            raise RowError("", "an empty prompt. Give it some text, or remove it.")
        return Conversation(({"role": "user", "content": content},))


def choose(keys: DatasetKeys, rows: Rows) -> Selection | Alone:
    """Return how rows are read: as for training, or where no answer is among their columns, the prompt alone.

    Raises UserError where there is not even a prompt, and where ``train_data_columns`` names what is not there.
    """
    named = keys.train_data_columns
    columns = rows.columns if named is None else tuple(named)
    alone = next((column for column in ALONE if column in columns), None)
    if schemas.recognise(named or columns) is not None or alone is None:
        return source.selection(keys, rows)
    column = named[alone] if isinstance(named, Mapping) else alone
    if column not in rows.columns:
        return source.selection(keys, rows)  # which says that it is not there
    return Alone(column)


def read(rows: Rows, chosen: Selection | Alone, system_prompt: str = "") -> list[Prompt]:
    """Return the prompt of each row. Raises UserError naming a row that cannot be read or asks nothing."""
    return [read_row(rows[index], rows.place(index), chosen, system_prompt) for index in range(len(rows))]


def read_row(row: Mapping[str, Any], place: str, chosen: Selection | Alone, system_prompt: str = "") -> Prompt:
    """Return the prompt of one row: its messages up to the last reply, which is the reference.

    ``system_prompt`` goes before messages that have none. Raises UserError naming ``place``.
    """
    try:
        conversation = chosen.read(row)
    except RowError as error:
        raise UserError(f"{place}: {error}") from None
    messages, count = conversation.messages, conversation.prompt_messages
    if not count:  # a whole conversation
        count = len(messages)
        while count and messages[count - 1]["role"] == "assistant":
            count -= 1
    asked, replies = messages[:count], messages[count:]
    if not asked:
        raise UserError(f"{place}: nothing comes before its reply, so there is no prompt. Remove the row.")
    reference = "".join(message["content"] for message in replies) if replies else None
    as_messages = not isinstance(row[chosen.required[0]], str)
    prompt = Prompt(place, asked, asked[-1]["content"], conversation.tools, reference, len(replies), row)
    prompt = with_system(prompt, system_prompt)
    return replace(prompt, shown=list(prompt.messages)) if as_messages else prompt


def with_system(prompt: Prompt, system_prompt: str) -> Prompt:
    """Return the prompt with a system message before it, if it has none and ``system_prompt`` is not empty."""
    if not system_prompt or any(message["role"] == "system" for message in prompt.messages):
        return prompt
    return replace(prompt, messages=({"role": "system", "content": system_prompt}, *prompt.messages))


def encode(keys: TemplateKeys, prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each prompt. Raises UserError naming one that the template refuses or that has no tokens."""
    how = chat.prompt_rendering(keys, tokenizer)
    return [_encode(how, prompt, tokenizer) for prompt in prompts]


def overlong(ids: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Return the indices of the prompts that have more than ``limit`` tokens."""
    return [index for index, tokens in enumerate(ids) if len(tokens) > limit]


def group(prompt: Prompt, texts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> Group:
    """Return a prompt's completions as reward functions see them: messages where the prompt is shown as messages."""
    as_messages = not isinstance(prompt.shown, str)
    return Group(
        prompt=prompt.shown,
        completions=[[{"role": "assistant", "content": said}] for said in texts] if as_messages else texts,
        completion_ids=completion_ids,
        row=prompt.row,
        reference=prompt.reference,
        place=prompt.place,
    )


def _encode(how: chat.Rendering, prompt: Prompt, tokenizer: Any) -> list[int]:
    try:
        ids = text.encode(tokenizer, how, prompt.messages, prompt.tools)
    except RowError as error:
        raise UserError(f"{prompt.place}: {error}") from None
    if not ids:
        raise UserError(f"{prompt.place}: an empty prompt, of no tokens. Give it some text.")
    return ids
