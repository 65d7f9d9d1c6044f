"""`luthier chat`: talk with a model, or with several that answer side by side.

Lines come from a terminal or a pipe (``chat_terminal``); what they do is in ``chat_session``. Left out on purpose:
keeping conversations, and tools.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from luthier import mesh as mesh_lib
from luthier.commands import chat_terminal, output, terminal
from luthier.commands.chat_session import Session, Voice
from luthier.commands.chat_terminal import Screen
from luthier.config import ChatConfig
from luthier.data import chat
from luthier.data.schemas import RowError
from luthier.errors import UserError
from luthier.rollout import text
from luthier.rollout.opened import open_engine, open_model

_DECODE_STEPS = 4
"""Tokens that come at a time where `decode_steps` is not set: few, since someone is reading."""


def run(config: ChatConfig) -> None:
    """Run ``luthier chat`` until the lines end. Raises UserError for a model that cannot be opened or talked with."""
    # One sequence at a time is all that a conversation needs memory for.
    changes: dict[str, Any] = {"max_num_seqs": 1}
    if "decode_steps" not in config.model_fields_set:
        changes["decode_steps"] = _DECODE_STEPS
    config = config.model_copy(update=changes)
    voices = [_open(config, chat.prompt_rendering), *(_open(_compared(config, path), _own) for path in config.compare)]
    _tell_templates(voices)
    with mesh_lib.use(voices[0].opened.mesh), output.until_closed():
        converse(Session(config, voices), chat_terminal.screen())


def converse(session: Session, screen: Screen) -> None:
    """Read lines from ``screen`` and answer them until there are no more. A wrong line is told, and ends nothing."""
    names = [voice.name for voice in session.voices]
    screen.tell(f"{' and '.join(names)}. /help lists the commands.")
    while (line := screen.read()) is not None:
        if line.strip() in ("/exit", "/quit"):
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                screen.tell(session.command(line))
            elif line.strip():
                with chat_terminal.interruptible(session.stop):
                    screen.show(names, session.answer(line.removeprefix("/")))
                for voice in session.voices:
                    if note := ending(session, voice):
                        screen.tell(note if len(names) == 1 else f"{voice.name}: {note}")
        except UserError as error:
            screen.tell(str(error))


def ending(session: Session, voice: Voice) -> str:
    """Return what there is to say about how an answer ended, where it did not end by itself."""
    answer = voice.answer
    if answer is None or answer.finish == "stop":
        return ""
    if answer.finish == "cancelled":
        return "(stopped)"
    most = session.config.max_new_tokens
    if len(answer.tokens_T) >= most:
        return f"(cut at max_new_tokens={most}; /settings max_new_tokens={2 * most} allows more)"
    return f"(cut: the conversation fills the {voice.engine.length} tokens there are; {voice.way_out})"


def _compared(config: ChatConfig, path: str) -> ChatConfig:
    """Return the keys of a further model: what is the first one's alone is left out."""
    changes = {"load_parameters_path": path, "model_name": "", "tokenizer_path": "", "lora_path": ""}
    return config.model_copy(update=changes)


def _own(config: ChatConfig, tokenizer: Any) -> chat.Rendering:
    """Return how a further model is asked: by its own chat template, where it has one. It may be of another family."""
    if tokenizer.chat_template:
        config = config.model_copy(update={"chat_template": "", "chat_template_path": ""})
    return chat.prompt_rendering(config, tokenizer)


def _tell_templates(voices: Sequence[Voice]) -> None:
    """Say which models are not asked by the chat template that was named."""
    first, *others = voices
    for voice in others if first.how.use_chat_template and first.how.template else ():
        if not voice.how.template:
            told = f"{voice.name} goes by a chat template of its own, not by the one that was named."
            terminal.messages().print(told, markup=False)


def _open(config: ChatConfig, render: Callable[[ChatConfig, Any], chat.Rendering]) -> Voice:
    """Return a model, opened, that is asked as ``render`` says. Raises UserError for one that cannot be."""
    console = terminal.messages()

    def look(source: Any, tokenizer: Any) -> None:
        """Refuse a model that cannot be talked with before its weights are read."""
        messages = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        how = render(config, tokenizer)
        try:
            text.encode(tokenizer, how, [*messages, {"role": "user", "content": "Hello"}])
        except RowError as error:
            raise UserError(f"{source.name}: {error}") from None

    name = config.load_parameters_path or config.model_name
    with console.status(f"Opening {name}") if console.is_terminal else contextlib.nullcontext():
        opened = open_model(config, look)
    with mesh_lib.use(opened.mesh):
        engine = open_engine(config, opened)
        engine.reserve(1)  # raises where the memory is not enough, now and not at the first message
    return Voice(opened, engine, render(config, opened.tokenizer))
