"""What the user sees: a header, a marked example, progress, a summary. Rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from luthier import processes

PLAIN_INTERVAL = 10.0  # seconds between plain lines, so that a log file stays readable

Numbers = Sequence[tuple[str, str]]
"""Names of metrics, and how each is printed."""
SFT_NUMBERS: Numbers = (
    ("loss", "loss {:.4f}"),
    ("mean_token_accuracy", "accuracy {:.3f}"),
    ("tokens_per_second", "{:.0f} tokens/s"),
    ("mfu", "MFU {:.1%}"),
)


def console() -> Console:
    """Return the console that everything is printed to; of several processes, the first one's alone is seen."""
    return Console(highlight=False, soft_wrap=True, quiet=not processes.is_first())


def table(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Print a title and aligned lines of name and value."""
    width = max(map(len, rows))
    console.print(f"[bold]{title}[/bold]")
    for name, value in rows.items():
        console.print(f"[dim]{name:<{width}}[/dim]  {escape(value)}")


def warn(console: Console, message: str) -> None:
    """Print a warning that stands out."""
    console.print(f"[bold yellow]Warning:[/bold yellow] {escape(message)}")


def quantity(number: float) -> str:
    """Return a count as people write it: 134.5M, 12.3k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@contextlib.contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is told (done, total), and show both after a moment: short work shows nothing."""
    started = shown = time.perf_counter()
    with console.status(what) if console.is_terminal else contextlib.nullcontext() as status:

        def update(done: int, total: int) -> None:
            nonlocal shown
            now = time.perf_counter()
            if status is not None:
                status.update(f"{what}: {done:,} of {total:,}")
            elif now - shown >= PLAIN_INTERVAL:
                shown = now
                console.print(f"{what}: {done:,} of {total:,}, {duration(now - started)}")

        yield update


class Steps:
    """The progress of a run, one call of ``update`` a step; of its metrics, ``shown`` are printed where they are."""

    def __init__(self, console: Console, total: int, done: int, shown: Numbers = SFT_NUMBERS) -> None:
        self._console, self._total, self._shown = console, total, shown
        self._started, self._first = time.perf_counter(), done
        self._printed = 0.0
        columns = (
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=total, completed=done, numbers="") if self._bar else None

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the numbers of step ``step``, counted from 1."""
        numbers = "  ".join(form.format(metrics[name]) for name, form in self._shown if name in metrics)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = time.perf_counter()
        if now - self._printed < PLAIN_INTERVAL and step not in (self._first + 1, self._total):
            return
        self._printed = now
        left = (now - self._started) / max(step - self._first, 1) * (self._total - step)
        self._console.print(f"step {step}/{self._total}  {numbers}  {duration(left)} left")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
