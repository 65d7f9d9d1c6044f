"""The prompts of `luthier generate`: read from its keys, rendered, and refused with their place where they cannot be.

Left out on purpose: datasets with splits, and what a prompt's right answer is; `luthier eval` knows those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.config import GenerateConfig
from luthier.data import chat
from luthier.data.files import SUFFIXES
from luthier.data.rows import read_file
from luthier.data.schemas import RowError, Selection
from luthier.errors import UserError
from luthier.rollout import text

COLUMNS = ("prompt", "messages", "conversations", "question")
"""The columns that prompts are read from, in this order."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its place for messages about it, the messages to answer, and their tools.

    ``replies`` counts what was left out behind the last question: rows to train on end with the reply.
    """

    place: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    replies: int = 0


def read(config: GenerateConfig) -> list[Prompt]:
    """Return the prompts that ``config`` names, with the system message. Raises UserError naming file and line."""
    found = [_from_text(config.prompt, "prompt")] if config.prompt else list(_from_file(config.prompts_path))
    if not found:
        raise UserError(f"prompts_path={config.prompts_path}: no prompt in it. Write one a line.")
    return [_with_system(prompt, config.system_prompt) for prompt in found]


def encode(
    config: GenerateConfig, prompts: list[Prompt], tokenizer: Any, context_length: int | None
) -> list[list[int]]:
    """Return the tokens of each prompt.

    Raises UserError naming the prompt that the template cannot render, that has no tokens, or that leaves no room for
    an answer within ``context_length`` (the model's) or ``max_target_length``.
    """
    how = chat.prompt_rendering(config, tokenizer)
    return [_encode(config, prompt, how, tokenizer, context_length) for prompt in prompts]


def _encode(
    config: GenerateConfig, prompt: Prompt, how: chat.Rendering, tokenizer: Any, context_length: int | None
) -> list[int]:
    try:
        ids = text.encode(tokenizer, how, prompt.messages, prompt.tools)
    except RowError as error:
        raise UserError(f"{prompt.place}: {error}") from None
    if not ids:
        raise UserError(f"{prompt.place}: an empty prompt, of no tokens. Give it some text.")
    limit = config.max_target_length or context_length
    if limit is not None and len(ids) >= limit:
        key = f"max_target_length={limit}" if config.max_target_length else f"the model's context of {limit} tokens"
        raise UserError(
            f"{prompt.place}: a prompt of {len(ids)} tokens leaves no room for an answer in {key}. Shorten it"
            + (", or raise max_target_length." if config.max_target_length else ".")
        )
    return ids


def _from_file(name: str) -> Iterator[Prompt]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"prompts_path={name}: no such file. Give a .txt file of one prompt a line, or a .jsonl file.")
    if path.suffix not in (".txt", *SUFFIXES):
        raise UserError(f"prompts_path={name}: cannot read `{path.suffix}` files. Give .txt or {', '.join(SUFFIXES)}.")
    try:
        yield from _lines(path) if path.suffix == ".txt" else _rows(path)
    except OSError as error:
        raise UserError(f"prompts_path={name}: cannot be read ({error.strerror}). Make it readable.") from None


def _lines(path: Path) -> Iterator[Prompt]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                content = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8: {error}. Save the file as text in UTF-8.") from None
            if content.strip():
                yield _from_text(content, place)


def _rows(path: Path) -> Iterator[Prompt]:
    rows = read_file(path)
    for index in range(len(rows)):
        yield _from_row(rows[index], rows.place(index))


def _from_row(row: dict[str, Any], place: str) -> Prompt:
    column = next((name for name in COLUMNS if name in row), None)
    if column is None:
        listed = ", ".join(f"`{name}`" for name in row) or "none"
        raise UserError(f"{place}: none of the columns {', '.join(COLUMNS)} in this row, which has {listed}.")
    if isinstance(row[column], str):
        return _from_text(row[column], place)
    try:
        turns = Selection("messages", (("messages", column), ("tools", "tools"))).read(row)
    except RowError as error:
        raise UserError(f"{place}: {error}") from None
    count = len(turns.messages)
    while count and turns.messages[count - 1]["role"] == "assistant":
        count -= 1
    if not count:
        raise UserError(f"{place}: column `{column}`: nothing but replies. Begin with a message to answer.")
    return Prompt(place, turns.messages[:count], turns.tools, len(turns.messages) - count)


def _from_text(content: str, place: str) -> Prompt:
    if not content.strip():
        raise UserError(f"{place}: an empty prompt. Give it some text, or remove it.")
    return Prompt(place, ({"role": "user", "content": content},))


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if not system or any(message["role"] == "system" for message in prompt.messages):
        return prompt
    messages = ({"role": "system", "content": system}, *prompt.messages)
    return Prompt(prompt.place, messages, prompt.tools, prompt.replies)
