"""The prompts of `luthier generate`: read from its keys, rendered, and refused with their place where they cannot be.

Left out on purpose: datasets with splits, and what a prompt's right answer is; ``rollout.prompts`` knows those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.config import GenerateConfig
from luthier.data.files import SUFFIXES
from luthier.data.rows import read_file
from luthier.errors import UserError
from luthier.rollout import prompts
from luthier.rollout.prompts import ALONE, Alone, Prompt


def read(config: GenerateConfig) -> list[Prompt]:
    """Return the prompts that ``config`` names, with the system message. Raises UserError naming file and line."""
    found = [_from_text(config.prompt, "prompt")] if config.prompt else list(_from_file(config.prompts_path))
    if not found:
        raise UserError(f"prompts_path={config.prompts_path}: no prompt in it. Write one a line.")
    return [_shown_whole(prompts.with_system(prompt, config.system_prompt)) for prompt in found]


def encode(
    config: GenerateConfig, asked: Sequence[Prompt], tokenizer: Any, context_length: int | None
) -> list[list[int]]:
    """Return the tokens of each prompt.

    Raises UserError naming the prompt that the template cannot render, that has no tokens, or that leaves no room for
    an answer within ``context_length`` (the model's) or ``max_target_length``.
    """
    found = prompts.encode(config, asked, tokenizer)
    limit = config.max_target_length or context_length
    for index in () if limit is None else prompts.overlong(found, limit - 1):
        key = f"max_target_length={limit}" if config.max_target_length else f"the model's context of {limit} tokens"
        raise UserError(
            f"{asked[index].place}: a prompt of {len(found[index])} tokens leaves no room for an answer in {key}. "
            "Shorten it" + (", or raise max_target_length." if config.max_target_length else ".")
        )
    return found


def _from_file(name: str) -> Iterator[Prompt]:
    path = Path(name).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"prompts_path={name}: {problem}. Give a .txt file of one prompt a line, or a .jsonl file.")
    suffix = path.suffix.lower()
    if suffix not in (".txt", *SUFFIXES):
        raise UserError(f"prompts_path={name}: {_unknown(path)} Give .txt or {', '.join(SUFFIXES)}.")
    try:
        yield from _lines(path) if suffix == ".txt" else _rows(path)
    except OSError as error:
        raise UserError(f"prompts_path={name}: cannot be read ({error.strerror}). Make it readable.") from None


def _unknown(path: Path) -> str:
    """Return why the name of a file does not say how it is to be read."""
    if path.suffix:
        return f"cannot read `{path.suffix}` files."
    return "the name has no suffix, so it does not say what is in the file. Rename it."


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
        row, place = rows[index], rows.place(index)
        column = next((name for name in ALONE if name in row), None)
        if column is None:
            listed = ", ".join(f"`{name}`" for name in row) or "none"
            raise UserError(
                f"{place}: none of the columns {', '.join(ALONE)} in this row, which has {listed}. Rename the one that "
                "holds the prompt to `prompt`, or remove the row."
            )
        _check(row[column], f"{place}: column `{column}`")
        yield prompts.read_row(row, place, Alone(column))


def _check(content: Any, place: str) -> None:
    """Refuse what is neither a text nor a list, before it is read as the latter. Raises UserError naming ``place``."""
    if isinstance(content, str | list):
        return
    found = "null" if content is None else f"{content!r:.57} ({type(content).__name__})"
    raise UserError(f"{place}: {found} where a text or a list of messages should be. Fix or remove the row.")


def _from_text(content: str, place: str) -> Prompt:
    return prompts.read_row({"prompt": content}, place, Alone("prompt"))


def _shown_whole(prompt: Prompt) -> Prompt:
    """Show a prompt of one user's message as its text, and any other as messages."""
    alone = len(prompt.messages) == 1 and prompt.messages[0]["role"] == "user"
    return replace(prompt, shown=prompt.messages[0]["content"] if alone else list(prompt.messages))
