"""Where a conversation is typed and read: a terminal, or lines from a pipe.

Left out on purpose: a full-screen interface, and answers shown as Markdown: what a model writes is shown as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from luthier.commands import terminal
from luthier.commands.chat_session import Said
from luthier.errors import UserError

PROMPT = "> "
_PASTE = 0.03  # seconds: what is there so soon after a line was pasted with it


class Screen(Protocol):
    """Where lines come from and answers go."""

    def read(self) -> str | None:
        """Return the next line that was typed, or None when there are no more."""
        ...

    def tell(self, message: str) -> None:
        """Show a message that is no model's."""
        ...

    def show(self, names: Sequence[str], answers: Iterator[Said]) -> None:
        """Show what the models of these names say, as it comes."""
        ...


class Pipe:
    """Lines from standard input, answers and nothing else to standard output, all else to standard error.

    The answers of several models come one after another, each under its model's name.
    """

    def __init__(self) -> None:
        self._lines = 0

    def read(self) -> str | None:
        """Return the next line, None at the end. Raises UserError for one that is not UTF-8."""
        line = sys.stdin.buffer.readline()  # as bytes: text is decoded many lines at a time, and would not tell which
        self._lines += 1
        try:
            return line.decode().rstrip("\r\n") if line else None
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input, line {self._lines}: byte {line[error.start]:#04x} at place {error.start + 1} is not "
                "UTF-8. Convert the text to UTF-8, for example with iconv."
            ) from None

    def tell(self, message: str) -> None:
        """Print to standard error."""
        print(message, file=sys.stderr, flush=True)

    def show(self, names: Sequence[str], answers: Iterator[Said]) -> None:
        """Print a single answer as it comes, several when they are done."""
        texts = [""] * len(names)
        for said in answers:
            new = terminal.harmless(said.text) if sys.stdout.isatty() else said.text
            texts[said.voice] += new
            if len(names) == 1:
                print(new, end="", flush=True)
        if len(names) == 1:
            print(flush=True)
            return
        for name, answer in zip(names, texts, strict=True):
            print(f"[{name}]\n{answer}", flush=True)


class Terminal:
    """A terminal: lines can be edited and called back, answers stream, those of several models side by side."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._interrupted = False
        with contextlib.suppress(ImportError):  # not on every platform; without it lines are typed plainly
            importlib.import_module("readline")

    def read(self) -> str | None:
        """Return what was typed, or pasted as several lines. Ctrl-C clears the line, twice or Ctrl-D ends."""
        while True:
            try:
                line = input(PROMPT)
                while not line.startswith("/") and select.select([sys.stdin], [], [], _PASTE)[0]:
                    line += "\n" + input()
                self._interrupted = False
                return line
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                if self._interrupted:
                    return None
                self._interrupted = True
                self.tell("Ctrl-C again, Ctrl-D or /exit leaves.")

    def tell(self, message: str) -> None:
        """Print dimly."""
        self._console.print(f"[dim]{escape(message)}[/dim]")

    def show(self, names: Sequence[str], answers: Iterator[Said]) -> None:
        """Stream one answer, or several in columns."""
        if len(names) > 1:
            self._columns(names, answers)
            return
        for said in answers:
            sys.stdout.write(terminal.harmless(said.text))
            sys.stdout.flush()
        print()

    def _columns(self, names: Sequence[str], answers: Iterator[Said]) -> None:
        texts = [""] * len(names)

        def table() -> Table:
            made = Table(expand=True, show_edge=False)
            for name in names:
                made.add_column(Text(name), ratio=1, overflow="fold")
            made.add_row(*(Text(terminal.harmless(text)) for text in texts))
            return made

        # What is taller than the terminal cannot be redrawn, so the whole is printed when it is known.
        with Live(table(), console=self._console, transient=True) as live:
            for said in answers:
                texts[said.voice] += said.text
                live.update(table())
        self._console.print(table())


def screen() -> Screen:
    """Return the terminal, or the pipe where there is none at either end."""
    return Terminal() if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()


@contextlib.contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C call ``stop``, so that the device's work is not cut in the middle; a second one interrupts."""
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
