"""A conversation with one model or several: what is said, kept, set and stopped. No terminal in it.

Left out on purpose: how it looks and where lines come from (``chat_terminal``), and conversations kept on disk.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from luthier import keys
from luthier.config import ChatConfig, SampleKeys
from luthier.data import chat
from luthier.data.schemas import RowError
from luthier.errors import UserError, did_you_mean
from luthier.rollout import text
from luthier.rollout.engine import Completion, Request
from luthier.rollout.local import LocalEngine
from luthier.rollout.opened import Opened, sampling

Message = dict[str, Any]

HELP = {
    "/reset": "begin a new conversation",
    "/system TEXT": "set the system message (`/system` shows it, `/system -` removes it)",
    "/settings": "show how answers are drawn; `/settings temperature=0.2 top_p=0.9` changes it",
    "/help": "show this",
    "/exit": "leave (Ctrl-D too; Ctrl-C stops an answer)",
}


class Said(NamedTuple):
    """The next text of the answer of voice number ``voice``."""

    voice: int
    text: str


@dataclass
class Voice:
    """A model that answers, with the conversation as it knows it. The engine is this voice's alone."""

    opened: Opened
    engine: LocalEngine
    how: chat.Rendering
    history: list[Message] = field(default_factory=list)
    answer: Completion | None = None
    said: str = ""
    _number: int = field(default=-1, init=False)

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.opened.name

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens that ask for a reply to ``messages``.

        Raises UserError where the template cannot render them, or they leave no room for an answer.
        """
        try:
            ids = text.encode(self.opened.tokenizer, self.how, messages)
        except RowError as error:
            raise UserError(f"{self.name}: {error}") from None
        limit = self.engine.length
        if limit is not None and len(ids) >= limit:
            raise UserError(
                f"{self.name} reads {limit} tokens at most, and the conversation has {len(ids)} with this message, "
                f"which is left out. {self.way_out}."
            )
        return ids

    @property
    def way_out(self) -> str:
        """What to do when the conversation has become too long."""
        length, most = self.engine.length, self.engine.limits.length
        if length is None or most is None or length >= most:
            return "/reset begins a new one"
        return f"/reset begins a new one; with more memory for the cache (kv_cache_gib) it can have up to {most}"

    def begin(self, request: Request) -> None:
        """Begin an answer."""
        chosen, after = request.sampling, () if self.how.use_chat_template else request.prompt
        self._stream = text.TextStream(self.opened.tokenizer, chosen.stop, chosen.stop_token_ids, after)
        self.answer, self.said = None, ""
        self._number = self.engine.submit(request)

    def stop(self) -> None:
        """End the answer with what there is of it."""
        if self.answer is None:
            self.engine.cancel(self._number)

    def abandon(self) -> None:
        """End the answer, and leave nothing of it in the engine."""
        self.stop()
        if self.engine.busy:
            self.engine.step()  # which tells that it was cancelled

    def step(self) -> str:
        """Go on with the answer and return what is new; ``answer`` is there once it is whole."""
        new = ""
        for event in self.engine.step():
            if event.request != self._number:
                continue
            if isinstance(event, Completion):
                self.answer = event
                new += self._stream.close()
            else:
                new += self._stream.push(event.tokens_T.tolist())
        self.said += new
        return new


class Session:
    """A conversation that every voice takes part in, each with a history of its own answers."""

    def __init__(self, config: ChatConfig, voices: Sequence[Voice]) -> None:
        self.config, self.voices = config, list(voices)
        self.system = config.system_prompt
        self._stopping = False

    def answer(self, content: str) -> Iterator[Said]:
        """Yield what the voices answer to a message, in turns, and then keep it all.

        Raises UserError before anything is said, where a voice cannot be asked; the message is then not kept. Where no
        text came before a ``stop``, it is not kept either.
        """
        message = {"role": "user", "content": content}
        self._stopping = False
        requests = [
            Request(voice.prompt([*self._system(), *voice.history, message]), 1, sampling(self.config, voice.opened))
            for voice in self.voices
        ]
        for voice, request in zip(self.voices, requests, strict=True):
            voice.engine.check(request)
        try:
            for voice, request in zip(self.voices, requests, strict=True):
                voice.begin(request)
            yield from self._said()
        except BaseException:  # what is left in an engine would be in the way of the next message
            for voice in self.voices:
                voice.abandon()
            raise
        for voice in self.voices:
            if voice.said or not self._stopping:
                voice.history += [message, {"role": "assistant", "content": voice.said}]

    def stop(self) -> None:
        """End the answers that are under way, as soon as the device looks up. May be called from a signal handler."""
        self._stopping = True

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says, and return what to tell. Raises UserError for a wrong one."""
        name, *rest = line.split(maxsplit=1)
        commands: dict[str, Callable[[str], str]] = {
            "/reset": self._reset,
            "/system": self._set_system,
            "/settings": self._set,
            "/help": lambda rest: "\n".join(f"{usage:<14} {meaning}" for usage, meaning in HELP.items()),
        }
        if name not in commands:
            hint = did_you_mean(name, [*commands, "/exit"]) or " /help lists them."
            raise UserError(f"unknown command `{name}`.{hint} A message that begins with a slash is written with two.")
        return commands[name](rest[0].strip() if rest else "")

    def _said(self) -> Iterator[Said]:
        while any(voice.answer is None for voice in self.voices):
            for number, voice in enumerate(self.voices):
                if self._stopping:
                    voice.stop()
                if voice.answer is None and (new := voice.step()):
                    yield Said(number, new)

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _reset(self, rest: str) -> str:
        for voice in self.voices:
            voice.history.clear()
        return "A new conversation."

    def _set_system(self, rest: str) -> str:
        if not rest:
            return f"System message: {self.system}" if self.system else "No system message is set."
        self.system = "" if rest == "-" else rest
        kept = " The conversation goes on under it; /reset begins a new one." if self.voices[0].history else ""
        return ("The system message is set." if self.system else "The system message is removed.") + kept

    def _set(self, rest: str) -> str:
        try:
            arguments = shlex.split(rest)
        except ValueError as error:
            raise UserError(f"/settings {rest}: {error}. Close the quotation.") from None
        for argument in arguments:
            if "=" not in argument:
                raise UserError(f"/settings {argument}: give key=value pairs, such as temperature=0.2.")
        chosen = keys.read(SampleKeys, arguments, {})
        self.config = self.config.model_copy(update={name: getattr(chosen, name) for name in chosen.model_fields_set})
        shown = [self._settings(voice) for voice in self.voices]
        if len(set(shown)) == 1:
            return shown[0]
        return "\n".join(f"{voice.name}: {settings}" for voice, settings in zip(self.voices, shown, strict=True))

    def _settings(self, voice: Voice) -> str:
        chosen = sampling(self.config, voice.opened)
        names = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
        listed = [f"{name}={getattr(chosen, name):g}" for name in names]
        return " ".join([*listed, f"stop={list(chosen.stop)} stop_token_ids={list(chosen.stop_token_ids)}"])
