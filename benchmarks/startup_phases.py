"""The command `luthier sft`, writing down when each phase of it began and ended: `startup.py` runs it.

    python startup_phases.py events.jsonl key=value ...

Does what `cli.main` does, with a clock around the functions that the run calls, and adds what jax itself says of
tracing, lowering and compiling. Times are seconds since the epoch, so that the parent can set them against its own.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Events:
    """A file of phases, a line each."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def add(self, phase: str, start: float, end: float) -> None:
        """Write one phase, at once."""
        self._file.write(json.dumps({"phase": phase, "start": start, "end": end}) + "\n")
        self._file.flush()

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock around each call."""

        @functools.wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            start = time.time()
            try:
                return function(*arguments, **keywords)
            finally:
                self.add(phase, start, time.time())

        return run


def main() -> None:
    start = time.time()
    events = Events(Path(sys.argv[1]))
    from luthier import config

    keys = config.resolve("sft", sys.argv[2:], os.environ)
    events.add("keys", start, time.time())

    start = time.time()
    from luthier.train import sft

    events.add("imports", start, time.time())
    watch(events, sft)
    sft.run(keys)


def watch(events: Events, sft: Any) -> None:
    """Put the clock around what ``sft.run`` calls, and listen to jax."""
    import jax

    for phase, module, name in (
        ("model's config", sft.source_lib, "resolve"),
        ("devices", sft.mesh_lib, "make"),
        ("checks", sft, "prepare"),
        ("tokenizer", sft.tokenizer_lib, "load"),
        ("rows", sft, "load_rows"),
        ("header", sft.report, "header"),
        ("weights", sft, "load"),
    ):
        setattr(module, name, events.timed(phase, getattr(module, name)))
    compile_steps = sft.compile_steps

    def compile_timed(*arguments: Any) -> Any:
        start = time.time()
        programs = compile_steps(*arguments)
        programs.train.add_done_callback(lambda _: events.add("compile", start, time.time()))
        return programs

    sft.compile_steps = compile_timed

    def listen(name: str, seconds: float, fun_name: str = "", **_: Any) -> None:
        if seconds > 0.1 and name.startswith("/jax/core/compile/"):
            end = time.time()
            events.add(f"  {name.rpartition('/')[2].removesuffix('_duration')} {fun_name}", end - seconds, end)

    jax.monitoring.register_event_duration_secs_listener(listen)


if __name__ == "__main__":
    main()
